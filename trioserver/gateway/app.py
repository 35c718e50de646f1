"""The routes of the internal port.

    GET /healthz   this process turns; says nothing about anybody else
    GET /readyz    the pool could serve a client now, else 503 and why
    GET /health    the pool, Redis and counts, for people and dashboards; 503 if degraded
    GET /metrics   Prometheus's text, or JSON for those who ask for it

and those of the API (see `trioserver.gateway.api`).

Everything else is a 404 or 405 as problem details (RFC 9457).

Readiness is the supervisor's word, asked for at most ten times a second however many ask us: a slot
without an owner, a stop under way and a dead worker are known there first. What cannot be known is
"not ready". Connections are the supervisor's sum of the workers' beats, about a second old at most.
Users are those of the whole fleet, as Redis counts them (`trioserver.users`); while it does not
answer they are added up from the metric files of this server, where somebody who is connected to
two workers counts twice.
"""

import operator
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus

import attrs
import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from trioserver import health
from trioserver.gateway import metrics_page
from trioserver.gateway.api import Api
from trioserver.gateway.pool_metrics import pool_metrics
from trioserver.gateway.probe import Probe
from trioserver.gateway.problem import (
    Problem,
    answer_bug,
    answer_headers,
    answer_problem,
    json_response,
    problem_response,
)
from trioserver.gateway.redis_watch import RedisPing
from trioserver.gateway.scrape import Scrape
from trioserver.gateway.usage import Usage
from trioserver.status import StatusReply

UNAVAILABLE = HTTPStatus.SERVICE_UNAVAILABLE

_MAX_REASONS = 5
"""Workers named in ``why``; more would only make a longer line."""


@attrs.frozen(kw_only=True)
class Sources:
    """Where the answers come from."""

    pool: Probe[StatusReply | None]
    """The supervisor's word; None if there is none."""

    scrape: Probe[Scrape | None]
    """What all processes have counted; None if it cannot be read in time."""

    usage: Probe[Mapping[str, Usage]]
    """What processes use, by role; nothing of those that cannot be looked at."""

    redis: Callable[[], RedisPing]
    """The last ping."""

    users: Callable[[], int | None]
    """Different users of the fleet; None if Redis has not said so lately."""

    draining: Callable[[], bool]
    """Whether this gateway has been told to finish."""

    uptime: Callable[[], float]
    """Seconds since this process started: for when the supervisor does not say."""


def make_app(sources: Sources, api: Api) -> Starlette:
    """Return the ASGI application, without what is around every request (see `front`)."""
    routes = _Routes(sources)
    app = Starlette(
        routes=[
            Route("/healthz", routes.healthz),
            Route("/readyz", routes.readyz),
            Route("/health", routes.health),
            Route("/metrics", routes.metrics),
            *api.routes(),
        ],
        exception_handlers={
            HTTPException: answer_problem,
            Problem: answer_problem,
            Exception: answer_bug,
        },
    )
    # A redirect would be built from the Host header, which is whatever the client says.
    app.router.redirect_slashes = False
    return app


@attrs.frozen
class _Page:
    """A page, and what is on it."""

    made_of: tuple[object, ...]
    body: bytes


class _Routes:
    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._latest: _Page | None = None

    async def healthz(self, _request: Request) -> Response:
        return json_response(health.liveness_body())

    async def readyz(self, _request: Request) -> Response:
        ready, why = self._readiness(await self._sources.pool.get())
        body = health.readiness_body(ready=ready, why=why)
        return json_response(body, HTTPStatus.OK if ready else UNAVAILABLE)

    async def health(self, _request: Request) -> Response:
        reply, scraped, _ = await self._ask_all()
        ping = self._sources.redis()
        state = health.Health(
            ready=self._readiness(reply)[0],
            redis_ping_seconds=ping.seconds,
            redis_error=ping.error,
            connections=_connections(reply, scraped),
            users=self._users(scraped),
            uptime_seconds=self._uptime(reply),
        )
        return json_response(state.body(time.time()), state.status)

    async def metrics(self, request: Request) -> Response:
        reply, scraped, used = await self._ask_all()
        if scraped is None:
            return problem_response(UNAVAILABLE, "The metric files could not be read in time.")
        if prefers_json(request.headers.get("accept", "")):
            body = metrics_page.json_page(
                scraped,
                connections=_connections(reply, scraped),
                users=self._users(scraped),
                uptime_seconds=self._uptime(reply),
                now=time.time(),
            )
            return json_response(body)
        body = self._prometheus_page(reply, scraped, used)
        return Response(body, headers=answer_headers(metrics_page.CONTENT_TYPE))

    def _prometheus_page(
        self, reply: StatusReply | None, scraped: Scrape, used: Mapping[str, Usage]
    ) -> bytes:
        # Writing the page is the dearest part of a scrape; many at once get the same.
        ping = self._sources.redis()
        made_of = (reply, scraped, used, ping, self._sources.users())
        latest = self._latest
        if latest is None or any(map(operator.is_not, latest.made_of, made_of)):
            more = pool_metrics(reply, used, ping, users=self._users(scraped))
            body = metrics_page.prometheus_page(scraped, more)
            self._latest = latest = _Page(made_of, body)
        return latest.body

    async def _ask_all(self) -> tuple[StatusReply | None, Scrape | None, Mapping[str, Usage]]:
        sources = self._sources
        reply: StatusReply | None = None
        used: Mapping[str, Usage] = {}

        async def ask_pool() -> None:
            nonlocal reply, used
            reply = await sources.pool.get()
            if reply is not None:
                used = await sources.usage.get()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_pool)
            scraped = await sources.scrape.get()
        return reply, scraped, used

    def _readiness(self, reply: StatusReply | None) -> tuple[bool, str]:
        if reply is None:
            return False, "the supervisor does not answer"
        if reply.draining or self._sources.draining():
            return False, "draining"
        if reply.ready:
            return True, ""
        missing = [
            f"worker {worker.slot}: {worker.why or 'not there'}"
            for worker in reply.workers
            if worker.pid is None or not worker.ready
        ]
        return False, "; ".join(missing[:_MAX_REASONS]) or "no worker is ready"

    def _users(self, scraped: Scrape | None) -> int:
        users = self._sources.users()
        if users is None:
            users = 0 if scraped is None else int(scraped.total("websocket_users"))
        return users

    def _uptime(self, reply: StatusReply | None) -> float:
        return self._sources.uptime() if reply is None else reply.uptime_seconds


def prefers_json(accept: str) -> bool:
    """Return whether an ``Accept`` header names JSON, and likes it no less than text.

    Wildcards do not count: a browser and Prometheus get the text.
    """
    liking = {"application/json": 0.0, "text/plain": 0.0}
    for part in accept.split(","):
        media_type, *parameters = (word.strip().lower() for word in part.split(";"))
        if media_type in liking:
            liking[media_type] = _quality(parameters)
    return liking["application/json"] > 0 and liking["application/json"] >= liking["text/plain"]


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


def _connections(reply: StatusReply | None, scraped: Scrape | None) -> int:
    if reply is not None:
        return sum(worker.connections for worker in reply.workers)
    return int(scraped.total("websocket_connections")) if scraped is not None else 0
