"""The state directory (``DATA_DIR``): what one server keeps on disk, and who may use it.

    <DATA_DIR>/            0700
      lock                 flock held by the running supervisor; its pid is written in it
      control.sock         0600, served by the supervisor
      redis.sock           0700, served by the embedded Redis
      redis/               the embedded Redis's append-only files
      metrics/             one set of files per child, emptied at each start
      server               0600, who this server is, and when it was started last
      <name>.secret        0600, a generated secret

The lock is an advisory ``flock`` and not a pid file: the kernel lets go of it when the supervisor
dies, however it dies, so there is nothing stale to clean up and nothing to guess. Children do not
inherit it.
"""

import fcntl
import os
import re
import secrets
from pathlib import Path
from typing import Final

import attrs

from trioserver.errors import CommandError, SettingsError

_SOCKET_PATH_BYTES: Final = 107
"""The kernel's ``sun_path`` is 108 bytes with the final NUL."""

_SECRET_BYTES: Final = 64
"""As many as the longest key that is asked for: HS512 (RFC 7518 3.2)."""

_SERVER: Final = re.compile(r"([0-9a-f]{8}) ([0-9a-f]{1,12}) (\S+)\n")
"""Id, latest boot, origin. A boot beyond year 10,000 is no boot."""

_KERNEL: Final = Path("/proc/sys/kernel/random/boot_id")
"""Another one after each start of the machine."""

_SECRET_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]*")


def _absolute(path: Path) -> Path:
    return path.absolute()


