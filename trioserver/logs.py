r"""Logs: one line per event, safe to print, safe to keep, never in the way.

What a line goes through:

    log.info("connection closed", user=...)      structlog, filtered by level: below it, nothing
      -> `log_journal`     adds time, level, process, slot, generation; writes: to standard error
                           and to the day's file
      -> `log_lines`       one line, for programs or for people
      -> `log_redaction`   masks, cuts and bounds the values

The standard library's ``logging`` (Hypercorn, asyncio, redis-py), ``warnings`` and uncaught
exceptions take the same way (`log_takeover`), so that nothing else ever writes to standard error.

Promises:

- *One event is one line*, of at most 4,096 bytes: control characters are escaped, long values cut.
- *No token, secret or password in a line*, as far as they can be recognised by key or by shape.
- *A log call never raises and never waits.* What cannot be written at once is dropped and
  counted: `dropped`.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, MutableMapping
from typing import Any, NoReturn, cast

import structlog

from trioserver.log_journal import Journal
from trioserver.log_lines import LEVELS
from trioserver.log_takeover import take_over
from trioserver.settings import Settings

# Until `configure` is called, lines go to standard error, for people: never to standard output.
_journal = Journal(identity={"process": "trioserver"})


def _write(_logger: object, level: str, event: MutableMapping[str, Any]) -> NoReturn:
    """End the chain of structlog: the line is written here, nothing is left to return."""
    with contextlib.suppress(Exception):
        event = structlog.processors.format_exc_info(_logger, level, event)
    _journal.write(level, event)
    raise structlog.DropEvent


# One list for ever: loggers that are already in use keep it.
_CHAIN: list[structlog.typing.Processor] = [_write]
structlog.configure(
    processors=_CHAIN,
    wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    logger_factory=lambda *_: None,
)


def get_logger(**bound: object) -> structlog.typing.FilteringBoundLogger:
    """Return a logger; ``bound`` stands in each of its lines.

    It may be made before `configure`: it takes its level from there at its first use.
    """
    return cast("structlog.typing.FilteringBoundLogger", structlog.get_logger(**bound))


def configure(
    settings: Settings,
    process: str,
    *,
    slot: int | None = None,
    generation: int | None = None,
    clock: Callable[[], float] = time.time,
    fd: int = 2,
) -> None:
    """Take over everything that this process has to say.

    To be called once, before anything else is worth a line. A second call is for tests: loggers
    that have been used keep their level.

    Args:
        settings: Of which ``log_*``, ``logger_*`` and ``ws_mode`` count here.
        process: ``supervisor``, ``gateway``, ``worker-0``: also the name of the files.
        slot: The place of a worker.
        generation: Counts reloads.
        clock: Seconds since 1970.
        fd: Standard error.
    """
    global _journal  # noqa: PLW0603 - there is one log per process, as there is one standard error
    identity = {"process": process, "slot": slot, "generation": generation}
    _journal.close_files()
    _journal = Journal(
        identity={key: value for key, value in identity.items() if value is not None},
        clock=clock,
        fd=fd,
        console=_for_people(settings, fd),
        log_dir=settings.log_dir,
    )
    level = LEVELS[settings.log_level]
    structlog.configure(
        processors=_CHAIN,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: None,
        cache_logger_on_first_use=True,
    )
    take_over(_log_foreign, level)


def dropped() -> int:
    """Return the number of lines that could not be written."""
    return _journal.dropped


def reopen() -> None:
    """Close the files; the next lines open them anew (SIGUSR1)."""
    _journal.close_files()


def _for_people(settings: Settings, fd: int) -> bool:
    if settings.logger_encoding != "auto":
        return settings.logger_encoding == "console"
    return bool({settings.ws_mode, settings.logger_mode} & {"debug", "development"}) or os.isatty(
        fd
    )


def _log_foreign(level: str, event: MutableMapping[str, Any]) -> None:
    with contextlib.suppress(structlog.DropEvent):
        _write(None, level, event)
