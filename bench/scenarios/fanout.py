"""What a broadcast costs per connection that gets it."""

from typing import Final

from bench.results import Repetition
from bench.scenario import Scenario
from bench.stage import Plan, Stage


def measure(stage: Stage, plan: Plan, connections: tuple[int, ...]) -> Repetition:
    """Publish the next broadcast when all have got the last."""
    (count,) = connections
    messages = max(1, plan.deliveries // count)
    stage.open(count, plan)
    stage.client.fanout(plan.warming(messages), plan.size)
    timed = stage.timed(lambda: stage.client.fanout(messages, plan.size))
    return stage.repetition(timed, timed.figures())


SCENARIO: Final = Scenario(
    name="fanout",
    about="CPU per delivery of a broadcast, µs",
    headline="cpu_us",
    goal=1.1,
    connections=(2_000, 5_000, 10_000),
    measure=measure,
)
