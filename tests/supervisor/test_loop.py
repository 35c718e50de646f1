"""The supervisor as a process, with children that are processes."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.supervisor.harness import Server, alive, eventually, open_fds

Start = Callable[..., Server]

AT_ONCE = {"free_respawn": 0.0, "forget_deaths": 0.0}
"""Timing by which every death is the first one of a healthy child."""


def address_of(text: str) -> tuple[str, int]:
    """Return host and port."""
    host, _, port = text.rpartition(":")
    return host, int(port)


# --- start and stop ------------------------------------------------------------------------------


def test_it_says_once_when_everything_is_ready(start: Start) -> None:
    """One friendly line on standard output, with addresses one can use."""
    server = start(settings={"ws_host": "0.0.0.0"})
    line = server.wait_ready()
    status = server.status()

    expected = (
        r"trioserver is ready: ws://127\.0\.0\.1:(\d+)/ws  "
        r"\(2 workers, Redis redis://127\.0\.0\.1:1/0, internal http://(127\.0\.0\.1:\d+), "
        r"\d+\.\d s\)\n"
    )
    match = re.fullmatch(expected, line)
    assert match is not None, line
    assert (status.address, status.admin_address) == (f"0.0.0.0:{match[1]}", match[2])
    assert (status.ready, status.pid, status.generation) == (True, server.pid, 1)
    assert [worker.slot for worker in status.workers] == [0, 1]

    server.signal(signal.SIGTERM)

    assert server.wait() == 0
    assert server.process.stdout is not None
    assert server.process.stdout.read() == b""


def test_when_stop_is_answered_everything_is_free_again(start: Start) -> None:
    """The next server may start on the same ports and directory in the same instant."""
    server = start()
    server.wait_ready()
    status = server.status()
    family = server.family()

    assert server.verdict("stop").ok
    assert not server.state.control_socket.exists()
    assert not any(map(alive, family))
    for address in (status.address, status.admin_address):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address_of(address))
    server.state.acquire().release()
    assert server.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_signals_end_it_with_0(start: Start, number: signal.Signals) -> None:
    """Whichever way it was asked, ending is what was wanted."""
    server = start()
    server.wait_ready()
    server.signal(number)

    assert server.wait() == 0


def test_a_quick_stop_takes_two_seconds_at_most_even_with_stubborn_children(start: Start) -> None:
    """Who neither obeys nor goes is killed."""
    server = start(timing={"quick": 0.5}, behaviour={"worker-1": "stubborn"})
    server.wait_ready()
    began = time.monotonic()
    server.signal(signal.SIGINT)

    assert server.wait() == 0
    assert time.monotonic() - began < 2.0


def test_an_ordinary_stop_keeps_within_drain_seconds(start: Start) -> None:
    """A stubborn worker does not prolong it; the gateway stays until the workers are gone."""
    server = start(settings={"drain_seconds": 2.0}, behaviour={"worker-0": "stubborn"})
    server.wait_ready()
    gateway = server.status().gateway.pid
    began = time.monotonic()
    server.signal(signal.SIGTERM)
    eventually(lambda: server.status().workers[1].pid is None)
    status = server.status()

    assert (status.draining, status.ready, status.gateway.pid) == (True, False, gateway)
    assert server.wait() == 0
    assert 0.9 < time.monotonic() - began < 2.0
    assert [event["pid"] for event in server.events("child killed")] != [gateway]


def test_a_second_sigterm_hurries_the_stop(start: Start) -> None:
    """Who is impatient does not have to wait for the drain."""
    server = start(
        settings={"drain_seconds": 60.0}, timing={"quick": 0.3}, behaviour={"worker": "stubborn"}
    )
    server.wait_ready()
    server.signal(signal.SIGTERM)
    eventually(lambda: server.status().draining)
    server.signal(signal.SIGTERM)

    assert server.wait() == 0


# --- the first start -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("who", "how", "code", "reason"),
    [
        ("worker-1", "crash", 3, "worker 1 ended with exit code 1"),
        ("gateway", "crash", 3, "gateway ended with exit code 1"),
        ("worker", "refuse", 4, "worker [01] ended with exit code 4"),
        ("worker-0", "never", 3, "worker 0 did not start within 0.5 s"),
    ],
)
def test_a_first_start_that_fails_ends_it_with_the_reason(
    start: Start, who: str, how: str, code: int, reason: str
) -> None:
    """Exit code 3, or 4 if a child does not like its configuration; nobody is left."""
    timing = {"startup": 0.5} if how == "never" else {}
    server = start(timing=timing, behaviour={who: how})

    assert server.wait() == code
    (event,) = server.events("first start failed")
    assert re.fullmatch(reason, str(event["reason"]))


def test_a_program_that_is_not_there_fails_the_first_start(start: Start) -> None:
    """It is not taken for an accident that may pass."""
    server = start(commands={"gateway": ["/nowhere/python"]})

    assert server.wait() == 3
    (event,) = server.events("first start failed")
    assert "could not be spawned" in str(event["reason"])


def test_the_state_directory_has_one_server(start: Start) -> None:
    """The second one says who was first, in one line, and touches nothing."""
    first = start()
    first.wait_ready()
    second = start()

    assert second.wait() == 1
    expected = f"another trioserver (pid {first.pid}) is running with DATA_DIR {first.state.path}\n"
    assert second.log() == expected
    assert first.status().ready


@pytest.mark.parametrize("name", ["ws_port", "admin_port"])
def test_a_port_that_is_taken_names_the_holder(start: Start, directory: Path, name: str) -> None:
    """Also if the holder would share it: SO_REUSEPORT must not hide a second server."""
    program = (
        "import socket, sys\n"
        "s = socket.socket()\n"
        "s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)\n"
        "s.bind(('127.0.0.1', 0))\n"
        "s.listen()\n"
        "print(s.getsockname()[1], flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        port = int(holder.stdout.readline())
        server = start(settings={name: port})
        code = server.wait()
        holder.stdin.close()

    assert code == 1
    taken = f"{name.upper()}: port {port} is taken by pid {holder.pid} ({sys.executable} -c import"
    assert server.log().startswith(taken)
    assert server.log().count("\n") == 1


# --- children ------------------------------------------------------------------------------------


def test_a_child_has_exactly_its_descriptors(start: Start) -> None:
    """Standard streams, pair, listening socket, settings, and the board for workers; no others."""
    read_end, write_end = os.pipe()
    server = start(pass_fds=(read_end, write_end))
    server.wait_ready()
    os.close(read_end)
    os.close(write_end)
    status = server.status()
    pids = [worker.pid for worker in status.workers] + [status.gateway.pid]
    fds = [open_fds(pid) for pid in pids if pid is not None]

    common = [0, 1, 2, 3, 4, 5]
    assert [[*common, 6], [*common, 6], common] == [sorted(each) for each in fds]
    for each in fds:
        assert each[0] == "/dev/null"
        assert each[5].startswith("/memfd:settings")
    listening = {each[4] for each in fds}
    assert len(listening) == 3
    assert all(name.startswith("socket:") for name in listening)


def test_children_are_out_of_reach_of_the_terminal(start: Start) -> None:
    """Ctrl-C goes to the foreground process group: the supervisor alone decides what it means."""
    server = start()
    server.wait_ready()

    family = server.family()
    assert [os.getpgid(child) for child in family] == family


def test_a_killed_worker_is_replaced_and_nobody_else_is_touched(start: Start) -> None:
    """The successor serves the same socket; the count of restarts tells."""
    server = start()
    server.wait_ready()
    before = server.status()
    victim = server.worker(0)
    door = open_fds(victim)[4]
    os.kill(victim, signal.SIGKILL)
    eventually(server.replaced(0, victim))
    after = server.status()

    assert after.workers[0].restarts == 1
    assert open_fds(server.worker(0))[4] == door
    assert after.workers[1].pid == before.workers[1].pid
    assert after.gateway.pid == before.gateway.pid
    (event,) = server.events("child died")
    assert event["how"] == "was killed by SIGKILL"


def test_connections_that_nobody_has_accepted_survive_their_worker(start: Start) -> None:
    """They wait in the slot's queue, which belongs to the supervisor."""
    server = start()
    server.wait_ready()
    where = address_of(server.status().address)
    clients = [socket.create_connection(where, timeout=5) for _ in range(20)]
    for slot in (0, 1):
        victim = server.worker(slot)
        os.kill(victim, signal.SIGKILL)
        eventually(server.replaced(slot, victim))
    for client in clients:
        client.setblocking(False)
        with client, pytest.raises(BlockingIOError):
            client.recv(1)


