"""The gateway as a process: what it answers, what it survives, and how it ends."""

import datetime as dt
import json
import os
import re
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import attrs
import msgspec
import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from tests.redis_server import RedisServer, wait_until
from tests.trioserver.gateway_process import Answer, GatewayProcess, pool, worker
from trioserver import fleet, response_heads, users
from trioserver.gateway.pool_metrics import POOL_FAMILIES
from trioserver.gateway.scrape import Scraper
from trioserver.metrics import FAMILIES, Exporter, Tally
from trioserver.settings import Settings

# Nothing is there: a closed port refuses at once.
NO_REDIS = Settings(redis_url="redis://127.0.0.1:1/0", logger_encoding="json", log_level="debug")

TIMESTAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"


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

    assert 200 == answer.status
    assert {"status": "ok"} == json.loads(answer.body)
    assert (0, "") == (beat.connections, beat.why)


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

    assert {"ready": True} == json.loads(ready.body)
    assert {
        "ready": False,
        "why": "worker 0: canary late; worker 1: not there",
    } == json.loads(missing.body)
    assert {"ready": False, "why": "draining"} == json.loads(draining.body)


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
    assert 200 == alive.status
    for answer in (hung, gone):
        assert "the supervisor does not answer" == json.loads(answer.body)["why"]
    complaints = [line for line in log_lines(gateway) if "does not answer" in str(line["event"])]
    assert 1 == len(complaints)


def let_live(redis: RedisServer, *names: str) -> None:
    """Have a worker live somewhere, with these users."""
    redis.command("ZADD", fleet.LIVES_KEY, int(time.time() * 1000) + 60_000, "elsewhere.1.1")
    redis.command("PFADD", users.key("elsewhere.1.1"), *names)


async def settle_users(
    process: GatewayProcess, path: str, status: int, expected: int
) -> dict[str, Any]:
    """Return the first body with that status and that many users; fails if none comes in time."""
    with trio.fail_after(5.0):
        while True:
            body = json.loads((await settle(process, path, status)).body)
            if body["websocket"]["total_unique_users"] == expected:
                return cast("dict[str, Any]", body)
            await trio.sleep(0.02)


async def test_the_users_of_the_fleet_are_a_metric(tmp_path: Path) -> None:
    """On both pages, and within seconds of what Redis knows."""
    with RedisServer(tmp_path / "redis") as redis:
        settings = attrs.evolve(NO_REDIS, redis_url=redis.unix_url)
        with GatewayProcess(tmp_path / "gateway", settings) as process:
            process.wait_started()
            for names in (["ann"], ["bob", "cat"]):
                let_live(redis, *names)
                number = 2 * len(names) - 1
                with trio.fail_after(5.0):
                    while True:
                        seen = samples(await process.get("/metrics"))
                        if seen["unique_users",] == number:
                            break
                        await trio.sleep(0.02)
            page = json.loads((await process.get("/metrics", {"Accept": "application/json"})).body)
    assert 3 == page["connections"]["total_unique_users"]


async def test_health_has_exactly_the_known_shape(tmp_path: Path) -> None:
    """With Redis healthy, without it degraded; users of the whole fleet, or then of the pool."""
    with RedisServer(tmp_path / "redis") as redis:
        let_live(redis, "ann", "bob", "cat")
        settings = attrs.evolve(NO_REDIS, redis_url=redis.unix_url)
        with GatewayProcess(tmp_path / "gateway", settings) as process:
            metrics_dir = process.state.metrics_dir
            exporters = [
                Exporter(Tally(connections=9, users=number), metrics_dir, f"w{number}.1")
                for number in (3, 4)
            ]
            for exporter in exporters:
                exporter.flush()
            process.supervisor.reply = pool(worker(0, connections=5), worker(1, connections=7))
            process.wait_started()
            healthy = await settle_users(process, "/health", 200, 3)
            redis.kill()
            degraded = await settle_users(process, "/health", 503, 7)
            redis.start()
            await settle(process, "/health", 200)
            process.supervisor.reply = pool(worker(0, ready=False), ready=False)
            await settle(process, "/health", 503)

    assert re.fullmatch(TIMESTAMP, healthy.pop("timestamp"))
    assert 0 <= healthy["redis"].pop("ping_ms") < 1000
    assert {
        "status": "healthy",
        "redis": {"status": "connected"},
        "websocket": {"active_connections": 12, "total_unique_users": 3},
        "uptime_seconds": 3600,
    } == healthy
    assert "degraded" == degraded["status"]
    assert {"status", "error"} == degraded["redis"].keys()
    assert "disconnected" == degraded["redis"]["status"]


