"""The guard: what may pass, byte by byte."""

import contextlib
import time

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trioserver.smuggling_cases import CANARY, CASES
from trioserver.gateway.guard import Guard
from trioserver.handshake import Refusal

HEAD = b"POST /a HTTP/1.1\r\nHost: x\r\n"
GET = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n1F\r\n" + b"x" * 31
CHUNKED += b"\r\n0\r\n\r\n"
COUNTED = HEAD + b"Content-Length: 5\r\n\r\nhello"
NO_BODY = 0


def passed(data: bytes, step: int, guard: Guard | None = None) -> tuple[bytes, int]:
    """Return what passes of data that comes in steps, and the status of the refusal or 0."""
    guard = guard or Guard()
    found = b""
    try:
        for at in range(0, len(data), step):
            guard.receive(data[at : at + step])
            while part := guard.take():
                found += part
        guard.end()
    except Refusal as refusal:
        guard.receive(CANARY)
        assert b"" == guard.take()
        return found, refusal.status
    return found, 0


@pytest.mark.parametrize("step", [1, 7, 1 << 16])
@pytest.mark.parametrize(
    "data",
    [
        GET,
        GET * 3,
        CHUNKED,
        COUNTED,
        CHUNKED + COUNTED + GET + CHUNKED,
        HEAD + b"Content-Length: 0\r\n\r\n" + GET,
        HEAD + b"Expect: 100-continue\r\nContent-Length: 1\r\n\r\nx" + GET,
        HEAD + b"Transfer-Encoding: Chunked\r\n\r\n0\r\n\r\n" + GET,
        HEAD + b"Connection: keep-alive\r\nX: \xe4\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"",
    ],
)
def test_what_has_one_meaning_passes_unchanged(data: bytes, step: int) -> None:
    """However it is cut, and however many requests there are."""
    assert (data, 0) == passed(data, step)


@pytest.mark.parametrize("step", [1, 7, 1 << 16])
@pytest.mark.parametrize("name", CASES)
def test_what_has_two_meanings_never_passes_with_what_follows(name: str, step: int) -> None:
    """Refused with the same status however it is cut; of what follows nothing passes."""
    case = CASES[name]
    found, status = passed(case.data, step)

    assert status in {case.internal, 0 if case.internal == 200 else case.internal}
    assert CANARY not in found or b"Expect" in found


@pytest.mark.parametrize(
    "data", [GET[:-1], COUNTED[:-1], CHUNKED[:-1], CHUNKED[:-20], GET + b"G", HEAD]
)
def test_what_has_no_end_is_refused_at_the_end(data: bytes) -> None:
    """A client that leaves in the middle is told so, should it still listen."""
    assert 400 == passed(data, 1)[1]


@pytest.mark.parametrize(
    "last",
    [
        b"GET /a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET /a HTTP/1.1\r\nHost: x\r\nConnection: x, CLOSE\r\n\r\n",
        b"GET /a HTTP/1.0\r\nHost: x\r\nConnection: keep-alive\r\n\r\n",
        HEAD + b"Connection: close\r\nContent-Length: 2\r\n\r\nhi",
    ],
)
def test_nothing_passes_behind_the_last_request(last: bytes) -> None:
    """What is sent behind it is swallowed, and is no error."""
    assert (last, 0) == passed(last + CANARY, 5)
    assert (last, 0) == passed(last + b"\0garbage", 1 << 16)


def test_an_offer_of_http2_is_taken_out() -> None:
    """What passes asks for an end of the connection instead."""
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUPGRADE: H2C\r\nHttp2-Settings: x\r\n"
    found, status = passed(HEAD + offer + b"Content-Length: 2\r\n\r\nhi" + CANARY, 3)

    assert 0 == status
    assert found == (
        HEAD + b"Connection: Upgrade, HTTP2-Settings\r\nContent-Length: 2\r\n"
        b"Connection: close\r\n\r\nhi"
    )


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /" + b"a" * 9000, 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 8190 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 100 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 99 + b"\r\n", 0),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + (b"X: " + b"y" * 5000 + b"\r\n") * 4 + b"\r\n", 431),
    ],
)
@pytest.mark.parametrize("step", [100, 1 << 16])
def test_limits_of_a_head(head: bytes, status: int, step: int) -> None:
    """8 KiB in a line, 100 lines, 16 KiB together, in pieces and in one piece."""
    assert status == passed(head, step)[1]


