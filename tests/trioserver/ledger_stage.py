"""A real Redis and short words for the ledger's scripts, for tests that look at one step closely.

stage = Stage(redis)
one = stage.publish()
assert [one.id] == stage.read(device="phone").ids
"""

from typing import Any, Final

import attrs

from tests.redis_server import RedisServer
from tests.trioserver.ledger_calls import Caller, Ears
from tests.trioserver.ledger_keys import age
from trioserver import ledger
from trioserver.ledger import (
    Accepted,
    Change,
    Gap,
    Notice,
    Notification,
    Owner,
    Page,
    Rules,
    TopicRules,
)
from trioserver.position import epoch_of, place_of, seq_of

ANN: Final = "ann"
WEEK: Final = 7 * ledger.DAY_MS
PAYLOAD: Final = b'{"n":1}'
TRACE: Final = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@attrs.frozen
class Found:
    """A page, in words that tests compare."""

    page: Page

    @property
    def notices(self) -> list[Notice]:
        """The notifications on it."""
        return [item for item in self.page.items if isinstance(item, Notice)]

    @property
    def changes(self) -> list[tuple[str, list[str]]]:
        """The updates on it."""
        return [(one.state, one.ids) for one in self.page.items if isinstance(one, Change)]

    @property
    def gaps(self) -> list[tuple[int, int, int, str]]:
        """The gaps on it: from, to, missing, reason."""
        return [
            (one.from_seq, one.to_seq, one.missing, one.reason)
            for one in self.page.items
            if isinstance(one, Gap)
        ]

    @property
    def ids(self) -> list[str]:
        """Of the notifications."""
        return [notice.id for notice in self.notices]

    @property
    def seqs(self) -> list[int]:
        """Of the notifications."""
        return [notice.seq for notice in self.notices]

    @property
    def start(self) -> str:
        """Point from which was read."""
        return f"{self.page.epoch}.{self.page.start}"

    @property
    def reached(self) -> str:
        """Point up to which the page tells everything."""
        return f"{self.page.epoch}.{self.page.reached}"


