"""The opening handshake, row by row: exact status, in one segment and byte by byte."""

import base64
import hashlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trioserver.wire import ACCEPT, KEY
from trioserver import handshake, response_heads
from trioserver.handshake import Refusal, Request, Upgrade, head_end, parse, parse_any, upgrade

HOST = b"Host: example.org"
UPGRADE = b"Upgrade: websocket"
CONNECTION = b"Connection: Upgrade"
NONCE = b"Sec-WebSocket-Key: " + KEY
VERSION = b"Sec-WebSocket-Version: 13"
GOOD = (HOST, UPGRADE, CONNECTION, NONCE, VERSION)
WAIT = 0
"""Stands for a head that is not complete."""


def made(*more: bytes, line: bytes = b"GET /ws HTTP/1.1", lines: tuple[bytes, ...] = GOOD) -> bytes:
    """Return a head of these lines."""
    return b"\r\n".join([line, *lines, *more, b"", b""])


def without(*left_out: bytes) -> bytes:
    """Return a good head without some lines."""
    return made(lines=tuple(line for line in GOOD if line not in left_out))


def swapped(old: bytes, new: bytes) -> bytes:
    """Return a good head with one line changed."""
    return made(lines=tuple(new if line == old else line for line in GOOD))


ROWS: dict[str, tuple[bytes, int]] = {
    "good": (made(), 101),
    "any order, any case": (
        made(lines=(*(line.swapcase() for line in GOOD if line != NONCE), NONCE)),
        101,
    ),
    "POST": (made(line=b"POST /ws HTTP/1.1"), 405),
    "HEAD": (made(line=b"HEAD /ws HTTP/1.1"), 405),
    "PoST": (made(line=b"PoST /ws HTTP/1.1"), 400),
    "unknown method": (made(line=b"FOO /ws HTTP/1.1"), 400),
    "lower-case method": (made(line=b"get /ws HTTP/1.1"), 400),
    "HTTP/1.0": (made(line=b"GET /ws HTTP/1.0"), 400),
    "HTTP/1.2": (made(line=b"GET /ws HTTP/1.2"), 400),
    "HTTP/2.0": (made(line=b"GET /ws HTTP/2.0"), 400),
    "HTTP/0.9": (b"GET /ws\r\n\r\n", 400),
    "RTSP/1.1": (made(line=b"GET /ws RTSP/1.1"), 400),
    "ICE/1.1": (made(line=b"GET /ws ICE/1.1"), 400),
    "lower-case version": (made(line=b"GET /ws http/1.1"), 400),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "blank lines only": (b"\r\n\r\n", 400),
    "tab in the request line": (made(line=b"GET\t/ws HTTP/1.1"), 400),
    "no host": (without(HOST), 400),
    "empty host": (swapped(HOST, b"Host:"), 400),
    "two hosts": (made(b"Host: example.org"), 400),
    "two hosts, other case": (made(b"hOST: evil.example"), 400),
    "no upgrade": (without(UPGRADE), 426),
    "no connection": (without(CONNECTION), 426),
    "upgrade to something else": (swapped(UPGRADE, b"Upgrade: h2c"), 426),
    "upgrade to something longer": (swapped(UPGRADE, b"Upgrade: websocketx"), 426),
    "upgrade list": (swapped(UPGRADE, b"Upgrade: h2c , WebSocket"), 101),
    "keep-alive, Upgrade": (swapped(CONNECTION, b"Connection: keep-alive, Upgrade"), 101),
    "connection twice": (made(b"Connection: keep-alive"), 101),
    "connection: close": (swapped(CONNECTION, b"Connection: close"), 426),
    "no key": (without(NONCE), 400),
    "empty key": (swapped(NONCE, b"Sec-WebSocket-Key:"), 400),
    "key of 15": (swapped(NONCE, b"Sec-WebSocket-Key: " + base64.b64encode(b"x" * 15)), 400),
    "key of 17": (swapped(NONCE, b"Sec-WebSocket-Key: " + base64.b64encode(b"x" * 17)), 400),
    "key not base64": (swapped(NONCE, b"Sec-WebSocket-Key: !!!!!!!!!!!!!!!!!!!!!!=="), 400),
    "key not ASCII": (swapped(NONCE, b"Sec-WebSocket-Key: \xff\xff"), 400),
    "key without padding": (swapped(NONCE, NONCE[:-2]), 400),
    "two keys": (made(NONCE), 400),
    "key, space behind": (swapped(NONCE, NONCE + b" "), 101),
    "key, tab behind": (swapped(NONCE, NONCE + b"\t"), 101),
    "version, space behind": (swapped(VERSION, VERSION + b" "), 101),
    "no version": (without(VERSION), 426),
    "version 8": (swapped(VERSION, b"Sec-WebSocket-Version: 8"), 426),
    "version 0": (swapped(VERSION, b"Sec-WebSocket-Version: 0"), 426),
    "version 013": (swapped(VERSION, b"Sec-WebSocket-Version: 013"), 426),
    "version 13, 8": (swapped(VERSION, b"Sec-WebSocket-Version: 13, 8"), 426),
    "two versions": (made(VERSION), 400),
    "sub-protocol": (made(b"Sec-WebSocket-Protocol: chat, trioserver.v1"), 101),
    "sub-protocol garbage": (made(b"Sec-WebSocket-Protocol: a b"), 400),
    "sub-protocol, 7,000 spaces": (
        made(b"Sec-WebSocket-Protocol: b" + b" " * 7000 + b"x"),
        400,
    ),
    "sub-protocol, 32,000 spaces": (
        made(b"Sec-WebSocket-Protocol: b" + b" " * 32_000 + b"x"),
        431,
    ),
    "sub-protocol with quotes": (made(b'Sec-WebSocket-Protocol: "a"'), 400),
    "sub-protocol not ASCII": (made(b"Sec-WebSocket-Protocol: \xe4"), 400),
    "extensions are not wanted": (
        made(b"Sec-WebSocket-Extensions: permessage-deflate; ;;,,x=\xff"),
        101,
    ),
    "body": (made(b"Content-Length: 5") + b"hello", 400),
    "body of nothing": (made(b"Content-Length: 0"), 101),
    "length twice": (made(b"Content-Length: 0", b"Content-Length: 0"), 400),
    "length with a plus": (made(b"Content-Length: +0"), 400),
    "length negative": (made(b"Content-Length: -1"), 400),
    "length huge": (made(b"Content-Length: 99999999999999999999999"), 400),
    "chunked": (made(b"Transfer-Encoding: chunked") + b"0\r\n\r\n", 400),
    "chunked and length": (made(b"Transfer-Encoding: chunked", b"Content-Length: 0"), 400),
    "xchunked": (made(b"Transfer-Encoding: xchunked"), 400),
    "pipelined": (made() + b"\x81\x80\0\0\0\0", 101),
    "pipelined line feeds": (made() + b"\n\n" * 200, 101),
    "pipelined 17 KiB": (made() + b"x" * (17 << 10), 101),
    "bare line feeds": (made().replace(b"\r\n", b"\n"), 400),
    "one bare line feed": (made().replace(b"\r\n", b"\n", 1), 400),
    "line feed before the last CR LF": (made()[:-4] + b"\n\r\n", 400),
    "bare carriage return": (made(b"X: a\rb"), 400),
    "folded line": (made(b"X: a\r\n b"), 400),
    "folded line, tab": (made(b"X: a\r\n\tb"), 400),
    "folded first line": (made(lines=(b" " + HOST, *GOOD[1:])), 400),
    "NUL in a value": (made(b"X: a\0b"), 400),
    "NUL in the path": (made(line=b"GET /ws\0 HTTP/1.1"), 400),
    "escape in a value": (made(b"X: \x1b[31m"), 400),
    "tab in a value": (made(b"X: a\tb"), 101),
    "path not ASCII": (made(line="GET /wä HTTP/1.1".encode()), 400),
    "whitespace before a colon": (made(b"X : y"), 400),
    "whitespace before the host's colon": (swapped(HOST, b"Host : x"), 400),
    "no colon": (made(b"garbage"), 400),
    "no name": (made(b": y"), 400),
    "name not ASCII": (made(b"X\xff: y"), 400),
    "value not ASCII": (made(b"X: \xff\xfe"), 101),
    "absolute target": (made(line=b"GET http://example.org/ws HTTP/1.1"), 400),
    "asterisk": (made(line=b"OPTIONS * HTTP/1.1"), 400),
    "CONNECT": (made(line=b"CONNECT example.org:80 HTTP/1.1"), 400),
    "no slash": (made(line=b"GET ws HTTP/1.1"), 400),
    "path of 8,000": (made(line=b"GET /" + b"a" * 8000 + b" HTTP/1.1"), 101),
    "path of 8 KiB": (made(line=b"GET /" + b"a" * 8192 + b" HTTP/1.1"), 431),
    "path without end": (b"GET /" + b"a" * 8300, 431),
    "value of 9 KiB": (made(b"X: " + b"y" * (9 << 10)), 431),
    "100 headers": (made(*[b"X: y"] * 95), 101),
    "101 headers": (made(*[b"X: y"] * 96), 431),
    "2,000 headers": (made(*[b"X: y"] * 1995), 431),
    "16 KiB": (made(*[b"X: " + b"y" * 4000] * 3), 101),
    "17 KiB": (made(*[b"X: " + b"y" * 4200] * 4), 431),
    "17 KiB of nothing": (b"\r\n" * (17 << 9), 400),
    "incomplete": (made()[:-1], WAIT),
    "nothing": (b"", WAIT),
}


