"""What /metrics says is what the clients have seen, whoever is killed, stopped or gone."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.integration.clients import client, receive, token, url
from tests.redis_server import RedisServer
from tests.running import Running, eventually, running

Samples = dict[tuple[str, ...], float]

GAUGES = (
    "websocket_connections",
    "websocket_connections_total",
    "active_connections",
    "websocket_users",
    "outbox_bytes",
)


def parse(page: bytes) -> tuple[Samples, set[str]]:
    """Return the samples of a page by name and label values, and which names only ever rise."""
    samples: Samples = {}
    rising: set[str] = set()
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            samples[sample.name, *sample.labels.values()] = sample.value
            if family.type in {"counter", "histogram"}:
                rising.add(sample.name)
    # A process's own time begins again with each process.
    return samples, rising - {"process_cpu_seconds_total"}


def scrape(server: Running) -> Samples:
    """Return what a scrape says now."""
    status, page = server.get("/metrics")
    assert 200 == status, page
    return parse(page)[0]


def current(server: Running) -> dict[str, Any]:
    """Return the status of a server that must answer."""
    return eventually(server.status, 10, "the supervisor answers")


class Watching:
    """A thread that scrapes all the time and notes every counter that falls or goes away."""

    def __init__(self, server: Running) -> None:
        self._address = current(server)["admin_address"]
        self.falls: list[str] = []
        self.pages = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        before: Samples = {}
        while not self._stop.wait(0.1):
            page = self._page()
            if page is None:
                continue  # asked of a gateway that was killed with the question in hand
            self.pages += 1
            samples, rising = parse(page)
            for series, value in before.items():
                now = samples.get(series)
                if now is None or now < value:
                    self.falls.append(f"{series}: {value} -> {now}")
            before = {key: value for key, value in samples.items() if key[0] in rising}

    def _page(self) -> bytes | None:
        connection = http.client.HTTPConnection(self._address, timeout=10)
        with (
            contextlib.closing(connection),
            contextlib.suppress(OSError, http.client.HTTPException),
        ):
            connection.request("GET", "/metrics")
            response = connection.getresponse()
            body = response.read()
            return body if response.status == 200 else None
        return None


class Talk:
    """What clients have said and were answered, counted by themselves."""

    def __init__(self) -> None:
        self.connected = 0
        self.answered: list[float] = []
        """When each answer came."""

    def exchange(self, socket_: ClientConnection, messages: int) -> None:
        """Send messages one by one and wait for the answer to each."""
        for _ in range(messages):
            socket_.send('{"type":"message","payload":1}')
            assert "message_response" == receive(socket_)["type"]
            self.answered.append(time.monotonic())

    def once(self, server: Running, user: str, messages: int) -> None:
        """Connect, talk, and leave."""
        with client(server, user) as socket_:
            self.connected += 1
            self.exchange(socket_, messages)

    def until(self, server: Running, user: str, over: threading.Event) -> None:
        """Talk, and come back whenever the connection is lost."""
        while not over.is_set():
            with (
                contextlib.suppress(ConnectionClosed, InvalidHandshake, OSError, EOFError),
                client(server, user) as socket_,
            ):
                self.connected += 1
                while not over.is_set():
                    self.exchange(socket_, 1)

    def counted(self, server: Running) -> bool:
        """Return whether a scrape says exactly the same."""
        seen = scrape(server)
        return (self.connected, len(self.answered)) == (
            seen["websocket_connections_opened_total",],
            seen["messages_total",],
        )


def kill_worker(server: Running, slot: int) -> None:
    """Kill -9, and wait for the successor."""
    before = current(server)["workers"][slot]["pid"]
    os.kill(before, signal.SIGKILL)

    def back() -> bool:
        status = current(server)
        return bool(status["ready"] and status["workers"][slot]["pid"] != before)

    eventually(back, 10, "the worker is back")


def kill_gateway(server: Running) -> None:
    """Kill -9, and wait for the successor."""
    before = current(server)["gateway"]["pid"]
    os.kill(before, signal.SIGKILL)

    def back() -> bool:
        gateway = current(server)["gateway"]
        return bool(gateway["ready"] and gateway["pid"] != before)

    eventually(back, 10, "the gateway is back")


def reload(server: Running) -> None:
    """Raise the next generation."""
    done = server.run("reload")
    assert 0 == done.returncode, done.stderr


def test_counters_are_what_clients_have_seen_whoever_dies(tmp_path: Path) -> None:
    """Over kills of workers and gateway and over reloads no counter falls, and none is off by one.

    What a worker has counted in the second before it is killed is the only thing that may be lost;
    the clients leave it none here.
    """
    talk = Talk()
    with running(tmp_path) as server, Watching(server) as watching:
        acts: tuple[Callable[[], None], ...] = (
            lambda: kill_worker(server, 0),
            lambda: reload(server),
            lambda: kill_gateway(server),
        )
        for number, act in enumerate(acts):
            for user in ("ann", "bob", "cy", "dee"):
                talk.once(server, f"{user}-{number}", 10)
            eventually(lambda: talk.counted(server), 5, "the counts are those of the clients")
            act()
            assert talk.counted(server)
        eventually(lambda: _files_per_slot(server) <= 5, 10, "old generations are folded")
        assert talk.counted(server)

    assert [] == watching.falls
    assert watching.pages > 20


def _files_per_slot(server: Running) -> float:
    files = list((server.data_dir / "metrics").glob("*[0-9].db"))
    return len(files) / 3  # two workers and the gateway


def test_a_kill_in_full_flight_costs_at_most_a_second(tmp_path: Path) -> None:
    """What is missing after kills under load was answered within the second before a kill."""
    talk, over = Talk(), threading.Event()
    kills: list[float] = []
    with running(tmp_path) as server, Watching(server) as watching:
        users = ("ann", "bob", "cy", "dee")
        threads = [threading.Thread(target=talk.until, args=(server, u, over)) for u in users]
        for thread in threads:
            thread.start()
        try:
            for number in range(3):
                said = len(talk.answered) + 200
                eventually(lambda said=said: len(talk.answered) > said, 10, "they talk")  # type: ignore[misc]
                kills.append(time.monotonic())
                kill_worker(server, number % 2)
        finally:
            over.set()
            for thread in threads:
                thread.join(20)
        quiet = time.monotonic()
        # Two flushes later everything that was not lost has been written.
        eventually(lambda: time.monotonic() > quiet + 2.2, 5, "everything is written")
        counted = scrape(server)["messages_total",]

    # A busy machine may flush a little late.
    at_risk = sum(any(kill - 1.5 < when < kill + 0.2 for kill in kills) for when in talk.answered)
    in_hand = len(kills) * len(users)
    assert len(talk.answered) - at_risk <= counted <= len(talk.answered) + in_hand
    assert [] == watching.falls


class Raw:
    """A client on a bare socket, for ends that no library would make."""

    def __init__(self, server: Running, user: str | None, **options: int) -> None:
        host, _, port = current(server)["address"].rpartition(":")
        self.sock = socket.socket()
        for option, value in options.items():
            self.sock.setsockopt(socket.SOL_SOCKET, getattr(socket, option), value)
        self.sock.settimeout(10)
        self.sock.connect((host, int(port)))
        credential = f"Authorization: Bearer {token(user)}\r\n" if user else ""
        self.sock.sendall(
            f"GET /ws HTTP/1.1\r\nHost: {host}\r\n{credential}"
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        self.wait_for(b"connection_established" if user else b"\r\n\r\n")

    def wait_for(self, wanted: bytes) -> None:
        """Receive until something has come."""
        answer = b""
        while wanted not in answer:
            data = self.sock.recv(4096)
            assert data, answer
            answer += data

    def frame(self, opcode: int, payload: bytes) -> None:
        """Send one frame, masked with zeros."""
        length = len(payload)
        size = bytes([0x80 | length]) if length < 126 else b"\xfe" + struct.pack(">H", length)
        self.sock.sendall(bytes([0x80 | opcode]) + size + bytes(4) + payload)

    def reset(self) -> None:
        """End with RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


