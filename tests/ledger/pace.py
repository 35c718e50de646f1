"""Publishes at a pace, in a process of its own, in bouts.

    python -m tests.ledger.pace redis://127.0.0.1:6379/0 1000 ann bob ...

Each line on its standard input begins a bout or, if one is under way, ends it; then it prints what
was accepted in it, ``{"seconds": …, "accepted": {user: [[seq, id], …]}}``. Each round goes to all
users in one round trip.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

import attrs

from trioserver.ledger import Accepted
from trioserver.publisher import Publisher


@attrs.frozen
class Bout:
    """What was published."""

    seconds: float
    accepted: Mapping[str, Sequence[tuple[int, str]]]
    """Seqs and ids, by user, in the order of publishing."""

    @property
    def count(self) -> int:
        """How many notifications."""
        return sum(len(ids) for ids in self.accepted.values())


class Pace:
    """The process, seen by its parent. Everything blocks."""

    def __init__(self, say: IO[str], hear: IO[str]) -> None:
        self._say = say
        self._hear = hear

    def go(self) -> None:
        """Begin a bout."""
        self._turn()

    def stop(self) -> Bout:
        """End the bout; every answer has come."""
        self._turn()
        told = json.loads(self._hear.readline())
        accepted = {
            user: [(seq, name) for seq, name in ids] for user, ids in told["accepted"].items()
        }
        return Bout(told["seconds"], accepted)

    def _turn(self) -> None:
        self._say.write("\n")
        self._say.flush()


@contextlib.contextmanager
def pace(url: str, rate: float, users: Sequence[str]) -> Iterator[Pace]:
    """Have a process that publishes so many notifications per second."""
    command = [sys.executable, "-m", "tests.ledger.pace", url, str(rate), *users]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            yield Pace(process.stdin, process.stdout)
        finally:
            process.kill()


def main(url: str, rate: str, *users: str) -> None:
    """Publish in bouts until standard input ends."""
    with Publisher(url) as publisher:
        # Unbuffered: what has been read ahead would be invisible to select.
        while os.read(sys.stdin.fileno(), 1):
            began = time.monotonic()
            accepted = _bout(publisher, len(users) / float(rate), users)
            seconds = time.monotonic() - began
            print(json.dumps({"seconds": seconds, "accepted": accepted}), flush=True)  # noqa: T201


def _bout(
    publisher: Publisher, interval: float, users: Sequence[str]
) -> Mapping[str, Sequence[tuple[int, str]]]:
    accepted: dict[str, list[tuple[int, str]]] = {user: [] for user in users}
    due = time.monotonic()
    while not select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))[0]:
        # Rounds that were missed are not made up for.
        due = max(due + interval, time.monotonic() - interval)
        results = publisher.publish({"n": 0}, users=users, priority=True)
        for user, result in zip(users, results, strict=True):
            assert isinstance(result, Accepted), result
            accepted[user].append((result.seq, result.id))
    os.read(sys.stdin.fileno(), 1)
    return accepted


if __name__ == "__main__":
    main(*sys.argv[1:])
