"""What the hot connection says and understands, without a connection."""

import hiredis
import pytest

from trioserver.endpoint import Endpoint
from trioserver.errors import RedisRefused, RedisUnavailable
from trioserver.resp import (
    CHANNELS_PER_COMMAND,
    PONG,
    Confirmation,
    Greeting,
    Pong,
    interpret,
    pack,
    subscribe,
    unsubscribe,
)

OK = b"OK"
UNKNOWN = hiredis.ReplyError(
    "ERR unknown command `HELLO`, with args beginning with: `3`, `AUTH`, `default`, `s3cret`, "
)


def words(data: bytes) -> list[list[bytes]]:
    """Return the commands in ``data``, each as its words."""
    reader = hiredis.Reader(notEnoughData=Ellipsis)
    reader.feed(data)
    commands = []
    while (command := reader.gets()) is not Ellipsis:
        commands.append(command)
    return commands


def push(*parts: bytes | int | None) -> object:
    """Return a RESP3 push as the parser hands it out."""
    reader = hiredis.Reader()
    body = b"".join(
        b"_\r\n"
        if part is None
        else b":%d\r\n" % part
        if isinstance(part, int)
        # a bulk string
        else b"$%d\r\n%b\r\n" % (len(part), part)
        for part in parts
    )
    reader.feed(b">%d\r\n%b" % (len(parts), body))
    return reader.gets()


def greeting(username: str | None = None, password: str | None = None) -> Greeting:
    """Return a greeting of a worker."""
    where = Endpoint(username=username, password=password)
    return Greeting(where=where, client_name="trioserver-3")


def test_pack_writes_one_command() -> None:
    """Text, bytes and numbers become the words of one command."""
    assert words(pack("SET", b"k", 7, 1.5)) == [[b"SET", b"k", b"7", b"1.5"]]


def test_pack_refuses_what_redis_has_no_words_for() -> None:
    """An argument that is neither bytes, text nor a number is a TypeError of the caller."""
    with pytest.raises(TypeError):
        pack("SET", "k", None)  # type: ignore[arg-type]


def test_greeting_without_password_is_one_round_trip() -> None:
    """HELLO asks for RESP3 and gives the name; its reply is the end of the greeting."""
    hello = greeting()

    assert words(hello.hello()) == [[b"HELLO", b"3", b"SETNAME", b"trioserver-3"]]
    assert not hello.done
    assert hello.receive({b"server": b"redis", b"proto": 3}) == b""
    assert hello.done


@pytest.mark.parametrize(("username", "said"), [(None, b"default"), ("ann", b"ann")])
def test_greeting_carries_credentials(username: str | None, said: bytes) -> None:
    """A bare password is that of the default user."""
    (command,) = words(greeting(username, "s3cret").hello())

    assert [b"HELLO", b"3", b"AUTH", said, b"s3cret", b"SETNAME", b"trioserver-3"] == command


def test_greeting_of_a_user_without_password() -> None:
    """A user who needs no password is named all the same, with HELLO and without."""
    new = greeting("ann")

    (command,) = words(new.hello())
    assert [b"HELLO", b"3", b"AUTH", b"ann", b"", b"SETNAME", b"trioserver-3"] == command
    assert words(new.receive(UNKNOWN))[0] == [b"AUTH", b"ann", b""]


@pytest.mark.parametrize(
    "error",
    [
        "ERR unknown command 'HELLO'",
        "ERR unsupported command",
        "NOPROTO unsupported protocol version",
        "NOPERM this user has no permissions to run the 'hello' command",
    ],
)
def test_greeting_falls_back_where_hello_is_refused(error: str) -> None:
    """Old servers, RESP2 servers and wary proxies get AUTH and CLIENT SETNAME."""
    old = greeting("ann", "s3cret")
    old.hello()

    more = old.receive(hiredis.ReplyError(error))

    expected = [[b"AUTH", b"ann", b"s3cret"], [b"CLIENT", b"SETNAME", b"trioserver-3"]]
    assert expected == words(more)
    assert old.receive(OK) == b""
    assert not old.done
    assert old.receive(OK) == b""
    assert old.done


