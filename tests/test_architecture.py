"""The documents are true: what the code has is in them, and what is in them exists."""

import re
from pathlib import Path

import pytest

from trioserver.cli import cli
from trioserver.errors import CloseReason
from trioserver.messages import RESERVED_TYPES
from trioserver.tally import ERROR_CODES, OTHER

ROOT = Path(__file__).parent.parent
PROTOCOL = (ROOT / "docs/protocol.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
README = (ROOT / "README.md").read_text()


def test_the_close_codes_of_the_page_are_those_of_the_code() -> None:
    """Each row is a CloseReason with its code, name and advice, and none is missing."""
    table = PROTOCOL.partition("<!-- close codes -->")[2].partition("\n\nYour own")[0]
    rows = re.findall(r"^\| (\d{4}) \| `(\w+)` \| (yes|no) \|", table, re.MULTILINE)
    documented = {(int(code), name, advice == "yes") for code, name, advice in rows}
    known = {
        (reason.code, reason.label, reason.reconnect)
        for reason in CloseReason
        if not reason.by_peer
    }
    assert known == documented


def test_close_frames_have_room_for_their_text() -> None:
    """Every reason's text fits into a close frame."""
    assert all(len(reason.text.encode()) <= 123 for reason in CloseReason)


def test_every_error_code_is_documented() -> None:
    """A client's developer finds each code of ``error`` that this version sends."""
    assert {code for code in ERROR_CODES if code != OTHER} == set(
        re.findall(r"`(\w+)`", PROTOCOL.partition("`error` codes:")[2].partition("##")[0])
    )


def test_what_the_server_says_cannot_be_published() -> None:
    """Every message type in the page's tables, except notification, is reserved."""
    said, _, _ = PROTOCOL.partition("## Notifications that are kept")
    named = set(re.findall(r"^\| `(\w+)` \|", said, re.MULTILINE))
    assert named <= RESERVED_TYPES


@pytest.mark.parametrize("package", ["trioserver", "supervisor"])
def test_every_module_is_on_the_map(package: str) -> None:
    """ARCHITECTURE.md names each module, so that the map is the table of contents."""
    modules = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__", "__main__"}
    missing = sorted(name for name in modules if f"`{name}`" not in ARCHITECTURE)
    assert [] == missing


def test_every_command_is_in_the_readme() -> None:
    """A newcomer finds each command of ``trioserver --help``."""
    assert [] == [
        name
        for name in cli.commands
        if f"`trioserver {name}" not in README and f"`{name}`" not in README
    ]


def test_modules_mirror_their_tests() -> None:
    """Each module has its own test file, or is proved by a whole run."""
    # Composition roots and what only lives in processes of its own.
    by_whole_runs = {"cli", "worker", "listen", "drain", "__main__", "__init__", "shared"}
    # Tables: held against the documents, here and in test_metric_names.
    by_whole_runs |= {"errors", "metric_families", "tally"}
    modules = {path.stem for path in (ROOT / "trioserver").glob("*.py")} - by_whole_runs
    tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests/trioserver").glob("*.py")}
    assert [] == sorted(modules - tested)
