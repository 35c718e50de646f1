"""Clients that mean harm: what they cost is bounded, they are cut, and the others do not notice."""

import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final
from urllib.parse import quote

import jwt
import msgspec
import pytest
import trio
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from trio.testing import MockClock

from tests.integration.attackers import (
    CONTROL_FLOODS,
    ENDLESS,
    FRAGMENT_FLOODS,
    HEADS,
    UPGRADE,
    Attacker,
    Attacking,
    Siege,
    controls,
    exchange,
    fragments,
    request,
)
from tests.integration.measuring import (
    NOISE_SECONDS,
    PATIENCE,
    Address,
    Audience,
    Neighbour,
    Usage,
    address,
    bearable,
    percentile,
)
from tests.integration.nasty_json import BEYOND, MESSAGES, WORST
from tests.redis_server import RedisServer
from tests.running import SECRET, Running, eventually, running
from tests.trioserver import wire
from tests.trioserver.wire import BINARY, CLOSE, PING, PONG, TEXT, frame
from trioserver.auth import Verifier
from trioserver.connection import MESSAGE_SECONDS
from trioserver.errors import AuthError
from trioserver.frames import MAX_FRAGMENTS
from trioserver.pump import LINGER_SECONDS
from trioserver.session import (
    Acknowledge,
    Answer,
    Ask,
    Authenticate,
    Close,
    MarkRead,
    Refresh,
    Send,
    SendError,
    Session,
)

CONTINUATION = 0x0
MESSAGE_LIMIT = 16 << 10
MIB = 1 << 20
HANDSHAKE_SECONDS = 1.0
CUT_SECONDS = 2.0
GONE_SECONDS = CUT_SECONDS + LINGER_SECONDS
"""Until the socket of one who does not read its goodbye is closed: it costs nothing meanwhile."""
HURRY = 20.0
"""How much faster than the wall Trio's clock runs where a test waits for the long deadlines."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One worker with short deadlines, which lives through all of it without a traceback."""
    environ = {"HANDSHAKE_TIMEOUT": f"{HANDSHAKE_SECONDS}s", "WS_WRITE_WAIT": "1s"}
    with running(tmp_path_factory.mktemp("server"), workers=1, environ=environ) as started:
        pid = Usage.of_worker(started).pid
        yield started
        assert pid == Usage.of_worker(started).pid
        assert "Traceback" not in started.log
        assert '"bug"' not in started.log


@pytest.fixture
def public(server: Running) -> Address:
    """Where the public port is."""
    return address(server)


@pytest.fixture
def usage(server: Running) -> Usage:
    """What the worker uses."""
    return Usage.of_worker(server)


@pytest.fixture
def neighbour(public: Address) -> Iterator[Neighbour]:
    """Somebody else."""
    with Neighbour(public) as client:
        yield client


# Heads.


@pytest.mark.parametrize("piece", [None, 10], ids=["one segment", "10-byte segments"])
@pytest.mark.parametrize("shape", HEADS)
def test_a_head_beyond_the_limits_is_refused_on_the_public_port(
    public: Address, usage: Usage, shape: str, piece: int | None
) -> None:
    """It is 431 and the end, for at most 5 ms of processor time, or 20 µs per segment."""
    data = request("/ws", *UPGRADE, *HEADS[shape])
    spent = []
    for _ in range(5):
        before = usage.cpu_seconds()
        refused = exchange(public, data, piece)
        assert (431, False) == (refused.status, refused.reset)
        spent.append(usage.cpu_seconds() - before)
    # Each segment may be a wake-up of its own, which costs what it costs any client.
    assert min(spent) < max(0.005, 20e-6 * len(data) / (piece or len(data))), spent


@pytest.mark.parametrize("piece", [None, 10], ids=["one segment", "10-byte segments"])
@pytest.mark.parametrize("shape", HEADS)
def test_a_head_beyond_the_limits_is_refused_on_the_internal_port(
    server: Running, shape: str, piece: int | None
) -> None:
    """It is 431 and the end there, too; at once, not when the connection has idled away."""
    refused = exchange(address(server, admin=True), request("/healthz", *HEADS[shape]), piece)
    assert 431 == refused.status
    assert refused.seconds < 2
    assert 200 == server.get("/healthz")[0]


