"""API keys: who is let in."""

import pytest

from trioserver.gateway.api_keys import ApiKeys
from trioserver.gateway.problem import Problem

KEYS = ApiKeys(["first-key", "second+key/="])


@pytest.mark.parametrize(
    "headers",
    [
        [(b"x-api-key", b"first-key")],
        [(b"x-api-key", b" second+key/= ")],
        [(b"authorization", b"Bearer first-key")],
        [(b"authorization", b"bearer  second+key/=")],
        [(b"authorization", b"Basic YTpi"), (b"x-api-key", b"first-key")],
        [(b"authorization", b"Bearer of-a-proxy"), (b"x-api-key", b"first-key")],
    ],
)
def test_a_good_key_is_let_in(headers: list[tuple[bytes, bytes]]) -> None:
    """Either header will do; what a proxy puts into the other one does not matter."""
    KEYS.check([(b"host", b"x"), *headers])


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        ([], "there is none"),
        ([(b"authorization", b"Basic first-key")], "there is none"),
        ([(b"x-api-key", b"")], "not one of"),
        ([(b"x-api-key", b"first-ke")], "not one of"),
        ([(b"x-api-key", b"first-key2")], "not one of"),
        ([(b"x-api-key", b"First-Key")], "not one of"),
        ([(b"x-api-key", b"first-key,second+key/=")], "not one of"),
        ([(b"x-api-key", b"\xff\x00")], "not one of"),
        ([(b"x-api-key", b"wrong"), (b"authorization", b"Bearer first-key")], "not one of"),
        ([(b"x-api-key", b"first-key"), (b"x-api-key", b"first-key")], "more than one"),
    ],
)
def test_anything_else_is_a_401(headers: list[tuple[bytes, bytes]], why: str) -> None:
    """A refusal says what is missing, how to authenticate, and nothing of any key."""
    with pytest.raises(Problem, match=why) as caught:
        KEYS.check([(b"host", b"x"), *headers])

    assert 401 == caught.value.status
    assert {"WWW-Authenticate": "Bearer"} == caught.value.headers
    assert "first" not in caught.value.detail


def test_without_keys_nobody_is_let_in() -> None:
    """A server without keys is closed, not open."""
    for headers in ([], [(b"x-api-key", b"")], [(b"authorization", b"Bearer ")]):
        with pytest.raises(Problem):
            ApiKeys([]).check(headers)


def test_each_key_has_a_number() -> None:
    """Counted from 0; whatever would not be let in has none."""
    assert 0 == KEYS.number([(b"x-api-key", b"first-key")])
    assert 1 == KEYS.number([(b"authorization", b"Bearer second+key/=")])
    for headers in (
        [],
        [(b"x-api-key", b"wrong")],
        [(b"x-api-key", b"first-key"), (b"x-api-key", b"second+key/=")],
    ):
        assert KEYS.number(headers) is None
