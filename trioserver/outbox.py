"""The outbox: what one connection has still to be sent. Synchronous, and the only writer.

Rules
    * `Outbox.offer` writes to the socket at once while nothing waits; what the kernel did not
      take is kept, and the pump calls `Outbox.flush` when the socket is writable again.
    * Order in is order out. A frame that was begun is finished before anything else, or the
      socket is aborted: half a frame would make every later byte garbage.
    * Waiting bytes and frames are bounded. The frame that would pass a bound is refused, the
      outbox is closed, and its owner is told once, from outside: the reader of this socket is
      precisely the one that does not move, so nothing may wait for it. What waits in all
      outboxes together is bounded as well, by a `Budget`.
    * While corked, everything waits: the first message of a connection is not ready yet.
    * What is `Outbox.deliver`ed is held until the `Turn` is over, so that several notifications for
      one connection leave in one write. Whatever else is offered meanwhile comes behind them.
    * `offer` never raises. It returns False after overflow, a broken socket, or `finish`.

Frames are shared: a broadcast that ten thousand slow clients have not read yet is one bytes
object in ten thousand outboxes.
"""

import socket
import sys
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

import attrs

from trioserver import frames
from trioserver.deflate import Compressor
from trioserver.envelope import Entry
from trioserver.slow_policies import Policy
from trioserver.soft import Line, Marker, Soft

MAX_VECTOR: Final = 64
"""Frames handed to one ``sendmsg``; well below the kernel's IOV_MAX of 1,024."""

CROWD_BYTES: Final = 1 << 20
CROWD_FRAMES: Final = 256
"""What `Outbox.crowded` reckons with where there is no limit."""


JOINED_BYTES: Final = 64 << 10
"""How much is put together to leave as one piece; beyond it frames go one after the other."""


class Turn:
    """What one turn of the subscription has brought, not written yet.

    Whoever delivers says when the turn is `over`, and before that awaits nothing.
    """

    __slots__ = ("outboxes",)

    def __init__(self) -> None:
        self.outboxes: list[Outbox] = []
        """Those that hold something, each once."""

    def over(self) -> int:
        """Let all of it go out; return how many outboxes have refused. Never raises."""
        outboxes, self.outboxes = self.outboxes, []
        refused = 0
        for outbox in outboxes:
            if not outbox.release():
                refused += 1
        return refused


class Budget:
    """What waits in all outboxes of a worker together.

    Args:
        limit: Bytes that may wait; 0 means no limit.
    """

    __slots__ = ("_ask_at", "_asking", "limit", "on_exceeded", "used")

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit or sys.maxsize
        self.used = 0
        """Bytes that wait now. A frame that waits in several outboxes counts in each."""
        self.on_exceeded: Callable[[], None] = lambda: None
        """Called when more waits than may: must make room, synchronously, and not raise. It is
        not called again for what waits on its account, such as farewells, nor for every byte more
        if it found no room to make."""
        self._asking = False
        self._ask_at = self.limit

    def take(self, count: int) -> None:
        """Note that so many bytes more wait, or fewer if it is negative."""
        self.used += count
        if self.used <= self.limit:
            self._ask_at = self.limit
        elif self.used > self._ask_at and not self._asking:
            self._asking = True
            try:
                self.on_exceeded()
            finally:
                self._asking = False
            self._ask_at = max(self.limit, self.used + (self.limit >> 4))


@attrs.frozen(kw_only=True)
class OutboxLimits:
    """How much one client may leave unread; 0 means no limit."""

    max_bytes: int = 1 << 20
    """Bytes waiting in this process, beside what the kernel buffers."""

    max_frames: int = 256
    """Frames waiting; small frames cost memory too."""

    budget: Budget = attrs.field(factory=Budget)
    """What may wait for all of them together."""

    turn: Turn = attrs.field(factory=Turn)
    """Which holds what is delivered."""

    on_given_up: Callable[[Policy, int], None] = lambda _policy, _count: None
    """Told how many waiting frames were given up, and in what way; must not raise."""

    largest: int = attrs.field(init=False)
    """Bytes of the largest frame that is accepted at all: what may not wait must not begin."""

    @largest.default
    def _largest(self) -> int:
        return self.max_bytes or sys.maxsize


