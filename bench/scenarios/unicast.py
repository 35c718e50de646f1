"""What a notification to one user costs, through Redis."""

from typing import Final

from bench.results import Repetition
from bench.scenario import Scenario
from bench.stage import Plan, Stage


def measure(stage: Stage, plan: Plan, connections: tuple[int, ...]) -> Repetition:
    """Notify in rounds; the next begins when all of the last have arrived."""
    (count,) = connections
    messages = plan.notifications
    stage.open(count, plan)
    stage.client.unicast(plan.warming(messages), plan.size, plan.window)
    timed = stage.timed(lambda: stage.client.unicast(messages, plan.size, plan.window))
    return stage.repetition(timed, timed.figures())


SCENARIO: Final = Scenario(
    name="unicast",
    about="CPU per notification to one user through Redis, closed loop, µs",
    headline="cpu_us",
    goal=1.15,
    connections=(1_000,),
    measure=measure,
)
