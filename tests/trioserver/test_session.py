"""The session: tables of histories; one message, one action."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioserver.buckets import Buckets, Rate
from trioserver.errors import CloseReason
from trioserver.session import (
    MAX_STRIKES,
    STRIKE_SECONDS,
    Acknowledge,
    Action,
    Answer,
    Ask,
    Authenticate,
    ChatSession,
    Close,
    Count,
    MarkRead,
    Refresh,
    Send,
    SendError,
    Session,
)
from trioserver.wish import NO_WISH, Wish

NOW = 1000.0
STAMP = "2026-11-20T06:19:42.000Z"


def say(session: Session, message: object, now: float = NOW) -> Action | None:
    """Let the session receive a message, or raw bytes."""
    text = message if isinstance(message, bytes) else json.dumps(message).encode()
    return session.receive(text, now, STAMP)


def reply(action: Action | None) -> dict[str, object]:
    """Return the JSON that an action sends."""
    assert isinstance(action, Send | Answer | SendError)
    found = json.loads(action.data)
    assert isinstance(found, dict)
    return found


def test_messages_are_counted_and_answered() -> None:
    """Each message is answered with the count, its payload, the time and its ref."""
    session = Session("ann")
    for count in (1, 2, 3):
        assert {
            "type": "message_response",
            "count": count,
            "payload": {"a": [count]},
            "timestamp": STAMP,
            "ref": "r",
        } == reply(say(session, {"type": "message", "payload": {"a": [count]}, "ref": "r"}))
    assert {"type": "message_response", "count": 4, "payload": None, "timestamp": STAMP} == reply(
        say(session, {"type": "message"})
    )


@pytest.mark.parametrize(
    ("user", "message", "answer"),
    [
        ("ann", {"type": "ping"}, {"type": "pong"}),
        ("ann", {"type": "ping", "ref": "r"}, {"type": "pong", "ref": "r"}),
        ("ann", {"type": "ping", "ref": None}, {"type": "pong"}),
        ("ann", {"type": "auth", "token": "t", "ref": "r"}, ("already_authenticated", "r")),
        ("ann", {"type": "nope", "ref": "r"}, ("unknown_type", "r")),
        ("ann", b"hello", ("bad_json", None)),
        ("ann", {"type": "message", "ref": 1}, ("bad_message", None)),
        ("ann", {"type": "ack", "ref": "r"}, ("bad_message", "r")),
        ("ann", {"type": "ack", "seq": 1, "id": "p07-x", "ref": "r"}, ("bad_message", "r")),
        ("ann", {"type": "ack", "seq": 0, "ref": "r"}, ("bad_message", "r")),
        ("ann", {"type": "read", "ref": "r"}, ("bad_message", "r")),
        ("ann", {"type": "read", "ids": [], "ref": "r"}, ("bad_message", "r")),
        ("ann", {"type": "read", "ids": ["p07-x"], "up_to": 1}, ("bad_message", None)),
        ("ann", {"type": "auth", "token": "t", "device": "a b"}, ("bad_message", None)),
        (None, {"type": "auth", "token": "t", "position": "x" * 257}, ("bad_message", None)),
        (None, {"type": "ack", "seq": 1, "ref": "r"}, ("unauthenticated", "r")),
        (None, {"type": "ack", "ref": "r"}, ("unauthenticated", "r")),
        (None, {"type": "read", "ids": ["p07-x"], "ref": "r"}, ("unauthenticated", "r")),
        (None, {"type": "ping", "ref": "r"}, ("unauthenticated", "r")),
        (None, {"type": "message", "ref": "r"}, ("unauthenticated", "r")),
        (None, {"type": "nope", "ref": "r"}, ("unknown_type", "r")),
        (None, b"", ("bad_json", None)),
    ],
)
def test_one_message_one_reply(
    user: str | None, message: object, answer: dict[str, object] | tuple[str, str | None]
) -> None:
    """Each row of the protocol's table, in both states."""
    action = say(Session(user), message)
    if isinstance(answer, dict):
        assert answer == reply(action)
        assert isinstance(action, Send | Answer)
    else:
        assert isinstance(action, SendError)
        error = reply(action)
        assert ("error", *answer) == (error["type"], error["code"], error.get("ref"))
        assert answer[0] == action.code


