"""Problems: how a request is told that it cannot be served."""

import json

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request

from trioserver.gateway.problem import Problem, answer_bug, answer_problem

REQUEST = Request({"type": "http"})


async def test_a_problem_carries_its_reason_and_headers() -> None:
    """Status, standard title, detail; further headers beside those of every small answer."""
    response = await answer_problem(REQUEST, Problem(503, "Not now.", {"Retry-After": "1"}))

    assert 503 == response.status_code
    assert {
        "type": "about:blank",
        "title": "Service Unavailable",
        "status": 503,
        "detail": "Not now.",
    } == json.loads(bytes(response.body))
    assert ("application/problem+json", "no-store", "1") == (
        response.headers["Content-Type"],
        response.headers["Cache-Control"],
        response.headers["Retry-After"],
    )


async def test_refusals_of_the_framework_look_the_same() -> None:
    """What Starlette refuses by itself is a problem too, with the headers it wants."""
    response = await answer_problem(REQUEST, HTTPException(405, headers={"Allow": "POST"}))

    assert {"type": "about:blank", "title": "Method Not Allowed", "status": 405} == json.loads(
        bytes(response.body)
    )
    assert "POST" == response.headers["Allow"]


async def test_a_bug_tells_nothing() -> None:
    """What should not have happened is a 500 without a word about it; it is no `Problem`."""
    response = await answer_bug(REQUEST, RuntimeError("secret"))

    assert 500 == response.status_code
    assert b"secret" not in bytes(response.body)
    with pytest.raises(RuntimeError):
        await answer_problem(REQUEST, RuntimeError("a bug"))
