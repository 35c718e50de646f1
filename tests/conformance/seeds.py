"""Writes the seeds of the corpus: ``python -m tests.conformance.seeds``. For when a table grows.

Frames: one input per thing that Autobahn|Testsuite tries in its sections 1 to 7, made anew, and
hostile ones. Handshakes: the rows of `tests.trioserver.test_handshake`, and offers of compression.
Messages: hostile JSON.
Names say what an input is; what the fuzzer has found besides is named by its hash.
"""

import json
import re
import zlib
from typing import Final

from tests.conformance.streams import CLOSE_CODES, GARBLED, HEADERS
from tests.conformance.targets import TARGETS
from tests.trioserver.test_handshake import ROWS, made
from tests.trioserver.wire import BINARY, CLOSE, PING, PONG, TEXT, close, frame
from trioserver.deflate import deflate

GREETING: Final = "Hello-µ@ßöäüàá-UTF-8!! κόσμε 𐀀􏿿".encode()
LAST_OF_LENGTH: Final = ("\x7f", "\u07ff", "\uffff", "\U0010ffff", "\ud7ff", "\ue000", "\ufffd")
FIELDS: Final = (
    *(("auth", "token"), ("message", "payload"), ("message", "ref"), ("ping", "type")),
    ("notification", "payload"),
)
VALUES: Final = (
    *("null", "true", "0", "-0", "1.5", "1e999", "-1e-999", "NaN", "Infinity", "9" * 400),
    *('""', '"x"', '"\\u0000"', '"\\ud800"', '"\\ud83d\\ude00"', '"\\x"', '"' + "y" * 65 + '"'),
    *("[]", "{}", "[1,[2]]", '{"a":{"b":[]}}', '{"type":"auth"}'),
)


def pieces(opcode: int, *parts: bytes, between: bytes = b"") -> bytes:
    """Return a message in fragments."""
    last = len(parts) - 1
    return b"".join(
        (between if number else b"") + frame(0 if number else opcode, part, fin=number == last)
        for number, part in enumerate(parts)
    )


def frame_seeds() -> dict[str, bytes]:
    """Return streams of frames."""
    seeds = {"nothing": b""}
    for size in (0, 1, 100, 101, 125, 126, 127, 128, 255, 256, 1000):
        seeds[f"text-{size}"] = frame(TEXT, b"*" * size)
        seeds[f"binary-{size}"] = frame(BINARY, b"\xfe" * size)
    seeds["text-16384"] = frame(TEXT, b"*" * (16 << 10))
    seeds["text-16385-announced"] = frame(TEXT, b"*" * ((16 << 10) + 1))[:40]
    seeds["text-65536-announced"] = frame(TEXT, b"*" * (1 << 16))[:40]
    for size in (0, 1, 125, 126):
        seeds[f"ping-{size}"] = frame(PING, b"\xff" * size)
        seeds[f"pong-{size}"] = frame(PONG, b"\xff" * size)
    seeds["pings-10"] = b"".join(frame(PING, b"payload-%d" % number) for number in range(10))
    for rsv in range(1, 8):
        seeds[f"rsv-{rsv}"] = frame(TEXT, b"ok") + frame(TEXT, GREETING, rsv=rsv) + frame(PING)
        seeds[f"rsv-{rsv}-control"] = frame(PING, b"x", rsv=rsv)
    for opcode in range(16):
        seeds[f"opcode-{opcode}"] = frame(TEXT, b"ok") + frame(opcode, b"x") + frame(PING)
        seeds[f"opcode-{opcode}-not-final"] = frame(opcode, fin=False) + frame(0, b"x")
    seeds |= fragment_seeds() | text_seeds() | close_seeds() | deflate_seeds()
    for number, header in enumerate(HEADERS):
        seeds[f"header-{number:02}"] = header
        seeds[f"header-{number:02}-after-fragment"] = frame(TEXT, b"x", fin=False) + header
    return seeds


