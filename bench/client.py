"""The client process, and what is said to it.

It holds the connections, publishes, reads everything and counts. A process of its own, on a core of
its own, keeps its costs apart from the server's. There are two of it: `client.c`, compiled when it
is needed, and `slow_client.py` for machines without a compiler. Both understand these lines on
standard input, one at a time, and answer each with one line of JSON, a `Reply`:

    ======================= =======================================================================
    open N C G PATH         N more connections to that path, C at a time; wait for their greetings
                            (G is 1), for the topics that their tokens join (2) or for both (3)
    fanout N SIZE [TOPIC]   N broadcasts, or with TOPIC notifications of that topic, each published
                            when all have the one before
    unicast N SIZE W        N notifications, one user after the other, in rounds of W: the next
                            round is published when all of the last have arrived
    durable N SIZE W F      the same through the ledger: each is published by one script, and Redis
                            must say ``accepted``; the file F is the command (`backend.template`)
    echo N                  N messages from each connection, each sent when the one before has been
                            answered
    paced N RATE F          N messages, RATE per second, of one connection after the other, each
                            sent when it is due; the file F as for ``latency``, with answers
    latency N RATE SIZE F   N notifications, RATE per second, each published when it is due; the
                            file F gets two 64-bit integers of each, in ns: how late it was
                            published, and the time from when it was due until it was received (-1
                            if it never was)
    counts                  nothing; what has happened since the last reply
    ======================= =======================================================================

``SIZE`` is the length of what is published, in bytes of JSON; a durable notification has the
payload of an ephemeral one of that size. Every message has a number, which
comes back in what is received, and the client ticks it off: for each connection and message there
is one bit, so a message that comes twice, or after a later one, or not at all while nothing moves
for `PATIENCE_SECONDS`, is counted as what it is. What was never asked for, a refusal, the end of a
connection and a durable notification with a ``seq`` that is not its own count as failed.
Connections answer pings, also between the commands.
"""

import array
import contextlib
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import attrs
import msgspec

from bench import machine

PATIENCE_SECONDS: Final = 10.0
"""How long a client waits for something to move before it gives the rest up as lost."""

ANSWER_SECONDS: Final = 300.0
"""Absolute limit of one command; what stalls ends much sooner."""

COMPILE_SECONDS: Final = 60.0

Kind = Literal["c", "python"]


