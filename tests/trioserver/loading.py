"""Settings loaded for tests: from a tame environment, and refused in one line."""

from collections.abc import Mapping

import pytest

from trioserver.errors import SettingsError
from trioserver.settings_load import Loaded, load

SECRET = "k" * 32
HOME = {"HOME": "/home/jo"}


def environment(**values: str) -> Loaded:
    """Load from the environment alone."""
    return load({}, HOME | values, None)


def refusal(
    flags: Mapping[str, str] | None = None, environ: Mapping[str, str] | None = None
) -> str:
    """Return the one line with which this is refused."""
    with pytest.raises(SettingsError) as caught:
        load(flags or {}, HOME | dict(environ or {}), None)
    line = str(caught.value)
    assert line.isprintable()
    return line
