"""The scenarios, one file each."""

from collections.abc import Mapping
from typing import Final

from bench.scenario import Scenario
from bench.scenarios import connect, durable, echo, fanout, idle, latency, unicast

SCENARIOS: Final[Mapping[str, Scenario]] = {
    one.name: one
    for one in (
        idle.SCENARIO,
        connect.SCENARIO,
        fanout.SCENARIO,
        unicast.SCENARIO,
        durable.SCENARIO,
        echo.SCENARIO,
        latency.SCENARIO,
    )
}
"""By name, in the order in which they are told."""
