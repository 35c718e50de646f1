"""How an event becomes one line: JSON for programs, or text for people.

Control characters are escaped, values are cut until the line fits. A line has at most
`LINE_BYTES`, because writes up to PIPE_BUF are atomic in a pipe, and all processes share one.
"""

import json
import re
from collections.abc import Callable, Mapping

from trioserver.log_redaction import TEXT_LENGTH, clean, clean_item

LINE_BYTES = 4096
"""PIPE_BUF of Linux."""

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
"""As the standard library counts them."""

_IDENTITY = ("timestamp", "level", "event", "process", "slot", "generation")


def safe_line(fields: Mapping[str, object], line: Callable[[Mapping[str, object]], bytes]) -> bytes:
    """Return the event as ``line`` writes it, cleaned, in at most `LINE_BYTES`; never raises."""
    try:
        return _fitted(fields, line)
    except Exception as error:  # noqa: BLE001 - whatever a value does, the call must not raise
        kept = {key: str(fields[key]) for key in _IDENTITY if key in fields and key != "event"}
        return line(kept | {"event": "event could not be written", "error": type(error).__name__})


def json_line(fields: Mapping[str, object]) -> bytes:
    """Return the line for programs."""
    # ensure_ascii also escapes what only some programs take for a line end (U+2028, U+0085).
    return json.dumps(fields).encode() + b"\n"


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def console_line(fields: Mapping[str, object]) -> bytes:
    """Return the line for people; a traceback follows it on lines of its own."""
    rest = dict(fields)
    exception = rest.pop("exception", None)
    timestamp, level, event, process = (
        _printable(str(rest.pop(key))) for key in ("timestamp", "level", "event", "process")
    )
    pairs = "".join(f" {_printable(key)}={_console_value(value)}" for key, value in rest.items())
    line = f"{timestamp} {level:<8} {process} {event}{pairs}\n"
    if exception is not None:
        # The bar shows that these lines are no events of their own, whatever they claim.
        line += "".join(f"    | {_printable(part)}\n" for part in str(exception).splitlines())
    return line.encode(errors="backslashreplace")


def _console_value(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"[^\s\"'=]+", value):
        return _printable(value)
    return _printable(json.dumps(value, ensure_ascii=False))


def _fitted(fields: Mapping[str, object], line: Callable[[Mapping[str, object]], bytes]) -> bytes:
    """Return the line of ``fields``, its values cut until it fits."""
    for limit in (TEXT_LENGTH, TEXT_LENGTH // 4, TEXT_LENGTH // 16):
        encoded = line(dict(clean_item(key, value, limit) for key, value in fields.items()))
        if len(encoded) <= LINE_BYTES:
            return encoded
    kept = {key: clean(fields[key], TEXT_LENGTH) for key in _IDENTITY if key in fields}
    return line(kept | {"truncated": True})