def test_a_stopped_worker_is_unready_then_aborted_then_replaced(start: Start) -> None:
    """It cannot act on SIGABRT, so SIGKILL follows."""
    server = start()
    server.wait_ready()
    victim = server.worker(0)
    os.kill(victim, signal.SIGSTOP)
    eventually(lambda: not server.status().ready)
    status = server.status()

    assert (status.workers[0].pid, status.workers[0].ready) == (victim, False)
    assert status.workers[0].why.startswith("no sign of life for")

    eventually(server.replaced(0, victim))

    assert [event["pid"] for event in server.events("child hangs")] == [victim]
    assert [event["pid"] for event in server.events("child killed")] == [victim]
    assert server.status().ready


def test_a_crash_loop_stays_in_its_slot(start: Start) -> None:
    """Others serve on; the wait grows; when the cause has gone, it comes back by itself."""
    server = start()
    server.wait_ready()
    others = (server.worker(1), server.status().gateway.pid)
    victim = server.worker(0)
    server.behave("worker-0", "brief")
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: server.status().workers[0].restarts >= 4)

    assert (server.worker(1), server.status().gateway.pid) == others
    waits = [float(event["wait"]) for event in server.events("child died")]
    assert max(waits) > 2 * min(waits)

    server.behave("worker-0", "good")
    eventually(server.replaced(0, victim))
    eventually(lambda: server.status().ready)


