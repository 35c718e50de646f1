"""Commands from Trio, on a real Redis."""

import random
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.redis_server import RedisServer, make_certificates, supports_tls, wait_until
from tests.toxic import Toxic
from tests.trioserver.slow_names import SlowResolver
from trioserver import redis_link
from trioserver.endpoint import Endpoint, Tls
from trioserver.errors import RedisRefused, RedisUnavailable
from trioserver.redis_link import RedisLink, open_link
from trioserver.resp import pack

LIMIT = 30.0
"""Seconds after which a test is stuck."""


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
async def link(redis: RedisServer) -> AsyncIterator[RedisLink]:
    """A link to it."""
    with trio.fail_after(LIMIT):
        async with open_link(unix(redis), client_name="trioserver-test") as link:
            yield link


def unix(redis: RedisServer) -> Endpoint:
    """Return the endpoint of the Unix socket."""
    return Endpoint(path=str(redis.path), password=redis.password)


@asynccontextmanager
async def proxied(redis: RedisServer) -> AsyncIterator[tuple[Toxic, Endpoint]]:
    """Run a proxy in front of ``redis``."""
    async with trio.open_nursery() as nursery:
        proxy = Toxic(("127.0.0.1", redis.port))
        await nursery.start(proxy.run)
        yield proxy, Endpoint(host="127.0.0.1", port=proxy.port)
        nursery.cancel_scope.cancel()


def clients(redis: RedisServer) -> int:
    """Return how many of our connections Redis sees."""
    reply = redis.command("CLIENT", "LIST")
    assert isinstance(reply, bytes)
    return reply.count(b"name=trioserver-test")


async def test_replies_are_as_redis_sent_them(link: RedisLink) -> None:
    """Bytes, numbers, nothing, lists: no conversion that depends on the command."""
    assert await link.execute("SET", "k", b"\xff\x00") == b"OK"
    assert await link.execute(b"GET", b"k") == b"\xff\x00"
    assert await link.execute("GET", "none") is None
    assert await link.execute("HSET", "h", "a", 1, "b", 2.5) == 2
    assert await link.execute("HGETALL", "h") == [b"a", b"1", b"b", b"2.5"]
    assert await link.execute("CONFIG", "GET", "databases") == [b"databases", b"16"]
    assert await link.execute("EVAL", "return {1, {2, 'x'}, false}", 0) == [1, [2, b"x"], None]


async def test_a_pipeline_keeps_its_order(link: RedisLink) -> None:
    """One reply per command, in order; a refusal is a value in its place."""
    replies = await link.pipeline([("SET", "k", 1), ("LPUSH", "k", 1), ("INCR", "k")])

    assert len(replies) == 3
    assert replies[0] == b"OK"
    assert isinstance(replies[1], RedisRefused)
    assert str(replies[1]).startswith("WRONGTYPE ")
    assert replies[2] == 2
    assert await link.pipeline([]) == []


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("NO-SUCH-COMMAND",), "ERR unknown command"),
        (("EVALSHA", "0" * 40, 0), "NOSCRIPT "),
        (("EVAL", "return redis.error_reply('MINE is worse')", 0), "MINE is worse"),
        (("XGROUP", "CREATE", "none", "g", "0"), "ERR "),
    ],
)
async def test_a_refusal_begins_with_its_code(
    link: RedisLink, command: tuple[str | int, ...], code: str
) -> None:
    """An error reply is RedisRefused, and its text begins with what Redis called it."""
    with pytest.raises(RedisRefused) as caught:
        await link.execute(*command)
    assert str(caught.value).startswith(code)
    assert await link.execute("PING") == b"PONG"


async def test_bad_arguments_are_the_callers_bug(link: RedisLink) -> None:
    """What cannot be sent never reaches a connection."""
    with pytest.raises(TypeError):
        await link.execute("SET", "k", None)  # type: ignore[arg-type]
    assert await link.execute("PING") == b"PONG"


async def test_requests_share_a_crossing(redis: RedisServer, link: RedisLink) -> None:
    """What is asked for in one turn travels on one connection as one pipeline."""
    replies: dict[int, redis_link.Reply] = {}
    await link.execute("PING")
    redis.command("CONFIG", "RESETSTAT")

    async def ask(number: int) -> None:
        replies[number] = await link.execute("ECHO", number)

    async with trio.open_nursery() as nursery:
        for number in range(500):
            nursery.start_soon(ask, number)

    assert {number: b"%d" % number for number in range(500)} == replies
    assert clients(redis) == 1


