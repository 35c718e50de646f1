"""The listener over real sockets: who comes in, who is refused, and how."""

import gc
import json
import time

import attrs
import pytest
import trio

from tests.trioserver.test_handshake import ROWS, WAIT
from tests.trioserver.wire import (
    ACCEPT,
    CALM,
    SETTINGS,
    Client,
    Worker,
    close,
    head,
    running,
    text,
    token,
    until,
)
from trioserver import connection as connection_module
from trioserver.arrival import Arrival
from trioserver.auth import Claims, Verifier
from trioserver.errors import CloseReason
from trioserver.origins import Origins
from trioserver.peers import Peers
from trioserver.shared import UNLIMITED_BOARD


def get(path: str, method: str = "GET") -> bytes:
    """Return an ordinary request."""
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: r1\r\n\r\n".encode()


async def asked(worker: Worker, *pieces: bytes) -> tuple[int, bytes, bytes]:
    """Send pieces; return status, head and body, read to the end of the stream."""
    client = await worker.dial()
    for piece in pieces:
        await client.send(piece)
    status, answer = await client.response()
    body = await client.rest()
    await client.aclose()
    return status, answer, body


async def test_a_handshake_is_answered_and_counted() -> None:
    """101 with the right accept key; then the connection lives in its own task."""
    async with running() as worker:
        client = await worker.dial()
        await client.send(head(credential=token()))
        status, answer = await client.response()
        assert 101 == status
        assert b"Sec-WebSocket-Accept: " + ACCEPT in answer
        await client.message()
        assert (1, 1, 1) == (
            len(worker.listener.connections),
            worker.tally.connections,
            worker.tally.auth["ok"],
        )
        await client.aclose()
        await worker.settled()


async def test_connection_ids_are_unique_and_carry_the_worker() -> None:
    """So that logs of several workers can be told apart."""
    async with running() as worker:
        for _ in range(20):
            await worker.join()
        ids = {connection.connection_id for connection in worker.listener.connections}
        assert 20 == len(ids)
        assert all(name.startswith("w0-") for name in ids)


@pytest.mark.parametrize("row", [row for row, (_, status) in ROWS.items() if status >= 400])
async def test_bad_heads_are_refused_over_the_wire(row: str) -> None:
    """The whole answer arrives, then the end of the stream, without RST and without delay."""
    data, expected = ROWS[row]
    async with running() as worker:
        started = time.monotonic()
        status, answer, body = await asked(worker, data)
        assert time.monotonic() - started < 1.0
        assert expected == status
        assert row == "HEAD" or expected == json.loads(body)["status"]
        assert b"Connection: close" in answer
        assert 1 == sum(worker.tally.refusals.values())
        await worker.settled()


async def test_a_head_may_come_byte_by_byte() -> None:
    """Segments are no lines."""
    async with running() as worker:
        client = await worker.dial()
        client.stream.setsockopt(6, 1, 1)
        for byte in head(credential=token()):
            await client.send(bytes((byte,)))
            await trio.lowlevel.checkpoint()
        assert 101 == (await client.response())[0]
        await client.aclose()
        assert WAIT == 0


@pytest.mark.parametrize(
    ("path", "lines"),
    [
        ("/ws", ["Authorization: Bearer {}"]),
        ("/ws", ["Sec-WebSocket-Protocol: trioserver.v1, bearer.{}"]),
        ("/ws?token={}", []),
        ("/ws?x=1&token={}&y=2", []),
    ],
)
async def test_credentials_by_header_sub_protocol_and_query(path: str, lines: list[str]) -> None:
    """Each place is good for a right token, and none for a wrong one."""
    async with running() as worker:
        good = token("bob")
        client = await worker.dial()
        await client.send(head(path.format(good), *(line.format(good) for line in lines)))
        assert 101 == (await client.response())[0]
        assert "bob" == (await client.message())["user"]
        await client.aclose()
        status, answer, body = await asked(
            worker, head(path.format("bad"), *(line.format("bad") for line in lines))
        )
        assert 401 == status
        assert b"WWW-Authenticate: Bearer" in answer
        assert b"bad" not in body
        expired = token("bob", -10)
        status, _, other = await asked(
            worker, head(path.format(expired), *(line.format(expired) for line in lines))
        )
        assert (401, body) == (status, other)
        assert {"ok": 1, "invalid": 1, "expired": 1} == {
            key: worker.tally.auth[key] for key in ("ok", "invalid", "expired")
        }


