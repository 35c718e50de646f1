"""What the commands of ``trioserver`` have in common: every setting as an option, and what is said.

Each command takes every setting, so that one set of options serves all of them; ``--help`` shows
those that matter to it.
"""

import datetime as dt
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from trioserver import generated_secrets
from trioserver.endpoint import Endpoint, endpoint
from trioserver.errors import CommandError
from trioserver.setting_kinds import Kind, quoted
from trioserver.settings import Settings
from trioserver.settings_load import Loaded, flag_options, load
from trioserver.statedir import StateDir

Command = TypeVar("Command", bound=Callable[..., Any])
T = TypeVar("T")


def written_as(kind: Kind[T]) -> Callable[[click.Context, click.Parameter, str | None], T | None]:
    """Return the callback of an option whose value is written like that of a setting."""

    def read(_context: click.Context, _option: click.Parameter, text: str | None) -> T | None:
        if text is None:
            return None
        try:
            return kind.parse(text)
        except ValueError as problem:
            raise click.BadParameter(f"{quoted(text)} {problem}") from None

    return read


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


def load_settings(flags: dict[str, str | None], config_file: Path | None) -> Loaded:
    """Return the settings in force; warnings are said.

    Raises:
        SettingsError: A setting is impossible.
    """
    loaded = load(flags, os.environ, config_file)
    for warning in loaded.warnings:
        note(f"warning: {warning}")
    return loaded


def with_secrets(settings: Settings, *, create: bool) -> Settings:
    """Return the settings with the generated secrets that were not configured.

    Args:
        settings: As loaded.
        create: Whether to make what is not there yet.

    Raises:
        SettingsError: The secret of tokens is not there, and may not be made.
    """
    completed = generated_secrets.complete(settings, create=create)
    for line in completed.notes:
        note(line)
    return completed.settings


def date_and_time(text: str, other: str) -> float:
    """Return seconds since 1970 for a date and time with a time zone.

    Args:
        text: Such as ``2026-11-20T18:00:00Z``.
        other: An example of what else the option takes.

    Raises:
        ValueError: With the end of the sentence '"abc" ...'.
    """
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"is not a moment, such as {other} or 2026-11-20T18:00:00Z") from None
    if moment.tzinfo is None:
        raise ValueError("has no time zone: end it with Z or +01:00")
    return moment.timestamp()


def as_arguments(flags: Mapping[str, str | None], config_file: Path | None) -> list[str]:
    """Return the flags as they can be given to ``trioserver config`` again."""
    names = {option.setting: option.names[0] for option in flag_options()}
    arguments = [f"{names[name]}={value}" for name, value in flags.items() if value is not None]
    if config_file is not None:
        arguments.append(f"--config={config_file}")
    return arguments


def where_is_redis(settings: Settings) -> Endpoint:
    """Return the Redis of the server, the embedded one included.

    Raises:
        CommandError: It would be the embedded one, and no server is running.
        SettingsError: REDIS_URL is not understood.
    """
    socket = StateDir(settings.data_dir).redis_socket
    if settings.embedded_redis and not socket.exists():
        raise CommandError(
            f"no trioserver is running with DATA_DIR {settings.data_dir}, and REDIS_URL is not set"
        )
    return endpoint(settings, socket)


def note(text: str) -> None:
    """Say something to the person, beside the command's output."""
    click.echo(f"trioserver: {text}", err=True)