@pytest.mark.parametrize("shape", ["2,000 headers", "32,000 spaces"])
def test_heads_without_end_do_not_slow_down_others(
    public: Address, neighbour: Neighbour, shape: str
) -> None:
    """While somebody sends one bad head after the other, p99 of the others stays below 50 ms."""
    with Attacking(public, "heads", shape) as attack:
        slowest = neighbour.p99()
    assert {431} == {outcome.code for outcome in attack.outcomes}
    assert slowest < 0.05


def test_thousands_of_heads_that_do_not_come_end_at_the_deadline(
    public: Address, usage: Usage
) -> None:
    """Dripping bytes extend nothing, nobody else waits, and every descriptor is given back."""
    baseline = usage.descriptors()
    good: list[float] = []
    with Siege(public, 4_000) as siege:
        limit = time.monotonic() + PATIENCE
        while siege.going_on or len(good) < 100:
            siege.turn(0.005)
            if len(good) < 100:
                began = time.perf_counter()
                with Neighbour(public):
                    good.append(time.perf_counter() - began)
            assert time.monotonic() < limit
        lives = [one.ended - one.began for one in siege.ended if one.ended is not None]
        assert {b"HTTP/1.1 408 "} == {one.answer[:13] for one in siege.ended}
    assert 4_000 == len(lives)
    assert 100 == len(good)
    # Stragglers have all of another second, on a machine that does other things.
    assert HANDSHAKE_SECONDS - 0.5 < min(lives)
    assert percentile(lives, 90) < HANDSHAKE_SECONDS + 0.5
    assert max(lives) < HANDSHAKE_SECONDS + 1.5
    assert percentile(good, 99) < 0.5
    eventually(lambda: usage.descriptors() <= baseline + 5, 5, "descriptors are given back")


# Fragments.


@pytest.mark.parametrize("pings", [False, True], ids=["alone", "with pings"])
@pytest.mark.parametrize("payload", [b"", b"x"], ids=["empty", "one byte"])
def test_a_message_may_have_128_fragments_and_not_one_more(
    public: Address, payload: bytes, *, pings: bool
) -> None:
    """Empty fragments count, and pings between them change nothing."""
    fragment = frame(CONTINUATION, payload, fin=False)
    rest = [fragment] * (MAX_FRAGMENTS - 1)
    if pings:
        rest[::16] = [fragment + frame(PING, b"between")] * len(rest[::16])
    with Attacker(public) as attacker:
        attacker.socket.send(frame(TEXT, payload, fin=False) + b"".join(rest))
        # It still listens: the limit is reached, not passed.
        answer = attacker.ask(frame(PING, b"barrier"), PONG)
        while answer == b"between":
            # Where the worker had read only a part of it, that has its own pong.
            answer = attacker.ask(b"", PONG)
        assert b"barrier" == answer
        outcome = attacker.flood(fragment, 1)
    assert 1009 == outcome.code
    assert outcome.seconds < CUT_SECONDS


@pytest.mark.parametrize("kind", FRAGMENT_FLOODS)
def test_a_million_fragments_from_fifty_clients_cost_next_to_nothing(
    public: Address, usage: Usage, kind: str
) -> None:
    """Each is cut with 1009, and the worker's memory at its peak has grown by at most 8 MiB."""
    fragments(public, kind)
    with usage.growth() as growth:
        outcomes = [fragments(public, kind) for _ in range(50)]
        assert growth() < 8 * MIB
    assert {1009} == {outcome.code for outcome in outcomes}
    assert max(outcome.seconds for outcome in outcomes) < CUT_SECONDS


def test_fifty_clients_just_under_the_limits_cost_their_bytes(
    public: Address, usage: Usage
) -> None:
    """Messages with all fragments and bytes but the last, kept by fifty: at most 8 MiB."""
    almost = frame(TEXT, b"", fin=False) + b"".join(
        frame(CONTINUATION, b"x" * 129, fin=False) for _ in range(MAX_FRAGMENTS - 2)
    )
    attackers = []
    try:
        with usage.growth() as growth:
            for number in range(50):
                attackers.append(Attacker(public, f"mallory-{number}"))
                attackers[-1].ask(almost + frame(PING, b"barrier"), PONG)
            assert growth() < 8 * MIB
        # They are idle now, and still connected.
        assert all(attacker.ask(frame(PING, b"?"), PONG) for attacker in attackers)
    finally:
        for attacker in attackers:
            attacker.socket.close()


