"""Not too much of the same."""

from trioserver.rate_limit import RateLimited


class TestRateLimited:
    """Not too much of the same."""

    def test_interval(self) -> None:
        """One line per interval and key; the next one knows how many were held back."""
        limit = RateLimited(interval_seconds=10)

        assert [0, None, None, 2, None, 1] == [
            limit.due("a", now) for now in (100.0, 100.1, 109.9, 110.0, 115.0, 200.0)
        ]

    def test_keys_are_apart(self) -> None:
        """Each key has an interval of its own."""
        limit = RateLimited(interval_seconds=10)

        assert [0, 0, None, None] == [limit.due(key, 5.0) for key in "abab"]

    def test_keys_are_bounded(self) -> None:
        """However many keys there are, memory is not theirs; the oldest is forgotten."""
        limit = RateLimited(interval_seconds=10)

        for number in range(RateLimited.MAX_KEYS + 1):
            assert 0 == limit.due(str(number), 5.0)

        assert 0 == limit.due("0", 5.0)
        assert limit.due("2", 5.0) is None
