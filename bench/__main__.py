"""``python -m bench run`` and ``python -m bench report``; see README.md."""

import sys
from pathlib import Path
from typing import get_args

import click

from bench import report as reports
from bench import results
from bench.client import BenchError, Kind
from bench.run import Order, run
from bench.scenarios import SCENARIOS
from bench.stage import Plan


class _Numbers(click.ParamType):  # type: ignore[type-arg]
    """Positive numbers, separated by commas; in ascending order."""

    name = "N,N"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """See `click.ParamType`."""
        try:
            numbers = tuple(sorted({int(word) for word in str(value).split(",")}))
        except ValueError:
            numbers = (0,)
        if numbers[0] < 1:
            self.fail(f"{value!r} is not numbers of connections, as 2000,5000", param, ctx)
        return numbers


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Measure what one worker on one core costs, with exact counts."""


@cli.command("run")
@click.argument("scenarios", nargs=-1, type=click.Choice(list(SCENARIOS)))
@click.option(
    "--connections", type=_Numbers(), default=None, help="Instead of each scenario's own."
)
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--against",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A Python file that is another server: measured in turns, for ratios.",
)
@click.option(
    "--scale",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="So much more or less work in each repetition.",
)
@click.option("--client", type=click.Choice(get_args(Kind)), help="Default: c, if there is cc.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Where to keep it all.")
def run_command(
    scenarios: tuple[str, ...],
    connections: tuple[int, ...] | None,
    repeat: int,
    against: Path | None,
    scale: float,
    client: Kind | None,
    output: Path | None,
) -> None:
    """Measure these SCENARIOS, or all. Exit code 1 if a measurement is invalid."""
    order = Order(
        scenarios=[SCENARIOS[name] for name in dict.fromkeys(scenarios or SCENARIOS)],
        connections=connections or (),
        repeat=repeat,
        against=against,
        plan=Plan().scaled(scale),
        client=client,
    )
    measured = run(order, lambda line: click.echo(line, err=True))
    if output is not None:
        results.save(measured, output)
    click.echo(reports.table(measured), nl=False)
    sys.exit(0 if all(row.valid for row in measured.rows) else 1)


@cli.command("report")
@click.argument("file", type=click.Path(path_type=Path))
def report_command(file: Path) -> None:
    """Print the page about a FILE that ``run --json`` has written."""
    click.echo(reports.page(results.load(file)), nl=False)


def main() -> None:
    """Run the command line; an expected problem is one line."""
    try:
        cli.main(prog_name="python -m bench")
    except BenchError as error:
        click.echo(f"bench: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