def test_greeting_of_an_old_server_without_password() -> None:
    """Nothing is authenticated, and a name that cannot be given does not matter."""
    old = greeting()
    old.hello()

    assert words(old.receive(UNKNOWN)) == [[b"CLIENT", b"SETNAME", b"trioserver-3"]]
    assert old.receive(hiredis.ReplyError("ERR unknown subcommand")) == b""
    assert old.done


def test_greeting_of_a_server_that_knows_no_users() -> None:
    """AUTH is repeated with the password alone."""
    old = greeting("made-up", "s3cret")
    old.hello()
    old.receive(UNKNOWN)

    error = hiredis.ReplyError("ERR wrong number of arguments for 'auth' command")
    assert words(old.receive(error)) == [[b"AUTH", b"s3cret"]]
    assert old.receive(hiredis.ReplyError("NOAUTH Authentication required.")) == b""
    assert not old.done
    assert old.receive(OK) == b""
    assert old.done


@pytest.mark.parametrize(
    "error",
    [
        "WRONGPASS invalid username-password pair or user is disabled.",
        "NOAUTH HELLO must be called with the client already authenticated",
        "ERR max number of clients reached",
        "ERR AUTH <password> called without any password configured for the default user.",
    ],
)
def test_greeting_ends_where_we_are_not_wanted(error: str) -> None:
    """A refusal is an error that says what Redis said."""
    refused = greeting(password="s3cret")
    refused.hello()

    with pytest.raises(RedisRefused, match=error.split(maxsplit=1)[0]):
        refused.receive(hiredis.ReplyError(error))
    assert not refused.done


def test_greeting_never_repeats_the_password() -> None:
    """An error that quotes our command is shown without the secret in it."""
    refused = greeting(password="s3cret")
    refused.hello()

    with pytest.raises(RedisRefused) as caught:
        refused.receive(hiredis.ReplyError("ERR syntax error near 's3cret'"))
    assert str(caught.value) == "ERR syntax error near '***'"


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(0, []), (1, [1]), (CHANNELS_PER_COMMAND, [512]), (1025, [512, 512, 1])],
)
def test_channels_are_asked_for_in_chunks(count: int, sizes: list[int]) -> None:
    """No command names more than 512 channels, and together they name all, in order."""
    channels = [b"c%d" % number for number in range(count)]

    for verb, commands in (
        (b"SUBSCRIBE", list(subscribe(channels))),
        (b"UNSUBSCRIBE", list(unsubscribe(channels))),
    ):
        spoken = words(b"".join(commands))
        assert sizes == [len(command) - 1 for command in spoken]
        assert channels == [channel for command in spoken for channel in command[1:]]
        assert all(command[0] == verb for command in spoken)


@pytest.mark.parametrize(
    ("reply", "meaning"),
    [
        (push(b"subscribe", b"a", 1), Confirmation(b"a", subscribed=True)),
        ([b"subscribe", b"a", 1], Confirmation(b"a", subscribed=True)),
        (push(b"unsubscribe", b"a", 0), Confirmation(b"a", subscribed=False)),
        ([b"unsubscribe", b"a", 0], Confirmation(b"a", subscribed=False)),
        (b"PONG", PONG),
        ([b"pong", b""], PONG),
        (push(b"invalidate", b"k"), None),
        (push(b"MOVING", 1, 2), None),
    ],
)
def test_interpret(reply: object, meaning: Confirmation | Pong | None) -> None:
    """Confirmations and PONG mean the same in both versions; unknown pushes mean nothing."""
    assert meaning == interpret(reply)


@pytest.mark.parametrize(
    "reply",
    [
        push(b"unsubscribe", None, 0),
        [b"unsubscribe", None, 0],
        [b"psubscribe", b"*", 1],
        [b"strange"],
        [],
        b"OK",
        1,
        None,
        {b"a": 1},
    ],
)
def test_interpret_wonders(reply: object) -> None:
    """What a subscribed connection cannot receive is a fault of the link."""
    with pytest.raises(RedisUnavailable, match="protocol error"):
        interpret(reply)


def test_interpret_an_error() -> None:
    """An error reply says what Redis refused."""
    with pytest.raises(RedisRefused, match="NOPERM no such channel"):
        interpret(hiredis.ReplyError("NOPERM no such channel for you"))
