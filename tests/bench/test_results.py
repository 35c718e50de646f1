"""What is made of the measurements."""

import re
from pathlib import Path

import attrs
import msgspec
import pytest

from bench import report, results
from bench.client import BenchError
from bench.machine import Machine
from bench.results import Counts, Repetition, Results, Row, Shares
from bench.scenarios.latency import percentile
from bench.stage import Plan

QUIET = Shares(worker=0.5, redis=0.1, client=0.3, others=0.0)


def repetition(
    value: float, *, lost: int = 0, shares: Shares = QUIET, bottleneck: str = "nobody"
) -> Repetition:
    """Return a measurement with this headline."""
    return Repetition(
        figures={"cpu_us": value, "redis_cpu_us": 0.0},
        units=1_000,
        wall_seconds=1.0,
        shares=shares,
        bottleneck=bottleneck,
        counts=Counts(lost=lost, doubled=0, reordered=0, failed=0),
        greeted=2,
        healthy=True,
        trouble="connection 7: gone" if lost else "",
    )


def row(ours: list[Repetition], theirs: list[Repetition] | None = None) -> Row:
    """Return a row about these."""
    return results.row(
        scenario="echo",
        connections=(200,),
        headline="cpu_us",
        goal=1.15,
        repetitions={"trioserver": ours} | ({"sketch": theirs} if theirs else {}),
    )


def dearer(ours: list[Repetition], yardstick: Row | None) -> Row:
    """Return a row about a scenario that is compared with the one of `row`."""
    return results.row(
        scenario="durable",
        connections=(200,),
        headline="cpu_us",
        goal=2.0,
        repetitions={"trioserver": ours},
        against="echo",
        yardstick=yardstick,
    )


def run(*rows: Row) -> Results:
    """Return a run with these rows."""
    return Results(
        commit="0123456789ab+",
        date="2026-01-01T00:00:00+00:00",
        machine=Machine(
            cpu="Z80", cores=2, kernel="Linux 6", python="3.11", server_core=0, client_core=1
        ),
        load=(0.1, 0.2, 0.3),
        client="c",
        redis="Redis server v=7",
        against="sketch 0123",
        settings={"WS_PORT": 0, "WS_MODE": None, "JWT_ALGORITHMS": ["HS256"], "A|B": "c|d"},
        plan=attrs.asdict(Plan()),
        rows=list(rows),
    )


def test_row() -> None:
    """Figures are medians with their range; ratios of medians, with the range of the pairs."""
    made = row(
        [repetition(10), repetition(12), repetition(11)],
        [repetition(10), repetition(8), repetition(9)],
    )

    ours, ratio = made.figures["trioserver"]["cpu_us"], made.ratios["cpu_us"]
    assert (11, 10, 12) == (ours.median, ours.low, ours.high)
    assert pytest.approx((11 / 9, 1.0, 1.5)) == (ratio.median, ratio.low, ratio.high)
    # Nothing is a multiple of nothing.
    assert ["cpu_us"] == list(made.ratios)
    assert made.valid


def test_row_against_another_scenario() -> None:
    """Its ratios are to our own figures in the other scenario, pair by pair."""
    yardstick = row([repetition(10), repetition(8)], [repetition(1), repetition(1)])

    ratio = dearer([repetition(18), repetition(20)], yardstick).ratios["cpu_us"]

    assert pytest.approx((19 / 9, 1.8, 2.5)) == (ratio.median, ratio.low, ratio.high)


def test_row_without_its_yardstick() -> None:
    """There is no ratio to what was not measured, nor to what is invalid."""
    invalid = row([repetition(10, lost=1)])

    assert {} == dearer([repetition(18)], None).ratios
    assert {} == dearer([repetition(18)], invalid).ratios


def test_file(tmp_path: Path) -> None:
    """What is saved is what is loaded; anything else is an expected error."""
    kept = run(row([repetition(10)], [repetition(9)]))
    results.save(kept, tmp_path / "out.json")

    assert kept == results.load(tmp_path / "out.json")
    with pytest.raises(BenchError, match="nowhere"):
        results.load(tmp_path / "nowhere")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(BenchError, match=r"bad\.json"):
        results.load(tmp_path / "bad.json")


def test_table() -> None:
    """The table shows medians, ratios and whether the goal is met."""
    table = report.table(
        run(row([repetition(10)], [repetition(9)]), row([repetition(20)], [repetition(10)]))
    )

    assert "trioserver" in table.splitlines()[0]
    assert table.splitlines()[1].split()[-3:] == ["≤", "1.15", "met"]
    assert table.splitlines()[2].split()[-3:] == ["≤", "1.15", "missed"]
    assert "0 lost, 0 doubled, 0 reordered, 0 failed, of 4,000 in 4 measurements." in table


