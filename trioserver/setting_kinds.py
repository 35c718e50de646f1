"""Kinds of values: how a number, a duration, a size, a choice is written, read and printed.

A `Kind` turns text into a value and a value into text. What is printed means, given as input,
the same value again. A parser raises ValueError with the end of the sentence '"abc" ...'; it
never repeats the value, which may be a secret.
"""

import os
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, Generic, TypeVar

import attrs

from trioserver.origins import origin_list
from trioserver.peers import proxy_list
from trioserver.slow_policies import policy_list
from trioserver.topics import pattern_list, show_list

T_co = TypeVar("T_co", covariant=True)

MASK = "***"
"""Stands for a secret wherever a value is printed."""

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
DAY_SECONDS = 24 * 3600
YEAR_SECONDS = 365 * DAY_SECONDS
_UNITS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_FACTORS = {"": 1, "k": KIB, "m": MIB, "g": GIB}
_WORDS = {"true": True, "1": True, "yes": True, "on": True}
_WORDS |= {"false": False, "0": False, "no": False, "off": False}

HMAC_KEY_BYTES = {"HS256": 32, "HS384": 48, "HS512": 64}
"""Algorithms with a shared secret. RFC 7518 3.2: the key has at least the length of the hash."""

_SIGNATURES = ("RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "EdDSA")


# How values are printed: so that the same text, given as input, means the same value.


def decimal_text(value: float) -> str:
    """Return the shortest decimal number that means ``value``, without an exponent."""
    return format(Decimal(repr(value)).normalize(), "f")


def _duration_text(seconds: float) -> str:
    thousandths = round(seconds * 1000)
    if seconds == 0 or thousandths / 1000 != seconds:
        return decimal_text(seconds) if seconds == 0 else f"{decimal_text(seconds)}s"
    unit = next(unit for unit in ("d", "h", "m", "s", "ms") if thousandths % _UNITS[unit] == 0)
    return f"{thousandths // _UNITS[unit]}{unit}"


def _size_text(value: int) -> str:
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if value and value % factor == 0:
            return f"{value // factor}{unit}"
    return str(value)


def mask_url(url: str) -> str:
    """Return a URL without its credentials, also if it is too broken to be parsed."""
    scheme, separator, rest = url.partition("://")
    if "@" in rest:
        rest = f"{MASK}@{rest.rpartition('@')[2]}"
    rest = re.sub(r"(?i)((?:password|username)=)[^&]*", rf"\1{MASK}", rest)
    return f"{scheme}{separator}{rest}"


def quoted(text: str) -> str:
    """Return ``text`` as it stands in a message: in quotes, on one line, not too long."""
    # repr() escapes whatever would not stay on one line.
    shown = repr(text)[1:-1]
    return f'"{shown}"' if len(shown) <= 80 else f'"{shown[:77]}..."'  # noqa: PLR2004 - a line


@attrs.frozen(kw_only=True)
class Kind(Generic[T_co]):
    """How one sort of value is written."""

    parse: Callable[[str], T_co]
    """Text in, value out. Raises ValueError with the end of the sentence '"abc" ...'."""
    unit: str = ""
    """What a bare number counts."""
    show: Callable[[Any], str] = str
    """Value in, printable text out: text that means the same value, credentials masked."""


def _whole(text: str, what: str, low: int, high: int) -> int:
    # Not int(): that takes "8_081" and digits of other scripts.
    if not re.fullmatch(r"[0-9]{1,18}", text.strip()):
        raise ValueError(f"is not a {what}")
    if not low <= (value := int(text)) <= high:
        raise ValueError(f"is not a {what} from {low} to {high}")
    return value


def count(what: str = "whole number", *, low: int = 0, high: int = 1_000_000_000) -> Kind[int]:
    """Make a kind for whole numbers from ``low`` to ``high``."""
    return Kind(parse=lambda text: _whole(text, what, low, high))


def _number(text: str, low: float, high: float) -> float:
    if not re.fullmatch(r"[0-9]{1,15}(?:\.[0-9]{1,9})?", text.strip()):
        raise ValueError("is not a number")
    if not low <= (value := float(text)) <= high:
        raise ValueError(f"is not a number from {decimal_text(low)} to {decimal_text(high)}")
    return value


def number(*, low: float = 0, high: float = 1e9) -> Kind[float]:
    """Make a kind for numbers that need not be whole, such as rates."""
    return Kind(parse=lambda text: _number(text, low, high), show=decimal_text)


def _duration(text: str, bare: str, low: float, high: float) -> float:
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,30})?) ?(ms|s|m|h|d)?", text.strip().lower())
    if match is None:
        raise ValueError("is not a duration")
    amount, unit = match.groups()
    seconds = round(float(Decimal(amount) * _UNITS[unit or bare] / 1000), 9)
    if not low <= seconds <= high:
        raise ValueError(f"is not from {_duration_text(low)} to {_duration_text(high)}")
    return seconds


def duration(*, bare: str = "s", low: float = 0, high: float = YEAR_SECONDS) -> Kind[float]:
    """Make a kind for durations, stored in seconds; a number without unit counts ``bare``."""
    unit = {"s": "seconds", "ms": "milliseconds"}[bare]
    return Kind(parse=lambda text: _duration(text, bare, low, high), unit=unit, show=_duration_text)