def fragment_seeds() -> dict[str, bytes]:
    """Return messages in fragments, right and wrong."""
    ping = frame(PING, b"ping")
    return {
        "fragments": pieces(TEXT, b"fragment1", b"fragment2"),
        "fragments-ping-between": pieces(TEXT, b"fragment1", b"fragment2", between=ping),
        "fragments-of-nothing": pieces(BINARY, b"", b"", b""),
        "fragments-one-byte": pieces(TEXT, *(bytes((byte,)) for byte in GREETING), between=ping),
        "fragments-8": pieces(TEXT, *[b"x"] * 8),
        "fragments-9": pieces(TEXT, *[b"x"] * 9),
        "fragments-128": pieces(TEXT, *[b""] * 128),
        "fragments-129": pieces(TEXT, *[b""] * 129),
        "fragments-129-pings": pieces(BINARY, *[b"x"] * 129, between=frame(PING)),
        "fragments-just-under-the-limit": pieces(TEXT, b"x" * 50, b"x" * 49, b"")[:-6],
        "fragments-over-the-limit": pieces(TEXT, b"x" * 50, b"x" * 51),
        "text-within-fragments": frame(TEXT, b"a", fin=False) + frame(TEXT, b"b"),
        "continuation-of-nothing": frame(0, b"non-continuation") + frame(TEXT, b"x"),
        "continuation-after-the-end": pieces(TEXT, b"a", b"b") + frame(0, b"c", fin=False),
        "two-messages": pieces(TEXT, b"a", b"b") + pieces(BINARY, b"c", b"d") + ping,
        "two-messages-of-60": pieces(TEXT, b"x" * 30, b"x" * 30) * 2 + frame(TEXT, b"x" * 60),
        "two-messages-in-6": pieces(TEXT, *[b""] * 6) * 2,
        "ping-in-fragments": pieces(PING, b"a", b"b"),
    }


def text_seeds() -> dict[str, bytes]:
    """Return texts at the borders of UTF-8, whole and cut within a character."""
    seeds = {"greeting": frame(TEXT, GREETING)}
    good = [character.encode() for character in LAST_OF_LENGTH]
    for number, text in enumerate([*good, *GARBLED]):
        seeds[f"utf8-{number:02}"] = frame(TEXT, text)
        seeds[f"utf8-{number:02}-bytewise"] = pieces(TEXT, *(bytes((byte,)) for byte in text))
        seeds[f"utf8-{number:02}-never-finished"] = pieces(TEXT, b"ok", text, b"z")[:-7]
    return seeds


def close_seeds() -> dict[str, bytes]:
    """Return ends, with something behind them."""
    behind = frame(TEXT, b"behind")
    seeds = {f"close-{code}": close(code) for code in CLOSE_CODES}
    for number, garbled in enumerate(GARBLED):
        seeds[f"close-garbled-{number:02}"] = close(1000, garbled)
    return seeds | {
        "close-empty": frame(CLOSE) + behind,
        "close-one-byte": frame(CLOSE, b"\x03") + behind,
        "close-reason-123": close(1000, b"*" * 123) + behind,
        "close-reason-124": close(1000, b"*" * 124),
        "close-twice": close(1000) + close(1001),
        "close-within-fragments": frame(TEXT, b"a", fin=False) + close(1000) + frame(0, b"b"),
        "close-not-final": frame(CLOSE, b"\x03\xe8", fin=False),
    }


def deflate_seeds() -> dict[str, bytes]:
    """Return compressed messages, right, broken and out of proportion."""
    packed, bomb = deflate(GREETING), deflate(bytes(1 << 20))
    garbled = deflate(b"\xed\xa0\x80")
    final = zlib.compressobj(9, zlib.DEFLATED, -15)
    ended = final.compress(GREETING) + final.flush()
    split = frame(TEXT, packed[:9], fin=False, rsv=4)
    return {
        "deflated": frame(TEXT, packed, rsv=4) * 2 + frame(TEXT, GREETING),
        "deflated-binary": frame(BINARY, deflate(b"\xff" * 90), rsv=4),
        "deflated-fragments": split + frame(PING) + frame(0, packed[9:]),
        "deflated-fragment-marked-too": split + frame(0, packed[9:], rsv=4),
        "deflated-control": frame(PING, packed, rsv=4),
        "deflated-nothing": frame(TEXT, b"", rsv=4) + frame(TEXT, b"\0", rsv=4),
        "deflated-final-block": frame(TEXT, ended + b"\0", rsv=4),
        "deflated-final-block-and-more": frame(TEXT, ended + packed, rsv=4),
        "deflated-unfinished": frame(TEXT, packed[:20], rsv=4),
        "deflated-not": frame(TEXT, GREETING, rsv=4),
        "deflated-garbled-text": frame(TEXT, garbled, rsv=4),
        "deflated-garbled-text-in-fragments": frame(TEXT, garbled[:2], fin=False, rsv=4)
        + frame(0, garbled[2:]),
        "deflated-100": frame(TEXT, deflate(b"*" * 100), rsv=4),
        "deflated-101": frame(TEXT, deflate(b"*" * 101), rsv=4),
        "deflated-16384": frame(TEXT, deflate(b"*" * (16 << 10)), rsv=4),
        "deflated-16385": frame(TEXT, deflate(b"*" * ((16 << 10) + 1)), rsv=4),
        "deflated-bomb": frame(TEXT, bomb, rsv=4),
        "deflated-bomb-in-fragments": b"".join(
            frame(0 if i else TEXT, bomb[i : i + 99], fin=False, rsv=0 if i else 4)
            for i in range(0, len(bomb), 99)
        )
        + frame(0),
    }


