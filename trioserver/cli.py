"""The command ``trioserver``. Every error is one line on standard error and an exit code.

Exit codes: 0 done, 1 failure, 2 wrong usage, 3 the first start failed, 4 configuration.

Imports are made where they are needed: ``trioserver --help`` and ``config`` should not pay for a
WebSocket client.
"""

import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import click

from trioserver import __version__, cli_presence, cli_publish, cli_revoke
from trioserver.cli_options import (
    as_arguments,
    load_settings,
    note,
    with_secrets,
    with_settings,
)
from trioserver.errors import CommandError, RedisError, SettingsError, TrioserverError
from trioserver.settings import Settings
from trioserver.statedir import StateDir
from trioserver.topics import NAME_IN_WORDS, is_name

if TYPE_CHECKING:
    from trioserver.auth import Claims

EXIT_FAILURE: Final = 1
EXIT_CONFIGURATION: Final = 4

RELOAD_SECONDS: Final = 120.0
STOP_MARGIN_SECONDS: Final = 10.0

DAY_SECONDS: Final = 86400

_EPILOG: Final = """\
Try it: `trioserver supervise`, and in other terminals `trioserver listen --user 42` and
`trioserver publish --user 42 '{"title": "Hello"}'`.
"""


@click.group(
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, message="trioserver %(version)s")
def cli() -> None:
    """Bring notifications to users over WebSocket, now.

    A back end publishes through Redis; every device of the user gets the notification, within
    milliseconds if it is connected, else when it comes back.
    """


@cli.command()
@with_settings()
def supervise(config_file: Path | None, **flags: str | None) -> None:
    """Run the server: workers, gateway and, without REDIS_URL, a Redis of its own.

    Signals: TERM drains and ends, INT and QUIT end quickly, HUP reloads.
    """
    from supervisor.loop import supervise as run  # noqa: PLC0415

    loaded = load_settings(flags, config_file)
    settings = with_secrets(loaded.settings, create=True)
    sys.exit(run(settings, flags=as_arguments(flags, config_file), snapshot=settings.snapshot()))


@cli.command()
@with_settings()
@click.option("--check", is_flag=True, help="Only check; print nothing if all is well.")
@click.option("--get", "name", metavar="NAME", help="Print the value of one setting.")
@click.option("--json", "as_json", is_flag=True, help="Print all as JSON.")
@click.option("--snapshot", is_flag=True, hidden=True)
def config(
    config_file: Path | None,
    name: str | None,
    *,
    check: bool,
    as_json: bool,
    snapshot: bool,
    **flags: str | None,
) -> None:
    """Print the settings in force and where each value comes from. Secrets are masked."""
    from trioserver import config_report  # noqa: PLC0415

    loaded = load_settings(flags, config_file)
    if snapshot:
        # What a reload hands to its children: secrets included, for a pipe and not for eyes.
        settings = with_secrets(loaded.settings, create=True)
        sys.stdout.buffer.write(settings.snapshot())
    elif name is not None:
        click.echo(config_report.get(loaded, name))
    elif as_json:
        click.echo(config_report.report_json(loaded), nl=False)
    elif not check:
        click.echo(config_report.report(loaded), nl=False)


@cli.command()
@with_settings("ws_port", "data_dir")
@click.option("--json", "as_json", is_flag=True, help="Print the whole status as JSON.")
def status(config_file: Path | None, *, as_json: bool, **flags: str | None) -> None:
    """Show workers, gateway and Redis of the running server; exit 1 if it is not ready."""
    from trioserver.control_client import ask  # noqa: PLC0415
    from trioserver.status import StatusReply, encode  # noqa: PLC0415

    settings = load_settings(flags, config_file).settings
    reply = ask(StateDir(settings.data_dir).control_socket, "status", 5.0)
    if not isinstance(reply, StatusReply):
        raise CommandError(reply.reason)
    click.echo(encode(reply).decode() if as_json else _status_text(reply, settings))
    sys.exit(0 if reply.ready else EXIT_FAILURE)


def _status_text(reply: Any, settings: Settings) -> str:
    state = "draining" if reply.draining else "ready" if reply.ready else "not ready"
    about = f"pid {reply.pid}, generation {reply.generation}, up {reply.uptime_seconds:.0f} s"
    where = f"{settings.ws_scheme}://{reply.address}/ws, internal http://{reply.admin_address}"
    lines = [f"{state}: {where}, {about}"]
    lines.extend(
        f"  {label:<10} pid {one.pid or '-':<8} "
        f"{'ready' if one.ready else one.why or 'not ready':<24}{tail}"
        for label, one, tail in (
            *(
                (f"worker {worker.slot}", worker, f" connections {worker.connections}")
                for worker in reply.workers
            ),
            ("gateway", reply.gateway, ""),
        )
    )
    redis = reply.redis
    kind = f"embedded, pid {redis.pid or '-'}" if redis.embedded else "external"
    lines.append(f"  {'redis':<10} {kind}, {'ready' if redis.ready else 'not ready'}")
    return "\n".join(lines)


