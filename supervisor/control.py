"""The serving side of the control socket: lines in, numbered requests out, replies whenever.

It belongs to the loop: it never blocks, and whoever misbehaves there costs bounded memory and is
hung up on. Who may connect is decided by the file system: the socket is 0600 in a 0700 directory.
"""

import contextlib
import functools
import os
import selectors
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import attrs

from trioserver.status import StatusReply, Verdict, decode_request, encode

_CALLERS: Final = 64
"""Connections at a time: the gateway's, a few commands, and room for a careless script."""

_LINE_BYTES: Final = 4096
"""A request is some twenty bytes."""

_PENDING_BYTES: Final = 1 << 20
"""Replies that a caller has not read. A status of a thousand workers is a tenth of it."""

_ACCEPT_PAUSE: Final = 1.0
"""Seconds without new callers when there are no descriptors; the kernel would go on waking us."""

_BACKLOG: Final = 32


@attrs.define(eq=False)
class _Caller:
    socket: socket.socket
    received: bytearray = attrs.Factory(bytearray)
    pending: bytearray = attrs.Factory(bytearray)
    waits_for: set[int] = attrs.Factory(set)
    """Requests that have not been answered."""
    mask: int = 0
    """What the selector watches it for."""
    finished: bool = False
    """It will send no more; it goes when it has got what it waits for."""

    @property
    def idle(self) -> bool:
        return not (self.waits_for or self.pending)


class ControlServer:
    """Serves the control socket until closed."""

    def __init__(
        self,
        path: Path,
        selector: selectors.BaseSelector,
        asked: Callable[[int, str], None],
    ) -> None:
        """Listen. Call it with the state directory's lock held: an old socket file is replaced.

        Args:
            path: Of the socket.
            selector: Whoever drives it calls the data of ready keys with their mask.
            asked: Gets each request's number and its ``op``, unchecked.

        Raises:
            OSError: The socket cannot be made.
        """
        self._path = path
        self._selector = selector
        self._asked = asked
        self._callers: dict[_Caller, None] = {}  # in the order of their arrival
        self._owners: dict[int, _Caller] = {}
        self._last_number = 0
        self._resume_at: float | None = None
        path.unlink(missing_ok=True)
        flags = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._listener = socket.socket(socket.AF_UNIX, flags)
        try:
            # chmod after bind would leave a moment in which anybody who sees it may connect.
            before = os.umask(0o177)
            try:
                self._listener.bind(str(path))
            finally:
                os.umask(before)
            self._listener.listen(_BACKLOG)
        except OSError:
            self._listener.close()
            raise
        self._watch_listener()

    def reply(self, request: int, reply: StatusReply | Verdict) -> None:
        """Answer a request, as soon as the selector says that the caller can take it.

        Does nothing if the caller has gone.
        """
        caller = self._owners.pop(request, None)
        if caller is None:
            return
        caller.waits_for.discard(request)
        caller.pending += encode(reply) + b"\n"
        if len(caller.pending) > _PENDING_BYTES:
            self._hang_up(caller)
        else:
            self._watch(caller)

    def tick(self, now: float) -> None:
        """Look at the time, at least once a second."""
        if self._resume_at is not None and now >= self._resume_at:
            self._watch_listener()

    def stop_listening(self) -> None:
        """Admit nobody any more, and remove the socket's file. Who is connected stays."""
        if self._listener.fileno() < 0:
            return
        if self._resume_at is None:
            self._selector.unregister(self._listener)
        self._resume_at = None
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def close(self, linger_seconds: float) -> None:
        """Deliver the replies that are pending, within that time, and hang up on everybody."""
        self.stop_listening()
        deadline = time.monotonic() + linger_seconds
        for caller in list(self._callers):
            with contextlib.suppress(OSError):
                caller.socket.settimeout(max(0.001, deadline - time.monotonic()))
                caller.socket.sendall(caller.pending)
            self._hang_up(caller)

    def _watch_listener(self) -> None:
        self._resume_at = None
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _accept(self, _mask: int) -> None:
        try:
            connected, _ = self._listener.accept()
        except OSError:  # No descriptors, no memory. It is still ready, and would be at once again.
            self._selector.unregister(self._listener)
            self._resume_at = time.monotonic() + _ACCEPT_PAUSE
            return
        connected.setblocking(False)
        if len(self._callers) >= _CALLERS:
            idle = next((caller for caller in self._callers if caller.idle), None)
            if idle is None:
                connected.close()
                return
            self._hang_up(idle)
        caller = _Caller(connected)
        self._callers[caller] = None
        self._watch(caller)

    def _serve(self, caller: _Caller, mask: int) -> None:
        try:
            if mask & selectors.EVENT_WRITE:
                self._write(caller)
            if mask & selectors.EVENT_READ:
                self._read(caller)
        except OSError:  # It has gone, perhaps by our own hand a line ago.
            self._hang_up(caller)

    def _write(self, caller: _Caller) -> None:
        sent = caller.socket.send(caller.pending)
        del caller.pending[:sent]
        self._watch(caller)

    def _read(self, caller: _Caller) -> None:
        part = caller.socket.recv(_LINE_BYTES)
        if not part:
            caller.finished = True
            self._watch(caller)
            return
        *lines, rest = (caller.received + part).split(b"\n")
        caller.received = bytearray(rest)
        if len(rest) > _LINE_BYTES:
            self._hang_up(caller)
            return
        for line in lines:
            if caller in self._callers:  # A line may end the conversation.
                self._take(caller, bytes(line))

    def _take(self, caller: _Caller, line: bytes) -> None:
        self._last_number += 1
        number = self._last_number
        self._owners[number] = caller
        caller.waits_for.add(number)
        request = decode_request(line)
        if request is None:
            self.reply(number, Verdict(ok=False, reason="that is not a request"))
        else:
            self._asked(number, request.op)

    def _watch(self, caller: _Caller) -> None:
        if caller.finished and caller.idle:
            self._hang_up(caller)
            return
        # Half-closed, it would be readable for ever.
        mask = 0 if caller.finished else selectors.EVENT_READ
        self._watch_for(caller, mask | (selectors.EVENT_WRITE if caller.pending else 0))

    def _watch_for(self, caller: _Caller, mask: int) -> None:
        if caller.mask == mask:
            return
        if caller.mask:
            self._selector.unregister(caller.socket)
        if mask:
            serve = functools.partial(self._serve, caller)
            self._selector.register(caller.socket, mask, serve)
        caller.mask = mask

    def _hang_up(self, caller: _Caller) -> None:
        if caller not in self._callers:
            return
        del self._callers[caller]
        for number in caller.waits_for:
            del self._owners[number]
        self._watch_for(caller, 0)
        caller.socket.close()
