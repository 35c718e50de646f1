"""An arrival: a socket that has not proved itself, from accept to the end of its request head.

It is an entry in the pump and one on the timer wheel; no task, no nursery. All of it together, the
head of a proxy, the TLS handshake and the request head, has one deadline (``HANDSHAKE_TIMEOUT``),
which trickling bytes do not extend.
"""

import contextlib
import enum
import math
import socket
from typing import TYPE_CHECKING, Final

from trioserver import handshake
from trioserver.handshake import Refusal, Request
from trioserver.proxy_head import MAX_V2, NoHead, proxy_head
from trioserver.pump import READ
from trioserver.response_heads import request_id_in
from trioserver.timers import IDLE
from trioserver.tls import TlsSocket, wrap
from trioserver.wish import PATH, is_path

if TYPE_CHECKING:
    from trioserver.listener import Listener

READ_BYTES: Final = 16 << 10

RETRY_AFTER_SECONDS: Final = 2
"""What a client is told that was refused for want of room."""

CROWDED: Final = Refusal.for_now(429, "too many handshakes from this address", RETRY_AFTER_SECONDS)


class Next(enum.Enum):
    """What is to come from a socket."""

    PROXY = "proxy"
    """Perhaps the head of a proxy that is trusted."""
    TLS = "tls"
    """The client's part of a TLS handshake."""
    REQUEST = "request"
    """A request head."""


