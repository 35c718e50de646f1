"""The hub against a dictionary of lists."""

import itertools

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.trioserver.test_outbox import Owner, drain, fill
from tests.trioserver.wire import Pair
from trioserver.hub import Hub
from trioserver.outbox import Outbox, OutboxLimits, Turn

TOPICS = [b"user_noti:ann", b"user_noti:bob", b"channels:broadcast"]
COUNT = 4
numbers = st.integers(0, COUNT - 1)
topics = st.sampled_from(TOPICS)


class HubMachine(RuleBasedStateMachine):
    """Any history of a few outboxes under a few topics."""

    @initialize()
    def begin(self) -> None:
        """Make the outboxes."""
        self.hub = Hub()
        self.pairs = [Pair() for _ in range(COUNT)]
        self.outboxes = [Outbox(p.server, OutboxLimits(), Owner()) for p in self.pairs]
        self.model: dict[bytes, set[int]] = {topic: set() for topic in TOPICS}
        self.expected = [b"" for _ in range(COUNT)]
        self.number = 0

    def teardown(self) -> None:
        """Each outbox got what its topics got, in order."""
        for pair, expected in zip(self.pairs, self.expected, strict=True):
            assert expected == drain(pair.client)
            pair.__exit__()

    @rule(topic=topics, who=numbers)
    def add(self, topic: bytes, who: int) -> None:
        """The first is told apart, adding again changes nothing."""
        first = not self.model[topic]
        assert first == self.hub.add(topic, self.outboxes[who])
        self.model[topic].add(who)

    @rule(topic=topics, who=numbers)
    def remove(self, topic: bytes, who: int) -> None:
        """The last is told apart, removing again changes nothing."""
        last = self.model[topic] == {who}
        assert last == self.hub.remove(topic, self.outboxes[who])
        self.model[topic].discard(who)

    @rule(who=numbers)
    def close(self, who: int) -> None:
        """A closed outbox refuses and disturbs nobody."""
        self.outboxes[who].abandon()

    @rule(topic=topics)
    def deliver(self, topic: bytes) -> None:
        """Everybody under the topic gets it, or is counted as refused."""
        self.number += 1
        frame = b"<%d>" % self.number
        open_ones = [who for who in self.model[topic] if not self.outboxes[who].closed]
        refused = len(self.model[topic]) - len(open_ones)
        assert (len(open_ones), refused) == self.hub.deliver(topic, frame)
        for outbox in self.outboxes:
            outbox.release()
        for who in open_ones:
            self.expected[who] += frame

    @invariant()
    def the_same_topics(self) -> None:
        """A topic without outboxes is not there."""
        there = {topic for topic, who in self.model.items() if who}
        assert len(there) == len(self.hub)
        for topic, who in self.model.items():
            assert (topic in there) == (topic in self.hub)
            assert len(who) == len(self.hub.outboxes(topic))
            assert {self.outboxes[i] for i in who} == set(self.hub.outboxes(topic))


TestHub = HubMachine.TestCase


def outboxes(count: int) -> tuple[list[Pair], list[Outbox]]:
    """Return so many outboxes and their sockets."""
    pairs = [Pair() for _ in range(count)]
    return pairs, [Outbox(pair.server, OutboxLimits(), Owner()) for pair in pairs]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_topic_grows_and_shrinks_by_one(count: int) -> None:
    """However it is kept for so many: adding and removing again, in any order, changes nothing."""
    for order in itertools.permutations(range(count)):
        hub, topic = Hub(), TOPICS[0]
        pairs, all_of_them = outboxes(count)
        for i, outbox in enumerate(all_of_them):
            assert [i == 0, False] == [hub.add(topic, outbox), hub.add(topic, outbox)]
            assert set(all_of_them[: i + 1]) == set(hub.outboxes(topic))
            assert i + 1 == len(hub.outboxes(topic))
        left = set(all_of_them)
        for number, i in enumerate(order):
            last = number == count - 1
            outbox = all_of_them[i]
            assert [last, False] == [hub.remove(topic, outbox), hub.remove(topic, outbox)]
            left.discard(outbox)
            assert left == set(hub.outboxes(topic))
            assert bool(left) == (topic in hub) == bool(len(hub))
            assert (len(left), 0) == hub.deliver(topic, b"x")
            for one in left:
                one.release()
            for pair, one in zip(pairs, all_of_them, strict=True):
                assert (b"x" if one in left else b"") == drain(pair.client)
        for pair in pairs:
            pair.__exit__()


