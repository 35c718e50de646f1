"""The claim ``topics``: what it grants, and what is none."""

import msgspec
import pytest

from trioserver.errors import AuthError
from trioserver.grant import (
    MAX_CLAIM,
    MAX_JOINS,
    MAX_PATTERNS,
    NO_GRANT,
    Grant,
    checked_claim,
    of_claim,
)
from trioserver.topics import Patterns


def granted(claim: object) -> Grant:
    """Return what a claim grants."""
    return of_claim(msgspec.Raw(msgspec.json.encode(claim)))


def test_a_list_is_what_may_be_subscribed_to() -> None:
    """And nothing else: publishing is a right of its own."""
    grant = granted(["news.**", "status"])
    assert Grant(subscribe=Patterns.of(["news.**", "status"])) == grant
    assert grant.may_subscribe("news.de")
    assert grant.may_subscribe("status")
    assert not grant.may_subscribe("room.7")
    assert not grant.may_publish("status")


def test_an_object_has_each_right_apart() -> None:
    """Who may publish may not read for that; what is joined may be subscribed to again."""
    grant = granted({"subscribe": ["a.*"], "publish": ["b.*"], "join": ["c", "d", "c"]})
    assert ("c", "d") == grant.join
    rights = {name: (grant.may_subscribe(name), grant.may_publish(name)) for name in NAMES}
    assert {
        "a.1": (True, False),
        "b.1": (False, True),
        "c": (True, False),
        "e": (False, False),
    } == rights


NAMES = ("a.1", "b.1", "c", "e")


@pytest.mark.parametrize("claim", [None, [], {}, {"subscribe": []}, {"presence": ["later", 7]}])
def test_nothing_is_granted(claim: object) -> None:
    """By what is empty, nor by what only later releases know; nothing is wrong with either."""
    assert NO_GRANT == granted(claim)


def test_equal_claims_share_what_they_grant() -> None:
    """Thousands of connections with one claim hold one grant."""
    assert granted(["shared.*"]) is granted(["shared.*"])


def test_no_grant_is_nothing() -> None:
    """Who has none may nothing."""
    assert (False, False, ()) == (
        NO_GRANT.may_subscribe("a"),
        NO_GRANT.may_publish("a"),
        NO_GRANT.join,
    )


BAD: dict[str, object] = {
    "text": "news.**",
    "a number": 7,
    "a list of numbers": ["a", 7],
    "a list in a list": [["a"]],
    "text where a list is due": {"publish": "a"},
    "null where a list is due": {"join": None},
    "no pattern": ["a b"],
    "no pattern to publish to": {"publish": ["***"]},
    "a join of a pattern": {"join": ["room.*"]},
    "a join of nothing": {"join": [""]},
    "too many patterns": [str(number) for number in range(MAX_PATTERNS + 1)],
    "too many joins": {"join": [str(number) for number in range(MAX_JOINS + 1)]},
    "too long": ["a" * 100] * (MAX_CLAIM // 100),
}


@pytest.mark.parametrize("what", BAD)
def test_what_grants_nothing_but_trouble(what: str) -> None:
    """A claim that is not as it should be grants nothing and says why, the second time, too."""
    for _ in range(2):
        grant = granted(BAD[what])
        assert grant.problem.startswith("the claim topics")
        assert Grant(problem=grant.problem) == grant


@pytest.mark.parametrize("text", [b"", b"[", b'["\xff"]', b'["\\ud800"]', b"[" * 2000])
def test_what_is_no_json(text: bytes) -> None:
    """Whatever the bytes, it grants nothing, says so, and nothing is raised."""
    assert of_claim(msgspec.Raw(text)).problem


def test_as_many_as_may_be() -> None:
    """The limits themselves are allowed, of each kind."""
    patterns = [f"{number}.*" for number in range(MAX_PATTERNS)]
    names = [str(number) for number in range(MAX_JOINS)]
    grant = granted({"subscribe": patterns, "publish": patterns, "join": names})
    assert grant.may_subscribe("63.x")
    assert grant.may_publish("63.x")
    assert "63" == grant.join[-1]


def test_who_makes_a_token_is_told() -> None:
    """A claim comes back as it is, or is refused before anybody signs it."""
    claim = {"subscribe": ["a"]}
    assert claim == checked_claim(claim)
    with pytest.raises(AuthError):
        checked_claim({"join": ["*"]})
