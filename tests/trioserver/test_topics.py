"""Topics: what is a name, what patterns stand for, and how long it takes to tell."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioserver.topics import (
    MAX_LISTED,
    MAX_NAME,
    NONE,
    Patterns,
    is_name,
    pattern_list,
    show_list,
)

YES, NO = True, False

MATCHES: dict[str, tuple[str, str, bool]] = {
    # what: pattern, name, verdict
    "the name itself": ("status", "status", YES),
    "the beginning of a name": ("status", "status.a", NO),
    "the end of a name": ("status", "a.status", NO),
    "another case": ("Status", "status", NO),
    "a star": ("room.*", "room.7", YES),
    "a star for nothing": ("room.*", "room.", YES),
    "a star and no separator": ("room.*", "room", NO),
    "a star and a dot": ("room.*", "room.7.typing", NO),
    "a star and a colon": ("room.*", "room.7:typing", NO),
    "a star and a slash": ("room.*", "room.7/typing", NO),
    "a star and the other characters": ("*", "A-b_c@d~9", YES),
    "a star in the middle": ("room.*.typing", "room.7.typing", YES),
    "a star in the middle for too much": ("room.*.typing", "room.7.a.typing", NO),
    "a star at the beginning": ("*.news", "de.news", YES),
    "a star within a word": ("a*c", "abbc", YES),
    "a star that must give back": ("a*bc", "abbcbc", YES),
    "stars that must give back": ("*a*b*", "xxaxxbxx", YES),
    "stars and too little": ("*a*b*", "xxbxxaxx", NO),
    "what follows a star holds a separator": ("a*.b*c", "axx.byyc", YES),
    "two stars": ("news.**", "news.de.sport", YES),
    "two stars for nothing": ("news.**", "news.", YES),
    "two stars and no separator": ("news.**", "news", NO),
    "two stars for all": ("**", "a.b:c/d", YES),
    "two stars at the beginning": ("**.de", "a.b.de", YES),
    "two stars in the middle": ("a.**.z", "a.b.c.z", YES),
    "two stars in the middle for nothing": ("a.**.z", "a..z", YES),
    "two stars in the middle and too little": ("a.**.z", "a.z", NO),
    "both": ("**.x.*", "a.b.x.c", YES),
    "both, and a separator too many": ("**.x.*", "a.b.x.c.d", NO),
    "both, and the second place fits": ("**.x.*", "a.x.b.x.c", YES),
}


@pytest.mark.parametrize("what", MATCHES)
def test_what_patterns_stand_for(what: str) -> None:
    """Each stands for what it says and no more, alone and among others."""
    pattern, name, verdict = MATCHES[what]
    others = ["zzz", "zzz.**", "zzz*zzz"]
    assert verdict == Patterns.of([pattern]).matches(name)
    assert verdict == Patterns.of([*others, pattern]).matches(name)


def as_expression(pattern: str) -> re.Pattern[str]:
    """Return the same as a regular expression, which takes as long as it takes."""
    meaning = {"**": ".*", "*": "[^.:/]*"}
    parts = re.findall(r"\*\*|\*|[^*]+", pattern)
    return re.compile("".join(meaning.get(part) or re.escape(part) for part in parts))


PATTERNS = st.lists(st.sampled_from(["a", "b", ".", "ab", "*", "**"]), min_size=1, max_size=8)


@given(PATTERNS, st.text("ab.:", min_size=1, max_size=12))
def test_patterns_are_what_expressions_would_be(parts: list[str], name: str) -> None:
    """Whatever the pattern and the name, the verdict is that of the plain translation."""
    pattern = re.sub(r"\*{3,}", "**", "".join(parts))
    fits = as_expression(pattern).fullmatch(name) is not None
    assert fits == Patterns.of([pattern]).matches(name)


@pytest.mark.parametrize("pattern", ["a*" * 63 + "c", "**a" * 42 + "c", "*a**a" * 25 + "c"])
def test_no_pattern_takes_long(pattern: str) -> None:
    """Where an expression would try for ages, there is one pass over the pattern."""
    began = time.process_time()
    assert not Patterns.of([pattern]).matches("a" * (MAX_NAME - 1) + "b")
    assert time.process_time() - began < 1.0


def test_none_stand_for_nothing() -> None:
    """No patterns match no topic, and are false; others are true."""
    assert not Patterns()
    assert not Patterns.of([])
    assert not Patterns().matches("status")
    assert Patterns.of(["zzz"])


def test_equal_patterns_are_one_key() -> None:
    """Made of the same, they are equal and hash alike; repetitions do not count."""
    one, other = Patterns.of(["a", "b.*"]), Patterns.of(iter(["a", "b.*", "a"]))
    assert one == other
    assert {one} == {other}
    assert ("a", "b.*") == other.texts
    assert one != Patterns.of(["a"])


NO_PATTERNS = [
    "",
    "ä",
    "a b",
    "a\n",
    "a,b",
    "a***",
    "****",
    "a" * (MAX_NAME + 1),
    "a?",
    "[a]",
    "\0",
]


@pytest.mark.parametrize("text", NO_PATTERNS)
def test_what_is_no_pattern(text: str) -> None:
    """It is refused, with a message of bounded length."""
    with pytest.raises(ValueError, match="no pattern") as caught:
        Patterns.of(["a", text])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["a", "news.de:1/x_y@z~A-9", "a" * MAX_NAME, "none"])
def test_what_is_a_name(name: str) -> None:
    """Up to the longest, with every kind of character."""
    assert is_name(name)


@pytest.mark.parametrize("name", ["", "a*", "ä", "a b", "a\n", "a" * (MAX_NAME + 1), "a\0"])
def test_what_is_no_name(name: str) -> None:
    """Neither what is too short or too long, nor anything else."""
    assert not is_name(name)


def test_a_list_as_a_setting() -> None:
    """Commas between, spaces do not matter, nor do repetitions."""
    assert ("news.**", "room.*") == pattern_list(" news.**, room.* ,news.**,")


@pytest.mark.parametrize("text", [NONE, f" {NONE} ", "", " , "])
def test_an_empty_list_as_a_setting(text: str) -> None:
    """The word for it, and what a file may have in its place."""
    assert () == pattern_list(text)


@pytest.mark.parametrize("patterns", [(), ("a",), ("news.**", "room.*")])
def test_a_list_is_shown_as_it_would_be_written(patterns: tuple[str, ...]) -> None:
    """What is shown can be given again; also the empty one, as empty values count for nothing."""
    shown = show_list(patterns)
    assert shown
    assert patterns == pattern_list(shown)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a,b c", "no pattern"),
        (f"a,{NONE}", "beside others"),
        (",".join(f"t{number}" for number in range(MAX_LISTED + 1)), "more than"),
    ],
)
def test_what_is_no_list(text: str, problem: str) -> None:
    """It is refused, with what is wrong about it."""
    with pytest.raises(ValueError, match=problem):
        pattern_list(text)