def close_cleanly(server: Running, user: str) -> None:
    """Close with a Close frame."""
    raw = Raw(server, user)
    raw.frame(8, struct.pack(">H", 1000))
    while raw.sock.recv(4096):
        pass
    raw.sock.close()


def reset(server: Running, user: str) -> None:
    """Vanish with RST."""
    Raw(server, user).reset()


def vanish(server: Running, user: str) -> None:
    """Close the socket without a word."""
    Raw(server, user).sock.close()


def say_too_much(server: Running, user: str) -> None:
    """Send a message beyond the limit; 1009."""
    raw = Raw(server, user)
    raw.frame(1, b"x" * 20_000)
    raw.wait_for(b"too_big")
    raw.sock.close()


def break_the_rules(server: Running, user: str) -> None:
    """Send a frame of an unknown kind and leave at once; 1002."""
    raw = Raw(server, user)
    raw.frame(3, b"")
    raw.sock.close()


def show_a_bad_token(server: Running, _user: str) -> None:
    """Send a first message that is refused; 4401."""
    raw = Raw(server, None)
    raw.frame(1, b'{"type":"auth","token":"no"}')
    raw.wait_for(b"unauthorized")
    raw.sock.close()


def read_nothing(server: Running, user: str) -> None:
    """Ask for more than fits into any buffer, do not read it, and vanish."""
    raw = Raw(server, user, SO_RCVBUF=4096)
    raw.sock.settimeout(0.05)
    with contextlib.suppress(TimeoutError):
        for _ in range(200):
            raw.frame(1, b'{"type":"message","payload":"%s"}' % (b"x" * 8000))
    raw.reset()