def answer(buffer: bytes) -> int:
    """Return the status that these bytes get, or `WAIT`."""
    try:
        end = head_end(buffer)
        if not end:
            return WAIT
        upgrade(parse(buffer[:end]))
    except Refusal as refusal:
        return refusal.status
    return 101


@pytest.mark.parametrize("row", ROWS)
def test_each_head_has_its_status_in_one_segment(row: str) -> None:
    """Exactly this status, no other."""
    data, status = ROWS[row]
    assert status == answer(data)


@pytest.mark.parametrize("step", [1, 10])
@pytest.mark.parametrize("row", ROWS)
def test_each_head_has_its_status_in_small_segments(row: str, step: int) -> None:
    """The way the bytes are cut changes nothing; a limit may show earlier, never later."""
    data, status = ROWS[row]
    for end in range(step, len(data) + step, step):
        found = answer(data[:end])
        if found != WAIT:
            assert status == found
            return
    assert WAIT == status


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (b"/ws", ("/ws", "")),
        (b"//", ("//", "")),
        (b"/ws%00", ("/ws%00", "")),
        (b"/ws/../ws", ("/ws/../ws", "")),
        (b"/ws?token=a.b-c_d&x=%20", ("/ws", "token=a.b-c_d&x=%20")),
        (b"/?a?b", ("/", "a?b")),
    ],
)
def test_the_path_is_kept_as_it_was_sent(path: bytes, expected: tuple[str, str]) -> None:
    """Nothing is decoded or normalised: /ws%00 is not /ws."""
    request = parse(made(line=b"GET " + path + b" HTTP/1.1"))
    assert expected == (request.path, request.query)


