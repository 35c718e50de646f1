"""The state directory on a real disk."""

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trioserver.errors import CommandError, SettingsError
from trioserver.statedir import StateDir


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    """Return a state directory that exists."""
    state = StateDir(tmp_path / "s")
    state.create()
    return state


def test_it_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    """With its parents, and again without complaint."""
    state = StateDir(tmp_path / "a" / "s")
    for _ in range(2):
        state.create()
        for path in (state.path, state.redis_dir, state.metrics_dir):
            assert path.stat().st_mode & 0o777 == 0o700


def test_the_mode_of_a_directory_that_exists_is_its_owners_business(tmp_path: Path) -> None:
    """A mounted volume may be shared on purpose; what is secret in it has a mode of its own."""
    tmp_path.chmod(0o755)
    StateDir(tmp_path).create()

    assert tmp_path.stat().st_mode & 0o777 == 0o755


def test_a_relative_path_is_taken_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Children may run elsewhere."""
    monkeypatch.chdir(tmp_path)

    assert StateDir(Path("s")).control_socket == tmp_path / "s" / "control.sock"


def test_a_path_that_no_socket_can_have_is_refused(tmp_path: Path) -> None:
    """The limit is the kernel's: 107 bytes, counted as bytes."""
    room = 107 - len("/control.sock")
    fits = "/" + "x" * (room - 1)
    StateDir._check_length(StateDir(Path(fits)).control_socket)

    with pytest.raises(SettingsError) as caught:
        StateDir(Path(fits[:-1] + "ü")).create()

    assert caught.value.setting == "DATA_DIR"
    assert "is 108 bytes long; a Unix socket's path may have 107 at most" in str(caught.value)


def test_a_place_where_nothing_can_be_made_is_refused(tmp_path: Path) -> None:
    """The message names path and reason."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"DATA_DIR: .*/file/s: Not a directory"):
        StateDir(tmp_path / "file" / "s").create()
    with pytest.raises(SettingsError, match=r"DATA_DIR: .*/lock: No such file or directory"):
        StateDir(tmp_path / "missing").acquire()


def test_one_lock_at_a_time(state: StateDir) -> None:
    """Whoever comes second learns the pid of the first; after its release it may try again."""
    lock = state.acquire()
    with pytest.raises(CommandError) as caught:
        state.acquire()

    expected = f"another trioserver (pid {os.getpid()}) is running with DATA_DIR {state.path}"
    assert str(caught.value) == expected

    lock.release()
    lock.release()
    state.acquire().release()


def test_a_lock_ends_with_its_process_and_not_with_its_children(state: StateDir) -> None:
    """Killed, it leaves nothing that anybody would have to clean up."""
    script = (
        "import os, subprocess, sys; from pathlib import Path\n"
        "from trioserver.statedir import StateDir\n"
        "lock = StateDir(Path(sys.argv[1])).acquire()\n"
        "child = subprocess.Popen(['sleep', '60'], close_fds=False)\n"
        "print(child.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(state.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        with pytest.raises(CommandError, match=f"pid {holder.pid}"):
            state.acquire()
        holder.kill()
        holder.wait(10)
        state.acquire().release()
        os.kill(child, 9)


def test_a_lock_file_without_a_pid_is_still_a_lock(state: StateDir) -> None:
    """Its holder may be about to write it."""
    lock = state.acquire()
    state.lock.write_text("")
    with pytest.raises(CommandError, match="pid unknown"):
        state.acquire()
    lock.release()


def test_a_shorter_pid_leaves_nothing_of_a_longer_one(state: StateDir) -> None:
    """The file says one number."""
    state.lock.write_text("4194304\n4194304\n")
    lock = state.acquire()

    assert state.lock.read_text() == f"{os.getpid()}\n"
    lock.release()


def test_a_secret_is_made_once_and_kept(state: StateDir) -> None:
    """Random, long, private, and read by the next one."""
    assert state.read_secret("jwt") is None
    secret = state.secret("jwt")

    assert len(secret) >= 43
    assert state.secret("jwt") == secret
    assert state.read_secret("jwt") == secret
    assert state.secret("api") != secret
    assert (state.path / "jwt.secret").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in state.path.glob("*jwt*")) == ["jwt.secret"]


def test_a_secret_that_somebody_wrote_is_used(state: StateDir) -> None:
    """With or without a newline at its end."""
    (state.path / "jwt.secret").write_text("correct horse battery staple\n")

    assert state.secret("jwt") == "correct horse battery staple"


def make_secret(path: Path) -> str:
    """Make or read a secret, in another process."""
    return StateDir(path).secret("jwt")


def test_two_who_make_a_secret_at_once_agree(state: StateDir) -> None:
    """The first one wins, the others read what it wrote."""
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        secrets = pool.map(make_secret, [state.path] * 16, chunksize=1)

    assert set(secrets) == {state.secret("jwt")}


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe"])
def test_a_secret_that_is_none_is_refused(state: StateDir, content: bytes) -> None:
    """An empty key would verify anybody's signature."""
    (state.path / "jwt.secret").write_bytes(content)
    with pytest.raises(SettingsError, match=r"DATA_DIR: .*jwt\.secret"):
        state.secret("jwt")


def test_a_secret_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """The message names the file."""
    with pytest.raises(SettingsError, match=r"DATA_DIR: .*jwt\.secret: No such file"):
        StateDir(tmp_path / "missing").secret("jwt")


@pytest.mark.parametrize("name", ["", "../jwt", "a/b", "A", ".x"])
def test_a_secret_has_a_plain_name(state: StateDir, name: str) -> None:
    """Anything else is a bug."""
    with pytest.raises(ValueError, match="not a secret's name"):
        state.secret(name)


