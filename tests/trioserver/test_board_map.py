"""The shared memory: who owns which part, and that nobody's part outlives him for long."""

import os
import resource
import struct
from pathlib import Path

import pytest

from tests.trioserver.board_lives import lives
from trioserver.board import Board, Limits
from trioserver.board_map import (
    MAX_BUCKETS,
    MIN_BUCKETS,
    USED,
    BoardError,
    BoardMap,
    create,
    sweep,
)


def test_its_size_depends_on_the_settings_alone() -> None:
    """Three segments per slot and four to spare, an entry bucket per expected connection."""
    for slots, connections, buckets in (
        (1, 10_000, 16_384),
        (4, 10_000, 4096),
        (64, 10_000, MIN_BUCKETS),
        (2, 0, MIN_BUCKETS),
        (1, 10**9, MAX_BUCKETS),
    ):
        fd = create(slots, connections)
        try:
            shared = BoardMap(fd)
            assert (3 * slots + 4, buckets) == (shared.segments, shared.buckets)
            shared.close()
            assert not os.get_inheritable(fd)
            # 68 bytes per bucket of four, and as good as nothing else.
            assert os.fstat(fd).st_size < shared.segments * (buckets * 68 + 100) + 100
            assert os.fstat(fd).st_blocks * 512 >= os.fstat(fd).st_size
        finally:
            os.close(fd)


