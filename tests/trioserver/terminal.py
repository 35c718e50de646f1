"""What is seen at a terminal when ``trioserver`` has run there."""

from collections.abc import Callable

import attrs


@attrs.frozen
class Ran:
    """How a command ended."""

    code: object
    out: str
    err: str


Run = Callable[..., Ran]
"""Runs it with these arguments."""
