"""The machine: processor clocks, memory, cores, and what the results have to say about it."""

import contextlib
import ctypes
import os
import platform
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

ROOT: Final = Path(__file__).parent.parent
"""The checkout."""

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG: Final = 1

_TICK_NS: Final = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_IDLE_FIELDS: Final = (4, 5)
"""Of a line of ``/proc/stat``: idle and iowait."""

Clock = Callable[[], int]
"""Returns nanoseconds."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where a measurement was made."""

    cpu: str
    cores: int
    kernel: str
    python: str
    server_core: int
    client_core: int
    """Also of Redis, supervisor and gateway."""


def describe() -> Machine:
    """Return what this machine is, with the cores that a measurement will use."""
    server, client = cores()
    return Machine(
        cpu=_processor(),
        cores=os.cpu_count() or 1,
        kernel=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        server_core=server,
        client_core=client,
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in {"model name", "Model"}:
            return value.strip()
    return platform.machine()


def commit() -> str:
    """Return the commit that is checked out; ``+`` behind it means that files have changed."""
    try:
        name = _git("rev-parse", "--short=12", "HEAD")
        return name + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=30
    ).stdout.strip()


def cores() -> tuple[int, int]:
    """Return the core of the worker and that of everything else; the same if there is only one."""
    usable = sorted(os.sched_getaffinity(0))
    return usable[0], usable[-1] if len(usable) == 1 else usable[1]


@contextlib.contextmanager
def living_on(core: int) -> Iterator[None]:
    """Keep this process, and what it starts meanwhile, on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def move(pid: int, core: int) -> None:
    """Bring a running process, with all its threads, to one core."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), {core})


def cpu_clock(pid: int) -> Clock:
    """Return the clock of the processor time of a process: all its threads, user and system.

    The scheduler's own accounting in nanoseconds; ``/proc/PID/stat`` shows the same in steps of
    10 ms.

    Raises:
        ProcessLookupError: There is no such process.
    """
    clock = ctypes.c_int()
    error = _LIBC.clock_getcpuclockid(pid, ctypes.byref(clock))
    if error:
        raise ProcessLookupError(error, os.strerror(error), pid)
    return lambda: time.clock_gettime_ns(clock.value)


def core_busy_ns(core: int) -> int:
    """Return for how long a core has been busy since the start, in steps of 10 ms."""
    with Path("/proc/stat").open() as lines:
        for line in lines:
            name, *fields = line.split()
            if name == f"cpu{core}":
                ticks = list(map(int, fields[:8]))
                return (sum(ticks) - sum(ticks[i - 1] for i in _IDLE_FIELDS)) * _TICK_NS
    return 0


def pss_kb(pid: int) -> int:
    """Return the proportional set size of a process: its memory, with its share of what it shares.

    Raises:
        OSError: There is no such process, or it is somebody else's.
    """
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise OSError(f"the kernel does not say how much memory process {pid} has")


def as_child() -> None:
    """Prepare a child between fork and exec: it dies with its parent, and may open many files."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
