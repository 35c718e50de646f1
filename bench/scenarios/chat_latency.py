"""How long the answer of a chat session takes while it has half of what it can do."""

import math
from collections.abc import Sequence
from typing import Final

from bench import backend
from bench.client import Reply
from bench.results import Repetition
from bench.scenario import Scenario
from bench.scenarios.chat import miscounted
from bench.scenarios.latency import percentile, percentiles
from bench.stage import CHAT, Plan, Stage

SHARE: Final = 0.5
"""Of the rate that a closed loop has reached a moment before, on the same connections."""


def measure(stage: Stage, plan: Plan, connections: tuple[int, ...]) -> Repetition:
    """Find out how many messages per second are answered, then send half as many.

    Connections speak in turns, whether or not their last message was answered. Each latency runs
    from the moment when the message was *due*.
    """
    (count,) = connections
    stage.open(count, plan, path=CHAT)
    saturation = _saturation(stage, plan, count)
    rate = max(1, int(saturation * SHARE))
    # As many from each, so that Redis can be asked whether it has counted them all.
    each = math.ceil(rate * plan.seconds / stage.connected)
    messages = each * stage.connected
    before = backend.chat_counts(stage.redis_port)
    late: Sequence[int] = ()
    latency: Sequence[int] = ()

    def command() -> Reply:
        nonlocal late, latency
        reply, late, latency = stage.client.paced(messages, rate)
        return reply

    timed = stage.timed(command)
    wrong = miscounted(before, backend.chat_counts(stage.redis_port), sessions=count, each=each)
    figures = percentiles(latency) | {
        "client_late_p99_ms": percentile(late, 0.99) / 1e6,
        "saturation_per_second": saturation,
    }
    trouble = f"the stored counts of {wrong} sessions are wrong" if wrong else ""
    return stage.repetition(timed, figures | timed.figures(), failures=wrong, trouble=trouble)


def _saturation(stage: Stage, plan: Plan, count: int) -> float:
    """Return how many messages per second a closed loop gets answered."""
    each = max(1, plan.echoes // 2 // count)
    stage.client.echo(plan.warming(each))
    stage.settle()
    reply = stage.client.echo(each)
    return reply.units * 1e9 / reply.wall_ns


SCENARIO: Final = Scenario(
    name="chat-latency",
    about="from due to answered on chat sessions, at half of the saturation rate, p99, ms",
    headline="p99_ms",
    goal=15,
    absolute=True,
    connections=(200, 2_000),
    measure=measure,
)
