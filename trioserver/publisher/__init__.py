"""Publish notifications from a back end: plain, asyncio or Trio. It needs nothing but Redis.

    from trioserver.publisher import Publisher

    with Publisher("redis://redis.internal:6379/0") as publisher:
        accepted = publisher.publish(
            {"order": 1017}, user="42", type="order.shipped", idempotency_key="order-1017"
        )
        print(accepted.id, accepted.position)

`Publisher` blocks, `AsyncioPublisher` and `TrioPublisher` are awaited; all have the same methods:
`Publisher.publish`, `Publisher.cancel`, `Publisher.why`, `Publisher.notification`. A publish is one
round trip to Redis, and is repeated for some seconds if Redis does not answer; the notification
arrives once all the same. Other languages call the same script: see ``docs/publishing.md``.
"""

from trioserver.ledger import Accepted, TopicRules
from trioserver.publisher.asking import Ephemeral, PublishInterrupted, Result
from trioserver.publisher.fronts import AsyncioPublisher, Publisher, TrioPublisher
from trioserver.publisher.request import (
    IdempotencyConflict,
    Options,
    PayloadMisfit,
    PublishRefused,
    RateLimited,
)

__all__ = [
    "Accepted",
    "AsyncioPublisher",
    "Ephemeral",
    "IdempotencyConflict",
    "Options",
    "PayloadMisfit",
    "PublishInterrupted",
    "PublishRefused",
    "Publisher",
    "RateLimited",
    "Result",
    "TopicRules",
    "TrioPublisher",
]
