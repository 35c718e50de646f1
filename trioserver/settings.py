"""Everything an operator can choose: one frozen class, the table of settings.

A new setting is one more line in `Settings`: its environment name, its flag, its key in the
file, its row in ``trioserver config`` and in ``docs/settings.md`` all follow from that line.
How a value is written is told by its kind (`trioserver.setting_kinds`), where it is found by
`trioserver.settings_load`.
"""
# ruff: noqa: RUF009 - setting() returns a field of attrs, not a shared default

import functools
import os
from collections.abc import Mapping
from pathlib import Path

import attrs
import msgspec

from trioserver.errors import SettingsError
from trioserver.setting_fields import Setting, plain_name, setting
from trioserver.setting_kinds import (
    ALGORITHMS,
    ANY_TEXT,
    API_KEYS,
    BOOLEAN,
    DAY_SECONDS,
    DURATION,
    HOST,
    KIB,
    MIB,
    MILLISECONDS,
    MODE,
    ORIGINS,
    PATH,
    PORT,
    PROXIES,
    REDIS_URL,
    SIZE,
    SLOW_CONSUMERS,
    TEXT,
    TOPIC_PATTERNS,
    USER_CHANNEL,
    choice,
    count,
    duration,
    mask_url,
    number,
)


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
NOTIFICATIONS = "Notifications"
TOPICS = "Topics"
CHAT = "Chat sessions"
TOKENS = "Tokens"
API = "API"
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
    notification_ttl: float = setting(
        NOTIFICATIONS,
        duration(low=1, high=30 * DAY_SECONDS),
        7.0 * DAY_SECONDS,
        "How long a notification is kept for devices that are away, unless it says otherwise "
        "itself. What nobody has fetched by then expires, and is announced as a gap.",
    )
    inbox_max_length: int = setting(
        NOTIFICATIONS,
        count(low=1, high=100_000),
        1000,
        "Notifications kept per user, and as many for everyone. One more pushes out the oldest, "
        "which is announced as a gap.",
    )
    events_max_length: int = setting(
        NOTIFICATIONS,
        count(low=1),
        10_000,
        "Events (accepted, received, read ...) kept in each of the 64 event streams, roughly; "
        "older ones go, whether a back end has read them or not.",
    )
    idempotency_ttl: float = setting(
        NOTIFICATIONS,
        duration(low=1, high=30 * DAY_SECONDS),
        300.0,
        "How long an idempotency key is remembered.",
    )
    ack_wait: float = setting(
        NOTIFICATIONS,
        duration(high=DAY_SECONDS),
        30.0,
        "A client that promised to acknowledge and has not for this long gets the notification "
        "again. 0 leaves that to its next connect.",
    )
    max_redeliveries: int = setting(
        NOTIFICATIONS,
        count(high=1000),
        5,
        "How often ACK_WAIT sends a notification again; after that it waits for the next "
        "connect. 0 is never.",
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
    jwt_secret_key_previous: str | None = setting(
        TOKENS,
        TEXT,
        None,
        "The secret before this one: tokens made with it are still good, so that changing it "
        "locks nobody out. Take it away when the last of them has expired.",
        example="$(cat old.secret)",
        secret=True,
    )
    jwt_jwks_url: str | None = setting(
        TOKENS,
        TEXT,
        None,
        "Where the issuer publishes its public keys (JWKS). Fetched every 5 minutes, and when a "
        "token names a key that is not known; known keys stay good for a day if that fails.",
        example="https://login.example.com/.well-known/jwks.json",
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
        "If set, a token must carry this audience (aud). Without it, tokens of JWT_JWKS_URL that "
        "carry any are refused: they are for another application.",
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
    ws_allowed_origins: tuple[str, ...] | None = setting(
        CONNECTIONS,
        ORIGINS,
        None,
        "Whose web pages may connect: origins, separated by commas; https://*.example.com stands "
        "for one label; * alone is everybody. Unset, a page must be from the host and port that "
        "its browser connected to. Clients that are no browsers say no origin, and may connect.",
        example="https://example.com,https://*.example.com",
    )
    api_keys: tuple[str, ...] | None = setting(
        API,
        API_KEYS,
        None,
        "Keys with which back ends may use the API of the internal port, separated by commas. "
        "Without them a random one is made and kept in DATA_DIR.",
        example="$(uuidgen)",
        secret=True,
    )
    tls_cert: Path | None = setting(
        LISTENING,
        PATH,
        None,
        "PEM file with the certificate of the public port and its chain: turns TLS on. A reload "
        "(SIGHUP) reads it again.",
        example="/etc/trioserver/tls.crt",
    )
    tls_key: Path | None = setting(
        LISTENING,
        PATH,
        None,
        "PEM file with the private key for TLS_CERT.",
        example="/etc/trioserver/tls.key",
    )
    trusted_proxies: tuple[str, ...] = setting(
        LISTENING,
        PROXIES,
        (),
        "Networks of the proxies whose X-Forwarded-For or PROXY protocol is believed, separated "
        "by commas; the word forwarded among them reads Forwarded instead. Of everybody else "
        "the address of the connection counts.",
        example="10.0.0.0/8,2001:db8::/32",
    )
    public_topics: tuple[str, ...] = setting(
        TOPICS,
        TOPIC_PATTERNS,
        (),
        "Topics that everybody with a token may subscribe to, beside those in the claim topics of "
        "his token. Patterns, separated by commas: * stands for anything but . : and /, ** for "
        "anything.",
        example="news.**,status",
    )
    durable_topics: tuple[str, ...] = setting(
        TOPICS,
        TOPIC_PATTERNS,
        (),
        "Topics whose latest notifications are kept, so that clients may go on where they stopped. "
        "Patterns, as in PUBLIC_TOPICS; all others are live only.",
        example="news.**,room.*",
    )
    topic_history_length: int = setting(
        TOPICS,
        count(low=1, high=100_000),
        100,
        "Notifications that are kept of one durable topic.",
    )
    topic_history_ttl: float = setting(
        TOPICS,
        duration(low=1, high=30 * DAY_SECONDS),
        3600.0,
        "How long a notification of a durable topic is kept.",
    )
    max_topics_per_connection: int = setting(
        TOPICS,
        count(high=10_000),
        100,
        "Topics of one connection; one more is refused (too_many_topics). 0 is no limit.",
    )
    presence_topics: tuple[str, ...] = setting(
        TOPICS,
        TOPIC_PATTERNS,
        ("**",),
        "Topics of which it is kept who is subscribed, for lists and counts. Patterns, as in "
        "PUBLIC_TOPICS.",
        example="room.*",
    )
    announced_topics: tuple[str, ...] = setting(
        TOPICS,
        TOPIC_PATTERNS,
        (),
        "Of PRESENCE_TOPICS, those whose subscribers are told when a user comes or goes. Each "
        "coming is a message to all who are there.",
        example="room.*",
    )
    slow_consumers: tuple[str, ...] = setting(
        TOPICS,
        SLOW_CONSUMERS,
        (),
        "What becomes of clients that do not keep up, where it is not the end of the connection "
        "(4410): topic:<pattern>, type:<type>, inbox or broadcast, then = and drop_oldest, "
        "conflate, spill or disconnect, separated by commas; the first that fits counts.",
        example="topic:ticker.**=conflate,type:cursor=drop_oldest,inbox=spill",
    )
    session_ttl: float = setting(
        CHAT,
        duration(low=1, high=30 * DAY_SECONDS),
        3600.0,
        "How long a chat session and its count live without a connection.",
    )
    chat_anonymous: bool = setting(
        CHAT,
        BOOLEAN,
        True,
        "Whether clients without a token may open chat sessions. They get nothing but answers.",
    )
    ws_deflate: bool = setting(
        CONNECTIONS,
        BOOLEAN,
        False,
        "Whether clients may negotiate permessage-deflate. Saves bandwidth on notifications of "
        "a kilobyte and more, costs CPU.",
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
    max_connections_per_user: int = setting(
        LIMITS,
        count(high=1000),
        10,
        "Connections of one user over all servers that share the Redis; one more is closed "
        "(4409). 0 is no limit.",
    )
    max_connections_per_ip: int = setting(
        LIMITS,
        count(),
        256,
        "Connections from one address, or one IPv6 /64; more are refused with 429. 0 is no limit.",
    )
    handshakes_per_second: int = setting(
        LIMITS,
        count(),
        500,
        "Handshakes of the whole server; more are refused with 503 before any token is looked "
        "at. 0 is no limit.",
    )
    handshakes_per_second_per_ip: float = setting(
        LIMITS,
        number(),
        5.0,
        "Handshakes from one address, or one IPv6 /64, those of four seconds at once; more are "
        "refused with 429. 0 is no limit.",
    )
    limit_loopback: bool = setting(
        LIMITS,
        BOOLEAN,
        False,
        "Whether clients on this machine are limited per address as well. A proxy on the same "
        "machine brings everybody's connections.",
    )
    messages_per_minute_per_user: int = setting(
        LIMITS,
        count(),
        100,
        "Messages of one user to one worker, a fifth of them at once; more get an error "
        "(rate_limited), who goes on is closed (4429). Clients that send a hundred times as many "
        "acks and other requests are slowed down. 0 is no limit.",
    )
    notifications_per_minute_per_user: int = setting(
        LIMITS,
        count(),
        50,
        "Kept notifications to one user, those of a minute at once; more are refused with 429 "
        "unless they have priority. 0 is no limit.",
    )
    api_requests_per_second: float = setting(
        LIMITS,
        number(),
        10.0,
        "Requests of one client to the API, those of two seconds at once; more are refused with "
        "429. A client is an API key, or without a good one an address; on this machine nobody is "
        "limited unless LIMIT_LOOPBACK. Health and metrics are not counted. 0 is no limit.",
    )
    payload_schemas: Path | None = setting(
        NOTIFICATIONS,
        PATH,
        None,
        "JSON file with a JSON Schema per notification type; a publish whose payload does not "
        "fit is refused. Types that are not in it are not checked.",
        example="/etc/trioserver/schemas.json",
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
    outbox_budget_bytes: int = setting(
        LIMITS,
        SIZE,
        256 * MIB,
        "Unsent bytes of all clients of one worker; beyond it those with the most are cut first "
        "(4410). 0 is no limit.",
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
    def ws_scheme(self) -> str:
        """How URLs of the public port begin."""
        return "ws" if self.tls_cert is None else "wss"

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
    return _by_any_name().get(plain_name(name))


def suggest(name: str) -> str:
    """Return the known name most like ``name``, in lower case; empty if none is like it."""
    import difflib  # noqa: PLC0415 - only mistakes need it

    return next(iter(difflib.get_close_matches(plain_name(name), _by_any_name(), n=1)), "")


@functools.cache
def _by_any_name() -> Mapping[str, Setting]:
    return {
        name.lower(): one for one in all_settings().values() for name in (one.name, *one.aliases)
    }
