"""The committed corpus again, and hostile inputs that are too large to commit."""

import contextlib
import time
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

from tests.conformance.targets import TARGETS, Target
from tests.trioserver.test_handshake import made
from tests.trioserver.wire import BINARY, PING, TEXT, frame

INPUT_SECONDS = 0.05
"""CPU one input may cost, however hostile."""

SLACK_BYTES = 256 << 10
FACTOR = 16
"""Memory one input may cost at any time: some, and some per byte."""


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Add the name of an input to whatever it raises."""
    try:
        yield
    except Exception as error:
        error.add_note(f"input: {name}")
        raise


def cpu_seconds(target: Target, data: bytes) -> float:
    """Return what an input costs this thread; the best of three, should it be much."""
    best = INPUT_SECONDS
    for _ in range(3):
        began = time.thread_time()
        target.feed(data)
        best = min(best, time.thread_time() - began)
        if best < INPUT_SECONDS:
            break
    return best


def peak_bytes(target: Target, data: bytes) -> int:
    """Return the memory that is held at most while an input is processed."""
    tracemalloc.start()
    try:
        target.feed(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


everything = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


@everything
def test_every_input_keeps_the_rules(target: Target) -> None:
    """Nothing but declared errors, whatever the cuts; wsproto and the RFC agree."""
    for name, data in target.corpus():
        with naming(name):
            target.check(data)


@everything
def test_no_input_is_slow(target: Target) -> None:
    """None costs more than 50 ms."""
    for name, data in target.corpus():
        assert cpu_seconds(target, data) < INPUT_SECONDS, name


@everything
def test_no_input_eats_memory(target: Target) -> None:
    """What is held at any time is bounded by the size of the input."""
    for name, data in target.corpus():
        assert peak_bytes(target, data) < SLACK_BYTES + FACTOR * len(data), name


@everything
def test_the_corpus_is_there(target: Target) -> None:
    """It has seeds and what the fuzzer has found; no finding is open, nothing is double."""
    names, inputs = zip(*target.corpus(), strict=True)
    assert [name for name in names if name.startswith("finding-")] == []
    assert {name.partition("-")[0] for name in names} == {"seed", "found"}
    assert len(inputs) == len(set(inputs))
    assert len(inputs) > 100


MANY = 1_000_000


def first() -> bytes:
    """Return the beginning of a message in fragments."""
    return frame(TEXT, b"", fin=False)


LARGE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a million empty fragments": ("frames", lambda: first() + frame(0, b"", fin=False) * MANY),
    "a million fragments of a byte": ("frames", lambda: first() + frame(0, b"x", fin=False) * MANY),
    "the same with pings between": (
        "frames",
        lambda: first() + (frame(0, b"", fin=False) + frame(PING, b"x" * 125)) * (MANY // 20),
    ),
    "4 MiB in one frame": ("frames", lambda: frame(BINARY, bytes(1 << 20)) * 4),
    "a megabyte of a header line": ("handshake", lambda: made(b"X: " + b"y" * (1 << 20))),
    "a megabyte of header lines": ("handshake", lambda: made(*[b"X: y"] * (1 << 17))),
    "a megabyte of blank lines": ("handshake", lambda: b"\r\n" * (1 << 19)),
    "a megabyte without an end": ("handshake", lambda: b"GET /" + b"a" * (1 << 20)),
    "200,000 levels": ("messages", lambda: b"[" * 200_000 + b"]" * 200_000),
    "200,000 levels in a payload": (
        "messages",
        lambda: b'{"type":"message","payload":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    ),
    "200,000 levels of objects": ("messages", lambda: b'{"payload":' * 200_000),
    "100,000 keys": (
        "messages",
        lambda: b"{" + b",".join(b'"k%d":%d' % (i, i) for i in range(100_000)) + b"}",
    ),
    "a million digits": ("messages", lambda: b'{"type":' + b"9" * MANY + b"}"),
}


@pytest.mark.parametrize("what", LARGE)
def test_large_hostile_inputs_cost_little(what: str) -> None:
    """The rules hold where there is no limit in front, and time and memory stay bounded."""
    name, make = LARGE[what]
    target, data = TARGETS[name], make()
    assert cpu_seconds(target, data) < INPUT_SECONDS
    assert peak_bytes(target, data) < SLACK_BYTES + FACTOR * len(data)
