"""Commands for callers without Trio, on a real Redis: what one promises, the other does too."""

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import pytest

from tests.redis_server import RedisServer, free_port, make_certificates, supports_tls
from tests.running import eventually
from tests.trioserver.publishing import plain_asyncio
from trioserver.endpoint import Endpoint, Tls
from trioserver.errors import RedisRefused, RedisUnavailable
from trioserver.redis_direct import CONNECTIONS, AsyncioLink, BlockingLink, Reply
from trioserver.resp import Argument

NAME = "trioserver-test"


class Link(Protocol):
    """Either link, as a blocking caller sees it."""

    def pipeline(
        self, commands: list[tuple[Argument, ...]], *, timeout: float
    ) -> list[Reply | RedisRefused]:
        """Run commands."""

    def close(self) -> None:
        """Close what is idle."""


class Looped:
    """An `AsyncioLink` and the event loop it lives in."""

    def __init__(self, where: Endpoint, *, client_name: str) -> None:
        self.runner = plain_asyncio()
        self.link = AsyncioLink(where, client_name=client_name)

    def pipeline(
        self, commands: list[tuple[Argument, ...]], *, timeout: float
    ) -> list[Reply | RedisRefused]:
        """Run commands."""
        # Outside of `run` the loop stands still, and would not know of connections that ended.
        self.runner.run(asyncio.sleep(0.01))
        return self.runner.run(self.link.pipeline(commands, timeout=timeout))

    def close(self) -> None:
        """Close what is idle, and the loop."""
        self.runner.run(self.link.aclose())
        self.runner.close()


Open = Callable[[Endpoint], Link]


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture(params=["blocking", "asyncio"])
def open_link(request: pytest.FixtureRequest) -> Iterator[Open]:
    """Make links of one kind; they are closed afterwards."""
    opened: list[Link] = []

    def make(where: Endpoint) -> Link:
        kind = BlockingLink if request.param == "blocking" else Looped
        link: Link = kind(where, client_name=NAME)
        opened.append(link)
        return link

    yield make
    for link in opened:
        link.close()


def unix(redis: RedisServer) -> Endpoint:
    """Return the endpoint of the Unix socket."""
    return Endpoint(path=str(redis.path), password=redis.password)


def ask(link: Link, *command: Argument, timeout: float = 5.0) -> Reply | RedisRefused:
    """Run one command."""
    (reply,) = link.pipeline([command], timeout=timeout)
    return reply


def clients(redis: RedisServer) -> int:
    """Return how many of our connections Redis sees."""
    reply = redis.command("CLIENT", "LIST")
    assert isinstance(reply, bytes)
    return reply.count(f"name={NAME}".encode())


def test_replies_are_as_redis_sent_them(redis: RedisServer, open_link: Open) -> None:
    """Bytes, numbers, nothing, lists: no conversion that depends on the command."""
    link = open_link(unix(redis))

    assert b"OK" == ask(link, "SET", "k", b"\xff\x00")
    assert b"\xff\x00" == ask(link, b"GET", b"k")
    assert ask(link, "GET", "none") is None
    assert 2 == ask(link, "HSET", "h", "a", 1, "b", 2.5)
    assert [b"a", b"1", b"b", b"2.5"] == ask(link, "HGETALL", "h")
    assert [1, [2, b"x"], None] == ask(link, "EVAL", "return {1, {2, 'x'}, false}", 0)


def test_refusals_are_values_in_their_place(redis: RedisServer, open_link: Open) -> None:
    """One reply per command, in order; an error is a value that begins with Redis's code."""
    link = open_link(unix(redis))
    commands: list[tuple[Argument, ...]] = [
        *[("SET", "k", 1), ("LPUSH", "k", 1), ("INCR", "k"), ("EVALSHA", "0" * 40, 0)],
        ("EVAL", "return redis.error_reply('MINE is worse')", 0),
    ]
    ok, wrong, two, unknown, mine = link.pipeline(commands, timeout=5)

    assert (b"OK", 2) == (ok, two)
    assert isinstance(wrong, RedisRefused)
    assert str(wrong).startswith("WRONGTYPE ")
    assert str(unknown).startswith("NOSCRIPT ")
    assert str(mine).startswith("MINE is worse")
    assert [] == link.pipeline([], timeout=5)


def test_one_connection_serves_one_caller_after_another(
    redis: RedisServer, open_link: Open
) -> None:
    """Connections are kept and used again, and are named; close closes them."""
    link = open_link(unix(redis))
    for number in range(20):
        assert b"%d" % number == ask(link, "ECHO", number)
    assert 1 == clients(redis)

    if isinstance(link, Looped):
        link.runner.run(link.link.aclose())
    else:
        link.close()
    eventually(lambda: not clients(redis), 5, "closed")
    assert b"PONG" == ask(link, "PING")


