"""Not too much of the same: which lines of a log are held back, and counted."""

import math


class RateLimited:
    """Lets one line through per key and interval, and counts those that it held back.

    Pure: the caller says what time it is.

        held_back = malformed.due("not JSON", now)
        if held_back is not None:
            log.warning("malformed notification", reason="not JSON", held_back=held_back)
    """

    MAX_KEYS = 1024
    """Beyond it the oldest key is forgotten, so that hostile keys cost no memory."""

    __slots__ = ("_interval", "_seen")

    def __init__(self, interval_seconds: float) -> None:
        self._interval = interval_seconds
        self._seen: dict[str, tuple[float, int]] = {}

    def due(self, key: str, now: float) -> int | None:
        """Return how many lines were held back since the last one; None holds this one back.

        Args:
            key: What counts as "the same".
            now: Seconds of a clock that does not go backwards.
        """
        last, held_back = self._seen.get(key, (-math.inf, 0))
        if now - last < self._interval:
            self._seen[key] = (last, held_back + 1)
            return None
        self._seen.pop(key, None)
        if len(self._seen) >= self.MAX_KEYS:
            del self._seen[next(iter(self._seen))]
        self._seen[key] = (now, 0)
        return held_back
