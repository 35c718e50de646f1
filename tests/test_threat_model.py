"""The threat model names tests that exist, modules that exist and settings that exist."""

import re
from pathlib import Path
from typing import Final

from trioserver.settings import all_settings

ROOT: Final = Path(__file__).parent.parent
PAGE: Final = (ROOT / "docs" / "threat-model.md").read_text()

ROWS: Final = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if re.match(r"\| (?!attack)", line) and line.count(" | ") == 3
]
"""Attack, limit, where, test."""


def names_in(path: Path) -> set[str]:
    """Return what the tests of a file are called; a state machine's end in ``TestCase``."""
    return set(re.findall(r"^\s*(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE)) | set(
        re.findall(r"^(Test\w+|\w*TestCase) =", path.read_text(), re.MULTILINE)
    )


def test_every_attack_has_a_limit_a_place_and_a_test() -> None:
    """A row without a test is a claim, and a test that is gone is none."""
    assert len(ROWS) > 60
    known: dict[str, set[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        known.setdefault(path.stem, set()).update(names_in(path))
    for attack, limit, where, tests in ROWS:
        assert limit, attack
        assert where, attack
        named = re.findall(r"`(\w+)::(\w+)`", tests)
        assert named, attack
        gone = [f"{module}::{name}" for module, name in named if name not in known.get(module, ())]
        assert [] == gone, attack


def test_every_place_is_there() -> None:
    """Who wants to read how it is done, finds it."""
    for attack, _, where, _ in ROWS:
        for name in re.findall(r"`([\w/.]+)`", where):
            path = ROOT / "trioserver" / name
            places = (path, path.with_suffix(".py"), ROOT / "supervisor" / f"{name}.py")
            assert any(place.exists() for place in places), (attack, name)


def test_every_limit_is_a_setting() -> None:
    """A name in capitals is one that an operator can set."""
    known = {one.env for one in all_settings().values()}
    for attack, limit, *_ in ROWS:
        for name in re.findall(r"`([A-Z][A-Z_]{4,})[=`]", limit):
            assert name in known, attack