async def test_a_slow_command_holds_up_nobody(redis: RedisServer) -> None:
    """Behind a command that takes its time, others get a connection of their own."""
    async with open_link(unix(redis), client_name="trioserver-test") as link:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.execute, "BLPOP", "none", 0.5)
            await trio.sleep(0.02)
            started = trio.current_time()
            assert await link.execute("PING") == b"PONG"
            assert trio.current_time() - started < 0.3
        assert clients(redis) == 2


async def test_no_more_connections_than_lanes(redis: RedisServer) -> None:
    """With every lane busy requests wait, and are answered when one is free."""
    async with (
        open_link(unix(redis), client_name="trioserver-test", lanes=2) as link,
        trio.open_nursery() as nursery,
    ):
        for _ in range(2):
            nursery.start_soon(link.execute, "BLPOP", "none", 0.2)
            await trio.sleep(0.02)
        assert await link.execute("PING") == b"PONG"
        assert clients(redis) == 2


async def test_a_large_pipeline(link: RedisLink) -> None:
    """More commands than a batch takes, and more bytes, arrive whole."""
    replies = await link.pipeline([("ECHO", number) for number in range(3000)], timeout=5)
    assert [b"%d" % number for number in range(3000)] == replies

    big = b"x" * (3 << 20)
    assert await link.execute("ECHO", big, timeout=5) == big


async def test_a_full_queue_makes_callers_wait(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bound requests wait for room; all are answered, in the end."""
    monkeypatch.setattr(redis_link, "QUEUE_REQUESTS", 3)
    monkeypatch.setattr(redis_link, "BATCH_COMMANDS", 2)
    answered: list[redis_link.Reply] = []
    async with open_link(unix(redis), lanes=1) as link, trio.open_nursery() as nursery:

        async def ask(number: int) -> None:
            answered.append(await link.execute("ECHO", number))

        for number in range(50):
            nursery.start_soon(ask, number)

    assert {b"%d" % number for number in range(50)} == set(answered)


async def test_timeout(redis: RedisServer, link: RedisLink) -> None:
    """A Redis that does not answer is unavailable after the caller's time, for each caller."""
    await link.execute("PING")
    redis.pause()
    started = trio.current_time()
    with pytest.raises(RedisUnavailable, match=r"^GET: no answer within 0.2 s \(unix://"):
        await link.execute("GET", "k", timeout=0.2)
    assert 0.2 <= trio.current_time() - started < 0.4
    with pytest.raises(RedisUnavailable):
        await link.pipeline([("GET", "k")], timeout=0.1)
    redis.resume()
    await wait_until(lambda: clients(redis) <= 1)
    assert await link.execute("PING", timeout=3) == b"PONG"


async def test_a_request_that_was_never_sent_is_dropped(redis: RedisServer) -> None:
    """Who gave up while still in the queue has caused nothing."""
    async with open_link(unix(redis), lanes=1) as link, trio.open_nursery() as nursery:
        nursery.start_soon(link.execute, "BLPOP", "none", 0.3)
        await trio.sleep(0.05)
        with trio.move_on_after(0.05):
            await link.execute("SET", "k", "v")
        with pytest.raises(RedisUnavailable):
            await link.execute("SET", "k", "v", timeout=0.05)
        assert await link.execute("EXISTS", "k") == 0


async def test_redis_dies_and_comes_back(redis: RedisServer, link: RedisLink) -> None:
    """While it is away everything fails at once; after that the first command works."""
    assert await link.execute("SET", "k", "v") == b"OK"
    redis.kill()
    for _ in range(3):
        started = trio.current_time()
        with pytest.raises(RedisUnavailable, match=r"redis\.sock"):
            await link.execute("GET", "k")
        assert trio.current_time() - started < 0.5
    redis.start()
    assert await link.execute("GET", "k") == b"v"


async def test_an_idle_connection_that_was_closed_is_not_used(
    redis: RedisServer, link: RedisLink
) -> None:
    """A restart between two commands is not even noticed."""
    assert await link.execute("PING") == b"PONG"
    for _ in range(3):
        redis.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await trio.sleep(0.02)
        assert await link.execute("PING") == b"PONG"


async def test_redis_dies_with_requests_outstanding(redis: RedisServer) -> None:
    """Requests whose replies are lost are unavailable: nobody waits for ever, nobody repeats."""
    failures: list[str] = []

    async def ask(link: RedisLink) -> None:
        with pytest.raises(RedisUnavailable) as caught:
            await link.execute("BLPOP", "none", 5, timeout=5)
        failures.append(str(caught.value))

    with trio.fail_after(2):
        async with open_link(unix(redis)) as link, trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(ask, link)
            await trio.sleep(0.1)
            redis.kill()

    assert len(failures) == 20
    assert all("closed" in failure or "reset" in failure for failure in failures)


async def test_redis_is_loading(redis: RedisServer, link: RedisLink) -> None:
    """A Redis that does not serve yet is unavailable, not refusing; it recovers by itself."""
    dice = random.Random(10)
    for number in range(50):
        redis.command("SET", f"k{number}", dice.randbytes(2000))
    redis.command("CONFIG", "SET", "key-load-delay", 10_000)
    redis.command("CONFIG", "SET", "loading-process-events-interval-bytes", 1024)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(redis.path))
        connection.sendall(pack("DEBUG", "RELOAD"))
        await trio.sleep(0.1)
        with pytest.raises(RedisUnavailable, match="LOADING"):
            await link.execute("GET", "k1")
        connection.settimeout(5)
        assert await trio.to_thread.run_sync(connection.recv, 100) == b"+OK\r\n"
    assert await link.execute("STRLEN", "k1") == 2000


