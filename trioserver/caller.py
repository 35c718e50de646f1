"""Who is on the other side of a connection, beside being a user: address, program, kind of client.

For limits per address, and for operators who look at who is connected. Nothing of it is proven
but the address.
"""

import functools
from typing import Final

import attrs

from trioserver.peers import UNKNOWN, address_text

MAX_AGENT: Final = 128
"""Bytes of ``User-Agent`` that are kept."""


@attrs.frozen
class Caller:
    """A client as its handshake described it."""

    peer: int = UNKNOWN
    """Its address, as `peers` writes it."""
    key: int | None = None
    """Under which limits count that address; None if they do not."""
    agent: str = ""
    """``User-Agent``, printable and cut."""
    client_type: str = ""
    """What kind of client it says it is."""

    @property
    def address(self) -> str:
        """Return its address for people."""
        return address_text(self.peer)


def caller(peer: int, key: int | None, agent: bytes, client_type: str) -> Caller:
    """Return a caller; the same object for the same values, of which there are often many.

    Args:
        peer: See `Caller.peer`.
        key: See `Caller.key`.
        agent: ``User-Agent`` as it came.
        client_type: See `Caller.client_type`; bounded by `wish`.
    """
    # Cut first: what is remembered must be bounded, too.
    return _caller(peer, key, agent[:MAX_AGENT], client_type)


@functools.lru_cache(maxsize=4096)
def _caller(peer: int, key: int | None, agent: bytes, client_type: str) -> Caller:
    visible = [char if char.isprintable() else "?" for char in agent.decode("latin-1")]
    return Caller(peer, key, "".join(visible), client_type)
