"""A connection: what comes first, what comes last, and what it leaves behind."""

import collections
import json
import socket
import time

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.trioserver.wire import (
    BINARY,
    BROADCAST,
    CALM,
    CLOSE,
    PING,
    PONG,
    SETTINGS,
    TEXT,
    Client,
    close,
    frame,
    head,
    running,
    text,
    token,
    topic,
    until,
)
from trioserver import connection as connection_module
from trioserver.auth import Claims, Verifier
from trioserver.buckets import Buckets, Rate
from trioserver.errors import AuthError, CloseReason
from trioserver.outbox import Budget, OutboxLimits
from trioserver.revocation import Revocation, Revoked
from trioserver.session import UNLIMITED, Action, Session

HURRY = 20.0
"""How much faster than the wall Trio's clock runs where a test waits for the long deadlines."""


@pytest.fixture
def fast_clock() -> MockClock:
    """Make Trio's deadlines come sooner; sockets and the pump's own clock stay real."""
    return MockClock(rate=HURRY)


# What comes first.


async def test_connection_established_comes_first_and_says_who_and_how_long() -> None:
    """The first message names the user, the connection and what is left of the token."""
    async with running(pace=attrs.evolve(CALM, heartbeat_interval=30.0)) as worker:
        client = await worker.dial()
        await client.send(head(credential=token("ann", 100)))
        assert (await client.response())[0] == 101
        established = await client.message()
        assert {
            "type": "connection_established",
            "connection_id": "w0-0",
            "user": "ann",
            "resumed": False,
            "count": 0,
            "heartbeat_seconds": 30.0,
        } == {key: established[key] for key in list(established)[:6]}
        expires_in = established["expires_in"]
        assert isinstance(expires_in, int)
        assert 95 <= expires_in <= 100
        assert "new" == established["reason"]
        await client.aclose()
        await worker.settled()


async def test_a_notification_published_while_corked_follows_the_first_message() -> None:
    """Nothing overtakes connection_established, and nothing that came meanwhile is lost."""
    async with running() as worker:
        worker.follower.patient = True
        client = await worker.dial()
        await client.send(head(credential=token()))
        # The 101 does not wait for Redis.
        assert (await client.response())[0] == 101
        for number in range(10):
            await worker.publish(topic("ann") if number % 2 else BROADCAST, number)
        await client.send(text({"type": "ping"}))
        await until(lambda: worker.tally.messages_in == 1)
        worker.follower.confirm(topic("ann"))
        got = [await client.message() for _ in range(12)]
        assert "connection_established" == got[0]["type"]
        assert list(range(10)) == [message["payload"] for message in got[1:11]]
        assert {"type": "pong"} == got[11]
        await client.aclose()
        await worker.settled()


async def test_a_notification_published_after_the_first_message_arrives() -> None:
    """Every device of the user gets it, nobody else does, and a broadcast reaches all."""
    async with running() as worker:
        phone, laptop, other = [await worker.join(user) for user in ("ann", "ann", "bob")]
        assert 2 == worker.tally.users
        await worker.publish(topic("ann"), "hers", kind="mail")
        await worker.publish(BROADCAST, "all")
        for client in (phone, laptop):
            hers = await client.message()
            assert ("mail", "hers") == (hers["type"], hers["payload"])
        for client in (phone, laptop, other):
            assert "all" == (await client.message())["payload"]
            await client.aclose()
        await worker.settled()


async def test_frames_right_behind_the_head_are_answered_in_order() -> None:
    """A client need not wait for the 101 before it speaks."""
    async with running() as worker:
        client = await worker.dial()
        messages = [text({"type": "message", "payload": i}) for i in range(50)]
        await client.send(head(credential=token()) + b"".join(messages))
        assert (await client.response())[0] == 101
        assert "connection_established" == (await client.message())["type"]
        assert list(range(50)) == [(await client.message())["payload"] for _ in range(50)]
        await client.aclose()


@pytest.mark.parametrize("cut", [0, 1, 9, 20])
@pytest.mark.parametrize("named", [True, False])
async def test_bytes_that_come_before_the_task_has_its_first_turn_keep_their_place(
    cut: int, *, named: bool
) -> None:
    """The pump may be called again before the task starts: the 101 still comes first."""
    async with running(pumping=False) as worker:
        client, arrival = worker.admitted()
        message = text({"type": "message" if named else "auth", "token": token()})
        await client.send(head(credential=token() if named else None) + message[:cut])
        arrival.readable()
        connection = worker.only()
        raw = socket.fromfd(client.stream.socket.fileno(), socket.AF_INET, socket.SOCK_STREAM)
        with raw:
            # No checkpoint between the two turns of the pump.
            raw.send(message[cut:])
        connection.readable()
        worker.start_pump()
        assert (await client.response())[0] == 101
        assert "connection_established" == (await client.message())["type"]
        if named:
            assert "message_response" == (await client.message())["type"]
        await client.aclose()


async def test_without_redis_the_first_message_says_unavailable_after_five_seconds(
    fast_clock: MockClock,
) -> None:
    """A client need not wait for Redis to know that it is connected."""
    async with running() as worker:
        worker.follower.patient = True
        client = await worker.dial()
        started = trio.current_time()
        await client.send(head(credential=token()))
        assert (await client.response())[0] == 101
        established = await client.message()
        assert "unavailable" == established["reason"]
        assert 5.0 == pytest.approx(trio.current_time() - started, abs=4.0)
        await worker.publish(topic("ann"), "late")
        assert "late" == (await client.message())["payload"]
        await client.aclose()