@pytest.mark.parametrize(
    "rounds", [40, pytest.param(200, marks=pytest.mark.slow)], ids=["some", "many"]
)
async def test_cancelled_callers_get_nobody_elses_reply(redis: RedisServer, rounds: int) -> None:
    """Random cancellations through a slow network: 0 wrong replies."""
    dice = random.Random(11)
    callers = 100
    right = cancelled = 0
    for number in range(callers):
        redis.command("SET", f"user:{number}", f"value of {number}")

    async def ask(link: RedisLink, number: int) -> None:
        nonlocal right, cancelled
        expected = b"value of %d" % number
        for turn in range(rounds):
            with trio.move_on_after(dice.choice([0.001, 0.01, 0.03, 0.05, 9])) as scope:
                if turn % 3:
                    reply = await link.execute("GET", f"user:{number}", timeout=9)
                    assert expected == reply
                else:
                    script = "return redis.call('GET', KEYS[1])"
                    commands = [("EVAL", script, 1, f"user:{number}"), ("ECHO", number)]
                    assert [expected, b"%d" % number] == await link.pipeline(commands, timeout=9)
                right += 1
            cancelled += scope.cancelled_caught

    async with proxied(redis) as (proxy, where):
        proxy.latency_seconds = 0.01
        with trio.fail_after(LIMIT):
            async with open_link(where, lanes=4) as link, trio.open_nursery() as nursery:
                for number in range(callers):
                    nursery.start_soon(ask, link, number)

    assert callers * rounds == right + cancelled
    assert cancelled > 200
    assert right > 200


async def test_cuts_and_timeouts_mix_up_no_replies(redis: RedisServer) -> None:
    """Connections that break in the middle of replies: an answer is the right one or none."""
    dice = random.Random(12)
    right = unavailable = 0

    async def ask(link: RedisLink, number: int) -> None:
        nonlocal right, unavailable
        for turn in range(60):
            word = b"%d:%d" % (number, turn)
            try:
                assert word == await link.execute("ECHO", word, timeout=dice.uniform(0.002, 0.1))
                right += 1
            except RedisUnavailable:
                unavailable += 1

    async def nemesis(proxy: Toxic) -> None:
        while True:
            proxy.latency_seconds = dice.choice([0, 0.002, 0.01])
            await trio.sleep(dice.uniform(0, 0.1))
            proxy.mute_to_client = dice.random() < 0.1
            if dice.random() < 0.4:
                proxy.cut()

    async with proxied(redis) as (proxy, where), trio.open_nursery() as troubles:
        troubles.start_soon(nemesis, proxy)
        with trio.fail_after(LIMIT):
            async with open_link(where, lanes=3) as link, trio.open_nursery() as nursery:
                for number in range(30):
                    nursery.start_soon(ask, link, number)
        troubles.cancel_scope.cancel()

    assert right + unavailable == 1800
    assert right > 200
    assert unavailable > 5


