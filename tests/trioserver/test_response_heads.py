"""Heads of answers: what they all say, and whose request it was."""

import time

import pytest

from trioserver import response_heads
from trioserver.response_heads import request_id, request_id_in


def test_an_answer_that_is_no_page_may_do_nothing() -> None:
    """No scripts, no frames, no guessing, no keeping, no telling where one came from."""
    assert {
        "Cache-Control": "no-store",
        "Content-Security-Policy": (
            "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
        ),
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    } == response_heads.HEADERS


def test_only_who_speaks_tls_demands_it() -> None:
    """For a year, of this name alone: others may be somebody else's."""
    more = response_heads.TLS_HEADERS.items() - response_heads.HEADERS.items()

    assert {("Strict-Transport-Security", "max-age=31536000")} == more


@pytest.mark.parametrize("given", [b"a", b"!~", b"x" * 128, b"0af7651916cd43dd-8448eb211c80319c"])
def test_a_decent_request_id_is_kept(given: bytes) -> None:
    """Visible ASCII up to 128 characters goes through as it is."""
    assert given.decode() == request_id([given])


@pytest.mark.parametrize(
    "given", [[], [b""], [b"a b"], [b"x" * 129], [b"\xe9"], [b"a\x7f"], [b"a\n"], [b"a", b"a"]]
)
def test_any_other_request_id_is_replaced(given: list[bytes]) -> None:
    """What could not stand in a header and a log line as it is, or is not one, is made anew."""
    made = request_id(given)

    assert 16 == len(made)
    assert made != request_id(given)


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nX-Request-ID: trace-7\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : x\r\nx-request-id:\ttrace-7 \r\nX: \0\r\n\r\n",
        b"GET / HTTP/1.1\nx-request-id:trace-7\n\n",
        b"GET / HTTP/1.1\r\nX-Request-ID: trace-7",
    ],
)
def test_an_id_is_found_in_a_head_that_is_malformed(head: bytes) -> None:
    """Whoever is refused can find the refusal in the log."""
    assert "trace-7" == request_id_in(head)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /?\r\nX-Request-ID: a\r\nX-Request-ID: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nY-X-Request-ID: a\r\n\r\n",
        b"GET /x-request-id:a HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX-Request-ID: \0\r\n\r\n",
        b"",
    ],
)
def test_nothing_else_of_a_head_becomes_an_id(head: bytes) -> None:
    """Two ids, or something that is none, are replaced."""
    assert 16 == len(request_id_in(head))


@pytest.mark.parametrize("blank", [b"\r\n\r\n", b"\n\n", b"\r\n\n"])
def test_what_comes_behind_a_head_is_not_its_own(blank: bytes) -> None:
    """Neither in a body nor in a request that follows; nor does that take away the own one."""
    behind = b"POST /x HTTP/1.1\r\nX-Request-ID: of-the-next\r\n\r\n"

    assert "of-the-next" != request_id_in(b"GET / HTTP/1.1\r\nHost: x" + blank + behind)
    assert "own" == request_id_in(b"GET / HTTP/1.1\r\nX-Request-ID: own" + blank + behind)


SLOW_ONES = (b" ", b" \r", b"\r", b"\t \r", b"x-request-id:", b"\nx-request-id: ", b"\n", b"\n\r")


@pytest.mark.parametrize("filler", SLOW_ONES)
@pytest.mark.parametrize("size", [16 << 10, 64 << 10])
def test_no_head_takes_long(filler: bytes, size: int) -> None:
    """Full of spaces, bare carriage returns or beginnings, it is looked through once."""
    head = b"GET / HTTP/1.1\r\nX-Request-ID:" + filler * (size // len(filler))
    began = time.thread_time()

    for end in (b"", b"x", b"\rX\r\n\r\n"):
        request_id_in(head + end)

    assert time.thread_time() - began < 1.0
