"""What the terminal's client remembers from one connection to the next."""

import itertools
import json
from typing import Any

from trioserver.listen import Listening


def listening(**options: Any) -> Listening:
    """Return what a command line asks for."""
    return Listening(url="ws://h/ws", token="t", **options)


def shown(one: Listening, **message: Any) -> dict[str, Any] | None:
    """Let a message be shown; return what is answered."""
    answers, _ = one.shown(json.dumps(message))
    (answer,) = answers or [b"null"]
    found: dict[str, Any] | None = json.loads(answer)
    return found


def test_the_address_says_what_is_wanted() -> None:
    """Nothing is asked for that was not said; what was said is quoted."""
    assert "ws://h/ws" == listening().address()
    assert "ws://h/ws?device=my+phone%26&position=1.a.1-2&ack=1" == (
        listening(device="my phone&", position="1.a.1-2", ack=True).address()
    )
    one = Listening(url="ws://h/ws?x=1", token="t", ack=True)
    assert "ws://h/ws?x=1&ack=1" == one.address()


def test_it_goes_on_from_the_last_position() -> None:
    """Whatever carries a position moves it; everything else leaves it alone."""
    one = listening()
    for message in (
        {"type": "connection_established", "position": "1.a.1-4096"},
        {"type": "order", "id": "p00-x", "position": "1.a.2-8192", "payload": {"position": "9"}},
        {"type": "typing", "payload": {"position": "9"}},
        {"type": "heartbeat", "ts": "now"},
    ):
        assert shown(one, **message) is None
    assert "1.a.2-8192" == one.position

    shown(one, type="update", id="p00-x", state="read", position="1.a.2-8193")
    assert "ws://h/ws?position=1.a.2-8193" == one.address()


def test_acknowledging() -> None:
    """With --ack each notification is acknowledged once it was shown, and nothing else is."""
    one = listening(ack=True)

    assert {"type": "ack", "id": "p00-x"} == shown(
        one, type="order", id="p00-x", position="1.a.1-1"
    )
    assert shown(one, type="update", id="p00-x", state="read", position="1.a.1-2") is None
    assert shown(one, type="connection_established", position="1.a.1-1") is None
    assert shown(one, type="typing", payload={"id": "x", "position": "y"}) is None


def test_who_can_make_tokens_refreshes_them() -> None:
    """Each connection begins with a new one, and so goes on one that is about to expire."""
    numbers = itertools.count()
    one = listening(renew=lambda: f"t{next(numbers)}")

    assert "t0" == one.credential()
    assert {"type": "refresh", "token": "t1"} == shown(one, type="token_expiring", expires_in=30)
    assert "t1" == one.token
    assert shown(one, type="token_refreshed", expires_in=86400) is None
    assert "t2" == one.credential()


def test_who_was_given_a_token_has_but_the_one() -> None:
    """There is nothing to refresh it with."""
    one = listening()

    assert shown(one, type="token_expiring", expires_in=30) is None
    assert "t" == one.credential()


def test_goodbye() -> None:
    """It asks for a pause; other messages, and what is no message, do not."""
    one = listening(position="1.a.1-1")

    assert ([], 1.5) == one.shown('{"type":"goodbye","reconnect_in_ms":1500}')
    for other in ('{"type":"notification","payload":"goodbye"}', "no json", b"\xff", "[1]", "{}"):
        assert ([], None) == one.shown(other)
    assert "1.a.1-1" == one.position


def test_topics_are_asked_for_on_each_connection_from_where_they_were_left() -> None:
    """A position in a topic is the topic's, and never taken for that of the user's own stream."""
    one = listening(topics={"news": "", "chat": ""})
    answers, _ = one.shown('{"type":"connection_established","position":"1.a.1-1"}')
    assert [
        {"type": "subscribe", "topic": "news"},
        {"type": "subscribe", "topic": "chat"},
    ] == [json.loads(answer) for answer in answers]
    assert shown(one, type="subscribed", topic="news", position="1.0.0-0.b.1-1") is None
    assert shown(one, type="x", topic="news", id="t01-x", position="1.0.0-0.b.2-2") is None
    assert shown(one, type="x", topic="other", position="1.0.0-0.b.9-9") is None
    assert ("1.a.1-1", {"news": "1.0.0-0.b.2-2", "chat": ""}) == (one.position, one.topics)
    answers, _ = one.shown('{"type":"connection_established"}')
    assert "1.0.0-0.b.2-2" == json.loads(answers[0])["since"]
