"""What values become before they are logged: without secrets, bounded, fit for JSON.

A secret is recognised by the key that it stands under, or by its shape inside of any text.
Every repetition that may be tried from many places is bounded: hostile text comes through here.
"""

import itertools
import math
import re
from collections.abc import Mapping

from trioserver.setting_kinds import MASK

TEXT_LENGTH = 512
"""Characters kept of one value; six times as much of a traceback."""

_DEPTH, _WIDTH = 3, 32
_INTEGER_BITS = 64

_SECRET_KEY = re.compile(
    r"token|secret|passw|authorization|credential|cookie|api_?key", re.IGNORECASE
)
_NAME = r"(?:token|secret|passw(?:or)?d|api_?key|credential)[\w-]{0,40}"
_SHAPES = (
    # A JWT, whole or cut off: it begins with the base64 of '{"'.
    (re.compile(r"eyJ[\w-]{5,}(?:\.[\w-]*)*"), MASK),
    (re.compile(r"(?i)(bearer(?:[ .+]|%20)+)[^\s,;\"'&]+"), rf"\1{MASK}"),
    (re.compile(r"(?i)(authorization[\"']?\s?[:=]\s?[\"']?\w{1,20} )[^\s,;\"']+"), rf"\1{MASK}"),
    # ?token=... and token="..."
    (re.compile(rf"(?i)({_NAME}=)(?:\"[^\"]*\"?|'[^']*'?|[^\s&;,\"']+)"), rf"\1{MASK}"),
    # "token": "..." in JSON, also in JSON within JSON, or in the repr of a dictionary
    (
        re.compile(rf"(?i)({_NAME}\\{{0,3}}[\"']\s?:\s?)\\{{0,3}}(?:\"[^\"]*\"?|'[^']*'?)"),
        rf"\1{MASK}",
    ),
    # user:password@ in a URL
    (re.compile(r"(\w://)[^\s/@]{0,256}:[^\s@]{0,256}@"), rf"\1{MASK}@"),
)
_SUSPECT = re.compile(r"(?i)token|secret|passw|bearer|authorization|api_?key|credential|eyJ|://")


def redact(text: str) -> str:
    """Return ``text`` without what looks like a token, a secret or a password."""
    if _SUSPECT.search(text):
        for shape, replacement in _SHAPES:
            text = shape.sub(replacement, text)
    return text


def _cut(text: str, limit: int) -> str:
    # The end matters as much as the beginning: there, a traceback names the exception.
    head = limit // 2
    return text if len(text) <= limit else f"{text[:head]}…{text[len(text) - limit + head + 1 :]}"


def clean(value: object, limit: int, depth: int = 0) -> object:
    """Return ``value`` as JSON can carry it: masked, cut, bounded in depth and width.

    Args:
        value: Anything.
        limit: Characters that are kept of one text.
        depth: How deep in another value it stands.

    Raises:
        Exception: Whatever a mapping or a list of foreign make raises.
    """
    if isinstance(value, str):
        # Cut before, so that huge text stays cheap. Only the end goes: with a hole in it, the
        # second half of a token would not be recognised any more.
        return _cut(redact(value[: 32 * TEXT_LENGTH]), limit)
    if value is None or isinstance(value, bool | int | float):
        return _clean_number(value, limit)
    if isinstance(value, bytes | bytearray):
        return clean(value[: 32 * TEXT_LENGTH].decode(errors="backslashreplace"), limit)
    if isinstance(value, Mapping) and depth < _DEPTH:
        items = itertools.islice(value.items(), _WIDTH)
        return dict(clean_item(str(key), item, limit, depth + 1) for key, item in items)
    if isinstance(value, list | tuple | set | frozenset) and depth < _DEPTH:
        return [clean(item, limit, depth + 1) for item in itertools.islice(value, _WIDTH)]
    return clean(_described(value), limit)


def _clean_number(value: object, limit: int) -> object:
    # Not every reader of JSON knows NaN, or integers beyond 64 bits.
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and value.bit_length() > _INTEGER_BITS:
        return hex(value)[:limit]
    return value


def _described(value: object) -> str:
    try:
        text = str(value)
    except Exception:  # noqa: BLE001 - foreign code, in a call that never raises
        text = "?"
    return f"{type(value).__name__}: {text}" if isinstance(value, BaseException) else text


def clean_item(key: str, value: object, limit: int, depth: int = 0) -> tuple[str, object]:
    """Return key and value as `clean` does; a value whose key tells of a secret is masked."""
    if _SECRET_KEY.search(key) and not isinstance(value, bool | None):
        return str(clean(key, limit)), MASK
    # A traceback is the one long text that is worth its length.
    limit = 6 * limit if key == "exception" else limit
    return str(clean(key, limit)), clean(value, limit, depth)
