"""A server and a client, ready for a measurement, and the clocks beside them."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import attrs

from bench import client, machine, servers
from bench.client import Client, Program, Reply
from bench.machine import Clock
from bench.results import Counts, Repetition, Shares
from bench.servers import Server, Serving

SETTLE_SECONDS: Final = 0.05
SETTLED_SHARE: Final = 0.04
"""A worker that uses less of its core than this has nothing left to do."""
SETTLE_LIMIT_SECONDS: Final = 10.0

SATURATED: Final = 0.9
"""A process that uses this share of its core holds up the others."""


NOTIFICATIONS: Final = "/ws"
CHAT: Final = "/ws/chat/"
"""Paths of the product. A connection to the second has a chat session of its own."""


@attrs.frozen(kw_only=True)
class Plan:
    """How much of everything. The defaults take about half a minute per repetition and server."""

    deliveries: int = 400_000
    notifications: int = 100_000
    echoes: int = 200_000
    rate: int = 2_000
    """Notifications per second of the open loop."""
    seconds: float = 10.0
    size: int = 200
    """Bytes of what is published, a JSON object."""
    window: int = 50
    """Notifications in a round of the closed loop."""
    concurrency: int = 64
    """Handshakes in progress at a time."""
    rest_seconds: float = 1.0
    """Before memory is read: time for what is freed and flushed a moment later."""
    warm_up: float = 0.05
    """Share of the work that is done once before, unmeasured: interpreter and allocator adapt."""

    def scaled(self, factor: float) -> "Plan":
        """Return the same with so much more or less work; rates and sizes stay."""
        return attrs.evolve(
            self,
            deliveries=_at_least_one(self.deliveries * factor),
            notifications=_at_least_one(self.notifications * factor),
            echoes=_at_least_one(self.echoes * factor),
            seconds=self.seconds * factor,
        )

    def warming(self, units: int) -> int:
        """Return how much of ``units`` to do once before, at least 1."""
        return _at_least_one(units * self.warm_up)


def _at_least_one(value: float) -> int:
    return max(1, int(value))


@attrs.frozen(kw_only=True)
class Timed:
    """One command to the client, and what the processors did meanwhile."""

    reply: Reply
    worker_ns: int
    redis_ns: int
    others_share: float

    def figures(self) -> dict[str, float]:
        """Return the costs per unit, and how many units there were in a second."""
        units = max(1, self.reply.units)
        return {
            "cpu_us": self.worker_ns / 1000 / units,
            "redis_cpu_us": self.redis_ns / 1000 / units,
            "client_cpu_us": self.reply.cpu_ns / 1000 / units,
            "per_second": units * 1e9 / self.reply.wall_ns,
        }


@attrs.frozen(kw_only=True)
class Stage:
    """Where a scenario plays."""

    serving: Serving
    client: Client
    redis_port: int
    core: int
    """The worker's."""
    worker_clock: Clock
    redis_clock: Clock

    def open(
        self, count: int, plan: Plan, *, path: str = NOTIFICATIONS, joins: bool = False
    ) -> Reply:
        """Open connections, unmeasured.

        Args:
            count: How many.
            plan: How many at a time.
            path: Where; a chat session has its own.
            joins: Whether each joins a topic by its token, which is waited for.
        """
        return self.client.open(
            count, plan.concurrency, greets=self.serving.greets, joins=joins, path=path
        )

    @property
    def connected(self) -> int:
        """How many connections have been greeted so far."""
        return sum(reply.greeted for reply in self.client.replies)

    def settle(self) -> None:
        """Return when the worker has done what there was to do."""
        deadline = time.monotonic() + SETTLE_LIMIT_SECONDS
        while time.monotonic() < deadline:
            before, since = self.worker_clock(), time.monotonic_ns()
            time.sleep(SETTLE_SECONDS)
            used = self.worker_clock() - before
            if used < SETTLED_SHARE * (time.monotonic_ns() - since):
                return

    def timed(self, command: Callable[[], Reply]) -> Timed:
        """Measure one command, with all that it leaves behind to be done."""
        self.settle()
        busy, began = machine.core_busy_ns(self.core), time.monotonic_ns()
        worker, redis = self.worker_clock(), self.redis_clock()
        reply = command()
        self.settle()
        worker_ns, redis_ns = self.worker_clock() - worker, self.redis_clock() - redis
        others = machine.core_busy_ns(self.core) - busy - worker_ns
        return Timed(
            reply=reply,
            worker_ns=worker_ns,
            redis_ns=redis_ns,
            others_share=max(0.0, others / (time.monotonic_ns() - began)),
        )

    def repetition(
        self, timed: Timed, figures: dict[str, float], *, failures: int = 0, trouble: str = ""
    ) -> Repetition:
        """Return what was measured, with everything the client has seen since its start.

        Args:
            timed: The measured command.
            figures: What the scenario makes of it.
            failures: What else has failed, which the client cannot know.
            trouble: The same in words; empty if nothing has.
        """
        self.client.counts()
        replies = self.client.replies
        wall = timed.reply.wall_ns
        shares = Shares(
            worker=timed.worker_ns / wall,
            redis=timed.redis_ns / wall,
            client=timed.reply.cpu_ns / wall,
            others=timed.others_share,
        )
        return Repetition(
            figures=figures,
            units=timed.reply.units,
            wall_seconds=wall / 1e9,
            shares=shares,
            bottleneck=bottleneck(shares),
            counts=Counts(
                lost=sum(reply.lost for reply in replies),
                doubled=sum(reply.doubled for reply in replies),
                reordered=sum(reply.reordered for reply in replies),
                failed=sum(reply.failed for reply in replies) + failures,
            ),
            greeted=sum(reply.greeted for reply in replies),
            healthy=self.serving.healthy(),
            trouble=next((reply.trouble for reply in replies if reply.trouble), trouble),
        )


def bottleneck(shares: Shares) -> str:
    """Return who held up the others; they waited for each other if nobody did.

    Figures per unit stay right when the client is the bottleneck, but the server then does its work
    in smaller portions, and a latency is the client's.
    """
    if shares.client >= SATURATED:
        return "client"
    if shares.worker >= SATURATED:
        return "server"
    if shares.client + shares.redis >= SATURATED:
        return "client and Redis"
    return "nobody"


@attrs.frozen(kw_only=True)
class Props:
    """What a stage is set with."""

    program: Program
    tokens: Mapping[tuple[str, ...], Path]
    """Files of tokens, by the topics that these join."""
    server_core: int
    client_core: int


@contextlib.contextmanager
def set_for(server: Server, props: Props, joins: tuple[str, ...] = ()) -> Iterator[Stage]:
    """Set the stage for one measurement: a fresh server, Redis and client.

    Args:
        server: Which one.
        props: What there is.
        joins: Topics that the tokens of the users join.

    Raises:
        BenchError: One of them does not start.
    """
    # The short path matters: there will be Unix sockets in it.
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        machine.living_on(props.client_core),
        servers.redis_serving(Path(name)) as redis,
        server.serving(Path(name), redis.port) as serving,
        client.running(
            props.program,
            Path(name),
            port=serving.port,
            redis_port=redis.port,
            tokens=props.tokens[joins],
        ) as player,
    ):
        machine.move(serving.worker, props.server_core)
        yield Stage(
            serving=serving,
            client=player,
            redis_port=redis.port,
            core=props.server_core,
            worker_clock=machine.cpu_clock(serving.worker),
            redis_clock=machine.cpu_clock(redis.pid),
        )