def test_auth_changes_the_state_and_errors_before_it_count_nothing() -> None:
    """A nameless session asks for the token to be verified; then it is like any other."""
    session = Session()
    say(session, {"type": "message"})
    action = say(session, {"type": "auth", "token": "t"})
    assert isinstance(action, Authenticate)
    assert "t" == action.token
    assert session.user is None
    session.authenticated("ann")
    assert 1 == reply(say(session, {"type": "message"}))["count"]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"type": "ack", "seq": 7}, Acknowledge(7, "", None)),
        ({"type": "ack", "seq": 7, "id": None, "ref": "r"}, Acknowledge(7, "", "r")),
        ({"type": "ack", "id": "p07-x", "ref": "r"}, Acknowledge(0, "p07-x", "r")),
        ({"type": "read", "ids": ["p07-x", "p07-y"]}, MarkRead(["p07-x", "p07-y"], 0, None)),
        ({"type": "read", "ids": ["p07-x"], "ref": "r"}, MarkRead(["p07-x"], 0, "r")),
        ({"type": "read", "up_to": 7, "ref": "r"}, MarkRead([], 7, "r")),
        ({"type": "read", "up_to": "p07-x"}, MarkRead([], "p07-x", None)),
        ({"type": "read", "ids": [], "up_to": 1}, MarkRead([], 1, None)),
    ],
)
def test_what_the_ledger_is_to_be_told(message: object, expected: Action) -> None:
    """Acks and reads become actions that name one thing, with the ref that wants an answer."""
    session = Session("ann")
    assert expected == say(session, message)
    assert 0 == session.count, "no message of the user's"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, NO_WISH),
        (
            {"device": "phone", "position": "1.e0.1-1", "ack": True},
            Wish(device="phone", position="1.e0.1-1", ack=True),
        ),
    ],
)
def test_auth_says_where_the_client_wants_to_go_on(
    fields: dict[str, object], expected: Wish
) -> None:
    """What a handshake says in its query, a first message says beside its token."""
    action = say(Session(), {"type": "auth", "token": "t", **fields})
    assert Authenticate("t", expected) == action


def test_twenty_malformed_messages_in_ten_seconds_end_it() -> None:
    """Nineteen are answered, the twentieth closes, and then there is nothing more."""
    session = Session("ann")
    for i in range(MAX_STRIKES - 1):
        assert isinstance(say(session, b"?", NOW + i * 0.5), SendError)
        assert isinstance(say(session, {"type": "ping"}, NOW + i * 0.5), Answer)
    action = say(session, b"?", NOW + STRIKE_SECONDS - 0.1)
    assert isinstance(action, Close)
    assert CloseReason.POLICY is action.reason
    assert session.closed
    assert say(session, {"type": "ping"}) is None


def test_malformed_messages_spread_out_end_nothing() -> None:
    """One a second is a bug to be told about, not an attack."""
    session = Session("ann")
    for i in range(200):
        assert isinstance(say(session, b"?", NOW + i), SendError)


@pytest.mark.parametrize("pause", [9.0, 9.9, 9.99])
def test_twenty_in_any_ten_seconds_are_too_many(pause: float) -> None:
    """A burst across the end of a counting period is a burst."""
    session = Session("ann")
    say(session, b"?", NOW)
    actions = [say(session, b"?", NOW + pause + i * 0.01) for i in range(MAX_STRIKES)]
    assert isinstance(actions[-1], Close) or actions[-1] is None


def test_closing_from_outside_is_final() -> None:
    """After close there are no actions, whatever comes."""
    session = Session()
    assert CloseReason.RATE is session.close(CloseReason.RATE).reason
    for message in (b"?", {"type": "ping"}, {"type": "auth", "token": "t"}):
        assert say(session, message) is None


HISTORY = [
    b"?",
    b'{"type":"ping"}',
    b'{"type":"message"}',
    b"{}",
    b'{"type":"ack","seq":1}',
    b'{"type":"read"}',
]


@given(st.lists(st.sampled_from(HISTORY)))
def test_the_same_history_gives_the_same_actions(history: list[bytes]) -> None:
    """No clock, no randomness; exactly one action each until closed, then none."""
    one, two = Session("ann"), Session("ann")
    for i, text in enumerate(history):
        first, second = say(one, text, NOW + i * 0.1), say(two, text, NOW + i * 0.1)
        assert first == second
        assert (first is None) == (one.closed and not isinstance(first, Close))


