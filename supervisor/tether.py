"""Run a foreign program that ends with its parent and shares its directory with nobody.

    python -I -S tether.py PARENT_PID LOCK_FILE PROGRAM [ARGUMENT...]

The embedded Redis knows nothing of a supervisor: killed with -9, that would leave it running, and
the next supervisor would start a second one on the same append-only file. Two things prevent it,
and both must be done in the child itself, between ``fork`` and ``exec``, where ``posix_spawn`` lets
nobody in. So this script is executed first and then replaced by the program:

* ``PR_SET_PDEATHSIG`` survives ``exec``: the kernel sends SIGTERM when the supervisor dies, and
  Redis then writes its file and ends;
* an ``flock`` on an inherited descriptor survives it, too: whoever comes next waits here until the
  last process that holds it, forked helpers included, is really gone.

Only the standard library, and run without ``site``: it is part of every start.
"""

import ctypes
import fcntl
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Tie this process to its parent, wait for the lock, and become the program."""
    parent, lock, program = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    # A parent that died before prctl() sends nothing any more, so look after setting it.
    if os.getppid() != parent:
        sys.exit("the supervisor is gone")
    # The number stays open in the program: that is how it holds the lock.
    fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    os.set_inheritable(fd, True)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        os.execv(program, sys.argv[3:])  # noqa: S606 - no shell is the point
    except OSError as error:
        sys.exit(f"{program}: {error.strerror}")


if __name__ == "__main__":
    main()