@cli.command()
@with_settings("ws_port", "data_dir")
def reload(config_file: Path | None, **flags: str | None) -> None:
    """Start new workers with the present code and settings, then retire the old ones.

    If the new ones do not get ready, the old ones stay and this command says why.
    """
    _order("reload", RELOAD_SECONDS, flags, config_file)


@cli.command()
@with_settings("ws_port", "data_dir")
def stop(config_file: Path | None, **flags: str | None) -> None:
    """Drain and end the running server; returns when it is gone."""
    settings = load_settings(flags, config_file).settings
    _order("stop", settings.drain_seconds + STOP_MARGIN_SECONDS, flags, config_file)


def _order(op: Any, seconds: float, flags: dict[str, str | None], config_file: Path | None) -> None:
    from trioserver.control_client import ask  # noqa: PLC0415
    from trioserver.status import Verdict  # noqa: PLC0415

    settings = load_settings(flags, config_file).settings
    reply = ask(StateDir(settings.data_dir).control_socket, op, seconds)
    if not isinstance(reply, Verdict) or not reply.ok:
        raise CommandError(f"{op} failed: {getattr(reply, 'reason', 'no verdict')}")
    generation = f", generation {reply.generation} serves" if reply.generation else ""
    click.echo(f"{op} done{generation}")


@cli.command()
@with_settings("ws_port", "data_dir", "redis_url", "jwt_secret_key")
@click.option("--user", required=True, metavar="U", help="Who the token is for (claim sub).")
@click.option(
    "--ttl",
    type=click.IntRange(1, 100 * 365 * DAY_SECONDS),
    default=DAY_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="Until it expires.",
)
@click.option(
    "--jti", metavar="J", help="Its own id (claim jti), to revoke it by; else a random one."
)
@click.option(
    "--topics",
    multiple=True,
    metavar="PATTERN",
    help="Topics it may subscribe to, as 'news.**' (claim topics). Repeatable, as the next two.",
)
@click.option("--publish", multiple=True, metavar="PATTERN", help="Topics it may publish to.")
@click.option("--join", multiple=True, metavar="TOPIC", help="Topics it is subscribed to at once.")
def gentoken(
    config_file: Path | None,
    user: str,
    ttl: int,
    jti: str | None,
    topics: tuple[str, ...],
    publish: tuple[str, ...],
    join: tuple[str, ...],
    **flags: str | None,
) -> None:
    """Print a token for a user, made with the server's own secret. For tests and tools.

    checktoken says what its jti is.
    """
    from trioserver.auth import sign  # noqa: PLC0415

    settings = with_secrets(load_settings(flags, config_file).settings, create=False)
    if jti is None:
        jti = secrets.token_hex(8)
    granted = {"subscribe": topics, "publish": publish, "join": join}
    claim = {name: what for name, what in granted.items() if what}
    now = time.time()
    click.echo(sign(settings, user, now + ttl, jti=jti, issued_at=now, topics=claim))


@cli.command()
@with_settings("ws_port", "data_dir", "redis_url", "jwt_secret_key")
@click.argument("token")
def checktoken(config_file: Path | None, token: str, **flags: str | None) -> None:
    """Say whether the server would accept TOKEN (- reads it from standard input).

    Redis is asked whether it is revoked; if it does not answer, the output says "revocations not
    checked". A claim topics that is not understood is told: the token is good without it.
    """
    import trio  # noqa: PLC0415

    from trioserver.auth import Verifier  # noqa: PLC0415
    from trioserver.key_keeping import keyring_of, look_up  # noqa: PLC0415

    settings = with_secrets(load_settings(flags, config_file).settings, create=False)
    if token == "-":  # noqa: S105 - means standard input
        token = sys.stdin.readline().strip()
    keyring = keyring_of(settings)
    if keyring is not None and (problem := trio.run(look_up, keyring, settings)):
        note(f"the issuer's keys cannot be had: {problem}")
    now = time.time()
    claims = Verifier(settings, keyring).verify(token, now)
    unchecked = _refuse_revoked(settings, claims)
    named = f"jti {claims.jti}, " if claims.jti else ""
    lasts = f"{named}expires in {claims.expires_at - now:.0f} s"
    click.echo(f"good: user {claims.user}, {lasts}{unchecked}")
    if claims.topics.problem:
        note(f"it grants no topics: {claims.topics.problem}")


