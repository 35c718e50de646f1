"""All topics of one connection: what its token allows and joins, and what its client asks for.

Each is a `Membership`; here is what they have in common. The answer to a client comes within
`membership.ANSWER_SECONDS`: if Redis does not confirm until then, it is ``unavailable``, and the
topic is not wanted any more. What the token joins stays wanted.

Reading durable topics is bounded for all of them together: `MAX_READS` pages at a time, and none
while what was read before waits in the outbox.

All of it is synchronous; nothing here may raise into those who call for many.
"""

import math
from collections import deque
from collections.abc import Iterable
from typing import Final, Protocol

from trioserver import messages
from trioserver.auth import Claims
from trioserver.desk import Particulars
from trioserver.envelope import Entry
from trioserver.membership import MAX_READS, KeptMembership, Membership, Subscriber
from trioserver.speaker import Saying

MAX_ASKS: Final = 32
"""Requests about topics that one client may have under way; then it is not read until they are
answered. What came in the same read is taken all the same."""

MAX_OWN: Final = 256
"""Ids of what a client has published to durable topics and does not want to get itself. Of more the
oldest come, if they are read again."""


class Host(Subscriber, Protocol):
    """The connection, as its topics see it."""

    @property
    def claims(self) -> Claims | None:
        """What its token says; None while it has none."""

    def hasten(self, when: float) -> None:
        """Call `Memberships.due` then, or before."""

    def resume(self) -> None:
        """Read from the client again, if it was not because of `Memberships.asks_too_much`."""


