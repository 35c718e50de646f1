"""The command ``trioserver``. Every error is one line on standard error and an exit code.

Exit codes: 0 done, 1 failure, 2 wrong usage, 3 the first start failed, 4 configuration.

Imports are made where they are needed: ``trioserver --help`` and ``config`` should not pay for a
WebSocket client.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import attrs
import click

from trioserver import __version__
from trioserver.errors import CommandError, RedisError, SettingsError, TrioserverError
from trioserver.settings import Settings
from trioserver.settings_load import Loaded, flag_options, load
from trioserver.statedir import StateDir

EXIT_FAILURE: Final = 1
EXIT_CONFIGURATION: Final = 4

JWT_SECRET: Final = "jwt"  # noqa: S105 - the name of the file
"""The generated secret in the state directory."""

RELOAD_SECONDS: Final = 120.0
STOP_MARGIN_SECONDS: Final = 10.0

DAY_SECONDS: Final = 86400

Command = TypeVar("Command", bound=Callable[..., Any])

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

    A back end publishes through Redis; every connected device of the user gets the notification
    within milliseconds.
    """


def with_settings(*shown: str) -> Callable[[Command], Command]:
    """Give a command an option for every setting, and ``--config``.

    Args:
        shown: The settings that ``--help`` lists; without any, all of them. The others work too,
            so that one set of options serves every command.
    """

    def decorate(command: Command) -> Command:
        for option in reversed(flag_options()):
            command = click.option(
                *option.names,
                option.setting,
                help=option.help,
                metavar="VALUE",
                default=None,
                hidden=bool(shown) and option.setting not in shown,
            )(command)
        return click.option(
            "--config",
            "config_file",
            type=click.Path(path_type=Path),
            help="TOML file with settings. Default: ./trioserver.toml, if it exists.",
            metavar="FILE",
        )(command)

    return decorate


def _load(flags: dict[str, str | None], config_file: Path | None) -> Loaded:
    loaded = load(flags, os.environ, config_file)
    for warning in loaded.warnings:
        _note(f"warning: {warning}")
    return loaded


def _note(text: str) -> None:
    click.echo(f"trioserver: {text}", err=True)


def _with_secret(settings: Settings, *, create: bool) -> Settings:
    """Return the settings with the generated JWT secret, if none was configured."""
    if settings.jwt_secret_key is not None or not settings.jwt_algorithms[0].startswith("HS"):
        return settings
    state = StateDir(settings.data_dir)
    known = state.read_secret(JWT_SECRET)
    if known is None and create:
        state.create()
        known = state.secret(JWT_SECRET)
        _note(f"JWT_SECRET_KEY is not set: a random one is kept in {state.path}")
    if known is None:
        raise SettingsError(
            "JWT_SECRET_KEY",
            f"is not set, and no server has made one in {state.path}",
            "JWT_SECRET_KEY=$(openssl rand -hex 32)",
        )
    return attrs.evolve(settings, jwt_secret_key=known)


@cli.command()
@with_settings()
def supervise(config_file: Path | None, **flags: str | None) -> None:
    """Run the server: workers, gateway and, without REDIS_URL, a Redis of its own.

    Signals: TERM drains and ends, INT and QUIT end quickly, HUP reloads.
    """
    from supervisor.loop import supervise as run  # noqa: PLC0415

    loaded = _load(flags, config_file)
    settings = _with_secret(loaded.settings, create=True)
    sys.exit(run(settings, flags=_as_arguments(flags, config_file), snapshot=settings.snapshot()))


def _as_arguments(flags: dict[str, str | None], config_file: Path | None) -> list[str]:
    """Return the flags as they can be given to ``trioserver config`` again."""
    names = {option.setting: option.names[0] for option in flag_options()}
    arguments = [f"{names[name]}={value}" for name, value in flags.items() if value is not None]
    if config_file is not None:
        arguments.append(f"--config={config_file}")
    return arguments


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

    loaded = _load(flags, config_file)
    if snapshot:
        # What a reload hands to its children: secrets included, for a pipe and not for eyes.
        settings = _with_secret(loaded.settings, create=True)
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

    settings = _load(flags, config_file).settings
    reply = ask(StateDir(settings.data_dir).control_socket, "status", 5.0)
    if not isinstance(reply, StatusReply):
        raise CommandError(reply.reason)
    click.echo(encode(reply).decode() if as_json else _status_text(reply))
    sys.exit(0 if reply.ready else EXIT_FAILURE)


def _status_text(reply: Any) -> str:
    state = "draining" if reply.draining else "ready" if reply.ready else "not ready"
    about = f"pid {reply.pid}, generation {reply.generation}, up {reply.uptime_seconds:.0f} s"
    lines = [f"{state}: ws://{reply.address}/ws, internal http://{reply.admin_address}, {about}"]
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
    settings = _load(flags, config_file).settings
    _order("stop", settings.drain_seconds + STOP_MARGIN_SECONDS, flags, config_file)


