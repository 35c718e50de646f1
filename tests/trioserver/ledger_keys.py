"""The ledger's keys from outside: all of them at once, and the accidents that can befall them."""

from collections.abc import Sequence
from typing import Any, Final

import attrs

from tests.trioserver.ledger_calls import Caller
from trioserver import ledger

_LOOK: Final = """
local all = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
  local kind = redis.call('TYPE', key).ok
  local what
  if kind == 'hash' then what = redis.call('HGETALL', key)
  elseif kind == 'stream' then what = redis.call('XRANGE', key, '-', '+')
  elseif kind == 'zset' then what = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  else what = redis.call('GET', key) end
  all[#all + 1] = { key, kind, redis.call('PTTL', key), what }
end
return all
"""

# Entries cannot be changed, but a stream can be written once more.
_AGE: Final = """
local inbox, life, due, id, moment = KEYS[1], KEYS[2], KEYS[3], ARGV[1], ARGV[2]
local entries = redis.call('XRANGE', inbox, '-', '+')
local info, last = redis.call('XINFO', 'STREAM', inbox), nil
for i = 1, #info, 2 do
  if info[i] == 'last-generated-id' then last = info[i + 1] end
end
local lifetime = redis.call('PTTL', inbox)
redis.call('DEL', inbox)
for _, entry in ipairs(entries) do
  local fields, its = entry[2], nil
  for i = 1, #fields, 2 do if fields[i] == 'i' then its = fields[i + 1] end end
  for i = 1, #fields, 2 do
    if its == id and fields[i] == 'x' then fields[i + 1] = moment end
  end
  redis.call('XADD', inbox, entry[1], unpack(fields))
end
redis.call('XSETID', inbox, last)
redis.call('PEXPIRE', inbox, lifetime)
redis.call('HSET', life, 'expires', moment)
redis.call('ZADD', due, 'XX', moment, 'x:' .. id)
"""


@attrs.frozen
class Entry:
    """One entry of a stream."""

    place: str
    fields: dict[str, bytes]


class Look:
    """Everything that was in Redis at one moment."""

    def __init__(self, caller: Caller) -> None:
        found = caller.ask("EVAL", _LOOK, 0)
        self.kinds: dict[str, str] = {}
        self.lifetimes: dict[str, int] = {}
        """In ms, or -1 for ever."""
        self._values: dict[str, Any] = {}
        for name, kind, lifetime, value in found:
            key = name.decode()
            self.kinds[key] = kind.decode()
            self.lifetimes[key] = lifetime
            self._values[key] = value

    def fields(self, key: str) -> dict[str, str]:
        """Return a hash; empty if there is none."""
        flat = self._values.get(key, [])
        values = [item.decode(errors="replace") for item in flat]
        return dict(zip(values[::2], values[1::2], strict=True))

    def entries(self, key: str) -> list[Entry]:
        """Return a stream; empty if there is none."""
        return [
            Entry(
                place.decode(),
                {flat[i].decode(): flat[i + 1] for i in range(0, len(flat), 2)},
            )
            for place, flat in self._values.get(key, [])
        ]

    def scores(self, key: str) -> dict[str, int]:
        """Return a sorted set; empty if there is none."""
        flat = self._values.get(key, [])
        return {flat[i].decode(): int(flat[i + 1]) for i in range(0, len(flat), 2)}


class Copy:
    """All keys as they were, as a replica has them that did not hear of what came later."""

    def __init__(self, caller: Caller) -> None:
        self._dumps: list[tuple[bytes, int, bytes]] = [
            (key, max(0, caller.ask("PTTL", key)), caller.ask("DUMP", key))
            for key in caller.ask("KEYS", "*")
        ]

    def restore(self, caller: Caller) -> None:
        """Put everything back."""
        caller.ask("FLUSHALL")
        for key, lifetime, dump in self._dumps:
            caller.ask("RESTORE", key, lifetime, dump)


def age(caller: Caller, owner: ledger.Owner, notification_id: str, moment: int) -> None:
    """Let a notification have expired at ``moment`` (ms), as if that much time had passed."""
    home = ledger.partition_of(notification_id)
    life = ledger.notification_key(notification_id)
    assert home is not None
    assert life is not None
    keys: Sequence[str] = (ledger.key("inbox", owner), life, ledger.due_key(home))
    caller.ask("EVAL", _AGE, len(keys), *keys, notification_id, moment)
