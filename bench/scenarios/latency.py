"""How long a notification takes while others come at a steady rate."""

import math
from collections.abc import Sequence
from typing import Final

from bench.client import Reply
from bench.results import Repetition
from bench.scenario import Scenario
from bench.stage import Plan, Stage

PERCENTILES: Final = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99, "p99_9_ms": 0.999}


def measure(stage: Stage, plan: Plan, connections: tuple[int, ...]) -> Repetition:
    """Publish at a fixed rate, whatever the server does.

    Each latency runs from the moment when the notification was *due*, so a stall counts for all
    that had to wait for its end, and not only for the one that was under way.
    """
    (count,) = connections
    messages = max(1, int(plan.rate * plan.seconds))
    stage.open(count, plan)
    stage.client.latency(plan.warming(messages), plan.rate, plan.size)
    late: Sequence[int] = ()
    latency: Sequence[int] = ()

    def command() -> Reply:
        nonlocal late, latency
        reply, late, latency = stage.client.latency(messages, plan.rate, plan.size)
        return reply

    timed = stage.timed(command)
    figures = percentiles(latency) | {"publisher_late_p99_ms": percentile(late, 0.99) / 1e6}
    return stage.repetition(timed, figures | timed.figures())


def percentiles(latency: Sequence[int]) -> dict[str, float]:
    """Return what is said of the latencies of an open loop, in ms; -1 is what never came."""
    arrived = sorted(one for one in latency if one >= 0)
    figures = {name: percentile(arrived, share) / 1e6 for name, share in PERCENTILES.items()}
    return {**figures, "max_ms": max(arrived, default=0) / 1e6}


def percentile(values: Sequence[int], share: float) -> int:
    """Return the smallest of ``values`` that at least ``share`` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0


SCENARIO: Final = Scenario(
    name="latency",
    about="from due to received at 2,000 notifications per second, p99, ms",
    headline="p99_ms",
    goal=1.5,
    connections=(1_000,),
    measure=measure,
)
