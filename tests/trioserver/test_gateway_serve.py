"""Serving: what the kernel and Hypercorn are told, how many at once, and what ends whom."""

import socket

import pytest
import trio
import trio.testing
from starlette.applications import Starlette

from tests.redis_server import wait_until
from tests.trioserver.gateway_process import LIMIT_SECONDS, Answer
from tests.trioserver.serving import Served, serving
from trioserver.gateway import serve
from trioserver.gateway.api_keys import ApiKeys
from trioserver.gateway.client_rate import ClientRate
from trioserver.gateway.guarded import GuardedConnection
from trioserver.gateway.serve import Server, bound_stuck_clients, make_config
from trioserver.peers import Peers

POST = b"POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\na"
GET = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET /b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


async def dial(served: Served, number: int) -> trio.SocketStream:
    """Return a new connection; it has a place, and then there are so many."""
    stream = await served.dial()
    await wait_until(lambda: len(served.server._open) >= number)
    return stream


async def everything(stream: trio.SocketStream) -> Answer:
    """Return the one answer that comes until the end, and close."""
    with trio.fail_after(LIMIT_SECONDS):
        answer = b"".join([part async for part in stream])
    await stream.aclose()
    return Answer.parse(answer)


def test_accepted_sockets_inherit_the_limit_for_stuck_clients() -> None:
    """A client that takes nothing for ten seconds is ended by the kernel."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        bound_stuck_clients(listener.fileno())
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            with accepted:
                limit = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)

    assert 10_000 == limit


def test_hypercorn_writes_nothing_of_its_own() -> None:
    """No access log, no lines on standard error, no name of the software."""
    config = make_config()

    assert config.log.access_logger is None
    assert config.log.error_logger is not None
    assert [] == config.log.error_logger.handlers
    assert (b"server", b"hypercorn-h11") not in config.response_headers("h11")


async def test_the_socket_stays_its_owners() -> None:
    """Serving and stopping leave the caller's socket as it was: listening."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(Starlette(), listener.fileno())
        with trio.fail_after(10.0):
            async with trio.open_nursery() as nursery:
                await nursery.start(server.run)
                was_accepting = server.accepting
                server.stop(0.0)

        assert (True, False) == (was_accepting, server.accepting)
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


async def test_what_cannot_be_served_is_an_error_at_the_start() -> None:
    """A socket that is none for HTTP raises before `started`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wrong, trio.fail_after(10.0):
        server = Server(Starlette(), wrong.fileno())
        with pytest.raises(OSError, match="Protocol not available"):
            await server.run()


async def test_a_bug_in_one_connection_ends_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is there stays, whoever comes is served."""
    async with serving() as served:
        stays = await served.dial()
        await stays.send_all(GET)
        assert (await stays.receive_some()).startswith(b"HTTP/1.1 200 ")

        async def broken(_connection: GuardedConnection) -> None:
            raise RuntimeError("a bug")

        with monkeypatch.context() as patch:
            patch.setattr(GuardedConnection, "run", broken)
            assert b"" == await served.ask(b"")
        assert (await served.ask(LAST)).startswith(b"HTTP/1.1 200 ")
        await stays.send_all(GET)
        assert (await stays.receive_some()).startswith(b"HTTP/1.1 200 ")
        await stays.aclose()


async def test_who_is_silent_makes_room_for_who_comes() -> None:
    """However many take up room without a request: the one that has rested longest goes."""
    async with serving(places=3) as served:
        silent = [await dial(served, number) for number in (1, 2, 3)]

        assert (await served.ask(LAST)).startswith(b"HTTP/1.1 200 ")
        with trio.fail_after(LIMIT_SECONDS):
            assert b"" == await silent[0].receive_some()
        for stream in silent[1:]:
            await stream.send_all(GET)
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 200 ")
        assert [] == served.refused
        for stream in silent:
            await stream.aclose()


async def test_if_all_have_requests_under_way_a_newcomer_is_told_so() -> None:
    """It gets the whole 503 although it has sent its request; who is there is not disturbed."""
    async with serving(places=2) as served:
        busy = [await dial(served, number) for number in (1, 2)]
        for stream in busy:
            await stream.send_all(POST)
        await wait_until(lambda: len(served.paths) == len(busy))

        for request in (LAST, b"", GET * 1000):
            refused = Answer.parse(await served.ask(request))
            assert (503, "1") == (refused.status, refused.headers["Retry-After"])
        assert [503] * 3 == served.refused

        await busy[0].send_all(b"bc")
        assert (await busy[0].receive_some()).startswith(b"HTTP/1.1 200 ")
        await wait_until(lambda: any(one.resting_since for one in served.server._open))
        assert (await served.ask(LAST)).startswith(b"HTTP/1.1 200 ")
        for stream in busy:
            await stream.aclose()