def _order(op: Any, seconds: float, flags: dict[str, str | None], config_file: Path | None) -> None:
    from trioserver.control_client import ask  # noqa: PLC0415
    from trioserver.status import Verdict  # noqa: PLC0415

    settings = _load(flags, config_file).settings
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
def gentoken(config_file: Path | None, user: str, ttl: int, **flags: str | None) -> None:
    """Print a token for a user, made with the server's own secret. For tests and tools."""
    from trioserver.auth import sign  # noqa: PLC0415

    settings = _with_secret(_load(flags, config_file).settings, create=False)
    click.echo(sign(settings, user, time.time() + ttl))


@cli.command()
@with_settings("ws_port", "data_dir", "redis_url", "jwt_secret_key")
@click.argument("token")
def checktoken(config_file: Path | None, token: str, **flags: str | None) -> None:
    """Say whether the server would accept TOKEN (- reads it from standard input)."""
    from trioserver.auth import Verifier  # noqa: PLC0415

    settings = _with_secret(_load(flags, config_file).settings, create=False)
    if token == "-":  # noqa: S105 - means standard input
        token = sys.stdin.readline().strip()
    now = time.time()
    claims = Verifier(settings).verify(token, now)
    click.echo(f"good: user {claims.user}, expires in {claims.expires_at - now:.0f} s")


@cli.command()
@with_settings("ws_port", "data_dir", "redis_url", "jwt_secret_key")
@click.option("--user", metavar="U", help="To every device of this user.")
@click.option("--all", "everyone", is_flag=True, help="To every connection.")
@click.option("--type", "kind", default="notification", show_default=True, metavar="TYPE")
@click.argument("payload", metavar="PAYLOAD_JSON")
def publish(
    config_file: Path | None,
    user: str | None,
    kind: str,
    payload: str,
    *,
    everyone: bool,
    **flags: str | None,
) -> None:
    """Publish a notification: PAYLOAD_JSON reaches whoever is connected now.

    PAYLOAD_JSON is any JSON value; - reads it from standard input.
    """
    from trioserver.auth import check_user  # noqa: PLC0415
    from trioserver.endpoint import endpoint  # noqa: PLC0415
    from trioserver.messages import BadPublish, notification_from_raw, raw_publish  # noqa: PLC0415
    from trioserver.redis_link import publish_once  # noqa: PLC0415

    if (user is None) == (not everyone):
        raise click.UsageError("say either --user U or --all")
    settings = _load(flags, config_file).settings
    if payload == "-":
        payload = sys.stdin.read()
    try:
        data = raw_publish(kind, payload.encode())
        # What the workers would drop is better refused here, where somebody reads it.
        notification_from_raw(data, "", settings.notification_max_size)
    except BadPublish as problem:
        raise CommandError(f"this is no notification: {problem}") from None
    channel = settings.broadcast_channel
    if user is not None:
        check_user(user)
        channel = settings.user_channel.replace("{user}", user)
    socket = StateDir(settings.data_dir).redis_socket
    if settings.embedded_redis and not socket.exists():
        raise CommandError(
            f"no trioserver is running with DATA_DIR {settings.data_dir}, and REDIS_URL is not set"
        )
    where = endpoint(settings, socket)
    receivers = publish_once(where, (settings.channel_prefix + channel).encode(), data)
    if receivers:
        click.echo(f"published; {receivers} worker{'s' * (receivers > 1)} listening")
    else:
        click.echo("published; nobody is connected to receive it")


@cli.command()
@with_settings("ws_port", "data_dir", "redis_url", "jwt_secret_key")
@click.option("--user", metavar="U", help="Whose notifications; makes a token for this user.")
@click.option("--token", metavar="TOKEN", help="Use this token instead of making one.")
@click.option("--url", metavar="URL", help="Default: this machine's server.")
def listen(
    config_file: Path | None,
    user: str | None,
    token: str | None,
    url: str | None,
    **flags: str | None,
) -> None:
    """Connect as a user and print what arrives; reconnects by itself. Ctrl-C ends it."""
    import trio  # noqa: PLC0415

    from trioserver.auth import sign  # noqa: PLC0415
    from trioserver.listen import listen as run  # noqa: PLC0415

    settings = _load(flags, config_file).settings
    if user is not None and token is None:
        settings = _with_secret(settings, create=False)
        credential = sign(settings, user, time.time() + DAY_SECONDS)
    elif token is not None and user is None:
        credential = token
    else:
        raise click.UsageError("say either --user U or --token TOKEN")
    if url is not None and urlsplit(url).scheme not in {"ws", "wss"}:
        raise click.UsageError("--url begins with ws:// or wss://")
    if not (credential.isascii() and credential.isprintable()):
        raise CommandError("that is no token")
    address = url or f"ws://{_local(settings.ws_host)}:{settings.ws_port}/ws"
    trio.run(run, address, credential, _show, _note)


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
        _note(str(error))
        sys.exit(EXIT_CONFIGURATION)
    except (TrioserverError, RedisError) as error:
        _note(str(error))
        sys.exit(EXIT_FAILURE)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OverflowError) as error:
        # Text that is no Unicode, numbers beyond reason: the caller's, as settings have their own.
        _note(f"that cannot be: {error}")
        sys.exit(EXIT_FAILURE)
    except BrokenPipeError:
        # Whoever read our output has gone, as `| head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILURE)