class Owner(Protocol):
    """Who is told what happens to an outbox; all of it synchronous, none of it may raise."""

    def blocked(self) -> None:
        """Bytes wait now: call `Outbox.flush` when the socket is writable."""

    def overflowed(self) -> None:
        """A bound was passed and the outbox is closed. Called at most once."""

    def broke(self) -> None:
        """The socket failed and the outbox is closed. Called at most once."""

    def entered(self, entry: Entry, *, everyone: bool) -> bool:
        """The ledger has a new entry; return whether a frame of it was accepted.

        Only the owner knows where its client stands, so only it can tell whether that is next.

        Args:
            entry: What was published.
            everyone: Whether it is in the stream of everyone, not in the user's own.
        """

    def entered_topic(self, topic: bytes, entry: Entry, frame: bytes) -> bool:
        """The same of a durable topic, whose frame is the same for all."""


class Outbox:
    """The waiting frames of one socket.

    Args:
        sock: Non-blocking, connected.
        limits: Shared by all connections of a worker.
        owner: Told of blocking, overflow and failure.
    """

    __slots__ = (
        "_held",
        "_held_bytes",
        "_limits",
        "_offset",
        "_owner",
        "_sock",
        "_waiting",
        "closed",
        "corked",
        "joins",
        "waiting_bytes",
    )

    def __init__(self, sock: socket.socket, limits: OutboxLimits, owner: Owner) -> None:
        self._sock = sock
        self._limits = limits
        self._owner = owner
        self._waiting: deque[bytes] | None = None
        """None while nothing waits, so that an idle connection pays nothing for its queue."""
        self._offset = 0
        """Bytes of the first waiting frame that are on the wire already."""
        self.waiting_bytes = 0
        self.closed = False
        """Whether `offer` refuses. What waits may still be flushed."""
        self.corked = False
        """Whether what is offered waits for `uncork`, under the same bounds."""
        self._held: bytes | list[bytes] | None = None
        """What was delivered in this turn."""
        self._held_bytes = 0
        """Of that, if it is several frames."""
        self.joins = False
        """Whether the client takes several messages in one frame, as an array."""

    @property
    def empty(self) -> bool:
        """Whether everything accepted so far is with the kernel."""
        return self._waiting is None

    @property
    def crowded(self) -> bool:
        """Whether a quarter of what may wait does wait: time to read no more from this client."""
        waiting = self._waiting
        if waiting is None:
            return False
        return self._is_beyond(waiting, 2)

    @property
    def half_full(self) -> bool:
        """Whether half of what may wait does: time to leave in the ledger what is kept there.

        What is held counts as if it waited. Whether it does, is known after `release`.
        """
        waiting, held = self._waiting, self._held
        if held is None:
            return waiting is not None and self._is_beyond(waiting, 1)
        if isinstance(held, bytes):
            return self._is_beyond(waiting or deque(), 1, len(held), 1)
        return self._is_beyond(waiting or deque(), 1, self._held_bytes, len(held))

    def lags(self) -> bool:
        """Return whether it is `half_full` even when what is held has gone out."""
        if not self.half_full:
            return False
        self.release()  # The client may take what this turn has brought.
        return self.half_full

    def _is_beyond(
        self, waiting: deque[bytes], halves: int, held_bytes: int = 0, held: int = 0
    ) -> bool:
        """Return whether a half of what may wait does, or a half of that and so on.

        What may be given up makes place for everything else, so it does not count.
        """
        limits = self._limits
        size, count = self.waiting_bytes, len(waiting)
        if isinstance(waiting, Line):
            size, count = size - waiting.soft_bytes, waiting.hard
        return (
            size + held_bytes > (limits.max_bytes or CROWD_BYTES) >> halves
            or count + held > (limits.max_frames or CROWD_FRAMES) >> halves
        )

    def offer(self, frame: bytes) -> bool:
        """Accept ``frame`` for sending; return False if it never will be sent."""
        if self._held is not None:
            self.release()
        if self.closed:
            return False
        if self._waiting is not None or len(frame) > self._limits.largest:
            return self._wait(frame)
        try:
            sent = self._sock.send(frame)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.closed = True
            self._owner.broke()
            return False
        if sent != len(frame):
            self._waiting = deque((frame,))
            self._offset = sent
            self._owner.blocked()
            self._hold(len(frame) - sent)
            return not self.closed
        return True

    def cork(self) -> None:
        """Let everything offered wait, until `uncork`. For an outbox nothing was offered to."""
        self.corked = True
        self._waiting = deque()

    def uncork(self, first: bytes) -> None:
        """Send ``first``, then what has waited, and from now on what is offered."""
        self.release()
        held, self._waiting = self._waiting, None
        self.corked = False
        self._hold(-self.waiting_bytes)
        self.offer(first)
        for frame in held or ():
            self.offer(frame)

    def send_past_cork(self, data: bytes) -> bool:
        """Send ``data`` at once although corked; return False if the socket did not take it all.

        For the answer to a handshake: the first bytes on a fresh socket, which has room for them.
        """
        try:
            return self._sock.send(data) == len(data)
        except OSError:
            return False

    deliver_now = offer
    """`offer` for a text frame that many get; `DeflatingOutbox` has its own way with these."""

    def hold(self, frame: bytes) -> bool:
        """Accept ``frame`` for sending when the turn is over; return False if it never will be."""
        if self.closed:
            return False
        held = self._held
        if held is None:
            self._held = frame
            self._limits.turn.outboxes.append(self)
            return True
        if isinstance(held, list):
            held.append(frame)
        else:
            self._held = [held, frame]
            self._held_bytes = len(held)
        self._held_bytes += len(frame)
        if self._held_bytes >= JOINED_BYTES:
            # What is given up of the others is no verdict about this one.
            self.release()
        return not self.closed

    deliver = hold
    """`hold` for a text frame that many may get."""

    def release(self) -> bool:
        """Let go out what is held; return False if not all of it will. Idempotent, never raises."""
        held, self._held = self._held, None
        if held is None:
            return True
        if isinstance(held, list):
            return self._offer_all(held)
        return self.offer(held)

    def _offer_all(self, held: list[bytes]) -> bool:
        """Offer frames, together as long as the client takes them.

        One that does not is offered them one by one: bounds and policies are about frames.
        """
        most = min(JOINED_BYTES, self._limits.largest)
        accepted = True
        run: list[bytes] = []
        size = 0
        for frame in held:
            if run and size + len(frame) > most:
                accepted &= self._offer_run(run)
                run, size = [], 0
            if self._waiting is not None:
                accepted &= self.offer(frame)
            else:
                run.append(frame)
                size += len(frame)
        return self._offer_run(run) and accepted

    def _offer_run(self, run: list[bytes]) -> bool:
        pieces = self._joined(run)
        if len(pieces) > 1:
            return self.offer(b"".join(pieces))
        # By itself it stays what it is, and may be given up if it might.
        return not pieces or self.offer(pieces[0])

    def _joined(self, run: list[bytes]) -> list[bytes]:
        """Return frames as they are written to a client that keeps up."""
        return frames.join_texts(run) if self.joins else run

    def enter(self, entry: Entry, *, everyone: bool) -> bool:
        """Let the owner decide about an entry of the ledger; see `Owner.entered`."""
        return self._owner.entered(entry, everyone=everyone)

    def enter_topic(self, topic: bytes, entry: Entry, frame: bytes) -> bool:
        """Let the owner decide about an entry of a durable topic; see `Owner.entered_topic`."""
        return self._owner.entered_topic(topic, entry, frame)

    def _wait(self, frame: bytes) -> bool:
        if type(frame) is not bytes:
            return self._wait_softly(frame)
        limits = self._limits
        waiting = self._waiting
        if (
            waiting is None
            or self.waiting_bytes + len(frame) > limits.largest
            or 0 < limits.max_frames <= len(waiting)
        ):
            return self._wait_pressed(frame)
        waiting.append(frame)
        self._hold(len(frame))
        return not self.closed

    def _wait_softly(self, frame: bytes) -> bool:
        """Let a frame wait that may be given up, or says what was."""
        limits = self._limits
        if self._waiting is None:
            # It is larger than all that may ever wait.
            if isinstance(frame, Soft):
                limits.on_given_up(Policy.DROP_OLDEST, 1)
                self.offer(bytes(Marker(frame.group, 1)))
                return False
            return self._wait_pressed(frame)
        line = self._line(self._waiting)
        if not isinstance(frame, Soft):
            line.add(frame)
            self._hold(len(frame))
            return not self.closed
        change, waits = line.take(
            frame,
            limits.largest - self.waiting_bytes,
            limits.max_frames or sys.maxsize,
            limits.on_given_up,
            begun=self._offset > 0,
        )
        self._hold(change)
        return waits and not self.closed

    def _wait_pressed(self, frame: bytes) -> bool:
        """Let a frame wait for which there is no room, if others make place."""
        limits = self._limits
        fits = False
        if self._waiting is not None and len(frame) <= limits.largest:
            change, fits = self._line(self._waiting).make_room(
                len(frame),
                limits.largest - self.waiting_bytes,
                limits.max_frames or sys.maxsize,
                limits.on_given_up,
                begun=self._offset > 0,
            )
            self._hold(change)
        if self.closed:
            return False
        if not fits or self._waiting is None:
            self.closed = True
            self._owner.overflowed()
            return False
        self._waiting.append(frame)
        self._hold(len(frame))
        return not self.closed

    def _line(self, waiting: deque[bytes]) -> Line:
        """Return what waits as what knows which of it may be given up."""
        if isinstance(waiting, Line):
            return waiting
        line = self._waiting = Line(waiting)
        return line

    def _hold(self, count: int) -> None:
        """Note that so many bytes more wait here. May close this very outbox."""
        self.waiting_bytes += count
        self._limits.budget.take(count)

    def flush(self) -> bool:
        """Give the kernel what it takes; return whether it took anything.

        Never raises; a broken socket is reported to the owner.
        """
        waiting = self._waiting
        if waiting is None or self.corked:
            return False
        first = waiting[0]
        try:
            if len(waiting) == 1:
                sent = self._sock.send(memoryview(first)[self._offset :])
            else:
                vector: list[bytes | memoryview] = [memoryview(first)[self._offset :]]
                vector.extend(waiting[i] for i in range(1, min(len(waiting), MAX_VECTOR)))
                sent = self._sock.sendmsg(vector)
        except BlockingIOError:
            return False
        except OSError:
            self.abandon()
            self._owner.broke()
            return False
        self._sent(waiting, sent)
        return sent > 0

    def _sent(self, waiting: deque[bytes], count: int) -> None:
        self._hold(-count)
        count += self._offset
        while waiting and count >= len(waiting[0]):
            count -= len(waiting.popleft())
        self._offset = count
        if not waiting:
            self._waiting = None

    def finish(self, last: bytes, *, drop: bool = False) -> None:
        """Accept ``last`` beyond all bounds, then close; never raises.

        The second call does nothing, except that ``drop`` still works after an overflow, which
        has closed the outbox already. An owner that has dropped once must not call again.

        Args:
            last: Farewell frames; empty if nothing can be said.
            drop: Give up the frames that have not been begun, so that the farewell comes next.
                For a client too slow to read them: it resumes, or it was told.
        """
        if drop:
            self._held = None
        else:
            self.release()
        if self.closed and not drop:
            return
        if drop and self._waiting is not None:
            # Without an offset the first frame has not been begun and goes with the rest. (Nor has
            # it with TLS: of what is encrypted already all but the last byte counts as sent, and no
            # frame has only one.)
            begun = self._waiting[0] if self._offset else b""
            self._waiting = deque((begun,)) if begun else None
            self._hold(max(0, len(begun) - self._offset) - self.waiting_bytes)
        self.closed = True
        if not last:
            return
        self.closed = False
        if self.corked:
            # What was held back would have to follow the farewell, and nothing may.
            self._waiting = None
            self.uncork(last)
        elif self._waiting is not None:
            self._waiting.append(last)
            self._hold(len(last))
        else:
            self.offer(last)
        self.closed = True

    def abandon(self) -> None:
        """Forget what waits and accept nothing more; idempotent."""
        self.closed = True
        self._held = None
        self.corked = False
        self._waiting = None
        self._offset = 0
        self._hold(-self.waiting_bytes)


