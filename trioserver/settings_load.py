"""How the values of settings are found: layers, where each came from, and what is refused.

A value comes from the strongest layer that has it:

    defaults < TOML file < environment < flags

Each layer is a mapping from names to text, so one pure path serves all of them: find the text,
parse it with the `Kind` of its setting, build `Settings`, check what concerns several settings.
Only `load` touches the outside, and only to read the file and to look at named paths.

Why an own loader and not typed-settings, which was tried: it merges layers well, but knows no
second name for a setting (``PORT`` for ``WS_PORT``), no bare number that means milliseconds in
two settings and seconds elsewhere, no foreign value that must be ignored (Kubernetes injects
``REDIS_PORT=tcp://...``), does not tell which variable a value came from, and reports a bad
value as an exception group, from which the one line that operators get would have to be dug out
again. What would be left of it is the merging of three mappings.
"""

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import attrs

from trioserver.errors import SettingsError
from trioserver.setting_fields import Setting, flag_name, plain_name
from trioserver.setting_kinds import REDIS_URL, decimal_text, quoted
from trioserver.settings import Settings, all_settings, default_data_dir, find, suggest
from trioserver.settings_conflicts import conflicts, without_effect

DEFAULT_FILE = Path("trioserver.toml")
"""Read from the working directory if it is there and no other file is named."""

FILE_VARIABLE = "TRIOSERVER_CONFIG"
"""Names the TOML file; the flag ``--config`` is stronger."""

_SERVICE = re.compile(r"(?:tcp|udp|sctp)://")


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
    for name, problem, example in conflicts(settings):
        raise _error(all_settings()[name], given.get(name), problem, example)
    sources = {
        one.env: given[name].source if name in given else "default"
        for name, one in all_settings().items()
    }
    warnings += without_effect(settings, {name: one.source for name, one in given.items()})
    return Loaded(settings=settings, sources=sources, warnings=tuple(warnings))


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
                    f"{name} (environment): {quoted(text)} is ignored: it describes a service "
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
        flag = flag_name(plain_name(name))
        if one is None:
            raise SettingsError(flag, _unknown(flag_name(suggest(name))))
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
        problem = f"{quoted(str(path))} cannot be read: {error.strerror}"
        raise SettingsError(named_by, problem) from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        problem = f"{quoted(str(path))} is not TOML: {error}"
        raise SettingsError(named_by, problem, "ws_port = 8081") from error
    source = f"file {quoted(str(path))[1:-1]}"
    given: dict[str, _Given] = {}
    for key, value in document.items():
        one = find(key)
        if one is None:
            raise SettingsError(f"{quoted(key)[1:-1]} ({source})", _unknown(suggest(key)))
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
            return decimal_text(value)
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
        value = "the value" if one.secret or one.kind is REDIS_URL else quoted(given.text)
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