async def test_names_and_types_of_a_scrape(shared: GatewayProcess) -> None:
    """A page has every metric of the table, and what only the supervisor knows, and no more."""
    await settle(shared, "/readyz", 200)
    page = await shared.get("/metrics")

    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", page.body.decode(), re.MULTILINE))
    assert {family.name: family.type for family in (*FAMILIES, *POOL_FAMILIES)} == types
    assert "gauge" == types["websocket_connections_total"]
    assert "text/plain; version=0.0.4; charset=utf-8" == page.headers["Content-Type"]


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

    assert 2 == seen["websocket_connections",]
    assert 2 == seen["websocket_connections_total",]
    assert 2 == seen["active_connections",]
    assert 7 == seen["outbox_bytes",]
    assert 11 == seen["websocket_connections_opened_total",]
    assert 0 == seen["websocket_connection_duration_seconds_count",]
    assert seen["http_requests_total", "/readyz", "200"] >= 1
    assert (1, 0) == (seen["worker_up", "0"], seen["worker_up", "1"])
    assert (1, 0) == (seen["worker_ready", "0"], seen["worker_ready", "1"])
    assert 1 == seen["worker_restarts_total", "1"]
    assert (1, 0) == (seen["pool_ready",], seen["redis_up",])


async def test_processes_are_measured_from_outside(gateway: GatewayProcess) -> None:
    """Processor time, memory and descriptors of whoever has a role, by role, and of nobody else."""
    ours = msgspec.structs.replace(worker(0), pid=os.getpid())
    gone = msgspec.structs.replace(worker(1), pid=None)
    strange = msgspec.structs.replace(worker(2), pid=1 << 22)  # beyond every pid there can be
    gateway.supervisor.reply = pool(ours, gone, strange)
    await settle(gateway, "/readyz", 200)

    seen = samples(await gateway.get("/metrics"))

    roles = {labels[0] for name, *labels in seen if name == "process_cpu_seconds_total"}
    assert {"worker-0", "supervisor"} == roles - {"gateway", "redis"}
    resident, fds, seconds = own_usage()
    assert resident == pytest.approx(seen["process_resident_memory_bytes", "worker-0"], rel=0.1)
    assert fds == pytest.approx(seen["process_open_fds", "worker-0"], abs=5)
    assert seconds == pytest.approx(seen["process_cpu_seconds_total", "worker-0"], abs=1)


def own_usage() -> tuple[int, int, float]:
    """Return this process's resident bytes, open descriptors and processor seconds."""
    status = Path("/proc/self/status").read_text()
    resident = int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) << 10
    used = resource.getrusage(resource.RUSAGE_SELF)
    return resident, len(list(Path("/proc/self/fd").iterdir())), used.ru_utime + used.ru_stime


async def test_a_ping_of_the_past_is_not_shown(tmp_path: Path) -> None:
    """While Redis is down ``redis_ping_seconds`` is 0, as ``redis_up`` is; later it is back."""
    with RedisServer(tmp_path / "redis") as redis:
        settings = attrs.evolve(NO_REDIS, redis_url=redis.unix_url)
        with GatewayProcess(tmp_path / "gateway", settings) as process:
            process.wait_started()
            answered = 0.0
            for up, change in ((True, redis.kill), (False, redis.start), (True, redis.kill)):
                with trio.fail_after(5.0):
                    while True:
                        seen = samples(await process.get("/metrics"))
                        if bool(seen["redis_up",]) == up and (
                            not up or seen["redis_latency_seconds_count",] > answered
                        ):
                            break
                        await trio.sleep(0.02)
                assert up == (seen["redis_ping_seconds",] > 0)
                answered = seen["redis_latency_seconds_count",]
                change()


async def test_what_retired_generations_left_is_folded(tmp_path: Path) -> None:
    """The gateway puts away the files of generations that no longer serve; their counts stay."""
    process = GatewayProcess(tmp_path, NO_REDIS)
    directory = process.state.metrics_dir
    for generation in range(1, 4):
        Exporter(Tally(opened=1, connections=1), directory, f"w0.{generation}").flush()
    process.supervisor.reply = msgspec.structs.replace(pool(worker(0)), generation=3)
    with process:
        process.wait_started()
        await wait_until(lambda: not list(directory.glob("*_w0.[12].db")))
        seen = samples(await process.get("/metrics"))

    assert 3 == seen["websocket_connections_opened_total",]
    assert (directory / "counter_w0.3.db").exists()


