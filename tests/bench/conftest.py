"""Both clients, ready to run."""

import shutil
from pathlib import Path

import pytest

from bench import client
from bench import tokens as bench_tokens
from bench.client import Kind, Program


@pytest.fixture(scope="session", params=["c", "python"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Return each of the clients in turn."""
    kind: Kind = request.param
    if kind == "c" and shutil.which("cc") is None:
        pytest.skip("no C compiler")
    return client.program(tmp_path_factory.mktemp("client"), kind)


TOPIC = "bench:tests"
"""What the tokens of `joining` join."""


@pytest.fixture(scope="session")
def joining(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tokens of the same users that join a topic."""
    return bench_tokens.write(tmp_path_factory.mktemp("tokens") / "tokens", 40, (TOPIC,))


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tokens of forty users."""
    return bench_tokens.write(tmp_path_factory.mktemp("tokens") / "tokens", 40)
