"""Smuggling: whatever is between two parsers, the second request is served on neither port."""

import re

import pytest
import trio

from tests.trioserver.gateway_process import LIMIT_SECONDS
from tests.trioserver.serving import serving
from tests.trioserver.smuggling_cases import CASES
from tests.trioserver.wire import running

CONTINUE = 100


def statuses(answers: bytes) -> list[int]:
    """Return the status of each answer; that a body may come is none."""
    found = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)]
    return [status for status in found if status != CONTINUE]


@pytest.mark.parametrize("name", CASES)
async def test_the_internal_port_serves_no_second_request(name: str) -> None:
    """One answer with this status, the end of the connection, and the canary is not called."""
    case = CASES[name]
    async with serving() as served:
        answers = await served.ask(case.data)

    assert [case.internal] == statuses(answers)
    assert "/canary" not in served.paths


@pytest.mark.parametrize("name", CASES)
async def test_the_public_port_serves_no_second_request(name: str) -> None:
    """Likewise, where a connection has one request anyway."""
    case = CASES[name]
    called: list[str] = []

    def canary() -> tuple[int, str, bytes]:
        called.append(name)
        return 200, "text/plain", b""

    async with running() as worker:
        worker.listener.pages["/canary"] = canary
        client = await worker.dial()
        with trio.fail_after(LIMIT_SECONDS):
            await client.send(case.data)
            status, _ = await client.response()
            rest = await client.rest()
        await client.aclose()

    assert case.public == status
    assert [] == statuses(rest)
    assert [] == called
