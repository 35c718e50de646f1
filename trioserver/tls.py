"""TLS for the sockets of the pump: a `TlsSocket` is used like the plain socket that it was.

OpenSSL does not see the socket here. It reads from one buffer in memory and writes to another,
and this class carries the bytes, for four reasons:

    * A turn is bounded. On a socket of its own, one read of OpenSSL goes on while records come
      that carry no data (key updates), and a client that sends nothing else would have the worker
      to itself: measured, half a megabyte of them took 0.4 s.
    * Nothing hides. What was taken out of the kernel is decrypted in the same call, so epoll,
      which sees the kernel alone, knows of everything that is left.
    * Nothing is retried. A write of OpenSSL that found the socket full would have to be repeated
      with the same bytes; here it always succeeds, and what the kernel did not take is ciphertext
      that waits in `TlsSocket` (less than two records).
    * A read costs one system call instead of two or three.

Who sends must come back while ciphertext waits, and only knows that by what was not taken. So
`send` leaves the last byte of such a record untaken until the kernel has the record.
"""

import contextlib
import errno
import select
import socket
import ssl
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, NoReturn

from trioserver.handshake import Refusal

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

READ: Final = select.EPOLLIN
WRITE: Final = select.EPOLLOUT
"""What `TlsSocket.handshake` waits for: as in the pump."""

RECORD_BYTES: Final = 4 << 10
"""Most that goes into one record, and that is read in one turn. The buffers between us and OpenSSL
never shrink: with 16 KiB each connection could come to keep 40 KiB for ever. And 4 KiB of key
updates cost 3 ms, so more would be too much for a turn."""

FRUITLESS_BYTES: Final = 32 << 10
"""What may come in a row without any data in it: the largest record is not half as long."""

_PLAIN: Final = Refusal(400, "this port speaks TLS: use https:// or wss://").response()
"""The answer to a client that speaks HTTP without TLS."""

_MOST_OWED: Final = 16 << 10
"""Bytes that OpenSSL may have written on its own account and nobody has sent yet."""

_RECORD_OVERHEAD: Final = 32
"""Bytes of a record beside its data, and a little more: a byte of data accounts for so many."""

_LONGEST: Final = 16 << 10
"""The most that a record can hold."""

# Unbound, because these are the plain ones, and a bound one kept would be a reference cycle.
_receive: Final = socket.socket.recv
_send: Final = socket.socket.send