def _size(text: str, low: int, high: int) -> int:
    match = re.fullmatch(r"([0-9]{1,15}) ?([kmg]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise ValueError("is not a size in bytes")
    value = int(match[1]) * _FACTORS[match[2]]
    if not low <= value <= high:
        raise ValueError(f"is not from {_size_text(low)} to {_size_text(high)}")
    return value


def size(*, low: int = 0, high: int = GIB) -> Kind[int]:
    """Make a kind for sizes, stored in bytes; k, KB and KiB all mean 1,024."""
    return Kind(parse=lambda text: _size(text, low, high), unit="bytes", show=_size_text)


def _boolean(text: str) -> bool:
    value = _WORDS.get(text.strip().lower())
    if value is None:
        raise ValueError("is not true or false")
    return value


def _one_of(text: str, names: tuple[str, ...], synonyms: Mapping[str, str]) -> str:
    by_lower_case = {name.lower(): name for name in names}
    wanted = text.strip().lower()
    value = synonyms.get(wanted) or by_lower_case.get(wanted)
    if value is None:
        raise ValueError(f"is not one of {', '.join(names)}")
    return value


def choice(*names: str, synonyms: Mapping[str, str] | None = None) -> Kind[str]:
    """Make a kind for one of ``names``; case does not matter."""
    return Kind(parse=lambda text: _one_of(text, names, synonyms or {}))


def _text(text: str, pattern: str, problem: str) -> str:
    # A control character is an accident: most often the newline at the end of a file.
    if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", text):
        raise ValueError("contains a control character (a newline at the end?)")
    if not re.fullmatch(pattern, text):
        raise ValueError(problem)
    return text


def text_like(pattern: str, problem: str) -> Kind[str]:
    """Make a kind for text that matches ``pattern`` as a whole."""
    return Kind(parse=lambda text: _text(text, pattern, problem))


def _path(text: str) -> Path:
    # Absolute, because children and later commands may run in another directory.
    return Path(os.path.abspath(os.path.expanduser(_text(text, ".+", "is empty"))))  # noqa: PTH100, PTH111 - Path.expanduser raises for an unknown user


def _user_channel(text: str) -> str:
    if _text(text, ".+", "is empty").count("{user}") != 1:
        raise ValueError("does not contain {user} exactly once")
    return text


def _host(text: str) -> str:
    problem = "is not a host name or an IP address"
    _text(text, r"[A-Za-z0-9._:%-]+", problem)
    if ":" in text:
        import ipaddress  # noqa: PLC0415 - few settings name IPv6 addresses

        try:
            ipaddress.IPv6Address(text)
        except ValueError:
            raise ValueError(problem) from None
    elif len(text) > 253 or not re.fullmatch(r"(?:[\w-]{1,63}\.)*[\w-]{1,63}\.?", text, re.ASCII):  # noqa: PLR2004 - RFC 1035
        # Resolvers and codecs do not agree on what to do with such a name, some raise.
        raise ValueError(problem)
    return text


def _redis_url(text: str) -> str:
    return _text(
        text,
        r"rediss?://(?:.*@)?(?:\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::[0-9]{1,5})?(?:/[0-9]*)?(?:\?.*)?"
        r"|unix://(?:.*@)?/[^?]+(?:\?.*)?",
        "is not a URL with redis://, rediss:// or unix://",
    )


def _algorithms(text: str) -> tuple[str, ...]:
    names = (*HMAC_KEY_BYTES, *_SIGNATURES)
    value = tuple(dict.fromkeys(_one_of(name, names, {}) for name in text.split(",")))
    # A verifier that takes both kinds can be fed the public key as an HMAC secret.
    if len({name in HMAC_KEY_BYTES for name in value}) > 1:
        raise ValueError("mixes algorithms with a shared secret (HS...) and with a public key")
    return value


def _api_keys(text: str) -> tuple[str, ...]:
    keys = tuple(dict.fromkeys(key.strip() for key in text.split(",")))
    # What can stand in a header as it is. A colon is kept free for what follows a key some day.
    if not all(re.fullmatch(r"[!-9;-~]{1,256}", key) for key in keys):
        raise ValueError("is not a list of keys: visible ASCII without colons, comma between")
    return keys


TEXT = text_like(".+", "is empty")
ANY_TEXT = text_like(".*", "")
HOST = Kind(parse=_host)
PORT = count("port number", high=65_535)
BOOLEAN = Kind(parse=_boolean, show=lambda value: str(value).lower())
PATH = Kind(parse=_path)
DURATION = duration()
MILLISECONDS = duration(bare="ms")
SIZE = size()
MODE = choice("debug", "development", "test", "release", "production")
ALGORITHMS = Kind(parse=_algorithms, show=",".join)
API_KEYS = Kind(parse=_api_keys, show=",".join)
PROXIES = Kind(parse=proxy_list, show=",".join)
ORIGINS = Kind(parse=origin_list, show=",".join)
TOPIC_PATTERNS = Kind(parse=pattern_list, show=show_list)
SLOW_CONSUMERS = Kind(parse=policy_list, show=",".join)
REDIS_URL = Kind(parse=_redis_url, show=mask_url)
USER_CHANNEL = Kind(parse=_user_channel)
