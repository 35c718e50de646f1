"""A run: every scenario, as often as asked, for one server or two in turns."""

import datetime as dt
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs

from bench import client, machine, results, stage, tokens
from bench.client import BenchError, Kind
from bench.results import Repetition, Results, Row
from bench.scenario import Scenario
from bench.servers import Other, Product, Server
from bench.stage import Plan, Props
from supervisor.embedded import find_server

Say = Callable[[str], None]


@attrs.frozen(kw_only=True)
class Order:
    """What to measure."""

    scenarios: Sequence[Scenario]
    connections: tuple[int, ...] = ()
    """Instead of each scenario's own; ascending."""
    repeat: int = 5
    against: Path | None = None
    """The file of another server."""
    plan: Plan = attrs.field(factory=Plan)
    client: Kind | None = None
    """Which client; None for the better one."""


def run(order: Order, say: Say) -> Results:
    """Measure; takes about half a minute per repetition and server.

    Args:
        order: What.
        say: Called with a line about each repetition.

    Raises:
        BenchError: Something does not start, or limits are not in force.
    """
    product = Product()
    settings = product.settings()
    other = Other(file=order.against) if order.against is not None else None
    machine_now, load, began = machine.describe(), os.getloadavg(), dt.datetime.now(dt.UTC)
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        props = Props(
            program=client.program(Path(directory), order.client),
            tokens=_tokens(order, Path(directory)),
            server_core=machine_now.server_core,
            client_core=machine_now.client_core,
        )
        servers: list[Server] = [product] if other is None else [product, other]
        rows = [
            row
            for connections, scenarios in _in_turns(order)
            for row in _rows(scenarios, connections, order, servers, props, say)
        ]
    return Results(
        commit=machine.commit(),
        date=began.isoformat(timespec="seconds"),
        machine=machine_now,
        load=load,
        client=props.program.kind,
        redis=_redis_version(),
        against=f"{other.name} {other.digest}" if other is not None else None,
        settings=settings,
        plan=attrs.asdict(order.plan),
        rows=rows,
    )


def _tokens(order: Order, directory: Path) -> dict[tuple[str, ...], Path]:
    """Write the tokens of all users, a file for each choice of topics that they join."""
    users = max(
        count for one in order.scenarios for row in one.rows(order.connections) for count in row
    )
    choices = dict.fromkeys(one.joins for one in order.scenarios)
    return {
        joins: tokens.write(directory / f"tokens{number}", users, joins)
        for number, joins in enumerate(choices)
    }


def _redis_version() -> str:
    command = [find_server(os.environ.get("PATH")), "--version"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    return done.stdout.strip()


def _in_turns(order: Order) -> list[tuple[tuple[int, ...], list[Scenario]]]:
    """Return what is played in turns: a scenario with those that are measured against it."""
    groups: dict[tuple[str, tuple[int, ...]], list[Scenario]] = {}
    for scenario in order.scenarios:
        for connections in scenario.rows(order.connections):
            group = scenario.against or scenario.name, connections
            groups.setdefault(group, []).append(scenario)
    return [(connections, scenarios) for (_, connections), scenarios in groups.items()]


def _rows(
    scenarios: Sequence[Scenario],
    connections: tuple[int, ...],
    order: Order,
    servers: Sequence[Server],
    props: Props,
    say: Say,
) -> list[Row]:
    played: dict[str, dict[str, list[Repetition]]] = {one.name: {} for one in scenarios}
    for number in range(1, order.repeat + 1):
        # In turns, so that a machine that changes its mood does so for all.
        for scenario in scenarios:
            for server in servers[:1] if scenario.ours else servers:
                one = _play(scenario, connections, order.plan, server, props)
                played[scenario.name].setdefault(server.name, []).append(one)
                say(_line(scenario, connections, number, server, one))
    rows: dict[str, Row] = {}
    # Yardsticks come first: what they measure is measured already.
    for scenario in sorted(scenarios, key=lambda one: one.against):
        rows[scenario.name] = results.row(
            scenario=scenario.name,
            connections=connections,
            headline=scenario.headline,
            goal=scenario.goal,
            repetitions=played[scenario.name],
            absolute=scenario.absolute,
            against=scenario.against,
            yardstick=rows.get(scenario.against),
        )
    return [rows[one.name] for one in scenarios]


def _play(
    scenario: Scenario, connections: tuple[int, ...], plan: Plan, server: Server, props: Props
) -> Repetition:
    try:
        with stage.set_for(server, props, scenario.joins) as here:
            return scenario.measure(here, plan, connections)
    except (OSError, ValueError) as error:
        raise BenchError(f"{scenario.name} of {server.name}: {error}") from error


def _line(
    scenario: Scenario,
    connections: tuple[int, ...],
    number: int,
    server: Server,
    one: Repetition,
) -> str:
    at = " to ".join(f"{count:,}" for count in connections)
    value = one.figures[scenario.headline]
    words = f"{scenario.name} {at} #{number} {server.name}: {scenario.headline} {value:.3f}"
    words += f", bottleneck {one.bottleneck}"
    return words if one.valid else f"{words}  INVALID {one.counts} {one.trouble}"
