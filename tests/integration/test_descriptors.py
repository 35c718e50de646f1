"""Descriptors run out: who comes is refused in time, nothing spins, Redis has its own."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.integration.crowds import Crowd, Visit
from tests.integration.measuring import Usage, address
from tests.redis_server import RedisServer
from tests.running import Running, eventually
from trioserver import fleet

DESCRIPTORS: Final = 256
STANDSTILL: Final = 2.0
SECONDS: Final = 20.0
"""For what takes a moment."""

USER: Final = "ann"
CHANNEL: Final = f"user_noti:{USER}"


class Tight(Running):
    """A server that may not have many files open, nor raise that limit."""

    @staticmethod
    def command() -> list[str]:
        """Return the command, below a limit that nobody lifts any more."""
        limit = (
            "import os, resource, sys; "
            f"resource.setrlimit(resource.RLIMIT_NOFILE, ({DESCRIPTORS}, {DESCRIPTORS})); "
            "os.execv(sys.argv[1], sys.argv[1:])"
        )
        return [sys.executable, "-c", limit, *Running.command()]


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One whose connections can be cut."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as started:
        yield started


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, redis: RedisServer) -> Iterator[Running]:
    """One worker that lives through all of it without a traceback."""
    environ = {
        "REDIS_URL": redis.url,
        "MAX_CONNECTIONS_PER_USER": "0",
        "HANDSHAKES_PER_SECOND": "0",
    }
    started = Tight(tmp_path_factory.mktemp("server"), 1, environ)
    try:
        started.wait_ready()
        pid = Usage.of_worker(started).pid
        yield started
        assert pid == Usage.of_worker(started).pid
        assert "Traceback" not in started.log
    finally:
        started.end(signal.SIGINT)


@pytest.fixture
def usage(server: Running) -> Usage:
    """What the worker uses."""
    return Usage.of_worker(server)


@pytest.fixture
def crowd(server: Running, usage: Usage) -> Iterator[Crowd]:
    """Nobody yet; nobody any more afterwards."""
    before = usage.descriptors()
    with Crowd(address(server)) as visitors:
        yield visitors
    eventually(lambda: usage.descriptors() <= before + 5, SECONDS, "descriptors are given back")


def links(redis: RedisServer) -> set[str]:
    """Return the connections that the worker has to Redis."""
    reply = redis.command("CLIENT", "LIST")
    assert isinstance(reply, bytes)
    lines = [line for line in reply.decode().splitlines() if "name=trioserver-" in line]
    return {line.split(" ", 1)[0] for line in lines if "trioserver-gateway" not in line}


def warnings(server: Running) -> list[dict[str, Any]]:
    """Return what was logged about sockets that cannot be accepted."""
    lines = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == "cannot accept"]


def tell(redis: RedisServer, crowd: Crowd, number: int) -> None:
    """Publish something, until one of a crowd has got it."""
    message = json.dumps({"type": "told", "payload": number})

    def told() -> bool:
        return any(one["payload"] == number for one in visitor.messages if one["type"] == "told")

    visitor = crowd.staying[0]
    limit = time.monotonic() + SECONDS
    while not told():
        assert time.monotonic() < limit, "nothing arrives"
        redis.command("PUBLISH", CHANNEL, message)
        crowd.listen(0.1)


def test_before_descriptors_run_out_newcomers_are_refused_with_503(
    server: Running, usage: Usage, crowd: Crowd
) -> None:
    """Everybody has an answer; the last descriptors are not for clients; nothing spins."""
    come = crowd.come([Visit(user=USER)] * (DESCRIPTORS + 20), SECONDS)
    assert {101, 503} == {one.status for one in come}
    assert DESCRIPTORS // 2 < len(crowd.staying) < DESCRIPTORS
    assert usage.descriptors() < DESCRIPTORS
    assert [] == warnings(server)
    before = usage.cpu_seconds()
    crowd.wait(_passed(STANDSTILL), "time goes by", STANDSTILL + 1)
    assert usage.cpu_seconds() - before < 0.1 * STANDSTILL
    # As soon as there is room, it is given away.
    crowd.leave(crowd.staying[:10])
    crowd.wait(_lets_in(crowd), "somebody is let in", SECONDS)


def test_a_full_server_still_reaches_redis(redis: RedisServer, usage: Usage, crowd: Crowd) -> None:
    """Connections that Redis has cut are opened again, although nobody is let in any more."""
    come = crowd.come([Visit(user=USER)] * (DESCRIPTORS + 20), SECONDS)
    assert 503 in {one.status for one in come}
    tell(redis, crowd, 1)
    before = links(redis)
    for kind in ("normal", "pubsub"):
        redis.command("CLIENT", "KILL", "TYPE", kind)

    eventually(lambda: not links(redis) & before, SECONDS, "they are cut")
    tell(redis, crowd, 2)
    # That was the subscription. What the worker says itself arrives as well.
    known = redis.command("HLEN", fleet.key(USER))
    crowd.leave(crowd.staying[:1])
    eventually(lambda: redis.command("HLEN", fleet.key(USER)) != known, SECONDS, "it has said so")
    assert usage.descriptors() < DESCRIPTORS


def test_when_there_is_no_descriptor_at_all_clients_wait_in_the_queue(
    server: Running, usage: Usage, crowd: Crowd
) -> None:
    """One line in the log, no processor time, and whoever waited is served as soon as it goes."""
    crowd.come([Visit(user=USER)])
    before = len(warnings(server))
    # The limit sinks to what is open: as if all others had been taken at one blow.
    taken = {int(name) for name in os.listdir(f"/proc/{usage.pid}/fd")}  # noqa: PTH208
    free = min(set(range(DESCRIPTORS)) - taken)
    resource.prlimit(usage.pid, resource.RLIMIT_NOFILE, (free, DESCRIPTORS))
    try:
        waiting = crowd.send([Visit(user=USER)] * 20)
        eventually(lambda: len(warnings(server)) > before, SECONDS, "it is logged")
        spent = usage.cpu_seconds()
        crowd.wait(_passed(STANDSTILL), "time goes by", STANDSTILL + 1)
        assert usage.cpu_seconds() - spent < 0.1 * STANDSTILL
        assert not any(one.judged for one in waiting)
        assert before + 1 == len(warnings(server))
    finally:
        resource.prlimit(usage.pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    crowd.wait(lambda: all(one.established for one in waiting), "all are served", SECONDS)


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("error", ["ENFILE", "ECONNABORTED", "ENOBUFS"])
def test_what_the_kernel_says_about_one_client_does_not_end_the_door(
    server: Running, usage: Usage, crowd: Crowd, tmp_path: Path, error: str
) -> None:
    """Errors of accept(2) cost at most a pause and a line; the door goes on by itself."""
    before = len(warnings(server))
    spent = usage.cpu_seconds()
    with _injecting(usage.pid, error, tmp_path / "trace") as injected:
        come = crowd.send([Visit(user=USER)] * 5)
        eventually(lambda: injected() >= 3, SECONDS, "it has happened")
        crowd.wait(lambda: all(one.established for one in come), "all are served", SECONDS)
    assert len(warnings(server)) <= before + 1
    assert usage.cpu_seconds() - spent < 1.0
    assert {101} == {one.status for one in crowd.come([Visit(user=USER)] * 5)}


@contextlib.contextmanager
def _injecting(pid: int, error: str, trace: Path) -> Iterator[Any]:
    """Have every other accept(2) of a process fail; gives how many have."""
    command = ["strace", "-f", "-p", str(pid), "-o", str(trace), "-e", "trace=accept4"]
    command += ["-e", f"inject=accept4:error={error}:when=1+2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        try:
            assert tracer.stderr is not None
            said = tracer.stderr.readline()
            if "attached" not in said:
                pytest.skip(f"strace may not attach here: {said}")
            yield lambda: len(re.findall(f"{error}.*INJECTED", trace.read_text()))
        finally:
            tracer.send_signal(signal.SIGINT)
            tracer.wait(SECONDS)


def _passed(seconds: float) -> Any:
    """Return a condition that is true in so many seconds."""
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until


def _lets_in(crowd: Crowd) -> Any:
    """Return a condition: that somebody new is let in. Asks again and again."""
    return lambda: crowd.come([Visit(user=USER)])[0].status == 101