@pytest.mark.parametrize("kind", ["empty", "one byte and pings"])
def test_a_fragment_flood_does_not_slow_down_others(
    public: Address, neighbour: Neighbour, kind: str
) -> None:
    """Not even if the attacker comes back as soon as it is cut."""
    baseline = neighbour.p99()
    with Attacking(public, "fragments", kind) as attack:
        slowest = neighbour.p99()
    assert {1009} == {outcome.code for outcome in attack.outcomes}
    assert slowest < bearable(baseline), (baseline, slowest)


@pytest.fixture
def fast_clock() -> MockClock:
    """Make Trio's deadlines come sooner; sockets and the pump's own clock stay real."""
    return MockClock(rate=HURRY)


@pytest.mark.parametrize(
    ("fragmented", "pings"),
    [(False, False), (True, False), (True, True)],
    ids=["one frame", "fragments", "fragments and pings"],
)
async def test_a_message_that_stays_incomplete_ends_in_time(
    fast_clock: MockClock, *, fragmented: bool, pings: bool
) -> None:
    """Ten seconds after its first byte it is 1008; neither pings nor more bytes extend that."""
    async with wire.running() as worker:
        client = await worker.join()
        began = trio.current_time()
        if fragmented:
            await client.send(frame(TEXT, b"x", fin=False))
            more = frame(CONTINUATION, b"x", fin=False)
        else:
            # A frame that would be complete after 200 s.
            await client.send(frame(TEXT, b"x" * 40)[:6])
            more = b"x"
        while worker.only().reason is None:
            await trio.sleep(1.0)
            await client.send(more + (frame(PING) if pings else b""))
        # A bucket of the wheel and a second of ours; and 20 s here are one on the wall.
        assert MESSAGE_SECONDS == pytest.approx(trio.current_time() - began, abs=3.0)
        assert "policy" == (await client.until("goodbye"))["reason"]
        assert 1008 == int.from_bytes((await client.frame())[1][:2], "big")
        await client.aclose()


@pytest.mark.slow
def test_incomplete_messages_end_in_time_on_the_wire(public: Address) -> None:
    """As above, with the clock on the wall: a message just under the limit, and a dripping one."""
    with Attacker(public) as idle, Attacker(public) as dripping:
        idle.socket.send(
            frame(TEXT, b"", fin=False) + frame(CONTINUATION, b"x", fin=False) * (MAX_FRAGMENTS - 1)
        )
        dripping.socket.send(frame(TEXT, b"x" * 1000)[:1])
        assert dripping.wait(5.0) is None
        dripping.socket.send(frame(TEXT, b"x" * 1000)[1:2])
        for attacker in (idle, dripping):
            # Nobody answers the Close frame, which adds the time for that.
            assert 1008 == attacker.flood(b"", 0, seconds=20).code


# Announced lengths and other lies in a header.

LIES = {
    "2^63": (b"\x81\xff" + struct.pack(">Q", 1 << 63), 1002),
    "2^63 - 1": (b"\x81\xff" + struct.pack(">Q", (1 << 63) - 1), 1009),
    "2^32": (b"\x81\xff" + struct.pack(">Q", 1 << 32), 1009),
    "limit + 1": (b"\x81\xfe" + struct.pack(">H", MESSAGE_LIMIT + 1), 1009),
    "126 for 125": (b"\x81\xfe" + struct.pack(">H", 125), 1002),
    "127 for 65,535": (b"\x81\xff" + struct.pack(">Q", 65_535), 1002),
    "RSV1": (b"\xc1\x85", 1002),
    "RSV2": (b"\xa1\x85", 1002),
    "RSV3": (b"\x91\x85", 1002),
    "unmasked": (b"\x81\x05", 1002),
    "opcode 3": (b"\x83\x85", 1002),
    "opcode 11": (b"\x8b\x85", 1002),
    "ping of 126 bytes": (b"\x89\xfe", 1002),
    "ping in fragments": (b"\x09\x80", 1002),
    "continues nothing": (b"\x80\x85", 1002),
    "limit + 1 in fragments": (
        frame(TEXT, b"x" * 16_000, fin=False) + b"\x80\xfe" + struct.pack(">H", 385),
        1009,
    ),
}


