"""What a handshake costs, with a token to be verified."""

from typing import Final

from bench.results import Repetition
from bench.scenario import Scenario
from bench.stage import Plan, Stage


def measure(stage: Stage, plan: Plan, connections: tuple[int, ...]) -> Repetition:
    """Open connections in a closed loop; all stay open, so that closing is not in it."""
    (count,) = connections
    warming = plan.warming(count)
    stage.open(warming, plan)
    timed = stage.timed(lambda: stage.open(count - warming, plan))
    return stage.repetition(timed, timed.figures())


SCENARIO: Final = Scenario(
    name="connect",
    about="CPU per handshake with JWT, µs",
    headline="cpu_us",
    goal=1.6,
    connections=(6_000,),
    measure=measure,
)