@attrs.frozen
class StateDir:
    """The paths of one state directory. Making one touches nothing on disk."""

    path: Path = attrs.field(converter=_absolute)

    @property
    def lock(self) -> Path:
        """Held by the running supervisor."""
        return self.path / "lock"

    @property
    def control_socket(self) -> Path:
        """Where the supervisor answers ``status``, ``reload`` and ``stop``."""
        return self.path / "control.sock"

    @property
    def redis_socket(self) -> Path:
        """Where the embedded Redis listens."""
        return self.path / "redis.sock"

    @property
    def redis_dir(self) -> Path:
        """Where the embedded Redis keeps its append-only files."""
        return self.path / "redis"

    @property
    def metrics_dir(self) -> Path:
        """``PROMETHEUS_MULTIPROC_DIR`` of the children."""
        return self.path / "metrics"

    def create(self) -> None:
        """Make the directory and those in it, 0700. Idempotent; an existing one keeps its mode.

        Raises:
            SettingsError: The directory cannot be made, or the paths of its sockets would be
                longer than the kernel allows.
        """
        for socket_path in (self.control_socket, self.redis_socket):
            self._check_length(socket_path)
        for path in (self.path, self.redis_dir, self.metrics_dir):
            try:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise self._impossible(path, error) from error

    def acquire(self) -> "Lock":
        """Become the one server of this directory until `Lock.release` or death.

        Raises:
            CommandError: Another supervisor holds it; the text names its pid.
            SettingsError: The lock file cannot be opened.
        """
        try:
            fd = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._impossible(self.lock, error) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            raise CommandError(
                f"another trioserver (pid {holder}) is running with DATA_DIR {self.path}"
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return Lock(fd)

    def clear_metrics(self) -> None:
        """Remove the metrics files of an earlier run. Call it with the lock held.

        Two processes must never write to one file, and nobody is left to finish the old ones.
        """
        for path in self.metrics_dir.iterdir():
            if path.is_file():
                path.unlink(missing_ok=True)

    def next_boot(self, now: float) -> str:
        """Return a name for the run of the server that begins: ``<server id>.<boot>``.

        The id is 8 hex digits, made at the first call and then kept. No two servers have the same
        one: whoever copies a directory, or starts a copy of a whole machine, has another server; so
        there is a new id, too, when the machine was restarted. The boot is the time in milliseconds
        in hex, and always higher than the one before, also if the clock was set back or the one
        before was killed. So no such name exists twice. Call it with the lock held.

        Args:
            now: Unix time in seconds.

        Raises:
            SettingsError: The file cannot be read or written.
        """
        server, last = self._known_server()
        boot = max(int(now * 1000), last + 1)
        self._keep_server(server, boot)
        return f"{server}.{boot:x}"

    def _known_server(self) -> tuple[str, int]:
        """Return id and latest boot, 0 if there was none; a new id if none is kept."""
        try:
            text = (self.path / "server").read_text("ascii")
        except (FileNotFoundError, UnicodeDecodeError):
            text = ""
        except OSError as error:
            raise self._impossible(self.path / "server", error) from error
        known = _SERVER.fullmatch(text)
        # One file for all: an id without its latest boot would be no longer sure to be unique.
        if known is None or known[3] != self._origin():
            return secrets.token_hex(4), 0
        return known[1], int(known[2], 16)

    def _keep_server(self, server: str, boot: int) -> None:
        path = self.path / "server"
        draft = self.path / ".server.draft"
        try:
            # One that somebody was killed over; with the lock held nobody else is writing it.
            draft.unlink(missing_ok=True)
            _write_durably(draft, f"{server} {boot:x} {self._origin()}\n")
            draft.replace(path)
        except OSError as error:
            raise self._impossible(path, error) from error

    def _origin(self) -> str:
        """Return what tells this directory, on this machine, from every copy that is in use."""
        try:
            kernel = _KERNEL.read_text("ascii").strip()
        except (OSError, UnicodeDecodeError):  # Some sandboxes have none.
            kernel = ""
        try:
            status = self.path.stat()
        except OSError as error:
            raise self._impossible(self.path, error) from error
        return f"{kernel}:{status.st_dev:x}:{status.st_ino:x}"

    def secret(self, name: str) -> str:
        """Return the secret of that name, made at the first call: 86 characters, URL-safe.

        Safe against a concurrent first call: both get the same secret.

        Raises:
            SettingsError: It cannot be read or written.
        """
        known = self.read_secret(name)
        if known is not None:
            return known
        path = self.secret_path(name)
        draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            _write_durably(draft, f"{secrets.token_urlsafe(_SECRET_BYTES)}\n")
            try:
                # link(2) refuses to replace, rename(2) would: the first of two wins.
                os.link(draft, path)
            except FileExistsError:
                pass
            finally:
                draft.unlink()
        except OSError as error:
            raise self._impossible(path, error) from error
        return self.secret(name)

    def read_secret(self, name: str) -> str | None:
        """Return the secret of that name, or ``None`` if none was made yet.

        Raises:
            SettingsError: It is there and cannot be read, or is empty: an empty key would
                verify anybody's signature.
        """
        path = self.secret_path(name)
        try:
            text = path.read_text("utf-8").strip()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise self._impossible(path, error) from error
        if not text:
            raise SettingsError("DATA_DIR", f"{path} is empty", f"rm {path}")
        return text

    def secret_path(self, name: str) -> Path:
        """Return where the secret of that name is kept."""
        if _SECRET_NAME.fullmatch(name) is None:
            raise ValueError(f"not a secret's name: {name!r}")
        return self.path / f"{name}.secret"

    @staticmethod
    def _check_length(path: Path) -> None:
        length = len(os.fsencode(path))
        if length > _SOCKET_PATH_BYTES:
            raise SettingsError(
                "DATA_DIR",
                f"{path} is {length} bytes long; a Unix socket's path may have "
                f"{_SOCKET_PATH_BYTES} at most",
                "/var/lib/trioserver",
            )

    @staticmethod
    def _impossible(path: Path, error: Exception) -> SettingsError:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return SettingsError("DATA_DIR", f"{path}: {reason}", "/var/lib/trioserver")


@attrs.define(eq=False)
class Lock:
    """The right to run the one server of a state directory. Ends with the process at the latest."""

    _fd: int = attrs.field(alias="fd")

    def release(self) -> None:
        """Let somebody else in. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _write_durably(path: Path, text: str) -> None:
    # Synced before it gets its name: after a power cut there is a whole secret or none.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
