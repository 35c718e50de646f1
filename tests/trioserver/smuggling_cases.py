r"""Requests that two parsers could read in two ways, and what each port says to them.

A file of `CORPUS` has comments, of which the second names the statuses, and the bytes: line breaks
do not count, escapes do (``\r``, ``\n``, ``\0``, ``\x0b``). ``CANARY`` stands for a whole
request that must never be served.
"""

import re
from pathlib import Path
from typing import Final

import attrs

CANARY: Final = b"GET /canary HTTP/1.1\r\nHost: x\r\n\r\n"
CORPUS: Final = Path(__file__).with_name("smuggling")


@attrs.frozen(kw_only=True)
class Case:
    """One file."""

    data: bytes
    internal: int
    """Status of the only answer on the internal port."""
    public: int
    """And on the public one."""


def read(path: Path) -> Case:
    """Return what a file says."""
    lines = path.read_text("ascii").splitlines()
    statuses = re.fullmatch(r"# internal (\d{3}), public (\d{3})", lines[1])
    assert statuses is not None, path
    text = "".join(line for line in lines if not line.startswith("#"))
    data = text.encode().decode("unicode_escape").encode("latin-1")
    assert b"CANARY" in data, path
    internal, public = map(int, statuses.groups())
    return Case(data=data.replace(b"CANARY", CANARY), internal=internal, public=public)


CASES: Final = {path.stem: read(path) for path in sorted(CORPUS.glob("*.txt"))}