def test_refresh_is_for_those_who_have_a_user() -> None:
    """The token is passed on with its ref; the nameless must say auth."""
    message = {"type": "refresh", "token": "t", "ref": "r"}
    assert Refresh("t", "r") == say(Session("ann"), message)
    assert "unauthenticated" == reply(say(Session(), message))["code"]


def limited(count: int = 60, burst: int = 3) -> Buckets[str]:
    """Return a rate of so many per minute."""
    return Buckets(Rate(count=count, period=60, burst=burst))


def test_what_is_refused_is_not_counted_and_says_when_to_come_again() -> None:
    """A message over the rate has no effect but its answer; after the wait the next is taken."""
    session, rates = Session("ann"), limited()
    ping = b'{"type":"message","ref":"r"}'
    for _ in range(3):
        assert isinstance(session.receive(ping, NOW, STAMP, rates), Send)
    refused = session.receive(ping, NOW + 0.25, STAMP, rates)
    assert isinstance(refused, SendError)
    assert ("rate_limited", 750, "r") == tuple(
        reply(refused)[key] for key in ("code", "retry_after_ms", "ref")
    )
    assert 3 == session.count
    assert isinstance(session.receive(ping, NOW + 1, STAMP, rates), Send)
    assert 4 == session.count


def test_who_does_not_stop_is_closed() -> None:
    """Twenty refusals within ten seconds are one too many; over a longer time they are not."""
    session, rates = Session("ann"), limited(burst=1)
    message = b'{"type":"message"}'
    actions = [session.receive(message, NOW, STAMP, rates) for _ in range(1 + MAX_STRIKES)]
    assert Close(CloseReason.RATE) == actions[-1]

    patient, rates = Session("ann"), limited(count=1, burst=1)
    actions = [patient.receive(message, NOW + i, STAMP, rates) for i in range(59)]
    assert {Send, SendError} == {type(action) for action in actions}


def test_only_messages_are_limited_here() -> None:
    """Receipts, pings and new tokens are never refused: who sends too many is slowed down."""
    session, rates = Session("ann"), limited(burst=1)
    for _ in range(3):
        for text, action in (
            (b'{"type":"ack","seq":1}', Acknowledge),
            (b'{"type":"read","up_to":1}', MarkRead),
            (b'{"type":"refresh","token":"t"}', Refresh),
            (b'{"type":"ping"}', Answer),
        ):
            assert isinstance(session.receive(text, NOW, STAMP, rates), action)
    assert isinstance(session.receive(b'{"type":"message"}', NOW, STAMP, rates), Send)


def test_users_do_not_share_a_rate_and_the_nameless_have_none() -> None:
    """A user's rate is his own; who has no user is bounded by strikes and time."""
    ann, bob, nameless, rates = Session("ann"), Session("bob"), Session(), limited(burst=1)
    message = b'{"type":"message"}'
    assert [Send, SendError, Send, SendError] == [
        type(one.receive(message, NOW, STAMP, rates)) for one in (ann, ann, bob, nameless)
    ]
    assert isinstance(
        nameless.receive(b'{"type":"auth","token":"t"}', NOW, STAMP, rates), Authenticate
    )


@pytest.mark.parametrize(
    "request_",
    [
        {"type": "subscribe", "topic": "news", "since": "start", "ref": "r"},
        {"type": "unsubscribe", "topic": "news"},
        {"type": "presence", "topic": "news", "after": "x"},
        {"type": "publish", "topic": "news", "payload": [1], "exclude_self": True, "key": "k"},
    ],
)
def test_requests_about_topics_are_passed_on(request_: dict[str, object]) -> None:
    """What a topic is asked is the connection's to do; nobody without a user may ask."""
    action = say(Session("ann"), request_)
    assert isinstance(action, Ask)
    assert request_["topic"] == action.message.topic
    assert "unauthenticated" == reply(say(Session(), request_))["code"]
    assert "forbidden" == reply(say(ChatSession(None, "c-1"), request_))["code"]


