"""Certificates for tests, from an authority of their own, and a client that shows each step."""

import contextlib
import datetime as dt
import select
import socket
import ssl
import time
from pathlib import Path
from typing import Final

import trustme

from trioserver.certificate import context
from trioserver.tls import TlsSocket

LIMIT: Final = 10.0
"""Seconds after which waiting has failed."""


class Authority:
    """Issues certificates into a directory, and is trusted by its clients."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ca = trustme.CA()

    def issue(
        self, name: str = "localhost", *, begins: float = -60, ends: float = 30 * 86_400
    ) -> tuple[Path, Path]:
        """Write a certificate and its key; return where they are.

        Args:
            name: Of the host, and of the files.
            begins: When it begins to be valid, in seconds from now.
            ends: When it is no longer, in the same way.
        """
        now = dt.datetime.now(tz=dt.UTC)
        issued = self._ca.issue_cert(
            name,
            not_before=now + dt.timedelta(seconds=begins),
            not_after=now + dt.timedelta(seconds=ends),
        )
        cert, key = self.directory / f"{name}.crt", self.directory / f"{name}.key"
        cert.write_bytes(b"".join(one.bytes() for one in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(key))
        key.chmod(0o600)
        return cert, key

    def server(self) -> ssl.SSLContext:
        """Return the context of a server, as a worker makes it."""
        return context(*self.issue())

    def client(self) -> ssl.SSLContext:
        """Return the context of a client that believes this authority."""
        made = ssl.create_default_context()
        self._ca.configure_trust(made)
        return made


class Client:
    """The other end of a `TlsSocket`: OpenSSL's client in memory, so that each byte is ours.

    Args:
        sock: Connected, non-blocking.
        context: From `Authority.client`.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self.sock = sock
        self._heard = b""
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")

    @property
    def server_random(self) -> bytes:
        """The server's part of what the keys are made of, from its first message."""
        return self._heard[11:43]

    def records(self, *messages: bytes) -> bytes:
        """Return what would be sent for these messages: a record for each."""
        for message in messages:
            assert len(message) == self.tls.write(message)
        return self._outgoing.read()

    def closing(self) -> bytes:
        """Return what would be sent to say close_notify."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        return self._outgoing.read()

    def step(self) -> bytes:
        """Go on with the handshake by what has come; return what would be sent."""
        self._take()
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        return self._outgoing.read()

    def shake(self, server: TlsSocket) -> None:
        """Do the whole handshake with ``server``; fail if one of the two does."""
        limit = time.monotonic() + LIMIT
        done = False
        while not done or self.tls.version() is None:
            assert time.monotonic() < limit
            self.sock.send(self.step())
            select.select([server], [], [], 0.05)
            done = done or not server.handshake()

    def read(self, most: int = 1 << 20) -> bytes:
        """Return all that has come by now, at most so many bytes of ciphertext.

        Raises:
            EOFError: close_notify came, and nothing before it.
        """
        self._take(most)
        found = b""
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            while piece := self.tls.read(1 << 16):
                found += piece
            if not found:
                raise EOFError
        return found

    def _take(self, most: int = 1 << 20) -> None:
        with contextlib.suppress(BlockingIOError):
            data = self.sock.recv(most)
            self._heard = self._heard or data
            self._incoming.write(data)


def received(sock: TlsSocket, size: int = 1 << 14) -> bytes:
    """Return what ``recv`` gives as soon as it gives something."""
    limit = time.monotonic() + LIMIT
    while True:
        try:
            return sock.recv(size)
        except BlockingIOError:
            assert time.monotonic() < limit, "nothing came"
            select.select([sock], [], [], 1)
