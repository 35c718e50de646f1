"""What a connection that says nothing costs in memory."""

import time
from typing import Final

from bench import machine
from bench.results import Repetition
from bench.scenario import Scenario
from bench.stage import Plan, Stage


def measure(stage: Stage, plan: Plan, connections: tuple[int, ...]) -> Repetition:
    """Open some, then many more: the slope leaves out what the process has anyway."""
    low, high = connections
    stage.open(low, plan)
    before = _memory_kb(stage, plan)
    timed = stage.timed(lambda: stage.open(high - low, plan))
    after = _memory_kb(stage, plan)
    figures = {
        "pss_kb": (after - before) / max(1, timed.reply.units),
        "pss_total_mb": after / 1024,
    }
    return stage.repetition(timed, figures)


def _memory_kb(stage: Stage, plan: Plan) -> int:
    time.sleep(plan.rest_seconds)
    stage.settle()
    return machine.pss_kb(stage.serving.worker)


SCENARIO: Final = Scenario(
    name="idle",
    about="memory per idle authenticated connection, KB",
    headline="pss_kb",
    goal=1.35,
    connections=(2_000, 10_000),
    slope=True,
    measure=measure,
)