def test_the_answer_is_the_one_of_the_rfc() -> None:
    """The accept key, and a sub-protocol only if ours was offered."""
    plain = upgrade(parse(made())).response()
    assert plain.startswith(b"HTTP/1.1 101 ")
    assert plain.endswith(b"\r\n\r\n")
    assert b"\r\nSec-WebSocket-Accept: " + ACCEPT + b"\r\n" in plain
    assert b"Sec-WebSocket-Protocol" not in plain
    assert b"Sec-WebSocket-Extensions" not in plain
    offered = made(b"Sec-WebSocket-Protocol: x, trioserver.v1", b"Sec-WebSocket-Protocol: y")
    assert b"\r\nSec-WebSocket-Protocol: trioserver.v1\r\n" in upgrade(parse(offered)).response()


@given(st.binary(min_size=16, max_size=16))
def test_any_key_is_answered(nonce: bytes) -> None:
    """Base64 of SHA-1 of the key and the GUID."""
    key = base64.b64encode(nonce)
    digest = hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
    assert base64.b64encode(digest) in Upgrade(key, None, None).response()


@pytest.mark.parametrize(
    ("lines", "token", "subprotocol"),
    [
        ((), None, None),
        ((b"Authorization: Bearer abc",), "abc", None),
        ((b"Authorization: bEaReR   abc",), "abc", None),
        ((b"Authorization: Basic abc",), None, None),
        ((b"Authorization: Bearer",), "", None),
        ((b"Sec-WebSocket-Protocol: bearer.a.b-c_d, trioserver.v1",), "a.b-c_d", "trioserver.v1"),
        ((b"Sec-WebSocket-Protocol: bearer.one, bearer.two",), "one", None),
        ((b"Sec-WebSocket-Protocol: bearer.sub", b"Authorization: Bearer head"), "head", None),
    ],
)
def test_credentials_of_the_handshake(
    lines: tuple[bytes, ...], token: str | None, subprotocol: str | None
) -> None:
    """The header comes before the sub-protocol, and a token is never selected."""
    found = upgrade(parse(made(*lines)))
    assert (token or None, subprotocol) == (found.token or None, found.subprotocol)
    assert b"bearer" not in found.response().lower()


def test_two_authorizations_are_refused() -> None:
    """Which of two would be believed is nothing to guess about."""
    assert 400 == answer(made(b"Authorization: Bearer a", b"Authorization: Bearer b"))