async def test_the_header_beats_the_query_and_a_wrong_one_is_not_forgiven() -> None:
    """The first credential that is present decides."""
    async with running() as worker:
        status, *_ = await asked(worker, head(f"/ws?token={token()}", credential="bad"))
        assert 401 == status


async def test_tokens_in_the_query_can_be_turned_off() -> None:
    """Then they are refused, because they are in some log already."""
    async with running(query_token=False) as worker:
        assert 401 == (await asked(worker, head(f"/ws?token={token()}")))[0]
        client = await worker.dial()
        await client.send(head(f"/ws?token={token()}", credential=token()))
        assert 101 == (await client.response())[0]


async def test_refused_tokens_leave_nothing_behind() -> None:
    """Ten thousand wrong tokens must cost no memory: nothing keeps their sockets alive."""
    async with running() as worker:
        for _ in range(5):
            assert 401 == (await asked(worker, head(credential="bad")))[0]
        await worker.settled()
        gc.collect()
        assert [] == [left for left in gc.get_objects() if isinstance(left, Arrival)]


@pytest.mark.parametrize("draining", [True, False])
async def test_full_or_draining_refuses_with_503_before_the_upgrade(*, draining: bool) -> None:
    """At once, with Retry-After, never queued; health goes on being answered."""
    async with running(max_connections=1) as worker:
        if draining:
            worker.listener.draining = True
        else:
            await worker.join()
        status, answer, _ = await asked(worker, head(credential="not even looked at"))
        assert 503 == status
        assert b"Retry-After: 2" in answer
        assert 0 == worker.tally.auth["invalid"]
        assert 200 == (await asked(worker, get("/healthz")))[0]
        assert 1 == worker.tally.refusals["503"]


async def test_there_is_room_again_when_somebody_leaves() -> None:
    """The limit counts who is there, not who was."""
    async with running(max_connections=1) as worker:
        client = await worker.join()
        await client.send(close(1000))
        await client.frame()
        await until(lambda: not worker.listener.connections)
        await worker.join()


async def test_a_silent_socket_is_refused_with_408() -> None:
    """The deadline begins with accept."""
    async with running(handshake_timeout=0.3) as worker:
        started = time.monotonic()
        status, _, _ = await asked(worker)
        assert 408 == status
        assert 0.3 <= time.monotonic() - started <= 1.0
        await worker.settled()


async def test_a_dripping_head_is_refused_with_408() -> None:
    """One deadline covers the whole handshake: bytes do not extend it."""
    async with running(handshake_timeout=0.4) as worker:
        client = await worker.dial()
        started = time.monotonic()

        async def drip() -> None:
            for byte in head(credential=token()):
                await client.send(bytes((byte,)))
                await trio.sleep(0.02)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip)
            assert 408 == (await client.response())[0]
            nursery.cancel_scope.cancel()
        assert 0.4 <= time.monotonic() - started <= 1.0


async def test_an_arrival_that_has_become_a_connection_ignores_its_deadline() -> None:
    """The moment may be on its way already when the head completes."""
    async with running(pumping=False) as worker:
        client, arrival = worker.admitted()
        assert isinstance(arrival, Arrival)
        await client.send(head(credential=token()))
        arrival.readable()
        connection = worker.only()
        arrival.due(worker.pump.now + 5)
        assert connection is worker.peer(connection._sock)
        worker.start_pump()
        assert 101 == (await client.response())[0]
        assert "connection_established" == (await client.message())["type"]


