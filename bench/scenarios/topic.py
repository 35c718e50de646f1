"""What a notification of a topic costs per connection that is subscribed to it."""

from typing import Final

from bench.results import Repetition
from bench.scenario import Scenario
from bench.stage import Plan, Stage

TOPIC: Final = "bench:news"


def measure(stage: Stage, plan: Plan, connections: tuple[int, ...]) -> Repetition:
    """Publish the next when all have got the last, as `fanout` does; tokens join the topic."""
    (count,) = connections
    messages = max(1, plan.deliveries // count)
    stage.open(count, plan, joins=True)
    stage.client.fanout(plan.warming(messages), plan.size, TOPIC)
    timed = stage.timed(lambda: stage.client.fanout(messages, plan.size, TOPIC))
    return stage.repetition(timed, timed.figures())


SCENARIO: Final = Scenario(
    name="topic",
    about="CPU per delivery of a notification of one topic, µs",
    headline="cpu_us",
    goal=1.1,
    against="fanout",
    joins=(TOPIC,),
    connections=(2_000, 5_000, 10_000),
    measure=measure,
)
