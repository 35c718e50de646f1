"""Fixtures of the supervisor's tests."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.supervisor.harness import Family, Server, short_directory


@pytest.fixture
def directory() -> Iterator[Path]:
    """Return a directory with a short path."""
    with short_directory() as path:
        yield path


@pytest.fixture
def family() -> Iterator[Family]:
    """Return a place for children of the test, who are killed and reaped afterwards."""
    family = Family()
    yield family
    family.close()


@pytest.fixture
def start(directory: Path) -> Iterator[Callable[..., Server]]:
    """Return a function that starts a supervisor; all of them are ended afterwards."""
    with ExitStack() as servers:

        def start(**how: object) -> Server:
            server = Server(directory, **how)  # type: ignore[arg-type]
            servers.callback(server.close)
            return server

        yield start
