"""Who may use the API: those who know one of ``API_KEYS``.

The key comes in ``X-API-Key``, or as ``Authorization: Bearer``. Comparing takes the same time
whatever was sent and whichever key it is like: hashes are compared, all of them, to the end.
"""

import hashlib
import hmac
from collections.abc import Iterable
from http import HTTPStatus

from trioserver.gateway.problem import Problem

_BEARER = b"bearer "


class ApiKeys:
    """The keys that are good. Without any, nobody is let in."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Let the request pass that has a good key.

        Args:
            headers: Of the request, names in lower case.

        Raises:
            Problem: 401: no key, or none of ours, or more than one.
        """
        given = _given(headers)
        if len(given) != 1:
            problem = "more than one" if given else "none"
            raise _refusal(f"One API key is needed in X-API-Key, there is {problem}.")
        if self._index(given[0]) is None:
            raise _refusal("The API key is not one of API_KEYS.")

    def number(self, headers: Iterable[tuple[bytes, bytes]]) -> int | None:
        """Return which of the keys the request has, counted from 0; None if it has no good one."""
        given = _given(headers)
        return self._index(given[0]) if len(given) == 1 else None

    def _index(self, key: bytes) -> int | None:
        digest = _digest(key)
        # All of them first: a loop that looks for one would stop where it is.
        same = [hmac.compare_digest(digest, known) for known in self._digests]
        return same.index(True) if True in same else None


def _given(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    keys: list[bytes] = []
    bearers: list[bytes] = []
    for name, value in headers:
        if name == b"x-api-key":
            keys.append(value.strip())
        elif name == b"authorization" and value[: len(_BEARER)].lower() == _BEARER:
            bearers.append(value[len(_BEARER) :].strip())
    # Of two different headers the special one counts: a proxy may use the other for itself.
    return keys or bearers


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _refusal(detail: str) -> Problem:
    return Problem(HTTPStatus.UNAUTHORIZED, detail, {"WWW-Authenticate": "Bearer"})
