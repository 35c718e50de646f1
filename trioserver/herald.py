"""Says in Redis which topics are kept, for publishers that have no settings (`kept_topics`).

Every worker does. It repeats itself: soon at first, because workers of an older generation with
other settings may have had a word meanwhile; then seldom, because Redis may lose its memory.
"""

import random
from collections.abc import Callable
from typing import Final

import trio

from trioserver import kept_topics
from trioserver.errors import RedisError
from trioserver.ledger import TopicRules
from trioserver.redis_link import RedisLink

FIRST_PAUSE: Final = 1.0
LAST_PAUSE: Final = 20.0
"""Seconds between two words: doubled each time, up to this; ± `JITTER`."""

JITTER: Final = 0.1
"""Part of a pause: workers that started together need not speak together."""


async def keep_saying(
    link: RedisLink,
    rules: TopicRules,
    *,
    is_over: Callable[[], bool],
    log_trouble: Callable[[str], None],
) -> None:
    """Say what is kept until it is over: then others know better.

    Args:
        link: To Redis.
        rules: What is kept.
        is_over: Whether this worker is on its way out; asked before each word.
        log_trouble: Called with why Redis did not take it; limits its own rate.

    Cancellation:
        Safe at any time.
    """
    pause = FIRST_PAUSE
    while not is_over():
        try:
            await link.execute(*kept_topics.said(rules))
        except RedisError as problem:
            log_trouble(str(problem))
        await trio.sleep(pause * random.uniform(1 - JITTER, 1 + JITTER))  # noqa: S311 - spreads load
        pause = min(LAST_PAUSE, pause * 2)
