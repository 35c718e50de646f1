"""How many users there are over all workers and servers, whoever is killed meanwhile."""

import contextlib
import json
import os
import signal
from pathlib import Path
from typing import Any, Final

import pytest

from tests.integration.clients import PATIENCE, client
from tests.redis_server import RedisServer
from tests.running import Running, eventually, running
from trioserver import fleet

DEAD_SECONDS: Final = 2 * fleet.LEASE_SECONDS
"""So long those who were killed may count."""

WORN_SECONDS: Final = 2 * fleet.RENEW_SECONDS
"""So long those who have left a small worker may count, beside what takes a moment."""


def users(server: Running) -> int:
    """Return how many there are, as ``/health`` has it; the metric says the same soon."""
    return int(json.loads(server.get("/health")[1])["websocket"]["total_unique_users"])


def are(server: Running, expected: int, seconds: float = PATIENCE) -> None:
    """Wait until there are so many."""
    eventually(lambda: users(server) == expected, seconds, f"{expected} users")


def pids(server: Running) -> list[int]:
    """Return all processes of a server but its Redis: the supervisor is the first."""
    status: dict[str, Any] | None = server.status()
    assert status is not None
    parts = (status["gateway"], *status["workers"])
    return [server.process.pid, *(part["pid"] for part in parts)]


@pytest.mark.slow
def test_users_of_a_server(tmp_path: Path) -> None:
    """Each counts once, wherever he is connected; until he leaves, or his worker is killed."""
    with (
        running(tmp_path / "server", workers=2) as server,
        contextlib.ExitStack() as inside,
    ):
        for number in range(8):
            inside.enter_context(client(server, f"user-{number % 4}"))
        are(server, 4)
        with client(server, "late"):
            are(server, 5)
        are(server, 4, PATIENCE + WORN_SECONDS)
        *_, victim = pids(server)
        os.kill(victim, signal.SIGKILL)
        inside.close()
        are(server, 0, PATIENCE + DEAD_SECONDS)


@pytest.mark.slow
def test_users_of_a_server_that_is_gone(tmp_path: Path) -> None:
    """With its whole machine, without a word: they count no more within two leases."""
    with RedisServer(tmp_path / "redis") as redis:
        environ = {"REDIS_URL": redis.unix_url}
        with (
            running(tmp_path / "here", workers=1, environ=environ) as here,
            running(tmp_path / "there", workers=1, environ=environ) as there,
            client(here, "ann"),
            contextlib.ExitStack() as inside,
        ):
            for user in ("ann", "bob", "cat"):
                inside.enter_context(client(there, user))
            are(here, 3)
            are(there, 3)
            for pid in pids(there):
                os.kill(pid, signal.SIGKILL)
            are(here, 1, DEAD_SECONDS)