@pytest.mark.parametrize("topic", ["", "a b", "ä", "x" * 129, "a\n", "a%", "{a}", "a*", 7, None])
def test_names_of_topics(topic: object) -> None:
    """A name is of few characters: it becomes part of channels and keys."""
    answer = reply(say(Session("ann"), {"type": "subscribe", "topic": topic}))
    assert "bad_message" == answer["code"]


def test_publishing_counts_as_a_message() -> None:
    """Who may say so much per minute may publish so much, and not subscribe less for it."""
    rates = Buckets[str](Rate(count=2, period=60, burst=2))
    session = Session("ann")
    publish = json.dumps({"type": "publish", "topic": "t", "ref": "r"}).encode()
    said = [session.receive(publish, NOW, STAMP, rates) for _ in range(3)]
    assert [Ask, Ask, SendError] == [type(action) for action in said]
    assert ("rate_limited", "r") == (reply(said[2])["code"], reply(said[2])["ref"])
    subscribe = json.dumps({"type": "subscribe", "topic": "t"}).encode()
    assert isinstance(session.receive(subscribe, NOW, STAMP, rates), Ask)


@pytest.mark.parametrize(
    ("text", "payload"),
    [
        (b"hello", b'"hello"'),
        ('grüß dich "du"'.encode(), '"grüß dich \\"du\\""'.encode()),
        (b"", b'""'),
        (b"{half", b'"{half"'),
        (b"[1, 2]", b'"[1, 2]"'),
        (b"7", b'"7"'),
        (b"null", b'"null"'),
        (b'"text"', b'"\\"text\\""'),
        (b'{"type":"message","payload":{"a":1}}', b'{"a":1}'),
    ],
)
def test_any_text_that_is_no_object_is_a_chat_message(text: bytes, payload: bytes) -> None:
    """It is counted like one that says so, with the text as its payload."""
    action = say(ChatSession("ann", "c-1"), text)
    assert isinstance(action, Count)
    assert payload == bytes(action.payload)


def test_a_chat_message_says_more() -> None:
    """Its ref comes back, and its id is what a repetition is known by."""
    action = say(ChatSession("ann", ""), {"type": "message", "ref": "r", "id": "m-1"})
    assert isinstance(action, Count)
    assert (b"null", "r", "m-1") == (bytes(action.payload), action.ref, action.id)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ({"type": "dance"}, "unknown_type"),
        ({"no": "type"}, "bad_message"),
        ({"type": "message", "id": "a b"}, "bad_message"),
        ({"type": "ack", "seq": 1}, "forbidden"),
        ({"type": "read", "up_to": 1}, "forbidden"),
        ({"type": "refresh", "token": "t"}, "forbidden"),
    ],
)
def test_what_an_anonymous_client_gets_an_error_for(message: dict[str, object], code: str) -> None:
    """An object must make sense, and what is about a user needs one."""
    assert code == reply(say(ChatSession(None, "c-1"), message))["code"]


def test_a_stranger_may_ping_and_log_in() -> None:
    """He lacks nothing but a user, and may get one."""
    session = ChatSession(None, "c-1")
    assert not session.nameless
    assert {"type": "pong", "ref": "p"} == reply(say(session, {"type": "ping", "ref": "p"}))
    assert isinstance(say(session, {"type": "auth", "token": "t"}), Authenticate)
    session.authenticated("ann")
    assert "ann" == session.payer


def test_a_chat_that_needs_a_token_waits_for_it() -> None:
    """Where nobody may be anonymous, the first message must be auth, whatever else is sent."""
    session = ChatSession(None, "")
    assert session.nameless
    for text in (b"hello", b'{"type":"message"}', b'{"type":"ping"}'):
        assert "unauthenticated" == reply(say(session, text))["code"]
    session.authenticated("ann")
    assert isinstance(say(session, b"hello"), Count)


def test_strangers_have_rates_of_their_own() -> None:
    """One anonymous client that says too much costs no other one anything."""
    rates = Buckets[str](Rate(count=1, period=60, burst=1))
    one, other = ChatSession(None, "c-1"), ChatSession(None, "c-2")
    assert isinstance(one.receive(b"a", NOW, STAMP, rates), Count)
    assert "rate_limited" == reply(one.receive(b"b", NOW, STAMP, rates))["code"]
    assert isinstance(other.receive(b"a", NOW, STAMP, rates), Count)
