"""What a notification to one user costs that is kept until it has arrived."""

import time
from typing import Final

from bench import backend
from bench.client import Reply
from bench.results import Repetition
from bench.scenario import Scenario
from bench.stage import Plan, Stage

RECEIPTS_SECONDS: Final = 10.0
"""After which a receipt is missing. The server asks a client for one at most once per second."""
POLL_SECONDS: Final = 0.1


def measure(stage: Stage, plan: Plan, connections: tuple[int, ...]) -> Repetition:
    """Notify in rounds, as `unicast` does, through the ledger.

    It is over when the ledger knows that everything was received: the server asks by ping, the
    clients answer, and what all that costs the worker is in the figures.
    """
    (count,) = connections
    messages = plan.notifications
    template = backend.template()
    backend.make_known(stage.redis_port)
    stage.open(count, plan)
    users = stage.connected
    stage.client.durable(plan.warming(messages), plan.size, plan.window, template)
    _wait_for_receipts(stage, users)
    first, missing, waited = len(stage.client.replies), 0, 0.0

    def command() -> Reply:
        nonlocal missing, waited
        reply = stage.client.durable(messages, plan.size, plan.window, template)
        missing, waited = _wait_for_receipts(stage, users)
        return reply

    timed = stage.timed(command)
    stage.client.counts()
    pings = sum(reply.pings for reply in stage.client.replies[first:])
    figures = timed.figures() | {
        "receipts_ms": waited * 1000,
        "pings_each": pings / max(1, timed.reply.units),
    }
    trouble = f"receipts of {missing} users are missing" if missing else ""
    return stage.repetition(timed, figures, failures=missing, trouble=trouble)


def _wait_for_receipts(stage: Stage, users: int) -> tuple[int, float]:
    """Return whose newest notification is not known to be received, and how long that took, in s.

    Returns when there is nobody left, or at the latest after `RECEIPTS_SECONDS`.
    """
    began = time.monotonic()
    while True:
        missing, waited = backend.unconfirmed(stage.redis_port, users), time.monotonic() - began
        if not missing or waited > RECEIPTS_SECONDS:
            return missing, waited
        time.sleep(POLL_SECONDS)


SCENARIO: Final = Scenario(
    name="durable",
    about="CPU per durable notification to one user, with its receipt, closed loop, µs",
    headline="cpu_us",
    goal=2.0,
    against="unicast",
    connections=(1_000,),
    measure=measure,
)
