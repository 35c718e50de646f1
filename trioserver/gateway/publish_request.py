"""The body of ``POST /api/v1/notifications``, and the headers that belong to it. Pure.

    {"to": {"user": "42"} | {"users": ["42", "43"]} | {"all": true}
           | {"topic": "news.eu"} | {"topics": ["news.eu", "room.7"]},
     "type": "order.shipped", "payload": any JSON,
     "ttl": 3600 | "1h", "fallback_after": 600 | "10m", "deliver_at": "2026-01-01T08:00:00Z",
     "idempotency_key": "order-1017", "collapse_key": "order-1017", "priority": true,
     "key": "acme"}

What a shape can say is checked here; whether the values are possible is for
`trioserver.publisher`, which has the same rules for every way of publishing. Unknown fields are
refused: one that is misspelt would change silently what becomes of a notification.
"""

import datetime as dt
import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Annotated, Final, TypeVar

import attrs
import msgspec

from trioserver.gateway.problem import Problem
from trioserver.publisher import Options
from trioserver.setting_kinds import DURATION

T = TypeVar("T")

MAX_USERS: Final = 1000
"""Users, or topics, in one request."""

Headers = Iterable[tuple[bytes, bytes]]

_Seconds = Annotated[float, msgspec.Meta(ge=0)] | str
_Moment = Annotated[dt.datetime, msgspec.Meta(tz=True)]
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class _To(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    user: str | None = None
    users: Annotated[list[str], msgspec.Meta(max_length=MAX_USERS)] | None = None
    all: bool | None = None
    topic: str | None = None
    topics: Annotated[list[str], msgspec.Meta(max_length=MAX_USERS)] | None = None


class _Body(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    to: _To
    payload: msgspec.Raw
    type: str | None = None
    ttl: _Seconds | None = None
    idempotency_key: str | None = None
    collapse_key: str | None = None
    deliver_at: _Moment | None = None
    fallback_after: _Seconds | None = None
    priority: bool | None = None
    key: str | None = None


_decoder: Final = msgspec.json.Decoder(_Body)


@attrs.frozen(kw_only=True)
class PublishRequest:
    """What somebody wants published, and to whom."""

    user: str | None
    """The one recipient; None for several, for everyone and for topics."""
    users: tuple[str, ...] | None
    """The recipients, each once; None if they are others."""
    payload: msgspec.Raw
    options: Options
    topic: str | None = None
    topics: tuple[str, ...] | None = None
    """Each once."""


def read(body: bytes, headers: Headers, max_payload: int) -> PublishRequest:
    """Return what a request asks for.

    Args:
        body: Of the request.
        headers: Of the request, names in lower case.
        max_payload: Bytes that the payload may have; 0 is no limit.

    Raises:
        Problem: 415 if it is not said to be JSON, 400 if it is none, 422 if it is not of the
            form above, 413 if the payload is too large.
    """
    listed = list(headers)
    media_type = _header(listed, b"content-type").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Content-Type must be application/json.")
    decoded = _decode(body)
    if 0 < max_payload < len(memoryview(decoded.payload)):
        detail = f"The payload is larger than {max_payload} bytes."
        raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail)
    to = decoded.to
    _check_recipients(to)
    return PublishRequest(
        user=to.user,
        users=_each_once(to.users),
        topic=to.topic,
        topics=_each_once(to.topics),
        payload=decoded.payload,
        options=_options(decoded, listed),
    )


def _decode(body: bytes) -> _Body:
    try:
        # The decoder skips over the payload without looking at its characters.
        body.decode()
        return _decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _wrong(f"{error}.") from None
    except UnicodeDecodeError:
        problem = "The body is not UTF-8."
    except RecursionError:
        problem = "The body is nested too deeply."
    except msgspec.DecodeError as error:
        problem = f"The body is not JSON: {error}." if body else "The body is empty."
    raise Problem(HTTPStatus.BAD_REQUEST, problem)


def _check_recipients(to: _To) -> None:
    whom = (to.user, to.users, to.topic, to.topics)
    if len([one for one in whom if one is not None]) + bool(to.all) != 1:
        raise _wrong(
            '"to" is one of {"user": "…"}, {"users": ["…"]}, {"all": true}, {"topic": "…"} and '
            '{"topics": ["…"]}.'
        )
    if to.users == []:
        raise _wrong('"users" is empty.')
    if to.topics == []:
        raise _wrong('"topics" is empty.')


def _each_once(names: list[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(dict.fromkeys(names))


def _options(body: _Body, headers: list[tuple[bytes, bytes]]) -> Options:
    options = Options(
        ttl=_seconds("ttl", body.ttl),
        fallback_after=_seconds("fallback_after", body.fallback_after),
        deliver_at=body.deliver_at,
        collapse_key=body.collapse_key,
        idempotency_key=_idempotency_key(body.idempotency_key, headers),
    )
    if body.type is not None:
        options["type"] = body.type
    if body.priority:
        options["priority"] = True
    if body.key is not None:
        options["key"] = body.key
    traceparent = _header(headers, b"traceparent")
    # One that is malformed is as good as none, says its specification.
    if _TRACEPARENT.fullmatch(traceparent):
        options["traceparent"] = traceparent
    return options


def _seconds(name: str, value: float | str | None) -> float | None:
    if not isinstance(value, str):
        return value
    try:
        return DURATION.parse(value)
    except ValueError as problem:
        raise _wrong(f'"{name}" {problem}: seconds, or text like "90s" or "1h".') from None


def _idempotency_key(in_body: str | None, headers: list[tuple[bytes, bytes]]) -> str | None:
    found = _all(headers, b"idempotency-key")
    if not found:
        return in_body
    in_header = found[0]
    if len(in_header) > 1 and in_header[0] == in_header[-1] == '"':
        in_header = in_header[1:-1]  # a string of RFC 8941, as the draft for this header wants it
    if {in_header, *found[1:]} != {in_header} or in_body not in {None, in_header}:
        # Whichever was meant, with the other one a repetition would not be recognised.
        raise Problem(HTTPStatus.BAD_REQUEST, "There is more than one idempotency key.")
    return in_header


def _all(headers: list[tuple[bytes, bytes]], name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for header, value in headers if header == name]


def _header(headers: list[tuple[bytes, bytes]], name: bytes) -> str:
    """Return the value of a header; empty if it is not there, or more than once."""
    found = _all(headers, name)
    return found[0] if len(found) == 1 else ""


def _wrong(detail: str) -> Problem:
    return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, detail)
