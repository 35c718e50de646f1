"""Limits of the whole server: exact in one worker, and over all of them but for a known slack."""

import math
import os
from collections.abc import Iterator

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.running import eventually
from tests.trioserver.board_lives import lives
from trioserver.board import ADDRESS_WINDOW, Board, Limits, Refused
from trioserver.board_map import USED, BoardError, BoardMap, create

NONE = Limits(connections=0, address_connections=0, handshakes=0, address_handshakes=0)
ANN, BOB = 1, 2
START = 1000.0


@pytest.fixture
def fd() -> Iterator[int]:
    """A board for two slots."""
    made = create(2, 1000)
    yield made
    os.close(made)


def limits(*, address_handshakes: float = 0, **allowed: int) -> Limits:
    """Return limits of which only these are set."""
    return attrs.evolve(NONE, address_handshakes=address_handshakes, **allowed)


def opened(board: Board, key: int | None, now: float, attempts: int) -> list[Refused]:
    """Try so many handshakes, open those that are admitted; return the refusals."""
    refusals = []
    for _ in range(attempts):
        refused = board.admit(key, now)
        if refused is None:
            board.opened(key)
        else:
            refusals.append(refused)
    return refusals


def test_the_servers_connections_are_limited_exactly(fd: int) -> None:
    """Over all workers; one that goes makes room for one."""
    first, second = (Board.attach(fd, limits(connections=10)) for _ in range(2))
    assert [] == opened(first, None, START, 6)

    refused = opened(second, ANN, START, 6)

    assert [Refused(503, 2, "connections")] * 2 == refused
    assert (10, 0, 2) == first.statistics()
    first.closed(None)
    assert 1 == len(opened(second, BOB, START, 2))
    second.closed(BOB)
    second.closed(ANN)
    assert (8, 0, 2) == second.statistics()
    for board in (first, second):
        board.close()


def test_an_addresss_connections_are_limited_exactly(fd: int) -> None:
    """The 257th is told 429, whichever worker it meets; others are not concerned."""
    first, second = (Board.attach(fd, limits(address_connections=256)) for _ in range(2))
    assert [] == opened(first, ANN, START, 200)

    refused = opened(second, ANN, START + 99, 57)

    assert [Refused(429, 2, "address_connections")] == refused
    assert [] == opened(first, BOB, START, 100)
    assert [] == opened(first, None, START, 300)
    second.closed(ANN)
    assert 1 == len(opened(first, ANN, START, 2))
    for board in (first, second):
        board.close()


def test_an_addresss_handshakes_are_limited(fd: int) -> None:
    """20 at once, then 5 per second; told when to come again, and that is true."""
    first, second = (Board.attach(fd, limits(address_handshakes=5)) for _ in range(2))
    assert [] == opened(first, ANN, START, 12)

    refused = opened(second, ANN, START + 0.5, 10)

    assert [Refused(429, 4, "address_handshakes")] * 2 == refused
    assert [] == opened(second, BOB, START + 0.5, 20)
    assert 10 == len(opened(first, ANN, START + 3.9, 10))
    # Of the window before, a quarter is over after a second: five of twenty.
    assert 5 == len(opened(first, ANN, START + 5, 10))
    assert 9 == len(opened(second, ANN, START + 5.1, 10))
    assert 6 == len(opened(second, ANN, START + 6, 10))
    for board in (first, second):
        board.close()


def test_the_servers_handshakes_are_limited(fd: int) -> None:
    """500 in one second over all workers, and no new burst just because a second begins."""
    first, second = (Board.attach(fd, limits(handshakes=500)) for _ in range(2))
    assert [] == opened(first, None, START + 0.9, 300)

    refused = opened(second, ANN, START + 0.9, 300)

    assert [Refused(503, 1, "handshakes")] * 100 == refused
    assert 50 == len(opened(second, None, START + 1.0, 50))
    assert 250 == len(opened(first, None, START + 1.5, 500))
    assert [] == opened(first, None, START + 9, 500)
    for board in (first, second):
        board.close()


def test_a_refused_handshake_is_not_counted(fd: int) -> None:
    """One address that presses on takes nothing from the others, nor from itself."""
    board = Board.attach(fd, limits(handshakes=30, address_handshakes=5))

    assert 980 == len(opened(board, ANN, START, 1000))
    assert 10 == len(opened(board, BOB, START, 20))
    assert {"handshakes"} == {refused.why for refused in opened(board, BOB, START, 20)}
    assert [] == opened(board, BOB, START + 2, 10)
    board.close()


