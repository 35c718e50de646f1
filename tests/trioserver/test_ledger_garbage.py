"""The ledger's scripts on keys in which somebody else has written.

An operator's slip, a restored dump of another version, a bug of ours: scripts run atomically, but
one that fails half-way leaves half of its writes behind. So none fails because of what it finds.
"""

import contextlib
from collections.abc import Iterator
from typing import Final

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.redis_server import RedisServer
from tests.trioserver.ledger_calls import Caller
from tests.trioserver.ledger_everyday import HOME, USER, Everyday
from trioserver import ledger
from trioserver.ledger import Notice

META: Final = (
    *("v", "epoch", "seq", "last", "unread", "trimmed", "expired", "update"),
    *("channel", "received", "read_to", "since", "base", "ends", "stranger"),
)
LIFE: Final = (
    *("state", "user", "seq", "place", "type", "at", "expires", "live", "fallback", "due"),
    *("payload", "trace", "collapse", "channel", "why", "r:a", "e:received"),
)

VALUES: Final = st.one_of(
    st.sampled_from(
        [
            *("", "0", "-1", "1", "2", "5", "nan", "inf", "1e400", "0x10", " 7", "7 ", "1.5"),
            *("0-0", "1-1", "-", "1-", "999999999999999-9999999999999999", "1-99999999999999999"),
            *("9007199254740993", "99999999999999999999", "read", "all", "abc.1-4096", "- - - -"),
            *(
                "99999999999999999999-1",
                "9" * 40,
                "0-0 0-0 0-0 - 1",
                "x y z - 99999999999999",
                "\x00",
                "%",
                '"',
                "\\",
                "a b",
            ),
        ]
    ),
    st.text(max_size=12),
)


def field(key: str, *names: str) -> st.SearchStrategy[tuple[str, ...]]:
    """Return commands that write into a hash."""
    return st.tuples(st.just("HSET"), st.just(key), st.sampled_from(names), VALUES)


def owned(kind: str, name: str) -> str:
    """Return a key of the user and a publisher's key."""
    return f"{ledger.key(kind, USER)}:{name}"


def slips(lives: list[str]) -> st.SearchStrategy[tuple[str, ...]]:
    """Return commands that nobody should run."""
    life = st.sampled_from(lives)
    members = st.builds(
        lambda kind, rest: kind + rest, st.sampled_from(["x:", "f:", "d:", ""]), VALUES
    )
    inbox = ledger.key("inbox", USER)
    entries = st.lists(st.tuples(st.sampled_from("itpxcuz"), VALUES), min_size=1, max_size=4)
    return st.one_of(
        field(ledger.key("meta", USER), *META),
        field(ledger.key("meta", USER), *META),
        field(ledger.key("cursors", USER), "epoch", "d:a", "d:-", "stranger"),
        field(ledger.key("holes", USER), "s1", "e1", "s3", "e3", "stranger"),
        st.tuples(st.just("HSET"), life, st.sampled_from(LIFE), VALUES),
        st.tuples(st.just("DEL"), life),
        st.tuples(st.just("ZADD"), st.just(ledger.due_key(HOME)), st.just("1"), members),
        st.tuples(st.just("SET"), st.just(owned("collapse", "k")), VALUES),
        st.tuples(st.just("SET"), st.just(owned("idem", "i")), VALUES),
        entries.map(lambda pairs: ("XADD", inbox, "*", *(part for pair in pairs for part in pair))),
        st.just(("XSETID", inbox, "9999999999999999-1")),
        st.just(("DEL", inbox)),
        st.just(("DEL", ledger.key("meta", USER))),
    )


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    """A connection to a Redis."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as redis, Caller(redis.path) as caller:
        yield caller


@given(data=st.data())
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.reuse, Phase.generate, Phase.shrink],
)
@pytest.mark.timeout(300)  # shrinking a failure takes longer than success
def test_no_script_fails_because_of_what_it_finds(caller: Caller, data: st.DataObject) -> None:
    """Whatever stands in its keys, each script does its work, and what comes next is delivered."""
    caller.ask("FLUSHALL")
    everyday = Everyday(caller)
    for key in (None, "k"):
        everyday.publish(collapse_key=key)
    everyday.publish(idempotency_key="j")
    everyday.everything()
    lives = [ledger.notification_key(one) or "" for one in everyday.ids]
    for _ in range(data.draw(st.integers(1, 3), label="slips")):
        slip = data.draw(slips(lives), label="slip")
        with contextlib.suppress(RuntimeError):  # Redis does not allow every one
            caller.ask(*slip)
    everyday.everything()

    page = everyday.read("c")
    published = everyday.publish()
    following = everyday.read("c", f"{page.epoch}.{page.reached}")
    assert "accepted" == published.outcome
    assert published.id in [item.id for item in following.items if isinstance(item, Notice)]
    assert following.unread >= 0