def test_a_crash_before_the_start_is_an_accident_once_the_slot_has_proven_itself(
    start: Start,
) -> None:
    """Only the first start may fail as a whole."""
    server = start()
    server.wait_ready()
    victim = server.worker(0)
    server.behave("worker-0", "crash")
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: len(server.events("child died")) >= 3)

    assert server.process.poll() is None

    server.behave("worker-0", "good")
    eventually(server.replaced(0, victim))


def test_what_a_child_says_is_not_trusted(start: Start) -> None:
    """Garbage, unknown messages and unknown fields are skipped."""
    server = start(behaviour={"worker-0": "garbage"})
    server.wait_ready()

    assert server.status().ready


def test_an_unready_child_keeps_the_announcement_back(start: Start) -> None:
    """It is up, and says why it is not ready."""
    server = start(behaviour={"worker-0": "unready"})
    eventually(server.state.control_socket.exists)
    eventually(lambda: server.status().workers[1].ready)
    eventually(lambda: server.status().workers[0].why == "told so")

    assert server.events("first start failed") == []


def test_fifty_restarts_leave_no_descriptor_behind(start: Start) -> None:
    """Neither pairs nor pipes nor copies add up."""
    server = start(timing=AT_ONCE)
    server.wait_ready()
    before = len(open_fds(server.pid))
    for restart in range(50):
        slot = restart % 2
        victim = server.worker(slot)
        os.kill(victim, signal.SIGKILL)
        eventually(server.replaced(slot, victim))

    # Status connections come and go; the loop closes them in its own time.
    eventually(lambda: len(open_fds(server.pid)) == before)
    assert sum(worker.restarts for worker in server.status().workers) == 50


@pytest.mark.parametrize("delay", [0.0, 0.03, 0.3])
def test_nobody_survives_a_killed_supervisor(start: Start, delay: float) -> None:
    """Whenever it happens: children see the end of their pairs and go, the ports are free."""
    server = start()
    eventually(lambda: bool(server.family()))
    time.sleep(delay)
    family = server.family()
    os.kill(server.pid, signal.SIGKILL)
    eventually(lambda: not any(map(alive, family)), limit=2.0)

    again = start()
    again.wait_ready()


def test_the_next_server_waits_for_the_ports_of_a_killed_one(start: Start) -> None:
    """Its children need a moment; whoever restarts it at once must not be turned away."""
    server = start(behaviour={"worker": "lingering"})
    server.wait_ready()
    _, port = address_of(server.status().address)
    server.behave("worker", "good")
    os.kill(server.pid, signal.SIGKILL)
    server.process.wait()
    again = start(settings={"ws_port": port})

    assert f":{port}/ws" in again.wait_ready()


# --- reload --------------------------------------------------------------------------------------


def test_a_reload_replaces_everybody_at_once_with_new_settings(start: Start) -> None:
    """The verdict comes when the new generation serves; the old one is on its way out."""
    server = start()
    server.wait_ready()
    before = server.status()
    door = open_fds(server.worker(0))[4]
    server.new_settings(ws_max_connections=77)
    verdict = server.verdict("reload")
    after = server.status()

    assert (verdict.ok, verdict.generation) == (True, 2)
    assert (after.generation, after.ready, after.reloading) == (2, True, False)
    old = {worker.pid for worker in before.workers} | {before.gateway.pid}
    new = {worker.pid for worker in after.workers} | {after.gateway.pid}
    assert not old & new
    assert [worker.connections for worker in after.workers] == [77, 77]
    assert open_fds(server.worker(0))[4] == door
    eventually(lambda: set(server.family()) == new)


