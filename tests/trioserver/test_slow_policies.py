"""Rules for clients that do not keep up: what is one, and which counts."""

import pytest

from trioserver.slow_policies import MAX_RULES, NO_POLICIES, Policies, Policy, policy_list
from trioserver.topics import Patterns


def policies(*rules: str) -> Policies:
    """Return what these rules say."""
    return Policies.of(policy_list(",".join(rules)))


def test_without_rules_everybody_slow_is_disconnected() -> None:
    """Nothing is given up, and nothing spilled, that nobody has asked for."""
    assert not NO_POLICIES
    assert Policy.DISCONNECT is NO_POLICIES.inbox
    assert Policy.DISCONNECT is NO_POLICIES.broadcast
    assert Policy.DISCONNECT is NO_POLICIES.of_topic("a")
    assert Policy.DISCONNECT is NO_POLICIES.of_type("a")
    assert Policy.DISCONNECT is NO_POLICIES.of_broadcast("a")


@pytest.mark.parametrize("word", [policy.value for policy in Policy])
def test_every_policy_may_be_said_of_a_topic(word: str) -> None:
    """Topics are of both kinds, so any policy may be meant."""
    found = policies(f"topic:a={word}")
    assert found
    assert Policy(word) is found.of_topic("a")


def test_the_first_rule_that_fits_a_topic_counts() -> None:
    """An exception goes before the rule; what nothing fits is disconnected."""
    found = policies("topic:t.own=disconnect", "topic:t.*=conflate", "topic:t.**=drop_oldest")
    names = ("t.own", "t.x", "t.x.y", "u")
    expected = [Policy.DISCONNECT, Policy.CONFLATE, Policy.DROP_OLDEST, Policy.DISCONNECT]
    assert expected == [found.of_topic(name) for name in names]
    assert expected == [found.of_topic(name) for name in names], "and the second time"


def test_a_type_is_not_a_topic() -> None:
    """A rule for one says nothing about the other, nor about another type."""
    found = policies("type:x=drop_oldest", "topic:y=conflate")
    for _ in range(2):
        assert Policy.DROP_OLDEST is found.of_type("x")
        assert Policy.DISCONNECT is found.of_type("y")
    assert Policy.DISCONNECT is found.of_topic("x")
    assert Policy.DISCONNECT is found.inbox


def test_a_broadcast_goes_by_its_type_or_by_being_one() -> None:
    """Whichever rule comes first, if it is for what is not kept."""
    found = policies("type:x=drop_oldest", "broadcast=conflate", "type:y=drop_oldest")
    for _ in range(2):
        assert Policy.DROP_OLDEST is found.of_broadcast("x")
        assert Policy.CONFLATE is found.of_broadcast("y")
    assert Policy.CONFLATE is found.of_broadcast("z")
    assert Policy.DISCONNECT is found.of_type("z")


def test_kept_and_ephemeral_broadcasts_have_rules_of_their_own() -> None:
    """What is kept cannot be given up, and what is not cannot be spilled."""
    found = policies("broadcast=conflate", "broadcast=spill", "inbox=spill")
    assert Policy.SPILL is found.broadcast
    assert Policy.SPILL is found.inbox
    assert Policy.CONFLATE is found.of_broadcast("x")
    assert Policy.DISCONNECT is policies("broadcast=spill").of_broadcast("x")
    assert Policy.DISCONNECT is policies("broadcast=drop_oldest").broadcast


def test_what_is_remembered_is_bounded() -> None:
    """Types are the publishers' words: however many there are, the answers stay right."""
    found = policies("type:x=conflate")
    answers = {found.of_type(f"t{number}") for number in range(10_000)}
    assert {Policy.DISCONNECT} == answers
    assert Policy.CONFLATE is found.of_type("x")
    assert len(found._types) <= 4096


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("inbox", "after ="),
        ("inbox=", "after ="),
        ("inbox=faster", "after ="),
        ("=spill", "before ="),
        ("inbox:a=spill", "before ="),
        ("broadcast:=spill", "before ="),
        ("type=conflate", "before ="),
        ("type:=conflate", "before ="),
        (f"type:{'x' * 65}=conflate", "before ="),
        ("queue:a=conflate", "before ="),
        ("topic:=conflate", "no pattern"),
        ("topic:a b=conflate", "no pattern"),
        ("inbox=conflate", "cannot be given up"),
        ("inbox=drop_oldest", "cannot be given up"),
        ("type:x=spill", "not kept anywhere"),
        (",".join(f"type:x{number}=conflate" for number in range(MAX_RULES + 1)), "more than"),
    ],
)
def test_what_is_no_rule_is_refused(text: str, problem: str) -> None:
    """With a sentence that says what is wrong with it."""
    with pytest.raises(ValueError, match=problem):
        policy_list(text)


def test_rules_stay_as_they_were_written() -> None:
    """Without spaces around them, and each once; the word for none is no rule."""
    expected = ("inbox=spill", "type:x = conflate")
    assert expected == policy_list(" inbox=spill, type:x = conflate,,inbox=spill")
    assert () == policy_list("none")
    assert () == policy_list("")
    assert Policy.CONFLATE is Policies.of(expected).of_type("x")


@pytest.mark.parametrize(
    ("rule", "durable", "concern"),
    [
        ("topic:a=spill", (), "not in DURABLE_TOPICS"),
        ("topic:a=spill", ("b",), "not in DURABLE_TOPICS"),
        ("topic:a.*=spill", (), "not in DURABLE_TOPICS"),
        ("topic:a=conflate", ("a",), "say spill"),
        ("topic:a.*=drop_oldest", ("a.*",), "say spill"),
        ("topic:a.*=drop_oldest", ("a.b",), None),
        ("topic:a.*=spill", ("a.b",), None),
        ("topic:a=spill", ("a",), None),
        ("topic:a=conflate", ("b",), None),
        ("topic:a=disconnect", ("a",), None),
        ("type:a=conflate", ("a",), None),
        ("inbox=spill", (), None),
    ],
)
def test_rules_that_cannot_be_followed_are_told(
    rule: str, durable: tuple[str, ...], concern: str | None
) -> None:
    """A topic that is not kept cannot be spilled, nor can a kept one be given up."""
    found = list(policies(rule).concerns(Patterns.of(durable)))
    if concern is None:
        assert [] == found
    else:
        (only,) = found
        assert only.startswith(f"{rule} means disconnect")
        assert concern in only