class TlsSocket(socket.socket):
    """The server's end of a TLS connection; non-blocking. Made by `wrap`.

    Every error is an OSError, and "not now" is a BlockingIOError, as with a plain socket. What
    would go past TLS (``sendall``, ``recv_into``, ``makefile`` ...) is refused.
    """

    __slots__ = (
        "_ended",
        "_failure",
        "_fruitless",
        "_incoming",
        "_outgoing",
        "_owes",
        "_tls",
        "_waiting",
    )

    def __init__(self, context: ssl.SSLContext, sock: socket.socket) -> None:
        family, kind, proto = sock.family, sock.type, sock.proto
        super().__init__(family, kind, proto, fileno=sock.detach())
        self.setblocking(False)
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._waiting = b""
        """Ciphertext that the kernel has not taken."""
        self._owes = False
        """Whether the next byte to be sent is on its way already."""
        self._ended = False
        """Whether the end of the stream was found behind data."""
        self._fruitless = 0
        """Bytes that came beyond what their data would account for."""
        self._failure = ""
        """What has ended this connection in OpenSSL's words, if it was no ordinary end."""

    @property
    def begun(self) -> bool:
        """Whether the next byte to be sent is encrypted already, so that it must be sent."""
        return self._owes

    def version(self) -> str | None:
        """Return what was agreed on, such as "TLSv1.3"; None before the handshake is done."""
        return self._tls.version()

    def handshake(self) -> int:
        """Go on with the handshake as far as possible without waiting.

        Returns:
            `READ` or `WRITE` if it goes on when the socket is readable or writable; 0 when it is
            done. Then call `recv` at once: it may hold the client's first bytes already, and
            epoll does not know of them.

        Raises:
            OSError: It failed. The client was told, as far as it would listen; close the socket.
        """
        if self._waiting and not self._push():
            return WRITE
        fed = False
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                if not self._push():
                    return WRITE
                # Once per turn, or a client that sends fast enough would keep us here.
                if fed or not self._feed():
                    return READ
                fed = True
            except ssl.SSLError as error:
                self._fail(error)
                raise
            else:
                self._fruitless = 0
                self._push()
                return 0

    def _feed(self) -> bool:
        try:
            data = _receive(self, RECORD_BYTES)
        except BlockingIOError:
            return False
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "the end came before the TLS handshake")
        # OpenSSL would take a ClientHello of 128 KiB, and keep it while it is incomplete.
        self._fruitless += len(data)
        if self._fruitless > FRUITLESS_BYTES:
            raise OSError(errno.EPROTO, "the TLS handshake is too long")
        self._incoming.write(data)
        return True

    def recv(self, size: int, flags: int = 0, /) -> bytes:  # noqa: ARG002 - that of the base
        """Take what came: at least one byte, or b"" at the end.

        Args:
            size: Bytes taken from the kernel, at most `RECORD_BYTES`. What is returned may be
                longer, by what has come before of the same record.
            flags: Not used.

        Raises:
            BlockingIOError: No whole record is there.
            OSError: The connection broke, or the client broke TLS.
        """
        self._check()
        if self._ended:
            return b""
        # If there is something already, it came together with the end of the handshake.
        if not self._incoming.pending:
            data = _receive(self, min(size, RECORD_BYTES))
            if not data:
                # Without close_notify too: the frames inside know whether they are complete.
                return b""
            self._fruitless += len(data)
            self._incoming.write(data)
        pieces: list[bytes] = []
        try:
            over = self._read_on(pieces)
        except ssl.SSLError as error:
            self._fail(error)
            over = True
            if not pieces:
                raise
        if self._outgoing.pending > _MOST_OWED and not self._failure:
            # Alerts and the like that it has made us write without reading anything of us.
            self._failure = "TOO_MANY_ANSWERS"
        if pieces:
            gained = sum(map(len, pieces)) * _RECORD_OVERHEAD
            self._fruitless = max(0, self._fruitless - gained)
            if over:
                # What says so has left the kernel, so epoll must be told again.
                with contextlib.suppress(OSError):
                    super().shutdown(socket.SHUT_RD)
        elif not over:
            self._yielded_nothing()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _yielded_nothing(self) -> NoReturn:
        if self._fruitless > FRUITLESS_BYTES:
            self._failure = "TOO_MANY_RECORDS_WITHOUT_DATA"
            self._check()
        raise BlockingIOError(errno.EAGAIN, "no whole record yet")

    def _read_on(self, pieces: list[bytes]) -> bool:
        """Decrypt all that OpenSSL has been given; return whether the client has closed."""
        incoming, read = self._incoming, self._tls.read
        # OpenSSL takes no more than the record it gives, so most often that is the end of it.
        while incoming.pending:
            try:
                piece = read(_LONGEST)
            except ssl.SSLWantReadError:
                break
            except ssl.SSLZeroReturnError:
                piece = b""
            if not piece:
                self._ended = True
                return True
            pieces.append(piece)
        return False

    def _fail(self, error: ssl.SSLError) -> None:
        """End in failure; let the client have OpenSSL's alert, or words if it speaks plain HTTP."""
        # Not the error itself: its traceback would keep this socket.
        self._failure = error.reason or "TLS_ERROR"
        with contextlib.suppress(OSError):
            if error.reason == "HTTP_REQUEST":
                _send(self, _PLAIN)
            else:
                self._push()

    def _check(self) -> None:
        if self._failure:
            raise OSError(errno.EPROTO, f"TLS failed: {self._failure}")

    def send(self, data: "ReadableBuffer", flags: int = 0, /) -> int:  # noqa: ARG002 - as recv
        """Encrypt and send what the kernel takes; return how much of ``data`` that was.

        What was not taken must be sent next, before anything else (see `begun`).

        Raises:
            BlockingIOError: The kernel took nothing.
            OSError: The connection broke.
        """
        view = memoryview(data)
        size = len(view)
        self._check()
        if not size:
            return 0
        if self._waiting and not self._push():
            raise BlockingIOError(errno.EAGAIN, "the socket is full")
        taken = int(self._owes)
        self._owes = False
        while taken < size:
            taken += self._tls.write(view[taken : taken + RECORD_BYTES])
            if not self._push():
                self._owes = True
                if taken == 1:
                    raise BlockingIOError(errno.EAGAIN, "the socket is full")
                return taken - 1
        return taken

    def sendmsg(
        self,
        buffers: "Iterable[ReadableBuffer]",
        ancdata: "Iterable[tuple[int, int, ReadableBuffer]]" = (),
        flags: int = 0,  # noqa: ARG002 - as recv
        address: object = None,
        /,
    ) -> int:
        """Do what `send` does with ``buffers`` in a row; the rest can only be left out.

        A record holds whole buffers, or a part of one. So the byte that `send` leaves untaken is
        the first of a buffer only if that has no other.
        """
        if ancdata or address:
            _refuse()
        total = size = 0
        batch: list[ReadableBuffer] = []
        for buffer in (*buffers, None):
            length = 0 if buffer is None else memoryview(buffer).nbytes
            if batch and (buffer is None or size + length > RECORD_BYTES):
                try:
                    sent = self.send(batch[0] if len(batch) == 1 else b"".join(batch))
                except BlockingIOError:
                    if not total:
                        raise
                    return total
                total += sent
                if sent != size:
                    return total
                batch = []
                size = 0
            if buffer is not None:
                batch.append(buffer)
                size += length
        return total

    def _push(self) -> bool:
        """Give the kernel ciphertext; return whether it has all of it now."""
        data = self._outgoing.read()
        if self._waiting:
            data = self._waiting + data
        try:
            sent = _send(self, data) if data else 0
        except BlockingIOError:
            sent = 0
        self._waiting = data[sent:]
        return not self._waiting

    def shutdown(self, how: int, /) -> None:
        """Say close_notify, unless only reading ends, and shut down; waits for nothing.

        Raises:
            OSError: The connection is broken.
        """
        if how != socket.SHUT_RD and not self._failure:
            # It would like to wait for the answer, or there was no handshake.
            with contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()
            self._push()
        super().shutdown(how)

    def _refused(self, *_: object, **__: object) -> NoReturn:
        """Refuse what would read or write past TLS."""
        _refuse()

    sendall = sendto = sendfile = makefile = dup = _refused
    recv_into = recvfrom = recvfrom_into = _refused
    recvmsg = recvmsg_into = _refused


def _refuse() -> NoReturn:
    raise OSError(errno.EOPNOTSUPP, "this would go past TLS")


def wrap(context: ssl.SSLContext, sock: socket.socket) -> TlsSocket:
    """Take ``sock`` over as the server of a TLS connection; nothing is sent or read yet.

    Args:
        context: From `trioserver.certificate.context`.
        sock: Connected. It is detached: its descriptor belongs to what is returned, under the
            same number, so register it in the pump only now.
    """
    return TlsSocket(context, sock)