async def test_metrics_as_json_have_exactly_the_known_shape(gateway: GatewayProcess) -> None:
    """Who asks for JSON gets the shape that dashboards know."""
    tally = Tally(users=2, redis_messages=56789, failed=12)
    tally.notifications_delivered["ephemeral"] = 67890
    exporter = Exporter(tally, gateway.state.metrics_dir, "w0.1")
    exporter.flush()
    gateway.supervisor.reply = pool(worker(0, connections=4))

    page = await gateway.get("/metrics", {"Accept": "application/json"})

    body = json.loads(page.body)
    assert "application/json" == page.headers["Content-Type"]
    assert re.fullmatch(TIMESTAMP, body.pop("timestamp"))
    assert {
        "service": "trioserver",
        "uptime_seconds": 3600,
        "connections": {"active": 4, "total_unique_users": 2},
        "messages": {"received_from_redis": 56789, "sent_to_clients": 67890, "failed": 12},
    } == body


async def test_a_bad_metric_file_does_not_fail_a_scrape(gateway: GatewayProcess) -> None:
    """Empty, torn and foreign files are set aside and counted; the rest is answered."""
    directory = gateway.state.metrics_dir
    Exporter(Tally(opened=5), directory, "w0.1").flush()
    whole = (directory / "counter_w0.1.db").read_bytes()
    (directory / "counter_w1.1.db").write_bytes(b"")
    (directory / "counter_w2.1.db").write_bytes(whole[: len(whole) // 2])
    (directory / "histogram_w3.1.db").write_bytes(b"not ours at all")

    page = await gateway.get("/metrics")
    with trio.fail_after(5.0):
        while True:  # the page that noticed the bad files was made of what was before
            if samples(await gateway.get("/metrics"))["metrics_bad_files_total",] == 3:
                break

    assert 200 == page.status
    assert 5 == samples(page)["websocket_connections_opened_total",]
    assert {
        "counter_w1.1.db.bad",
        "counter_w2.1.db.bad",
        "histogram_w3.1.db.bad",
    } == {path.name for path in directory.glob("*.bad")}


@pytest.mark.parametrize(
    ("method", "path", "status", "title"),
    [
        ("GET", "/", 404, "Not Found"),
        ("GET", "/healthz/", 404, "Not Found"),
        ("GET", "//readyz", 404, "Not Found"),
        ("POST", "/healthz", 405, "Method Not Allowed"),
        ("DELETE", "/metrics", 405, "Method Not Allowed"),
    ],
)
async def test_everything_else_is_a_problem(
    shared: GatewayProcess, method: str, path: str, status: int, title: str
) -> None:
    """What is not offered is answered with problem details."""
    answer = await shared.get(path, method=method)

    assert answer.status == status
    assert "application/problem+json" == answer.headers["Content-Type"]
    assert {"type": "about:blank", "title": title, "status": status} == json.loads(answer.body)
    assert ("Allow" in answer.headers) == (status == 405)


async def test_head_gets_no_body(shared: GatewayProcess) -> None:
    """HEAD is answered like GET, without the body."""
    answer = await shared.get("/healthz", method="HEAD")

    assert (200, b"") == (answer.status, answer.body)
    assert "15" == answer.headers["Content-Length"]


async def test_every_answer_is_for_this_moment_and_names_no_software(
    shared: GatewayProcess,
) -> None:
    """Nobody may keep an answer, run it, show it in a frame, or learn what serves it."""
    answers = [
        await shared.get(path)
        for path in ("/healthz", "/readyz", "/health", "/metrics", "/nothing", "/api/v1/x")
    ]
    answers += [
        await shared.post("/healthz", b"{}"),
        await shared.post("/api/v1/notifications", b"{}"),
        await shared.get("/healthz", {"X": "a\x01b"}),
        await shared.get("/" + "a" * 9000),
    ]
    for answer in answers:
        for name, value in response_heads.HEADERS.items():
            assert [value] == answer.headers.get_all(name)
        assert re.fullmatch(r"[0-9a-f]{16}", answer.headers["X-Request-ID"])
        assert "Server" not in answer.headers
        assert "Strict-Transport-Security" not in answer.headers
    assert {200, 400, 401, 404, 405, 431, 503} == {answer.status for answer in answers}


async def test_the_callers_request_id_is_answered_and_logged(shared: GatewayProcess) -> None:
    """A decent ``X-Request-ID`` goes through; the log has it with the request, and no query."""
    answer = await shared.get("/nothing?token=s3cr3t", {"X-Request-ID": "trace-7/a"})
    refused = await shared.get("/nothing", {"X-Request-ID": "trace-8", "Bad ": "x"})
    made = await shared.get("/healthz", {"X-Request-ID": "a b"})

    assert "trace-7/a" == answer.headers["X-Request-ID"]
    assert (400, "trace-8") == (refused.status, refused.headers["X-Request-ID"])
    assert re.fullmatch(r"[0-9a-f]{16}", made.headers["X-Request-ID"])
    await wait_until(lambda: "trace-7/a" in shared.log and "trace-8" in shared.log)
    (line,) = (line for line in log_lines(shared) if line.get("request_id") == "trace-7/a")
    assert ("request", "GET", "/nothing") == (line["event"], line["method"], line["path"])
    assert (404, "gateway", 1) == (line["status"], line["process"], line["generation"])
    assert "s3cr3t" not in shared.log


async def test_too_many_headers_are_refused(shared: GatewayProcess) -> None:
    """A head is measured also when it comes in one piece."""
    many = await shared.get("/healthz", {f"x-{number}": "1" for number in range(200)})
    large = await shared.get("/healthz", {f"x-{number}": "1" * 5000 for number in range(4)})

    for answer in (many, large):
        assert 431 == answer.status
        assert "application/problem+json" == answer.headers["Content-Type"]


async def test_a_body_that_nobody_wants_holds_nothing(shared: GatewayProcess) -> None:
    """A request with a body in many pieces is answered and its connection ends."""
    chunks = b"1\r\nx\r\n" * 50
    head = b"POST /nothing HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"

    answers = [await shared.ask(head + chunks) for _ in range(3)]

    assert [404, 404, 404] == [answer.status for answer in answers]


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

    assert 403 == answer.status


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

    assert {503 if path == "/health" else 200} == statuses
    assert sorted(durations)[98] < 1.5
    assert shared.supervisor.asked - asked < 25


async def test_it_drains_when_told_to(gateway: GatewayProcess) -> None:
    """Not ready at once, still answering while that spreads, then a clean end."""
    await settle(gateway, "/readyz", 200)
    gateway.drain(5.0, propagation=0.5)
    beat = gateway.wait_beat(ready=False)
    answer = await gateway.get("/readyz")
    alive = await gateway.get("/healthz")

    assert 0 == gateway.wait_exit()
    assert "draining" == beat.why
    assert (503, 200) == (answer.status, alive.status)
    assert {"ready": False, "why": "draining"} == json.loads(answer.body)
    assert not list(gateway.state.metrics_dir.glob("gauge_live*"))
    assert "gateway ended" == log_lines(gateway)[-1]["event"]


async def test_haste_cuts_the_propagation_short(gateway: GatewayProcess) -> None:
    """A quick order during a slow drain ends it."""
    gateway.drain(60.0, propagation=50.0)
    gateway.wait_beat(ready=False)
    gateway.drain(5.0, quick=True)

    assert 0 == gateway.wait_exit()


async def test_it_ends_with_its_supervisor(gateway: GatewayProcess) -> None:
    """The end of the control pair ends the gateway within moments."""
    gateway.desert()

    assert 0 == gateway.wait_exit(4.0)


async def test_a_request_under_way_is_answered_before_the_end(gateway: GatewayProcess) -> None:
    """A drain waits for what it has begun."""
    gateway.supervisor.reply = None
    asked = gateway.supervisor.asked
    answers: list[Answer] = []

    async def ask() -> None:
        answers.append(await gateway.get("/readyz"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await wait_until(lambda: gateway.supervisor.asked > asked)
        gateway.drain(10.0)

    assert [503] == [answer.status for answer in answers]
    assert 0 == gateway.wait_exit()


async def test_a_stuck_reader_cannot_hold_the_end(gateway: GatewayProcess) -> None:
    """Who asks a lot and reads nothing is cut off when half of the time is over."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", gateway.port))
        client.setblocking(False)
        client.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 900)
        await _until_quiet(gateway)
        began = time.monotonic()
        gateway.drain(2.0)

        code = gateway.wait_exit(6.0)

    assert 0 == code
    assert 0.9 < time.monotonic() - began
    assert "gateway ended" == log_lines(gateway)[-1]["event"]


async def _until_quiet(gateway: GatewayProcess) -> None:
    """Wait until it has answered requests, and for 0.3 s no more: what it can send is sent."""
    answered, since = 0, trio.current_time()

    def quiet() -> bool:
        nonlocal answered, since
        now = gateway.log.count('"path": "/healthz"')
        if now != answered:
            answered, since = now, trio.current_time()
        return answered > 0 and trio.current_time() > since + 0.3

    await wait_until(quiet, 10.0)


async def test_its_successor_serves_on_the_same_socket(gateway: GatewayProcess) -> None:
    """A kill takes the request in hand; who comes next waits in the queue and is answered."""
    directory = gateway.state.metrics_dir
    await gateway.get("/healthz")
    await wait_until(lambda: Scraper(directory).scrape().total("http_requests_total"))
    gateway.supervisor.reply = None
    asked = gateway.supervisor.asked
    async with await gateway.connect() as cut:
        await cut.send_all(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
        await wait_until(lambda: gateway.supervisor.asked > asked)
        gateway.kill()
        async with await gateway.connect() as late:
            await late.send_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            gateway.start()
            with trio.fail_after(10.0):
                answer = b"".join([part async for part in late])
        assert await _ended(cut)
    gateway.supervisor.reply = pool(worker(0))
    after = samples(await gateway.get("/metrics"))

    assert answer.startswith(b"HTTP/1.1 200")
    assert 2 == after["http_requests_total", "/healthz", "200"]


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
    assert 0 == gateway.wait_exit()
    gateway.start(generation=2)
    gateway.wait_started()

    await settle(gateway, "/healthz", 200)
    await settle(gateway, "/readyz", 200)
    seen = samples(await gateway.get("/metrics"))

    assert 2 == seen["http_requests_total", "/healthz", "200"]
    names = {path.name for path in gateway.state.metrics_dir.iterdir()}
    assert {"counter_gateway.1.db", "counter_gateway.2.db"} <= names


async def test_settings_that_cannot_be_read_end_it_with_4(tmp_path: Path) -> None:
    """A snapshot that is none: exit code 4 and one line, no traceback."""
    process = GatewayProcess(tmp_path, NO_REDIS)
    process.snapshot = b"{"
    with process:
        code = process.wait_exit()

    assert 4 == code
    assert "the process cannot run" in process.log
    assert "child=gateway" in process.log
    assert "Traceback" not in process.log


async def test_a_listening_socket_that_is_none_ends_it_with_1(tmp_path: Path) -> None:
    """What nobody foresaw is one line with its traceback, and exit code 1."""
    process = GatewayProcess(tmp_path, NO_REDIS)
    process.listener.close()
    process.listener = socket.socket(socket.AF_UNIX)
    with process:
        code = process.wait_exit()

    assert 1 == code
    assert "the process broke" == log_lines(process)[-1]["event"]


async def test_old_log_files_are_put_away(tmp_path: Path) -> None:
    """With LOG_DIR the gateway compresses what any process left there on earlier days."""
    log_dir = tmp_path / "logs"
    log_dir.mkdir()
    yesterday = dt.datetime.now(dt.UTC).date() - dt.timedelta(days=1)
    left = log_dir / f"worker-0.{yesterday}.log"
    left.write_text("{}\n")

    with GatewayProcess(tmp_path / "gateway", attrs.evolve(NO_REDIS, log_dir=log_dir)) as process:
        process.wait_started()
        await wait_until(lambda: not left.exists())

    assert (log_dir / f"worker-0.{yesterday}.log.gz").exists()


async def test_without_a_place_for_counts_it_serves(tmp_path: Path) -> None:
    """No metrics directory: that is logged, and everything else is answered."""
    process = GatewayProcess(tmp_path, NO_REDIS)
    process.state.metrics_dir.rmdir()
    with process:
        process.wait_started()
        ready = await settle(process, "/readyz", 200)
        page = await process.get("/metrics")

    assert 200 == ready.status
    assert 1 == samples(page)["pool_ready",]
    assert "counts are not kept" in process.log


async def test_schemas_that_broke_meanwhile_stop_publishing_and_nothing_else(
    tmp_path: Path,
) -> None:
    """Started anew, it answers monitors and says why it publishes nothing; once, in the log."""
    schemas = tmp_path / "schemas.json"
    schemas.write_text('{"order": ')
    key = "k" * 40
    settings = attrs.evolve(NO_REDIS, payload_schemas=schemas, api_keys=(key,))
    with GatewayProcess(tmp_path, settings) as process:
        process.wait_started()
        alive = await process.get("/healthz")
        body = b'{"to": {"user": "a"}, "payload": 1, "type": "other"}'
        answers = [
            await process.post("/api/v1/notifications", body, {"X-API-Key": one})
            for one in (key, key, "wrong")
        ]

    assert 200 == alive.status
    assert [503, 503, 401] == [answer.status for answer in answers]
    assert "60" == answers[0].headers["Retry-After"]
    assert "PAYLOAD_SCHEMAS" in json.loads(answers[0].body)["detail"]
    errors = [line for line in log_lines(process) if line["level"] == "error"]
    assert ["nothing can be published"] == [line["event"] for line in errors]
    assert "is not JSON" in str(errors[0]["problem"])
