"""What the server's processes use of the machine, read from ``/proc``.

The kernel is asked, not the processes: so a worker that hangs is seen as well, and Redis and the
supervisor, which count nothing themselves.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import attrs

from trioserver.status import StatusReply

_PROC: Final = Path("/proc")
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")

# Fields of proc_pid_stat(5), counted from the one behind the name, which is the third.
_UTIME, _STIME, _RSS = 14 - 3, 15 - 3, 24 - 3


@attrs.frozen(kw_only=True)
class Usage:
    """What one process uses."""

    cpu_seconds: float
    """Since it started."""
    resident_bytes: int
    open_fds: int


def processes(reply: StatusReply | None) -> dict[str, int]:
    """Return the pids of everybody who serves, by role: the closed set of ``process`` labels.

    Those of a generation that drains are not among them.
    """
    if reply is None:
        return {}
    roles = {f"worker-{worker.slot}": worker.pid for worker in reply.workers}
    roles |= {"gateway": reply.gateway.pid, "supervisor": reply.pid, "redis": reply.redis.pid}
    return {role: pid for role, pid in roles.items() if pid is not None}


def usage(pids: Mapping[str, int]) -> dict[str, Usage]:
    """Return what these processes use; who is gone, or may not be looked at, is left out. Blocks.

    Args:
        pids: By role.
    """
    found = {role: _usage(_PROC / str(pid)) for role, pid in pids.items()}
    return {role: used for role, used in found.items() if used is not None}


def _usage(directory: Path) -> Usage | None:
    try:
        fields = (directory / "stat").read_bytes().rpartition(b")")[2].split()
        return Usage(
            cpu_seconds=(int(fields[_UTIME]) + int(fields[_STIME])) / _TICKS,
            resident_bytes=int(fields[_RSS]) * _PAGE_BYTES,
            open_fds=_count_fds(directory / "fd"),
        )
    except (OSError, IndexError):
        return None


def _count_fds(directory: Path) -> int:
    # Linux 6.2 and later say it at once; a worker may have ten thousand.
    return directory.stat().st_size or len(list(directory.iterdir()))
