"""Health: the shapes that monitors know, and small responses that any HTTP client reads."""

import http.client
import io
import json

import attrs
import pytest

from trioserver import health, response_heads
from trioserver.health import Health

NOW = 1737450000.987
"""2025-01-21T09:00:00Z, and a bit."""

HEALTHY = Health(
    ready=True, redis_ping_seconds=0.001234, connections=1234, users=890, uptime_seconds=3600.9
)


class _Wire:
    """Lets `http.client` read a response from bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self.data)


def parse(data: bytes, method: str = "GET") -> http.client.HTTPResponse:
    """Return the response that an independent client sees."""
    response = http.client.HTTPResponse(_Wire(data), method=method)  # type: ignore[arg-type]
    response.begin()
    return response


def test_healthy_has_exactly_the_known_shape() -> None:
    """A healthy pool answers 200 with the fields and words that monitors expect."""
    assert 200 == HEALTHY.status
    assert {
        "status": "healthy",
        "timestamp": "2025-01-21T09:00:00Z",
        "redis": {"status": "connected", "ping_ms": 1.23},
        "websocket": {"active_connections": 1234, "total_unique_users": 890},
        "uptime_seconds": 3600,
    } == json.loads(HEALTHY.body(NOW))


def test_without_redis_it_is_degraded() -> None:
    """Redis away: 503, ``degraded``, and the reason in place of the ping time."""
    degraded = attrs.evolve(HEALTHY, redis_ping_seconds=None, redis_error="connection timeout")

    assert 503 == degraded.status
    body = json.loads(degraded.body(NOW))
    assert "degraded" == body["status"]
    assert {"status": "disconnected", "error": "connection timeout"} == body["redis"]


def test_not_ready_is_degraded() -> None:
    """A pool that cannot serve is degraded, however well Redis is."""
    degraded = attrs.evolve(HEALTHY, ready=False)

    assert 503 == degraded.status
    assert "degraded" == json.loads(degraded.body(NOW))["status"]
    assert "connected" == json.loads(degraded.body(NOW))["redis"]["status"]


def test_readiness_says_why_not() -> None:
    """``why`` is there exactly when it is not ready."""
    assert {"ready": True} == json.loads(health.readiness_body(ready=True, why="ignored"))
    assert {
        "ready": False,
        "why": "draining",
    } == json.loads(health.readiness_body(ready=False, why="draining"))


def test_liveness_is_a_word() -> None:
    """The loop turns: that is all there is to say."""
    assert {"status": "ok"} == json.loads(health.liveness_body())


def test_a_problem_names_its_status() -> None:
    """Errors are RFC 9457 problems; a detail is there if there is one."""
    assert {
        "type": "about:blank",
        "title": "Not Found",
        "status": 404,
    } == json.loads(health.problem_body(404))
    assert "Who knows." == json.loads(health.problem_body(599, "Who knows."))["detail"]


@pytest.mark.parametrize("status", [200, 503, 599])
def test_a_small_response_is_whole(status: int) -> None:
    """Any HTTP client reads status, type and body, and knows that the connection ends."""
    response = parse(health.small_response(status, b'{"a":1}', health.JSON))

    assert response.status == status
    assert b'{"a":1}' == response.read()
    assert "application/json" == response.headers["Content-Type"]
    assert "7" == response.headers["Content-Length"]
    assert "close" == response.headers["Connection"]
    assert "no-store" == response.headers["Cache-Control"]
    assert "nosniff" == response.headers["X-Content-Type-Options"]


def test_the_answer_to_head_has_no_body() -> None:
    """HEAD gets the same headers, and nothing after them."""
    whole = health.small_response(200, b"body", "text/plain", request_id="a")
    head = health.small_response(200, b"body", "text/plain", head=True, request_id="a")

    assert head == whole.removesuffix(b"body")
    assert "4" == parse(head, "HEAD").headers["Content-Length"]


def test_further_headers_are_added() -> None:
    """The caller may add headers, such as Retry-After."""
    response = parse(health.small_response(503, b"", "text/plain", headers={"Retry-After": "5"}))

    assert "5" == response.headers["Retry-After"]


def test_every_answer_has_the_heads_of_all_and_an_id() -> None:
    """The caller's id, or a new one; TLS is demanded where it is there."""
    plain = parse(health.small_response(200, b"", "text/plain", request_id="trace-7"))
    secure = parse(health.small_response(200, b"", "text/plain", secure=True))

    assert "trace-7" == plain.headers["X-Request-ID"]
    assert 16 == len(secure.headers["X-Request-ID"])
    for name, value in response_heads.HEADERS.items():
        assert [value] == plain.headers.get_all(name) == secure.headers.get_all(name)
    assert "Strict-Transport-Security" not in plain.headers
    assert "max-age=31536000" == secure.headers["Strict-Transport-Security"]


def test_a_page_brings_its_own_policy() -> None:
    """What the caller adds replaces what is said otherwise, and nothing is there twice."""
    own = {response_heads.POLICY: "script-src 'self'"}
    response = parse(health.small_response(200, b"", "text/html", headers=own))

    assert ["script-src 'self'"] == response.headers.get_all("Content-Security-Policy")
