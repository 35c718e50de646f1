"""The body of a publish: what it may say, and what each mistake is answered with."""

import datetime as dt
import json

import pytest
from hypothesis import given
from hypothesis import settings as patience
from hypothesis import strategies as st

from trioserver.gateway.problem import Problem
from trioserver.gateway.publish_request import MAX_USERS, PublishRequest, read

JSON = (b"content-type", b"application/json")
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def ask(body: object, *headers: tuple[bytes, bytes], max_payload: int = 0) -> PublishRequest:
    """Read a request with this body."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read(data, [JSON, *headers], max_payload)


def refused(body: object, *headers: tuple[bytes, bytes], max_payload: int = 0) -> Problem:
    """Return the problem of a request with this body."""
    with pytest.raises(Problem) as caught:
        ask(body, *headers, max_payload=max_payload)
    return caught.value


def simple(**more: object) -> dict[str, object]:
    """Return a body that is good, with some more fields."""
    return {"to": {"user": "42"}, "payload": {"n": 1}, **more}


def test_the_least() -> None:
    """A recipient and a payload are enough; the payload stays as it was written."""
    wanted = ask(b'{"to": {"user": "42"}, "payload":  {"n" : 1.0} }')

    assert ("42", None) == (wanted.user, wanted.users)
    assert b'{"n" : 1.0}' == bytes(wanted.payload)
    assert {None} == set(wanted.options.values())
    assert "type" not in wanted.options
    assert "traceparent" not in wanted.options


def test_everything() -> None:
    """Every field arrives, durations as seconds, the moment with its time zone."""
    wanted = ask(
        simple(
            type="order.shipped",
            ttl="1h",
            fallback_after=90.5,
            deliver_at="2026-01-01T08:00:00+02:00",
            idempotency_key="order-1017",
            collapse_key="order",
            priority=True,
        ),
        (b"traceparent", TRACE.encode()),
    )

    assert {
        "type": "order.shipped",
        "ttl": 3600.0,
        "fallback_after": 90.5,
        "deliver_at": dt.datetime(2026, 1, 1, 6, tzinfo=dt.UTC),
        "idempotency_key": "order-1017",
        "collapse_key": "order",
        "priority": True,
        "traceparent": TRACE,
    } == wanted.options


def test_recipients() -> None:
    """One, several (each once, in order), everyone, or topics likewise."""
    one = ask(simple())
    several = ask(simple(to={"users": ["b", "a", "b"]}))
    everyone = ask(simple(to={"all": True}))
    topic = ask(simple(to={"topic": "room"}, key="k"))
    topics = ask(simple(to={"topics": ["b", "a", "b"]}))

    assert ("42", None) == (one.user, one.users)
    assert (None, ("b", "a")) == (several.user, several.users)
    assert (None, None) == (everyone.user, everyone.users)
    assert ("room", None, "k") == (topic.topic, topic.user, topic.options["key"])
    assert (None, ("b", "a"), None) == (topics.topic, topics.topics, topics.users)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (0, 0),
        (10, 10),
        (0.5, 0.5),
        ("0", 0),
        ("30", 30),
        ("90s", 90),
        ("2 d", 172800),
        (None, None),
    ],
)
def test_durations(value: object, seconds: float | None) -> None:
    """Seconds as a number, or text with a unit; null is as if it were not there."""
    assert (seconds, seconds) == (
        ask(simple(ttl=value)).options["ttl"],
        ask(simple(fallback_after=value)).options["fallback_after"],
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"payload": 1}, "missing required field `to`"),
        ({"to": {"user": "42"}}, "missing required field `payload`"),
        (simple(to={}), '"to" is one of'),
        (simple(to={"all": False}), '"to" is one of'),
        (simple(to={"user": "42", "all": True}), '"to" is one of'),
        (simple(to={"user": "42", "users": ["43"]}), '"to" is one of'),
        (simple(to={"users": []}), '"users" is empty'),
        (simple(to={"users": ["u"] * (MAX_USERS + 1)}), "length <= 1000"),
        (simple(to={"user": 42}), "Expected `str"),
        (simple(to={"user": "42", "topic": "x"}), '"to" is one of'),
        (simple(to={"topic": "x", "all": True}), '"to" is one of'),
        (simple(to={"topic": "x", "topics": ["y"]}), '"to" is one of'),
        (simple(to={"topics": []}), '"topics" is empty'),
        (simple(to={"topics": ["t"] * (MAX_USERS + 1)}), "length <= 1000"),
        (simple(to={"room": "x"}), "unknown field `room`"),
        (simple(key=7), "Expected `str"),
        (simple(idempotencykey="x"), "unknown field `idempotencykey`"),
        (simple(ttl=-1), ">= 0"),
        (simple(ttl=True), "got `bool`"),
        (simple(ttl="soon"), '"ttl" is not a duration'),
        (simple(fallback_after="soon"), '"fallback_after" is not a duration'),
        (simple(deliver_at="2026-01-01T08:00:00"), "timezone"),
        (simple(deliver_at="tomorrow"), "Invalid RFC3339"),
        (simple(deliver_at=1767225600), "got `int`"),
        (simple(type=7), "Expected `str"),
        ([], "Expected `object`"),
    ],
)
def test_a_wrong_form_is_a_422(body: object, said: str) -> None:
    """The answer says which field is wrong, and how."""
    problem = refused(body)

    assert 422 == problem.status
    assert said in problem.detail


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "The body is empty."),
        (b"{", "is not JSON"),
        (b'{"to": {"user": "42"}, "payload": 1} x', "is not JSON"),
        (b'{"to": {"user": "42"}, "payload": "\xff"}', "not UTF-8"),
        (b'{"to": {"user": "42"}, "payload": ' + b"[" * 5000, "nested too deeply"),
    ],
)
def test_what_is_no_json_is_a_400(body: bytes, said: str) -> None:
    """Broken bytes are told from a wrong form."""
    problem = refused(body)

    assert 400 == problem.status
    assert said in problem.detail


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"content-type", b"text/plain")],
        [(b"content-type", b"application/x-www-form-urlencoded")],
        [JSON, JSON],
    ],
)
def test_another_media_type_is_a_415(headers: list[tuple[bytes, bytes]]) -> None:
    """Only what is said to be JSON is read."""
    with pytest.raises(Problem) as caught:
        read(b'{"to": {"user": "42"}, "payload": 1}', headers, 0)

    assert 415 == caught.value.status


def test_parameters_of_the_media_type_do_not_matter() -> None:
    """``Application/JSON; charset=utf-8`` is JSON."""
    header = (b"content-type", b"Application/JSON; charset=utf-8")

    assert "42" == read(b'{"to": {"user": "42"}, "payload": 1}', [header], 0).user


def test_a_large_payload_is_a_413() -> None:
    """The limit is that of the payload as written; 0 is no limit."""
    body = b'{"to": {"user": "42"}, "payload": "12345678"}'

    assert "42" == ask(body, max_payload=10).user
    assert "42" == ask(body, max_payload=0).user
    assert 413 == refused(body, max_payload=9).status


def test_the_idempotency_key_may_be_a_header() -> None:
    """With or without quotes; said twice it must be the same."""
    plain = ask(simple(), (b"idempotency-key", b"k-1"))
    quoted = ask(simple(idempotency_key="k-1"), (b"idempotency-key", b'"k-1"'))

    assert ("k-1", "k-1") == (
        plain.options["idempotency_key"],
        quoted.options["idempotency_key"],
    )
    assert not ask(simple(), (b"idempotency-key", b"")).options["idempotency_key"]
    for body, headers in (
        (simple(idempotency_key="k-1"), [b"k-2"]),
        (simple(idempotency_key=""), [b"k-2"]),
        (simple(), [b"k-1", b"k-2"]),
    ):
        problem = refused(body, *[(b"idempotency-key", header) for header in headers])
        assert 400 == problem.status


@pytest.mark.parametrize("given", ["", "x", TRACE.upper(), TRACE + "-1"])
def test_a_malformed_traceparent_is_none(given: str) -> None:
    """Its specification says to go on without it."""
    assert "traceparent" not in ask(simple(), (b"traceparent", given.encode())).options


@patience(deadline=None)
@given(
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["to", "payload", "user", "users", "all", "ttl"]), inner
            )
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode())
)
def test_whatever_comes_is_read_or_is_a_problem(body: bytes) -> None:
    """No body raises anything else."""
    status = 202
    try:
        ask(body)
    except Problem as problem:
        status = problem.status

    assert status in {202, 400, 422}
