"""The clocks and cores of this machine."""

import os
import subprocess
import sys
import time

import pytest

from bench import machine


def test_cpu_clock() -> None:
    """The clock of a process runs while that works, in steps far below a scheduler's tick."""
    clock = machine.cpu_clock(os.getpid())
    before, ours = clock(), time.process_time_ns()
    while time.process_time_ns() - ours < 2_000_000:
        pass

    assert 2_000_000 <= clock() - before < 200_000_000


def test_cpu_clock_of_nobody() -> None:
    """A process that is gone has no clock."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait(20)

    with pytest.raises(ProcessLookupError):
        machine.cpu_clock(process.pid)


def test_cores() -> None:
    """A process lives on one core for a while, and then where it lived before."""
    before = os.sched_getaffinity(0)
    server, client = machine.cores()

    with machine.living_on(client):
        assert {client} == os.sched_getaffinity(0)
        machine.move(os.getpid(), server)
        assert {server} == os.sched_getaffinity(0)

    assert before == os.sched_getaffinity(0)


def test_readings() -> None:
    """The kernel says how busy a core was, and how much memory a process has."""
    assert 0 < machine.core_busy_ns(machine.cores()[0])
    assert 0 == machine.core_busy_ns(100_000)
    assert 1_000 < machine.pss_kb(os.getpid())


def test_description() -> None:
    """Results name the machine and the commit."""
    described = machine.describe()

    assert described.cpu
    assert described.python in sys.version
    assert machine.commit() == "unknown" or 12 <= len(machine.commit()) <= 13
