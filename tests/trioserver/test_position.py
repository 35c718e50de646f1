"""Places, points and positions: what is understood, and in which order they are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioserver import position
from trioserver.position import Position, join, parse

USER = "k3x9q2aa.1763630000000-61440"
ALL = "b7.1763000000000-4096"

epochs = st.from_regex(r"[a-z][a-z0-9]{0,15}", fullmatch=True)
numbers = st.integers(0, 2**49)
points = st.builds("{}.{}-{}".format, epochs, numbers, numbers)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        (f"1.{USER}", Position(USER, "")),
        (f"1.{USER}.{ALL}", Position(USER, ALL)),
        (f"1.0.0-0.{ALL}", Position("", ALL)),
        ("1.0.0-0", Position("", "")),
        ("1.k3x9q2aa.0-0", Position("k3x9q2aa.0-0", "")),
        ("1.0abc.5-5", Position("0abc.5-5", "")),
    ],
)
def test_a_position_is_understood(text: str, meaning: Position) -> None:
    """One point or two; the place where nobody is stands for one that is not known."""
    assert meaning == parse(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "1", "1.", "2." + USER, USER, f"1.{USER}.", f"1.{USER}.{ALL}.{ALL}", f" 1.{USER}"),
        *(f"1.{USER}\n", f"1.{USER}.0.0-0", "1.0.5-4096", "1.K3.1-1", "1.a.1-", "1.a.-1-1"),
        *("1.a.1-1-1", "1.a.1", "1..1-1", "1.abcdefghijklmnopq.1-1", "1.a.1-٣", "1.ä.1-1"),
        *("1.a.1234567890123456-1", "1.a.1-12345678901234567", "null", "\0", "1.a.1e3-1"),
    ],
)
def test_anything_else_is_no_position(text: str) -> None:
    """Whatever does not look exactly so is not understood, and nothing is raised."""
    assert parse(text) is None


@given(points, st.one_of(st.just(""), points))
def test_what_was_joined_is_parsed(user: str, everyone: str) -> None:
    """A position says what it was made of, in characters that need no quoting anywhere."""
    text = join(user, everyone)

    assert Position(user, everyone) == parse(text)
    assert set(text) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-")
    assert len(text) <= position.MAX_LENGTH


@given(st.text())
def test_no_text_is_too_strange(text: str) -> None:
    """Parsing never raises, and what it understands is said the same way again."""
    parsed = parse(text)

    assert parsed is None or join(parsed.user, parsed.all) == text


def test_an_unknown_place_is_said() -> None:
    """Who is only followed in the stream for everyone has a position, too."""
    assert join("", ALL) == f"1.0.0-0.{ALL}"
    assert join("", "") == "1.0.0-0"


def test_the_parts_of_a_point() -> None:
    """The epoch, the place and the seq can be told; a place is its own point without an epoch."""
    assert position.epoch_of(USER) == "k3x9q2aa"
    assert position.place_of(USER) == position.place_of("1763630000000-61440")
    assert position.place_of(USER) == "1763630000000-61440"
    assert position.seq_of(USER) == position.seq_of("1763630000000-61440") == 15


@pytest.mark.parametrize(("number", "seq"), [(0, 0), (4095, 0), (4096, 1), (8191, 1), (8192, 2)])
def test_updates_carry_the_seq_before_them(number: int, seq: int) -> None:
    """A notification has a seq of its own; what follows it up to the next one shares that."""
    assert seq == position.seq_of(f"17-{number}")


def test_time_comes_first() -> None:
    """Places are sorted as numbers, by time and then by number."""
    places = ["5-4096", "5-8192", "10-4096", "10-40960"]

    assert places == sorted(["10-40960", "5-8192", "10-4096", "5-4096"], key=position.order)
    assert position.order("a.10-4096") == (10, 4096)