class Memberships:
    """The topics of one connection.

    Args:
        host: The connection.
    """

    __slots__ = ("_all", "_asks", "_give_up_at", "_host", "_joins", "_reads", "_wanted", "own")

    def __init__(self, host: Host) -> None:
        self._host = host
        self._all: dict[bytes, Membership] = {}
        """By channel."""
        self._asks = 0
        """Requests of the client that are not answered."""
        self._give_up_at = math.inf
        """No later than the first moment at which one of them is given up."""
        self._joins: tuple[str, ...] = ()
        """What the token joins."""
        self._wanted: deque[KeptMembership] | None = None
        """Durable topics that wait for their turn to be read; None if there are none."""
        self._reads = 0
        """Durable topics that are being read."""
        self.own: dict[str, None] | None = None
        """Ids of what the client has published to durable topics and does not want to get itself,
        oldest first. Kept when it leaves the topic: it may come back, and read it again."""

    # What the client asks for; each is answered, now or later.

    def subscribe(self, message: messages.Subscribe, now: float) -> None:
        """Have what is published to a topic sent to the client.

        Args:
            message: What it has said.
            now: On the pump's clock.
        """
        if not self._may_subscribe(message.topic):
            self._refuse("forbidden", "the token does not allow this topic", message.ref)
            return
        topic = self._host.shared.desk.topic(message.topic)
        found = self._all.get(topic.channel)
        if found is None and self._is_full():
            self._refuse("too_many_topics", "this connection has as many as it may", message.ref)
            return
        self._asks += 1
        if found is None:
            found = self._add(topic)
            found.come(message, now)
        else:
            found.ask(message, now)
        if found.asked:
            self._give_up_at = min(self._give_up_at, found.give_up_at)
            self._host.hasten(self._give_up_at)

    def unsubscribe(self, message: messages.Unsubscribe) -> None:
        """Send it nothing more of a topic; what it is not subscribed to is no error."""
        channel = self._host.shared.desk.topic(message.topic).channel
        found = self._all.get(channel)
        asked = () if found is None else found.drop_asked()
        if found is not None:
            self._drop(found)
        for ref in (*[one.ref for one in asked], message.ref):
            self._host.answer(messages.encode(messages.Unsubscribed(message.topic, ref)))

    def publish(self, message: messages.Publish) -> None:
        """Publish to a topic."""
        host = self._host
        shared, claims = host.shared, host.claims
        if claims is None or not claims.topics.may_publish(message.topic):
            problem = "the token does not allow to publish to this topic"
            self._refuse("forbidden", problem, message.ref)
            return
        topic = shared.desk.topic(message.topic)
        saying = Saying(
            topic=topic.name,
            durable=topic.durable,
            payload=message.payload,
            user=claims.user,
            connection_id=host.connection_id,
            key=message.key,
            exclude=message.exclude_self,
            ref=message.ref,
        )
        self._asks += 1
        which = shared.desk.speaker.say(saying, self, int(shared.wall() * 1000))
        if which and message.exclude_self:
            self.exclude(which)

    def exclude(self, which: str) -> None:
        """Do not send what has this id to the client, which has published it, in any topic."""
        own = self.own
        if own is None:
            own = self.own = {}
        own[which] = None
        if len(own) > MAX_OWN:
            del own[next(iter(own))]

    def published(self, answer: messages.Published | messages.Error | None) -> None:
        """Answer the client; see `speaker.Asker`."""
        self.answered(1)
        if answer is not None:
            self._answer(answer)

    def ask_presence(self, message: messages.AskPresence) -> None:
        """Tell the client who is subscribed to a topic."""
        desk = self._host.shared.desk
        if not self._may_subscribe(message.topic):
            self._refuse("forbidden", "the token does not allow this topic", message.ref)
        elif not desk.topic(message.topic).attended:
            self._refuse("forbidden", "of this topic nobody keeps who is subscribed", message.ref)
        else:
            self._asks += 1
            desk.attendance.ask(self, message.topic, message.after, message.ref)

    def attended(self, answer: messages.Presence | messages.Error) -> None:
        """Answer the client; see `Asking`."""
        self.answered(1)
        self._answer(answer)

    @property
    def asks_too_much(self) -> bool:
        """Whether its client has to wait for answers before it may ask for more."""
        return self._asks >= MAX_ASKS

    def answered(self, count: int) -> None:
        """Take note that so many requests are being answered."""
        before = self._asks
        self._asks -= count
        if self._asks < MAX_ASKS <= before:
            self._host.resume()

    def _refuse(self, code: str, problem: str, ref: str | None) -> None:
        self._answer(messages.Error(code, problem, ref=ref))

    def _answer(self, answer: messages.Published | messages.Presence | messages.Error) -> None:
        if self._host.reason is not None:
            return
        if isinstance(answer, messages.Error):
            self._host.shared.tally.error(answer.code)
        self._host.answer(messages.encode(answer))

    # What its token asks for.

    def join(self, names: Iterable[str]) -> None:
        """Subscribe to what the token joins.

        Call it right after ``connection_established``, also if there is nothing to join: what the
        client has asked for before that may have been waiting.
        """
        self._joins = tuple(names)
        shared = self._host.shared
        for topic in [shared.desk.topic(name) for name in self._joins]:
            if self._host.reason is not None:
                return
            if topic.channel in self._all:
                continue
            if self._is_full():
                self._refuse("too_many_topics", f"{topic.name} could not be joined", None)
            else:
                self._add(topic).come(None, shared.pump.now)
        self.read_some()

    def reconsider(self) -> None:
        """Do what a new token of the same user asks for: leave what it forbids, join what is new.

        What the client has left of what the token before has joined already, is not joined again.
        """
        for found in list(self._all.values()):
            name = found.topic.name
            if self._may_subscribe(name):
                continue
            asked = found.drop_asked()
            self._drop(found)
            for message in asked:
                self._refuse("forbidden", "the token does not allow this topic", message.ref)
            if found.lasting:
                gone = messages.Unsubscribed(name, None, "forbidden")
                self._host.answer(messages.encode(gone))
        claims = self._host.claims
        joins = () if claims is None else claims.topics.join
        before = self._joins
        self.join([name for name in joins if name not in before])
        self._joins = joins

    def _may_subscribe(self, name: str) -> bool:
        claims = self._host.claims
        if claims is None:
            return False
        return claims.topics.may_subscribe(name) or self._host.shared.desk.public.matches(name)

    def _is_full(self) -> bool:
        return 0 < self._host.shared.desk.max_topics <= len(self._all)

    def _add(self, topic: Particulars) -> Membership:
        made = KeptMembership if topic.durable else Membership
        found = self._all[topic.channel] = made(self, self._host, topic)
        return found

    def _drop(self, found: Membership) -> None:
        # It may be gone already: the connection ends when it cannot be answered.
        self._all.pop(found.topic.channel, None)
        found.leave()

    # What comes.

    def entered(self, channel: bytes, entry: Entry, frame: bytes) -> bool:
        """Send what was just published to a durable topic, if it is next.

        Args:
            channel: The topic's.
            entry: What was published.
            frame: What clients are told of it, see `topic_frames.frame_of`.

        Returns:
            Whether it was accepted. What is delivered is counted here.
        """
        found = self._all.get(channel)
        return found is not None and found.entered(entry, frame)

    def catch_up(self) -> None:
        """Look into the durable topics: something may have been published that did not come."""
        for found in list(self._all.values()):
            found.catch_up()

    def read_on(self) -> None:
        """Ask for the next pages, now that the client has taken what it got."""
        if self._wanted is not None:
            self.read_some()

    def want(self, kept: KeptMembership) -> None:
        """Have a durable topic read when it is its turn."""
        if self._wanted is None:
            self._wanted = deque()
        self._wanted.append(kept)
        self.read_some()

    def read_some(self) -> None:
        """Have those read whose turn it is."""
        outbox = self._host.outbox
        while self._wanted and self._reads < MAX_READS and outbox.empty:
            self._reads += 1
            if not self._wanted.popleft().read():
                self._reads -= 1
        if not self._wanted:
            self._wanted = None

    def was_read(self) -> None:
        """Take note that a durable topic has its page, or does not want it any more."""
        self._reads -= 1

    # Time.

    def due(self, now: float) -> None:
        """Give up what Redis has not confirmed in time."""
        if now < self._give_up_at:
            return
        for found in [one for one in self._all.values() if now >= one.give_up_at]:
            if found.is_held_up:
                found.put_off(now)
                continue
            asked = found.drop_asked()
            if not found.lasting:
                self._drop(found)
            for message in asked:
                self._refuse("unavailable", "Redis is away; try again", message.ref)
        self._give_up_at = min([one.give_up_at for one in self._all.values()], default=math.inf)

    def next_moment(self) -> float:
        """Return when `due` has something to do; infinity for never."""
        return self._give_up_at

    # The end.

    def leave(self) -> None:
        """Leave everything; idempotent. What it has said before is published all the same."""
        everything, self._all = self._all, {}
        self._wanted = None
        for found in everything.values():
            found.leave()

    def names(self) -> tuple[tuple[str, str], ...]:
        """Return all topics that are wanted, each with the point up to which it was sent.

        The point is empty for a live topic, and where nothing is known yet.
        """
        return tuple([(found.topic.name, found.point) for found in self._all.values()])
