"""Addresses on the board: added up over all workers, never more than there were."""

import os
import random
from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from trioserver.board_map import BoardMap, create
from trioserver.board_table import MOST, AddressTable
from trioserver.peers import address_key, address_of

KEYS = [address_key(address_of(text) or 0) for text in ("203.0.113.7", "203.0.113.8", "2001:db8::")]
HIGHEST = (1 << 64) - 1


class Lives:
    """Several workers' tables on one board, all in this process."""

    def __init__(self, count: int, connections: int = 1) -> None:
        fd = create(2, connections)
        # The same chance every time, or one run in ten thousand would see two with one name.
        os.pwrite(fd, random.Random(3).randbytes(32), 32)
        self.maps = [BoardMap(fd) for _ in range(count)]
        os.close(fd)
        self.tables = [AddressTable(one, one.claim()) for one in self.maps]

    def open(self, life: int, key: int, window: int) -> bool:
        """Count a handshake and a connection of an address; return whether it is listed."""
        table = self.tables[life]
        table.look(key, window)
        table.note(window)
        if table.entry:
            self.maps[life].words[table.entry] += 1
        return table.entry != 0

    def close(self) -> None:
        """Unmap."""
        for one in self.maps:
            one.close()


class AgainstTheModel(RuleBasedStateMachine):
    """A dictionary per worker and window says the same."""

    def __init__(self) -> None:
        super().__init__()
        self.lives = Lives(3)
        self.window = 0
        self.connections: Counter[tuple[int, int]] = Counter()
        self.handshakes: Counter[tuple[int, int]] = Counter()

    @rule(life=st.integers(0, 2), key=st.sampled_from(KEYS))
    def look(self, life: int, key: int) -> None:
        """Every worker sees the same sums."""
        expected = (
            sum(count for (_, other), count in self.connections.items() if other == key),
            self.handshakes[self.window, key],
            self.handshakes[self.window - 1, key],
        )
        assert expected == self.lives.tables[life].look(key, self.window)

    @rule(life=st.integers(0, 2), key=st.sampled_from(KEYS))
    def knock(self, life: int, key: int) -> None:
        """A handshake that comes to nothing."""
        table = self.lives.tables[life]
        table.look(key, self.window)
        table.note(self.window)
        self.handshakes[self.window, key] += 1

    @rule(life=st.integers(0, 2), key=st.sampled_from(KEYS))
    def come(self, life: int, key: int) -> None:
        """A handshake that comes to a connection."""
        assert self.lives.open(life, key, self.window)
        self.handshakes[self.window, key] += 1
        self.connections[life, key] += 1

    @rule(life=st.integers(0, 2), key=st.sampled_from(KEYS))
    def go(self, life: int, key: int) -> None:
        """The end of a connection."""
        entry = self.lives.tables[life].find(key)
        if self.connections[life, key]:
            self.connections[life, key] -= 1
            self.lives.maps[life].words[entry] -= 1

    @rule(windows=st.integers(1, 3))
    def wait(self, windows: int) -> None:
        """Time passes."""
        self.window += windows

    def teardown(self) -> None:
        """Give the memory back."""
        self.lives.close()


TestAgainstTheModel = AgainstTheModel.TestCase


@pytest.fixture
def lives() -> Lives:
    """Two workers, with the smallest table."""
    return Lives(2)


def test_a_full_table_counts_too_little_never_too_much(lives: Lives) -> None:
    """With ten times as many addresses as there is room for, none is seen with more than it has."""
    rng = random.Random(4)
    keys = [rng.randrange(1 << 64) for _ in range(10_000)]
    truth: Counter[int] = Counter()
    listed = 0
    for key in keys:
        for _ in range(rng.randrange(1, 4)):
            listed += lives.open(key % 2, key, 7)
            truth[key] += 1

    seen = {key: lives.tables[0].look(key, 7) for key in keys}

    assert all(connections <= truth[key] for key, (connections, _, _) in seen.items())
    assert all(current <= truth[key] for key, (_, current, _) in seen.items())
    assert listed == sum(connections for connections, _, _ in seen.values())
    for key in keys:
        assert (lives.tables[key % 2].find(key) != 0) == (seen[key][0] > 0)
        assert 0 == lives.tables[1 - key % 2].find(key)
    # Both are full: 256 buckets of four each.
    assert 2048 * 0.95 < sum(connections > 0 for connections, _, _ in seen.values()) <= 2048
    lives.close()


