"""Autobahn|Testsuite: found, installed, run, and its verdicts held against ``allowed.toml``.

It runs on Python 2.7 only, so it has an interpreter and a place of its own: ``.cache/`` in the
checkout, which ignores itself in git. `Unavailable` says in one line what is missing.
"""

import contextlib
import fnmatch
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from tests.conformance.echo_server import Summary
from tests.running import eventually

REQUIREMENT: Final = "autobahntestsuite==25.10.1"
HERE: Final = Path(__file__).parent
CACHE: Final = HERE.parents[1] / ".cache"
AGENT: Final = "trioserver"

INSTALL_SECONDS: Final = 300.0
START_SECONDS: Final = 15.0

# zope's namespace packages need their .pth files, which only site directories have read.
STARTER: Final = """
import site, sys
site.addsitedir(sys.argv.pop(1))
from autobahntestsuite.wstest import run
run()
"""


class Unavailable(Exception):  # noqa: N818 - reads as the state it reports
    """The test suite cannot be run on this machine."""


class Ended(Exception):  # noqa: N818 - reads as the state it reports
    """The echo server did not start."""


@attrs.frozen(kw_only=True)
class Result:
    """Autobahn's verdict on one case."""

    behaviour: str
    behaviour_close: str
    code: int
    """The close code it got, or 0."""

    @property
    def ok(self) -> bool:
        """Whether there is nothing to explain."""
        return (self.behaviour, self.behaviour_close) == ("OK", "OK")


@attrs.frozen(kw_only=True)
class Allowed:
    """One entry of ``allowed.toml``."""

    case: str
    behaviour: str
    behaviour_close: str = "OK"
    codes: Sequence[int] = ()
    reason: str

    def covers(self, case: str) -> bool:
        """Tell whether the entry is about ``case``."""
        return fnmatch.fnmatchcase(case, self.case)

    def matches(self, result: Result) -> bool:
        """Tell whether a case behaved as the entry says."""
        same = (self.behaviour, self.behaviour_close) == (result.behaviour, result.behaviour_close)
        return same and (not self.codes or result.code in self.codes)


def allowed(run: str) -> list[Allowed]:
    """Return the entries for one run."""
    tables = tomllib.loads((HERE / "allowed.toml").read_text())
    return [Allowed(**entry) for entry in tables.get(run, [])]


def surprises(results: dict[str, Result], entries: list[Allowed]) -> list[str]:
    """Return one line for every case that did not behave as it should."""
    found = []
    for case, result in results.items():
        entry = next((entry for entry in entries if entry.covers(case)), None)
        if entry is None and not result.ok:
            found.append(f"{case}: {result}")
        elif entry is not None and not entry.matches(result):
            found.append(f"{case}: {result}, where the list has {entry}")
    return found + [
        f"{entry.case}: no such case"
        for entry in entries
        if not any(entry.covers(case) for case in results)
    ]


def python2() -> Path:
    """Return a Python 2.7 that runs and has pip: from PATH, or one of pyenv's.

    Raises:
        Unavailable: There is none.
    """
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    on_path = shutil.which("python2.7")
    candidates = [Path(on_path)] if on_path else []
    candidates += sorted(root.glob("versions/2.7.*/bin/python2.7"), reverse=True)
    for candidate in candidates:
        # A shim of pyenv may be there without its interpreter.
        command = [str(candidate), "-m", "pip", "--version"]
        if subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0:
            return candidate
    raise Unavailable("there is no Python 2.7 with pip, on PATH or in ~/.pyenv/versions")


def install(python: Path) -> Path:
    """Return where the test suite is, after installing it if it is not there yet.

    Raises:
        Unavailable: pip could not install it; the text is its last line.
    """
    place = CACHE / REQUIREMENT.replace("==", "-")
    if place.is_dir():
        return place
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        target = Path(scratch, "target")
        command = [str(python), "-m", "pip", "install", "--target", str(target), REQUIREMENT]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=INSTALL_SECONDS
        )
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise Unavailable(f"pip cannot install {REQUIREMENT}: {lines[-1:]}")
        # Another test run may have been quicker.
        with contextlib.suppress(OSError):
            target.rename(place)
    return place


def available() -> tuple[Path, Path]:
    """Return the interpreter and the place of the test suite.

    Raises:
        Unavailable: Either cannot be had.
    """
    python = python2()
    return python, install(python)


@contextlib.contextmanager
def echo_server(*arguments: str) -> Iterator[tuple[int, list[Summary]]]:
    """Run an echo server; yield its port and a list that has its summary afterwards."""
    command = [sys.executable, "-m", "tests.conformance.echo_server", "0", *arguments]
    summaries: list[Summary] = []
    with (
        tempfile.NamedTemporaryFile("w+") as errors,
        tempfile.NamedTemporaryFile("w+") as output,
        subprocess.Popen(command, stdout=output, stderr=errors, cwd=HERE.parents[1]) as process,
    ):
        try:
            port = eventually(lambda: _port(process, output.name), START_SECONDS, "it listens")
            yield port, summaries
        except Ended as end:
            raise AssertionError(Path(errors.name).read_text()) from end
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(START_SECONDS)
            finally:
                process.kill()
        errors.seek(0)
        trouble = errors.read()
        assert (process.returncode, trouble) == (0, ""), trouble
        summaries.append(Summary.parse(Path(output.name).read_text().splitlines()[-1]))


def _port(process: subprocess.Popen[bytes], output: str) -> int | None:
    if process.poll() is not None:
        raise Ended
    found = re.search(r"^listening on ([0-9]+)\n", Path(output).read_text())
    return int(found[1]) if found else None


def run(port: int, cases: list[str], directory: Path, seconds: float) -> dict[str, Result]:
    """Run cases against a server; the report stays in ``directory``.

    Raises:
        Unavailable: There is no test suite to be had.
    """
    python, place = available()
    specification = {
        "outdir": str(directory / "report"),
        "servers": [{"agent": AGENT, "url": f"ws://127.0.0.1:{port}/ws"}],
        "cases": cases,
        "exclude-cases": [],
        "exclude-agent-cases": {},
    }
    (directory / "specification.json").write_text(json.dumps(specification))
    command = [str(python), "-c", STARTER, str(place), "-m", "fuzzingclient"]
    done = subprocess.run(
        [*command, "-s", str(directory / "specification.json")],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    index: dict[str, dict[str, dict[str, Any]]] = json.loads(
        (directory / "report" / "index.json").read_text()
    )
    return {
        case: Result(
            behaviour=verdict["behavior"],
            behaviour_close=verdict["behaviorClose"],
            code=verdict["remoteCloseCode"] or 0,
        )
        for case, verdict in index[AGENT].items()
    }
