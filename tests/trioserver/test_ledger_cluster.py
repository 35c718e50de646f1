"""The ledger's scripts on a real Redis Cluster: three nodes, users everywhere."""

import ast
import re
import zlib
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.redis_cluster import RedisCluster
from tests.redis_server import RedisServer
from tests.running import eventually
from tests.trioserver.ledger_calls import Caller, Ears, Heard
from trioserver import ledger
from trioserver.ledger import (
    Accepted,
    Command,
    Gap,
    Notice,
    Notification,
    Owner,
    Page,
    Rules,
    Topic,
    TopicRules,
)

ROOM: Final = 5
RULES: Final = Rules(max_length=ROOM)
TOPIC_RULES: Final = TopicRules(max_length=ROOM)
DAY: Final = 86_400_000
SECONDS: Final = 5.0

ODD: Final = "ü {p07} %:*"
"""A user with everything that must not get into a key, a hash tag above all."""

OWNERS: Final[tuple[Owner, ...]] = (
    *(f"user-{number}" for number in range(60)),
    *(Topic(f"room:{number}") for number in range(20)),
    *(ODD, "all", None),
)


class Nodes:
    """A cluster, and a connection to each of its nodes."""

    def __init__(self, cluster: RedisCluster) -> None:
        self.cluster = cluster
        self.callers = {node.port: Caller(node.path) for node in cluster.nodes}

    def run(self, command: Command) -> Any:
        """Run a script where its key lives."""
        key = command[3]
        assert isinstance(key, str)
        return self.callers[self.cluster.owner(key).port].run(command)

    def publish(self, owner: Owner, **options: Any) -> Accepted:
        """Publish something."""
        notification = Notification(
            user=owner,
            payload=b'{"n":1}',
            ttl_ms=DAY,
            id=ledger.new_id(home(owner), self.now()),
            **options,
        )
        rules = TOPIC_RULES if isinstance(owner, Topic) else RULES
        return ledger.accepted(self.run(ledger.publish(notification, rules=rules)))

    def read(self, owner: Owner, device: str) -> Page:
        """Let a device connect."""
        command = ledger.read(owner, device=device, connect=True, ack=True)
        return ledger.page(self.run(command))

    def report(self, user: str, **said: Any) -> int:
        """Say how far a device is."""
        command = ledger.report(user, rules=RULES, device="d", **said)
        return ledger.acked(self.run(command))

    def mark(self, user: str, **which: Any) -> tuple[int, int]:
        """Mark something as read."""
        command = ledger.mark(user, rules=RULES, device="d", by="me", **which)
        return ledger.marked(self.run(command))

    def cancel(self, owner: Owner, published: Accepted) -> str:
        """Withdraw something."""
        return ledger.cancelled(self.run(ledger.cancel(owner, published.id, rules=RULES)))

    def due(self, where: str) -> int:
        """Do all that is on a partition's schedule, as if its time had come."""
        schedule = ledger.due_key(where)
        node = self.cluster.owner(schedule)
        members = node.command("ZRANGE", schedule, 0, -1)
        assert isinstance(members, list)
        for member in members:
            node.command("ZADD", schedule, 1, member)
        done, _ = ledger.settled(self.run(ledger.due(where, rules=RULES, limit=1000)))
        return done

    def now(self) -> int:
        """Return the time, as one of them sees it."""
        return next(iter(self.callers.values())).now()

    def close(self) -> None:
        """Close the connections."""
        for caller in self.callers.values():
            caller.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """One cluster for all tests: it takes two seconds to join."""
    with RedisCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def nodes(cluster: RedisCluster) -> Iterator[Nodes]:
    """The cluster, empty."""
    for node in cluster.nodes:
        node.command("FLUSHALL")
    nodes = Nodes(cluster)
    yield nodes
    nodes.close()


def home(owner: Owner) -> str:
    """Return the owner's partition, by the rule and not by the product's function."""
    if isinstance(owner, Topic):
        return f"t{zlib.crc32(owner.name.encode()) % 16:02d}"
    return "all" if owner is None else f"p{zlib.crc32(owner.encode()) % 64:02d}"


def channel(owner: Owner) -> str:
    """Return where the owner's notifications are announced."""
    if isinstance(owner, Topic):
        return f"topic:{owner.name}"
    return "channels:broadcast" if owner is None else f"user_noti:{owner}"


def use_publishers(nodes: Nodes, owner: Owner) -> None:
    """Run what publishers run, in each of its ways."""
    first = nodes.publish(owner, idempotency_key="once", collapse_key="ü:{}")
    again = nodes.publish(owner, idempotency_key="once", collapse_key="ü:{}")
    assert (first.id, "duplicate") == (again.id, again.outcome)
    more: dict[str, int] = {} if isinstance(owner, Topic) else {"fallback_after_ms": DAY}
    nodes.publish(owner, collapse_key="ü:{}", **more)
    for at in (DAY, 2 * DAY):
        later = nodes.publish(owner, deliver_at_ms=nodes.now() + at, **more)
        assert "scheduled" == later.outcome
    assert "cancelled" == nodes.cancel(owner, later)
    withdrawn = nodes.publish(owner)
    assert "cancelled" == nodes.cancel(owner, withdrawn)
    for _ in range(ROOM):
        nodes.publish(owner)


