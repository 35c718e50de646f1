"""Spawning, signalling and reaping, with real processes."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor.processes import raise_descriptor_limit, seal_descriptors
from tests.supervisor.harness import Family, open_fds


@pytest.fixture
def output(tmp_path: Path) -> Iterator[int]:
    """Return a file to write to; its path is ``tmp_path / "output"``."""
    with (tmp_path / "output").open("wb") as file:
        yield file.fileno()


def test_a_child_gets_what_it_was_promised_under_the_numbers_it_expects(
    family: Family, output: int, tmp_path: Path
) -> None:
    """Also if ours lie exactly where theirs will be, crossed."""
    for name in ("three", "four"):
        (tmp_path / name).write_text(name)
    three = os.open(tmp_path / "three", os.O_RDONLY | os.O_CLOEXEC)
    four = os.open(tmp_path / "four", os.O_RDONLY | os.O_CLOEXEC)
    script = (
        f"cat /proc/self/fd/{four} /proc/self/fd/{three}; "
        "ls -l /proc/self/fd/0 | grep -o /dev/null; echo $X"
    )
    fds = {1: output, three: four, four: three}
    pid = family.spawn("/bin/sh", "-c", script, env={"X": "x", "PATH": "/bin"}, fds=fds)

    assert family.code_of(pid) == 0
    # What is called `four` there is `three` here.
    assert (tmp_path / "output").read_text() == "threefour/dev/null\nx\n"
    os.close(three)
    os.close(four)


def test_a_child_inherits_nothing_else(family: Family, output: int, tmp_path: Path) -> None:
    """Sealing makes that true for what this process itself has inherited."""
    read_end, write_end = os.pipe()
    os.set_inheritable(read_end, True)
    seal_descriptors()
    pid = family.spawn("/bin/ls", "/proc/self/fd", env={}, fds={1: output})

    assert family.code_of(pid) == 0
    # The fourth is the directory that ls itself reads.
    assert (tmp_path / "output").read_text().split() == ["0", "1", "2", "3"]
    os.close(read_end)
    os.close(write_end)


def test_a_child_starts_with_default_signals_and_its_own_group(
    family: Family, output: int, tmp_path: Path
) -> None:
    """Nothing blocked, nothing ignored, although this process ignores SIGPIPE."""
    assert signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    pid = family.spawn("/bin/cat", "/proc/self/status", "/proc/self/stat", env={}, fds={1: output})
    signal.pthread_sigmask(signal.SIG_SETMASK, before)

    assert family.code_of(pid) == 0
    lines = (tmp_path / "output").read_text().splitlines()
    fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    unsettable = 0b11 << 31  # Two that the C library keeps for itself.
    assert int(fields["SigBlk"], 16) == 0
    assert int(fields["SigIgn"], 16) & ~unsettable == 0
    process_group = lines[-1].rpartition(")")[2].split()[2]
    assert process_group == str(pid)


def test_exit_codes_and_signals_are_told_apart(family: Family) -> None:
    """A signal is a negative number."""
    left = family.spawn("/bin/sh", "-c", "exit 7", env={})
    killed = family.spawn("/bin/sleep", "60", env={})
    family.processes.kill(killed, signal.SIGKILL)

    assert family.code_of(left) == 7
    assert family.code_of(killed) == -9


def test_a_program_that_is_not_there_is_an_error_and_no_child(family: Family) -> None:
    """Nothing is left behind, no descriptor either."""
    before = len(open_fds())
    with pytest.raises(FileNotFoundError):
        family.spawn("/nowhere", env={}, fds={3: 1})

    assert family.processes.alive == frozenset()
    assert len(open_fds()) == before


def test_who_was_reaped_is_never_signalled(family: Family) -> None:
    """Its pid may be somebody else's by now: here it is, to show that nothing is sent."""
    pid = family.spawn("/bin/true", env={})
    assert pid in family.processes.alive
    assert family.code_of(pid) == 0
    assert pid not in family.processes.alive
    family.processes.kill(pid, signal.SIGKILL)
    family.processes.kill(os.getpid(), signal.SIGKILL)


def test_a_zombie_can_be_signalled_safely(family: Family) -> None:
    """Between its end and its reaping its pid is still its own."""
    pid = family.spawn("/bin/true", env={})
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    family.processes.kill(pid, signal.SIGTERM)

    assert family.code_of(pid) == 0


def test_strangers_are_reaped_too(family: Family) -> None:
    """As PID 1 one is the parent of everybody whose own has gone."""
    with subprocess.Popen(["/bin/true"]) as stranger:
        assert family.code_of(stranger.pid) == 0


def test_without_children_there_is_nobody_to_reap(family: Family) -> None:
    """That is no error."""
    assert list(family.processes.reap()) == []


def test_the_limit_of_descriptors_is_raised_as_far_as_allowed() -> None:
    """Tried in a process of its own: what is raised stays raised."""
    script = (
        "import resource\n"
        "from supervisor.processes import raise_descriptor_limit\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))\n"
        "print(raise_descriptor_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=30
    )

    assert done.stdout == "200 200 200\n"
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 0
    assert callable(raise_descriptor_limit)