# Credentials as the first message.


async def test_a_token_in_the_first_message_is_as_good_as_one_in_the_handshake() -> None:
    """The message auth opens what a credential in the handshake opens."""
    async with running() as worker:
        client = await worker.nameless()
        await client.send(text({"type": "auth", "token": token("bob")}))
        assert "bob" == (await client.message())["user"]
        await worker.publish(topic("bob"), 1)
        assert 1 == (await client.message())["payload"]
        assert 1 == worker.tally.auth["ok"]
        await client.aclose()
        await worker.settled()


async def test_before_auth_every_other_message_is_an_error_and_nothing_else() -> None:
    """A nameless client gets errors, stays connected and gets no notification."""
    async with running() as worker:
        client = await worker.nameless()
        await worker.publish(BROADCAST, "not for you")
        for message in ({"type": "ping"}, {"type": "message", "payload": 1}):
            await client.send(text(message))
            assert "unauthenticated" == (await client.message())["code"]
        await client.send(frame(TEXT, b"no json"))
        assert "bad_json" == (await client.message())["code"]
        await client.send(text({"type": "auth", "token": token()}))
        assert "connection_established" == (await client.message())["type"]
        await client.send(text({"type": "auth", "token": token()}))
        assert "already_authenticated" == (await client.message())["code"]
        await client.aclose()


@pytest.mark.parametrize("early", [True, False])
async def test_messages_right_behind_auth_are_answered_after_the_first_message(
    *,
    early: bool,
) -> None:
    """connection_established comes first for a client that pipelines auth and a message."""
    async with running() as worker:
        client = await worker.dial()
        auth = text({"type": "auth", "token": token()})
        both = text({"type": "ping"}) + auth + text({"type": "message", "payload": 7})
        if early:
            await client.send(head() + both)
            assert (await client.response())[0] == 101
        else:
            await client.send(head())
            assert (await client.response())[0] == 101
            await client.send(both)
        kinds = [(await client.message())["type"] for _ in range(3)]
        assert ["error", "connection_established", "message_response"] == kinds
        await client.aclose()


async def test_a_bad_token_in_the_first_message_ends_with_4401() -> None:
    """A refusal after the upgrade is a close code."""
    async with running() as worker:
        client = await worker.nameless()
        await client.send(text({"type": "ping"}) + text({"type": "auth", "token": "no"}))
        assert "unauthenticated" == (await client.message())["code"]
        await client.send(close(1000))
        assert ("unauthorized", 4401) == await client.farewell()
        await worker.settled()
        assert 1 == worker.tally.auth["invalid"]


async def test_no_credentials_in_time_ends_with_4408_whatever_else_is_said() -> None:
    """The deadline is total: pings and errors do not extend it."""
    async with running(pace=attrs.evolve(CALM, auth_timeout=0.4)) as worker:
        client = await worker.nameless()
        started = time.monotonic()
        with trio.move_on_after(3):
            while worker.listener.connections and worker.only().reason is None:
                await client.send(frame(PING) + text({"type": "ping"}))
                await trio.sleep(0.05)
        assert 0.4 <= time.monotonic() - started + 0.05
        assert time.monotonic() - started < 1.0
        await client.send(close(1000))
        assert ("auth_timeout", 4408) == await client.farewell()
        await worker.settled()


# Frames.


async def test_of_several_pings_in_one_read_the_latest_is_answered() -> None:
    """A flood of pings costs one pong per read."""
    async with running() as worker:
        client = await worker.join()
        await client.send(b"".join(frame(PING, b"%d" % i) for i in range(20)))
        payloads: list[bytes] = []
        while not payloads or payloads[-1] != b"19":
            opcode, payload = await client.frame()
            assert PONG == opcode
            payloads.append(payload)
        assert len(payloads) < 20
        await client.aclose()


@pytest.mark.parametrize("opcode", [PING, PONG])
async def test_a_flood_of_control_frames_ends_the_connection(opcode: int) -> None:
    """Twenty at once are taken, the next one is a flood; the sibling is served."""
    async with running() as worker:
        sibling = await worker.join("bob")
        client = await worker.join()
        await client.send(frame(opcode, b"x") * 21)
        assert "policy" == (await client.until("goodbye"))["reason"]
        await sibling.send(text({"type": "ping"}))
        assert "pong" == (await sibling.message())["type"]
        for one in (client, sibling):
            await one.aclose()


async def test_the_pong_that_was_asked_for_is_free() -> None:
    """A client that answers every ping never comes near the budget."""
    pace = attrs.evolve(CALM, ping_interval=0.05)
    async with running(pace=pace) as worker:
        client = await worker.join()
        worker.only()._controls = 19.5
        worker.only()._control_at = trio.current_time()
        for _ in range(3):
            while True:
                opcode, payload = await client.frame()
                if opcode == PING:
                    break
            await client.send(frame(PONG, payload))
        await client.send(text({"type": "ping", "ref": "still here"}))
        assert "still here" == (await client.until("pong"))["ref"]
        await client.aclose()


