"""What a token allows its user to do with topics: its claim ``topics``. Pure.

The claim is a list of patterns, of what may be subscribed to, or an object:

    subscribe    patterns of what may be subscribed to
    publish      patterns of what may be published to; who publishes need not be a subscriber
    join         names of topics that the server subscribes each connection to by itself, and
                 that may be subscribed to again

Other members of the object are not looked at, as other claims are not, and null is no claim. One
that is not as it should be grants nothing, all of it; the token stays good, because an issuer may
have used the name for something else before, and its users must not be locked out of what has
nothing to do with topics. What is wrong is kept (`Grant.problem`) for the log and ``checktoken``:
whoever hands out tokens shall see it, not wonder why a user may not do what he should. There is a
bound for everything, because claims live as long as their connections.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final

import attrs
import msgspec

from trioserver.errors import AuthError
from trioserver.topics import Patterns, is_name

MAX_PATTERNS: Final = 64
"""Of each kind."""

MAX_JOINS: Final = 64

MAX_CLAIM: Final = 4 << 10
"""Bytes of the claim."""

_MEMORY: Final = 1 << 10
"""Claims that are remembered: most users have one of few."""

NO_PATTERNS: Final = Patterns()


@attrs.frozen(kw_only=True)
class Grant:
    """What somebody may do with topics, beside what everybody may."""

    subscribe: Patterns = NO_PATTERNS
    publish: Patterns = NO_PATTERNS
    join: tuple[str, ...] = ()
    """Topics that his connections are subscribed to without asking, without repetitions."""
    problem: str = ""
    """Why the claim is none and so grants nothing; empty if it is one."""

    def may_subscribe(self, name: str) -> bool:
        """Return whether he may subscribe to this topic."""
        return self.subscribe.matches(name) or name in self.join

    def may_publish(self, name: str) -> bool:
        """Return whether he may publish to this topic."""
        return self.publish.matches(name)


NO_GRANT: Final = Grant()

_TOO_LONG: Final = Grant(problem=f"the claim topics is longer than {MAX_CLAIM} bytes")


class _Claim(msgspec.Struct, frozen=True, gc=False):
    subscribe: list[str] = []
    publish: list[str] = []
    join: list[str] = []


_decode: Final = msgspec.json.Decoder(_Claim | list[str] | None).decode


def of_claim(raw: msgspec.Raw) -> Grant:
    """Return what the claim ``topics`` grants; of equal ones the same, as a rule.

    Args:
        raw: The claim's JSON. What is no claim grants nothing, and the grant knows why.
    """
    if len(raw) > MAX_CLAIM:
        return _TOO_LONG
    return _of_json(bytes(raw))


@lru_cache(maxsize=_MEMORY)
def _of_json(text: bytes) -> Grant:
    try:
        claim = _decode(text)
        if claim is None:
            return NO_GRANT
        if isinstance(claim, list):
            claim = _Claim(subscribe=claim)
        return Grant(
            subscribe=_patterns(claim.subscribe),
            publish=_patterns(claim.publish),
            join=_names(claim.join),
        )
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        return Grant(problem=f"the claim topics: {error}")


def _patterns(texts: list[str]) -> Patterns:
    if len(texts) > MAX_PATTERNS:
        raise ValueError(f"has more than {MAX_PATTERNS} patterns of a kind")
    return Patterns.of(texts) if texts else NO_PATTERNS


def _names(texts: list[str]) -> tuple[str, ...]:
    if len(texts) > MAX_JOINS:
        raise ValueError(f"joins more than {MAX_JOINS} topics")
    if not all(map(is_name, texts)):
        raise ValueError("joins what is no topic's name")
    return tuple(dict.fromkeys(texts))


def checked_claim(
    topics: Sequence[str] | Mapping[str, Sequence[str]],
) -> Sequence[str] | Mapping[str, Sequence[str]]:
    """Return a claim ``topics`` if it is one, for whoever makes tokens.

    Raises:
        AuthError: It is none.
    """
    problem = of_claim(msgspec.Raw(msgspec.json.encode(topics))).problem
    if problem:
        raise AuthError(problem)
    return topics
