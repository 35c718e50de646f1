"""The command as it is used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import machine, results, servers
from bench.client import BenchError
from bench.servers import LIMITS, Product
from bench.tokens import SECRET

OTHER = Path(__file__).with_name("other_server.py")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=machine.ROOT,
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )


def test_run_and_report(tmp_path: Path) -> None:
    """A run measures both servers in turns, keeps everything, and can be reported."""
    output = tmp_path / "out.json"

    done = bench(
        *("run", "echo", "--connections", "3", "--repeat", "1", "--scale", "0.0001"),
        *("--against", str(OTHER), "--json", str(output)),
    )

    assert 0 == done.returncode, done.stderr
    assert "0 lost, 0 doubled, 0 reordered, 0 failed, of 36 in 2 measurements." in done.stdout
    measured = results.load(output)
    assert [(3,)] == [row.connections for row in measured.rows]
    assert ["trioserver", "other_server"] == list(measured.rows[0].repetitions)
    assert measured.rows[0].valid
    assert "cpu_us" in measured.rows[0].ratios
    assert LIMITS["OUTBOX_MAX_FRAMES"] == measured.settings["OUTBOX_MAX_FRAMES"]
    assert "# Results" in bench("report", str(output)).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("run", "nothing"), 2, "nothing"),
        (("run", "echo", "--connections", "2,x"), 2, "numbers of connections"),
        (("run", "echo", "--connections", "0"), 2, "numbers of connections"),
        (("report", "nowhere.json"), 1, "bench: nowhere.json"),
    ],
)
def test_misuse(arguments: tuple[str, ...], code: int, words: str) -> None:
    """What cannot be done is one line, not a traceback."""
    done = bench(*arguments)

    assert code == done.returncode
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set for another server on this machine does not count for a measured one."""
    monkeypatch.setenv("WS_MAX_CONNECTIONS", "5")
    monkeypatch.setenv("JWT_SECRET", "of-another-server")

    settings = Product().settings()

    assert LIMITS["WS_MAX_CONNECTIONS"] == settings["WS_MAX_CONNECTIONS"]
    assert 1 == settings["WORKERS"]
    assert SECRET not in str(settings)


def test_limits_not_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that the server does not know is an error, not a wish."""
    monkeypatch.setattr(servers, "LIMITS", {**LIMITS, "NO_SUCH_LIMIT": 5})

    with pytest.raises(BenchError, match="NO_SUCH_LIMIT"):
        Product().settings()


def test_server_that_does_not_start(tmp_path: Path) -> None:
    """A server that ends at once is named, with its last words."""
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('not today')")

    with (
        pytest.raises(BenchError, match="not today"),
        servers.Other(file=broken).serving(tmp_path, os.getpid()),
    ):
        pass