def _refuse_revoked(settings: Settings, claims: "Claims") -> str:
    """Raise if a token is revoked; return what is to be said if nobody knows."""
    try:
        revoked = cli_revoke.is_revoked(settings, claims)
    except (CommandError, RedisError) as problem:
        note(f"revocations cannot be read: {problem}")
        return "; revocations not checked"
    if revoked:
        raise CommandError("the token has been revoked")
    return ""


for _command in (*cli_publish.COMMANDS, *cli_revoke.COMMANDS, *cli_presence.COMMANDS):
    cli.add_command(_command)


@cli.command()
@with_settings("ws_port", "data_dir", "redis_url", "jwt_secret_key")
@click.option("--user", metavar="U", help="Whose notifications; makes a token for this user.")
@click.option("--token", metavar="TOKEN", help="Use this token instead of making one.")
@click.option("--url", metavar="URL", help="Default: this machine's server.")
@click.option("--device", metavar="NAME", help="Be this device: go on where it was last time.")
@click.option("--position", metavar="P", help="Go on from this position instead.")
@click.option("--ack", is_flag=True, help="Acknowledge what is shown.")
@click.option("--topic", multiple=True, metavar="T", help="Subscribe to this, too. Repeatable.")
def listen(
    config_file: Path | None,
    user: str | None,
    token: str | None,
    url: str | None,
    *,
    device: str | None,
    position: str | None,
    ack: bool,
    topic: tuple[str, ...],
    **flags: str | None,
) -> None:
    """Connect as a user and print what arrives; reconnects by itself. Ctrl-C ends it.

    With --user its token is renewed for as long as it runs, and allows each --topic; one that was
    given ends it by expiring, and allows what it allows.

    What was published while it was away comes first. Without --device all connections without a
    name count as one device: what one of them has received is not kept for the others.
    """
    import trio  # noqa: PLC0415

    from trioserver.certificate import own_server  # noqa: PLC0415
    from trioserver.listen import Listening  # noqa: PLC0415
    from trioserver.listen import listen as run  # noqa: PLC0415

    settings = load_settings(flags, config_file).settings
    if url is not None and urlsplit(url).scheme not in {"ws", "wss"}:
        raise click.UsageError("--url begins with ws:// or wss://")
    if user is not None and token is not None:
        raise click.UsageError("say either --user U or --token TOKEN")
    for name in topic:
        if not is_name(name):
            raise click.UsageError(f"--topic {name}: {NAME_IN_WORDS}")
    renew = None if user is None else _signer(settings, user, topic)
    listening = Listening(
        url=url or f"{settings.ws_scheme}://{_local(settings.ws_host)}:{settings.ws_port}/ws",
        token=_given(token) if renew is None else renew(),
        renew=renew,
        device=device or "",
        position=position or "",
        ack=ack,
        topics=dict.fromkeys(topic, ""),
    )
    own = None if url or settings.tls_cert is None else own_server(settings.tls_cert)
    trio.run(run, listening, _show, note, own)


def _given(token: str | None) -> str:
    """Return the token that was given."""
    if token is None:
        raise click.UsageError("say either --user U or --token TOKEN")
    if not (token.isascii() and token.isprintable()):
        raise CommandError("that is no token")
    return token


def _signer(settings: Settings, user: str, topics: tuple[str, ...]) -> Callable[[], str]:
    """Return what makes a token for ``user`` that is good for a day from then."""
    from trioserver.auth import sign  # noqa: PLC0415

    complete = with_secrets(settings, create=False)

    def signed() -> str:
        now = time.time()
        return sign(complete, user, now + DAY_SECONDS, issued_at=now, topics=topics)

    return signed


def _show(text: str) -> None:
    click.echo(text)


def _local(host: str) -> str:
    """Return the address under which a server bound to ``host`` is reached from here."""
    local = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"[{local}]" if ":" in local else local


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; never shows a traceback for an expected problem."""
    try:
        cli.main(args=argv, prog_name="trioserver", standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except SettingsError as error:
        note(str(error))
        sys.exit(EXIT_CONFIGURATION)
    except (TrioserverError, RedisError) as error:
        note(str(error))
        sys.exit(EXIT_FAILURE)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OverflowError) as error:
        # Text that is no Unicode, numbers beyond reason: the caller's, as settings have their own.
        note(f"that cannot be: {error}")
        sys.exit(EXIT_FAILURE)
    except BrokenPipeError:
        # Whoever read our output has gone, as `| head` does.
        _give_up_stdout()
        sys.exit(EXIT_FAILURE)
    except OSError as error:
        _give_up_stdout()
        note(f"{error}; what was asked for may have been done")
        sys.exit(EXIT_FAILURE)


def _give_up_stdout() -> None:
    """Let nobody try to write what is left."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
