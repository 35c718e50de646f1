"""One connection's part of a chat session: counts its messages, and keeps their answers.

A message is counted in memory and its answer made at once, but it leaves only when Redis has
confirmed a count that contains it. When something is written, and what becomes of it, is the
business of `trioserver.chats`, which tells each `Chat` by one of its methods.

What is known
    What Redis has confirmed (`Chat.sure`), what it was told last (`Chat.said`), and what has been
    counted since. If it cannot be stored, everything that waits is refused, and the count goes
    back to what was confirmed.

What waits is bounded. A connection with much of it is `crowded` and not read; whoever was told so
hears of it, by `Host.resume`, when it is over.
"""

import uuid
from typing import Final, Protocol

import msgspec
import trio

from trioserver import chat_store, frames, messages
from trioserver.chat_store import Attached, Commit
from trioserver.errors import CloseReason

RETRY_AFTER_MS: Final = 1000
"""Longer than Redis, when it is back, waits for what was taken back; see `chats.PAUSE_CAP`."""

CROWDED_MESSAGES: Final = 64
CROWDED_BYTES: Final = 256 << 10
"""Unanswered, of one connection: with one of these it is not read any more..."""

MOST_MESSAGES: Final = 4096
MOST_BYTES: Final = 1 << 20
"""... and what has been read before that was known is refused beyond one of these."""

ANSWER_BYTES: Final = 256
"""What an answer adds to a payload, about."""

PIECE_BYTES: Final = 32 << 10
"""Answers are put together up to this, or each is a piece: an outbox takes none that is larger
than what may wait in it, although the socket would."""

NEW: Final = "new"
EXPIRED: Final = "expired"


class Host(Protocol):
    """A connection, as far as its chat session is concerned."""

    @property
    def connection_id(self) -> str:
        """Its id, unique in the fleet: ``<life>-<n>``."""

    @property
    def reason(self) -> CloseReason | None:
        """Why it has ended; None while it lives."""

    def seated(self, why: str) -> None:
        """Take note that it has its session now.

        Once after `Chats.open`, and once after each `Chat.adopt` that comes later than that.

        Args:
            why: Empty if a session was resumed, and after `Chat.adopt`; ``new`` if it is a new one
                as none was asked for; ``expired`` if the one asked for did not exist.
        """

    def end(self, reason: CloseReason) -> object:
        """End it; synchronous."""

    def not_yours(self) -> None:
        """Take note that the session is a user's, and the connection is nobody's.

        This `Chat` is over then. The connection may log in and open another one.
        """

    def answer_chat(self, frames: bytes, messages: int) -> None:
        """Send these text frames: answers to so many messages."""

    def resume(self) -> None:
        """Take note that it is not crowded any more: read on."""


class Keeper(Protocol):
    """Who stores what is counted, of all connections of a worker."""

    away: bool
    """Whether nothing can be stored now."""
    counted: int
    repeated: int
    refused: int
    """Messages, see `chats.Chats`."""

    def put(self, chat: "Chat") -> None:
        """Have it written: it has changed."""

    def left(self, chat: "Chat") -> None:
        """Forget its connection, and let go of the session."""


Early = tuple[msgspec.Raw, str | None, str | None, str, float]
"""The arguments of `Chat.message`, and when that was."""


