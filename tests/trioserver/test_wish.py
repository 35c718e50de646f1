"""The wish: what clients may say about where they want to go on, in both ways of saying it."""

import json
from collections.abc import Callable
from functools import partial

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioserver import messages, wish
from trioserver.errors import ClientError
from trioserver.wish import NO_WISH, Wish

POSITION = "1.k3x9q2aa.1763630000000-61440.b7.1763-4096"


def of_auth(**fields: object) -> Wish:
    """Return the wish of a first message with these fields."""
    said = messages.decode(json.dumps({"type": "auth", "token": "t", **fields}).encode())
    assert isinstance(said, messages.Auth)
    return wish.of_auth(said)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, NO_WISH),
        ({"token": "t", "lang": "de"}, NO_WISH),
        ({"device": "", "position": "", "ack": ""}, NO_WISH),
        ({"client_type": "ios"}, Wish(client_type="ios")),
        ({"client_type": "Web_2.0-beta" + "x" * 20}, Wish(client_type="Web_2.0-beta" + "x" * 20)),
        ({"device": "phone"}, Wish(device="phone")),
        ({"device": "!~" * 32}, Wish(device="!~" * 32)),
        ({"position": POSITION}, Wish(position=POSITION)),
        ({"position": "garbage \0é"}, Wish(position="garbage \0é")),
        ({"position": "x" * 256}, Wish(position="x" * 256)),
        ({"ack": "1"}, Wish(ack=True)),
        ({"ack": "true"}, Wish(ack=True)),
        ({"ack": "0"}, NO_WISH),
        ({"ack": "false"}, NO_WISH),
        (
            {"device": "phone", "position": POSITION, "ack": "1", "token": "t"},
            Wish(device="phone", position=POSITION, ack=True),
        ),
    ],
)
def test_query_parameters(parameters: dict[str, str], expected: Wish) -> None:
    """Each parameter may be missing or empty; a position may be any text of its length."""
    assert expected == wish.of_query(parameters)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, NO_WISH),
        ({"device": None, "position": None, "ack": False}, NO_WISH),
        ({"position": ""}, NO_WISH),
        ({"device": "phone"}, Wish(device="phone")),
        ({"client_type": "ios"}, Wish(client_type="ios")),
        ({"client_type": None}, NO_WISH),
        ({"position": "garbage \0é"}, Wish(position="garbage \0é")),
        ({"position": "x" * 256}, Wish(position="x" * 256)),
        (
            {"device": "phone", "position": POSITION, "ack": True},
            Wish(device="phone", position=POSITION, ack=True),
        ),
    ],
)
def test_the_first_message(fields: dict[str, object], expected: Wish) -> None:
    """The same as the query, with the types of JSON."""
    assert expected == of_auth(**fields)


def verdict(say: Callable[[], Wish]) -> Wish | str:
    """Return the wish, or the code of the refusal."""
    try:
        return say()
    except ClientError as error:
        return error.code


DEVICES = ["a b", " a", "a ", "a\tb", "a\nb", "a\n", "\n", "\x7f", "é", "設備", "\0", "x" * 65]


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_is_visible_ascii_in_both_ways(device: str) -> None:
    """It becomes part of a key's field, and of what people read."""
    with pytest.raises(ClientError) as in_query:
        wish.of_query({"device": device})
    with pytest.raises(ClientError) as in_message:
        of_auth(device=device)
    assert "bad_message" == in_query.value.code == in_message.value.code


