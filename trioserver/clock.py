"""The wall clock as text: RFC 3339 with milliseconds."""

import time

from trioserver.messages import rfc3339


class Stamp:
    """Returns moments as RFC 3339 UTC, such as ``2026-11-20T06:19:42.000Z``.

    A busy worker asks thousands of times per second, mostly about the present second; formatting
    all of it costs twenty times what looking at the clock does.
    """

    __slots__ = ("_milliseconds", "_second", "_text", "_up_to_second")

    def __init__(self) -> None:
        self._milliseconds = -1
        self._text = ""
        self._second = -1
        self._up_to_second = ""

    def __call__(self) -> str:
        """Return the present moment."""
        return self.at(time.time_ns() // 1_000_000)

    def at(self, milliseconds: int) -> str:
        """Return a moment.

        Args:
            milliseconds: Since 1970.
        """
        if milliseconds != self._milliseconds:
            second, rest = divmod(milliseconds, 1000)
            if second != self._second:
                self._up_to_second = rfc3339(second * 1000)[: -len("000Z")]
                self._second = second
            self._milliseconds = milliseconds
            self._text = f"{self._up_to_second}{rest:03d}Z"
        return self._text