def test_nobody_can_shorten_it() -> None:
    """Reading a part of a mapping that is not there any more would kill every worker."""
    fd = create(1, 1)
    for size in (0, 100 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    os.close(fd)


def open_files() -> int:
    """Return how many descriptors this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_memory_that_is_not_there_is_an_error_at_once() -> None:
    """And leaves no descriptor behind."""
    before = open_files()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            create(1, 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert before == open_files()


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "no board"), (bytes(63), "no board"), (bytes(64), "release"), (b"x" * 999, "release")],
)
def test_what_is_no_board_is_not_touched(content: bytes, problem: str) -> None:
    """Another release's counters are no error of this one: it says so and counts for itself."""
    fd = os.memfd_create("foreign")
    os.write(fd, content)
    before = open_files()
    for use in (BoardMap, sweep, lambda it: Board.attach(it, Limits())):
        with pytest.raises(BoardError, match=problem):
            use(fd)
    assert before == open_files()
    os.close(fd)


def test_a_board_of_another_version_is_another_releases() -> None:
    """The version is in the first word."""
    fd = create(1, 1)
    (kind,) = struct.unpack("@Q", os.pread(fd, 8, 0))
    os.pwrite(fd, struct.pack("@Q", kind + 1), 0)
    with pytest.raises(BoardError, match="another release"):
        Board.attach(fd, Limits())
    os.close(fd)


def test_segments_are_owned_by_one_each() -> None:
    """Also within one process; the first free one is taken, and when there is none, it is said."""
    fd = create(1, 1)
    maps = [BoardMap(fd) for _ in range(8)]

    assert [0, 1, 2] == [maps[0].claim() for _ in range(3)]
    assert 0 == maps[0].sweep()
    for segment in range(3):
        maps[0].release(segment)
    assert list(range(7)) == [one.claim() for one in maps[:7]]
    with pytest.raises(BoardError, match="all 7 segments"):
        maps[7].claim()
    before = open_files()
    with pytest.raises(BoardError, match="all 7 segments"):
        Board.attach(fd, Limits())
    assert before == open_files()
    maps[3].release(3)
    assert 3 == maps[7].claim()
    assert 7 == maps[0].owners()

    for one in maps:
        one.close()
    os.close(fd)


def test_a_claim_ends_with_its_map() -> None:
    """Closing without giving back is what a killed process does: the mark stays for the sweep."""
    fd = create(1, 1)
    first, second = BoardMap(fd), BoardMap(fd)
    assert (0, 1) == (first.claim(), second.claim())
    first.words[first.connections] = 7
    first.close()

    assert 7 == second.words[second.connections]
    assert 1 == second.sweep()
    assert 0 == second.words[second.connections]
    assert (0, 1) == (second.sweep(), second.owners())

    second.close()
    os.close(fd)


def test_everything_of_a_segment_is_cleared_and_nothing_of_the_others() -> None:
    """Every word and every tag of the dead, not one of the living."""
    fd = create(1, 300)
    shared, living, dead = BoardMap(fd), BoardMap(fd), BoardMap(fd)
    assert (0, 1) == (living.claim(), dead.claim())
    owner = shared.connections - shared.segments
    marks = bytes(shared.data[owner * 8 : shared.connections * 8])
    size = len(shared.data)
    shared.data[shared.connections * 8 :] = b"\xff" * (size - shared.connections * 8)
    dead.close()

    assert 1 == shared.sweep()

    after = bytes(shared.data)
    cleared = _bytes_of(shared, 1)
    assert {0} == {after[at] for at in cleared}
    counted = set(range(shared.connections * 8, size)) - cleared
    assert {0xFF} == {after[at] for at in counted}
    kept = bytearray(marks)
    kept[8:16] = bytes(8)
    assert kept == after[owner * 8 : shared.connections * 8]
    for one in (shared, living):
        one.close()
    os.close(fd)


def _bytes_of(shared: BoardMap, segment: int) -> set[int]:
    """Return the offset of every byte that belongs to a segment."""
    columns = [shared.connections - shared.segments, shared.connections, shared.unlisted]
    columns += [shared.even, shared.odd]
    mine = {(column + segment) * 8 + byte for column in columns for byte in range(8)}
    begin = (shared.entries + segment * shared.segment_words) * 8
    mine |= set(range(begin, begin + shared.segment_words * 8))
    for bucket in range(shared.buckets):
        at = shared.tags + (bucket * shared.segments + segment) * 4
        mine |= set(range(at, at + 4))
    return mine


def test_a_sweep_lowers_how_far_to_look() -> None:
    """Behind the last of the living there is nobody; whoever comes raises it again."""
    fd = create(1, 1)
    first, second = BoardMap(fd), BoardMap(fd)
    assert (0, 1) == (first.claim(), second.claim())
    assert 2 == first.words[USED]
    second.close()
    assert 1 == sweep(fd)
    assert 1 == first.words[USED]
    first.show(2)
    assert 3 == first.words[USED]
    first.show(1)
    assert 3 == first.words[USED]
    first.close()
    os.close(fd)


def test_a_killed_process_is_gone_with_the_next_sweep() -> None:
    """Counts of kill -9 stay until its parent knows, and not a moment longer."""
    with lives(2) as board:
        first, second, third = board.start(3)
        assert 5 == first.ask("admit 1 5")
        assert 7 == second.ask("admit 1 7")
        assert 9 == third.ask("admit 2 5") + third.ask("admit 1 4")
        assert [21, 0, 3] == first.ask("count")

        second.kill()
        assert 1 == board.sweep()

        assert [14, 0, 2] == first.ask("count")
        assert 0 == board.sweep()
        third.kill()
        assert 1 == board.sweep()
        assert [5, 0, 1] == first.ask("count")


def test_a_successor_clears_what_nobody_swept() -> None:
    """It takes the dead one's segment and begins at nothing."""
    with lives(2) as board:
        first, second = board.start(2)
        first.ask("admit 1 10")
        second.ask("admit 1 3")
        first.kill()
        assert [13, 0, 2] == second.ask("count")

        (successor,) = board.start(1)

        assert [3, 0, 2] == successor.ask("count")
        assert 4 == successor.ask("admit 1 4")
        assert [7, 0, 2] == second.ask("count")


def test_an_orderly_end_leaves_nothing() -> None:
    """No sweep is needed for it."""
    with lives(1) as board:
        first, second = board.start(2)
        first.ask("admit 1 10")
        assert first.ask("close") is None
        assert [0, 0, 1] == second.ask("count")
        assert 0 == board.sweep()


def test_many_claim_at_once_while_somebody_sweeps() -> None:
    """Everybody gets a segment of his own, and a sweep takes nothing from the living."""
    with lives(4) as board:
        for _ in range(3):
            started = board.start(5)
            for number, life in enumerate(started):
                assert number + 1 == life.ask(f"admit {number} {number + 1}")
                assert 0 == board.sweep()
            assert [15, 0, 5] == started[0].ask("count")
            for life in started:
                life.kill()
            (last,) = board.start(1)
            # It has taken the first one's place.
            assert 4 == board.sweep()
            assert [0, 0, 1] == last.ask("count")
            last.kill()
            assert 1 == board.sweep()
