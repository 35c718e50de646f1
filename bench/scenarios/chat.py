"""What a message costs whose count is stored before it is answered."""

from collections.abc import Mapping
from typing import Final

from bench import backend
from bench.results import Repetition
from bench.scenario import Scenario
from bench.stage import CHAT, Plan, Stage


def measure(stage: Stage, plan: Plan, connections: tuple[int, ...]) -> Repetition:
    """Do what `echo` does, each connection on a chat session of its own.

    The clients see to it that the answers count without a hole. Redis is asked at the end whether
    what it has is what was answered.
    """
    (count,) = connections
    each = max(1, plan.echoes // count)
    stage.open(count, plan, path=CHAT)
    stage.client.echo(plan.warming(each))
    before = backend.chat_counts(stage.redis_port)
    timed = stage.timed(lambda: stage.client.echo(each))
    wrong = miscounted(before, backend.chat_counts(stage.redis_port), sessions=count, each=each)
    trouble = f"the stored counts of {wrong} sessions are wrong" if wrong else ""
    return stage.repetition(timed, timed.figures(), failures=wrong, trouble=trouble)


def miscounted(
    before: Mapping[bytes, int], after: Mapping[bytes, int], *, sessions: int, each: int
) -> int:
    """Return how many sessions are missing, or have not counted what they were sent.

    Args:
        before: The stored counts before it was sent.
        after: And when all was answered.
        sessions: How many there must be, at least.
        each: Messages that each session was sent.
    """
    wrong = sum(after.get(name, 0) - count != each for name, count in before.items())
    return wrong + max(0, sessions - len(before))


SCENARIO: Final = Scenario(
    name="chat",
    about="CPU per message of a chat session, counted in Redis, and its answer, µs",
    headline="cpu_us",
    goal=2.5,
    against="echo",
    connections=(200, 2_000),
    measure=measure,
)
