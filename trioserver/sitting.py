"""What a chat connection has beside others: its seat at a stored session.

It stands between the connection, which decides when ``connection_established`` goes out, and its
`chat.Chat`, which counts. A seat is taken twice if an anonymous client logs in.
"""

import attrs

from trioserver.chat import Chat, Host
from trioserver.chats import Chats
from trioserver.frames import Event

Page = tuple[str | None, str, bytes]
"""What a feed has to say in the beginning: position, why it is no other, frames."""


@attrs.define(eq=False)
class Sitting:
    """One chat connection's hold on a stored session."""

    asked: str = ""
    """The session that its client wants; empty for any."""
    chat: Chat | None = None
    """None until it is known whose session it is to be."""
    why: str | None = None
    """Why the session is no known one, empty if it is; None until Redis has said so."""
    page: Page | None = None
    """What the feed had to say meanwhile."""
    waits: bool = False
    """Whether a client that has logged in has still to read what it was sent before."""
    rest: list[Event] = attrs.field(factory=list)
    """What has come behind that, to be processed then."""
    refused_at: float | None = None
    """When it turned out that the session which it wants is a user's; None if it may have it."""

    def sit(self, host: Host, chats: Chats, user: str | None) -> None:
        """Take hold of a session, or take it along to the user it belongs to from now on."""
        self.why = self.page = None
        self.refused_at = None
        if self.chat is not None and self.asked not in {"", self.chat.session_id}:
            self.chat.depart()
            self.chat = None
            if host.reason is not None:
                return  # It could not even be told of that.
        if self.chat is None:
            self.chat = chats.open(host, self.asked, user)
        elif user is not None:
            self.chat.adopt(user)

    def logs_in(self, session_id: str) -> None:
        """Take note that its client has shown a token, and may have named another session."""
        if session_id or self.chat is not None:
            self.asked = session_id

    def lose(self, now: float) -> None:
        """Give up the seat: the session is a user's, and its client may still be that user."""
        self.leave()
        self.chat = None
        self.refused_at = now

    def leave(self) -> None:
        """Let go of it: the connection has ended. Idempotent."""
        if self.chat is not None:
            self.chat.leave()

    @property
    def session_id(self) -> str | None:
        """Of the session; None while it has none."""
        return None if self.chat is None else self.chat.session_id

    @property
    def count(self) -> int | None:
        """Messages counted on the session; None while that is not known."""
        return None if self.chat is None else self.chat.count

    @property
    def crowded(self) -> bool:
        """Whether its client has to wait for answers before it is read again."""
        return self.chat is not None and self.chat.crowded