class Stage:
    """One Redis, emptied, and the scripts called with the rules of `rules`."""

    def __init__(self, redis: RedisServer) -> None:
        self.caller = Caller(redis.path)
        self.caller.ask("FLUSHALL")
        self.rules = Rules()
        self.topic_rules = TopicRules()
        self._ears: Ears | None = None
        self._redis = redis

    @property
    def ears(self) -> Ears:
        """Somebody who listens to every channel, from now on."""
        if self._ears is None:
            self._ears = Ears(self._redis.path)
        return self._ears

    def close(self) -> None:
        """Close all connections."""
        self.caller.close()
        if self._ears is not None:
            self._ears.close()

    # --- scripts

    def publish(self, user: Owner = ANN, **options: Any) -> Accepted:
        """Publish; ``options`` are fields of `Notification`."""
        options.setdefault("id", new_id(user, self.caller.now()))
        options.setdefault("payload", PAYLOAD)
        options.setdefault("ttl_ms", WEEK)
        notification = Notification(user=user, **options)
        rules = self.topic_rules if isinstance(user, ledger.Topic) else self.rules
        return ledger.accepted(self.caller.run(ledger.publish(notification, rules=rules)))

    def publish_many(self, count: int, user: Owner = ANN, **options: Any) -> list[Accepted]:
        """Publish some, one after the other."""
        return [self.publish(user, **options) for _ in range(count)]

    def read(self, user: Owner = ANN, **options: Any) -> Found:
        """Read one page; ``options`` are those of `ledger.read`."""
        return Found(ledger.page(self.caller.run(ledger.read(user, **options))))

    def report(self, user: str = ANN, device: str = "phone", **options: Any) -> int:
        """Report; ``options`` are those of `ledger.report`."""
        command = ledger.report(user, rules=self.rules, device=device, **options)
        return ledger.acked(self.caller.run(command))

    def mark(self, user: str = ANN, device: str = "phone", **options: Any) -> tuple[int, int]:
        """Mark as read; ``options`` are those of `ledger.mark`."""
        options.setdefault("by", "me")
        command = ledger.mark(user, rules=self.rules, device=device, **options)
        return ledger.marked(self.caller.run(command))

    def cancel(self, notification_id: str, user: Owner = ANN) -> str:
        """Withdraw."""
        command = ledger.cancel(user, notification_id, rules=self.rules)
        return ledger.cancelled(self.caller.run(command))

    def due(self, user: Owner = ANN, limit: int = 50) -> tuple[int, int]:
        """Do what is due where ``user`` lives."""
        return ledger.settled(
            self.caller.run(ledger.due(home_of(user), rules=self.rules, limit=limit))
        )

    def raw(self, script: str, key: str, *arguments: str | bytes | int) -> Any:
        """Call a script as any language would."""
        return self.caller.run(("EVALSHA", ledger.SCRIPTS[script].sha, 1, key, *arguments))

    # --- what is stored

    def fields(self, key: str) -> dict[str, str]:
        """Return a hash."""
        flat = [item.decode() for item in self.caller.ask("HGETALL", key)]
        return dict(zip(flat[::2], flat[1::2], strict=True))

    def meta(self, user: Owner = ANN) -> dict[str, str]:
        """Return what is kept about a user."""
        return self.fields(ledger.key("meta", user))

    def life(self, notification_id: str) -> dict[str, str]:
        """Return what became of a notification."""
        return self.fields(life_key(notification_id))

    def inbox(self, user: Owner = ANN) -> list[tuple[str, dict[str, str]]]:
        """Return the entries of an inbox."""
        return self._entries(ledger.key("inbox", user))

    def events(self, user: Owner = ANN) -> list[dict[str, str]]:
        """Return the events of the partition of ``user``."""
        return [fields for _, fields in self._entries(ledger.events_key(home_of(user)))]

    def told(self, notification_id: str, user: Owner = ANN) -> list[str]:
        """Return the kinds of events of one notification, in order."""
        return [one["event"] for one in self.events(user) if one["id"] == notification_id]

    def schedule(self, user: Owner = ANN) -> dict[str, int]:
        """Return what is due when in the partition of ``user``."""
        flat = self.caller.ask("ZRANGE", ledger.due_key(home_of(user)), 0, -1, "WITHSCORES")
        return {flat[i].decode(): int(flat[i + 1]) for i in range(0, len(flat), 2)}

    def holes(self, user: Owner = ANN) -> list[tuple[int, int]]:
        """Return the ranges of seqs that were withdrawn; both halves of each must agree."""
        fields = self.fields(ledger.key("holes", user))
        ranges = sorted((int(name[1:]), int(fields[name])) for name in fields if name[0] == "s")
        assert {f"e{last}": str(first) for first, last in ranges} == {
            name: fields[name] for name in fields if name[0] == "e"
        }
        return ranges

    def names(self) -> list[str]:
        """Return the names of all keys."""
        return sorted(key.decode() for key in self.caller.ask("KEYS", "*"))

    def lifetime(self, key: str) -> int:
        """Return for how long a key lives, in ms."""
        lifetime: int = self.caller.ask("PTTL", key)
        return lifetime

    def unread(self, user: str = ANN) -> int:
        """Return how many are unread."""
        return int(self.meta(user)["unread"])

    # --- accidents

    def expire(self, *ids: str, user: Owner = ANN) -> None:
        """Let the time of these be over; nobody has noticed yet."""
        for one in ids:
            age(self.caller, user, one, self.caller.now() - 1)

    def sweep(self, *ids: str, user: Owner = ANN) -> None:
        """Let the time of these be over, and notice it."""
        self.expire(*ids, user=user)
        self.due(user)

    def fall_due(self, member: str, user: Owner = ANN) -> None:
        """Let the time come for something on the schedule."""
        self.caller.ask("ZADD", ledger.due_key(home_of(user)), "XX", self.caller.now() - 1, member)

    def _entries(self, key: str) -> list[tuple[str, dict[str, str]]]:
        entries = []
        for place, flat in self.caller.ask("XRANGE", key, "-", "+"):
            words = [item.decode() for item in flat]
            entries.append((place.decode(), dict(zip(words[::2], words[1::2], strict=True))))
        return entries


def home_of(user: Owner) -> str:
    """Return the partition of a user, of a topic, or of everyone."""
    return ledger.partition(user)


def new_id(user: Owner, now_ms: int = 0) -> str:
    """Return a new id for a user."""
    return ledger.new_id(home_of(user), now_ms)


def life_key(notification_id: str) -> str:
    """Return the key of a notification's life."""
    key = ledger.notification_key(notification_id)
    assert key is not None
    return key


def point_of(accepted: Accepted) -> str:
    """Return the point of a notification."""
    is_users = accepted.id.startswith("p")
    point = accepted.position.removeprefix("1." if is_users else "1.0.0-0.")
    assert seq_of(point) == accepted.seq
    return point


def place_in(accepted: Accepted) -> str:
    """Return the place of a notification in its inbox."""
    return place_of(point_of(accepted))


def epoch_in(accepted: Accepted) -> str:
    """Return the epoch in which a notification was accepted."""
    return epoch_of(point_of(accepted))