def test_nobody_there(open_link: Open) -> None:
    """A Redis that is not there is unavailable at once, and named."""
    nobody = Endpoint(host="127.0.0.1", port=free_port())
    with pytest.raises(RedisUnavailable, match=rf"^GET: .*\({nobody.target}\)$"):
        ask(open_link(nobody), "GET", "k")


def test_a_silent_redis_costs_the_callers_time(redis: RedisServer, open_link: Open) -> None:
    """Without an answer a caller is let go when its time is over, also where none is connected."""
    link = open_link(unix(redis))
    ask(link, "PING")
    redis.pause()
    for one in (link, open_link(unix(redis))):
        started = time.monotonic()
        with pytest.raises(RedisUnavailable, match=r"^SET: "):
            ask(one, "SET", "k", "v", timeout=0.2)
        assert 0.2 <= time.monotonic() - started < 0.6


def test_a_late_reply_goes_to_nobody(redis: RedisServer, open_link: Open) -> None:
    """After a timeout the next caller gets its own reply, on another connection."""
    link = open_link(unix(redis))
    with pytest.raises(RedisUnavailable):
        ask(link, "BLPOP", "list", 5, timeout=0.1)
    redis.command("LPUSH", "list", "late")

    assert b"mine" == ask(link, "ECHO", "mine")


def test_a_restart_between_two_commands_is_not_noticed(redis: RedisServer, open_link: Open) -> None:
    """An idle connection that Redis has closed is not used."""
    link = open_link(unix(redis))
    ask(link, "SET", "k", "v")
    redis.kill()
    with pytest.raises(RedisUnavailable):
        ask(link, "GET", "k")
    redis.start()

    assert b"v" == ask(link, "GET", "k")
    redis.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    eventually(lambda: not clients(redis), 5, "closed by Redis")
    assert b"v" == ask(link, "GET", "k")


def test_credentials(tmp_path: Path, open_link: Open) -> None:
    """Password and database are used; errors show no password."""
    with RedisServer(tmp_path / "redis", password="s3cret") as redis:
        right = Endpoint(host="127.0.0.1", port=redis.port, password="s3cret", db=3)
        link = open_link(right)
        ask(link, "SET", "k", "v")
        assert ask(open_link(unix(redis)), "GET", "k") is None
        refused = ask(link, "s3cret")
        assert "unknown command" in str(refused)
        assert "s3cret" not in str(refused)

        for wrong in (
            Endpoint(path=str(redis.path), password="guess"),
            Endpoint(path=str(redis.path)),
        ):
            with pytest.raises(RedisUnavailable, match=r"WRONGPASS|NOAUTH") as caught:
                ask(open_link(wrong), "PING")
            assert "guess" not in str(caught.value)


def test_least_privileges(redis: RedisServer, open_link: Open) -> None:
    """A user who may only publish can: a name that may not be given does not matter."""
    redis.command("ACL", "SETUSER", "min", "on", ">pw", "&*", "-@all", "+publish")
    link = open_link(Endpoint(path=str(redis.path), username="min", password="pw"))

    assert 0 == ask(link, "PUBLISH", "a", "x")
    assert str(ask(link, "GET", "k")).startswith("NOPERM")


@pytest.mark.skipif(not supports_tls(), reason="this Redis was built without TLS")
def test_tls(tmp_path: Path, open_link: Open) -> None:
    """Certificates are checked."""
    make_certificates(tmp_path)
    with RedisServer(tmp_path / "redis", certificates=tmp_path) as redis:
        for tls in (Tls(ca_file=str(tmp_path / "ca.pem")), Tls(verify=False)):
            where = Endpoint(host="127.0.0.1", port=redis.port, tls=tls)
            assert b"PONG" == ask(open_link(where), "PING")

        doubting = Endpoint(host="127.0.0.1", port=redis.port, tls=Tls())
        with pytest.raises(RedisUnavailable, match=r"(?i)certificate"):
            ask(open_link(doubting), "PING")


# What only threads do


class Interruption(BaseException):
    """As Ctrl-C, which pytest keeps for itself."""


def test_an_interrupted_caller_leaves_nothing_behind(redis: RedisServer) -> None:
    """After Ctrl-C in the middle of a reply the next command gets its own."""

    def interrupt(_number: int, _frame: object) -> None:
        raise Interruption

    link = BlockingLink(unix(redis), client_name=NAME)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        ask(link, "PING")
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Interruption):
            ask(link, "BLPOP", "list", 5)
    finally:
        signal.signal(signal.SIGALRM, before)
    redis.command("LPUSH", "list", "late")

    assert b"mine" == ask(link, "ECHO", "mine")
    link.close()


