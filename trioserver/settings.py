"""Everything an operator can choose: one frozen class, and how its values are found.

A value comes from the strongest layer that has it:

    defaults < TOML file < environment < flags

Each layer is a mapping from names to text, so one pure path serves all of them: find the text,
parse it with the `Kind` of its setting, check what concerns several settings, build `Settings`.
Only `load` touches the outside, and only to read the file and to look at named paths.

A new setting is one more line in `Settings`: its environment name, its flag, its key in the
file, its row in ``trioserver config`` and in ``docs/settings.md`` all follow from that line.

Why an own loader and not typed-settings, which was tried: it merges layers well, but knows no
second name for a setting (``PORT`` for ``WS_PORT``), no bare number that means milliseconds in
two settings and seconds elsewhere, no foreign value that must be ignored (Kubernetes injects
``REDIS_PORT=tcp://...``), does not tell which variable a value came from, and reports a bad
value as an exception group, from which the one line that operators get would have to be dug out
again. What would be left of it is the merging of three mappings.
"""
# ruff: noqa: RUF009 - setting() returns a field of attrs, not a shared default

import functools
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, Generic, TypeVar

import attrs
import msgspec

from trioserver.errors import SettingsError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

DEFAULT_FILE = Path("trioserver.toml")
"""Read from the working directory if it is there and no other file is named."""

FILE_VARIABLE = "TRIOSERVER_CONFIG"
"""Names the TOML file; the flag ``--config`` is stronger."""

MASK = "***"

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
YEAR_SECONDS = 365 * 24 * 3600
_UNITS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_FACTORS = {"": 1, "k": KIB, "m": MIB, "g": GIB}
_WORDS = {"true": True, "1": True, "yes": True, "on": True}
_WORDS |= {"false": False, "0": False, "no": False, "off": False}
_SERVICE = re.compile(r"(?:tcp|udp|sctp)://")

# RFC 7518 3.2: a key for HMAC has at least the length of its hash.
_HMAC_KEY_BYTES = {"HS256": 32, "HS384": 48, "HS512": 64}
_SIGNATURES = ("RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "EdDSA")


# How values are printed: so that the same text, given as input, means the same value.


def _decimal_text(value: float) -> str:
    return format(Decimal(repr(value)).normalize(), "f")


def _duration_text(seconds: float) -> str:
    thousandths = round(seconds * 1000)
    if seconds == 0 or thousandths / 1000 != seconds:
        return _decimal_text(seconds) if seconds == 0 else f"{_decimal_text(seconds)}s"
    unit = next(unit for unit in ("d", "h", "m", "s", "ms") if thousandths % _UNITS[unit] == 0)
    return f"{thousandths // _UNITS[unit]}{unit}"


def _size_text(value: int) -> str:
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if value and value % factor == 0:
            return f"{value // factor}{unit}"
    return str(value)


def mask_url(url: str) -> str:
    """Return a URL without its credentials, also if it is too broken to be parsed."""
    scheme, separator, rest = url.partition("://")
    if "@" in rest:
        rest = f"{MASK}@{rest.rpartition('@')[2]}"
    rest = re.sub(r"(?i)((?:password|username)=)[^&]*", rf"\1{MASK}", rest)
    return f"{scheme}{separator}{rest}"


# Kinds: how one sort of value is written. A parser raises ValueError with the end of the
# sentence '"abc" ...'; it never repeats the value, which may be a secret.


@attrs.frozen(kw_only=True)
class Kind(Generic[T_co]):
    """How one sort of value is written."""

    parse: Callable[[str], T_co]
    """Text in, value out. Raises ValueError with the end of the sentence '"abc" ...'."""
    unit: str = ""
    """What a bare number counts."""
    show: Callable[[Any], str] = str
    """Value in, printable text out: text that means the same value, credentials masked."""


def _whole(text: str, what: str, low: int, high: int) -> int:
    # Not int(): that takes "8_081" and digits of other scripts.
    if not re.fullmatch(r"[0-9]{1,18}", text.strip()):
        raise ValueError(f"is not a {what}")
    if not low <= (value := int(text)) <= high:
        raise ValueError(f"is not a {what} from {low} to {high}")
    return value


def count(what: str = "whole number", *, low: int = 0, high: int = 1_000_000_000) -> Kind[int]:
    """Make a kind for whole numbers from ``low`` to ``high``."""
    return Kind(parse=lambda text: _whole(text, what, low, high))


def _duration(text: str, bare: str, low: float, high: float) -> float:
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,30})?) ?(ms|s|m|h|d)?", text.strip().lower())
    if match is None:
        raise ValueError("is not a duration")
    number, unit = match.groups()
    seconds = round(float(Decimal(number) * _UNITS[unit or bare] / 1000), 9)
    if not low <= seconds <= high:
        raise ValueError(f"is not from {_duration_text(low)} to {_duration_text(high)}")
    return seconds


