"""The gateway as a process: what it answers, what it survives, and how it ends."""

import datetime as dt
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from tests.redis_server import RedisServer, wait_until
from tests.trioserver.gateway_process import Answer, GatewayProcess, pool, worker
from trioserver.metrics import FAMILIES, Exporter, Tally
from trioserver.settings import Settings

# Nothing is there: a closed port refuses at once.
NO_REDIS = Settings(redis_url="redis://127.0.0.1:1/0", logger_encoding="json", log_level="debug")

# What a page has beside the metrics that processes count.
POOL_TYPES = {
    "pool_ready": "gauge",
    "redis_up": "gauge",
    "worker_up": "gauge",
    "worker_ready": "gauge",
    "worker_restarts_total": "counter",
}

TIMESTAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"

# To Hypercorn this is a switch to HTTP/2, with settings that cannot be decoded: the error leaves
# the connection and ends the nursery of all connections.
POISON = (
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\n"
    b"Upgrade: h2c\r\nHTTP2-Settings: !!!x\r\n\r\n"
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """One gateway without Redis, for all tests that leave it as it was."""
    with GatewayProcess(tmp_path_factory.mktemp("gw"), NO_REDIS) as process:
        process.wait_started()
        yield process


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[GatewayProcess]:
    """A gateway of one's own."""
    with GatewayProcess(tmp_path, NO_REDIS) as process:
        process.wait_started()
        yield process


async def settle(process: GatewayProcess, path: str, status: int, seconds: float = 5.0) -> Answer:
    """Return the first answer with that status; fails if none comes in time."""
    with trio.fail_after(seconds):
        while True:
            answer = await process.get(path)
            if answer.status == status:
                return answer
            await trio.sleep(0.02)


def samples(answer: Answer) -> dict[tuple[str, ...], float]:
    """Return the samples of a page of metrics: name and label values, and the value."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }


def log_lines(process: GatewayProcess) -> list[dict[str, object]]:
    """Return its log so far; every line is JSON, or this fails."""
    return [json.loads(line) for line in process.log.splitlines()]


async def test_it_says_that_it_serves_when_it_does(gateway: GatewayProcess) -> None:
    """``Started`` and a ready beat come when a request is answered."""
    answer = await gateway.get("/healthz")
    beat = gateway.wait_beat(ready=True)

    assert answer.status == 200
    assert json.loads(answer.body) == {"status": "ok"}
    assert (beat.connections, beat.why) == (0, "")


async def test_readiness_is_the_supervisors_word(shared: GatewayProcess) -> None:
    """``/readyz`` follows the supervisor within a moment, and says what is missing."""
    supervisor = shared.supervisor
    ready = await settle(shared, "/readyz", 200)
    gone = worker(1, ready=False, there=False)
    supervisor.reply = pool(worker(0, ready=False, why="canary late"), gone, ready=False)
    missing = await settle(shared, "/readyz", 503)
    supervisor.reply = pool(worker(0), worker(1))
    await settle(shared, "/readyz", 200)
    supervisor.reply = pool(worker(0), worker(1), draining=True)
    draining = await settle(shared, "/readyz", 503)
    supervisor.reply = pool(worker(0), worker(1))

    assert json.loads(ready.body) == {"ready": True}
    assert json.loads(missing.body) == {
        "ready": False,
        "why": "worker 0: canary late; worker 1: not there",
    }
    assert json.loads(draining.body) == {"ready": False, "why": "draining"}


async def test_what_is_not_known_is_not_ready(gateway: GatewayProcess) -> None:
    """A supervisor that hangs or is gone: 503 within little more than a second, and alive."""
    await settle(gateway, "/readyz", 200)
    gateway.supervisor.reply = None
    hung = await settle(gateway, "/readyz", 503)
    began = time.monotonic()
    await gateway.get("/readyz")
    took = time.monotonic() - began
    alive = await gateway.get("/healthz")
    gateway.supervisor.close()
    gone = await settle(gateway, "/readyz", 503)

    assert took < 2.5
    assert alive.status == 200
    for answer in (hung, gone):
        assert json.loads(answer.body)["why"] == "the supervisor does not answer"
    complaints = [line for line in log_lines(gateway) if "does not answer" in str(line["event"])]
    assert len(complaints) == 1


async def test_health_has_exactly_the_known_shape(tmp_path: Path) -> None:
    """With Redis healthy, without it degraded; connections and users of the whole pool."""
    with RedisServer(tmp_path / "redis") as redis:
        settings = attrs.evolve(NO_REDIS, redis_url=redis.unix_url)
        with GatewayProcess(tmp_path / "gateway", settings) as process:
            metrics_dir = process.state.metrics_dir
            exporters = [
                Exporter(Tally(connections=9, users=users), metrics_dir, f"w{users}.1")
                for users in (3, 4)
            ]
            for exporter in exporters:
                exporter.flush()
            process.supervisor.reply = pool(worker(0, connections=5), worker(1, connections=7))
            process.wait_started()
            healthy = json.loads((await settle(process, "/health", 200)).body)
            redis.kill()
            degraded = json.loads((await settle(process, "/health", 503)).body)
            redis.start()
            await settle(process, "/health", 200)
            process.supervisor.reply = pool(worker(0, ready=False), ready=False)
            await settle(process, "/health", 503)

    assert re.fullmatch(TIMESTAMP, healthy.pop("timestamp"))
    assert 0 <= healthy["redis"].pop("ping_ms") < 1000
    assert healthy == {
        "status": "healthy",
        "redis": {"status": "connected"},
        "websocket": {"active_connections": 12, "total_unique_users": 7},
        "uptime_seconds": 3600,
    }
    assert degraded["status"] == "degraded"
    assert degraded["redis"].keys() == {"status", "error"}
    assert degraded["redis"]["status"] == "disconnected"


async def test_names_and_types_of_a_scrape(shared: GatewayProcess) -> None:
    """A page has every metric of the table, and what only the supervisor knows, and no more."""
    await settle(shared, "/readyz", 200)
    page = await shared.get("/metrics")

    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", page.body.decode(), re.MULTILINE))
    expected = {family.name: family.kind.partition("_")[0] for family in FAMILIES} | POOL_TYPES
    assert expected == types
    assert types["websocket_connections_total"] == "gauge"
    assert page.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"


async def test_a_scrape_adds_up_all_processes(gateway: GatewayProcess) -> None:
    """Counters of everybody, gauges of the living, and the supervisor's word on each slot."""
    directory = gateway.state.metrics_dir
    living = Exporter(Tally(connections=2, opened=5, outbox_bytes=7), directory, "w0.1")
    living.flush()
    ended = Exporter(Tally(connections=3, opened=6), directory, "w1.1")
    ended.close()
    gateway.supervisor.reply = pool(worker(0), worker(1, ready=False, there=False))
    await settle(gateway, "/readyz", 200)

    seen = samples(await gateway.get("/metrics"))

    assert seen["websocket_connections",] == 2
    assert seen["websocket_connections_total",] == 2
    assert seen["active_connections",] == 2
    assert seen["outbox_bytes",] == 7
    assert seen["websocket_connections_opened_total",] == 11
    assert seen["websocket_connection_duration_seconds_count",] == 0
    assert seen["http_requests_total", "/readyz", "200"] >= 1
    assert (seen["worker_up", "0"], seen["worker_up", "1"]) == (1, 0)
    assert (seen["worker_ready", "0"], seen["worker_ready", "1"]) == (1, 0)
    assert seen["worker_restarts_total", "1"] == 1
    assert (seen["pool_ready",], seen["redis_up",]) == (1, 0)


async def test_metrics_as_json_have_exactly_the_known_shape(gateway: GatewayProcess) -> None:
    """Who asks for JSON gets the shape that dashboards know."""
    tally = Tally(users=2, redis_messages=56789, failed=12)
    tally.notifications_delivered["ephemeral"] = 67890
    exporter = Exporter(tally, gateway.state.metrics_dir, "w0.1")
    exporter.flush()
    gateway.supervisor.reply = pool(worker(0, connections=4))

    page = await gateway.get("/metrics", {"Accept": "application/json"})

    body = json.loads(page.body)
    assert page.headers["Content-Type"] == "application/json"
    assert re.fullmatch(TIMESTAMP, body.pop("timestamp"))
    assert body == {
        "service": "trioserver",
        "uptime_seconds": 3600,
        "connections": {"active": 4, "total_unique_users": 2},
        "messages": {"received_from_redis": 56789, "sent_to_clients": 67890, "failed": 12},
    }


async def test_a_bad_metric_file_does_not_fail_a_scrape(gateway: GatewayProcess) -> None:
    """Empty, torn and foreign files are set aside and counted; the rest is answered."""
    directory = gateway.state.metrics_dir
    Exporter(Tally(opened=5), directory, "w0.1").flush()
    whole = (directory / "counter_w0.1.db").read_bytes()
    (directory / "counter_w1.1.db").write_bytes(b"")
    (directory / "counter_w2.1.db").write_bytes(whole[: len(whole) // 2])
    (directory / "histogram_w3.1.db").write_bytes(b"not ours at all")

    first = samples(await gateway.get("/metrics"))
    await trio.sleep(0.15)
    second = samples(await gateway.get("/metrics"))

    assert first["websocket_connections_opened_total",] == 5
    assert second["metrics_bad_files_total",] == 3
    assert {path.name for path in directory.glob("*.bad")} == {
        "counter_w1.1.db.bad",
        "counter_w2.1.db.bad",
        "histogram_w3.1.db.bad",
    }


@pytest.mark.parametrize(
    ("method", "path", "status", "title"),
    [
        ("GET", "/", 404, "Not Found"),
        ("GET", "/healthz/", 404, "Not Found"),
        ("GET", "//readyz", 404, "Not Found"),
        ("POST", "/healthz", 405, "Method Not Allowed"),
        ("DELETE", "/metrics", 405, "Method Not Allowed"),
        ("GET", "/" + "a" * 9000, 431, "Request Header Fields Too Large"),
    ],
)
async def test_everything_else_is_a_problem(
    shared: GatewayProcess, method: str, path: str, status: int, title: str
) -> None:
    """What is not offered is answered with problem details."""
    answer = await shared.get(path, method=method)

    assert answer.status == status
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert json.loads(answer.body) == {"type": "about:blank", "title": title, "status": status}
    assert ("Allow" in answer.headers) == (status == 405)


async def test_head_gets_no_body(shared: GatewayProcess) -> None:
    """HEAD is answered like GET, without the body."""
    answer = await shared.get("/healthz", method="HEAD")

    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["Content-Length"] == "15"


async def test_every_answer_is_for_this_moment_and_names_no_software(
    shared: GatewayProcess,
) -> None:
    """Nobody may keep an answer, guess at its type, or learn what serves it."""
    for path in ("/healthz", "/readyz", "/health", "/metrics", "/nothing"):
        headers = (await shared.get(path)).headers
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "Server" not in headers


async def test_the_callers_request_id_is_answered_and_logged(shared: GatewayProcess) -> None:
    """A decent ``X-Request-ID`` goes through; the log has it with the request, and no query."""
    answer = await shared.get("/nothing?token=s3cr3t", {"X-Request-ID": "trace-7/a"})
    made = await shared.get("/healthz", {"X-Request-ID": "a b"})

    assert answer.headers["X-Request-ID"] == "trace-7/a"
    assert re.fullmatch(r"[0-9a-f]{16}", made.headers["X-Request-ID"])
    await wait_until(lambda: "trace-7/a" in shared.log)
    (line,) = (line for line in log_lines(shared) if line.get("request_id") == "trace-7/a")
    assert (line["event"], line["method"], line["path"]) == ("request", "GET", "/nothing")
    assert (line["status"], line["process"], line["generation"]) == (404, "gateway", 1)
    assert "s3cr3t" not in shared.log


async def test_too_many_headers_are_refused(shared: GatewayProcess) -> None:
    """A head is measured also when it comes in one piece."""
    many = await shared.get("/healthz", {f"x-{number}": "1" for number in range(200)})
    large = await shared.get("/healthz", {f"x-{number}": "1" * 5000 for number in range(4)})

    assert (many.status, large.status) == (431, 431)


async def test_a_body_that_nobody_wants_holds_nothing(shared: GatewayProcess) -> None:
    """A request with a body in many pieces is answered and its connection ends."""
    chunks = b"1\r\nx\r\n" * 50
    head = b"POST /nothing HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"

    answers = [await shared.ask(head + chunks) for _ in range(3)]

    assert [answer.status for answer in answers] == [404, 404, 404]


async def test_websockets_are_not_served_here(shared: GatewayProcess) -> None:
    """An upgrade is refused before it happens."""
    answer = await shared.get(
        "/ws",
        {
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        },
    )

    assert answer.status == 403


@pytest.mark.parametrize("path", ["/readyz", "/health", "/metrics"])
async def test_many_at_once_cost_one_question(shared: GatewayProcess, path: str) -> None:
    """A hundred callers at once are answered soon, and the supervisor is asked a few times."""
    await settle(shared, "/readyz", 200)
    asked = shared.supervisor.asked
    durations: list[float] = []
    statuses: set[int] = set()

    async def call() -> None:
        began = trio.current_time()
        statuses.add((await shared.get(path)).status)
        durations.append(trio.current_time() - began)

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(call)

    assert statuses == {503 if path == "/health" else 200}
    assert sorted(durations)[98] < 1.5
    assert shared.supervisor.asked - asked < 25


async def test_a_broken_connection_ends_nobody_who_comes_later(gateway: GatewayProcess) -> None:
    """When a request breaks Hypercorn as a whole, it is started again and goes on."""
    for number in range(1, 4):
        async with await gateway.connect() as stream:
            await stream.send_all(POISON)
            await wait_until(lambda: gateway.log.count("is started again") == number)  # noqa: B023
        assert (await gateway.get("/healthz")).status == 200

    gateway.wait_beat(ready=True)
    gateway.drain(5.0)
    assert gateway.wait_exit() == 0


async def test_it_drains_when_told_to(gateway: GatewayProcess) -> None:
    """Not ready at once, still answering while that spreads, then a clean end."""
    await settle(gateway, "/readyz", 200)
    gateway.drain(5.0, propagation=0.5)
    beat = gateway.wait_beat(ready=False)
    answer = await gateway.get("/readyz")
    alive = await gateway.get("/healthz")

    assert gateway.wait_exit() == 0
    assert beat.why == "draining"
    assert (answer.status, alive.status) == (503, 200)
    assert json.loads(answer.body) == {"ready": False, "why": "draining"}
    assert not list(gateway.state.metrics_dir.glob("gauge_*"))
    assert log_lines(gateway)[-1]["event"] == "gateway ended"


async def test_haste_cuts_the_propagation_short(gateway: GatewayProcess) -> None:
    """A quick order during a slow drain ends it."""
    gateway.drain(60.0, propagation=50.0)
    gateway.wait_beat(ready=False)
    gateway.drain(5.0, quick=True)

    assert gateway.wait_exit() == 0


async def test_it_ends_with_its_supervisor(gateway: GatewayProcess) -> None:
    """The end of the control pair ends the gateway within moments."""
    gateway.desert()

    assert gateway.wait_exit(4.0) == 0


async def test_a_request_under_way_is_answered_before_the_end(gateway: GatewayProcess) -> None:
    """A drain waits for what it has begun."""
    gateway.supervisor.reply = None
    await trio.sleep(0.15)
    answers: list[Answer] = []

    async def ask() -> None:
        answers.append(await gateway.get("/readyz"))

    asked = gateway.supervisor.asked
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await wait_until(lambda: gateway.supervisor.asked > asked)
        gateway.drain(10.0)

    assert [answer.status for answer in answers] == [503]
    assert gateway.wait_exit() == 0


async def test_a_stuck_reader_cannot_hold_the_end(gateway: GatewayProcess) -> None:
    """Who asks a lot and reads nothing is cut off when the time is over."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", gateway.port))
        client.setblocking(False)
        client.send(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 900)
        await _until_quiet(gateway)
        began = time.monotonic()
        gateway.drain(2.0)

        code = gateway.wait_exit(6.0)

    assert code == 0
    assert time.monotonic() - began > 1.5
    assert log_lines(gateway)[-1]["event"] == "requests were cut off at the end"


async def _until_quiet(gateway: GatewayProcess) -> None:
    """Wait until it answers some of the requests, and then no more: the client's side is full."""
    with trio.fail_after(10.0):
        before, now = -1, 0
        while now == 0 or before != now:
            await trio.sleep(0.3)
            before, now = now, gateway.log.count('"path": "/metrics"')


async def test_its_successor_serves_on_the_same_socket(gateway: GatewayProcess) -> None:
    """A kill takes the request in hand; who comes next waits in the queue and is answered."""
    await settle(gateway, "/healthz", 200)
    before = samples(await gateway.get("/metrics"))
    gateway.supervisor.reply = None
    await trio.sleep(0.15)
    async with await gateway.connect() as cut, await gateway.connect() as waiting:
        await cut.send_all(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
        gateway.kill()
        late = await gateway.connect()
        await late.send_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        gateway.supervisor.reply = pool(worker(0), worker(1))
        gateway.start()
        gateway.wait_started()
        with trio.fail_after(10.0):
            async with late:
                answer = b"".join([part async for part in late])
        assert await _ended(cut)
        assert await _ended(waiting)
    after = samples(await gateway.get("/metrics"))

    assert answer.startswith(b"HTTP/1.1 200")
    counters = [name for name in before if name[0].endswith("_total") and "connections" not in name]
    assert [name for name in counters if after[name] < before[name]] == []
    assert after["http_requests_total", "/healthz", "200"] >= 2


async def _ended(stream: trio.SocketStream) -> bool:
    with trio.fail_after(5.0):
        try:
            return not await stream.receive_some()
        except trio.BrokenResourceError:
            return True


async def test_a_reload_hands_the_door_over(gateway: GatewayProcess) -> None:
    """The old generation stops at once, the new one answers, and counts of both are kept."""
    await settle(gateway, "/healthz", 200)
    gateway.drain(5.0)
    assert gateway.wait_exit() == 0
    gateway.start(generation=2)
    gateway.wait_started()

    await settle(gateway, "/healthz", 200)
    await settle(gateway, "/readyz", 200)
    seen = samples(await gateway.get("/metrics"))

    assert seen["http_requests_total", "/healthz", "200"] == 2
    names = {path.name for path in gateway.state.metrics_dir.iterdir()}
    assert {"counter_gateway.1.db", "counter_gateway.2.db"} <= names


async def test_settings_that_cannot_be_read_end_it_with_4(tmp_path: Path) -> None:
    """A snapshot that is none: exit code 4 and one line, no traceback."""
    process = GatewayProcess(tmp_path, NO_REDIS)
    process.snapshot = b"{"
    with process:
        code = process.wait_exit()

    assert code == 4
    assert "the gateway cannot run" in process.log
    assert "Traceback" not in process.log


async def test_a_listening_socket_that_is_none_ends_it_with_1(tmp_path: Path) -> None:
    """What nobody foresaw is one line with its traceback, and exit code 1."""
    process = GatewayProcess(tmp_path, NO_REDIS)
    process.listener.close()
    process.listener = socket.socket(socket.AF_UNIX)
    with process:
        code = process.wait_exit()

    assert code == 1
    assert log_lines(process)[-1]["event"] == "the gateway broke"


async def test_old_log_files_are_put_away(tmp_path: Path) -> None:
    """With LOG_DIR the gateway compresses what any process left there on earlier days."""
    log_dir = tmp_path / "logs"
    log_dir.mkdir()
    yesterday = dt.datetime.now(dt.UTC).date() - dt.timedelta(days=1)
    (log_dir / f"worker-0.{yesterday}.log").write_text("{}\n")

    with GatewayProcess(tmp_path / "gateway", attrs.evolve(NO_REDIS, log_dir=log_dir)) as process:
        process.wait_started()
        await wait_until((log_dir / f"worker-0.{yesterday}.log.gz").exists)

    assert not (log_dir / f"worker-0.{yesterday}.log").exists()


async def test_without_a_place_for_counts_it_serves(tmp_path: Path) -> None:
    """No metrics directory: that is logged, and everything else is answered."""
    process = GatewayProcess(tmp_path, NO_REDIS)
    process.state.metrics_dir.rmdir()
    with process:
        process.wait_started()
        ready = await settle(process, "/readyz", 200)
        page = await process.get("/metrics")

    assert ready.status == 200
    assert samples(page)["pool_ready",] == 1
    assert "counts are not kept" in process.log
