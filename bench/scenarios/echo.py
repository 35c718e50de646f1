"""What a client's message costs, with its answer."""

from typing import Final

from bench.results import Repetition
from bench.scenario import Scenario
from bench.stage import Plan, Stage


def measure(stage: Stage, plan: Plan, connections: tuple[int, ...]) -> Repetition:
    """Each connection sends its next message when the last has been answered."""
    (count,) = connections
    each = max(1, plan.echoes // count)
    stage.open(count, plan)
    stage.client.echo(plan.warming(each))
    timed = stage.timed(lambda: stage.client.echo(each))
    return stage.repetition(timed, timed.figures())


SCENARIO: Final = Scenario(
    name="echo",
    about="CPU per message of a client and its answer, µs",
    headline="cpu_us",
    goal=1.15,
    connections=(200, 2_000),
    measure=measure,
)