async def test_who_is_turned_away_may_finish_its_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it sends when it has its answer already breaks nothing."""
    monkeypatch.setattr(serve, "_FULL_SECONDS", LIMIT_SECONDS)
    async with serving(places=1) as served:
        busy = await dial(served, 1)
        await busy.send_all(POST)
        await wait_until(lambda: "/p" in served.paths)

        late = await served.dial()
        answer = await late.receive_some()
        for _ in range(3):
            await trio.testing.wait_all_tasks_blocked()
            await late.send_all(GET)
        await late.send_eof()
        answer += b"".join([part async for part in late])

        assert 503 == Answer.parse(answer).status
        await late.aclose()
        await busy.aclose()


async def test_one_address_has_a_quarter() -> None:
    """Beyond it goes one of its own, unless it is one that speaks for others."""
    for peers, most in (
        (Peers(limit_loopback=True), 2),
        (Peers(["127.0.0.0/8"], limit_loopback=True), 4),
        (Peers(), 4),
    ):
        async with serving(peers=peers, places=8) as served:
            streams = [await dial(served, min(number, most)) for number in (1, 2, 3, 4)]
            await wait_until(lambda: len(served.server._open) == most)  # noqa: B023 - run at once
            for stream in streams[-most:]:
                await stream.send_all(GET)
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 200 ")
            for stream in streams:
                await stream.aclose()


async def test_what_is_refused_counts_and_is_not_logged_each_time(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """After so many of one address 429 is all that it gets, and a line of a kind is enough."""
    peers = Peers(limit_loopback=True)
    rate = ClientRate(ApiKeys([]), peers, 0.01)
    async with serving(rate, peers=peers) as served:
        answers = [Answer.parse(await served.ask(b"nonsense\r\n\r\n")) for _ in range(4)]
        another = Answer.parse(await served.ask(LAST))
    lines = [line for line in capfd.readouterr().err.splitlines() if "was refused" in line]

    assert [400, 429, 429, 429] == [answer.status for answer in answers] == served.refused
    assert 90 < int(answers[-1].headers["Retry-After"]) <= 100
    assert 429 == another.status
    assert 2 == len(lines)


async def test_at_the_end_who_has_just_come_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also who is in the middle of a head or a body; and told that it was the last request."""
    monkeypatch.setattr(serve, "HEAD_SECONDS", LIMIT_SECONDS)
    async with serving() as served:
        fresh, half, busy = [await dial(served, number) for number in (1, 2, 3)]
        await half.send_all(GET)
        assert (await half.receive_some()).startswith(b"HTTP/1.1 200 ")
        await half.send_all(POST[:40])
        await busy.send_all(POST)
        await wait_until(lambda: "/p" in served.paths)
        await wait_until(lambda: sum(one._guard.begun for one in served.server._open) == 2)
        served.server.stop(LIMIT_SECONDS)
        await wait_until(lambda: not served.server.accepting)

        for stream, more in ((fresh, LAST), (half, POST[40:] + b"bc"), (busy, b"bc")):
            await stream.send_all(more)
        answers = [await everything(stream) for stream in (fresh, half, busy)]

    assert [200] * 3 == [answer.status for answer in answers]
    assert {"close"} == {answer.headers["Connection"] for answer in answers}
    assert [b"", b"abc", b"abc"] == [answer.body for answer in answers]


async def test_at_the_end_who_was_served_and_rests_goes_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who has not said anything goes a moment later, and does not hold the end."""
    monkeypatch.setattr(serve, "HEAD_SECONDS", 10 * LIMIT_SECONDS)
    async with serving() as served:
        rests = await dial(served, 1)
        await rests.send_all(GET)
        assert (await rests.receive_some()).startswith(b"HTTP/1.1 200 ")
        await wait_until(lambda: all(one.expects_nothing for one in served.server._open))
        silent = await dial(served, 2)

        served.server.stop(10 * LIMIT_SECONDS)
        with trio.fail_after(LIMIT_SECONDS):
            assert b"" == await rests.receive_some()
        await silent.send_all(LAST)
        assert 200 == (await everything(silent)).status
        await rests.aclose()


async def test_a_stop_waits_neither_for_the_silent_nor_for_the_stuck() -> None:
    """Nobody can hold the end, by sending nothing or by reading nothing."""
    async with serving() as served:
        silent = await dial(served, 1)
        with socket.socket() as stuck:
            stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stuck.connect(served.address)
            stuck.sendall(b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n")
            stuck.sendall(b"x" * 60_000)
            await wait_until(lambda: "/a" in served.paths)
            began = trio.current_time()
            served.server.stop(0.5)
            with trio.fail_after(LIMIT_SECONDS):
                assert b"" == await silent.receive_some()
                await wait_until(lambda: not served.server._open)
            assert trio.current_time() - began < LIMIT_SECONDS / 2
        await silent.aclose()