class DeflatingOutbox(Outbox):
    """The outbox of a client that has negotiated compression.

    Args:
        compressor: Shared by all of a worker, so that each frame is compressed once.
    """

    __slots__ = ("_compressor",)

    def __init__(
        self, sock: socket.socket, limits: OutboxLimits, owner: Owner, compressor: Compressor
    ) -> None:
        super().__init__(sock, limits, owner)
        self._compressor = compressor

    def deliver(self, frame: bytes) -> bool:
        """Hold the frame compressed, if that makes it smaller."""
        return self.hold(frame if self.joins else self._compressed(frame))

    def deliver_now(self, frame: bytes) -> bool:
        """Offer the frame compressed, if that makes it smaller."""
        return self.offer(self._compressed(frame))

    def _compressed(self, frame: bytes) -> bytes:
        """Return the frame compressed; it may be given up if it might before."""
        packed = self._compressor.of(frame)
        if isinstance(frame, Soft) and packed is not frame:
            return frame.packed(packed)
        return packed

    def _joined(self, run: list[bytes]) -> list[bytes]:
        """Return frames as they are written; those that became one are compressed as one."""
        if not self.joins:
            return run
        return [self._compressed(frame) for frame in frames.join_texts(run)]

    def release(self) -> bool:
        """See `Outbox.release`."""
        if self.joins and isinstance(self._held, bytes):
            self._held = self._compressed(self._held)
        return super().release()
