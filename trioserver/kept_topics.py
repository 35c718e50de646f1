"""What the servers say in Redis of topics: which are kept, how many of each, for how long. Pure.

A publisher that takes a durable topic for a live one loses what it says: who is away never gets it,
and nobody sees a gap. So the workers write what their settings say (`said`), and publishers that
have no settings about it read it (`heard`): a terminal beside the server, a back end with nothing
but an address.

All servers on one Redis are expected to agree; if they do not, the latest word counts. It stays for
a day after the last worker has gone: what is published while all servers are down is for those who
come when they are back.
"""

from typing import Annotated, Final

import attrs
import msgspec

from trioserver.ledger import DAY_MS, TopicRules
from trioserver.topics import Patterns

KEY: Final = "ts:{fleet}:topics"

LIFETIME_MS: Final = DAY_MS
"""How long a word is good if it is not repeated."""


_Count = Annotated[int, msgspec.Meta(ge=1)]


class _Word(msgspec.Struct, frozen=True, gc=False):
    durable: list[str]
    length: _Count
    ttl: _Count
    """In ms."""


_decode: Final = msgspec.json.Decoder(_Word).decode


def said(rules: TopicRules) -> tuple[str, str, bytes, str, int]:
    """Return the command that tells publishers these rules."""
    word = _Word(list(rules.durable.texts), rules.max_length, rules.ttl_ms)
    return ("SET", KEY, msgspec.json.encode(word), "PX", LIFETIME_MS)


def asked() -> tuple[str, str]:
    """Return the command whose reply `heard` understands."""
    return ("GET", KEY)


def heard(reply: object, own: TopicRules) -> TopicRules | None:
    """Return the rules of the servers; None if none has said anything that is understood.

    Args:
        reply: To `asked`.
        own: The rules of whoever asks, for what servers do not say.
    """
    if not isinstance(reply, bytes):
        return None
    try:
        word = _decode(reply)
        durable = Patterns.of(word.durable)
    except (msgspec.MsgspecError, ValueError):
        return None
    return attrs.evolve(own, durable=durable, max_length=word.length, ttl_ms=word.ttl)
