"""The scenarios, one file each."""

from collections.abc import Mapping
from typing import Final

from bench.scenario import Scenario
from bench.scenarios import (
    chat,
    chat_latency,
    connect,
    durable,
    echo,
    fanout,
    idle,
    latency,
    topic,
    unicast,
)

SCENARIOS: Final[Mapping[str, Scenario]] = {
    one.name: one
    for one in (
        idle.SCENARIO,
        connect.SCENARIO,
        fanout.SCENARIO,
        topic.SCENARIO,
        unicast.SCENARIO,
        durable.SCENARIO,
        echo.SCENARIO,
        chat.SCENARIO,
        latency.SCENARIO,
        chat_latency.SCENARIO,
    )
}
"""By name, in the order in which they are told."""