async def test_an_arrival_that_was_answered_or_dropped_ignores_its_deadline() -> None:
    """It is not refused twice, and its successor stays registered."""
    async with running(pumping=False) as worker:
        client, arrival = worker.admitted()
        assert isinstance(arrival, Arrival)
        await client.send(get("/nothing"))
        arrival.readable()
        lingering = worker.pump._peers[arrival.fd]
        arrival.due(worker.pump.now + 5)
        assert 1 == sum(worker.tally.refusals.values())
        assert lingering is worker.pump._peers.get(arrival.fd)
        other, dropped = worker.admitted()
        assert isinstance(dropped, Arrival)
        await other.aclose()
        dropped.readable()
        dropped.due(worker.pump.now + 5)
        assert 1 == sum(worker.tally.refusals.values())


async def test_the_small_pages() -> None:
    """GET and HEAD of a page, 405 for other methods, 404 for other paths."""
    async with running() as worker:
        status, answer, body = await asked(worker, get("/healthz"))
        assert (200, {"status": "ok"}) == (status, json.loads(body))
        assert b"\r\nX-Request-ID: r1\r\n" in answer
        status, same, body = await asked(worker, get("/healthz", "HEAD"))
        assert (200, b"", answer) == (status, body, same)
        status, answer, _ = await asked(worker, get("/healthz", "DELETE"))
        assert 405 == status
        assert b"Allow: GET, HEAD" in answer
        assert 200 == (await asked(worker, get("/healthz?x=1")))[0]
        for path in ("/", "/health", "/ws/", "//ws", "/ws%00", "/WS", "/ws;x", "/%77s"):
            assert 404 == (await asked(worker, get(path)))[0]
            assert 404 == (await asked(worker, head(path, credential=token())))[0]
        assert 426 == (await asked(worker, get("/ws")))[0]
        await worker.settled()


async def test_a_bug_in_a_page_is_a_500_and_concerns_one_client() -> None:
    """The listener goes on."""

    def broken() -> tuple[int, str, bytes]:
        raise LookupError("a bug")

    async with running(bugs_expected=True) as worker:
        worker.listener.pages["/broken"] = broken
        assert 500 == (await asked(worker, get("/broken")))[0]
        assert 200 == (await asked(worker, get("/healthz")))[0]
        assert [LookupError] == [type(bug) for bug in worker.bugs]
        await worker.settled()


async def test_a_crowd_of_arrivals_is_served_and_forgotten() -> None:
    """Two hundred heads at once: every one gets its answer."""
    async with running(handshake_timeout=10.0) as worker:
        clients = [await worker.dial() for _ in range(200)]
        for client in clients:
            await client.send(head(credential=token("ann")))
        for client in clients:
            assert 101 == (await client.response())[0]
            assert "connection_established" == (await client.message())["type"]
        assert (200, 1) == (worker.tally.connections, worker.tally.users)
        for client in clients:
            client.hang_up()
        await worker.settled()


async def test_a_draining_worker_says_goodbye_to_everybody() -> None:
    """Any number at once."""
    async with running(pace=attrs.evolve(CALM, ping_interval=30.0, pong_wait=60.0)) as worker:
        clients: list[Client] = [await worker.join(f"user{i}") for i in range(20)]
        worker.listener.draining = True
        for connection in list(worker.listener.connections):
            connection.end(CloseReason.GOING_AWAY, reconnect_in_ms=100)
        for client in clients:
            await client.send(text({"type": "ping"}) + close(1001))
            assert ("going_away", 1001) == await client.farewell()
        await worker.settled()


# Origins and limits.


class Counting(Verifier):
    """Counts how often it is asked."""

    asked = 0

    def verify(self, token: str, now: float) -> Claims:
        """Verify it."""
        self.asked += 1
        return super().verify(token, now)