def test_sighup_reloads(start: Start) -> None:
    """Nobody waits for the verdict; it is in the log."""
    server = start()
    server.wait_ready()
    server.signal(signal.SIGHUP)
    eventually(lambda: server.status().generation == 2)

    assert len(server.events("reload done")) == 1


def test_a_release_that_cannot_start_leaves_the_old_one_untouched(start: Start) -> None:
    """The verdict says what went wrong; nothing of the new generation is left."""
    server = start()
    server.wait_ready()
    before = set(server.family())
    server.behave("worker-1.2", "crash")
    verdict = server.verdict("reload")

    assert (verdict.ok, verdict.reason) == (False, "worker 1 ended with exit code 1")
    eventually(lambda: set(server.family()) == before)
    assert (server.status().generation, server.status().ready) == (1, True)

    assert server.verdict("reload").generation == 3


def test_a_release_that_does_not_get_ready_is_given_up(start: Start) -> None:
    """After the time for a reload, with what was missing."""
    server = start(timing={"reload": 0.7})
    server.wait_ready()
    before = set(server.family())
    server.behave("worker-0.2", "unready")
    verdict = server.verdict("reload")

    assert (verdict.ok, verdict.reason) == (False, "not ready within 0.7 s: worker 0: told so")
    eventually(lambda: set(server.family()) == before)


def test_what_needs_a_restart_is_not_reloaded(start: Start) -> None:
    """The refusal names the setting, and nobody was bothered."""
    server = start()
    server.wait_ready()
    before = server.status()
    obstacles: dict[str, object] = {
        "ws_port": 1234,
        "admin_host": "0.0.0.0",
        "workers": 3,
        "data_dir": "/elsewhere",
    }
    for name, value in obstacles.items():
        server.new_settings(**{name: value})
        verdict = server.verdict("reload")
        expected = f"{name.upper()} has changed, which needs a restart"
        assert (verdict.ok, verdict.reason) == (False, expected)

    server.new_settings(redis_url=None)
    reason = server.verdict("reload").reason
    assert reason == "REDIS_URL or REDIS_HOST came or went, which needs a restart"
    assert server.status().workers[0].pid == before.workers[0].pid


def test_settings_that_the_new_code_refuses_are_not_reloaded(start: Start) -> None:
    """The reason is the last line that it wrote to standard error."""
    script = "echo noise >&2; echo 'WS_PORT: \"x\" is not a port number' >&2; exit 4"
    server = start(commands={"snapshot": ["/bin/sh", "-c", script]})
    server.wait_ready()
    verdict = server.verdict("reload")

    assert (verdict.ok, verdict.reason) == (False, 'WS_PORT: "x" is not a port number')


@pytest.mark.parametrize(
    ("snapshot", "reason"),
    [
        (["/bin/sh", "-c", "exit 3"], "reading the settings ended with exit code 3"),
        (["/bin/sh", "-c", "sleep 60"], "the settings could not be read within 0.3 s"),
        (["/bin/echo", "hello"], "the new settings make no sense to the running supervisor: "),
        (["/nowhere"], "the command that reads the settings could not be started: "),
    ],
)
def test_settings_that_cannot_be_read_are_not_reloaded(
    start: Start, snapshot: list[str], reason: str
) -> None:
    """However the command fails, there is a reason, and reloading works again afterwards."""
    server = start(commands={"snapshot": snapshot}, timing={"snapshot": 0.3})
    server.wait_ready()
    before = len(open_fds(server.pid))

    for _ in range(2):
        verdict = server.verdict("reload")
        assert not verdict.ok
        assert verdict.reason.startswith(reason)
    eventually(lambda: len(open_fds(server.pid)) == before)
    eventually(lambda: len(server.family()) == 3)


def test_reloads_leave_no_descriptor_behind(start: Start) -> None:
    """Neither the good ones nor the bad ones."""
    server = start()
    server.wait_ready()
    before = len(open_fds(server.pid))
    for _ in range(3):
        generation = server.verdict("reload").generation
        assert generation is not None
        server.behave(f"gateway.{generation + 1}", "crash")
        assert not server.verdict("reload").ok

    eventually(lambda: len(server.family()) == 3)
    eventually(lambda: len(open_fds(server.pid)) == before)
