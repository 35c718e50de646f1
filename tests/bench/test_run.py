"""The order in which everything is played."""

from pathlib import Path
from typing import Final

import jwt
import msgspec
import pytest

from bench import run as bench_run
from bench.results import Counts, Repetition, Shares
from bench.run import Order
from bench.scenario import Scenario
from bench.scenarios import SCENARIOS
from bench.servers import Product, Server
from bench.stage import Plan, Props
from bench.tokens import SECRET

OTHER: Final = Path(__file__).with_name("other_server.py")
REPETITION: Final = Repetition(
    figures={"cpu_us": 1.0},
    units=1,
    wall_seconds=1.0,
    shares=Shares(worker=0.1, redis=0.1, client=0.1, others=0.0),
    bottleneck="nobody",
    counts=Counts(lost=0, doubled=0, reordered=0, failed=0),
    greeted=1,
    healthy=True,
    trouble="",
)


def test_absolute_goals_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scenario with a goal for its value itself is not played by another server."""
    played = []

    def play(*arguments: object) -> Repetition:
        played.append(arguments[3])
        return msgspec.structs.replace(REPETITION, figures={"p99_ms": 1.0})

    monkeypatch.setattr(bench_run, "_play", play)
    order = Order(
        scenarios=[SCENARIOS["chat-latency"]],
        connections=(2,),
        repeat=2,
        against=OTHER,
        client="python",
    )

    (row,) = bench_run.run(order, lambda _: None).rows

    assert [Product()] * 2 == played
    assert row.absolute


def test_tokens_of_scenarios(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the users of a scenario about topics have tokens that join one."""
    seen: dict[str, list[str]] = {}

    def play(
        scenario: Scenario, connections: tuple[int, ...], plan: Plan, server: Server, props: Props
    ) -> Repetition:
        del connections, plan, server
        seen[scenario.name] = props.tokens[scenario.joins].read_text().split()
        return REPETITION

    monkeypatch.setattr(bench_run, "_play", play)
    order = Order(
        scenarios=[SCENARIOS["fanout"], SCENARIOS["topic"]],
        connections=(3,),
        repeat=1,
        client="python",
    )

    bench_run.run(order, lambda _: None)

    claims = {
        name: [jwt.decode(one, SECRET, algorithms=["HS256"]) for one in tokens]
        for name, tokens in seen.items()
    }
    for name, topics in (("fanout", None), ("topic", {"join": list(SCENARIOS["topic"].joins)})):
        assert ["u0", "u1", "u2"] == [one["sub"] for one in claims[name]]
        assert [topics] * 3 == [one.get("topics") for one in claims[name]]


def test_scenarios_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scenario is played in turns with the one it is compared with, and by our server only."""
    played: list[tuple[str, tuple[int, ...], str]] = []

    def play(
        scenario: Scenario, connections: tuple[int, ...], plan: Plan, server: Server, props: Props
    ) -> Repetition:
        del plan, props
        played.append((scenario.name, connections, server.name))
        return REPETITION

    monkeypatch.setattr(bench_run, "_play", play)
    order = Order(
        scenarios=[SCENARIOS[name] for name in ("durable", "echo", "unicast")],
        connections=(2, 3),
        repeat=2,
        against=OTHER,
        client="python",
    )

    rows = bench_run.run(order, lambda _: None).rows

    ours, theirs = "trioserver", OTHER.stem
    turn = [("durable", ours), ("unicast", ours), ("unicast", theirs)]
    assert [(name, (2,), server) for name, server in turn * 2] == played[:6]
    assert [("durable", (3,), ours), ("unicast", (3,), ours)] == played[6:8]
    assert [("echo", (2,), ours), ("echo", (2,), theirs)] == played[12:14]
    assert ["durable", "unicast", "durable", "unicast", "echo", "echo"] == [
        row.scenario for row in rows
    ]
    assert ["unicast", "", "unicast", "", "", ""] == [row.against for row in rows]
    assert all("cpu_us" in row.ratios for row in rows)
