"""A guarded connection: refusals come in their turn, whole, and alone."""

import re

import pytest
import trio

from tests.trioserver.gateway_process import LIMIT_SECONDS, Answer
from tests.trioserver.serving import serving
from trioserver import response_heads

HEAD = b"POST /a HTTP/1.1\r\nHost: x\r\n"
BAD = b"GET /b HTTP/1.1\r\nHost : x\r\nX-Request-ID: bad-1\r\n\r\n"
CHUNKS = HEAD + b"Transfer-Encoding: chunked\r\nX-Request-ID: bad-2\r\n\r\n"


def split(data: bytes) -> list[Answer]:
    """Return the answers in these bytes."""
    starts = [match.start() for match in re.finditer(rb"HTTP/1\.1 \d{3} ", data)]
    return [
        Answer.parse(data[start:end])
        for start, end in zip(starts, [*starts[1:], len(data)], strict=True)
    ]


async def test_what_came_before_is_answered_before() -> None:
    """A bad request behind good ones gets its 400 after their answers, which are whole."""
    async with serving() as served:
        good = HEAD + b"Content-Length: 5\r\n\r\nhello"
        answers = split(await served.ask(good * 3 + BAD + good))

    assert [200, 200, 200, 400] == [answer.status for answer in answers]
    assert [b"hello"] * 3 == [answer.body for answer in answers[:3]]
    assert ["/a"] * 3 == served.paths
    assert [400] == served.refused


@pytest.mark.parametrize("data", [BAD, CHUNKS + b"5\r\nhelloX", CHUNKS + b"5;\r\n"])
async def test_a_refusal_is_an_answer_like_any_other(data: bytes) -> None:
    """A problem with the heads of all answers and the caller's id; then the connection ends."""
    async with serving() as served:
        (answer,) = split(await served.ask(data))

    assert (400, "close") == (answer.status, answer.headers["Connection"])
    assert "application/problem+json" == answer.headers["Content-Type"]
    assert answer.headers["X-Request-ID"].startswith("bad-")
    for name, value in response_heads.HEADERS.items():
        assert [value] == answer.headers.get_all(name)


async def test_a_bad_body_behind_its_answer_only_ends_the_connection() -> None:
    """Who was answered already gets nothing more, least of all a second answer."""
    async with serving() as served, await served.dial() as stream:
        await stream.send_all(b"GET" + CHUNKS[4:])
        with trio.fail_after(LIMIT_SECONDS):
            data = await stream.receive_some()
            await stream.send_all(b"nonsense\r\n" + BAD)
            async for part in stream:
                data += part

    assert [200] == [answer.status for answer in split(data)]
    assert ["/a"] == served.paths


async def test_a_client_that_sends_on_gets_the_refusal() -> None:
    """What comes behind the refused request is read, so that no reset destroys the answer."""
    async with serving() as served:
        answers = split(await served.ask(BAD + b"x" * 200_000))

    assert [400] == [answer.status for answer in answers]


async def test_a_body_may_be_asked_for() -> None:
    """Who waits for 100 Continue gets it before the answer, bad chunks or not."""
    expect = b"Expect: 100-continue\r\n"
    async with serving() as served:
        for head, body, status in (
            (HEAD + b"Connection: close\r\nContent-Length: 5\r\n", b"hello", b"200"),
            (HEAD + b"Transfer-Encoding: chunked\r\n", b"5\nhello", b"400"),
        ):
            async with await served.dial() as stream:
                await stream.send_all(head + expect + b"\r\n")
                with trio.fail_after(LIMIT_SECONDS):
                    interim = await stream.receive_some()
                    assert interim.startswith(b"HTTP/1.1 100 ")
                    await stream.send_all(body)
                    answer = b""
                    async for part in stream:
                        answer += part
                assert answer.startswith(b"HTTP/1.1 " + status)


async def test_half_a_request_is_refused_at_its_end() -> None:
    """A client that stops in the middle and still listens is told so."""
    async with serving() as served:
        for data in (BAD[:10], HEAD + b"Content-Length: 5\r\n\r\nhi"):
            async with await served.dial() as stream:
                await stream.send_all(data)
                await stream.send_eof()
                with trio.fail_after(LIMIT_SECONDS):
                    assert (await stream.receive_some()).startswith(b"HTTP/1.1 400 ")