def test_with_as_many_addresses_as_planned_hardly_one_is_missing() -> None:
    """One in some hundreds: 10,000 addresses over four workers, each for itself."""
    lives = Lives(2, connections=5000)
    keys = [address_key(_ipv4(number)) for number in range(5000)]

    missing = sum(not lives.open(number % 2, key, 7) for number, key in enumerate(keys))

    assert missing <= 5000 // 200
    lives.close()


def _ipv4(number: int) -> int:
    return 0xFFFF << 32 | 0x0A00_0000 | number


@pytest.mark.parametrize("stride", [1, 256, 1 << 16, 1 << 32, 1 << 48, 3 << 40])
def test_nobody_can_aim_at_a_bucket(stride: int) -> None:
    """Addresses in any regular pattern spread like random ones."""
    lives = Lives(1, connections=1024)
    keys = [(number * stride) & HIGHEST for number in range(512)]

    listed = sum(lives.open(0, key, 7) for key in dict.fromkeys(keys))

    assert listed >= len(set(keys)) - 5
    lives.close()


def fill(lives: Lives, window: int) -> int:
    """Have 10,000 strangers knock at the first worker; return how many found room."""
    rng = random.Random(window)
    table = lives.tables[0]
    found = 0
    for _ in range(10_000):
        table.look(rng.randrange(1 << 64), window)
        table.note(window)
        found += table.entry != 0
    return found


def test_a_handshake_binds_its_entry_for_two_windows(lives: Lives) -> None:
    """As long as it counts, and not longer."""
    assert 1000 < fill(lives, 0) <= 1024
    # The next strangers find what is left, then nothing, then everything.
    assert fill(lives, 1) < 24
    assert 1000 < fill(lives, 2) <= 1024
    assert fill(lives, 3) < 24
    assert 1000 < fill(lives, 6) <= 1024
    lives.close()


def test_a_connection_binds_its_entry_for_its_life(lives: Lives) -> None:
    """Whatever comes and goes around it, its address keeps what was counted."""
    rng = random.Random(50)
    staying = [rng.randrange(1 << 64) for _ in range(300)]
    listed = [key for key in staying if lives.open(0, key, 0)]
    assert len(listed) > 280
    for window in (2, 4, 6, 100):
        for key in listed:
            lives.tables[0].look(key, window)
            lives.tables[0].note(window)
        assert fill(lives, window) <= 1024 - len(listed)
        assert {(1, 1, 0)} == {lives.tables[1].look(key, window) for key in listed}
    lives.close()


def test_a_new_address_has_nothing_of_the_one_before_it(lives: Lives) -> None:
    """Every entry is taken over many times, and always begins at nothing."""
    rng = random.Random(4)
    for window in range(0, 60, 3):
        for _ in range(1500):
            key = rng.randrange(1 << 64)
            assert (0, 0, 0) == lives.tables[0].look(key, window)
            lives.tables[0].note(window)
            if lives.tables[0].entry:
                assert (0, 1, 0) == lives.tables[1].look(key, window)
                assert (0, 0, 1) == lives.tables[1].look(key, window + 1)
                assert (0, 0, 0) == lives.tables[1].look(key, window + 2)
    lives.close()


def test_handshakes_are_told_apart_up_to_a_number(lives: Lives) -> None:
    """Beyond it they do not spill into the count of the window before."""
    table = lives.tables[0]
    for _ in range(MOST + 3):
        table.look(5, 7)
        table.note(7)
    assert (0, MOST, 0) == table.look(5, 7)
    table.note(8)
    assert (0, 1, MOST) == table.look(5, 8)
    lives.close()


@pytest.mark.parametrize("key", [0, 1, (1 << 32) - 1, 1 << 63, HIGHEST])
def test_every_key_is_a_key(lives: Lives, key: int) -> None:
    """Zero, too: that is what addresses are counted under that nobody understands."""
    assert 0 == lives.tables[0].find(key)
    assert lives.open(0, key, 0)
    assert (1, 1, 0) == lives.tables[1].look(key, 0)
    assert 0 == lives.tables[1].find(key)
    assert lives.tables[0].entry == lives.tables[0].find(key)
    lives.close()
