"""The board and the names of lives, with workers that are processes."""

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tests.supervisor.counting_child import CONNECTIONS, counted
from tests.supervisor.harness import Server, eventually
from trioserver.board_map import WAYS, BoardMap
from trioserver.status import BOARD_FD

Start = Callable[..., Server]

AT_ONCE = {"free_respawn": 0.0, "forget_deaths": 0.0}
"""Timing by which a dead worker is replaced in the moment of its reaping."""

NEVER = {"free_respawn": 60.0, "backoff": 60.0, "backoff_limit": 60.0}
"""Timing by which it is not replaced as long as a test takes."""


def counting(directory: Path) -> dict[str, list[str]]:
    """Return commands by which workers count."""
    program = [sys.executable, "-m", "tests.supervisor.counting_child"]
    return {"worker": [*program, str(directory), "worker"]}


def options(pid: int) -> dict[str, str]:
    """Return what a worker was started with."""
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return {word: words[n + 1] for n, word in enumerate(words) if word in {"--life", "--after"}}


def memory(pid: int) -> tuple[int, int]:
    """Return what tells the memory behind a worker's descriptor from every other one."""
    status = Path(f"/proc/{pid}/fd/{BOARD_FD}").stat()
    return status.st_dev, status.st_ino


def on_board(pid: int) -> tuple[int, int]:
    """Return how many connections and workers are on the board that a worker has."""
    fd = os.open(f"/proc/{pid}/fd/{BOARD_FD}", os.O_RDWR)
    try:
        return counted(fd)
    finally:
        os.close(fd)


def test_workers_share_the_board(start: Start, directory: Path) -> None:
    """What one counts the others see, under a descriptor that is the same memory."""
    server = start(commands=counting(directory))
    server.wait_ready()
    pids = [server.worker(0), server.worker(1)]

    assert memory(pids[0]) == memory(pids[1])
    assert [(2 * CONNECTIONS, 2)] * 2 == [on_board(pid) for pid in pids]


def test_a_successor_finds_nothing_of_a_killed_worker(start: Start, directory: Path) -> None:
    """Its counts are gone before anybody takes its place, and the newcomer learns its name."""
    server = start(commands=counting(directory), timing=AT_ONCE)
    server.wait_ready()
    victim = server.worker(0)
    name = options(victim)["--life"]
    os.kill(victim, signal.SIGKILL)
    eventually(server.replaced(0, victim))
    successor = server.worker(0)

    found = json.loads((directory / f"found-{options(successor)['--life']}").read_text())
    assert [CONNECTIONS, 1] == found
    assert name == options(successor)["--after"]
    assert (2 * CONNECTIONS, 2) == on_board(successor)


def test_counts_of_a_killed_worker_go_when_it_is_reaped(start: Start, directory: Path) -> None:
    """Nobody has to come first: a slot may stay empty for half a minute."""
    server = start(commands=counting(directory), timing=NEVER)
    server.wait_ready()
    os.kill(server.worker(0), signal.SIGKILL)
    eventually(lambda: server.status().workers[0].pid is None)

    assert (CONNECTIONS, 1) == on_board(server.worker(1))


def test_who_died_first_is_still_named(start: Start) -> None:
    """The one who should have told may have died before it could."""
    server = start(timing=AT_ONCE)
    server.wait_ready()
    names = []
    for slot in (0, 1, 0):
        victim = server.worker(slot)
        names.append(options(victim)["--life"])
        os.kill(victim, signal.SIGKILL)
        eventually(server.replaced(slot, victim))

    assert ",".join(names) == options(server.worker(0))["--after"]
    assert 3 == len(set(names))


def test_two_generations_count_on_one_board(start: Start, directory: Path) -> None:
    """As long as the old one drains, the limits are those of the server, not of a generation."""
    server = start(
        commands=counting(directory),
        behaviour={"worker": "stubborn"},
        settings={"drain_seconds": 60.0},
    )
    server.wait_ready()
    old = [server.worker(0), server.worker(1)]
    server.behave("worker", "good")
    server.new_settings(ws_max_connections=20_000)
    verdict = server.verdict("reload")
    new = [server.worker(0), server.worker(1)]

    assert verdict.ok
    assert {memory(old[0])} == {memory(pid) for pid in old + new}
    assert (4 * CONNECTIONS, 4) == on_board(new[0])
    assert 4 == len({options(pid)["--life"] for pid in old + new})
    # Those who drain live: nobody is told that they are gone.
    assert [{"--life"}] * 2 == [options(pid).keys() for pid in new]


def test_without_a_limit_there_is_room_for_many_addresses(start: Start) -> None:
    """Any number of connections is not none."""
    server = start(settings={"ws_max_connections": 0})
    server.wait_ready()
    with Path(f"/proc/{server.worker(0)}/fd/{BOARD_FD}").open("r+b") as file:
        board = BoardMap(file.fileno())
    addresses = 2 * WAYS * board.buckets
    board.close()

    assert addresses > 50_000


def test_without_memory_for_the_board_nothing_is_started(start: Start) -> None:
    """Limits that are the server's must not become those of each worker unseen."""
    server = start(under=("/bin/sh", "-c", 'ulimit -f 100; exec "$@"', "sh"))

    assert server.wait() == 4
    problem = "WS_MAX_CONNECTIONS: there is no memory to count so many connections: File too large"
    assert problem in server.log()
    assert "child spawned" not in server.log()


def test_each_start_has_a_higher_boot_of_the_same_server(start: Start) -> None:
    """So that everybody knows who is over, whether the one before was stopped or killed."""
    names = []
    for end in (signal.SIGKILL, signal.SIGINT, signal.SIGINT):
        server = start()
        server.wait_ready()
        names.append(options(server.worker(0))["--life"])
        server.signal(end)
        server.wait()

    parts = [re.fullmatch(r"([0-9a-f]{8})\.([0-9a-f]+)\.\d+", name) for name in names]
    servers = {part[1] for part in parts if part}
    boots = [int(part[2], 16) for part in parts if part]
    assert (1, 3) == (len(servers), len(boots))
    assert boots == sorted(set(boots))


def test_the_worker_takes_its_name(start: Start) -> None:
    """The real one lives under the name that it was given, and tells it to the log."""
    commands = {"worker": [sys.executable, "-P", "-m", "trioserver.worker"]}
    settings = {"workers": 1, "jwt_secret_key": "a-secret-for-tests-a-secret-for-tests"}
    server = start(commands=commands, settings=settings)
    eventually(lambda: len(server.events("worker started")) == 1)
    victim = server.worker(0)
    name = options(victim)["--life"]
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: len(server.events("worker started")) == 2)

    lives = [event["life"] for event in server.events("worker started")]
    assert [name, options(server.worker(0))["--life"]] == lives
    assert name == options(server.worker(0))["--after"]