@pytest.mark.parametrize(("header", "code"), LIES.values(), ids=LIES.keys())
def test_a_lie_in_a_header_ends_the_connection_before_its_payload(
    public: Address, usage: Usage, header: bytes, code: int
) -> None:
    """Nothing of the payload was sent, nothing is set aside for it, and the verdict is there."""
    outcomes = []
    with usage.growth() as growth:
        for _ in range(3):
            with Attacker(public) as attacker:
                outcomes.append(attacker.flood(header, 1))
        assert growth() < MIB
    assert {code} == {outcome.code for outcome in outcomes}
    # 20 ms on a machine that does nothing else; the best of three is next to that.
    assert min(outcome.seconds for outcome in outcomes) < 0.02


def test_announced_and_dribbled_frames_cost_what_has_come(public: Address, usage: Usage) -> None:
    """A hundred frames of 16 KiB that have been announced and begun: nothing is set aside."""
    attackers = []
    begun = b"\x81\xfe" + struct.pack(">H", MESSAGE_LIMIT) + b"\1\2\3\4" + b"x"
    try:
        attackers = [Attacker(public, f"mallory-{number}") for number in range(100)]
        with usage.growth() as growth:
            for attacker in attackers:
                attacker.socket.send(begun)
            with Neighbour(public) as neighbour:
                neighbour.p99(100, 1)
            assert growth() < MIB
    finally:
        for attacker in attackers:
            attacker.socket.close()


# Control frames.


@pytest.mark.parametrize("user", ["mallory", None], ids=["named", "nameless"])
@pytest.mark.parametrize("kind", CONTROL_FLOODS)
def test_a_flood_of_control_frames_is_cut_with_1008(
    public: Address, usage: Usage, kind: str, user: str | None
) -> None:
    """Within two seconds and for good: who floods on has not a core to itself meanwhile."""
    before = usage.cpu_seconds()
    with usage.growth() as growth:
        outcome = controls(public, kind, user)
        assert growth() < 4 * MIB
    assert 1008 == outcome.code
    assert outcome.seconds < (GONE_SECONDS if "unread" in kind else CUT_SECONDS)
    assert outcome.gone < GONE_SECONDS
    assert usage.cpu_seconds() - before < 0.2
    # One answer per read at most, then the goodbye.
    assert outcome.received < 4096


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (frame(BINARY, b"x"), 1003),
        (frame(TEXT, b'{"type":"auth","token":"bad"}'), 4401),
        (frame(TEXT, b"?") * 20, 1008),
    ],
    ids=["binary", "bad token", "strikes"],
)
def test_nobody_is_listened_to_for_long_after_the_goodbye(
    public: Address, usage: Usage, first: bytes, code: int
) -> None:
    """Whatever the end was for, what is sent behind it is not decoded for seconds."""
    before = usage.cpu_seconds()
    with Attacker(public, None) as attacker:
        attacker.socket.send(first)
        assert code == attacker.wait(5)
        outcome = attacker.flood(frame(PONG, b"x") * 10_000, ENDLESS)
    assert outcome.gone < GONE_SECONDS
    assert usage.cpu_seconds() - before < 0.2


@pytest.mark.parametrize("kind", CONTROL_FLOODS)
def test_a_flood_of_control_frames_does_not_slow_down_others(
    public: Address, neighbour: Neighbour, kind: str
) -> None:
    """Not even if the attacker comes back as soon as it is cut."""
    baseline = neighbour.p99()
    with Attacking(public, "controls", kind) as attack:
        slowest = neighbour.p99()
    assert {1008} == {outcome.code for outcome in attack.outcomes}
    assert slowest < bearable(baseline), (baseline, slowest)


# Small segments.


def test_a_large_frame_in_one_byte_segments_costs_ten_microseconds_per_byte(
    public: Address, usage: Usage
) -> None:
    """System calls included; it is answered like any other, and its memory is its bytes."""
    wrapped = b'{"type":"message","ref":"r","payload":"%b"}'
    message = wrapped % (b"x" * (MESSAGE_LIMIT - len(wrapped) + 2))
    data = frame(TEXT, message)
    spent = []
    with usage.growth() as growth:
        for _ in range(3):
            with Attacker(public) as attacker:
                before = usage.cpu_seconds()
                for byte in memoryview(data)[:-1]:
                    attacker.socket.send(bytes((byte,)))
                reply = json.loads(attacker.ask(data[-1:], TEXT))
                spent.append((usage.cpu_seconds() - before) / len(data))
                assert ("message_response", 1) == (reply["type"], reply["count"])
        assert growth() < MIB
    assert min(spent) < 10e-6, spent


