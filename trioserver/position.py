"""Places in the ledger, as text: points and positions. Pure; sits in every handshake.

    place      <ms>-<n>           of an entry in a stream; n // 4096 is the seq
    point      <epoch>.<ms>-<n>   a place, and which history it belongs to
    position   1.<point>          what clients keep: where they are in their own stream,
               1.<point>.<point>  and where in the one for everyone

Time comes first in a place, so that order survives a failover which rewinds the seq; the seq is
inside, so that two places tell how many notifications lie between them. A client that knows only
its place in the stream for everyone says `NOWHERE` about its own.
"""

import re
from typing import Final

import msgspec

NOWHERE: Final = "0.0-0"
"""Stands in a position for a point that is not known. No epoch is called 0."""

SEQ_SPAN: Final = 4096
"""Places that share one seq: a notification's own, then those of updates that came after it."""

MAX_LENGTH: Final = 1 + 2 * (1 + 16 + 1 + 15 + 1 + 16)
"""Of a position."""

# Both numbers stay below 2**53 for the scripts' sake, whose numbers are doubles.
_POINT = r"([a-z0-9]{1,16}\.[0-9]{1,15}-[0-9]{1,16})"
_match = re.compile(rf"1\.{_POINT}(?:\.{_POINT})?").fullmatch


class Position(msgspec.Struct, frozen=True, gc=False):
    """What a client has said about where it is; empty text where it has said nothing."""

    user: str
    """Point in its own stream."""
    all: str
    """Point in the stream for everyone."""


def parse(text: str) -> Position | None:
    """Return what a position says, or None if it is none. Never raises."""
    match = _match(text)
    if match is None:
        return None
    user, everyone = match.groups("")
    if user == NOWHERE:
        user = ""
    elif user.startswith("0."):
        return None
    return None if everyone.startswith("0.") else Position(user, everyone)


def join(user_point: str, all_point: str) -> str:
    """Return the position made of two points; either may be empty."""
    position = f"1.{user_point or NOWHERE}"
    return f"{position}.{all_point}" if all_point else position


def epoch_of(point: str) -> str:
    """Return the epoch of a point."""
    return point.partition(".")[0]


def place_of(point: str) -> str:
    """Return the place of a point; a place is its own."""
    return point.rpartition(".")[2]


def order(point: str) -> tuple[int, int]:
    """Return what sorts points of one epoch, or places, as their stream does."""
    milliseconds, _, number = place_of(point).partition("-")
    return int(milliseconds), int(number)


def is_after(point: str, other: str) -> bool:
    """Return whether ``point`` is later than ``other``, in the same epoch."""
    return epoch_of(point) == epoch_of(other) and order(point) > order(other)


def seq_of(point: str) -> int:
    """Return the seq of the newest notification at or before a point or place."""
    return int(point.rpartition("-")[2]) // SEQ_SPAN
