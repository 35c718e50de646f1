"""What health looks like on the wire: small JSON bodies, and HTTP responses as bytes.

Pure: no clock and no sockets; ``now`` is passed in. The workers' own port answers with
`small_response`, the gateway puts the same bodies into its own responses, so both say the same.

Liveness means that the event loop turns, nothing else: a dead Redis must never get a process
restarted. Readiness means that a client could be served now. Health is for people and dashboards.
"""

import datetime as dt
from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

import attrs
import msgspec

from trioserver import response_heads

JSON: Final = "application/json"
PROBLEM_JSON: Final = "application/problem+json"

SMALL_HEADERS: Final = response_heads.HEADERS


def liveness_body() -> bytes:
    """Return the body of ``/healthz``; that it is sent at all is the answer."""
    return b'{"status":"ok"}'


def readiness_body(*, ready: bool, why: str = "") -> bytes:
    """Return the body of ``/readyz``.

    Args:
        ready: Whether a client could be served now.
        why: If not, what is missing, in a few words.
    """
    return msgspec.json.encode({"ready": ready} if ready else {"ready": ready, "why": why})


def problem_body(status: int, detail: str = "") -> bytes:
    """Return an RFC 9457 problem without a type of its own.

    Args:
        status: HTTP status, whose standard phrase is the title.
        detail: One sentence about this very case. Left out if empty.
    """
    problem = {"type": "about:blank", "title": _phrase(status), "status": status}
    return msgspec.json.encode(problem | {"detail": detail} if detail else problem)


@attrs.frozen(kw_only=True)
class Health:
    """How a process, or the pool, is doing. `body` is the shape that monitors already know."""

    ready: bool
    """Whether clients can be served now."""

    redis_ping_seconds: float | None
    """How long Redis took to answer the last ping; None if it did not."""

    redis_error: str = ""
    """Why it did not, in a few words that carry no credentials."""

    connections: int
    """Open WebSocket connections."""

    users: int
    """Distinct users among them, as far as is known."""

    uptime_seconds: float

    @property
    def status(self) -> int:
        """HTTP status of the answer: 200, or 503 when anything is degraded."""
        healthy = self.ready and self.redis_ping_seconds is not None
        return HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE

    def body(self, now: float) -> bytes:
        """Return the body of ``/health``.

        Args:
            now: POSIX time in seconds.
        """
        return msgspec.json.encode(
            {
                "status": "healthy" if self.status == HTTPStatus.OK else "degraded",
                "timestamp": timestamp(now),
                "redis": self._redis(),
                "websocket": {
                    "active_connections": self.connections,
                    "total_unique_users": self.users,
                },
                "uptime_seconds": int(self.uptime_seconds),
            }
        )

    def _redis(self) -> dict[str, str | float]:
        if self.redis_ping_seconds is None:
            return {"status": "disconnected", "error": self.redis_error}
        return {"status": "connected", "ping_ms": round(self.redis_ping_seconds * 1000, 2)}


def timestamp(now: float) -> str:
    """Return POSIX seconds as RFC 3339 UTC, in whole seconds as monitors of old expect it."""
    moment = dt.datetime.fromtimestamp(int(now), tz=dt.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def small_response(
    status: int,
    body: bytes,
    content_type: str,
    *,
    head: bool = False,
    headers: Mapping[str, str] | None = None,
    request_id: str = "",
    secure: bool = False,
) -> bytes:
    """Return a whole HTTP/1.1 response, after which the connection is closed.

    Args:
        status: HTTP status.
        body: What follows the head.
        content_type: Media type of the body.
        head: Whether the request was HEAD: the same headers, no body.
        headers: Further headers, or other values for those of `trioserver.response_heads`.
            Values are trusted: nothing of a client's without a check.
        request_id: See `response_heads.request_id`; a new one without.
        secure: Whether it goes out through our own TLS.
    """
    lines = {
        "Content-Type": content_type,
        "Content-Length": str(len(body)),
        "Connection": "close",
        response_heads.REQUEST_ID: request_id or response_heads.new_request_id(),
        **(response_heads.TLS_HEADERS if secure else response_heads.HEADERS),
        **(headers or {}),
    }
    fields = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    start = f"HTTP/1.1 {status} {_phrase(status)}\r\n{fields}\r\n".encode("latin-1")
    return start if head else start + body


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"