# JSON.


@hypothesis_settings(
    max_examples=1_000,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.lists(MESSAGES, min_size=10, max_size=10))
def test_ten_thousand_messages_of_all_kinds_are_answered_in_time(texts: list[bytes]) -> None:
    """Each yields one action within 5 ms and never an exception, before and after ``auth``."""
    for text in texts:
        assert_harmless(text)


@pytest.mark.parametrize("text", [*WORST.values(), *BEYOND.values()], ids=[*WORST, *BEYOND])
def test_the_worst_messages_are_answered_in_time(text: bytes) -> None:
    """As above, for what has brought down others; larger than the limit as shipped, too."""
    # A tenth of the limit as shipped per millisecond.
    assert_harmless(text, max(0.005, len(text) / MESSAGE_LIMIT * 1e-3))


VERIFIER = Verifier(wire.SETTINGS)
ACTIONS = (Send, Answer, SendError, Authenticate, Refresh, Acknowledge, MarkRead, Ask, Close)


def assert_harmless(text: bytes, seconds: float = 0.005) -> None:
    """Give a message to a session, without and with a user; see what comes of it, and when."""
    for user in (None, "ann"):
        spent: list[float] = []
        while not spent or (spent[-1] > seconds and len(spent) < 3):
            session = Session(user)
            before = time.thread_time()
            action = session.receive(text, 0.0, "2025-01-01T00:00:00Z")
            spent.append(time.thread_time() - before)
            assert isinstance(action, ACTIONS), text[:200]
            if isinstance(action, Authenticate):
                with pytest.raises(AuthError):
                    VERIFIER.verify(action.token, 0.0)
            elif isinstance(action, Send | SendError):
                # No other limits than the server's own.
                msgspec.json.decode(action.data, type=dict[str, msgspec.Raw])
        assert min(spent) < seconds, (spent, text[:200])


def test_the_worst_messages_are_answered_on_the_wire(public: Address) -> None:
    """Each gets exactly one answer: an error, or what a good message gets."""
    texts = [text for text in WORST.values() if len(text) <= MESSAGE_LIMIT]
    assert len(texts) > 20
    for start in range(0, len(texts), 10):
        with Attacker(public) as attacker:
            for number, text in enumerate(texts[start : start + 10]):
                answer = json.loads(attacker.ask(frame(TEXT, text), TEXT))
                assert answer["type"] in {"error", "message_response", "pong"}, text[:100]
                barrier = json.dumps({"type": "ping", "ref": str(number)}).encode()
                pong = json.loads(attacker.ask(frame(TEXT, barrier), TEXT))
                assert {"type": "pong", "ref": str(number)} == pong, text[:100]


# Words in the log.

EVIL = 'x\r\n{"event": "forged"}\x1b[31m\u2028\x85"' + "long " * 1_000
FORGED_ADDRESS = "203.0.113.77"


def test_no_clients_words_break_a_line_of_the_log(tmp_path: Path) -> None:
    """One event is one line of JSON, whatever was in a header, a path, a name or a reason."""
    environ = {"LOG_LEVEL": "debug", "LOGGER_ENCODING": "json", "WS_ALLOWED_ORIGINS": "*"}
    with running(tmp_path, workers=1, environ=environ) as server:
        joined = speak_evil(address(server))
        asked = ask_evil(address(server, admin=True))
        eventually(
            lambda: server.log.count('"connection ended"') >= joined, 5, "all ends are logged"
        )
    # As bytes, because text has more line ends than one.
    raw = server.log_path.read_bytes()
    lines = raw.splitlines()
    assert raw.count(b"\n") == len(lines)
    # Redis has words of its own before it is ours, and none of a client's.
    events = [json.loads(line) for line in lines if line.startswith(b"{")]
    strange = [line for line in lines if not line.startswith(b"{")]
    assert [] == [line for line in strange if b"forged" in line or b"long" in line]
    names = [event["event"] for event in events]
    assert "forged" not in names
    assert joined == names.count("connection ended")
    assert asked == names.count("request")
    assert all(byte >= 0x20 for byte in raw.replace(b"\n", b""))
    assert raw.isascii()
    assert max(map(len, lines)) <= 4096
    assert FORGED_ADDRESS.encode() not in raw