def use_devices(nodes: Nodes, owner: Owner) -> None:
    """Run what workers run, in each of its ways."""
    page = nodes.read(owner, "d")
    # Who begins with a topic is not told what was before.
    before = [] if isinstance(owner, Topic) else [Gap]
    assert [*before, *[Notice] * ROOM] == [type(item) for item in page.items]
    last = page.items[-1]
    assert isinstance(last, Notice)
    if not isinstance(owner, str):
        return
    point = f"{page.epoch}.{page.reached}"
    nodes.report(owner, sent=point, all_point=point)
    assert last.seq - 2 == nodes.report(owner, received=point, acked_seq=last.seq - 2)
    assert last.seq == nodes.report(owner, acked_id=last.id)
    assert (ROOM - 1, 1) == nodes.mark(owner, ids=[last.id])
    assert (ROOM - 2, 1) == nodes.mark(owner, up_to=last.seq - ROOM + 1)
    assert (0, ROOM - 2) == nodes.mark(owner, up_to_id=last.id)


def test_every_script_serves_users_of_all_partitions(nodes: Nodes) -> None:
    """Whoever the user is and wherever that lives, no script is refused, and all do their work."""
    for owner in OWNERS:
        use_publishers(nodes, owner)
        use_devices(nodes, owner)
    homes = {home(owner) for owner in OWNERS}
    assert len(homes) > 30
    for where in homes:
        assert nodes.due(where) > 0
    for node in nodes.cluster.nodes:
        tags = {re.sub(r"^ts:\{([pt]\d\d|all)\}:.*", r"\1", key) for key in keys_of(node)}
        assert tags
        assert tags <= homes
        homes -= tags
    assert not homes


def keys_of(node: RedisServer) -> list[str]:
    """Return all keys of one node."""
    reply = node.command("KEYS", "*")
    assert isinstance(reply, list)
    return [key.decode() for key in reply]


@pytest.mark.parametrize("owner", ["ann", ODD, None, Topic("a:b/c~d")])
def test_scripts_touch_only_keys_with_the_tag_of_the_one_they_are_given(
    nodes: Nodes, owner: Owner
) -> None:
    """What a script touches lies in the slot by which its node was found."""
    node = nodes.cluster.owner(ledger.key("meta", owner))
    with Caller(node.path) as monitor:
        monitor.ask("MONITOR")
        use_publishers(nodes, owner)
        use_devices(nodes, owner)
        nodes.due(home(owner))
        node.command("ECHO", END)
        commands = list(commands_of_scripts(monitor))
    touched = {key for command in commands for key in touched_by(node, command)}

    kinds = {"meta", "inbox", "holes", "cursors", "idem", "collapse", "n", "due", "events"}
    if not isinstance(owner, str):
        kinds.remove("cursors")
    if isinstance(owner, Topic):
        kinds.remove("events")
    assert kinds == {key.split(":")[2] for key in touched}
    assert all(key.startswith(f"ts:{{{home(owner)}}}:") for key in touched)


END: Final = "that was all"


def commands_of_scripts(monitor: Caller) -> Iterator[tuple[str, ...]]:
    """Yield what scripts did, as MONITOR tells it, up to the end."""
    while True:
        line = monitor.next()
        assert isinstance(line, bytes)
        arguments = tuple(
            ast.literal_eval(f"b{part}").decode() for part in QUOTED.findall(line.decode())
        )
        if arguments == ("ECHO", END):
            return
        if b" lua] " in line:
            yield arguments


QUOTED: Final = re.compile(r'"(?:[^"\\]|\\.)*"')


def touched_by(node: RedisServer, command: tuple[str, ...]) -> list[str]:
    """Return the keys that Redis sees in a command."""
    if len(command) == 1:
        return []
    try:
        reply = node.command("COMMAND", "GETKEYS", *command)
    except RuntimeError as refusal:
        assert "no key arguments" in str(refusal)  # noqa: PT017 - one of many is expected
        return []
    assert isinstance(reply, list)
    return [key.decode() for key in reply]


def test_what_is_published_is_heard_on_every_node(nodes: Nodes) -> None:
    """A worker may be connected to any node: PUBLISH inside of a script reaches it."""
    ears = [Ears(node.path) for node in nodes.cluster.nodes]
    for owner in OWNERS:
        published = nodes.publish(owner)
        for listener in ears:
            [heard] = hear(listener, published, 1)
            assert ("n", channel(owner)) == (heard.kind, heard.channel)
    for listener in ears:
        listener.close()


def test_a_withdrawal_reaches_those_on_other_nodes_too(nodes: Nodes) -> None:
    """What a worker on any node may have shown is taken back there."""
    for number in range(3):
        user = f"user-{number}"
        owner = nodes.cluster.owner(ledger.key("meta", user))
        for node in nodes.cluster.nodes:
            if node is owner:
                continue
            listener = Ears(node.path)
            published = nodes.publish(user)
            assert "cancelled" == nodes.cancel(user, published)
            kinds = [heard.kind for heard in hear(listener, published, 2)]
            assert ["n", "u"] == kinds
            listener.close()


def hear(listener: Ears, published: Accepted, count: int) -> list[Heard]:
    """Return so many envelopes about something; from other nodes they take their time."""
    heard: list[Heard] = []

    def enough() -> bool:
        for one in listener.heard():
            names = one.rest[1] if one.kind == "u" else one.rest[:1]
            if published.id in names:
                heard.append(one)
        return len(heard) >= count

    eventually(enough, SECONDS, f"{count} envelopes", poll=0.001)
    return heard