def test_table_of_one_server() -> None:
    """Without another server there are no ratios, and no goals."""
    table = report.table(run(row([repetition(10)])))

    assert ["scenario", "connections", "figure", "trioserver"] == table.splitlines()[0].split()


def test_table_of_a_scenario_that_only_we_play() -> None:
    """The table says what the ratio is to, and that the other server has no part in it."""
    yardstick = row([repetition(10)], [repetition(5)])
    table = report.table(run(yardstick, dearer([repetition(19)], yardstick)))

    cells = re.split(r"  +", table.splitlines()[2])
    assert ["19 (19-19)", "-", "1.9 (1.9-1.9) of echo", "≤ 2", "met"] == cells[3:]
    assert "durable: the ratio is to echo of trioserver, measured in turns" in table
    assert "sketch does not play it" in table


def test_page_of_a_scenario_that_only_we_play() -> None:
    """Without another server there are still its ratio and its goal."""
    yardstick = row([repetition(10)])
    page = report.page(run(yardstick, dearer([repetition(21)], yardstick)))

    assert "| durable | 200 | cpu_us | 21 (21-21) | 2.1 (2.1-2.1) of echo |" in page
    assert "≤ 2 | missed |" in page
    assert "durable: the ratio is to echo of trioserver, measured in turns." in page


@pytest.mark.parametrize(
    ("value", "lost", "verdict"), [(15, 0, "met"), (15.1, 0, "missed"), (1, 1, "invalid")]
)
def test_absolute_goal(value: float, lost: int, verdict: str) -> None:
    """A goal for a value itself needs nothing to compare with, and has a unit."""
    measured = results.row(
        scenario="chat-latency",
        connections=(200,),
        headline="p99_ms",
        goal=15,
        absolute=True,
        repetitions={
            "trioserver": [
                msgspec.structs.replace(repetition(1, lost=lost), figures={"p99_ms": value})
            ]
        },
    )

    table = report.table(run(measured)).splitlines()

    assert ["-", "≤ 15 ms", verdict] == re.split(r"  +", table[1])[-3:]


def test_suspicions() -> None:
    """What should not be believed is named, and an invalid row meets no goal."""
    disturbed = Shares(worker=0.5, redis=0.1, client=0.3, others=0.4)
    measured = run(
        row([repetition(10, lost=3)], [repetition(10)]),
        row([repetition(10, shares=disturbed), repetition(10, bottleneck="client")]),
    )

    assert [
        "INVALID: echo 200 trioserver (1 of 1: connection 7: gone)",
        "The client was the bottleneck: echo 200 trioserver (1 of 2)",
        "Something else ran on the worker's core: echo 200 trioserver (1 of 2)",
    ] == report.warnings(measured)
    assert report.counts(measured).startswith("3 lost, 0 doubled")
    assert report.table(run(measured.rows[0])).splitlines()[1].endswith("invalid")


def test_many_suspicions() -> None:
    """A warning that goes for nearly everything stays short."""
    measured = run(*[row([repetition(10, bottleneck="client")])] * 6)

    (said,) = report.warnings(measured)

    assert said.endswith(" and 2 more")


def test_page() -> None:
    """The page has the headline, every figure, the machine and the settings."""
    page = report.page(run(row([repetition(10)], [repetition(9)])))

    for words in (
        "| echo | 200 | CPU per message of a client and its answer, µs | 10 (10-10) | 9 (9-9) |",
        "| 1.11 (1.11-1.11) | ≤ 1.15 | met |",
        "commit 0123456789ab+",
        "Z80, 2 cores",
        "compared with sketch 0123",
        "| echo | 200 | redis_cpu_us | 0.00 (0.00-0.00) | 0.00 (0.00-0.00) | - |",
        "| echo | 200 | sketch | 50% | 10% | 30% | 0% | nobody |",
        "| `JWT_ALGORITHMS` | HS256 |",
        "| `WS_MODE` | - |",
        "| `A\\|B` | c\\|d |",
    ):
        assert words in page


@pytest.mark.parametrize(
    ("share", "expected"), [(0.5, 50), (0.9, 90), (0.99, 99), (0.999, 100), (0.0, 1), (1.0, 100)]
)
def test_percentile(share: float, expected: int) -> None:
    """A percentile is one of the values, by nearest rank."""
    assert expected == percentile(range(100, 0, -1), share)


def test_percentile_of_nothing() -> None:
    """Nothing takes no time."""
    assert 0 == percentile([], 0.5)
