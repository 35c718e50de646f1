"""What happens around every request that the guard lets pass, whatever its route.

In this order: the request gets an id, it is counted against its client's rate, the application
answers, the answer gets what every answer has, is counted and logged in one line. The query is
never logged, it may hold a token.

Hypercorn leaves two things to us. Bodies that nobody reads would hang the connection: see
`trioserver.gateway.body`; the application does not use ASGI's `receive` but asks
``request.state.body``. And an exception that reaches it is logged without the request it belongs
to.
"""

import math
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from http import HTTPStatus
from typing import Any, Final

import trio

from trioserver import health, logs, response_heads
from trioserver.gateway.body import Body, Message, Receive
from trioserver.gateway.client_rate import EXEMPT, ClientRate
from trioserver.metrics import Tally

Scope = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_MAX_LOGGED_PATH: Final = 200
_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})
_NOTIFICATIONS: Final = "/api/v1/notifications/"
# Monitors fetch these all day long, and "not ready" is an answer like any other.
_ROUTINE: Final = EXEMPT
_ON_EVERY_ANSWER: Final = tuple(
    (name.lower().encode(), value.encode()) for name, value in response_heads.HEADERS.items()
)
_NO_HEADERS: Final[Mapping[str, str]] = {}


class Front:
    """Wraps an ASGI application. Nothing but cancellation leaves it."""

    def __init__(self, app: Application, tally: Tally, rate: ClientRate | None = None) -> None:
        """Prepare.

        Args:
            app: What answers.
            tally: Counts the answers.
            rate: Bounds the requests of each client; None is no limit.
        """
        self._app = app
        self._tally = tally
        self._rate = rate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or pass on what is none (lifespan; WebSockets, which get 403)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = Body(receive, scope["headers"], wanted=scope["method"] in _WITH_BODY)
        given = [value for name, value in scope["headers"] if name == b"x-request-id"]
        answer = _Answer(send, body, response_heads.request_id(given))
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
        wait = 0.0 if self._rate is None else self._rate.take(scope, trio.current_time())
        if self._rate is not None and wait:
            retry = {"Retry-After": str(math.ceil(wait))}
            await answer.refuse(HTTPStatus.TOO_MANY_REQUESTS, self._rate.detail, retry)
            return
        try:
            await self._app(scope, _no_body, answer.send)
        except Exception:  # noqa: BLE001 - a bug in one route ends that request, nothing else
            logs.get_logger().exception("a request failed", request_id=answer.request_id)
            await answer.refuse(HTTPStatus.INTERNAL_SERVER_ERROR)


class _Answer:
    """The way back: adds what every answer has, and remembers the status."""

    def __init__(self, send: Send, body: Body, request_id: str) -> None:
        self._send = send
        self._body = body
        self._began = time.perf_counter()
        self.request_id = request_id
        self.status = 0
        """0 until the response has begun."""
        self.seconds = 0.0
        """Until the last byte of the response was sent."""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            lines = list(message.get("headers", ()))
            named = {name.lower() for name, _ in lines}
            lines += [line for line in _ON_EVERY_ANSWER if line[0] not in named]
            lines.append((b"x-request-id", self.request_id.encode()))
            message["headers"] = lines
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

    async def refuse(
        self, status: int, detail: str = "", more: Mapping[str, str] = _NO_HEADERS
    ) -> None:
        """Answer with a problem, unless a response has begun, which cannot be taken back.

        Args:
            status: HTTP status.
            detail: A sentence about this very case.
            more: Further headers.
        """
        if self.status:
            return
        body = health.problem_body(status, detail)
        headers = {
            "content-type": health.PROBLEM_JSON,
            "content-length": str(len(body)),
            # Whoever is refused here gets no second request without a new connection.
            "connection": "close",
            **more,
        }
        lines = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": lines})
        await self.send({"type": "http.response.body", "body": body})


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
