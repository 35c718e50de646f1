"""Coverage-guided fuzzing: ``python -m tests.conformance.fuzz frames|handshake|messages SECONDS``.

Needs atheris (``pip install atheris``), which brings libFuzzer. It starts from the committed
corpus, runs at the lowest priority, and then adds to the corpus what it has found new: the inputs
that reach a path through the product, or a number of repetitions of one, that no committed input
reaches. Exit code 1 means a finding: the input is in the corpus as ``finding-…``, so that the
replay fails until it is repaired.

The fuzzer runs in a process of its own, because libFuzzer ends its process. Which inputs are new is
asked of Python's own tracing and not of libFuzzer, whose features depend on its instrumentation.
"""

import argparse
import collections
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, Final

import trioserver
from tests.conformance.targets import TARGETS, Target

PRODUCT: Final = str(Path(trioserver.__file__).parent)

GRACE_SECONDS: Final = 120
"""For the committed corpus, which is replayed before the time begins to count."""

Feature = tuple[object, int, int, int]
"""Code, line before, line, and how often in powers of two."""


def features(feed: Callable[[bytes], object], data: bytes) -> set[Feature]:
    """Return which ways through the product's lines an input takes, and about how often."""
    counts: collections.Counter[tuple[object, int, int]] = collections.Counter()
    previous: dict[FrameType, int] = {}

    def trace(frame: FrameType, event: str, _: object) -> Any:
        code = frame.f_code
        if event == "call":
            return trace if code.co_filename.startswith(PRODUCT) else None
        if event == "line":
            counts[code, previous.get(frame, 0), frame.f_lineno] += 1
            previous[frame] = frame.f_lineno
        elif event == "return":
            previous.pop(frame, None)
        return trace

    sys.settrace(trace)
    try:
        feed(data)
    finally:
        sys.settrace(None)
    return {(*way, count.bit_length()) for way, count in counts.items()}


def reached(target: Target, data: bytes) -> set[object]:
    """Return everything about an input that could be new."""
    return {*features(target.feed, data), target.outcome(data)}


def novel(target: Target, found: Iterable[bytes]) -> list[bytes]:
    """Return the inputs that add to what the corpus reaches, the short ones first."""
    seen: set[object] = set()
    for _, data in target.corpus():
        seen |= reached(target, data)
    new = []
    for data in sorted(found, key=len):
        news = reached(target, data)
        if not news <= seen:
            seen |= news
            new.append(data)
    return new


def fuzz(target: Target, seconds: int) -> int:
    """Hunt, then add what is worth it to the corpus; return the exit code."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        (directory / "new").mkdir()
        command = [
            sys.executable,
            "-m",
            "tests.conformance.hunt",
            target.name,
            str(seconds),
            scratch,
        ]
        status = subprocess.run(
            command, check=False, timeout=2 * seconds + GRACE_SECONDS
        ).returncode
        found = [path.read_bytes() for path in (directory / "new").iterdir()]
        for data in (new := novel(target, found)):
            (target.directory / f"found-{_digest(data)}").write_bytes(data)
        findings = sorted(directory.glob("finding-*"))
        for path in findings:
            name = f"finding-{_digest(path.read_bytes())}"
            shutil.copy(path, target.directory / name)
            _say(f"FINDING {name}: {path.read_bytes()!r}")
    _say(f"{target.name}: {len(found)} inputs kept by the fuzzer, {len(new)} added to the corpus")
    return 1 if findings or status else 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def main() -> int:
    """Fuzz one target for some time."""
    parser = argparse.ArgumentParser(prog="tests.conformance.fuzz", description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("seconds", type=int)
    arguments = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        _say("atheris is not installed: pip install atheris")
        return 2
    return fuzz(TARGETS[arguments.target], arguments.seconds)


if __name__ == "__main__":
    sys.exit(main())
