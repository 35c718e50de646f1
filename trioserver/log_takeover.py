"""Others who would write to standard error, made to write log lines instead.

The standard library's ``logging`` (Hypercorn, asyncio, redis-py), ``warnings``, and exceptions
that nobody catches.
"""

import logging
import sys
import threading
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

import attrs

from trioserver.log_lines import LEVELS

Write = Callable[[str, dict[str, Any]], None]
"""Level and event in, a line out; never raises. ``exc_info`` in the event is as in `logging`."""


def take_over(write: Write, level: int) -> None:
    """Have everything that others say end in ``write``, from ``level`` on.

    The second call replaces the first.
    """
    logging.root.handlers[:] = [Forward(write)]
    logging.root.setLevel(level)
    hooks = _Hooks(write)
    warnings.showwarning = hooks.show_warning
    sys.excepthook = hooks.uncaught
    threading.excepthook = hooks.uncaught_in_thread
    sys.unraisablehook = hooks.unraisable


class Forward(logging.Handler):
    """Takes lines of the standard library's ``logging`` the common way."""

    def __init__(self, write: Write) -> None:
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; never raises."""
        try:
            text = record.getMessage()
        except Exception:  # noqa: BLE001 - arguments that do not fit the text
            text = str(record.msg)
        level = max(
            (name for name in LEVELS if LEVELS[name] <= record.levelno),
            key=LEVELS.__getitem__,
            default="debug",
        )
        self._write(level, {"event": text, "logger": record.name, "exc_info": record.exc_info})


@attrs.frozen
class _Hooks:
    """What Python calls when it would print something itself."""

    write: Write

    def show_warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        del file, line
        where = f"{filename}:{lineno}"
        event = {"event": str(message), "category": category.__name__, "where": where}
        self.write("warning", event)

    def uncaught(
        self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        event = {"event": "uncaught exception", "exc_info": (kind, error, traceback)}
        self.write("critical", event)

    def uncaught_in_thread(self, args: threading.ExceptHookArgs) -> None:
        event = {"event": "uncaught exception", "exc_info": args.exc_value}
        self.write("critical", event | {"thread": args.thread and args.thread.name})

    def unraisable(self, args: "sys.UnraisableHookArgs") -> None:
        event = {"event": args.err_msg or "exception ignored", "exc_info": args.exc_value}
        self.write("error", event | {"object": type(args.object).__name__})
