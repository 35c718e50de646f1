"""The count of what Redis was asked and has confirmed."""

import math
from collections import deque

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trioserver.errors import RedisUnavailable
from trioserver.resp import Confirmation
from trioserver.roster import SWEEP_SECONDS, Roster

LINGER = 1.0


def yes(channel: bytes) -> Confirmation:
    """Return Redis's reply to SUBSCRIBE."""
    return Confirmation(channel, subscribed=True)


def no(channel: bytes) -> Confirmation:
    """Return Redis's reply to UNSUBSCRIBE."""
    return Confirmation(channel, subscribed=False)


def confirmed(*channels: bytes) -> Roster:
    """Return a roster on whose link ``channels`` are confirmed."""
    roster = Roster(linger=LINGER)
    for channel in channels:
        roster.follow(channel)
    roster.take(0)
    for channel in channels:
        roster.confirm(yes(channel))
    return roster


def test_a_channel_is_asked_for_once() -> None:
    """Following is idempotent: one request, one SUBSCRIBE, in the order of the requests."""
    roster = Roster(linger=LINGER)

    assert not roster.follow(b"b")
    assert not roster.follow(b"a")
    assert not roster.follow(b"b")
    take = roster.take(0)

    assert take.subscribe == [b"b", b"a"]
    assert take.unsubscribe == []
    assert take.mark == 2
    assert not roster.take(0).subscribe


def test_a_channel_is_confirmed_by_its_reply() -> None:
    """Only Redis's reply makes a channel confirmed, and it completes the round's count."""
    roster = Roster(linger=LINGER)
    roster.follow(b"a")
    assert roster.is_joining(b"a")
    mark = roster.take(0).mark

    assert not roster.is_joining(b"a")
    assert not roster.follow(b"a")
    assert roster.confirmations < mark
    roster.confirm(yes(b"a"))

    assert mark == roster.confirmations
    assert roster.follow(b"a")


def test_release_is_lazy_and_batched() -> None:
    """Channels released within a sweep of each other share one UNSUBSCRIBE, after lingering."""
    roster = confirmed(b"a", b"b", b"c")
    assert roster.next_sweep() == math.inf

    assert roster.release(b"a", 10.0)
    assert not roster.release(b"a", 10.1)
    assert not roster.release(b"b", 10.2)
    assert not roster.release(b"unknown", 10.2)

    assert roster.next_sweep() == 10.0 + LINGER + SWEEP_SECONDS
    assert roster.take(10.9).unsubscribe == []
    assert roster.take(roster.next_sweep()).unsubscribe == [b"a", b"b"]
    assert roster.next_sweep() == math.inf
    assert len(roster) == 1


def test_a_follow_cancels_a_release() -> None:
    """A client that leaves and comes right back costs Redis nothing."""
    roster = confirmed(b"a")
    roster.release(b"a", 0)

    assert roster.follow(b"a")
    assert roster.take(99).unsubscribe == []


def test_what_was_never_asked_for_is_not_unsubscribed() -> None:
    """A channel that came and went while there was no link is forgotten."""
    roster = Roster(linger=LINGER)
    roster.follow(b"a")
    roster.release(b"a", 0)

    take = roster.take(LINGER)

    assert take.subscribe == []
    assert take.unsubscribe == []
    assert take.mark == 0


def test_a_follow_behind_an_unsubscribe_subscribes_again() -> None:
    """With UNSUBSCRIBE in flight, its reply does not count for the SUBSCRIBE behind it."""
    roster = confirmed(b"a")
    roster.release(b"a", 0)
    assert roster.take(LINGER).unsubscribe == [b"a"]

    assert not roster.follow(b"a")
    assert roster.take(LINGER).subscribe == [b"a"]
    roster.confirm(no(b"a"))
    assert not roster.follow(b"a")
    roster.confirm(yes(b"a"))
    assert roster.follow(b"a")


def test_the_reply_to_an_unsubscribe_comes_before_the_next_round() -> None:
    """A follow that waits for its round is not confused by the reply to the UNSUBSCRIBE."""
    roster = confirmed(b"a")
    roster.release(b"a", 0)
    roster.take(LINGER)
    roster.follow(b"a")

    roster.confirm(no(b"a"))

    assert roster.take(LINGER).subscribe == [b"a"]