@pytest.mark.parametrize("present", [0, 1, 2, 3])
def test_strangers_cannot_leave(present: int) -> None:
    """Removing who was never there is no end of the topic, whoever is there."""
    hub, topic = Hub(), TOPICS[0]
    pairs, all_of_them = outboxes(present + 1)
    for outbox in all_of_them[1:]:
        hub.add(topic, outbox)
        hub.add(TOPICS[1], all_of_them[0])
    assert not hub.remove(topic, all_of_them[0])
    assert set(all_of_them[1:]) == set(hub.outboxes(topic))
    for pair in pairs:
        pair.__exit__()


def test_a_snapshot_stays_as_it_was() -> None:
    """Who goes through it may pause: who comes and goes meanwhile does not change it."""
    hub, topic = Hub(), TOPICS[0]
    pairs, all_of_them = outboxes(3)
    snapshots = [hub.outboxes(topic)]
    for outbox in all_of_them:
        hub.add(topic, outbox)
        snapshots.append(hub.outboxes(topic))
    for outbox in all_of_them:
        hub.remove(topic, outbox)
    assert [0, 1, 2, 3] == [len(snapshot) for snapshot in snapshots]
    assert () == hub.outboxes(topic)
    for pair in pairs:
        pair.__exit__()


class Leaving(Owner):
    """Leaves the hub as soon as its outbox ends, as a connection does."""

    def __init__(self, hub: Hub, topic: bytes) -> None:
        super().__init__()
        self._hub, self._topic = hub, topic

    def join(self, outbox: Outbox) -> None:
        """Subscribe."""
        self.outbox = outbox
        self._hub.add(self._topic, outbox)

    def overflowed(self) -> None:
        """Leave."""
        super().overflowed()
        self._hub.remove(self._topic, self.outbox)

    def broke(self) -> None:
        """Leave."""
        super().broke()
        self._hub.remove(self._topic, self.outbox)


def test_outboxes_that_break_during_a_delivery_disturb_nobody() -> None:
    """Some break, some overflow and leave at once; the rest get the frame."""
    hub, topic = Hub(), TOPICS[0]
    pairs = [Pair() for _ in range(9)]
    owners = [Leaving(hub, topic) for _ in pairs]
    for i, (pair, owner) in enumerate(zip(pairs, owners, strict=True)):
        limits = OutboxLimits(max_frames=1)
        owner.join(Outbox(pair.server, limits, owner))
        if i % 3 == 1:
            pair.server.shutdown(1)
        elif i % 3 == 2:
            fill(owner.outbox)
    turn = Turn()
    for count, frame in ((9, b"frame"), (3, b"again")):
        assert (count, 0) == hub.deliver(topic, frame)
        turn.outboxes = [owner.outbox for owner in owners]
        assert count - 3 == turn.over()
    for i, pair in enumerate(pairs):
        if i % 3 == 0:
            assert b"frameagain" == drain(pair.client)
        pair.__exit__()
    assert 3 == len(hub.outboxes(topic))
    assert [1] * 3 == [owner.breaks for owner in owners[1::3]]
    assert [1] * 3 == [owner.overflows for owner in owners[2::3]]


def test_the_only_outbox_of_a_topic_may_leave_during_its_delivery() -> None:
    """The last one takes the topic with it."""
    hub, topic = Hub(), TOPICS[0]
    with Pair() as pair:
        owner = Leaving(hub, topic)
        owner.join(Outbox(pair.server, OutboxLimits(), owner))
        pair.server.shutdown(1)
        assert (1, 0) == hub.deliver(topic, b"frame")
        assert not owner.outbox.release()
        assert topic not in hub
        assert (0, 0) == hub.deliver(topic, b"frame")