def test_metrics_of_an_earlier_run_are_removed(state: StateDir) -> None:
    """Files only; what else is there was not made by us."""
    (state.metrics_dir / "counter_0.1.db").write_text("old")
    (state.metrics_dir / "kept").mkdir()
    state.clear_metrics()

    assert [path.name for path in state.metrics_dir.iterdir()] == ["kept"]


def boot_of(name: str) -> int:
    """Return the boot of ``<server>.<boot>``."""
    return int(name.partition(".")[2], 16)


def server_of(state: StateDir) -> str:
    """Return the id of the server that a directory belongs to, after one more boot."""
    return state.next_boot(1.75e9).partition(".")[0]


def test_a_server_has_one_name(state: StateDir) -> None:
    """Made once, private, and found by whoever asks later; another directory has another one."""
    name = server_of(state)
    other = StateDir(state.path.with_name("other"))
    other.create()

    assert re.fullmatch("[0-9a-f]{8}", name)
    assert name == server_of(StateDir(state.path)) == server_of(state)
    assert name != server_of(other)
    assert (state.path / "server").stat().st_mode & 0o777 == 0o600


def test_a_boot_is_the_time_in_milliseconds(state: StateDir) -> None:
    """In hex, after the name of the server."""
    name = state.next_boot(1_790_000_000.123)
    assert f"{server_of(state)}.{1_790_000_000_123:x}" == name


def test_boots_ascend_whatever_the_clock_does(state: StateDir) -> None:
    """It may stand still, go back by years, or before its own beginning."""
    clock = [1.8e9, 1.8e9, 1.7e9, 0.0, -5.0, 1.8e9, 1.9e9]
    names = [StateDir(state.path).next_boot(now) for now in clock]
    boots = [boot_of(name) for name in names]

    assert 1 == len({name.partition(".")[0] for name in names})
    assert boots == sorted(set(boots))
    assert 1_900_000_000_000 == boots[-1]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"\xff\xfe",
        b"0123456\n",
        b"01234567 19aa3f21c4e\n",
        b"01234567 19aa3f21c4e here",
        b"01234567 -1 here\n",
        b"01234567 fffffffffffffffff here\n",
        b"01234567 19aa3f21c4e here\nand more\n",
    ],
)
def test_garbage_makes_another_server(state: StateDir, content: bytes) -> None:
    """A name whose latest boot is not known could be given twice; a random one cannot."""
    before = state.next_boot(1.8e9)
    (state.path / "server").write_bytes(content)
    after = state.next_boot(1.7e9)

    assert before.partition(".")[0] != after.partition(".")[0] != "01234567"
    assert after.partition(".")[0] == server_of(state)


def test_a_copy_is_another_server(state: StateDir) -> None:
    """Two machines from one image must not take each other for dead."""
    name = server_of(state)
    copied = Path(shutil.copytree(state.path, state.path.with_name("copy")))

    assert server_of(StateDir(copied)) != name
    assert name == server_of(state)


def test_another_start_of_the_machine_is_another_server(state: StateDir) -> None:
    """As a copy of a whole machine is, which cannot be told from it."""
    name = state.next_boot(1.8e9).partition(".")[0]
    file = state.path / "server"
    kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    text = file.read_text()

    assert kernel in text
    file.write_text(text.replace(kernel, "00000000-0000-0000-0000-000000000000"))
    assert name != server_of(state)


BOOTING = """
import sys
from pathlib import Path
from trioserver.statedir import StateDir
while True:
    # The clock stands still.
    print(StateDir(Path(sys.argv[1])).next_boot(1.8e9), flush=True)
"""


def test_who_is_killed_over_a_name_leaves_a_good_one(state: StateDir) -> None:
    """At any moment of its making: no name comes twice, and the server stays the same."""
    names = [state.next_boot(1.8e9)]
    for lines in (1, 2, 5):
        with subprocess.Popen(
            [sys.executable, "-c", BOOTING, str(state.path)], stdout=subprocess.PIPE, text=True
        ) as boots:
            assert boots.stdout is not None
            names += [boots.stdout.readline().strip() for _ in range(lines)]
            boots.kill()
            names += [line.strip() for line in boots.stdout if line.endswith("\n")]
        names.append(state.next_boot(1.8e9))

    assert 1 == len({name.partition(".")[0] for name in names})
    numbers = [boot_of(name) for name in names]
    assert numbers == sorted(set(numbers))


def test_a_name_is_never_half_written(state: StateDir) -> None:
    """The file that is there stays whole until another one takes its place."""
    before = state.next_boot(1.8e9)
    os.link(state.path / "server", state.path / "kept")
    state.next_boot(1.9e9)
    (state.path / "kept").replace(state.path / "server")

    assert boot_of(before) + 1 == boot_of(state.next_boot(0.0))


def test_a_draft_that_was_left_behind_is_no_obstacle(state: StateDir) -> None:
    """Somebody was killed over it."""
    (state.path / ".server.draft").write_text("0123")
    name = server_of(state)

    assert name == server_of(state)
    assert ["server"] == [path.name for path in state.path.glob("*server*")]


def test_a_name_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    """The message names the file or its directory."""
    with pytest.raises(SettingsError, match=r"DATA_DIR: .*missing.*: No such file"):
        StateDir(tmp_path / "missing").next_boot(1.8e9)
    (tmp_path / "server").mkdir()
    with pytest.raises(SettingsError, match=r"DATA_DIR: .*server: Is a directory"):
        StateDir(tmp_path).next_boot(1.8e9)
