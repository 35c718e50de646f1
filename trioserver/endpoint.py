"""Where Redis is: one frozen value, read from the settings. Pure, but for `tls_context`.

A URL means here what it means to redis-py, option by option; an option that would do nothing is
refused, because its author believes that it does something. So is what redis-py would quietly
read as something else: a "#" that cuts the URL short, a port 0 that becomes 6379.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import attrs

from trioserver.errors import SettingsError
from trioserver.setting_kinds import HOST, quoted
from trioserver.settings import Settings

if TYPE_CHECKING:
    import ssl


@attrs.frozen(kw_only=True)
class Tls:
    """How the server's certificate is checked and ours is shown."""

    verify: bool = True
    """Whether the server must prove who it is; False only for tests and old set-ups."""
    check_hostname: bool = True
    """Whether the certificate must be for the host that was dialled; needs `verify`."""
    ca_file: str | None = None
    """PEM file of authorities, trusted besides those of the system."""
    cert_file: str | None = None
    """PEM file of our own certificate, if the server asks for one."""
    key_file: str | None = None
    """PEM file of its key."""


def _mask(secret: str | None) -> str:
    return repr(None if secret is None else "***")


@attrs.frozen(kw_only=True)
class Endpoint:
    """One Redis server: a TCP address or a Unix socket, and the credentials."""

    host: str = "localhost"
    port: int = 6379
    path: str | None = None
    """Unix socket; with it host, port and tls mean nothing."""
    db: int = 0
    """Database number of commands. Publish and subscribe ignore it, by Redis's design."""
    username: str | None = None
    password: str | None = attrs.field(default=None, repr=_mask)
    tls: Tls | None = None

    @property
    def target(self) -> str:
        """The address for people: never a secret."""
        if self.path is not None:
            return f"unix://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.tls else 'redis'}://{host}:{self.port}/{self.db}"

    def masked(self, text: str) -> str:
        """Return ``text`` without our password: some errors of Redis repeat the command.

        Whatever of Redis's own words goes to a log or to a caller has been through here.
        """
        return text.replace(self.password, "***") if self.password else text


def endpoint(settings: Settings, embedded_socket: Path | None) -> Endpoint:
    """Return where Redis is.

    Args:
        settings: REDIS_URL, else REDIS_HOST and its companions, else the embedded Redis.
        embedded_socket: The Unix socket of the embedded one.

    Raises:
        SettingsError: REDIS_URL says something that is not understood, or there is no Redis.
    """
    if settings.redis_url is not None:
        return _from_url(settings.redis_url)
    if settings.redis_host is not None:
        return Endpoint(
            host=settings.redis_host,
            port=settings.redis_port,
            db=settings.redis_db,
            password=settings.redis_password,
            tls=Tls() if settings.redis_use_tls else None,
        )
    if embedded_socket is None:
        raise SettingsError("REDIS_URL", "is not set", _EXAMPLE)
    return Endpoint(path=str(embedded_socket))


def tls_context(tls: Tls) -> "ssl.SSLContext":
    """Return how a TLS connection is made; reads the files, so it blocks.

    Raises:
        SettingsError: A file that REDIS_URL names is missing, unreadable or of no use.
    """
    import ssl  # noqa: PLC0415 - 10 ms that a Redis without TLS does not cost

    context = ssl.create_default_context()
    context.check_hostname = tls.verify and tls.check_hostname
    context.verify_mode = ssl.CERT_REQUIRED if tls.verify else ssl.CERT_NONE
    try:
        if tls.ca_file is not None:
            context.load_verify_locations(cafile=tls.ca_file)
    except (OSError, ValueError) as error:
        raise _useless("ssl_ca_certs", tls.ca_file, error) from None
    try:
        if tls.cert_file is not None:
            # An empty password, because without one OpenSSL would ask at the terminal.
            context.load_cert_chain(tls.cert_file, tls.key_file, password="")
    except (OSError, ValueError) as error:
        names = "ssl_certfile and ssl_keyfile" if tls.key_file else "ssl_certfile"
        raise _useless(names, tls.key_file or tls.cert_file, error) from None
    return context


def _useless(option: str, path: str | None, error: Exception) -> SettingsError:
    reason = str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)
    reason = reason.replace("_", " ").lower()  # OpenSSL: NO_CERTIFICATE_OR_CRL_FOUND
    problem = f"{option}: {quoted(str(path))} cannot be used: {reason}"
    return SettingsError("REDIS_URL", problem, _EXAMPLE)


_EXAMPLE: Final = "redis://:password@redis.internal:6379/0"
_NO: Final = ("", "0", "f", "false", "n", "no")


def _from_url(url: str) -> Endpoint:
    if "#" in url:
        # What follows would be cut off; most often it is the rest of a password.
        raise SettingsError("REDIS_URL", 'contains "#", which is written %23', _EXAMPLE)
    try:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        where = _read(parts, options)
    except ValueError:
        raise SettingsError("REDIS_URL", "is not understood", _EXAMPLE) from None
    if options:
        names = ", ".join(sorted(options))
        raise SettingsError("REDIS_URL", f"has options that mean nothing here: {names}", _EXAMPLE)
    return where


def _read(parts: SplitResult, options: dict[str, str]) -> Endpoint:
    """Take what is understood out of ``options``; raise ValueError for nonsense."""
    path = unquote(parts.path)
    is_unix = parts.scheme == "unix"
    if not (is_unix and path) and parts.scheme not in {"redis", "rediss"}:
        raise ValueError(parts.scheme)
    # Without a host, it may be part of a password that has been taken for the port.
    host = "localhost" if is_unix else HOST.parse(unquote(parts.hostname or ""))
    port = 6379 if is_unix or parts.port is None else parts.port
    if port == 0:
        raise ValueError(port)
    in_path = "" if is_unix else path.strip("/")
    return Endpoint(
        host=host,
        port=port,
        path=path if is_unix else None,
        db=int(options.pop("db", in_path or "0")),
        username=unquote(parts.username) if parts.username else options.pop("username", None),
        password=unquote(parts.password) if parts.password else options.pop("password", None),
        tls=_read_tls(options) if parts.scheme == "rediss" else None,
    )


def _read_tls(options: dict[str, str]) -> Tls:
    demand = options.pop("ssl_cert_reqs", "required")
    if demand not in {"required", "none"}:
        raise ValueError(demand)
    return Tls(
        verify=demand == "required",
        check_hostname=options.pop("ssl_check_hostname", "yes").lower() not in _NO,
        ca_file=options.pop("ssl_ca_certs", None),
        cert_file=options.pop("ssl_certfile", None),
        key_file=options.pop("ssl_keyfile", None),
    )