def be_refused(server: Running, _user: str) -> None:
    """Come with half a handshake and go."""
    host, _, port = current(server)["address"].rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(b"GET /ws HTTP/1.1\r\nHost: x\r\n")


ENDS = (
    close_cleanly,
    reset,
    vanish,
    say_too_much,
    break_the_rules,
    show_a_bad_token,
    read_nothing,
    be_refused,
)


def test_gauges_settle_at_exactly_zero(tmp_path: Path) -> None:
    """After hundreds of sessions that ended in every way there is, nobody is left in any gauge."""
    with running(tmp_path, environ={"AUTH_TIMEOUT": "1s", "HANDSHAKE_TIMEOUT": "1s"}) as server:
        silent = [Raw(server, None) for _ in range(10)]
        with ThreadPoolExecutor(8) as pool:
            jobs = [
                pool.submit(end, server, f"user-{number % 7}")
                for number in range(40)
                for end in ENDS
            ]
            for job in jobs:
                job.result(30)
        held = [Raw(server, f"user-{number}") for number in range(20)]
        eventually(
            lambda: scrape(server)["websocket_connections",] >= 20, 5, "they are seen while there"
        )
        kill_worker(server, 0)
        for raw in (*held, *silent):
            raw.sock.close()

        def settled() -> bool:
            seen = scrape(server)
            health = json.loads(server.get("/health")[1])["websocket"]
            return not any((*(seen[name,] for name in GAUGES), *health.values()))

        eventually(settled, 10, f"zero: {scrape(server)}")
        seen = scrape(server)

    for reason in ("peer_closed", "peer_lost", "too_big", "protocol_error", "unauthorized"):
        assert seen["websocket_closes_total", reason] >= 10, reason
    assert seen["websocket_closes_total", "auth_timeout"] >= 1


