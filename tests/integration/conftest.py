"""One server for the tests that do no harm to it."""

from collections.abc import Iterator

import pytest

from tests.running import Running, running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Four workers on the embedded Redis."""
    with running(tmp_path_factory.mktemp("server"), workers=4) as started:
        yield started
