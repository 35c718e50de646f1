"""Processes: spawn, signal, reap. The only place that asks the kernel for any of it.

``posix_spawn`` and not ``fork``: the child never runs a line of this process's Python, so there is
nothing to clean up in it, and what it executes is the code that is on disk now. It starts with
default signal handlers, an empty signal mask, ``/dev/null`` as standard input, and exactly the
descriptors it was promised, because everything else here is close-on-exec.

Each child leads a process group of its own. Ctrl-C in a terminal goes to the whole foreground
group; the embedded Redis would end at once, under the workers that are still draining.

Signals are sent by pid and not through a pidfd. A pid names somebody else only after its process
was reaped; nobody but `Processes.reap` does that, and it forgets the pid in the same step.
"""

import contextlib
import fcntl
import os
import resource
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

_FREE_FD: Final = 20
"""Where sources of ``dup2`` are put first: above every number a child is promised."""

_SETTABLE: Final = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}


class Processes:
    """The children of this process: those spawned here and not yet reaped."""

    def __init__(self) -> None:
        """Start with none; children of an earlier program in this process are strangers."""
        self._alive: set[int] = set()

    @property
    def alive(self) -> frozenset[int]:
        """The pids of all of them."""
        return frozenset(self._alive)

    def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        fds: Mapping[int, int],
    ) -> int:
        """Start a process and return its pid.

        Args:
            argv: Absolute path of the executable, and its arguments.
            env: Its whole environment.
            fds: Which descriptor it gets under which number: ``{theirs: ours}``. Standard output
                and error are ours unless named. Ours are left open, whatever they are.

        Raises:
            OSError: There is no such executable, or no room for one more process.
        """
        with contextlib.ExitStack() as copies:
            actions: list[tuple[int, int, int] | tuple[int, int, str, int, int]] = [
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
            ]
            for theirs, ours in fds.items():
                # Without this, 3 -> 4 would overwrite the source of 4 -> 5; and dup2 of a number
                # onto itself would leave it close-on-exec.
                source = fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, _FREE_FD)
                copies.callback(os.close, source)
                actions.append((os.POSIX_SPAWN_DUP2, source, theirs))
            pid = os.posix_spawn(
                argv[0],
                list(argv),
                env,
                file_actions=actions,
                setpgroup=0,
                setsigmask=[],
                setsigdef=_SETTABLE,
            )
        self._alive.add(pid)
        return pid

    def kill(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to a child. Does nothing if it was reaped, or was never ours."""
        if pid in self._alive:
            # An unreaped zombie still takes the signal: no ProcessLookupError is expected.
            os.kill(pid, number)

    def reap(self) -> Iterator[tuple[int, int]]:
        """Yield (pid, exit code) of whoever ended, strangers included, until there is no more.

        The exit code of a process that a signal killed is minus that signal's number.
        """
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._alive.discard(pid)
            yield pid, os.waitstatus_to_exitcode(status)


def seal_descriptors() -> None:
    """Make every descriptor above standard error close-on-exec.

    Python does that to those it opens; these came from whoever started us, who may have forgotten.
    """
    for entry in list(Path("/proc/self/fd").iterdir()):
        number = int(entry.name)
        if number > 2:  # noqa: PLR2004 - standard error
            with contextlib.suppress(OSError):  # the one that was listing this very directory
                os.set_inheritable(number, False)


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open descriptors to the hard one; return it. Children inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
