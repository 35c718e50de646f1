"""The routes' decisions that need no process."""

import pytest

from trioserver.gateway.app import prefers_json


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", False),
        ("*/*", False),
        ("application/json", True),
        ("Application/JSON; q=0.5", True),
        ("application/json;q=0", False),
        ("application/json;q=x", False),
        ("application/json, text/plain;q=0.5", True),
        ("application/json;q=0.5, text/plain", False),
        ("application/json;v=1;q=0.9, */*;q=0.1", True),
        ("text/html,application/xhtml+xml,*/*;q=0.8", False),
        # What Prometheus sends.
        ("application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.5", False),
    ],
)
def test_json_is_for_those_who_name_it(accept: str, *, expected: bool) -> None:
    """JSON only where it is named and liked no less than text."""
    assert expected == prefers_json(accept)