class Chat:
    """One connection's part of a chat session. Made by `chats.Chats.open`.

    What connections may use are `session_id`, `count`, `resumed`, `crowded`, `message`, `adopt`,
    `depart` and `leave`; the rest is for its keeper.

    Args:
        keeper: Who stores what it counts.
        host: The connection.
        holder: Its name at the session, never used before.
        session_id: Which; empty for a new one.
        user: Whose; None for an anonymous client.

    Attributes:
        session_id: Of the session; another one, when `Host.seated` is called, if the one asked for
            does not exist and its client is anonymous.
        resumed: Whether a session was there; right when `Host.seated` is called.
        holder: Its name at the session, see `chat_store`.
        host: The connection; None when it has left.
        owner: The user, or empty.
        fresh: Whether it was not asked for, so that it may be created.
        why: What its host is told when it is seated; None when it was.
        adopted: Whether its host waits to be told that the session is its user's.
        turn: Of the holder, see `chat_store`; 0 until it is attached.
        version: Of the latest write.
        sure: Count and ids that Redis has confirmed.
        said: The same, as they were written last.
        due: Whether it waits to be written.
        apart: Whether it is attached or written by itself, as Redis has refused it.
        over: Whether it is somebody else's now: nothing is written any more.
    """

    __slots__ = (
        "_counted",
        "_early",
        "_flying",
        "_frames",
        "_ids",
        "_keeper",
        "_open",
        "_refs",
        "_said_owner",
        "_size",
        "adopted",
        "apart",
        "due",
        "fresh",
        "holder",
        "host",
        "over",
        "owner",
        "resumed",
        "said",
        "session_id",
        "sure",
        "turn",
        "version",
        "why",
    )

    def __init__(
        self, keeper: Keeper, host: Host, holder: str, session_id: str, user: str | None
    ) -> None:
        self.session_id = session_id or str(uuid.uuid4())
        self.resumed = False
        self.holder = holder
        self.host: Host | None = host
        self.owner = user or ""
        self.fresh = not session_id
        self.why: str | None = NEW if self.fresh else EXPIRED
        self.turn = self.version = 0
        self.sure = self.said = (0, "")
        self.adopted = self.due = self.apart = self.over = False
        self._keeper = keeper
        self._said_owner = ""
        """Whose it is by what was written last."""
        self._open = False
        """Whether messages are counted as they come."""
        self._counted = 0
        """With those that Redis has not confirmed."""
        self._ids = ""
        """The same, see `chat_store.remember`."""
        self._frames: list[bytes] = []
        """Answers that wait for Redis, in order..."""
        self._refs: list[str | None] = []
        """... and what else is needed to refuse the same messages."""
        self._flying = 0
        """How many of these are being written."""
        self._early: list[Early] | None = None
        """Messages that came before the session was attached."""
        self._size = 0
        """Bytes of all that is unanswered."""

    @property
    def count(self) -> int | None:
        """Messages that are counted for certain; None until it is attached."""
        return self.sure[0] if self.turn else None

    @property
    def crowded(self) -> bool:
        """Whether so much is unanswered that the connection must not be read, until `resume`."""
        waiting = len(self._frames) + len(self._early or ())
        return waiting >= CROWDED_MESSAGES or self._size >= CROWDED_BYTES

    # What connections do.

    def message(
        self, payload: msgspec.Raw, ref: str | None, message_id: str | None, timestamp: str
    ) -> None:
        """Count a message, and answer it through `Host.answer_chat` when Redis has the count.

        Args:
            payload: Comes back in the answer.
            ref: The same.
            message_id: By which the client tells it from others, or None.
            timestamp: When it came, RFC 3339.
        """
        keeper = self._keeper
        waiting = self._frames
        full = self._size >= MOST_BYTES or len(waiting) >= MOST_MESSAGES
        if full or keeper.away or not self._open:
            self._not_now(payload, ref, message_id, timestamp)
            return
        repeated = False
        count = self._counted + 1
        if message_id is not None:
            known = chat_store.recall(self._ids, message_id)
            if known is None:
                self._ids = chat_store.remember(self._ids, message_id, count)
            else:
                repeated, count = True, known
        frame = frames.encode_text(
            messages.encode(
                messages.MessageResponse(count, payload, timestamp, ref, message_id, repeated)
            )
        )
        if repeated:
            keeper.repeated += 1
            if not waiting:
                self._answer(frame, 1)
                return
        else:
            self._counted = count
        waiting.append(frame)
        self._refs.append(ref)
        self._size += len(frame)
        if not self.due:
            keeper.put(self)

    def adopt(self, user: str) -> None:
        """Have the session belong to this user: an anonymous client has logged in.

        Then `Host.seated`, or the end if the session is somebody else's.
        """
        if self.over or self.host is None:
            return
        self.owner = user
        self.adopted = True
        if self.turn and not self.due:
            self._keeper.put(self)

    def depart(self) -> None:
        """Let go of the session while the connection goes on; what is not answered is refused."""
        if self.host is not None and not self.over:
            self.refuse()
        self.leave()

    def leave(self) -> None:
        """Let go of the session: the connection has ended. Idempotent; nothing is answered then.

        What was counted is written all the same: who sends it again, by its id, gets that count.
        """
        if self.host is None:
            return
        self.host = None
        self._open = False
        self._early = None
        self._drop()
        self._keeper.left(self)

    # What happens to it.

    def says(self) -> Commit:
        """Return what is to be written now."""
        self.due = False
        self.version += 1
        self._flying = len(self._frames)
        self.said = (self._counted, self._ids)
        self._said_owner = self.owner
        return (
            chat_store.key(self.session_id),
            self.holder,
            self.turn,
            self.version,
            self._counted,
            self.owner,
            self._ids,
            chat_store.STAYS if self.host is not None else chat_store.LEAVES,
        )

    def confirmed(self) -> None:
        """Answer what was written."""
        self.sure = self.said
        if self.apart:
            self.apart, self._open = False, self.host is not None and self.why is None
        if self._flying:
            self._answer_flying()
        if self.adopted and self._said_owner == self.owner:
            self.adopted = False
            self._seat(self.why or "")

    def _answer_flying(self) -> None:
        flying, self._flying = self._flying, 0
        self._keeper.counted += flying
        waiting, size = self._frames, self._size
        crowded = size >= CROWDED_BYTES or len(waiting) >= CROWDED_MESSAGES
        if flying == len(waiting):
            done = waiting
            self._frames, self._refs = [], []
        else:
            done = waiting[:flying]
            del waiting[:flying]
            del self._refs[:flying]
        joined = b"".join(done)
        self._size = size - len(joined)
        if len(joined) <= PIECE_BYTES:
            self._answer(joined, flying)
        else:
            self._answer_in_pieces(done)
        if crowded:
            self._resume()

    def attached(self, came: Attached, owner: str) -> None:
        """Take what `chat_store.attach` has brought; ``owner`` is who it was asked for."""
        self.turn = came.turn
        self._counted, self._ids = self.sure = self.said = (came.count, came.ids)
        self.resumed = came.outcome == chat_store.RESUMED
        if self.resumed:
            self.why = ""
        if self.owner == owner:
            self.adopted = False
            self._seat(self.why or "")
        else:
            # Its client has logged in meanwhile: this must be stored before it is told.
            self._keeper.put(self)

    def replaced(self) -> None:
        """Go on under a new id: what was asked for does not exist."""
        self.session_id = str(uuid.uuid4())
        self.fresh = True

    def refuse(self) -> None:
        """Refuse everything that waits, and go back to what was confirmed."""
        self._counted, ids = self.sure
        # What was written meanwhile may have had some.
        self._ids = ids or (chat_store.NONE_LEFT if self._ids else "")
        self._refuse([*self._refs, *(early[1] for early in self._early or ())])

    def refuse_early(self, since: float) -> None:
        """Refuse what has come before that moment, by Trio's clock, and still waits to begin."""
        early = self._early
        if early and early[0][4] <= since:
            self._refuse([one[1] for one in early])

    def tried_apart(self) -> None:
        """Take note that it is tried by itself from now on."""
        self.apart, self._open = True, False

    def lost(self, reason: CloseReason) -> None:
        """Take note that it is somebody else's, and end its connection."""
        self._end()
        if self.host is not None:
            self.host.end(reason)

    def denied(self) -> None:
        """Take note that it is a user's; a connection that is nobody's may still say who it is."""
        if self.owner:
            self.lost(CloseReason.FORBIDDEN)
            return
        host, crowded = self.host, self.crowded
        early = self._early or ()
        self._end()
        if host is None or host.reason is not None:
            return
        self._keeper.refused += len(early)
        self._answer_in_pieces([_refusal(one[1]) for one in early])
        host.not_yours()
        if crowded:
            host.resume()

    def _seat(self, why: str) -> None:
        host, self.why = self.host, None
        if host is None or host.reason is not None:
            return
        self._open = not self.apart
        crowded = self.crowded
        host.seated(why)
        early, self._early = self._early, None
        if early:
            self._size = 0
            for payload, ref, message_id, timestamp, _ in early:
                self.message(payload, ref, message_id, timestamp)
            if crowded:
                # What waits now may be less, or nothing, and then no later answer would say so.
                self._resume()

    def _not_now(
        self, payload: msgspec.Raw, ref: str | None, message_id: str | None, timestamp: str
    ) -> None:
        """Put a message off until there is a session; or refuse it."""
        if self.over or self.host is None:
            return
        early = self._early or []
        seatless = self.why is not None and not self._keeper.away and not self.apart
        if seatless and len(early) < MOST_MESSAGES and self._size < MOST_BYTES:
            early.append((payload, ref, message_id, timestamp, trio.current_time()))
            self._early = early
            self._size += len(payload) + ANSWER_BYTES
        else:
            self._keeper.refused += 1
            self._answer(_refusal(ref), 1)

    def _refuse(self, refs: list[str | None]) -> None:
        crowded = self.crowded
        self._drop()
        self._early = None
        if refs:
            self._keeper.refused += len(refs)
            self._answer_in_pieces([_refusal(ref) for ref in refs])
        if crowded:
            self._resume()

    def _resume(self) -> None:
        """Have the connection read on, unless it is crowded."""
        host = self.host
        if host is not None and host.reason is None and not self.crowded:
            host.resume()

    def _answer_in_pieces(self, done: list[bytes]) -> None:
        """Send frames, not too many bytes at once."""
        first = size = 0
        for number, frame in enumerate(done):
            if size and size + len(frame) > PIECE_BYTES:
                self._answer(b"".join(done[first:number]), number - first)
                first, size = number, 0
            size += len(frame)
        if size:
            self._answer(b"".join(done[first:]), len(done) - first)

    def _answer(self, done: bytes, number: int) -> None:
        host = self.host
        if host is not None and host.reason is None:
            host.answer_chat(done, number)

    def _end(self) -> None:
        self.over, self._open = True, False
        self._early = None
        self._drop()

    def _drop(self) -> None:
        self._frames, self._refs, self._flying, self._size = [], [], 0, 0


def _refusal(ref: str | None) -> bytes:
    problem = messages.Error(
        "unavailable", "the count cannot be stored now; try again", RETRY_AFTER_MS, ref
    )
    return frames.encode_text(messages.encode(problem))