def duration(*, bare: str = "s", low: float = 0, high: float = YEAR_SECONDS) -> Kind[float]:
    """Make a kind for durations, stored in seconds; a number without unit counts ``bare``."""
    unit = {"s": "seconds", "ms": "milliseconds"}[bare]
    return Kind(parse=lambda text: _duration(text, bare, low, high), unit=unit, show=_duration_text)


def _size(text: str, low: int, high: int) -> int:
    match = re.fullmatch(r"([0-9]{1,15}) ?([kmg]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise ValueError("is not a size in bytes")
    value = int(match[1]) * _FACTORS[match[2]]
    if not low <= value <= high:
        raise ValueError(f"is not from {_size_text(low)} to {_size_text(high)}")
    return value


def size(*, low: int = 0, high: int = GIB) -> Kind[int]:
    """Make a kind for sizes, stored in bytes; k, KB and KiB all mean 1,024."""
    return Kind(parse=lambda text: _size(text, low, high), unit="bytes", show=_size_text)


def _boolean(text: str) -> bool:
    value = _WORDS.get(text.strip().lower())
    if value is None:
        raise ValueError("is not true or false")
    return value


def _one_of(text: str, names: tuple[str, ...], synonyms: Mapping[str, str]) -> str:
    by_lower_case = {name.lower(): name for name in names}
    wanted = text.strip().lower()
    value = synonyms.get(wanted) or by_lower_case.get(wanted)
    if value is None:
        raise ValueError(f"is not one of {', '.join(names)}")
    return value


def choice(*names: str, synonyms: Mapping[str, str] | None = None) -> Kind[str]:
    """Make a kind for one of ``names``; case does not matter."""
    return Kind(parse=lambda text: _one_of(text, names, synonyms or {}))


def _text(text: str, pattern: str, problem: str) -> str:
    # A control character is an accident: most often the newline at the end of a file.
    if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", text):
        raise ValueError("contains a control character (a newline at the end?)")
    if not re.fullmatch(pattern, text):
        raise ValueError(problem)
    return text


def text_like(pattern: str, problem: str) -> Kind[str]:
    """Make a kind for text that matches ``pattern`` as a whole."""
    return Kind(parse=lambda text: _text(text, pattern, problem))


def _path(text: str) -> Path:
    # Absolute, because children and later commands may run in another directory.
    return Path(os.path.abspath(os.path.expanduser(_text(text, ".+", "is empty"))))  # noqa: PTH100, PTH111 - Path.expanduser raises for an unknown user


def _user_channel(text: str) -> str:
    if _text(text, ".+", "is empty").count("{user}") != 1:
        raise ValueError("does not contain {user} exactly once")
    return text


def _redis_url(text: str) -> str:
    return _text(
        text,
        r"rediss?://(?:.*@)?(?:\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::[0-9]{1,5})?(?:/[0-9]*)?(?:\?.*)?"
        r"|unix://(?:.*@)?/[^?]+(?:\?.*)?",
        "is not a URL with redis://, rediss:// or unix://",
    )


def _algorithms(text: str) -> tuple[str, ...]:
    names = (*_HMAC_KEY_BYTES, *_SIGNATURES)
    value = tuple(dict.fromkeys(_one_of(name, names, {}) for name in text.split(",")))
    # A verifier that takes both kinds can be fed the public key as an HMAC secret.
    if len({name in _HMAC_KEY_BYTES for name in value}) > 1:
        raise ValueError("mixes algorithms with a shared secret (HS...) and with a public key")
    return value


TEXT = text_like(".+", "is empty")
ANY_TEXT = text_like(".*", "")
HOST = text_like(r"[A-Za-z0-9._:%-]+", "is not a host name or an IP address")
PORT = count("port number", high=65_535)
BOOLEAN = Kind(parse=_boolean, show=lambda value: str(value).lower())
PATH = Kind(parse=_path)
DURATION = duration()
MILLISECONDS = duration(bare="ms")
SIZE = size()
MODE = choice("debug", "development", "test", "release", "production")
ALGORITHMS = Kind(parse=_algorithms, show=",".join)
REDIS_URL = Kind(parse=_redis_url, show=mask_url)
USER_CHANNEL = Kind(parse=_user_channel)


@attrs.frozen(kw_only=True)
class Setting:
    """What is known about one setting, apart from its value."""

    name: str = ""
    """Attribute of `Settings`, and key in the TOML file."""
    group: str
    """Heading on the page of settings."""
    kind: Kind[object]
    default: str
    """As it is printed; a description if it is computed; empty if there is none."""
    optional: bool
    """Whether empty text means "not set"."""
    about: str
    """What it does, for an operator."""
    example: str
    aliases: tuple[str, ...]
    """Other environment names, the strongest first; the canonical name beats them all."""
    secret: bool

    @property
    def env(self) -> str:
        """The canonical name: that of the environment variable."""
        return self.name.upper()

    @property
    def flags(self) -> tuple[str, ...]:
        """The flag, then its aliases."""
        return tuple(_flag(name) for name in (self.name, *self.aliases))

    def parse(self, text: str) -> object:
        """Return the value that ``text`` means.

        Raises:
            ValueError: With the end of the sentence '"abc" ...'.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("is not UTF-8") from None
        return None if self.optional and not text else self.kind.parse(text)

    def show(self, value: object) -> str:
        """Return ``value`` as it may be printed: as one would write it, secrets masked."""
        if value is None:
            return ""
        return MASK if self.secret else self.kind.show(value)


def _flag(name: str) -> str:
    return "--" + name.lower().replace("_", "-")


def setting(
    group: str,
    kind: Kind[T],
    default: T,
    about: str,
    *,
    example: str = "",
    aliases: tuple[str, ...] = (),
    secret: bool = False,
    shown: str = "",
) -> T:
    """Declare a field of `Settings`.

    Args:
        group: Heading on the page of settings.
        kind: How its values are written.
        default: Its value if nobody says anything; None makes the setting optional.
        about: What it does, for an operator.
        example: A good value, for error messages; the default serves if it is printable.
        aliases: Other environment names, the strongest first.
        secret: Never printed.
        shown: The description of a default that is computed.
    """
    printed = shown or ("" if default is None else kind.show(default))
    about_it = Setting(
        group=group,
        kind=kind,
        default=printed,
        optional=default is None,
        about=about,
        example=example or printed,
        aliases=aliases,
        secret=secret,
    )
    # Tracebacks and debuggers print values: the repr must be as safe as every other output.
    field: T = attrs.field(default=default, metadata={"setting": about_it}, repr=about_it.show)
    return field


def usable_cpus() -> int:
    """Return the number of CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


def default_data_dir(environ: Mapping[str, str], port: int) -> Path:
    """Return where state is kept unless ``DATA_DIR`` says otherwise.

    A relative ``XDG_STATE_HOME`` is ignored, as its specification demands.

    Raises:
        SettingsError: There is no home directory.
    """
    state = environ.get("XDG_STATE_HOME", "")
    if not state.startswith("/"):
        home = environ.get("HOME") or os.path.expanduser("~")  # noqa: PTH111 - never raises
        if not home.startswith("/"):
            problem = "is not set, and without HOME there is no place to keep state"
            raise SettingsError("DATA_DIR (default)", problem, "DATA_DIR=/var/lib/trioserver")
        state = f"{home}/.local/state"
    return Path(state, "trioserver", str(port))


LISTENING = "Listening"
PROCESSES = "Processes and files"
REDIS = "Redis"
CHANNELS = "Channels"
TOKENS = "Tokens"
CONNECTIONS = "Connections"
LIMITS = "Limits"
DRAINING = "Draining"
LOGS = "Logs"


@attrs.frozen(kw_only=True)
class Settings:
    """Everything an operator can choose: built once by `load`, then passed down.

    Durations are seconds, sizes are bytes; 0 means "no limit" where the value is a limit.
    """

    ws_host: str = setting(
        LISTENING,
        HOST,
        "0.0.0.0",
        "Address of the public port: WebSocket, and small answers for load balancers.",
        aliases=("HOST",),
    )
    ws_port: int = setting(
        LISTENING,
        PORT,
        8081,
        "The public port. 0 takes any free one.",
        aliases=("PORT", "WEBSOCKET_PORT"),
    )
    admin_host: str = setting(
        LISTENING,
        HOST,
        "127.0.0.1",
        "Address of the internal port: health, metrics, API. It is not meant for the Internet.",
    )
    admin_port: int = setting(LISTENING, PORT, 9081, "The internal port. 0 takes any free one.")
    workers: int = setting(
        PROCESSES,
        count(low=1, high=1024),
        attrs.Factory(usable_cpus),
        "Worker processes. Each uses one CPU; connections are spread over them.",
        example="4",
        shown="one per usable CPU",
    )
    data_dir: Path = setting(
        PROCESSES,
        PATH,
        attrs.Factory(lambda: default_data_dir({}, 8081)),
        "State directory: lock, control socket, generated secrets, embedded Redis, metrics. "
        "One per server.",
        example="/var/lib/trioserver",
        shown="$XDG_STATE_HOME/trioserver/<WS_PORT>",
    )
    ws_mode: str | None = setting(
        PROCESSES,
        MODE,
        None,
        "debug or development write the log for people instead of programs.",
        example="release",
    )
    redis_url: str | None = setting(
        REDIS,
        REDIS_URL,
        None,
        "Where Redis is. It beats REDIS_HOST and its companions. Without both, a Redis of its "
        "own runs in DATA_DIR.",
        example="redis://127.0.0.1:6379/0",
    )
    redis_host: str | None = setting(
        REDIS,
        HOST,
        None,
        "Host of Redis, for those who prefer separate values to REDIS_URL.",
        example="redis.internal",
    )
    redis_port: int = setting(
        REDIS,
        count("port number", low=1, high=65_535),
        6379,
        "Port of Redis, beside REDIS_HOST. A value that Kubernetes injects "
        "(tcp://...) is ignored with a warning.",
    )
    redis_password: str | None = setting(
        REDIS, TEXT, None, "Password of Redis, beside REDIS_HOST.", example="s3cret", secret=True
    )
    redis_db: int = setting(
        REDIS,
        count("database number"),
        0,
        "Database of Redis, beside REDIS_HOST. Channels are shared by all databases: see "
        "CHANNEL_PREFIX.",
    )
    redis_use_tls: bool = setting(
        REDIS, BOOLEAN, False, "Whether Redis is spoken to with TLS, beside REDIS_HOST."
    )
    redis_pool_size: int = setting(
        REDIS,
        count(low=1, high=10_000),
        10,
        "Connections to Redis per process, apart from the one that subscribes.",
    )
    channel_prefix: str = setting(
        CHANNELS,
        ANY_TEXT,
        "",
        "Put before every channel name, so that several servers can share one Redis.",
        example="staging:",
    )
    user_channel: str = setting(
        CHANNELS,
        USER_CHANNEL,
        "user_noti:{user}",
        "Channel of one user; {user} stands for the user's id.",
        example="channels:user:{user}",
    )
    broadcast_channel: str = setting(
        CHANNELS, TEXT, "channels:broadcast", "Channel whose messages reach every connection."
    )
    jwt_secret_key: str | None = setting(
        TOKENS,
        TEXT,
        None,
        "Shared secret of HS256, HS384 and HS512: at least 32, 48 or 64 bytes. Without it a "
        "random one is made and kept in DATA_DIR.",
        example="$(openssl rand -base64 48)",
        aliases=("JWT_SECRET",),
        secret=True,
    )
    jwt_public_key_file: Path | None = setting(
        TOKENS,
        PATH,
        None,
        "PEM file with the public key for the RS, ES and EdDSA algorithms.",
        example="/etc/trioserver/jwt.pub.pem",
    )
    jwt_algorithms: tuple[str, ...] = setting(
        TOKENS,
        ALGORITHMS,
        ("HS256",),
        "Algorithms that a token may use: all with a shared secret, or all with a public key.",
        example="RS256,ES256",
    )
    jwt_audience: str | None = setting(
        TOKENS,
        TEXT,
        None,
        "If set, a token must carry this audience (aud).",
        example="notifications",
    )
    jwt_issuer: str | None = setting(
        TOKENS,
        TEXT,
        None,
        "If set, a token must carry this issuer (iss).",
        example="https://login.example.com",
    )
    jwt_leeway: float = setting(
        TOKENS,
        duration(high=3600),
        30.0,
        "How far the clocks of server and issuer may differ.",
    )
    jwt_query_token: bool = setting(
        TOKENS,
        BOOLEAN,
        True,
        "Whether a token may come in the query of the URL, where proxies may log it.",
    )
    ws_ping_interval: float = setting(
        CONNECTIONS,
        DURATION,
        30.0,
        "Time between WebSocket pings to one client. 0 sends none.",
    )
    ws_pong_wait: float = setting(
        CONNECTIONS,
        duration(low=0.001),
        60.0,
        "A client that answers no ping for this long is gone (4411).",
    )
    ws_write_wait: float = setting(
        CONNECTIONS,
        DURATION,
        10.0,
        "A client whose socket takes nothing for this long is gone. 0 waits for ever.",
    )
    heartbeat_interval: float = setting(
        CONNECTIONS,
        MILLISECONDS,
        30.0,
        "Time between heartbeat messages to one client. 0 sends none.",
        example="30000",
    )
    connection_timeout: float = setting(
        CONNECTIONS,
        MILLISECONDS,
        300.0,
        "A connection that sends nothing for this long is closed, but only if pings are off. "
        "0 never closes it.",
        example="300000",
    )
    handshake_timeout: float = setting(
        CONNECTIONS,
        DURATION,
        5.0,
        "Time for the whole opening handshake, from accept to upgrade. 0 waits for ever.",
    )
    auth_timeout: float = setting(
        CONNECTIONS,
        DURATION,
        10.0,
        "Time for the first message to bring a token, if the handshake brought none (4408). "
        "0 waits for ever.",
    )
    ws_max_connections: int = setting(
        LIMITS,
        count(),
        10_000,
        "Connections of the whole server; more are refused with 503. 0 is no limit.",
        aliases=("MAX_CONNECTIONS",),
    )
    ws_max_message_size: int = setting(
        LIMITS, SIZE, 16 * KIB, "Largest message from a client (1009). 0 is no limit."
    )
    notification_max_size: int = setting(
        LIMITS, SIZE, 10 * KIB, "Largest payload of a notification. 0 is no limit."
    )
    outbox_max_bytes: int = setting(
        LIMITS,
        SIZE,
        MIB,
        "Unsent bytes after which a client is too slow (4410). 0 is no limit.",
    )
    outbox_max_frames: int = setting(
        LIMITS,
        count(),
        256,
        "Unsent frames after which a client is too slow (4410). 0 is no limit.",
    )
    ws_read_buffer_size: int = setting(
        LIMITS, SIZE, 0, "Receive buffer of each socket in the kernel. 0 leaves it to the kernel."
    )
    ws_write_buffer_size: int = setting(
        LIMITS,
        SIZE,
        128 * KIB,
        "Send buffer of each socket in the kernel: what a client that does not read can bind "
        "there. 0 leaves it to the kernel.",
    )
    drain_seconds: float = setting(
        DRAINING,
        duration(low=0.001, high=86_400),
        30.0,
        "Time between the request to stop and the end of the last connection. It must be "
        "shorter than the grace period of the container.",
    )
    drain_propagation: float = setting(
        DRAINING,
        duration(high=86_400),
        5.0,
        "First part of DRAIN_SECONDS: not ready any more, but still accepting, while load "
        "balancers take notice.",
        shown="5s, at most a sixth of DRAIN_SECONDS",
        example="5s",
    )
    log_level: str = setting(
        LOGS,
        choice("debug", "info", "warning", "error", "critical", synonyms={"warn": "warning"}),
        "info",
        "Least severity that is written.",
        aliases=("LOGGER_LEVEL",),
    )
    logger_encoding: str = setting(
        LOGS,
        choice("auto", "json", "console"),
        "auto",
        "json is for programs, console for people. auto is console on a terminal or with a "
        "debug or development mode, else json.",
        example="json",
    )
    logger_mode: str | None = setting(
        LOGS,
        MODE,
        None,
        "debug or development write the log for people instead of programs.",
        example="production",
    )
    log_dir: Path | None = setting(
        LOGS,
        PATH,
        None,
        "Directory for log files, beside standard error: one per process and day, compressed "
        "afterwards, kept 14 days, errors 30.",
        example="/var/log/trioserver",
    )

    @property
    def embedded_redis(self) -> bool:
        """Whether the supervisor runs a Redis of its own."""
        return self.redis_url is None and self.redis_host is None

    @property
    def redis_target(self) -> str:
        """Where Redis is, for people: without credentials."""
        if self.redis_url is not None:
            return mask_url(self.redis_url)
        if self.redis_host is None:
            return f"embedded, in {self.data_dir}"
        scheme = "rediss" if self.redis_use_tls else "redis"
        host = f"[{self.redis_host}]" if ":" in self.redis_host else self.redis_host
        return f"{scheme}://{host}:{self.redis_port}/{self.redis_db}"

    def snapshot(self) -> bytes:
        """Return all values as JSON, secrets included: for children, not for eyes."""
        return msgspec.json.encode(self, enc_hook=str)

    @staticmethod
    def restore(snapshot: bytes) -> "Settings":
        """Return what `snapshot` was taken of.

        Settings that this release does not know are ignored, those that the snapshot does not
        know have their defaults: during a reload two releases may meet. Nothing is checked
        again, because what a path names may have changed since.

        Raises:
            SettingsError: That is no snapshot.
        """
        try:
            return msgspec.json.decode(snapshot, type=Settings, dec_hook=_restore_path)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise SettingsError("settings snapshot", f"cannot be read: {error}") from error


def _restore_path(kind: type, value: object) -> object:
    return kind(value)


@functools.cache
def all_settings() -> Mapping[str, Setting]:
    """Return what is known about every setting, by attribute name, in the order of the page."""
    return {
        field.name: attrs.evolve(field.metadata["setting"], name=field.name)
        for field in attrs.fields(Settings)
    }


def find(name: str) -> Setting | None:
    """Return the setting with this name: canonical, alias or flag, in any case."""
    return _by_any_name().get(_plain_name(name))


def suggest(name: str) -> str:
    """Return the known name most like ``name``, in lower case; empty if none is like it."""
    import difflib  # noqa: PLC0415 - only mistakes need it

    return next(iter(difflib.get_close_matches(_plain_name(name), _by_any_name(), n=1)), "")


def _plain_name(name: str) -> str:
    return name.removeprefix("--").replace("-", "_").lower()


@functools.cache
def _by_any_name() -> Mapping[str, Setting]:
    return {
        name.lower(): one for one in all_settings().values() for name in (one.name, *one.aliases)
    }


@attrs.frozen(kw_only=True)
class FlagOption:
    """A command-line option that sets one setting."""

    names: tuple[str, ...]
    """``--ws-port``, then its aliases: ``--port``."""
    help: str
    setting: str
    """The key under which `load` takes its text."""


def flag_options() -> list[FlagOption]:
    """Return an option for each setting; each takes one text, None means "not given"."""
    return [
        FlagOption(names=one.flags, help=_help(one), setting=one.name)
        for one in all_settings().values()
    ]


def _help(one: Setting) -> str:
    default = f" Default: {one.default}." if one.default else ""
    # A command line can be read by every user of the machine.
    caution = f" Better given as {one.env} in the environment." if one.secret else ""
    return f"{one.about}{default}{caution}"


@attrs.frozen(kw_only=True)
class Loaded:
    """The settings in force, and where they came from."""

    settings: Settings
    sources: Mapping[str, str]
    """Canonical name to ``default``, ``file <path>``, ``environment``, ``environment <alias>``
    or the flag."""
    warnings: tuple[str, ...]
    """One line each: what was given and is not used."""


@attrs.frozen
class _Given:
    """The text of one value, as somebody wrote it."""

    text: str = attrs.field(repr=False)
    source: str
    spelling: str
    """How it is written there: for the example."""


def load(
    flags: Mapping[str, str | None], environ: Mapping[str, str], config_file: Path | None
) -> Loaded:
    """Find, parse and check all settings.

    Args:
        flags: Text by name: attribute, alias or the flag itself; None means "not given".
        environ: Names that are no setting are ignored, so are empty values.
        config_file: What ``--config`` named. Without it, ``TRIOSERVER_CONFIG`` names the file;
            without both it is ``trioserver.toml`` in the working directory, if it exists.

    Raises:
        SettingsError: A value is impossible, a key of the file or a flag is no setting, or the
            named file cannot be read. The first problem that is found, in one line.
    """
    warnings: list[str] = []
    given = {
        **_from_file(config_file, environ),
        **_from_environment(environ, warnings),
        **_from_flags(flags),
    }
    values: dict[str, Any] = {
        name: _parse(all_settings()[name], one) for name, one in given.items()
    }
    settings = _with_computed_defaults(Settings(**values), given.keys(), environ)
    for name, problem, example in _conflicts(settings):
        raise _error(all_settings()[name], given.get(name), problem, example)
    sources = {
        one.env: given[name].source if name in given else "default"
        for name, one in all_settings().items()
    }
    return Loaded(
        settings=settings, sources=sources, warnings=(*warnings, *_without_effect(settings, given))
    )


def _with_computed_defaults(
    settings: Settings, given: Collection[str], environ: Mapping[str, str]
) -> Settings:
    if "data_dir" not in given:
        settings = attrs.evolve(settings, data_dir=default_data_dir(environ, settings.ws_port))
    if "drain_propagation" not in given:
        part = min(settings.drain_propagation, settings.drain_seconds / 6)
        settings = attrs.evolve(settings, drain_propagation=part)
    return settings


def _from_environment(environ: Mapping[str, str], warnings: list[str]) -> dict[str, _Given]:
    given: dict[str, _Given] = {}
    for one in all_settings().values():
        for name in (one.env, *one.aliases):
            text = environ.get(name, "")
            if name.endswith("PORT") and _SERVICE.match(text):
                warnings.append(
                    f"{name} (environment): {_quoted(text)} is ignored: it describes a service "
                    "of Kubernetes or Docker"
                )
            elif text and one.name not in given:
                source = "environment" if name == one.env else f"environment {name}"
                given[one.name] = _Given(text, source, f"{name}=")
    return given


def _from_flags(flags: Mapping[str, str | None]) -> dict[str, _Given]:
    given: dict[str, _Given] = {}
    for name, text in flags.items():
        one = find(name)
        flag = _flag(_plain_name(name))
        if one is None:
            raise SettingsError(flag, _unknown(_flag(suggest(name))))
        if text is not None and (one.name not in given or flag == one.flags[0]):
            given[one.name] = _Given(text, flag, f"{flag} ")
    return given


def _from_file(config_file: Path | None, environ: Mapping[str, str]) -> dict[str, _Given]:
    if config_file is not None:
        return _from_toml(config_file, "--config")
    if named := environ.get(FILE_VARIABLE):
        return _from_toml(Path(named), f"{FILE_VARIABLE} (environment)")
    # os.path, because Path.exists() raises in a directory that may not be searched.
    exists = os.path.exists(DEFAULT_FILE)  # noqa: PTH110
    return _from_toml(DEFAULT_FILE, "configuration file") if exists else {}


def _from_toml(path: Path, named_by: str) -> dict[str, _Given]:
    import tomllib  # noqa: PLC0415 - children have no file to read

    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problem = f"{_quoted(str(path))} cannot be read: {error.strerror}"
        raise SettingsError(named_by, problem) from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        problem = f"{_quoted(str(path))} is not TOML: {error}"
        raise SettingsError(named_by, problem, "ws_port = 8081") from error
    source = f"file {_quoted(str(path))[1:-1]}"
    given: dict[str, _Given] = {}
    for key, value in document.items():
        one = find(key)
        if one is None:
            raise SettingsError(f"{_quoted(key)[1:-1]} ({source})", _unknown(suggest(key)))
        if one.name not in given or key.lower() == one.name:
            try:
                given[one.name] = _Given(_toml_text(value), source, f"{key} = ")
            except ValueError as error:
                raise _error(one, _Given("", source, f"{key} = "), str(error)) from error
    return given


def _toml_text(value: object) -> str:
    match value:
        case str():
            return value
        case bool():
            return str(value).lower()
        case int():
            return str(value)
        case float():
            return _decimal_text(value)
        case list():
            return ",".join(map(_toml_text, value))
        case _:
            raise ValueError("is neither text, number, true, false nor a list of these")


def _unknown(suggestion: str) -> str:
    known = suggestion.strip("-")
    return f"is not a setting; did you mean {suggestion}?" if known else "is not a setting"


def _parse(one: Setting, given: _Given) -> object:
    try:
        return one.parse(given.text)
    except ValueError as error:
        value = "the value" if one.secret or one.kind is REDIS_URL else _quoted(given.text)
        raise _error(one, given, f"{value} {error}") from error


def _error(
    one: Setting, given: _Given | None, problem: str, example: str | None = None
) -> SettingsError:
    """Say what is wrong, where it was written, and how it would be right there."""
    source, spelling = (given.source, given.spelling) if given else ("default", f"{one.env}=")
    example = one.example if example is None else example
    if spelling.endswith(" = ") and not re.fullmatch(r"[0-9]+|true|false", example):
        example = json.dumps(example)
    return SettingsError(f"{one.env} ({source})", problem, f"{spelling}{example}")


def _quoted(text: str) -> str:
    # repr() escapes whatever would not stay on one line.
    shown = repr(text)[1:-1]
    return f'"{shown}"' if len(shown) <= 80 else f'"{shown[:77]}..."'  # noqa: PLR2004 - a line


def _conflicts(settings: Settings) -> Iterator[tuple[str, str, str | None]]:
    """Find what concerns several settings, or the world: name, problem, a better value."""
    yield from _port_conflicts(settings)
    yield from _token_conflicts(settings)
    if settings.drain_propagation >= settings.drain_seconds:
        whole = _duration_text(settings.drain_seconds)
        part = _duration_text(settings.drain_propagation)
        problem = f"{part} is not shorter than DRAIN_SECONDS ({whole})"
        yield "drain_propagation", problem, "0"
    yield from _channel_conflicts(settings)
    for directory in ("data_dir", "log_dir"):
        path = getattr(settings, directory)
        # os.path, because Path.exists() raises where a parent may not be searched.
        if path is not None and os.path.exists(path) and not os.path.isdir(path):  # noqa: PTH110, PTH112
            yield directory, f"{_quoted(str(path))} is not a directory", None


def _port_conflicts(settings: Settings) -> Iterator[tuple[str, str, str | None]]:
    port = settings.admin_port
    hosts = {settings.ws_host, settings.admin_host}
    if settings.ws_port == port != 0 and (len(hosts) == 1 or hosts & {"0.0.0.0", "::"}):
        yield "admin_port", f"{port} is also WS_PORT", str(port % 65_535 + 1)


def _channel_conflicts(settings: Settings) -> Iterator[tuple[str, str, str | None]]:
    before, _, after = settings.user_channel.partition("{user}")
    everyone = settings.broadcast_channel
    long_enough = len(everyone) > len(before + after)
    if long_enough and everyone.startswith(before) and everyone.endswith(after):
        # Else a message to the user with that name would reach everyone.
        changed = settings.user_channel != all_settings()["user_channel"].default
        name = "user_channel" if changed else "broadcast_channel"
        yield name, f"BROADCAST_CHANNEL {_quoted(everyone)} would belong to a user", None


def _token_conflicts(settings: Settings) -> Iterator[tuple[str, str, str | None]]:
    algorithms = ",".join(settings.jwt_algorithms)
    least = max(_HMAC_KEY_BYTES.get(name, 0) for name in settings.jwt_algorithms)
    if least and settings.jwt_secret_key is not None:
        length = len(settings.jwt_secret_key.encode())
        if length < least:
            problem = f"{length} bytes are too few: {algorithms} needs at least {least}"
            yield "jwt_secret_key", problem, None
    if not least and settings.jwt_public_key_file is None:
        yield "jwt_public_key_file", f"is not set, but JWT_ALGORITHMS={algorithms} needs it", None
    if settings.jwt_public_key_file is not None:
        problem = _public_key_problem(settings.jwt_public_key_file)
        if problem:
            yield (
                "jwt_public_key_file",
                f"{_quoted(str(settings.jwt_public_key_file))} {problem}",
                None,
            )


def _public_key_problem(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if b"PRIVATE KEY-----" in content:
        return "holds a private key; tokens are checked with the public one"
    return "" if b"PUBLIC KEY-----" in content else "is not a PEM file with a public key"


def _without_effect(settings: Settings, given: Mapping[str, _Given]) -> Iterator[str]:
    """Find what was said on purpose and changes nothing: one line each."""
    apart = ("redis_port", "redis_password", "redis_db", "redis_use_tls")
    idle: dict[str, str] = {}
    if settings.redis_url is not None:
        idle = dict.fromkeys(("redis_host", *apart), "REDIS_URL is set")
    elif settings.redis_host is None:
        idle = dict.fromkeys(apart, "neither REDIS_URL nor REDIS_HOST is set")
    if settings.jwt_algorithms[0] in _HMAC_KEY_BYTES:
        idle |= {"jwt_public_key_file": "JWT_ALGORITHMS uses a shared secret"}
    else:
        idle |= {"jwt_secret_key": "JWT_ALGORITHMS uses a public key"}
    for name, reason in idle.items():
        if name in given:
            yield f"{name.upper()} ({given[name].source}): has no effect, because {reason}"
