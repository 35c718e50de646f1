"""Hypercorn, kept running.

`hypercorn.trio.serve` accepts, parses and calls the application. Three habits of it are dealt with
here:

- An error in one connection cancels the nursery around all of them, and it stops accepting. So it
  is started again, on the same socket; nobody who comes later notices.
- It waits for its connections without limit: it writes under a shield, so a client that does not
  read can hold it for ever, cancelled or not. So the next one is started as soon as the last stops
  accepting, not when it has returned; and the end of the process has a deadline that asks nobody.
- It closes the socket that it is given. So it gets a duplicate: the socket itself belongs to the
  supervisor and outlives us.
"""

import functools
import logging
import os
import socket
from typing import Final, cast

import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from hypercorn.typing import ASGIFramework

from trioserver import logs
from trioserver.gateway.front import Application

KEEP_ALIVE_SECONDS: Final = 5.0
"""For the head of a request, and between requests."""

_HEAD_BYTES: Final = 16 << 10
# The supervisor's socket has a queue already; Hypercorn would shorten it to 100.
_BACKLOG: Final = 1024
# A client that acknowledges nothing for so long is gone; without this one that has vanished while
# we write is held for a quarter of an hour, and one whose window stays closed for ever.
_STUCK_MILLISECONDS: Final = 10_000
# Faults come in ones; a fault at every start must not turn into a spin.
_RESTART_SECONDS: Final = 0.1


class Server:
    """Serves an ASGI application until told to stop. Used once."""

    def __init__(self, app: Application, listen_fd: int) -> None:
        """Prepare; nothing is accepted yet.

        Args:
            app: What answers.
            listen_fd: A listening TCP socket; it stays the caller's.
        """
        # Both say the same about ASGI, each in types of its own.
        self._app = cast("ASGIFramework", app)
        self._listen_fd = listen_fd
        self._stop = trio.Event()
        self._grace_seconds = 0.0
        self.accepting = False
        """Whether a client that comes now is served."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop`; return when the last request is answered, or its time is over.

        Reports `task_status.started` when it accepts.

        Raises:
            Exception: Hypercorn could not start the first time.

        Cancellation:
            Stops accepting at once. May still wait for clients that do not read, see above.
        """
        bound_stuck_clients(self._listen_fd)
        async with trio.open_nursery() as nursery:
            while not self._stop.is_set():
                done_accepting = trio.Event()
                await nursery.start(self._once, done_accepting)
                self.accepting = True
                task_status.started()
                task_status = trio.TASK_STATUS_IGNORED
                await done_accepting.wait()
                self.accepting = False
                if not self._stop.is_set():
                    await trio.sleep(_RESTART_SECONDS)

    def stop(self, grace_seconds: float) -> None:
        """Stop accepting now, and give requests that are under way so long. Idempotent."""
        self._grace_seconds = grace_seconds
        self._stop.set()

    async def _once(
        self, done_accepting: trio.Event, *, task_status: trio.TaskStatus[None]
    ) -> None:
        config = make_config(os.dup(self._listen_fd))

        async def until_stopped() -> None:
            # Hypercorn runs this beside its accept loop and cancels both together.
            try:
                await self._stop.wait()
                config.graceful_timeout = self._grace_seconds
            finally:
                done_accepting.set()

        started = False
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(
                    functools.partial(serve, self._app, config, shutdown_trigger=until_stopped)
                )
                started = True
                task_status.started()
        except Exception:
            if not started:
                raise
            logs.get_logger().exception("the HTTP server broke and is started again")
        finally:
            done_accepting.set()


def make_config(fd: int) -> Config:
    """Return how Hypercorn serves on a listening socket, which becomes its own."""
    config = Config()
    config.bind = [f"fd://{fd}"]
    config.backlog = _BACKLOG
    config.keep_alive_timeout = KEEP_ALIVE_SECONDS
    config.h11_max_incomplete_size = _HEAD_BYTES
    config.include_server_header = False
    # Without a logger of ours it would write to standard error in a format of its own. What it
    # says below a warning is where it runs, which the supervisor knows better; requests are
    # logged in `front`.
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn")
    config.errorlog.setLevel(logging.WARNING)
    return config


def bound_stuck_clients(listen_fd: int) -> None:
    """Have the kernel end connections of clients that take nothing; accepted sockets inherit it."""
    with socket.socket(fileno=os.dup(listen_fd)) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STUCK_MILLISECONDS)
