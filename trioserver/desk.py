"""What the topics of all connections of a worker share.

The rules; the particulars of each topic, made once; the page that thousands have asked for, made
into frames once; and who waits for a channel. These are counted, so that the last subscriber who
leaves does not take the channel away from them.
"""

from typing import Final, Protocol

import attrs

from trioserver import ledger, messages
from trioserver.caller import Caller
from trioserver.clock import Stamp
from trioserver.ledger import Page, TopicRules
from trioserver.shared import Shared
from trioserver.speaker import Speaker
from trioserver.topic_frames import Rendering, render
from trioserver.topics import Patterns

_REMEMBERED: Final = 4096
"""Topics whose particulars are remembered, and shared by the connections of a worker."""


class Member(Protocol):
    """A connection, as those see it who keep who is subscribed."""

    connection_id: str
    caller: Caller

    @property
    def user(self) -> str | None:
        """Who it is."""

    @property
    def device(self) -> str:
        """What the client calls itself; empty if it has no name."""


class Asking(Protocol):
    """Who has asked who is subscribed."""

    def attended(self, answer: messages.Presence | messages.Error) -> None:
        """Take the answer; must not raise."""


class Attending(Protocol):
    """Who keeps who is subscribed; all of it synchronous."""

    def enter(self, member: Member, topic: str) -> None:
        """Take note that ``member`` is subscribed now."""

    def leave(self, member: Member, topic: str) -> None:
        """Take note that it is not any more; it was entered."""

    def ask(self, waiter: Asking, topic: str, after: str | None, ref: str | None) -> None:
        """Tell ``waiter`` who is there, a page at a time."""


@attrs.frozen
class Particulars:
    """What is the same for all members of a topic."""

    name: str
    channel: bytes
    durable: bool
    attended: bool
    """Whether it is kept who is subscribed."""


@attrs.define(eq=False, kw_only=True)
class Desk:
    """What the memberships of one worker share."""

    prefix: str
    """Of all channels."""
    rules: TopicRules
    public: Patterns
    """What everybody may subscribe to who has a user."""
    max_topics: int
    """Of one connection; 0 is no limit."""
    presence: Patterns
    """Of which it is kept who is subscribed."""
    speaker: Speaker
    attendance: Attending
    _known: dict[str, Particulars] = attrs.field(factory=dict, init=False)
    _coming: dict[bytes, int] = attrs.field(factory=dict, init=False)
    """How many wait for a channel to be confirmed."""
    _latest: Rendering | None = attrs.field(default=None, init=False)
    """Of the page that was handed out last: thousands may have asked for the same."""

    def topic(self, name: str) -> Particulars:
        """Return the particulars of a topic."""
        known = self._known.get(name)
        if known is not None:
            return known
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        channel = ledger.topic_channel(self.prefix, name).encode()
        durable, attended = self.rules.durable.matches(name), self.presence.matches(name)
        known = self._known[name] = Particulars(name, channel, durable, attended)
        return known

    def rendering(self, page: Page, topic: str, stamp: Stamp) -> Rendering:
        """Return a page of ``topic`` as clients get it; of the same page the same."""
        latest = self._latest
        if latest is None or latest.page is not page:
            latest = self._latest = render(page, topic, stamp)
        return latest

    def coming(self, channel: bytes) -> None:
        """Note that somebody waits for ``channel``: `release` keeps it meanwhile."""
        self._coming[channel] = self._coming.get(channel, 0) + 1

    def came(self, channel: bytes) -> None:
        """Note that he does not wait any more."""
        left = self._coming[channel] - 1
        if left:
            self._coming[channel] = left
        else:
            del self._coming[channel]

    def release(self, channel: bytes, shared: Shared) -> None:
        """Let go of ``channel`` if nobody here wants it."""
        if channel not in self._coming and channel not in shared.hub:
            shared.follower.release(channel)