class Arrival:
    """A socket whose request head is not complete yet.

    Args:
        listener: Judges the request.
        sock: Non-blocking.
        peer: Whose address it comes from, as `peers` writes it.

    Attributes:
        key: Under which address the listener counts it while it arrives; None if it does not.
    """

    __slots__ = ("_buffer", "_listener", "_next", "_peer", "_sock", "bucket", "fd", "key")

    def __init__(self, listener: "Listener", sock: socket.socket, peer: int) -> None:
        self._listener = listener
        self._sock = sock
        self._peer = peer
        self.key: int | None = None
        self._buffer: bytearray | None = None
        """The beginning of a head whose end has not come."""
        self._next = Next.PROXY if listener.peers.trusts(peer) else self._after_proxy()
        self.fd = sock.fileno()
        self.bucket = IDLE
        pump = listener.shared.pump
        pump.register(self)
        pump.wheel.schedule(self, pump.now + (listener.handshake_timeout or math.inf))

    def readable(self) -> None:
        """Take what came, and answer when the request head is complete."""
        if self._next is Next.REQUEST:
            self._read_request()
        elif self._next is Next.TLS:
            self._shake()
        else:
            self._read_proxy()

    def writable(self) -> None:
        """Go on with a TLS handshake; nothing else waits for it."""
        if self._next is Next.TLS:
            self._shake()

    def _take(self, size: int, flags: int = 0) -> bytes:
        """Return what came; nothing if it has not, or if the client is gone, which ends this."""
        try:
            data = self._sock.recv(size, flags)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self._drop()
        return data

    # Who is it really?

    def _read_proxy(self) -> None:
        """Take the head that a proxy may send before what its client says.

        What follows that head is looked at and left where it is, for TLS wants it from the socket.
        """
        data = self._take(MAX_V2, socket.MSG_PEEK)
        if not data:
            return
        known = bytes(self._buffer or b"")
        found = proxy_head(known + data)
        if found is NoHead.INVALID:
            self._drop()
        elif found is NoHead.MORE:
            # All of it belongs to the head, whatever that turns out to be.
            self._buffer = bytearray(known + self._sock.recv(len(data)))
        elif found is NoHead.ABSENT:
            self._next = self._after_proxy()
            if known and self._next is Next.TLS:
                self._drop()  # TLS does not begin like that either.
        else:
            self._sock.recv(found.size - len(known))
            self._buffer = None
            self._next = self._after_proxy()
            if found.source is not None:
                self._peer = found.source
                if not self._listener.comes_from(self, found.source):
                    self._refuse(CROWDED)

    def _after_proxy(self) -> Next:
        return Next.REQUEST if self._listener.tls is None else Next.TLS

    # TLS.

    def _shake(self) -> None:
        """Go on with the TLS handshake, if this round of the pump has time for it."""
        listener = self._listener
        context = listener.tls
        if context is None or not listener.may_step():
            return
        try:
            if not isinstance(self._sock, TlsSocket):
                self._sock = wrap(context, self._sock)
            interest = self._sock.handshake()
        except OSError:
            self._part()
            return
        listener.shared.pump.watch(self, interest or READ)
        if not interest:
            self._next = Next.REQUEST
            # It may have come with the end of the handshake, and epoll would not tell.
            self._read_request()

    def _part(self) -> None:
        """Let a client go that does not speak TLS, or not ours; it has been told so."""
        listener = self._listener
        listener.refused(Refusal(400, "the TLS handshake failed"))
        listener.left(self)
        listener.shared.pump.wheel.cancel(self)
        # What it has sent beyond that is read as it is: closing on it would take back the answer.
        self._sock = socket.socket(fileno=self._sock.detach())
        listener.shared.pump.linger(self._sock, self)

    # What does it want?

    def _read_request(self) -> None:
        """Take bytes of the head; answer when it is complete."""
        data = self._take(READ_BYTES)
        if not data:
            return
        self._listener.shared.tally.bytes_in += len(data)
        known = 0
        buffer = self._buffer
        if buffer is not None:
            known = len(buffer)
            buffer += data
        end = 0
        try:
            end = handshake.head_end(data if buffer is None else buffer, known)
            if not end:
                self._buffer = bytearray(data) if buffer is None else buffer
                return
            if buffer is not None:
                data = bytes(buffer)
            self._complete(handshake.parse(data[:end]), data[end:])
        except Refusal as refusal:
            # What stands behind the head is of another request.
            head = (data if buffer is None else buffer)[: end or handshake.MAX_HEAD]
            self._refuse(refusal, request_id_in(head), head=head.startswith(b"HEAD "))

    def _complete(self, request: Request, rest: bytes) -> None:
        listener = self._listener
        if request.path != PATH and not is_path(request.path):
            self._answer(listener.answer(request))
            return
        admitted = listener.judge(request, self._peer)
        listener.left(self)
        listener.shared.pump.wheel.cancel(self)
        listener.start(self._sock, admitted, rest)

    def _refuse(self, refusal: Refusal, request_id: str = "", *, head: bool = False) -> None:
        listener = self._listener
        listener.refused(refusal, request_id)
        secure = listener.tls is not None
        self._answer(refusal.response(request_id=request_id, secure=secure, head=head))

    def _answer(self, response: bytes) -> None:
        """Say it and close. A fresh socket has room for the few hundred bytes of an answer."""
        if self._next is not Next.REQUEST:
            # A proxy or a TLS handshake is in between: nothing would be understood.
            self._drop()
            return
        pump = self._listener.shared.pump
        self._listener.left(self)
        pump.wheel.cancel(self)
        try:
            self._sock.send(response)
        except OSError:
            self._drop()
            return
        pump.linger(self._sock, self)

    def _drop(self) -> None:
        pump = self._listener.shared.pump
        self._listener.left(self)
        pump.wheel.cancel(self)
        pump.forget(self)
        with contextlib.suppress(OSError):
            self._sock.close()

    def due(self, now: float) -> None:  # noqa: ARG002 - the moment itself is the message
        """Give up on a head that does not come."""
        if not self._listener.shared.pump.holds(self):
            # It came, or the client went, while this moment was on its way.
            return
        self._refuse(Refusal(408, "the request head did not arrive in time"))

    def hung_up(self) -> None:
        """Note that the client is gone."""
        self._drop()

    def failed(self, bug: Exception) -> None:  # noqa: ARG002 - logged by the pump
        """End after a bug."""
        self._refuse(Refusal(500, "internal error"))
