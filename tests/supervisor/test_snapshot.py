"""Reading settings with a command; how it is used is in `test_loop`."""

import selectors
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from supervisor.processes import Processes
from supervisor.snapshot import Outcome, SnapshotReader, obstacle
from tests.supervisor.harness import eventually, open_fds
from trioserver.settings import Settings


class World:
    """A reader and the loop that drives it."""

    def __init__(self, script: str) -> None:
        """Prepare to read with that script."""
        self.processes = Processes()
        self.selector = selectors.DefaultSelector()
        self.reader = SnapshotReader(
            self.processes, self.selector, ("/bin/sh", "-c", script), {"PATH": "/bin"}
        )

    def outcome(self) -> Outcome:
        """Read, and return the outcome."""
        self.reader.begin(2)
        outcomes: list[Outcome] = []

        def done() -> bool:
            for key, mask in self.selector.select(0):
                key.data(mask)
            for pid, code in self.processes.reap():
                assert self.reader.reaped(pid + 1, code) is None
                outcome = self.reader.reaped(pid, code)
                assert outcome is not None
                outcomes.append(outcome)
            return bool(outcomes)

        eventually(done)
        assert not self.selector.get_map()
        return outcomes[0]


@pytest.fixture
def world() -> Iterator[Callable[[str], World]]:
    """Return a function that makes a world."""
    with ExitStack() as closing:

        def make(script: str) -> World:
            world = World(script)
            closing.callback(world.selector.close)
            closing.callback(world.reader.close)
            return world

        yield make


def test_what_the_command_prints_is_the_snapshot(world: Callable[[str], World]) -> None:
    """Much more than a pipe can hold, too; what it warns of is not part of it."""
    outcome = world("echo careful >&2; head -c 300000 /dev/zero").outcome()

    assert outcome == Outcome(generation=2, snapshot=bytes(300_000))


def test_a_failure_is_explained_by_the_last_line(world: Callable[[str], World]) -> None:
    """Bounded, whatever the line is."""
    outcome = world("echo one >&2; printf 'x%.0s' $(seq 1000) >&2; exit 4").outcome()

    assert outcome == Outcome(generation=2, reason="x" * 500)


def test_a_helper_that_stays_behind_does_not_hold_it_up(world: Callable[[str], World]) -> None:
    """The pipe's other end is still open; the process is what counts."""
    here = world("echo good; sleep 3 & exit 0")

    assert here.outcome() == Outcome(generation=2, snapshot=b"good\n")


def test_a_reading_that_is_dropped_has_no_outcome(world: Callable[[str], World]) -> None:
    """Its process is killed, its pipes are closed."""
    here = world("sleep 60")
    before = len(open_fds())
    here.reader.begin(2)
    here.reader.drop(1)
    assert len(open_fds()) == before + 2
    here.reader.drop(2)
    here.reader.drop(2)

    assert len(open_fds()) == before
    codes: list[int] = []

    def reaped() -> bool:
        codes.extend(code for _, code in here.processes.reap())
        return bool(codes)

    eventually(reaped)
    assert codes == [-9]


def test_output_without_end_is_not_kept(world: Callable[[str], World]) -> None:
    """It blocks at some point, and is given up by the one who waits."""
    here = world("cat /dev/zero")
    here.reader.begin(2)

    def at_rest() -> bool:
        for key, mask in here.selector.select(0):
            key.data(mask)
        return len(here.selector.get_map()) == 1

    eventually(at_rest)
    here.reader.drop(2)
    eventually(lambda: bool(list(here.processes.reap())))


def test_settings_that_may_change_are_no_obstacle() -> None:
    """Only what the supervisor was built from is."""
    running = Settings(workers=2)

    assert obstacle(running, Settings(workers=2, drain_seconds=99.0).snapshot()) == ""
    assert obstacle(running, Settings(workers=3).snapshot()) == (
        "WORKERS has changed, which needs a restart"
    )