EVIL = 'evil-\u00fc-"}{\n'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two workers, for tests that leave them as they were."""
    with running(tmp_path_factory.mktemp("server")) as started:
        yield started


def test_clients_cannot_make_series(server: Running) -> None:
    """Whatever clients send, wherever they send it: the same few series, and nothing of theirs."""
    before = set(scrape(server))
    for number in range(30):
        word = f"evil{number}"
        for public in (False, True):
            server.get(f"/{word}?x={word}", public=public, **{"X-Request-ID": word, word: word})
        options: dict[str, Any] = {"origin": f"https://{word}.example", "user_agent_header": word}
        with (
            contextlib.suppress(InvalidStatus),
            connect(url(server, f"?token={word}&{word}={word}"), **options),
        ):
            pass
        with client(server, word) as socket_:
            for text in (word, json.dumps({"type": word, "ref": word}), json.dumps({word: EVIL})):
                socket_.send(text)
            for _ in range(3):
                assert "error" == receive(socket_)["type"]
            socket_.close(4000 + number, word)
        server.get("/metrics", Accept=word)
    eventually(
        lambda: scrape(server)["websocket_errors_total", "bad_json"] >= 30, 5, "it was counted"
    )
    page = server.get("/metrics")[1]

    assert before == set(parse(page)[0])
    assert len(before) <= 500
    assert b"evil" not in page.lower()


def test_processes_of_every_role_are_measured(server: Running) -> None:
    """Each process of the server is in the page with its time, memory and descriptors."""
    seen = scrape(server)

    for role in ("supervisor", "gateway", "redis", "worker-0", "worker-1"):
        assert seen["process_cpu_seconds_total", role] > 0, role
        assert seen["process_resident_memory_bytes", role] > 1 << 20, role
        assert seen["process_open_fds", role] > 3, role
    for slot in ("0", "1"):
        assert (1, 1, 0) == tuple(
            seen[name, slot] for name in ("worker_up", "worker_ready", "worker_restarts_total")
        )


def test_the_gateway_answers_whoever_does_not(tmp_path: Path) -> None:
    """With a stopped worker and a dead Redis a hundred scrapes at once are answered soon."""
    with (
        RedisServer(tmp_path / "redis") as redis,
        running(tmp_path / "server", environ={"REDIS_URL": redis.url}) as server,
    ):
        pids = [worker["pid"] for worker in current(server)["workers"]]
        os.kill(pids[0], signal.SIGSTOP)
        try:
            redis.kill()
            eventually(lambda: not scrape(server)["redis_up",], 5, "Redis is known to be down")
            address = current(server)["admin_address"]
            seconds = {path: _all_at_once(address, path) for path in ("/metrics", "/healthz")}
            seen = scrape(server)
            after = [worker["pid"] for worker in current(server)["workers"]]
        finally:
            os.kill(pids[0], signal.SIGCONT)

    assert pids == after
    assert 0 == seen["redis_ping_seconds",]
    assert 1 == seen["worker_up", "0"]
    for path, durations in seconds.items():
        # 0.2 s on a machine that does nothing else; here others run beside us.
        assert sorted(durations)[98] < 1.5, (path, statistics.quantiles(durations))


def _all_at_once(address: str, path: str, number: int = 100) -> list[float]:
    """Return how long each of many requests at once took, all of them answered with 200."""
    gate = threading.Barrier(number)

    def ask() -> float:
        gate.wait(20)
        began = time.monotonic()
        connection = http.client.HTTPConnection(address, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
        assert 200 == response.status
        assert path == "/healthz" or re.search(rb"^redis_up 0", body, re.MULTILINE)
        return time.monotonic() - began

    with ThreadPoolExecutor(number) as pool:
        return [job.result(30) for job in [pool.submit(ask) for _ in range(number)]]


def test_the_metrics_of_a_notification(server: Running) -> None:
    """Publications are counted by what became of them, and timed on their way to the socket."""

    def rise(names: tuple[tuple[str, ...], ...]) -> list[float]:
        now = scrape(server)
        return [now[name] - before[name] for name in names]

    names = (
        ("notifications_published_total", "delivered"),
        ("notifications_published_total", "malformed"),
        ("notifications_published_total", "nobody"),
        ("notification_delivery_seconds_count",),
        ("websocket_message_latency_seconds_count",),
    )
    before = scrape(server)
    with client(server, "ann") as socket_:
        server.run("publish", "--user", "ann", "1")
        assert 1 == receive(socket_)["payload"]
        # A broadcast reaches both workers, and one of them has nobody.
        server.run("publish", "--all", "2")
        assert 2 == receive(socket_)["payload"]
        for _ in range(8):
            # One in eight is timed.
            socket_.send('{"type":"ping"}')
            assert "pong" == receive(socket_)["type"]
        eventually(lambda: [2, 0, 1, 2, 1] == rise(names), 5, f"counted: {rise(names)}")

    seen = scrape(server)
    assert 0 < seen["notification_delivery_seconds_sum",] < 5
    assert seen["redis_latency_seconds_count",] > 0


def test_who_leaves_without_credentials_is_counted(server: Running) -> None:
    """A connection that never shows any credential is ``missing``, however it ends."""
    before = scrape(server)["auth_total", "missing"]
    close_cleanly_nameless = Raw(server, None)
    close_cleanly_nameless.sock.close()

    eventually(lambda: scrape(server)["auth_total", "missing"] == before + 1, 5, "counted")


def test_the_time_of_a_drain_is_kept(tmp_path: Path) -> None:
    """After a reload the page says how long the old generation took to drain, for good."""
    with running(tmp_path, environ={"DRAIN_PROPAGATION": "0s"}) as server:
        assert 0 == scrape(server)["websocket_shutdown_time_seconds",]
        reload(server)
        eventually(lambda: scrape(server)["websocket_shutdown_time_seconds",] > 0, 10, "drained")
        eventually(lambda: _files_per_slot(server) <= 5, 10, "old generations are folded")

        assert 0 < scrape(server)["websocket_shutdown_time_seconds",] < 10