def test_threads_get_their_own_replies(redis: RedisServer) -> None:
    """Any number of threads may use one link, some of them running out of time."""

    def work(thread: int) -> int:
        right = 0
        for turn in range(100):
            if turn % 10 == 9:
                with pytest.raises(RedisUnavailable):
                    ask(link, "BLPOP", f"none-{thread}", 1, timeout=0.002)
            else:
                right += ask(link, "ECHO", f"{thread}:{turn}") == f"{thread}:{turn}".encode()
        return right

    with BlockingLink(unix(redis), client_name=NAME) as link, ThreadPoolExecutor(8) as pool:
        assert [90] * 8 == list(pool.map(work, range(8)))
    eventually(lambda: not clients(redis), 5, "closed")


def test_only_some_connections_are_kept(redis: RedisServer) -> None:
    """After a rush of threads no more than the bound stay open."""
    link = BlockingLink(unix(redis), client_name=NAME)
    count = CONNECTIONS + 5
    together = threading.Barrier(count + 1)

    def work(_thread: int) -> None:
        together.wait(10)
        ask(link, "BLPOP", "list", 10, timeout=10)

    with ThreadPoolExecutor(count) as pool:
        working = [pool.submit(work, number) for number in range(count)]
        together.wait(10)
        eventually(lambda: clients(redis) == count, 5, "one connection for each")
        redis.command("LPUSH", "list", *["x"] * count)
        for one in working:
            one.result(10)

    eventually(lambda: clients(redis) == CONNECTIONS, 5, "the rest is closed")
    link.close()


_FORKING = """
import os, sys
from trioserver.endpoint import Endpoint
from trioserver.redis_direct import BlockingLink

link = BlockingLink(Endpoint(path=sys.argv[1]))
def right(who):
    for n in range(300):
        word = b"%s-%d" % (who, n)
        if link.pipeline([("ECHO", word)], timeout=5) != [word]:
            return False
    return True

assert right(b"before")
child = os.fork()
if child == 0:
    os._exit(0 if right(b"child") else 1)
assert right(b"parent")
assert os.waitpid(child, 0)[1] == 0
assert right(b"after")
"""


def test_a_fork_shares_no_connection(redis: RedisServer) -> None:
    """A child that was forked with a link uses its own connections; the parent's live on."""
    command = [sys.executable, "-W", "error", "-c", _FORKING, str(redis.path)]

    assert 0 == subprocess.run(command, check=False, timeout=30).returncode


# What only asyncio does


def test_cancelled_tasks_leave_nothing_behind(redis: RedisServer) -> None:
    """A task that is cancelled while it waits harms nobody; no connection stays busy."""

    async def run() -> None:
        link = AsyncioLink(unix(redis), client_name=NAME)
        for _ in range(CONNECTIONS + 2):
            task = asyncio.create_task(link.pipeline([("BLPOP", "list", 5)], timeout=5))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert [b"mine"] == await link.pipeline([("ECHO", "mine")], timeout=5)
        await link.aclose()

    with plain_asyncio() as runner:
        runner.run(run())
    eventually(lambda: not clients(redis), 5, "closed")


def test_tasks_wait_for_a_connection(redis: RedisServer) -> None:
    """There are never more than the bound; who waits too long is let go."""

    async def run() -> None:
        link = AsyncioLink(unix(redis), client_name=NAME)
        busy = [
            asyncio.create_task(link.pipeline([("BLPOP", "list", 10)], timeout=10))
            for _ in range(CONNECTIONS)
        ]
        while clients(redis) < CONNECTIONS:  # noqa: ASYNC110 - another process sets no events
            await asyncio.sleep(0.002)
        with pytest.raises(RedisUnavailable, match=r"^PING: no answer within 0\.1 s"):
            await link.pipeline([("PING",)], timeout=0.1)
        waiting = asyncio.create_task(link.pipeline([("PING",)], timeout=10))
        redis.command("LPUSH", "list", *["x"] * CONNECTIONS)
        assert [b"PONG"] == await waiting
        await asyncio.gather(*busy)
        assert CONNECTIONS == clients(redis)
        await link.aclose()

    with plain_asyncio() as runner:
        runner.run(asyncio.wait_for(run(), 20))


def test_each_event_loop_has_its_own_connections(redis: RedisServer) -> None:
    """A link may be used in one loop after another, as where each request has its own."""
    link = AsyncioLink(unix(redis), client_name=NAME)

    async def run(word: bytes) -> None:
        assert [word] == await link.pipeline([("ECHO", word)], timeout=5)
        await link.aclose()

    for number in range(3):
        with plain_asyncio() as runner:
            runner.run(run(b"%d" % number))
    eventually(lambda: not clients(redis), 5, "closed")
