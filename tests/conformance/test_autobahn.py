"""Autobahn|Testsuite against the echo server, case by case. Skipped without a Python 2.7."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import pytest

from tests.conformance import autobahn
from tests.conformance.autobahn import Allowed, Result
from tests.conformance.echo_server import Summary

RULES = ["1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "10.*"]
INSTALLATION = int(autobahn.INSTALL_SECONDS)

needs_suite = pytest.mark.usefixtures("suite")

MIB = 1 << 20


@pytest.fixture(scope="module")
def suite() -> None:
    """Install the test suite, or say loudly that it cannot be."""
    try:
        autobahn.available()
    except autobahn.Unavailable as why:
        pytest.skip(f"AUTOBAHN|TESTSUITE NOT RUN, conformance is unproved: {why}")


def verdicts(
    directory: Path, cases: list[str], *arguments: str, seconds: float = 55
) -> tuple[dict[str, Result], Summary]:
    """Run cases against a server of their own."""
    with autobahn.echo_server(*arguments) as (port, summaries):
        results = autobahn.run(port, cases, directory, seconds)
    (summary,) = summaries
    assert summary.connections == len(results)
    return results, summary


@needs_suite
@pytest.mark.timeout(60 + INSTALLATION)
def test_framing_fragments_texts_and_closes(tmp_path: Path) -> None:
    """Sections 1 to 7 and 10: all 247 cases OK, but for the list; the server has no bugs."""
    results, _ = verdicts(tmp_path, RULES, "--max-message", str(MIB))
    assert autobahn.surprises(results, autobahn.allowed("rules")) == []
    assert len(results) == 247


@needs_suite
@pytest.mark.timeout(60 + INSTALLATION)
def test_extensions_are_not_claimed(tmp_path: Path) -> None:
    """Sections 12 and 13: the 216 cases of compression find none offered."""
    results, _ = verdicts(tmp_path, ["12.*", "13.*"])
    assert autobahn.surprises(results, autobahn.allowed("without_extensions")) == []
    assert len(results) == 216


@needs_suite
@pytest.mark.slow
@pytest.mark.timeout(200 + INSTALLATION)
def test_large_messages_and_many_fragments(tmp_path: Path) -> None:
    """Section 9 with limits of 16 MiB and 131,072 fragments: all 54 cases OK."""
    limits = ("--max-message", str(16 * MIB), "--max-fragments", str(1 << 17))
    results, _ = verdicts(tmp_path, ["9.*"], *limits, seconds=180)
    assert autobahn.surprises(results, autobahn.allowed("raised_limits")) == []
    assert len(results) == 54


@needs_suite
@pytest.mark.slow
@pytest.mark.timeout(200 + INSTALLATION)
def test_large_messages_are_refused_as_shipped(tmp_path: Path) -> None:
    """Section 9 with the product's limits: whatever is not OK is 1009, and costs no memory."""
    results, summary = verdicts(tmp_path, ["9.*"], seconds=180)
    assert autobahn.surprises(results, autobahn.allowed("product_limits")) == []
    assert Counter(result.ok for result in results.values()) == {True: 12, False: 42}
    assert summary.closes == {"too_big": 42, "peer_closed": 12}
    assert summary.peak_rss - summary.idle_rss <= 32 * MIB


@needs_suite
@pytest.mark.slow
@pytest.mark.timeout(900 + INSTALLATION)
def test_compressed_messages(tmp_path: Path) -> None:
    """Sections 12 and 13 with compression on, beyond the product's other limits: all 216 cases."""
    options = ("--deflate", "--max-message", str(MIB), "--max-fragments", str(1 << 12))
    sections = [f"12.{number}" for number in range(1, 6)]
    sections += [f"13.{number}" for number in range(1, 8)]

    def judged(section: str) -> dict[str, Result]:
        directory = tmp_path / section
        directory.mkdir()
        return verdicts(directory, [f"{section}.*"], *options, seconds=400)[0]

    results: dict[str, Result] = {}
    # Client and server take turns, so that two of each keep two cores busy.
    with ThreadPoolExecutor(2) as executor:
        for part in executor.map(judged, sections):
            results |= part
    assert autobahn.surprises(results, autobahn.allowed("compression")) == []
    assert len(results) == 216


def test_the_list_is_exact() -> None:
    """A case beside the list, another behaviour, code or end, and an entry too many are found."""
    good = Result(behaviour="OK", behaviour_close="OK", code=1000)
    bad = Result(behaviour="FAILED", behaviour_close="OK", code=1009)
    entry = Allowed(case="1.*", behaviour="FAILED", codes=(1009,), reason="x")
    assert autobahn.surprises({"1.1": bad, "2.1": good}, [entry]) == []
    assert len(autobahn.surprises({"1.1": bad, "2.1": bad}, [entry])) == 1
    assert len(autobahn.surprises({"1.1": good}, [entry])) == 1
    assert len(autobahn.surprises({"2.1": good}, [entry])) == 1
    assert len(autobahn.surprises({"1.1": bad}, [entry, entry])) == 0
    for other in (
        attrs.evolve(bad, code=0),
        attrs.evolve(bad, behaviour_close="FAILED"),
        attrs.evolve(bad, behaviour="NON-STRICT"),
    ):
        assert len(autobahn.surprises({"1.1": other}, [entry])) == 1