def test_handshakes_at_the_allowed_pace_are_all_admitted(fd: int) -> None:
    """A window that turns holds nobody up who keeps to the rate."""
    first, second = (Board.attach(fd, limits(handshakes=8, address_handshakes=4)) for _ in range(2))
    for number in range(400):
        now = START + 0.05 + number / 8
        assert [] == opened((first, second)[number // 3 % 2], (ANN, BOB)[number % 2], now, 1)
    for board in (first, second):
        board.close()


def test_zero_is_no_limit(fd: int) -> None:
    """And addresses are not even kept."""
    board = Board.attach(fd, NONE)
    assert [] == opened(board, ANN, START, 5000)
    assert (5000, 0, 1) == board.statistics()
    for _ in range(5000):
        board.closed(ANN)
    assert (0, 0, 1) == board.statistics()
    board.close()


def test_a_limit_by_address_begins_with_those_who_have_it(fd: int) -> None:
    """After a reload that brings one, connections of the old generation count for the server only.

    And when they go they take nothing from anybody.
    """
    old = Board.attach(fd, NONE)
    assert [] == opened(old, ANN, START, 5)
    new = Board.attach(fd, limits(address_connections=3, connections=20))

    assert 2 == len(opened(new, ANN, START, 5))
    for _ in range(5):
        old.closed(ANN)
    assert 1 == len(opened(new, ANN, START, 1))
    assert (3, 0, 2) == new.statistics()
    for board in (old, new):
        board.close()


@pytest.mark.parametrize(("rate", "at_once"), [(0.1, 1), (0.25, 1), (0.5, 2), (1e9, 70_000)])
def test_small_and_large_rates_are_rates(fd: int, rate: float, at_once: int) -> None:
    """Less than one per window is still one; more than can be told apart is no limit."""
    board = Board.attach(fd, limits(address_handshakes=rate))
    assert (at_once < 100) == bool(opened(board, ANN, START, at_once + 1))
    assert at_once <= board.statistics().connections
    board.close()


def test_an_address_that_found_no_room_is_refused_late_not_wrongly() -> None:
    """It is counted as unlisted, and when it goes it takes nothing from anybody."""
    board = Board.alone(limits(connections=100_000, address_connections=2))
    keys = [key * 0x9E37_79B9_7F4A_7C15 & (1 << 64) - 1 for key in range(1, 100_001)]
    refused = sum(len(opened(board, key, START, 1)) for key in keys)
    statistics = board.statistics()

    assert 0 == refused
    assert 100_000 == statistics.connections
    assert 0 < statistics.unlisted < 2000
    unlisted = statistics.unlisted
    for key in keys[::2]:
        board.closed(key)
    # Some get in now that were not listed before, and go out as what they came in.
    for key in keys:
        board.admit(key, START + 99)
    for key in keys[1::2]:
        board.closed(key)
    assert unlisted > 0
    assert (0, 0, 1) == board.statistics()
    board.close()


def test_who_is_counted_out_twice_is_a_bug(fd: int) -> None:
    """It raises instead of making room that is not there."""
    board = Board.attach(fd, limits(address_connections=5))
    opened(board, ANN, START, 1)
    board.closed(ANN)
    with pytest.raises((ValueError, OverflowError)):
        board.closed(ANN)
    board.close()


def test_a_connection_may_be_counted_long_after_another_was_admitted(fd: int) -> None:
    """Each is counted for its own address, whoever was looked at in between."""
    board = Board.attach(fd, limits(address_connections=2))
    assert board.admit(ANN, START) is None
    assert board.admit(BOB, START) is None
    board.opened(ANN)
    board.opened(ANN)
    board.opened(BOB)
    assert board.admit(ANN, START) is not None
    assert board.admit(BOB, START) is None
    board.close()


def test_who_cannot_join_counts_for_himself(fd: int) -> None:
    """When all segments are taken it is said, and alone there are the same limits."""
    boards = [Board.attach(fd, limits(connections=3)) for _ in range(10)]
    with pytest.raises(BoardError, match="all 10 segments"):
        Board.attach(fd, limits(connections=3))
    assert 2 == len(opened(boards[9], None, START, 5))

    boards += [Board.alone(limits(connections=3)) for _ in range(2)]

    assert 5 == len(opened(boards[0], None, START, 5))
    assert 2 == len(opened(boards[10], None, START, 5))
    assert 2 == len(opened(boards[11], None, START, 5))
    assert (3, 0, 1) == boards[10].statistics()
    for board in boards:
        board.close()


def test_who_is_overlooked_shows_himself(fd: int) -> None:
    """Claims and sweeps may undo each other's mark of how far to look; the owner mends it."""
    first, second = (Board.attach(fd, limits(connections=1)) for _ in range(2))
    shared = BoardMap(fd)
    assert 2 == shared.words[USED]
    shared.words[USED] = 0

    assert second.admit(None, START) is None
    assert 2 == shared.words[USED]
    second.opened(None)
    assert first.admit(None, START) is not None

    for one in (first, second, shared):
        one.close()


def seconds(most: int) -> st.SearchStrategy[float]:
    """Times in fractions that can be added up without being rounded."""
    return st.integers(0, most * 1024).map(lambda parts: parts / 1024)


STEPS = st.lists(st.tuples(seconds(3), st.integers(0, 2), st.integers(1, 12)), max_size=40)


@given(steps=STEPS, rate=st.integers(1, 9), start=seconds(10_000_000))
def test_no_span_of_time_has_more_than_announced(
    steps: list[tuple[float, int, int]], rate: int, start: float
) -> None:
    """Over three workers: at most a window's worth and the rate, of one address and of all.

    And whoever comes again as told is admitted, if nobody else came.
    """
    made = create(1, 1)
    address = [Board.attach(made, limits(address_handshakes=rate)) for _ in range(3)]
    server = [Board.attach(made, limits(handshakes=rate)) for _ in range(3)]
    os.close(made)
    for boards, key, burst in ((address, ANN, rate * ADDRESS_WINDOW), (server, None, rate)):
        now, times = start, []
        for pause, worker, attempts in steps:
            now += pause
            for _ in range(attempts):
                refused = boards[worker].admit(key, now)
                if refused is not None:
                    assert 1 <= refused.retry_after <= 2 * ADDRESS_WINDOW
                    now += refused.retry_after
                    assert boards[worker].admit(key, now) is None
                times.append(now)
        for first, begin in enumerate(times):
            for last in range(first, len(times)):
                assert last - first + 1 <= burst + 1 + (times[last] - begin) * rate
    for board in address + server:
        board.close()


class TestProcesses:
    """What threads and functions cannot show."""

    def test_a_limit_is_filled_and_hardly_exceeded(self) -> None:
        """Four processes at once: never below, above by no more than the other three."""
        unlimited = {"handshakes": 0, "address_handshakes": 0, "address_connections": 0}
        with lives(4) as board:
            started = board.start(4, connections=2000, **unlimited)
            for _ in range(5):
                for life in started:
                    life.begin("fill 7")
                opened = [life.answer() for life in started]
                assert 2000 <= sum(opened) <= 2003
                for life, count in zip(started, opened, strict=True):
                    life.ask(f"shut 7 {count}")
            assert [0, 0, 4] == started[0].ask("count")

    def test_an_addresss_limit_is_filled_and_hardly_exceeded(self) -> None:
        """The same for one address; what was counted goes away again to the last one."""
        with lives(2) as board:
            started = board.start(4, handshakes=0, address_handshakes=0)
            for key in (3, 1 << 63, 5):
                for life in started:
                    life.begin(f"fill {key}")
                opened = [life.answer() for life in started]
                assert 256 <= sum(opened) <= 259
                for life, count in zip(started, opened, strict=True):
                    life.ask(f"shut {key} {count}")
                assert 256 == started[0].ask(f"fill {key}")
            assert [768, 0, 4] == started[1].ask("count")

    def test_the_rate_holds_over_processes(self) -> None:
        """Handshakes as fast as they go for two seconds: no span has more than announced."""
        with lives(4) as board:
            started = board.start(4, handshakes=500)
            for life in started:
                life.begin("hurry 2.0")
            times = sorted(moment for life in started for moment in life.answer())
        span = times[-1] - times[0]
        assert 500 <= len(times) <= 500 + span * 500 + 8
        for first in range(0, len(times), 10):
            for last in range(first, len(times), 10):
                assert last - first + 1 <= 500 + (times[last] - times[first]) * 500 + 8
        # And it is not wasted: a second's worth at once, then the rate.
        assert len(times) >= 500 * math.floor(span)

    def test_counts_are_right_after_kill_9_under_load(self) -> None:
        """One of three dies in the middle of counting; the sweep takes its part and no other."""
        with lives(2) as board:
            for _ in range(3):
                first, second, victim = board.start(3, handshakes=0, address_handshakes=0)
                for life in (first, second, victim):
                    life.begin("churn 0.6")
                eventually(lambda: len(board) > 300, 5.0, "three that churn")
                victim.kill()
                assert 1 == board.sweep()
                expected = first.answer() + second.answer()
                assert [expected, 0, 2] == first.ask("count")
                # Its place is free at once, and its addresses are.
                (successor,) = board.start(1, address_connections=10**6, handshakes=0)
                assert [expected, 0, 3] == successor.ask("count")
                for life in (first, second, successor):
                    life.kill()
                assert 3 == board.sweep()

    def test_the_limit_spans_both_generations_of_a_reload(self) -> None:
        """Two lives of each slot count side by side, and when the old ones go, so do theirs."""
        with lives(2) as board:
            allowed = {"connections": 100, "handshakes": 0, "address_handshakes": 0}
            old = board.start(2, **allowed)
            assert [40, 40] == [life.ask("admit 1 40") for life in old]
            new = board.start(2, **allowed)
            assert [15, 5, 0] == [life.ask("admit 2 15") for life in (*new, old[0])]

            assert old[0].ask("close") is None
            assert 40 == new[0].ask("admit 1 50")
            old[1].kill()
            assert 1 == board.sweep()

            assert 40 == new[1].ask("admit 1 50")
            assert [100, 0, 2] == new[0].ask("count")
            # Again and again: segments are used anew.
            for _ in range(3):
                for life in new:
                    life.kill()
                board.sweep()
                new = board.start(2, **allowed)
            assert [0, 0, 2] == new[0].ask("count")

    def test_a_stopped_worker_keeps_what_it_has(self) -> None:
        """It is alive, and so are its connections: nothing is swept."""
        with lives(1) as board:
            first, second = board.start(2)
            first.ask("admit 1 7")
            first.process.send_signal(19)
            assert 0 == board.sweep()
            assert [7, 0, 2] == second.ask("count")
            first.process.send_signal(18)
            assert [7, 0, 2] == first.ask("count")
