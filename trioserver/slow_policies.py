"""What becomes of clients that do not keep up: which policy is for what. Pure.

    disconnect    the connection ends (4410); what is kept comes with the next one
    drop_oldest   the oldest of the same topic or type that waits makes place; a ``gap`` says so
    conflate      of those with one key only the newest waits
    spill         what is kept stays in the ledger until the client has read what it got

The first two sorts of giving up are for what nobody keeps; to spill is for what is kept.
"""

from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Final

import attrs

from trioserver.topics import NONE, Patterns

MAX_RULES: Final = 100

MAX_TYPE: Final = 64
"""Characters of a type, as in `trioserver.messages`."""

_REMEMBERED: Final = 4096
"""Topics and types whose policy is remembered."""


class Policy(Enum):
    """What becomes of a client that does not keep up."""

    DISCONNECT = "disconnect"
    DROP_OLDEST = "drop_oldest"
    CONFLATE = "conflate"
    SPILL = "spill"


_GIVES_UP: Final = frozenset({Policy.DROP_OLDEST, Policy.CONFLATE})


@attrs.frozen(kw_only=True)
class _Rule:
    """One rule as it is written."""

    what: str
    """``topic``, ``type``, ``inbox`` or ``broadcast``."""
    which: str
    """A pattern, or a type; else empty."""
    topics: Patterns
    """What the pattern stands for."""
    policy: Policy


@attrs.frozen(kw_only=True, eq=False)
class Policies:
    """Which policy is for what: the first rule that fits, else `Policy.DISCONNECT`.

    False if there is no rule at all. Which policy makes sense is the caller's to see: a live topic
    cannot be spilled, nor a durable one conflated (`concerns`); both mean `Policy.DISCONNECT`.
    """

    _rules: tuple[_Rule, ...] = ()
    inbox: Policy = Policy.DISCONNECT
    """For the kept notifications of a user: spill or disconnect."""
    broadcast: Policy = Policy.DISCONNECT
    """For the kept ones to everyone: spill or disconnect. See `of_broadcast` for the others."""
    _topics: dict[str, Policy] = attrs.field(init=False, factory=dict, repr=False)
    _types: dict[str, Policy] = attrs.field(init=False, factory=dict, repr=False)
    _broadcasts: dict[str, Policy] = attrs.field(init=False, factory=dict, repr=False)

    def __bool__(self) -> bool:
        """Return whether there is any rule."""
        return bool(self._rules)

    @classmethod
    def of(cls, rules: Iterable[str]) -> "Policies":
        """Return the policies of the setting ``SLOW_CONSUMERS``, which has been checked.

        Raises:
            ValueError: A rule is none; the text is the end of a sentence.
        """
        parsed = tuple(map(_rule, rules))
        kept = (Policy.DISCONNECT, Policy.SPILL)
        return cls(
            rules=parsed,
            inbox=_first(rule for rule in parsed if rule.what == "inbox"),
            broadcast=_first(
                rule for rule in parsed if rule.what == "broadcast" and rule.policy in kept
            ),
        )

    def of_topic(self, name: str) -> Policy:
        """Return the policy for what is published to a topic, whatever its type."""
        found = self._topics.get(name)
        if found is None:
            found = _first(rule for rule in self._rules if rule.topics.matches(name))
            _remember(self._topics, name, found)
        return found

    def of_type(self, of_type: str) -> Policy:
        """Return the policy for ephemeral notifications of this type to a user."""
        found = self._types.get(of_type)
        if found is None:
            found = _first(
                rule for rule in self._rules if rule.what == "type" and rule.which == of_type
            )
            _remember(self._types, of_type, found)
        return found

    def of_broadcast(self, of_type: str) -> Policy:
        """Return the policy for ephemeral notifications of this type to everyone."""
        found = self._broadcasts.get(of_type)
        if found is None:
            found = _first(
                rule
                for rule in self._rules
                if (rule.what == "type" and rule.which == of_type)
                or (rule.what == "broadcast" and rule.policy is not Policy.SPILL)
            )
            _remember(self._broadcasts, of_type, found)
        return found

    def concerns(self, durable: Patterns) -> Iterator[str]:
        """Find the rules that cannot be followed: one line each.

        Only what is certain is told: a pattern with stars may stand for topics of both kinds.

        Args:
            durable: The topics that are kept.
        """
        for rule in self._rules:
            if rule.what != "topic" or rule.policy is Policy.DISCONNECT:
                continue
            said = f"topic:{rule.which}={rule.policy.value}"
            kept = _kept(rule.which, durable)
            if rule.policy is Policy.SPILL and kept is False:
                yield f"{said} means disconnect, because it is not in DURABLE_TOPICS"
            elif rule.policy in _GIVES_UP and kept is True:
                yield f"{said} means disconnect, because it is in DURABLE_TOPICS; say spill"


NO_POLICIES: Final = Policies()


def policy_list(text: str) -> tuple[str, ...]:
    """Return the rules in a list with commas between, as written, each checked.

    Raises:
        ValueError: One is none; the text is the end of a sentence.
    """
    if text.strip() == NONE:
        return ()
    rules = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if len(rules) > MAX_RULES:
        problem = f"has more than {MAX_RULES} rules"
        raise ValueError(problem)
    for rule in rules:
        _rule(rule)
    return rules


def _rule(text: str) -> _Rule:
    target, equals, word = (part.strip() for part in text.partition("="))
    what, colon, which = target.partition(":")
    try:
        policy = Policy(word)
    except ValueError:
        words = ", ".join(policy.value for policy in Policy)
        problem = f"says {text!r}; after = comes one of {words}"
        raise ValueError(problem) from None
    if not equals or not _is_target(what, colon, which):
        problem = f"says {text!r}; before = comes topic:<pattern>, type:<type>, inbox or broadcast"
        raise ValueError(problem)
    if what == "inbox" and policy in _GIVES_UP:
        problem = f"says {text!r}, but what is kept for a user cannot be given up"
        raise ValueError(problem)
    if what == "type" and policy is Policy.SPILL:
        problem = f"says {text!r}, but ephemeral notifications are not kept anywhere"
        raise ValueError(problem)
    topics = Patterns.of((which,) if what == "topic" else ())
    return _Rule(what=what, which=which, topics=topics, policy=policy)


def _is_target(what: str, colon: str, which: str) -> bool:
    match what:
        case "inbox" | "broadcast":
            return not colon
        case "type":
            return 0 < len(which) <= MAX_TYPE
        case "topic":
            return True  # `Patterns` knows better what is one.
        case _:
            return False


def _first(rules: Iterator[_Rule]) -> Policy:
    """Return the policy of the first of ``rules``."""
    return next((rule.policy for rule in rules), Policy.DISCONNECT)


def _remember(memory: dict[str, Policy], name: str, policy: Policy) -> None:
    if len(memory) >= _REMEMBERED:
        memory.clear()
    memory[name] = policy


def _kept(pattern: str, durable: Patterns) -> bool | None:
    """Return whether the topics of ``pattern`` are kept; None if some may be and some not."""
    if pattern in durable.texts:
        return True
    if "*" not in pattern:
        return durable.matches(pattern)
    return None if durable else False