@pytest.mark.parametrize(
    ("origins", "origin", "expected"),
    [
        (None, None, 101),
        (None, "http://localhost", 101),
        (None, "http://localhost:5173", 101),
        (None, "http://evil.example", 403),
        (None, "null", 403),
        (["https://app.example"], "https://app.example", 101),
        (["https://app.example"], "http://localhost", 403),
        (["https://*.app.example"], "https://a.app.example", 101),
        (["https://*.app.example"], "https://a.app.example.evil.org", 403),
        (["*"], "http://evil.example", 101),
    ],
)
async def test_whose_web_page_it_is_comes_before_the_token(
    origins: list[str] | None, origin: str | None, expected: int
) -> None:
    """Somebody else's page gets 403, whatever its token; no token is looked at for it."""
    verifier = Counting(SETTINGS)
    async with running(origins=Origins(origins), verifier=verifier) as worker:
        for credential in (token(), "rubbish"):
            before = verifier.asked
            client = await worker.dial()
            lines = [] if origin is None else [f"Origin: {origin}"]
            await client.send(head("/ws", *lines, credential=credential))
            status, _ = await client.response()
            wanted = 401 if expected == 101 and credential == "rubbish" else expected
            assert wanted == status
            assert (0 if expected == 403 else 1) == verifier.asked - before
            await client.aclose()
        assert [] == [one for one in worker.register.entered if expected == 403]


async def test_two_origins_are_none() -> None:
    """No browser sends two; what does, is refused."""
    async with running() as worker:
        lines = ["Origin: http://localhost", "Origin: http://localhost"]
        status, *_ = await asked(worker, head("/ws", *lines, credential=token()))
        assert status in {400, 403}


async def test_a_full_server_says_so_before_it_looks_at_a_token() -> None:
    """503 with Retry-After for the one beyond WS_MAX_CONNECTIONS; who leaves makes room."""
    verifier = Counting(SETTINGS)
    limits = attrs.evolve(UNLIMITED_BOARD, connections=3)
    async with running(board=limits, verifier=verifier) as worker:
        clients = [await worker.join() for _ in range(3)]
        assert worker.shared.board.full
        status, answer, body = await asked(worker, head(credential=token()))
        assert (503, "the server is full") == (status, json.loads(body)["detail"])
        assert b"\r\nRetry-After: " in answer
        assert 3 == verifier.asked
        await clients[0].aclose()
        await until(lambda: len(worker.listener.connections) == 2)
        await worker.join()
        assert 3 == worker.shared.board.statistics().connections


async def test_too_many_handshakes_are_refused_before_a_token_is_looked_at() -> None:
    """Of the server 503, of one address 429, both with Retry-After; bad tokens count as well."""
    verifier = Counting(SETTINGS)
    for limits, peers, expected in (
        (attrs.evolve(UNLIMITED_BOARD, handshakes=5), Peers(), 503),
        (attrs.evolve(UNLIMITED_BOARD, address_handshakes=1), Peers(limit_loopback=True), 429),
    ):
        async with running(board=limits, peers=peers, verifier=verifier) as worker:
            verifier.asked = 0
            answers = [await asked(worker, head(credential="rubbish")) for _ in range(30)]
            statuses = [status for status, *_ in answers]
            assert {401, expected} == set(statuses)
            assert statuses.count(401) == verifier.asked
            refused = next(answer for status, answer, _ in answers if status == expected)
            assert b"\r\nRetry-After: " in refused


async def test_loopback_is_not_limited_by_address() -> None:
    """A proxy on the same machine brings everybody's connections."""
    limits = attrs.evolve(UNLIMITED_BOARD, address_connections=1, address_handshakes=0.25)
    async with running(board=limits) as worker:
        for _ in range(5):
            await worker.join()


async def test_connections_of_one_address_are_counted_to_their_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However they end, their places are free again: clean, reset, ended by us, nameless."""
    monkeypatch.setattr(connection_module, "CLOSE_SECONDS", 0.05)
    limits = attrs.evolve(UNLIMITED_BOARD, address_connections=4)
    peers = Peers(limit_loopback=True)
    async with running(board=limits, peers=peers) as worker:
        for _ in range(3):
            clean, reset, ended = [await worker.join() for _ in range(3)]
            nameless = await worker.nameless()
            assert 429 == (await asked(worker, head(credential=token())))[0]
            await clean.send(close(1000))
            reset.reset()
            next(iter(worker.listener.connections)).end(CloseReason.GOING_AWAY)
            for client in (clean, ended, nameless):
                await client.aclose()
            await until(lambda: not worker.listener.connections)
            assert 0 == worker.shared.board.statistics().connections
