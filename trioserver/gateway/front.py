"""What happens around every request, whatever its route.

In this order: the head is measured, the request gets an id, the application answers, the answer is
counted and logged in one line. The query is never logged, it may hold a token.

Hypercorn leaves three things to us. Its limit on heads holds only for those that arrive in pieces.
Bodies that nobody reads would hang the connection: see `trioserver.gateway.body`; the application
does not use ASGI's `receive` but asks ``request.state.body``. And an exception that reaches it is
logged without the request it belongs to.
"""

import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Final

import trio

from trioserver import health, logs
from trioserver.gateway.body import Body, Message, Receive
from trioserver.metrics import Tally

Scope = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_HEAD_BYTES: Final = 16 << 10
MAX_LINE_BYTES: Final = 8 << 10
MAX_HEADERS: Final = 100
"""As in the workers' handshake: 16 KiB together, 8 KiB in one line, 100 lines."""

MAX_REQUEST_ID: Final = 128

_MAX_LOGGED_PATH: Final = 200
_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})
_NOTIFICATIONS: Final = "/api/v1/notifications/"
# Monitors fetch these all day long, and "not ready" is an answer like any other.
_ROUTINE: Final = frozenset({"/healthz", "/readyz", "/health", "/metrics"})


class Front:
    """Wraps an ASGI application. Nothing but cancellation leaves it."""

    def __init__(self, app: Application, tally: Tally) -> None:
        self._app = app
        self._tally = tally

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or pass on what is none (lifespan; WebSockets, which get 403)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = Body(receive, scope["headers"], wanted=scope["method"] in _WITH_BODY)
        answer = _Answer(send, body, request_id(scope["headers"]), scope["http_version"])
        scope.setdefault("state", {}).update(request_id=answer.request_id, body=body)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(body.run)
                await self._respond(scope, answer)
                nursery.cancel_scope.cancel()
        finally:
            self._tally.answered(path_label(scope["path"]), answer.status)
            _log(scope, answer)

    async def _respond(self, scope: Scope, answer: "_Answer") -> None:
        if head_is_too_large(scope):
            await answer.refuse(431)
            return
        try:
            await self._app(scope, _no_body, answer.send)
        except Exception:  # noqa: BLE001 - a bug in one route ends that request, nothing else
            logs.get_logger().exception("a request failed", request_id=answer.request_id)
            await answer.refuse(500)


class _Answer:
    """The way back: adds the request id, and remembers the status."""

    def __init__(self, send: Send, body: Body, request_id: str, http_version: str) -> None:
        self._send = send
        self._body = body
        self._http_version = http_version
        self._began = time.perf_counter()
        self.request_id = request_id
        self.status = 0
        """0 until the response has begun."""
        self.seconds = 0.0
        """Until the last byte of the response was sent."""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [
                *message.get("headers", ()),
                (b"x-request-id", self.request_id.encode()),
            ]
        elif not message.get("more_body", False) and not self._body.ended:
            # All that the client gets; but with the end of it, Hypercorn would hang up.
            await self._send({**message, "more_body": True})
            self._note_time()
            await self._body.linger()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)
        self._note_time()

    def _note_time(self) -> None:
        self.seconds = self.seconds or time.perf_counter() - self._began

    async def refuse(self, status: int) -> None:
        """Answer with a problem, unless a response has begun, which cannot be taken back."""
        if self.status:
            return
        body = health.problem_body(status)
        headers = {"Content-Type": health.PROBLEM_JSON, **health.SMALL_HEADERS}
        lines = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        lines.append((b"content-length", str(len(body)).encode()))
        if self._http_version.startswith("1"):
            # Whoever sends this gets no second request; HTTP/2 has no such header.
            lines.append((b"connection", b"close"))
        await self.send({"type": "http.response.start", "status": status, "headers": lines})
        await self.send({"type": "http.response.body", "body": body})


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return the caller's ``X-Request-ID`` if it is a decent one, else a new one.

    Decent is what can go into a log line and a header as it is: 1-128 visible ASCII characters,
    and only one such header.
    """
    given = [value for name, value in headers if name == b"x-request-id"]
    if len(given) == 1 and 0 < len(given[0]) <= MAX_REQUEST_ID:
        text = given[0].decode("latin-1")
        if all("!" <= character <= "~" for character in text):
            return text
    return secrets.token_hex(8)


def head_is_too_large(scope: Scope) -> bool:
    """Return whether the request line or the headers are beyond any honest request."""
    lines = [len(scope["raw_path"]) + len(scope["query_string"])]
    lines += [len(name) + len(value) + len(": \r\n") for name, value in scope["headers"]]
    return (
        len(lines) > MAX_HEADERS + 1 or max(lines) > MAX_LINE_BYTES or sum(lines) > MAX_HEAD_BYTES
    )


def path_label(path: str) -> str:
    """Return what stands for a path where the paths are counted: ids are left out."""
    if path.startswith(_NOTIFICATIONS) and "/" not in path[len(_NOTIFICATIONS) :]:
        return f"{_NOTIFICATIONS}{{id}}"
    return path


async def _no_body() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


def _log(scope: Scope, answer: _Answer) -> None:
    log = logs.get_logger()
    path = scope["path"][:_MAX_LOGGED_PATH]
    if path in _ROUTINE and answer.status in {200, 503}:
        write = log.debug
    else:
        write = log.warning if answer.status >= 500 else log.info  # noqa: PLR2004 - our own fault
    write(
        "request",
        request_id=answer.request_id,
        method=scope["method"],
        path=path,
        status=answer.status,
        duration_ms=round(answer.seconds * 1000, 2),
    )