OFFERS: Final = (
    *(b"", b"; server_no_context_takeover", b"; client_no_context_takeover", b"; unknown"),
    *(b"; client_max_window_bits", b"; client_max_window_bits=9", b'; client_max_window_bits="9"'),
    *(b"; client_max_window_bits=16", b"; client_max_window_bits=09", b"; client_max_window_bits="),
    *(b"; server_max_window_bits=15", b"; server_max_window_bits=9", b"; server_max_window_bits"),
    *(b"; server_no_context_takeover=1", b"; server_no_context_takeover" * 2, b";", b";;", b"; =1"),
    *(b"; server_max_window_bits=9, permessage-deflate", b'; x="a, permessage-deflate, b"'),
)


def handshake_seeds() -> dict[str, bytes]:
    """Return request heads: the rows of the table, and offers of compression."""
    seeds = {name: data for name, (data, _) in ROWS.items()}
    for number, offer in enumerate(OFFERS):
        line = b"Sec-WebSocket-Extensions: permessage-deflate" + offer
        seeds[f"offer-{number:02}"] = made(line)
    return seeds


def message_seeds() -> dict[str, bytes]:
    """Return what clients and publishers might say."""
    seeds = {"nothing": b"", "greeting": GREETING, "nul": b"\0", "not-utf8": b'{"type":"\xff"}'}
    for kind in ("auth", "message", "ping", "notification", "goodbye", ""):
        seeds[f"type-{kind or 'empty'}"] = f'{{"type":"{kind}"}}'.encode()
    for number, value in enumerate(VALUES):
        seeds[f"bare-{number:02}"] = value.encode()
        for kind, field in FIELDS:
            seeds[f"{kind}-{field}-{number:02}"] = f'{{"type":"{kind}","{field}":{value}}}'.encode()
    return seeds | {
        "nested-900": b'{"type":"message","payload":' + b"[" * 900 + b"]" * 900 + b"}",
        "nested-5000": b"[" * 5000,
        "nested-objects": b'{"type":"message","payload":' + b'{"a":' * 2000,
        "nested-unknown-field": b'{"type":"ping","x":' + b"[" * 2000 + b"]" * 2000 + b"}",
        "digits-10000": b'{"type":"message","payload":' + b"9" * 10_000 + b"}",
        "digits-10000-in-type": b'{"type":' + b"9" * 10_000 + b"}",
        "keys-1000": json.dumps({"type": "ping"} | {f"k{i}": i for i in range(1000)}).encode(),
        "keys-repeated": b'{"type":"ping","type":"auth","token":"a","token":"b"}',
        "spaces": b' \t\r\n{ "type" : "ping" } \n',
        "garbage-behind": b'{"type":"ping"}{"type":"ping"}',
        "byte-order-mark": b'\xef\xbb\xbf{"type":"ping"}',
        "type-65": b'{"type":"' + b"t" * 65 + b'","payload":1}',
        "unfinished": b'{"type":"message","payload":{"a":',
        "garbled-payload": b'{"payload":"\xed\xa0\x80"}',
        "control-character": b'{"payload":"\x01"}',
    }


def main() -> None:
    """Write them all."""
    tables = {
        "frames": frame_seeds(),
        "handshake": handshake_seeds(),
        "messages": message_seeds(),
    }
    for target, seeds in tables.items():
        directory = TARGETS[target].directory
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.glob("seed-*"):
            path.unlink()
        written = {path.read_bytes() for path in directory.iterdir()}
        for name, data in seeds.items():
            if data not in written:
                words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
                (directory / f"seed-{words}").write_bytes(data)
                written.add(data)


if __name__ == "__main__":
    main()