def test_a_head_passes_in_one_piece() -> None:
    """Whoever parses it never sees half of one, nor a head together with something else."""
    guard = Guard()
    parts = []
    for at in range(len(COUNTED + GET)):
        guard.receive((COUNTED + GET)[at : at + 1])
        parts += [part for part in [guard.take()] if part]

    assert [COUNTED[:-5], b"h", b"e", b"l", b"l", b"o", GET] == parts


def test_a_refusal_knows_its_request() -> None:
    """The id of the refused request, not of the one before; also if the head is malformed."""
    guard = Guard()
    first = b"GET /a HTTP/1.1\r\nHost: x\r\nX-Request-ID: one\r\n\r\n"
    assert passed(first, 9, guard)[1] == NO_BODY
    assert "one" == guard.request_id
    passed(b"GET /b HTTP/1.1\r\nHost : x\r\nX-Request-ID: two\r\n\r\n", 9, guard)
    assert "two" == guard.request_id


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: foo\r\n%b\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\n%bContent-Length: 5x\r\n\r\n",
        b"CONNECT /a HTTP/1.1\r\nHost: x\r\n%b\r\n",
        b"GET / HTTP/1.1\r\nHost : x\r\n%b\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n%b\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n%b\r\n",
    ],
)
def test_the_id_of_a_request_is_in_its_own_head(head: bytes) -> None:
    """What comes behind that, in the same piece, neither gives it one nor takes it away."""
    behind = b"POST /x HTTP/1.1\r\nHost: x\r\nX-Request-ID: of-the-next\r\n"
    for own in ("mine", ""):
        guard = Guard()
        guard.receive(head % (b"X-Request-ID: %b\r\n" % own.encode() if own else b"") + behind)
        with contextlib.suppress(Refusal):
            guard.take()

        assert guard.request_id == own or (not own and 16 == len(guard.request_id))


@pytest.mark.parametrize("filler", [b" ", b"\r", b" \r", b"\t "])
@pytest.mark.parametrize("step", [1000, 1 << 16])
def test_no_head_takes_long(filler: bytes, step: int) -> None:
    """However full of spaces and bare carriage returns, all that a head may have."""
    fillers = filler * (8000 // len(filler))
    head = b"GET / HTTP/1.1\r\nHost: x\r\nX-Request-ID:" + fillers + b"\rX\r\n"
    began = time.thread_time()

    assert 400 == passed(head + b"X-Request-ID:" + fillers + b"\r\n\r\n", step)[1]

    assert time.thread_time() - began < 1.0


def test_a_blank_line_between_requests_is_overlooked() -> None:
    """One, as old clients send behind a body; no more."""
    for step in (1, 1 << 16):
        assert (COUNTED + GET, 0) == passed(COUNTED + b"\r\n" + GET + b"\r\n", step)
        assert (COUNTED, 400) == passed(COUNTED + b"\r\n\r\n" + GET, step)


FRAGMENTS = (
    *(GET, COUNTED, CHUNKED, CANARY, HEAD, b"\r\n", b"\n", b"\r", b" ", b"\t", b"0", b"5", b"x"),
    *(b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Content-Length: +5\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: x\r\n", b"Expect: 100-continue\r\n"),
    *(b"Connection: close\r\n", b"Upgrade: h2c\r\n", b"5\r\nhello\r\n", b"0\r\n\r\n", b"hello"),
)


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12), st.integers(1, 40))
def test_whoever_parses_what_passes_finds_as_many_requests(parts: list[bytes], step: int) -> None:
    """In whatever the guard lets pass, h11 finds no fault, and not one request more."""
    guard = Guard()
    connection = h11.Connection(h11.SERVER)
    heads = requests = 0
    data = b"".join(parts)
    for at in range(0, len(data), step):
        guard.receive(data[at : at + step])
        while True:
            before = guard.within
            try:
                part = guard.take()
            except Refusal:
                break
            if not part:
                break
            heads += not before
            connection.receive_data(part)
            requests += _requests(connection)

    assert heads == requests


def _requests(connection: h11.Connection) -> int:
    """Return how many requests have come, each answered at its end."""
    found = 0
    while (event := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
        found += isinstance(event, h11.Request)
        if isinstance(event, h11.EndOfMessage):
            connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
            connection.send(h11.EndOfMessage())
            if connection.our_state is h11.DONE:
                connection.start_next_cycle()
    return found
