"""What the conformance tests share."""

import faulthandler

import pytest


@pytest.fixture(autouse=True)
def _patience(request: pytest.FixtureRequest) -> None:
    """Let slow tests have their own limit: stacks of all threads after 50 s would tell nothing."""
    if request.node.get_closest_marker("slow"):
        faulthandler.cancel_dump_traceback_later()