class BenchError(Exception):
    """The measurement cannot be made; says why in one line."""


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one command. The counts are of all that happened since the last reply."""

    units: int
    """Connections opened, notifications received, or messages answered."""
    wall_ns: int
    cpu_ns: int
    """Of the client."""
    lost: int
    doubled: int
    reordered: int
    failed: int
    greeted: int
    """``connection_established`` received; a server need not send it."""
    joined: int
    """``subscribed`` received."""
    pings: int
    heartbeats: int
    trouble: str
    """The first failure, in words."""


@attrs.frozen(kw_only=True)
class Program:
    """A client that can be started."""

    kind: Kind
    argv: tuple[str, ...]


def program(directory: Path, wanted: Kind | None) -> Program:
    """Return the client to use; compiles it into ``directory`` if there is a compiler.

    Args:
        directory: Where the program may be put.
        wanted: Which one; None for the better one that works here.

    Raises:
        BenchError: It was to be the one in C, and that cannot be compiled.
    """
    slow = Program(kind="python", argv=(sys.executable, "-m", "bench.slow_client"))
    compiler = shutil.which("cc")
    if wanted == "python" or (wanted is None and compiler is None):
        return slow
    if compiler is None:
        raise BenchError("no C compiler (cc) on PATH")
    source, output = Path(__file__).with_name("client.c"), directory / "client"
    compiled = subprocess.run(
        [compiler, "-O2", "-std=gnu11", "-o", str(output), str(source)],
        capture_output=True,
        text=True,
        check=False,
        timeout=COMPILE_SECONDS,
    )
    if compiled.returncode == 0:
        return Program(kind="c", argv=(str(output),))
    if wanted == "c":
        raise BenchError(f"client.c does not compile: {compiled.stderr}")
    return slow


OpenLoop = tuple[Reply, "array.array[int]", "array.array[int]"]
"""What became of an open loop: the reply, and of each message lateness and latency, in ns."""


class Client:
    """A running client. It ends when its block does."""

    def __init__(self, process: subprocess.Popen[bytes], directory: Path) -> None:
        self._process = process
        self._directory = directory
        self._waiting = b""
        self.replies: list[Reply] = []
        """Everything it has ever answered."""

    def open(
        self, count: int, concurrency: int, *, greets: bool, joins: bool = False, path: str = "/ws"
    ) -> Reply:
        """Open so many more connections, so many at a time.

        Args:
            count: How many.
            concurrency: Handshakes in progress at a time.
            greets: Whether to wait for ``connection_established`` of each.
            joins: Whether to wait for a ``subscribed`` of each, which its token asks for.
            path: Where the server expects them.
        """
        return self._ask(f"open {count} {concurrency} {int(greets) + 2 * int(joins)} {path}")

    def fanout(self, messages: int, size: int, topic: str = "") -> Reply:
        """Broadcast, one after the other; or publish to a topic that all have joined."""
        return self._ask(f"fanout {messages} {size} {topic}".rstrip())

    def unicast(self, messages: int, size: int, window: int) -> Reply:
        """Notify one user after the other, in rounds."""
        return self._ask(f"unicast {messages} {size} {window}")

    def durable(self, messages: int, size: int, window: int, template: bytes) -> Reply:
        """Notify one user after the other through the ledger, in rounds.

        Args:
            messages: How many.
            size: Bytes, as for the others.
            window: How many in a round.
            template: From `backend.template`; Redis knows the script already.
        """
        path = self._directory / "template"
        path.write_bytes(template)
        return self._ask(f"durable {messages} {size} {window} {path}")

    def echo(self, each: int) -> Reply:
        """Have every connection say something, so many times."""
        return self._ask(f"echo {each}")

    def paced(self, messages: int, rate: int) -> OpenLoop:
        """Have the connections say something in turns, at a fixed rate; see `latency`."""
        return self._open_loop(f"paced {messages} {rate}")

    def latency(self, messages: int, rate: int, size: int) -> OpenLoop:
        """Notify at a fixed rate; also return lateness and latency of each message, in ns."""
        return self._open_loop(f"latency {messages} {rate} {size}")

    def _open_loop(self, line: str) -> OpenLoop:
        path = self._directory / "times"
        reply = self._ask(f"{line} {path}")
        times = array.array("q", path.read_bytes())
        return reply, times[::2], times[1::2]

    def counts(self) -> Reply:
        """Only ask what has happened since the last reply."""
        return self._ask("counts")

    def _ask(self, line: str) -> Reply:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None  # noqa: S101 - for the type checker
        assert stdout is not None  # noqa: S101 - for the type checker
        deadline = time.monotonic() + ANSWER_SECONDS
        try:
            stdin.write(line.encode() + b"\n")
        except BrokenPipeError:
            raise BenchError(f"the client ended before {line!r}") from None
        answer = b""
        while not answer.endswith(b"\n"):
            ready, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(stdout.fileno(), 65536) if ready else b""
            if not part:
                raise BenchError(f"the client did not answer {line!r}")
            answer += part
        reply = msgspec.json.decode(answer, type=Reply)
        self.replies.append(reply)
        return reply


@contextlib.contextmanager
def running(
    what: Program,
    directory: Path,
    *,
    port: int,
    redis_port: int,
    tokens: Path,
    patience_seconds: float = PATIENCE_SECONDS,
) -> Iterator[Client]:
    """Run a client of the server at ``port`` for the time of the block.

    Args:
        what: Which one.
        directory: For its files.
        port: Of the server, on the loopback.
        redis_port: Where to publish.
        tokens: A file with a token per line, of the users u0, u1 and so on.
        patience_seconds: After so long without progress, the rest is lost.
    """
    process = subprocess.Popen(
        [*what.argv, str(port), str(redis_port), str(tokens), f"{patience_seconds * 1000:.0f}"],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=machine.ROOT,
        preexec_fn=machine.as_child,  # noqa: PLW1509 - system calls only
    )
    with process:
        try:
            yield Client(process, directory)
        finally:
            process.kill()