def test_query_parameters() -> None:
    """The last of a repeated one counts, empty ones are kept, and there is a limit."""
    request = Request("GET", "/ws", "a=1&a=2&b=&c=%c3%a4+x&d", {})
    assert {"a": "2", "b": "", "c": "ä x", "d": ""} == request.parameters()
    assert {} == Request("GET", "/ws", "", {}).parameters()
    with pytest.raises(Refusal) as caught:
        Request("GET", "/ws", "&".join(["a=1"] * 17), {}).parameters()
    assert 400 == caught.value.status


def test_a_refusal_is_a_whole_http_answer() -> None:
    """Status, more headers, the problem; and the version that would have been right."""
    with pytest.raises(Refusal) as caught:
        upgrade(parse(without(VERSION)))
    response = caught.value.response()
    assert response.startswith(b"HTTP/1.1 426 ")
    assert b"\r\nSec-WebSocket-Version: 13\r\n" in response
    head, _, body = response.partition(b"\r\n\r\n")
    assert b"Content-Length: %d" % len(body) in head
    assert b"Connection: close" in head
    with pytest.raises(Refusal) as caught:
        upgrade(parse(made(line=b"DELETE /ws HTTP/1.1")))
    assert b"\r\nAllow: GET\r\n" in caught.value.response()


@pytest.mark.parametrize("row", ROWS)
def test_a_refusal_never_echoes_the_request(row: str) -> None:
    """What a client sent does not come back in the answer."""
    data, status = ROWS[row]
    if status in {WAIT, 101}:
        return
    canary = b"C4N4RY"
    spoiled = data.replace(b"X", canary).replace(b"/ws", b"/" + canary)
    with pytest.raises(Refusal) as caught:
        upgrade(parse(spoiled[: head_end(spoiled)]))
    assert canary not in caught.value.response()


@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_a_refusal(data: bytes) -> None:
    """Any bytes are incomplete, refused or accepted."""
    answer(data)
    answer(data + b"\r\n\r\n")


@given(st.integers(0, len(made()) - 5), st.binary(min_size=1, max_size=3))
def test_a_good_head_with_a_blemish_raises_nothing_but_a_refusal(place: int, noise: bytes) -> None:
    """Nearly good heads take the deeper paths."""
    data = made(b"Authorization: Bearer x", b"Sec-WebSocket-Protocol: trioserver.v1")
    answer(data[:place] + noise + data[place + len(noise) :])


def test_random_keys_are_not_all_the_same() -> None:
    """The table's key is not the only one that is understood."""
    key = base64.b64encode(os.urandom(16))
    assert key == upgrade(parse(swapped(NONCE, b"Sec-WebSocket-Key: " + key))).key
    assert handshake.SUBPROTOCOL == "trioserver.v1"


def test_a_refusal_has_the_heads_of_all_answers() -> None:
    """The caller's id or a new one, nothing a browser could run, and TLS where there is TLS."""
    plain = Refusal(403, "no", (("Retry-After", "2"),)).response(request_id="trace-7")
    secure = Refusal(403, "no").response(secure=True)
    for name, value in response_heads.HEADERS.items():
        line = f"\r\n{name}: {value}\r\n".encode()
        assert line in plain
        assert line in secure
    assert b"\r\nX-Request-ID: trace-7\r\n" in plain
    assert b"\r\nRetry-After: 2\r\n" in plain
    assert b"Strict-Transport-Security" not in plain
    assert b"\r\nStrict-Transport-Security: max-age=31536000\r\n" in secure
    assert b"\r\nX-Request-ID: " in secure


def test_any_head_may_have_a_body_or_be_of_old() -> None:
    """Where bodies are taken, HTTP/1.0 is as well, even without a host; all else is refused."""
    old = parse_any(b"GET /healthz HTTP/1.0\r\n\r\n")
    assert ("/healthz", 0) == (old.path, old.minor)
    posted = parse_any(b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n")
    assert ("POST", 1, b"5") == (posted.method, posted.minor, posted.headers[b"content-length"])
    for bad in (
        b"GET /a HTTP/1.1\r\n\r\n",
        b"GET /a HTTP/1.0\r\nHost:\r\n\r\n",
        b"GET /a HTTP/1.2\r\nHost: x\r\n\r\n",
        b"GET http://x/a HTTP/1.1\r\nHost: x\r\n\r\n",
    ):
        with pytest.raises(Refusal) as caught:
            parse_any(bad)
        assert 400 == caught.value.status