async def test_a_bug_of_ours_costs_one_batch(
    link: RedisLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception where none is expected is an answer too, and the next batch is carried."""

    async def stumble(*_: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(redis_link._Lane, "_exchange", stumble)
        with pytest.raises(RedisUnavailable, match="internal error"):
            await link.execute("PING")
    assert await link.execute("PING") == b"PONG"


async def test_closing_answers_everybody(redis: RedisServer) -> None:
    """When the link goes, callers elsewhere are told, and its connections are closed."""
    failures: list[str] = []

    async def ask(link: RedisLink) -> None:
        try:
            await link.execute("BLPOP", "none", 5, timeout=5)
        except RedisUnavailable as error:
            failures.append(str(error))

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            async with open_link(unix(redis), client_name="trioserver-test", lanes=1) as link:
                nursery.start_soon(ask, link)
                await wait_until(lambda: clients(redis) == 1)
                nursery.start_soon(ask, link)
                await trio.sleep(0.05)
            with pytest.raises(RedisUnavailable, match="PING: the link is closed"):
                await link.execute("PING")

    assert len(failures) == 2
    assert all("the link is closed" in failure for failure in failures)
    await wait_until(lambda: clients(redis) == 0)


async def test_cancelling_the_block_closes_the_link(redis: RedisServer) -> None:
    """A worker that is cancelled leaves no connection behind."""
    with trio.move_on_after(0.3) as scope:
        async with open_link(unix(redis), client_name="trioserver-test") as link:
            await link.execute("PING")
            assert clients(redis) == 1
            await trio.sleep_forever()

    assert scope.cancelled_caught
    await wait_until(lambda: clients(redis) == 0)


async def test_errors_of_the_block_come_out_as_they_are(redis: RedisServer) -> None:
    """What the block raises is not wrapped into exception groups."""
    with pytest.raises(RedisRefused, match="unknown command"):
        async with open_link(unix(redis)) as link:
            await link.execute("NO-SUCH-COMMAND")


async def test_asyncio_complaints_do_not_end_the_worker(
    link: RedisLink, capfd: pytest.CaptureFixture[str]
) -> None:
    """What asyncio hands to its exception handler is logged, nothing else."""
    link._queue._loop.call_exception_handler({"message": "a transport hiccups"})

    assert await link.execute("PING") == b"PONG"
    assert "a transport hiccups" in capfd.readouterr().err


async def test_ping(redis: RedisServer) -> None:
    """Health can ask how long Redis takes."""
    async with proxied(redis) as (proxy, where), open_link(where) as link:
        await link.execute("PING")
        proxy.latency_seconds = 0.02
        assert 0.04 <= await link.ping() < 0.5


async def test_least_privileges(redis: RedisServer) -> None:
    """A user who may only publish can: a name that may not be given does not matter."""
    redis.command("ACL", "SETUSER", "min", "on", ">pw", "&*", "-@all", "+publish")
    redis.command("ACL", "SETUSER", "open", "on", "nopass", "&*", "~*", "+@all")
    poor = Endpoint(path=str(redis.path), username="min", password="pw")
    for where in (poor, Endpoint(path=str(redis.path), username="open")):
        async with open_link(where) as link:
            assert await link.execute("PUBLISH", "a", "x") == 0
    async with open_link(poor) as link:
        with pytest.raises(RedisRefused, match="NOPERM"):
            await link.execute("GET", "k")


async def test_refusals_are_masked(tmp_path: Path) -> None:
    """An error that repeats what we said is shown without the password."""
    with RedisServer(tmp_path / "redis", password="s3cret") as redis:
        async with open_link(unix(redis)) as link:
            with pytest.raises(RedisRefused, match="unknown command") as caught:
                await link.execute("s3cret")
        assert "s3cret" not in str(caught.value)


async def test_requests_that_expired_make_room(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for room gets it also when everybody in front of them has given up."""
    monkeypatch.setattr(redis_link, "QUEUE_REQUESTS", 2)

    async def ask(link: RedisLink, seconds: float) -> None:
        with pytest.raises(RedisUnavailable):
            await link.execute("PING", timeout=seconds)

    with trio.fail_after(LIMIT):
        async with open_link(unix(redis), lanes=1) as link, trio.open_nursery() as nursery:
            await link.execute("PING")
            redis.pause()
            nursery.start_soon(ask, link, 0.5)
            await trio.sleep(0.05)
            for _ in range(2):
                nursery.start_soon(ask, link, 0.2)
            await trio.sleep(0.05)
            nursery.start_soon(_resume_soon, redis)
            started = trio.current_time()
            assert await link.execute("PING", timeout=9) == b"PONG"
            assert trio.current_time() - started < 2


async def _resume_soon(redis: RedisServer) -> None:
    await trio.sleep(0.7)
    redis.resume()


async def test_names_may_be_found_slowly(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finding the address is not part of connecting, nor bounded by who happens to wait."""
    monkeypatch.setattr(redis_link, "CONNECT_SECONDS", 0.2)
    trio.socket.set_custom_hostname_resolver(SlowResolver(0.3))
    where = Endpoint(host="redis.test", port=redis.port)
    async with open_link(where, lanes=1) as link:
        with pytest.raises(RedisUnavailable):
            await link.execute("SET", "k", "late", timeout=0.1)
        assert await link.execute("GET", "k", timeout=3) is None

        monkeypatch.setattr(redis_link, "RESOLVE_SECONDS", 0.1)
        redis.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        started = trio.current_time()
        with pytest.raises(RedisUnavailable):
            await link.execute("PING", timeout=3)
        assert trio.current_time() - started < 0.5


async def test_closing_does_not_wait_for_a_name(redis: RedisServer) -> None:
    """A link that looks a name up when it is closed is closed all the same."""
    trio.socket.set_custom_hostname_resolver(SlowResolver(60))
    with trio.fail_after(2):
        async with open_link(Endpoint(host="redis.test", port=redis.port)) as link:
            with pytest.raises(RedisUnavailable):
                await link.execute("PING", timeout=0.05)


async def test_password_and_database(tmp_path: Path) -> None:
    """Both are used; a wrong password is unavailable and says why, without the secret."""
    with RedisServer(tmp_path / "redis", password="s3cret") as redis:
        right = Endpoint(host="127.0.0.1", port=redis.port, password="s3cret", db=3)
        async with open_link(right, client_name="trioserver-test") as link:
            await link.execute("SET", "k", "v")
            assert clients(redis) == 1
        async with open_link(unix(redis)) as link:
            assert await link.execute("GET", "k") is None

        for wrong in (
            Endpoint(path=str(redis.path), password="guess"),
            Endpoint(path=str(redis.path)),
        ):
            async with open_link(wrong) as link:
                with pytest.raises(RedisUnavailable) as caught:
                    await link.execute("PING")
                assert "guess" not in str(caught.value)
                assert "WRONGPASS" in str(caught.value) or "NOAUTH" in str(caught.value)


@pytest.mark.skipif(not supports_tls(), reason="this Redis was built without TLS")
async def test_tls(tmp_path: Path) -> None:
    """Certificates are checked."""
    make_certificates(tmp_path)
    with RedisServer(tmp_path / "redis", certificates=tmp_path) as redis:
        trusting = Endpoint(
            host="127.0.0.1", port=redis.port, tls=Tls(ca_file=str(tmp_path / "ca.pem"))
        )
        async with open_link(trusting) as link:
            assert await link.execute("PING") == b"PONG"

        doubting = Endpoint(host="127.0.0.1", port=redis.port, tls=Tls())
        async with open_link(doubting) as link:
            with pytest.raises(RedisUnavailable, match=r"(?i)certificate"):
                await link.execute("PING")

        careless = Endpoint(host="127.0.0.1", port=redis.port, tls=Tls(verify=False))
        async with open_link(careless) as link:
            assert await link.execute("PING") == b"PONG"


async def test_nobody_answers() -> None:
    """A host that accepts and is silent costs a second, not more."""
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, _forever, listeners)
            where = Endpoint(host="127.0.0.1", port=listeners[0].socket.getsockname()[1])
            async with open_link(where) as link:
                started = trio.current_time()
                with pytest.raises(RedisUnavailable):
                    await link.execute("PING", timeout=5)
                assert 0.9 < trio.current_time() - started < 2
            nursery.cancel_scope.cancel()


async def _forever(_stream: trio.SocketStream) -> None:
    await trio.sleep_forever()
