"""One stage for most plays; each has users of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ledger.stage import Stage, stage


@pytest.fixture(scope="package")
def built_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Two workers, and a Redis that is killed and started again."""
    with stage(tmp_path_factory.mktemp("stage")) as built:
        yield built


@pytest.fixture
def shared_stage(built_stage: Stage) -> Stage:
    """Return the stage that most plays share, healed from whatever was played before."""
    built_stage.heal()
    return built_stage


@pytest.fixture
def fresh_stage(tmp_path: Path) -> Iterator[Stage]:
    """Two workers and a Redis, of the test's own."""
    with stage(tmp_path) as built:
        yield built