@given(device=st.text(max_size=70), position=st.text(max_size=300), ack=st.booleans())
def test_both_ways_agree(device: str, position: str, *, ack: bool) -> None:
    """What may be said in the query may be said in the message, and is the same wish."""
    query = {"device": device, "position": position, "ack": "1" if ack else "0"}
    fields = {"device": device} if device else {}
    assert verdict(partial(wish.of_query, query)) == verdict(
        partial(of_auth, position=position, ack=ack, **fields)
    )


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        ({"device": "a b"}, "device is 1 to 64"),
        ({"position": "x" * 257}, "position is longer than 256"),
        ({"position": "x" * 100_000}, "position is longer than 256"),
        ({"ack": "2"}, "ack is 1 or 0"),
        ({"ack": "yes"}, "ack is 1 or 0"),
        ({"ack": "True"}, "ack is 1 or 0"),
    ],
)
def test_what_cannot_be_is_named_and_not_repeated(parameters: dict[str, str], names: str) -> None:
    """The reason goes into a response, so it has nothing of what the client sent."""
    with pytest.raises(ClientError) as caught:
        wish.of_query(parameters)
    assert "bad_message" == caught.value.code
    assert caught.value.message.startswith(names)
    assert len(caught.value.message) < 80


@pytest.mark.parametrize("kind", ["a b", "é", "x" * 33, "a/b", "a\n", "{}"])
@pytest.mark.parametrize("way", [of_auth, lambda **said: wish.of_query(said)])
def test_a_client_type_is_a_short_word(kind: str, way: Callable[..., Wish]) -> None:
    """It is shown to people and kept per connection: nothing strange gets in."""
    with pytest.raises(ClientError):
        way(client_type=kind)


SESSION_ID = "01234567-89ab-4cde-8f01-23456789abcd"


@pytest.mark.parametrize(
    ("path", "parameters", "expected"),
    [
        ("/ws", {"session_id": SESSION_ID}, NO_WISH),
        ("/ws/chat", {}, Wish(chat=True)),
        ("/ws/chat/", {}, Wish(chat=True)),
        ("/ws/chat/support-7", {}, Wish(chat=True, label="support-7")),
        ("/ws/chat/a%2Fb", {}, Wish(chat=True, label="a/b")),
        (
            "/ws/chat/",
            {"session_id": SESSION_ID.upper(), "device": "phone"},
            Wish(chat=True, session_id=SESSION_ID, device="phone"),
        ),
        ("/ws", {"batch": "1"}, Wish(batch=True)),
    ],
)
def test_paths(path: str, parameters: dict[str, str], expected: Wish) -> None:
    """The path says whether it is a chat, and what its client calls it."""
    assert wish.is_path(path)
    assert expected == wish.of_request(path, parameters)


@pytest.mark.parametrize("path", ["/", "/wss", "/ws/", "/ws/chats", "/ws/chat/a/b", "/ws/chat/a/"])
def test_other_paths(path: str) -> None:
    """Nothing else is a WebSocket's path."""
    assert not wish.is_path(path)


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("/ws/chat/", {"session_id": "1"}),
        ("/ws/chat/", {"session_id": SESSION_ID + "\n"}),
        ("/ws/chat/", {"session_id": SESSION_ID.replace("-", "")}),
        ("/ws/chat/" + "x" * 65, {}),
        ("/ws/chat/a%20b", {}),
        ("/ws/chat/%0d%0aX", {}),
        ("/ws", {"batch": "2"}),
    ],
)
def test_what_a_chat_cannot_be(path: str, parameters: dict[str, str]) -> None:
    """A session's id is a UUID, and a label is visible ASCII."""
    with pytest.raises(ClientError) as caught:
        wish.of_request(path, parameters)
    assert "bad_message" == caught.value.code


def test_the_first_message_of_a_chat() -> None:
    """What the path has said stays; a session may be named in either."""
    before = Wish(chat=True, label="l", session_id=SESSION_ID)
    assert before == of_auth().after(before)
    other = SESSION_ID.replace("0", "f")
    assert Wish(chat=True, session_id=other) == of_auth(session_id=other).after(Wish(chat=True))
    assert Wish(device="d") == of_auth(device="d").after(NO_WISH)


def test_what_the_query_has_said_stays_said() -> None:
    """A token that comes as a message takes back nothing; what it says itself counts more."""
    said = {"device": "d", "position": POSITION, "client_type": "web", "ack": "1", "batch": "1"}
    before = wish.of_query(said)
    assert before == of_auth().after(before)
    assert attrs.evolve(before, device="e") == of_auth(device="e").after(before)