@pytest.mark.parametrize("reply", [no(b"a"), yes(b"a"), yes(b"b"), no(b"b")])
def test_a_reply_that_nobody_asked_for_is_a_fault(reply: Confirmation) -> None:
    """Above all an UNSUBSCRIBE behind our back: the link is not what we think it is."""
    with pytest.raises(RedisUnavailable, match="unasked"):
        confirmed(b"a").confirm(reply)


def test_a_reply_of_the_wrong_kind_is_a_fault() -> None:
    """A SUBSCRIBE that is answered by "unsubscribed" did not work."""
    roster = Roster(linger=LINGER)
    roster.follow(b"a")
    roster.take(0)

    with pytest.raises(RedisUnavailable, match="unsubscribed unasked"):
        roster.confirm(no(b"a"))


def test_a_lost_link_starts_the_count_anew() -> None:
    """What is wanted is asked for again, what was leaving is gone, nothing is owed."""
    roster = confirmed(b"a", b"b")
    roster.follow(b"c")
    roster.take(0)
    roster.release(b"b", 0)

    roster.lost()

    assert roster.confirmations == 0
    assert not roster.follow(b"a")
    take = roster.take(LINGER)
    assert {b"a", b"c"} == set(take.subscribe)
    assert take.unsubscribe == []
    assert take.mark == 2
    assert roster.next_sweep() == math.inf


CHANNELS = st.sampled_from([b"a", b"b", b"c"])


class Conversation(RuleBasedStateMachine):
    """The roster against a Redis of three lines: a set, and replies in order."""

    def __init__(self) -> None:
        super().__init__()
        self.roster = Roster(linger=LINGER)
        self.wanted: set[bytes] = set()
        self.now = 0.0
        self.subscribed: set[bytes] = set()
        """In Redis."""
        self.replies: deque[Confirmation] = deque()
        self.sent = 0

    @rule(channel=CHANNELS)
    def follow(self, channel: bytes) -> None:
        """None but a channel that is in Redis, with all of its replies here, is confirmed."""
        self.wanted.add(channel)
        on_its_way = any(reply.channel == channel for reply in self.replies)
        expected = channel in self.subscribed and not on_its_way

        assert expected == self.roster.follow(channel)

    @rule(channel=CHANNELS)
    def release(self, channel: bytes) -> None:
        """Released channels may stay, wanted ones must."""
        self.wanted.discard(channel)
        self.roster.release(channel, self.now)

    @rule(seconds=st.floats(0, 2))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds

    @rule()
    def send(self) -> None:
        """Redis obeys at once; its replies take their time."""
        take = self.roster.take(self.now)
        self.subscribed.update(take.subscribe)
        self.subscribed.difference_update(take.unsubscribe)
        self.replies.extend([yes(channel) for channel in take.subscribe])
        self.replies.extend([no(channel) for channel in take.unsubscribe])
        self.sent += len(take.subscribe) + len(take.unsubscribe)
        assert self.sent == take.mark
        assert self.wanted <= self.subscribed

    @precondition(lambda self: self.replies)
    @rule()
    def hear(self) -> None:
        """One reply arrives; the count is complete when the last one has."""
        self.roster.confirm(self.replies.popleft())
        assert (not self.replies) == (self.roster.confirmations == self.sent)

    @rule()
    def lose(self) -> None:
        """The link ends: Redis forgets, and what it has not said it will never say."""
        self.roster.lost()
        self.subscribed.clear()
        self.replies.clear()
        self.sent = 0

    @rule()
    def settle(self) -> None:
        """After quiet, Redis has exactly what is wanted."""
        self.now += LINGER + SWEEP_SECONDS
        self.send()
        while self.replies:
            self.hear()
        assert self.wanted == self.subscribed
        assert len(self.wanted) == len(self.roster)
        assert self.roster.next_sweep() == math.inf

    @invariant()
    def nobody_wanted_is_forgotten(self) -> None:
        """What is wanted is in Redis or waits to be asked for."""
        assert all(c in self.subscribed or self.roster.is_joining(c) for c in self.wanted)


TestConversation = Conversation.TestCase
