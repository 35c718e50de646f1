"""Topics: their names, and the patterns that stand for many of them. Pure.

A name has 1 to `MAX_NAME` characters of ``A-Z a-z 0-9 . : / _ @ ~ -``. In a pattern ``*`` is for
any number of characters, also none, but not for the separators ``.``, ``:`` and ``/``; ``**`` is
for any at all. So ``room.*`` stands for the rooms but not for what belongs to one of them,
``room.**`` for both.

Patterns come from settings and from tokens, names from clients. How long a match takes depends on
nothing but the lengths of both: there is no pattern that makes it long (`_fits`).
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

import attrs

MAX_NAME: Final = 128

MAX_LISTED: Final = 1000
"""Patterns in one setting."""

NONE: Final = "none"
"""As a setting, the empty list: an empty value counts as not set."""

_MEMORY: Final = 1 << 14
"""Matches that are remembered, of all patterns together."""

_SEPARATORS: Final = ".:/"

NAME_CHARACTERS: Final = "A-Za-z0-9.:/_@~-"
"""Of names, as in a regular expression..."""

NAME_IN_WORDS: Final = f"1 to {MAX_NAME} of A-Z a-z 0-9 . : / _ @ ~ -"
"""... and for people."""

_is_name: Final = re.compile(rf"[{NAME_CHARACTERS}]{{1,{MAX_NAME}}}").fullmatch
_is_pattern: Final = re.compile(rf"(?!.*\*\*\*)[*{NAME_CHARACTERS}]{{1,{MAX_NAME}}}").fullmatch
_parts: Final = re.compile(r"\*\*|\*|[^*]+").findall


def is_name(text: str) -> bool:
    """Return whether this may be the name of a topic."""
    return _is_name(text) is not None


@attrs.frozen(kw_only=True, cache_hash=True)
class Patterns:
    """A set of patterns, made by `of`. Falsy if there are none.

    Attributes:
        texts: The patterns as they were written, without repetitions.
    """

    texts: tuple[str, ...] = ()
    _names: frozenset[str] = attrs.field(default=frozenset(), eq=False, repr=False)
    """Those that stand for one topic each."""
    _beginnings: tuple[str, ...] = attrs.field(default=(), eq=False, repr=False)
    """Of those with nothing but ``**`` at the end, what is before it."""
    _others: tuple[tuple[str, ...], ...] = attrs.field(default=(), eq=False, repr=False)
    """All the rest, in stars and what is between them."""

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Patterns":
        """Return these patterns.

        Raises:
            ValueError: One is none; the text is the end of a sentence.
        """
        texts = tuple(dict.fromkeys(texts))
        names, beginnings, others = [], [], []
        for text in texts:
            if _is_pattern(text) is None:
                raise ValueError(
                    f"has {text[:MAX_NAME]!r}, which is no pattern: {NAME_IN_WORDS} with * or **"
                )
            if "*" not in text:
                names.append(text)
            elif text.endswith("**") and "*" not in text[:-2]:
                beginnings.append(text[:-2])
            else:
                others.append(tuple(_parts(text)))
        return cls(
            texts=texts,
            names=frozenset(names),
            beginnings=tuple(beginnings),
            others=tuple(others),
        )

    def __bool__(self) -> bool:
        """Return whether there are any."""
        return bool(self.texts)

    def matches(self, name: str) -> bool:
        """Return whether one of them stands for this topic.

        Args:
            name: Of a topic; of what is no name, the answer means nothing.
        """
        if name in self._names or name.startswith(self._beginnings):
            return True
        return bool(self._others) and _match(self, name)

    def any_fits(self, name: str) -> bool:
        """Return the same for the patterns that are not simple; `matches` remembers it."""
        # Numbers with a bit for each place of the name: where a character stands.
        places: dict[str, int] = {}
        for at, character in enumerate(name):
            places[character] = places.get(character, 0) | 1 << at
        apart = sum(places.get(separator, 0) for separator in _SEPARATORS)
        plain = (1 << len(name)) - 1 - apart
        return any(_fits(parts, places, plain, len(name)) for parts in self._others)


@lru_cache(maxsize=_MEMORY)
def _match(patterns: Patterns, name: str) -> bool:
    return patterns.any_fits(name)


def _fits(parts: Iterable[str], places: dict[str, int], plain: int, length: int) -> bool:
    """Return whether a pattern stands for a name, in one pass over the pattern.

    All ways to read the name are followed at once: `reached` has a bit for each place of the name
    up to which the pattern so far can stand for it. So nothing is ever tried again.

    Args:
        parts: Of the pattern.
        places: Where each character stands in the name.
        plain: Where others than separators stand.
        length: Of the name.
    """
    everywhere = (2 << length) - 1
    reached = 1
    for part in parts:
        if part == "**":
            reached = everywhere & -(reached & -reached)
        elif part == "*":
            # The addition carries from each place through the plain ones behind it.
            reached |= ((reached & plain) + plain) ^ plain
        else:
            for character in part:
                reached = (reached & places.get(character, 0)) << 1
            if not reached:
                return False
    return reached >> length == 1


def pattern_list(text: str) -> tuple[str, ...]:
    """Return the patterns in a list with commas between; none at all of `NONE`.

    Raises:
        ValueError: One is none, or they are too many; the text is the end of a sentence.
    """
    listed = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if listed == (NONE,):
        return ()
    if NONE in listed:
        raise ValueError(f"has {NONE} beside others")
    if len(listed) > MAX_LISTED:
        raise ValueError(f"has more than {MAX_LISTED} patterns")
    return Patterns.of(listed).texts


def show_list(patterns: Iterable[str]) -> str:
    """Return the text that `pattern_list` makes these of."""
    return ",".join(patterns) or NONE