BIG = b"x" * 2000
FAULTS = {
    "binary": (frame(BINARY, b"x"), "unsupported_data", 1003),
    "binary in fragments": (
        frame(BINARY, b"x", fin=False) + frame(0, b"y"),
        "unsupported_data",
        1003,
    ),
    "too big": (frame(TEXT, BIG), "too_big", 1009),
    "too big in sum": (frame(TEXT, BIG[:600], fin=False) + frame(0, BIG[:600]), "too_big", 1009),
    "too many fragments": (
        frame(TEXT, b"", fin=False) + frame(0, b"", fin=False) * 128,
        "too_big",
        1009,
    ),
    "not utf-8": (frame(TEXT, b"\xff"), "invalid_utf8", 1007),
    "unmasked": (b"\x81\x01x", "protocol_error", 1002),
    "reserved bit": (frame(TEXT, b"{}", rsv=4), "protocol_error", 1002),
    "close code 1005": (close(1005), "protocol_error", 1002),
    "close reason not utf-8": (close(1000, b"\xff"), "invalid_utf8", 1007),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_ends_with_its_close_code_after_what_came_before_it(fault: str) -> None:
    """What is right before a fault is answered, nothing after it is."""
    data, reason, code = FAULTS[fault]
    async with running(max_message=1000) as worker:
        client = await worker.join()
        good = text({"type": "ping", "ref": "before"})
        await client.send(good + data + text({"type": "ping", "ref": "after"}))
        assert {"type": "pong", "ref": "before"} == await client.message()
        await client.send(close(code))
        assert (reason, code) == await client.farewell()
        await worker.settled()
        assert 1 == worker.tally.closes[reason]


async def test_twenty_malformed_messages_end_with_1008() -> None:
    """A broken client is told nineteen times, then ended."""
    async with running() as worker:
        client = await worker.join()
        await client.send(frame(TEXT, b"?") * 30 + close(1000))
        for _ in range(19):
            assert "bad_json" == (await client.message())["code"]
        assert ("policy", 1008) == await client.farewell()


@pytest.mark.parametrize("code", [1000, 1001, 3000, 4999])
async def test_the_close_handshake_echoes_the_code(code: int) -> None:
    """The client's Close is answered with its own code, then the stream ends without RST."""
    async with running() as worker:
        client = await worker.join()
        await client.send(text({"type": "ping"}) + close(code, b"bye") + text({"type": "ping"}))
        assert "pong" == (await client.message())["type"]
        assert (CLOSE, code.to_bytes(2, "big")) == await client.frame()
        assert b"" == await client.rest()
        await client.aclose()
        await worker.settled()
        assert [CloseReason.PEER_CLOSED] == worker.ends


async def test_an_empty_close_is_echoed_empty() -> None:
    """A Close without a code is answered with one without a code."""
    async with running() as worker:
        client = await worker.join()
        await client.send(frame(CLOSE))
        assert (CLOSE, b"") == await client.frame()
        assert b"" == await client.rest()


@pytest.mark.parametrize("first", [frame(BINARY, b"x"), frame(TEXT, b"?") * 20])
async def test_a_close_behind_a_fault_in_one_read_counts_as_the_clients_close(
    first: bytes,
) -> None:
    """When both have sent Close, the server does not wait for another one."""
    async with running() as worker:
        client = await worker.join()
        started = time.monotonic()
        await client.send(first + close(1000))
        await client.farewell()
        assert time.monotonic() - started < 2.0


# Ends.


async def test_an_end_before_the_task_has_started_is_not_lost() -> None:
    """A cancel in the same turn as the handshake still says goodbye, behind the 101."""
    async with running(pumping=False) as worker:
        client, arrival = worker.admitted()
        await client.send(head(credential=token()))
        arrival.readable()
        worker.only().end(CloseReason.GOING_AWAY, reconnect_in_ms=5)
        worker.start_pump()
        assert (await client.response())[0] == 101
        assert "connection_established" == (await client.message())["type"]
        goodbye = await client.message()
        assert ("going_away", True, 5) == tuple(
            goodbye[key] for key in ("reason", "reconnect", "reconnect_in_ms")
        )
        assert 1001 == int.from_bytes((await client.frame())[1][:2], "big")
        await client.send(close(1001))
        assert b"" == await client.rest()
        await client.aclose()
        await worker.settled()


async def test_the_first_reason_counts_and_the_hub_forgets_at_once() -> None:
    """Ending is idempotent and synchronous: nothing is offered afterwards."""
    async with running() as worker:
        client = await worker.join()
        connection = worker.only()
        connection.end(CloseReason.GOING_AWAY)
        connection.end(CloseReason.INTERNAL_ERROR)
        assert 0 == len(worker.hub)
        assert [topic("ann")] == worker.follower.released
        await worker.publish(topic("ann"), "too late")
        await worker.publish(BROADCAST, "too late")
        await client.send(text({"type": "ping"}) + close(1001))
        assert ("going_away", 1001) == await client.farewell()
        await worker.settled()
        assert [CloseReason.GOING_AWAY] == worker.ends


async def test_the_topic_is_released_with_the_last_connection_of_a_user() -> None:
    """Another device keeps the topic."""
    async with running() as worker:
        one, two = await worker.join(), await worker.join()
        await one.aclose()
        await until(lambda: 1 == len(worker.listener.connections))
        assert ([], 1) == (worker.follower.released, worker.tally.users)
        await worker.publish(topic("ann"), "still")
        assert "still" == (await two.message())["payload"]
        await two.aclose()
        await worker.settled()
        assert [topic("ann")] == worker.follower.released


async def leave_silently(client: Client) -> None:
    """Close the socket."""
    await client.aclose()


async def leave_with_reset(client: Client) -> None:
    """Close it with RST."""
    client.reset()


async def leave_half(client: Client) -> None:
    """Say that nothing more will come."""
    await client.stream.send_eof()


@pytest.mark.parametrize("leave", [leave_silently, leave_with_reset, leave_half])
@pytest.mark.parametrize("phase", ["arrival", "head", "nameless", "corked", "live", "leaving"])
async def test_a_client_gone_in_any_phase_leaves_nothing(leave: object, phase: str) -> None:
    """Hub, wheel, pump and counts settle at zero, whenever and however the client goes."""
    assert callable(leave)
    pace = attrs.evolve(CALM, ping_interval=30.0, pong_wait=60.0, auth_timeout=10.0)
    async with running(pace=pace) as worker:
        if phase in {"arrival", "head"}:
            client = await worker.dial()
            await client.send(head()[: 0 if phase == "arrival" else 30])
            await until(lambda: len(worker.pump) == 2)
        elif phase == "nameless":
            client = await worker.nameless()
        elif phase == "corked":
            worker.follower.patient = True
            client = await worker.dial()
            await client.send(head(credential=token()))
            await client.response()
        else:
            client = await worker.join()
        if phase == "leaving":
            worker.only().end(CloseReason.GOING_AWAY)
            await client.until("goodbye")
        await leave(client)
        await worker.settled()
        assert worker.tally.opened == sum(worker.tally.closes.values())
        await client.aclose()


async def test_a_cancelled_nursery_says_goodbye_and_leaves_nothing() -> None:
    """Cancelling the task ends the connection with a farewell that is not waited for."""
    async with running() as worker:
        client = await worker.join()
        worker.nursery.cancel_scope.cancel()
        await until(lambda: not worker.listener.connections)
        await client.send(close(1001))
        assert ("going_away", 1001) == await client.farewell()
        await until(lambda: len(worker.pump) == 1)
        assert (0, 0) == (len(worker.hub), worker.tally.connections)


async def test_everything_cancelled_at_once_ends_without_an_exception() -> None:
    """The pump may be gone before its connections: they still end quietly."""
    for _ in range(5):
        async with running() as worker:
            clients = [await worker.join(f"user{i}") for i in range(4)]
            worker.machinery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await trio.sleep(0.01)
                for client in clients:
                    await client.aclose()
        assert (0, 0) == (worker.tally.connections, len(worker.hub))


async def test_a_bug_in_a_callback_ends_its_connection_with_1011_and_no_other() -> None:
    """One connection's bug is its own end: it is logged, and siblings live."""
    async with running(bugs_expected=True) as worker:
        victim, sibling = await worker.join("ann"), await worker.join("bob")
        connection = next(c for c in worker.listener.connections if c.user == "ann")

        class Broken(Session):
            def receive(
                self, text: bytes, now: float, timestamp: str, rates: Buckets[str] = UNLIMITED
            ) -> Action | None:
                raise LookupError("a bug")

        connection._session = Broken("ann")
        await victim.send(text({"type": "ping"}))
        await victim.until("goodbye")
        await victim.send(close(1011))
        assert (CLOSE, 1011) == (CLOSE, int.from_bytes((await victim.frame())[1][:2], "big"))
        await sibling.send(text({"type": "ping"}))
        assert "pong" == (await sibling.message())["type"]
        assert [LookupError] == [type(bug) for bug in worker.bugs]
        await sibling.aclose()
        await victim.aclose()
        await worker.settled()


async def test_a_bug_at_confirmation_ends_its_connection_with_1011_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An exception never reaches the subscription, which tells many at once."""
    async with running(bugs_expected=True) as worker:
        sibling = await worker.join("bob")
        worker.follower.patient = True
        victim = await worker.dial()
        await victim.send(head(credential=token("ann")))
        await victim.response()

        def broken(connection: connection_module.Connection, reason: str | None) -> bytes:
            raise LookupError(f"a bug, {connection}, {reason}")

        with monkeypatch.context() as patched:
            patched.setattr(connection_module.Connection, "_established", broken)
            worker.follower.confirm(topic("ann"))
        assert "internal_error" == (await victim.until("goodbye"))["reason"]
        await sibling.send(text({"type": "ping"}))
        assert "pong" == (await sibling.message())["type"]
        assert 1 == len(worker.bugs)
        for client in (sibling, victim):
            await client.aclose()
        await worker.settled()


async def test_a_bug_while_ending_does_not_keep_the_connection() -> None:
    """Whatever end stumbles over, the task ends and gives everything back."""

    def broken(channel: bytes) -> None:
        raise LookupError(f"a bug, {channel!r}")

    async with running(bugs_expected=True) as worker:
        client = await worker.join()
        worker.follower.release = broken  # type: ignore[method-assign]
        await client.aclose()
        await worker.settled()
        assert [LookupError] == [type(bug) for bug in worker.bugs]


# Slow clients.


async def flood(client: Client, most: int) -> int:
    """Send messages until the server takes no more; return how many bytes it took."""
    data = text({"type": "message", "payload": "x" * 200}) * 20
    sent = 0
    while sent < most:
        with trio.move_on_after(0.3) as scope:
            await client.send(data)
        if scope.cancelled_caught:
            return sent
        sent += len(data)
    return sent


async def test_a_client_that_does_not_read_its_answers_is_not_read() -> None:
    """Its memory is bounded and it lives: when it reads again it gets every answer."""
    limits = OutboxLimits(max_bytes=1 << 20, max_frames=256)
    async with running(send_buffer=16 << 10, limits=limits) as worker:
        client = await worker.join(receive_buffer=16 << 10)
        sent = 0
        total = 60_000
        data = text({"type": "message", "payload": "x" * 200})

        async def write() -> None:
            nonlocal sent
            for _ in range(total // 20):
                await client.send(data * 20)
                sent += 20

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await until(lambda: not worker.only()._interest & 1)
            outbox = worker.only().outbox
            assert outbox.waiting_bytes <= limits.max_bytes // 2
            await trio.sleep(0.1)
            assert outbox.waiting_bytes <= limits.max_bytes // 2
            assert sent < total
            seen = 0
            while seen < 5_000:
                message = await client.message()
                seen += 1
                assert seen == message["count"]
            nursery.cancel_scope.cancel()
        assert worker.only().reason is None
        client.reset()
        await worker.settled()


async def test_a_slow_reader_that_makes_progress_is_not_taken_for_dead() -> None:
    """While we do not read a client, its silence is ours: only lack of progress ends it."""
    pace = attrs.evolve(CALM, ping_interval=0.3, pong_wait=1.0, write_wait=4.0)
    async with running(pace=pace, send_buffer=4096) as worker:
        client = await worker.join(receive_buffer=4096)
        sent = await flood(client, 4 << 20)
        assert sent < 4 << 20
        limit = time.monotonic() + 2.0
        while time.monotonic() < limit:
            # A third of what waits for it, so that it stays unread itself.
            assert await client.stream.receive_some(2048), worker.ends
            await trio.sleep(0.02)
        assert not worker.only().outbox.empty
        assert worker.only().reason is None
        client.reset()


async def test_an_overflow_ends_with_4410_and_the_farewell_jumps_the_queue() -> None:
    """A client that reads on gets whole frames, then the goodbye; siblings lose nothing."""
    limits = OutboxLimits(max_bytes=64 << 10, max_frames=256)
    async with running(limits=limits, send_buffer=4096) as worker:
        slow, good = await worker.join("slow", 4096), await worker.join("good")
        published = 0
        while CloseReason.TOO_SLOW not in {c.reason for c in worker.listener.connections}:
            await worker.publish(BROADCAST, "x" * 1000)
            published += 1
            assert "x" * 1000 == (await good.message())["payload"]
            assert published < 10_000
        assert 1 == worker.tally.failed
        await slow.send(close(4410))
        assert ("too_slow", 4410) == await slow.farewell()
        await good.aclose()
        await slow.aclose()
        await worker.settled()
        assert CloseReason.TOO_SLOW in worker.ends


async def test_no_progress_ends_with_4410_and_does_not_hold_the_worker() -> None:
    """A client that takes nothing for the write deadline is ended, and gone a second later."""
    pace = attrs.evolve(CALM, write_wait=0.3)
    async with running(pace=pace, send_buffer=4096) as worker:
        client = await worker.join(receive_buffer=4096)
        for _ in range(60):
            await worker.publish(topic("ann"), "x" * 2000)
        started = time.monotonic()
        await until(lambda: CloseReason.TOO_SLOW in worker.ends)
        assert 1.2 <= time.monotonic() - started <= 2.5
        client.reset()
        await worker.settled()


# Time.


async def test_no_pong_ends_with_4411() -> None:
    """A client whose stack does not answer pings is ended; one whose does is not."""
    pace = attrs.evolve(CALM, ping_interval=0.2, pong_wait=0.5)
    async with running(pace=pace) as worker:
        dead, alive = await worker.join("dead"), await worker.join("alive")

        async def answer() -> None:
            while True:
                opcode, payload = await alive.frame()
                assert PING == opcode
                await alive.send(frame(PONG, payload))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            await dead.until("goodbye")
            await dead.send(close(4411))
            assert 4411 == int.from_bytes((await dead.frame())[1][:2], "big")
            await trio.sleep(0.6)
            nursery.cancel_scope.cancel()
        assert "alive" == worker.only().user
        await dead.aclose()
        await alive.aclose()
        await worker.settled()


async def test_heartbeats_and_pings_come_at_their_interval_and_spread_out() -> None:
    """Each comes within ± 10 % and a bucket, and not all connections at the same moment."""
    pace = attrs.evolve(CALM, ping_interval=0.5, heartbeat_interval=0.5, pong_wait=5.0)
    async with running(pace=pace) as worker:
        clients = [await worker.join(f"user{i}") for i in range(20)]
        moments = [c._ping_at for c in worker.listener.connections]
        assert 20 == len(set(moments))
        assert 0.02 < max(moments) - min(moments)
        started = time.monotonic()
        seen = collections.Counter[int]()
        while seen[PING] < 3 or seen[TEXT] < 3:
            opcode, payload = await clients[0].frame()
            seen[opcode] += 1
            if opcode == TEXT:
                beat = json.loads(payload)
                assert ["type", "ts"] == list(beat)
        assert 1.2 <= time.monotonic() - started <= 2.2
        for client in clients:
            await client.aclose()
        await worker.settled()


async def test_without_pings_silence_ends_an_idle_connection() -> None:
    """CONNECTION_TIMEOUT counts only where pings are off."""
    async with running(pace=attrs.evolve(CALM, idle_timeout=0.3)) as worker:
        client = await worker.join()
        started = time.monotonic()
        await client.until("goodbye")
        assert 0.25 <= time.monotonic() - started <= 1.0
        await client.aclose()
        await worker.settled()


@pytest.mark.parametrize("piece", [frame(TEXT, b"{", fin=False), frame(TEXT, b"{" * 50)[:20]])
async def test_a_message_that_is_never_finished_has_a_deadline(
    piece: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither dripping bytes nor pings in between extend the time for one message."""
    monkeypatch.setattr(connection_module, "MESSAGE_SECONDS", 0.4)
    async with running() as worker:
        client = await worker.join()
        await client.send(piece)
        started = time.monotonic()
        while worker.only().reason is None:
            if piece[0] == 1:
                await client.send(frame(PING) + frame(0, b"", fin=False))
            await trio.sleep(0.05)
        assert 0.35 <= time.monotonic() - started <= 1.0
        assert CloseReason.POLICY is worker.only().reason
        client.reset()
        await worker.settled()


async def test_a_client_that_never_sends_its_close_is_waited_for_a_bounded_time(
    fast_clock: MockClock,
) -> None:
    """Five seconds after our Close the connection is gone."""
    async with running() as worker:
        client = await worker.join()
        worker.only().end(CloseReason.GOING_AWAY)
        started = trio.current_time()
        await until(lambda: not worker.listener.connections)
        assert 4.5 <= trio.current_time() - started <= 8.0
        assert ("going_away", 1001) == await client.farewell()


async def test_a_connection_ends_when_its_token_has_long_expired(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After the token's time and its grace the connection ends with 4401, and not before."""
    # The token is good for an hour, in whole seconds; of these two to three are left.
    monkeypatch.setattr(connection_module, "EXPIRY_GRACE_SECONDS", -3597.0)
    async with running() as worker:
        client = await worker.dial()
        began = trio.current_time()
        await client.send(head(credential=token("ann")))
        await client.response()
        assert "unauthorized" == (await client.until("goodbye"))["reason"]
        assert 1.9 < trio.current_time() - began < 5
        await client.aclose()


async def test_a_client_is_told_that_its_token_expires() -> None:
    """token_expiring says how many seconds are left; a new token makes it wait again."""
    async with running() as worker:
        client = await worker.dial()
        await client.send(head(credential=token("ann", 100)))
        await client.response()
        await client.message()
        connection = worker.only()
        assert connection._warn_at - worker.pump.now == pytest.approx(70, abs=5)
        connection._warn_at = worker.pump.now
        connection.hasten(worker.pump.now)
        notice = await client.until("token_expiring")
        left = notice["expires_in"]
        assert isinstance(left, int)
        assert 95 <= left <= 100

        await client.send(text({"type": "refresh", "token": token("ann", 1000), "ref": "r"}))
        refreshed = await client.message()
        left = refreshed.pop("expires_in")
        assert isinstance(left, int)
        assert 995 <= left <= 1000
        assert {"type": "token_refreshed", "ref": "r"} == refreshed
        assert connection._warn_at - worker.pump.now == pytest.approx(970, abs=5)
        assert connection._expires_at - worker.pump.now == pytest.approx(1025, abs=5)
        claims = connection.claims
        assert claims is not None
        assert "ann" == claims.user
        await client.aclose()


async def test_refresh_before_the_end_keeps_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who comes with a new token in time is not closed when the old one is over."""
    # Of a token that is good for an hour, a moment is left.
    monkeypatch.setattr(connection_module, "CLOSE_SECONDS", 0.05)
    monkeypatch.setattr(connection_module, "EXPIRY_GRACE_SECONDS", -3597.0)
    async with running() as worker:
        refreshed, silent = await worker.join("ann"), await worker.join("bob")
        await refreshed.send(text({"type": "refresh", "token": token("ann", 9000)}))
        assert "token_refreshed" == (await refreshed.message())["type"]
        assert ("unauthorized", 4401) == await silent.farewell()
        await refreshed.send(text({"type": "ping"}))
        assert {"type": "pong"} == await refreshed.message()


@pytest.mark.parametrize("bad", ["", "rubbish", "expired"])
async def test_a_bad_token_in_refresh_changes_nothing(bad: str) -> None:
    """It is answered with an error, and the connection lives as long as before."""
    async with running() as worker:
        client = await worker.join("ann")
        connection = worker.only()
        before = connection._expires_at, connection.claims
        given = token("ann", -100) if bad == "expired" else bad
        await client.send(text({"type": "refresh", "token": given, "ref": "r"}))
        assert {
            "type": "error",
            "code": "invalid_token",
            "message": "the token was not accepted",
            "ref": "r",
        } == await client.message()
        assert before == (connection._expires_at, connection.claims)
        assert 1 == worker.tally.errors["invalid_token"]


async def test_refresh_with_the_token_of_another_user_is_forbidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A connection has one user from its first message to its last."""
    monkeypatch.setattr(connection_module, "CLOSE_SECONDS", 0.05)
    async with running() as worker:
        client = await worker.join("ann")
        await client.send(text({"type": "refresh", "token": token("bob")}))
        assert ("forbidden", 4403) == await client.farewell()


async def test_refresh_before_the_first_message_of_the_server() -> None:
    """While Redis is waited for, a new token counts and is answered in its turn."""
    async with running() as worker:
        worker.follower.patient = True
        client = await worker.dial()
        await client.send(head(credential=token("ann", 100)))
        assert (await client.response())[0] == 101
        await client.send(text({"type": "refresh", "token": token("ann", 1000)}))
        await until(lambda: worker.tally.messages_in == 1)
        worker.follower.confirm(topic("ann"))
        established = await client.message()
        assert "connection_established" == established["type"]
        left = established["expires_in"]
        assert isinstance(left, int)
        assert 995 <= left <= 1000
        assert "token_refreshed" == (await client.message())["type"]


async def test_a_revoked_token_is_refused_wherever_it_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the handshake 401, as first message 4401, in refresh an error; each is counted."""
    monkeypatch.setattr(connection_module, "CLOSE_SECONDS", 0.05)
    revoked = Revoked()
    revoked.learn([Revocation("u:ann", int(time.time()), int(time.time()) + 1000)])
    async with running(revoked=revoked) as worker:
        client = await worker.dial()
        await client.send(head(credential=token("ann")))
        assert 401 == (await client.response())[0]

        nameless = await worker.nameless()
        await nameless.send(text({"type": "auth", "token": token("ann")}))
        assert ("unauthorized", 4401) == await nameless.farewell()

        bob = await worker.join("bob")
        await bob.send(text({"type": "refresh", "token": token("ann")}))
        assert "invalid_token" == (await bob.message())["code"]
        assert 3 == worker.tally.auth["revoked"]


class Unknowing(Verifier):
    """Waits for the keys of its issuer."""

    def verify(self, token: str, now: float) -> Claims:
        """Know no key."""
        raise AuthError("no key yet", outcome="unknown_key", retry_after=7)


async def test_while_the_key_is_not_known_clients_are_told_to_come_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody throws a good token away: 503 with Retry-After, 1013, an error with its time."""
    monkeypatch.setattr(connection_module, "CLOSE_SECONDS", 0.05)
    async with running(verifier=Unknowing(SETTINGS)) as worker:
        client = await worker.dial()
        await client.send(head(credential=token("ann")))
        status, answer = await client.response()
        assert 503 == status
        assert b"\r\nRetry-After: 7" in answer

        nameless = await worker.nameless()
        await nameless.send(text({"type": "auth", "token": token("ann")}))
        goodbye = await nameless.message()
        assert {
            "type": "goodbye",
            "reason": "overload",
            "reconnect": True,
            "reconnect_in_ms": 7000,
        } == goodbye


async def test_too_many_messages_are_refused_and_then_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error says when to go on; who goes on at once is closed with 4429, others are not."""
    monkeypatch.setattr(connection_module, "CLOSE_SECONDS", 0.05)
    rates: Buckets[str] = Buckets(Rate(count=60, period=60, burst=3))
    async with running(rates=rates) as worker:
        fast, calm = await worker.join("ann"), await worker.join("bob")
        for number in range(3):
            await fast.send(text({"type": "message", "payload": number}))
            assert "message_response" == (await fast.message())["type"]
        await fast.send(text({"type": "message", "payload": 3, "ref": "r"}))
        error = await fast.message()
        wait = error.pop("retry_after_ms")
        assert isinstance(wait, int)
        assert 0 < wait <= 1000
        assert {
            "type": "error",
            "code": "rate_limited",
            "message": "too many messages",
            "ref": "r",
        } == error
        await fast.send(text({"type": "message", "payload": 4}) * 40)
        assert ("rate", 4429) == await fast.farewell()
        await calm.send(text({"type": "message", "payload": 1}))
        assert {"count": 1, "payload": 1} == {
            key: value
            for key, value in (await calm.message()).items()
            if key in {"count", "payload"}
        }


async def test_two_connections_of_a_user_share_his_rate() -> None:
    """More connections are not more messages."""
    rates: Buckets[str] = Buckets(Rate(count=60, period=60, burst=3))
    async with running(rates=rates) as worker:
        one, two = await worker.join("ann"), await worker.join("ann")
        for _ in range(3):
            await one.send(text({"type": "message"}))
            assert "message_response" == (await one.message())["type"]
        await two.send(text({"type": "message"}))
        assert "rate_limited" == (await two.message())["code"]


async def test_a_connection_is_registered_while_it_has_a_user() -> None:
    """Entered once and left once, with what is to be known about it; the nameless are not."""
    async with running() as worker:
        nameless = await worker.nameless()
        client = await worker.dial()
        path = "/ws?device=phone&client_type=ios"
        await client.send(head(path, "User-Agent: Phone/1\x7f", credential=token("ann")))
        assert (await client.response())[0] == 400, "control characters are no header"
        await client.aclose()
        client = await worker.dial()
        await client.send(head(path, "User-Agent: Phone/1", credential=token("ann")))
        await client.response()
        await client.message()
        (connection,) = worker.register.entered
        assert ("ann", "phone", "ios", "Phone/1", "127.0.0.1") == (
            connection.user,
            connection.device,
            connection.caller.client_type,
            connection.caller.agent,
            connection.caller.address,
        )
        assert connection.since == pytest.approx(time.time(), abs=5)
        assert [] == worker.register.left
        await client.aclose()
        await nameless.aclose()
        await worker.settled()
        assert [connection] == worker.register.left


async def test_beyond_the_budget_those_with_the_most_are_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All outboxes together have a budget: the largest go with 4410, the others get everything."""
    monkeypatch.setattr(connection_module, "SLOW_CLOSE_SECONDS", 0.05)
    budget = Budget(400_000)
    limits = OutboxLimits(max_bytes=1 << 20, max_frames=10_000, budget=budget)
    async with running(limits=limits, send_buffer=4096) as worker:
        greedy = [await worker.join("ann", receive_buffer=4096) for _ in range(3)]
        modest = await worker.join("bob", receive_buffer=4096)
        for number in range(8):
            await worker.publish(topic("bob"), "y" * 2000 + str(number))
        for _ in range(60):
            await worker.publish(topic("ann"), "x" * 4000)
        await until(lambda: CloseReason.TOO_SLOW in worker.ends)
        assert budget.used <= budget.limit
        assert budget.used == sum(one.waiting_bytes for one in worker.listener.connections)
        got = [str((await modest.message())["payload"]) for _ in range(8)]
        assert ["y" * 2000 + str(number) for number in range(8)] == got
        assert {CloseReason.TOO_SLOW} == set(worker.ends)
        for client in greedy:
            client.reset()
        await modest.aclose()
        await worker.settled()
        assert 0 == budget.used


async def test_who_asks_for_too_much_is_slowed_down_and_loses_nothing() -> None:
    """Pings beyond the rate are all answered, later; a sibling's messages are not refused."""
    requests: Buckets[str] = Buckets(Rate(count=3000, period=60, burst=10))
    async with running(requests=requests) as worker:
        eager, sibling = await worker.join("ann"), await worker.join("ann")
        connection = next(iter(worker.register.entered))
        began = trio.current_time()
        for first in (0, 30):
            pings = [text({"type": "ping", "ref": str(first + n)}) for n in range(30)]
            await eager.send(b"".join(pings))
            await until(lambda: connection._paused_until > 0)
            await sibling.send(text({"type": "message", "payload": first}))
            assert "message_response" == (await sibling.message())["type"]
            got = [(await eager.message())["ref"] for _ in range(30)]
            assert [str(first + n) for n in range(30)] == got
            await until(lambda: connection._paused_until == 0)
        # Ten at once and fifty per second: twenty of the first thirty, and more of the others.
        assert trio.current_time() - began > 0.8
        assert connection.reason is None


async def test_a_client_that_is_gone_when_it_is_answered_enters_nothing() -> None:
    """A bad message and a token in one read, and the socket is broken by the answer."""
    async with running() as worker:
        for _ in range(20):
            client = await worker.nameless()
            await client.send(b"\x81\x81\0\0\0\0?" + text({"type": "auth", "token": token()}))
            client.reset()
        await until(lambda: not worker.listener.connections)
        await worker.settled()
        assert worker.register.entered == worker.register.left


async def test_the_same_token_again_is_no_new_notice() -> None:
    """A client whose library returns the token that it has is told once, not again and again."""
    async with running() as worker:
        client = await worker.dial()
        same = token("ann", 100)
        await client.send(head(credential=same))
        await client.response()
        await client.message()
        connection = worker.only()
        connection._warn_at = worker.pump.now
        connection.hasten(worker.pump.now)
        assert "token_expiring" == (await client.message())["type"]
        await client.send(text({"type": "refresh", "token": same}))
        assert "token_refreshed" == (await client.message())["type"]
        assert connection._warn_at > worker.pump.now + 1e6
        # One that ends later brings its own notice.
        await client.send(text({"type": "refresh", "token": token("ann", 110)}))
        assert "token_refreshed" == (await client.message())["type"]
        assert connection._warn_at - worker.pump.now == pytest.approx(80, abs=5)


async def test_a_token_of_short_life_is_announced_half_way() -> None:
    """Thirty seconds before the end would be at once, and again after every new one."""
    async with running() as worker:
        client = await worker.dial()
        await client.send(head(credential=token("ann", 40)))
        await client.response()
        await client.message()
        assert worker.only()._warn_at - worker.pump.now == pytest.approx(20, abs=3)


async def test_leeway_does_not_prolong_the_grace() -> None:
    """A token that expired long ago and is still accepted ends its connection at once."""
    verifier = Verifier(attrs.evolve(SETTINGS, jwt_leeway=60.0))
    async with running(verifier=verifier) as worker:
        client = await worker.dial()
        await client.send(head(credential=token("ann", -30)))
        assert 101 == (await client.response())[0]
        assert 0 == (await client.message())["expires_in"]
        assert "unauthorized" == (await client.until("goodbye"))["reason"]


async def test_who_is_leaving_does_not_hold_the_memory_of_others() -> None:
    """What waits for clients that have said goodbye is given up before anybody else is cut."""
    budget = Budget(400_000)
    limits = OutboxLimits(max_bytes=1 << 20, max_frames=10_000, budget=budget)
    async with running(limits=limits, send_buffer=4096) as worker:
        hog = await worker.join("ann", receive_buffer=4096)
        modest = [await worker.join("bob", receive_buffer=4096) for _ in range(5)]
        while budget.used < 300_000:
            await worker.publish(topic("ann"), "x" * 4000)
        await hog.send(close(1000))
        await until(lambda: any(one.reason for one in worker.listener.connections))
        for number in range(8):
            await worker.publish(topic("bob"), "y" * 4000 + str(number))
        for client in modest:
            got = [str((await client.message())["payload"]) for _ in range(8)]
            assert ["y" * 4000 + str(number) for number in range(8)] == got
        assert {CloseReason.PEER_CLOSED} >= set(worker.ends)
        for client in (hog, *modest):
            client.reset()
        await worker.settled()
        assert 0 == budget.used
