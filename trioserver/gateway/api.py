"""The API for back ends, on the internal port; every request needs one of ``API_KEYS``.

    POST /api/v1/notifications        publish; the body is in `publish_request`
    GET  /api/v1/notifications/{id}   what became of one

``202`` means that Redis has it. What was not published is a problem whose status says what to do:
400, 413, 415 and 422 ask for another request, 409 for another idempotency key, 429 and 503 to come
back. Whether a 503 has left something behind is in its text; with an idempotency key it does not
matter.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Final, TypeAlias

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from trioserver.errors import RedisError, RedisRefused, RedisUnavailable
from trioserver.gateway import publish_request
from trioserver.gateway.api_keys import ApiKeys
from trioserver.gateway.life_page import life_page
from trioserver.gateway.problem import Problem, json_response
from trioserver.gateway.publish_request import PublishRequest
from trioserver.publisher import (
    Accepted,
    IdempotencyConflict,
    PublishInterrupted,
    PublishRefused,
    RateLimited,
    Result,
    TrioPublisher,
)

UNAVAILABLE: Final = HTTPStatus.SERVICE_UNAVAILABLE

Answer: TypeAlias = Mapping[str, object]

NOTIFICATIONS: Final = "/api/v1/notifications"

PUBLISH_SECONDS: Final = 10.0
"""For publishing to all users of one request, repetitions included."""

_RETRY_AFTER: Final = {"Retry-After": "1"}
_LATER: Final = {"Retry-After": "60"}
"""When somebody has to see to it first."""
_UNKNOWN: Final = (
    "Redis did not say that it has it, so whether it was published is unknown: with the same "
    "idempotency key the request can be repeated safely."
)
# Redis finds out about these at the first write of a script, when nothing has happened yet.
_BEFORE_ANY_WRITE: Final = ("OOM ", "READONLY ", "MISCONF ", "NOREPLICAS ")


class Api:
    """The routes of the API."""

    def __init__(
        self,
        keys: ApiKeys,
        publisher: TrioPublisher,
        *,
        max_payload: int,
        count: Callable[[str], object],
        closed: str = "",
    ) -> None:
        """Prepare.

        Args:
            keys: Who may ask.
            publisher: Does what is asked.
            max_payload: Bytes of one payload; 0 is no limit.
            count: Called with the outcome for each recipient: ``accepted``, ``scheduled``,
                ``duplicate``, ``limited``, ``refused`` or ``unavailable``.
            closed: Why nothing may be published; empty if it may.
        """
        self._closed = closed
        self._keys = keys
        self._publisher = publisher
        self._max_payload = max_payload
        self._count = count

    def routes(self) -> list[Route]:
        """Return what Starlette serves."""
        return [
            Route(NOTIFICATIONS, self._publish, methods=["POST"]),
            Route(f"{NOTIFICATIONS}/{{id}}", self._life),
        ]

    async def _publish(self, request: Request) -> Response:
        headers = request.scope["headers"]
        self._keys.check(headers)
        try:
            body = await request.state.body.read()
            wanted = publish_request.read(body, headers, self._max_payload)
            results = await self._results(wanted)
        except Problem as problem:
            self._count("refused" if problem.status < UNAVAILABLE else "unavailable")
            raise
        for result in results:
            self._count(_outcome(result))
        answer = _answer(wanted, results)
        return json_response(msgspec.json.encode(answer), HTTPStatus.ACCEPTED)

    async def _results(self, wanted: PublishRequest) -> Sequence[Result]:
        if self._closed:
            raise Problem(UNAVAILABLE, self._closed, _LATER)
        with trio.move_on_after(PUBLISH_SECONDS):
            try:
                return await self._publish_to(wanted)
            except PublishInterrupted as interrupted:
                return interrupted.results
            except (PublishRefused, RedisRefused, RedisUnavailable) as error:
                # Of a wrong request, which is wrong for all of many recipients.
                return [error] * len(wanted.users or wanted.topics or "1")
        raise Problem(UNAVAILABLE, _UNKNOWN, _RETRY_AFTER)

    async def _publish_to(self, wanted: PublishRequest) -> Sequence[Result]:
        publish, payload, options = self._publisher.publish, wanted.payload, wanted.options
        if wanted.users is not None:
            return await publish(payload, users=wanted.users, **options)
        if wanted.topics is not None:
            return await publish(payload, topics=wanted.topics, **options)
        if wanted.user is not None:
            return [await publish(payload, user=wanted.user, **options)]
        if wanted.topic is not None:
            return [await publish(payload, topic=wanted.topic, **options)]
        return [await publish(payload, everyone=True, **options)]

    async def _life(self, request: Request) -> Response:
        self._keys.check(request.scope["headers"])
        try:
            trace = await self._publisher.notification(request.path_params["id"])
        except PublishRefused:
            trace = None
        except (RedisRefused, RedisUnavailable) as error:
            raise Problem(UNAVAILABLE, f"Redis does not answer: {error}.", _RETRY_AFTER) from None
        if trace is None:
            raise Problem(HTTPStatus.NOT_FOUND, "Nothing is known of this notification.")
        return json_response(life_page(trace))


def _outcome(result: Result) -> str:
    if isinstance(result, Accepted):
        return result.outcome if result.outcome in {"scheduled", "duplicate"} else "accepted"
    if isinstance(result, RateLimited):
        return "limited"
    return "refused" if isinstance(result, PublishRefused) else "unavailable"


def _answer(wanted: PublishRequest, results: Sequence[Result]) -> Answer:
    if wanted.users is not None:
        return _answer_many("user", wanted.users, results)
    if wanted.topics is not None:
        return _answer_many("topic", wanted.topics, results)
    return _answer_one(results[0])


def _answer_one(result: Result) -> Answer:
    if isinstance(result, Accepted):
        # What is not kept has neither, what is not yet due has no position.
        return {"id": result.id or None, "position": result.position or None}
    raise _problem(result)


def _answer_many(what: str, names: Sequence[str], results: Sequence[Result]) -> Answer:
    if not any(isinstance(result, Accepted) for result in results):
        problems = [_problem(result) for result in results if not isinstance(result, Accepted)]
        # The one that says most about what to do: come back, before change the request. And to
        # come back once, for all.
        raise max(problems, key=lambda problem: (problem.status, _retry_after(problem)))
    together = zip(names, results, strict=True)
    return {"notifications": [{what: name, **_line(result)} for name, result in together]}


def _line(result: Result) -> Answer:
    if isinstance(result, Accepted):
        return {"id": result.id or None, "position": result.position or None}
    problem = _problem(result)
    answer = {"error": problem.detail, "status": problem.status}
    if isinstance(result, RateLimited):
        return {**answer, "retry_after": _retry_after(problem)}
    return answer


def _problem(error: PublishRefused | RedisError) -> Problem:
    match error:
        case IdempotencyConflict():
            return Problem(HTTPStatus.CONFLICT, _sentence(error))
        case RateLimited():
            headers = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
            return Problem(HTTPStatus.TOO_MANY_REQUESTS, _sentence(error), headers)
        case PublishRefused():
            return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, _sentence(error))
        case RedisRefused() if _had_no_effect(str(error)):
            detail = f"Nothing was published, Redis takes nothing: {_sentence(error)}"
            return Problem(UNAVAILABLE, detail, _RETRY_AFTER)
        case _:
            return Problem(UNAVAILABLE, _UNKNOWN, _RETRY_AFTER)


def _retry_after(problem: Problem) -> int:
    return int(problem.headers.get("Retry-After", "0"))


def _had_no_effect(refusal: str) -> bool:
    # A script that breaks in the middle, for a reason that nobody foresaw, is not undone.
    return "user_script" not in refusal or refusal.startswith(_BEFORE_ANY_WRITE)


def _sentence(error: Exception) -> str:
    return f"{str(error).rstrip('.')}."