def speak_evil(public: Address) -> int:
    """Say evil words wherever a WebSocket client can; return how many got in."""
    joined = 0
    for user in (EVIL, "x\u2028y", "x\x1by", "u" * 5_000, 'quote"d', "\U0001f600", "\ufeff", "ann"):
        claims = {"sub": user, "exp": time.time() + 60}
        bearer = f"Authorization: Bearer {jwt.encode(claims, SECRET)}"
        for words in ("fine", "\u2028\x85 forged", "forged " * 800, "forged\x1b[31m"):
            lines = (*UPGRADE, bearer, f"User-Agent: {words}", f"Origin: {words}")
            path = "/ws?" + quote(EVIL[:1_000])
            data = request(path, *lines, f"X-Forwarded-For: {FORGED_ADDRESS}")
            reason = frame(CLOSE, struct.pack(">H", 3000) + EVIL.encode()[:60])
            answer = exchange(public, data + reason).answer
            assert answer.startswith((b"HTTP/1.1 101 ", b"HTTP/1.1 4")), answer
            joined += answer.startswith(b"HTTP/1.1 101 ")
    exchange(public, request("/" + EVIL, *UPGRADE))
    exchange(public, request("/" + quote(EVIL), *UPGRADE))
    assert joined > 6
    return joined


def ask_evil(admin: Address) -> int:
    """Say evil words wherever an HTTP client can; return how many requests were logged."""
    asked = 0
    for path in (quote(EVIL), quote("\x1b[31m\n\u2028"), "x" * 5_000):
        for words in ("fine", "\u2028\x85 forged", "forged " * 600):
            data = request(
                "/" + path,
                "Connection: close",
                f"User-Agent: {words}",
                f"X-Request-ID: {words}",
                f"X-Forwarded-For: {FORGED_ADDRESS}",
            )
            assert 404 == exchange(admin, data).status
            asked += 1
    return asked


# Slow readers.


class Publisher:
    """Publishes numbered broadcasts while an audience listens, in one thread."""

    INTERVAL: Final = 1 / 200

    def __init__(self, redis: RedisServer, audience: Audience) -> None:
        self._redis = redis
        self._audience = audience
        self.published = 0

    def publish(self, seconds: float, cut: Callable[[], bool] = lambda: False) -> float | None:
        """Publish 200 per second for so long, or until a second after ``cut``.

        Returns:
            After how many seconds ``cut`` was true; None if it never was.
        """
        began = moment = time.perf_counter()
        end = began + seconds
        when = None
        while moment < end:
            payload = {"number": self.published, "at": time.perf_counter(), "filling": "x" * 2_000}
            message = json.dumps({"type": "numbered", "payload": payload})
            self._redis.command("PUBLISH", "channels:broadcast", message)
            self.published += 1
            moment += self.INTERVAL
            self._audience.listen(moment)
            if when is None and self.published % 20 == 0 and cut():
                when = moment - began
                end = min(end, moment + 1)
        return when

    def wait_all(self) -> None:
        """Listen until the last has come to all."""
        limit = time.perf_counter() + PATIENCE
        while any(len(numbers) < self.published for numbers in self._audience.numbers):
            assert time.perf_counter() < limit, "some have lost something"
            self._audience.listen(time.perf_counter() + 0.01)


def test_one_that_never_reads_is_cut_and_ninety_nine_lose_nothing(tmp_path: Path) -> None:
    """The write deadline ends it; the others get every broadcast, in order, and no later."""
    with (
        RedisServer(tmp_path / "redis") as redis,
        running(
            tmp_path / "server",
            workers=1,
            environ={"WS_WRITE_WAIT": "1s", "REDIS_URL": redis.url},
        ) as server,
        Audience(address(server), 99) as audience,
    ):
        publisher = Publisher(redis, audience)
        publisher.publish(3.0)
        baseline = percentile(audience.taken(), 99)
        usage = Usage.of_worker(server)
        before = usage.descriptors()
        with usage.growth() as growth, Attacker(address(server), receive_buffer=4096):
            assert before < usage.descriptors()
            cut = publisher.publish(11.0, lambda: usage.descriptors() <= before)
            assert growth() < 8 * MIB
        slowest = percentile(audience.taken(), 99)
        publisher.wait_all()
    everything = list(range(publisher.published))
    assert [everything] * 99 == audience.numbers
    assert cut is not None, "it was never cut"
    assert slowest < baseline + NOISE_SECONDS, (baseline, slowest)
