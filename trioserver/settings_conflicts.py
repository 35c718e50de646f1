"""What is wrong or useless about settings that are good one by one.

Ports that collide, keys that do not fit their algorithms, paths that are no directories, a Redis
whose certificates are not there: what concerns several settings, or the machine.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from trioserver import certificate, payload_schemas
from trioserver.endpoint import endpoint, tls_context
from trioserver.errors import SettingsError
from trioserver.jwks_url import Target
from trioserver.setting_kinds import DURATION, HMAC_KEY_BYTES, quoted
from trioserver.settings import Settings, all_settings
from trioserver.slow_policies import Policies
from trioserver.topics import Patterns

_OUR_CHANNELS = ("topic:", "chat:", "canary:")
"""How channels begin that are neither users' nor everyone's."""


def conflicts(settings: Settings) -> Iterator[tuple[str, str, str | None]]:
    """Find what concerns several settings, or the world: name, problem, a better value."""
    yield from _port_conflicts(settings)
    yield from _tls_conflicts(settings)
    yield from _token_conflicts(settings)
    if settings.drain_propagation >= settings.drain_seconds:
        whole = DURATION.show(settings.drain_seconds)
        part = DURATION.show(settings.drain_propagation)
        problem = f"{part} is not shorter than DRAIN_SECONDS ({whole})"
        yield "drain_propagation", problem, "0"
    yield from _redis_conflicts(settings)
    yield from _channel_conflicts(settings)
    if settings.payload_schemas is not None:
        try:
            payload_schemas.load(settings.payload_schemas)
        except SettingsError as error:
            yield "payload_schemas", error.problem, None
    for directory in ("data_dir", "log_dir"):
        path = getattr(settings, directory)
        # os.path, because Path.exists() raises where a parent may not be searched.
        if path is not None and os.path.exists(path) and not os.path.isdir(path):  # noqa: PTH110, PTH112
            yield directory, f"{quoted(str(path))} is not a directory", None


def without_effect(settings: Settings, given: Mapping[str, str]) -> Iterator[str]:
    """Find what was said on purpose and changes nothing, or not for long: one line each.

    Args:
        settings: What is in force.
        given: The sources of what was not left to defaults, by attribute name.
    """
    apart = ("redis_port", "redis_password", "redis_db", "redis_use_tls")
    idle: dict[str, str] = {}
    if settings.redis_url is not None:
        idle = dict.fromkeys(("redis_host", *apart), "REDIS_URL is set")
    elif settings.redis_host is None:
        idle = dict.fromkeys(apart, "neither REDIS_URL nor REDIS_HOST is set")
    if settings.jwt_algorithms[0] in HMAC_KEY_BYTES:
        idle |= {"jwt_public_key_file": "JWT_ALGORITHMS uses a shared secret"}
        if settings.jwt_secret_key_previous == settings.jwt_secret_key:
            idle |= {"jwt_secret_key_previous": "it is JWT_SECRET_KEY itself"}
    else:
        secrets = ("jwt_secret_key", "jwt_secret_key_previous")
        idle |= dict.fromkeys(secrets, "JWT_ALGORITHMS uses a public key")
    for name, reason in idle.items():
        if name in given:
            yield f"{name.upper()} ({given[name]}): has no effect, because {reason}"
    if settings.jwt_jwks_url is not None and settings.jwt_audience is None:
        yield (
            "JWT_AUDIENCE: is not set beside JWT_JWKS_URL: the issuer's tokens that are for an"
            " audience (aud) are refused, the others are accepted, whoever they were made for"
        )
    if settings.tls_cert is not None and settings.tls_key is not None:
        yield from certificate.concerns(settings.tls_cert, settings.tls_key)
    yield from _topics_without_effect(settings)


def _topics_without_effect(settings: Settings) -> Iterator[str]:
    durable = Patterns.of(settings.durable_topics)
    for concern in Policies.of(settings.slow_consumers).concerns(durable):
        yield f"SLOW_CONSUMERS: {concern}"
    kept = Patterns.of(settings.presence_topics)
    for announced in settings.announced_topics:
        if _have_nothing_in_common(announced, kept):
            yield (
                f"ANNOUNCED_TOPICS: {announced} has no effect, because none of these topics is in"
                " PRESENCE_TOPICS"
            )


def _have_nothing_in_common(pattern: str, others: Patterns) -> bool:
    """Return whether no topic is meant by both, as far as that is easily told."""
    before, star, _ = pattern.partition("*")
    if not star:
        return not others.matches(pattern)
    one = Patterns.of((pattern,))
    for other in others.texts:
        beginning, star, _ = other.partition("*")
        if not star and one.matches(other):
            return False
        if star and (beginning.startswith(before) or before.startswith(beginning)):
            return False
    return True


def _port_conflicts(settings: Settings) -> Iterator[tuple[str, str, str | None]]:
    port = settings.admin_port
    hosts = {settings.ws_host, settings.admin_host}
    if settings.ws_port == port != 0 and (len(hosts) == 1 or hosts & {"0.0.0.0", "::"}):
        yield "admin_port", f"{port} is also WS_PORT", str(port % 65_535 + 1)


def _tls_conflicts(settings: Settings) -> Iterator[tuple[str, str, str | None]]:
    cert, key = settings.tls_cert, settings.tls_key
    if cert is not None and key is not None:
        try:
            certificate.context(cert, key)
        except SettingsError as error:
            yield error.setting.lower(), error.problem, None
    elif cert is not None:
        yield "tls_key", "is not set, but TLS_CERT is", None
    elif key is not None:
        # Never just ignored: whoever has a key does not expect plain text.
        yield "tls_cert", "is not set, but TLS_KEY is", None


def _redis_conflicts(settings: Settings) -> Iterator[tuple[str, str, str | None]]:
    # Asked here as every process will ask, so that none of them is the first to notice.
    try:
        where = endpoint(settings, Path("redis.sock"))
        if where.tls is not None:
            tls_context(where.tls)
    except SettingsError as error:
        yield error.setting.lower(), error.problem, None


def _channel_conflicts(settings: Settings) -> Iterator[tuple[str, str, str | None]]:
    if (settings.channel_prefix + settings.user_channel).count("{user}") != 1:
        problem = f"{quoted(settings.channel_prefix)} contains {{user}}; only USER_CHANNEL may"
        yield "channel_prefix", problem, None
        return
    before, _, after = settings.user_channel.partition("{user}")
    everyone = settings.broadcast_channel
    long_enough = len(everyone) > len(before + after)
    if long_enough and everyone.startswith(before) and everyone.endswith(after):
        # Else a message to the user with that name would reach everyone.
        changed = settings.user_channel != all_settings()["user_channel"].default
        name = "user_channel" if changed else "broadcast_channel"
        yield name, f"BROADCAST_CHANNEL {quoted(everyone)} would belong to a user", None
    for ours in _OUR_CHANNELS:
        # Else what is published to a topic would reach a user, or the other way round.
        if before.startswith(ours) or ours.startswith(before):
            problem = (
                f"{quoted(settings.user_channel)} could name a channel that begins with {ours}"
            )
            yield "user_channel", problem, "user_noti:{user}"
        if everyone.startswith(ours):
            yield "broadcast_channel", f"{quoted(everyone)} begins with {ours}", None


def _token_conflicts(settings: Settings) -> Iterator[tuple[str, str, str | None]]:
    algorithms = ",".join(settings.jwt_algorithms)
    least = max(HMAC_KEY_BYTES.get(name, 0) for name in settings.jwt_algorithms)
    for name in ("jwt_secret_key", "jwt_secret_key_previous"):
        secret: str | None = getattr(settings, name)
        if secret is not None and len(secret.encode()) < least:
            length = len(secret.encode())
            yield name, f"{length} bytes are too few: {algorithms} needs at least {least}", None
    path, url = settings.jwt_public_key_file, settings.jwt_jwks_url
    if not least and path is None and url is None:
        problem = f"is not set, but JWT_ALGORITHMS={algorithms} needs it (or JWT_JWKS_URL)"
        yield "jwt_public_key_file", problem, None
    if path is not None:
        yield from _public_key_conflicts(path, settings.jwt_algorithms)
    if url is not None:
        yield from _issuer_conflicts(settings, url)


def _issuer_conflicts(settings: Settings, url: str) -> Iterator[tuple[str, str, str | None]]:
    if settings.jwt_algorithms[0] in HMAC_KEY_BYTES:
        # Never just ignored: whoever names an issuer does not expect a secret to open the door.
        algorithms = ",".join(settings.jwt_algorithms)
        problem = f"{algorithms} uses a shared secret, but JWT_JWKS_URL holds public keys"
        yield "jwt_algorithms", problem, "RS256"
    try:
        Target.parse(url)
    except SettingsError as error:
        yield "jwt_jwks_url", error.problem, None


def _public_key_conflicts(
    path: Path, algorithms: tuple[str, ...]
) -> Iterator[tuple[str, str, str | None]]:
    shown = quoted(str(path))
    if problem := _public_key_problem(path):
        yield "jwt_public_key_file", f"{shown} {problem}", None
    elif algorithms[0] not in HMAC_KEY_BYTES:
        # Imported only where there is a key: cryptography takes longer than most commands.
        from trioserver import verification_key  # noqa: PLC0415

        # Asked here as every worker will ask, so that none of them is the first to notice.
        try:
            key = verification_key.read(path)
            verification_key.fitting(key, algorithms, f"the key in {shown}")
        except SettingsError as error:
            yield error.setting.lower(), error.problem, None


def _public_key_problem(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if b"PRIVATE KEY-----" in content:
        return "holds a private key; tokens are checked with the public one"
    return "" if b"PUBLIC KEY-----" in content else "is not a PEM file with a public key"
