"""Where Redis is: one frozen value, read from the settings. Pure.

A URL means here what it means to redis-py, option by option; an option that would do nothing is
refused, because its author believes that it does something.
"""

from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import attrs

from trioserver.errors import SettingsError
from trioserver.settings import Settings


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
        """Return ``text`` without our password: some errors of Redis repeat the command."""
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


_EXAMPLE: Final = "redis://:password@redis.internal:6379/0"
_NO: Final = ("", "0", "f", "false", "n", "no")


def _from_url(url: str) -> Endpoint:
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
    in_path = "" if is_unix else path.strip("/")
    return Endpoint(
        host=unquote(parts.hostname or "localhost"),
        port=parts.port or 6379,
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
