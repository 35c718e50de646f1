"""What the tests of the ledger's scripts stand on."""

from collections.abc import Iterator

import pytest

from tests.redis_server import RedisServer
from tests.trioserver.ledger_stage import Stage


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
