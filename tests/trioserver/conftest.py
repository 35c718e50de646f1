"""What several tests stand on: a Redis, the ledger's scripts, the command."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.redis_server import RedisServer
from tests.trioserver.ledger_stage import Stage
from tests.trioserver.terminal import Ran, Run
from trioserver.cli import main


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis for all tests of a file; a file may have its own way."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def stage(redis: RedisServer) -> Iterator[Stage]:
    """It is empty when a test begins."""
    stage = Stage(redis)
    yield stage
    stage.close()


@pytest.fixture
def run(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    redis: RedisServer,
) -> Run:
    """Run ``trioserver``, with an empty Redis."""
    redis.command("FLUSHALL")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REDIS_URL", redis.url)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "state"))

    def command(*arguments: str) -> Ran:
        try:
            main(arguments)
        except SystemExit as end:
            return Ran(end.code, *capfd.readouterr())
        return Ran(0, *capfd.readouterr())

    return command
