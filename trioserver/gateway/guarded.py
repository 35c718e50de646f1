"""One connection of the internal port: Hypercorn's, with the guard between it and the socket.

The guard's refusals are answered here, in their turn: a request that came before is answered
first. If Hypercorn has the head of the refused request already, whatever it still says about that
is thrown away. What the client has sent meanwhile is read for a moment, because unread input would
make the kernel answer with a reset, which destroys the response on its way.

Hypercorn writes under a shield, so a client that does not read could hold it for ever: here writing
has a limit, and `GuardedStream.abort` ends it at once.
"""

from collections.abc import Callable
from typing import Final, cast

import trio
from hypercorn.config import Config
from hypercorn.events import Event, Updated
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState, LifespanState

from trioserver.gateway.body import LINGER_BYTES, LINGER_SECONDS
from trioserver.gateway.guard import Guard
from trioserver.handshake import Refusal

SEND_SECONDS: Final = 30.0
"""For one piece of an answer, whole pages of metrics included."""

_INTERIM: Final = b"HTTP/1.1 100 "


class GuardedStream:
    """What Hypercorn takes for the stream of a connection."""

    def __init__(
        self,
        stream: trio.SocketStream,
        address: int | None,
        refused: Callable[[int | None, Refusal, str], Refusal],
    ) -> None:
        """Prepare.

        Args:
            stream: To the client.
            address: Under which key limits count the client; None if they do not.
            refused: Called with that key, what the guard refuses and the request's id; returns
                what is answered.
        """
        self.socket = stream.socket
        self.address = address
        self._stream = stream
        self._refused = refused
        self._guard = Guard()
        self._busy = False
        self._served = False
        self._changed_at = trio.current_time()
        self._answered = False
        """Whether the response to the request under way has begun."""
        self._muted = False
        self._idle = trio.Event()

    @property
    def resting_since(self) -> float | None:
        """Since when no request has been under way; None while there is one."""
        return None if self._busy else self._changed_at

    @property
    def expects_nothing(self) -> bool:
        """Whether there was a request, and nothing of another one has come."""
        return self._served and not (self._busy or self._muted or self._guard.begun)

    def note(self, *, idle: bool) -> None:
        """Note that Hypercorn has begun with a request, or is done with it."""
        self._busy = not idle
        self._served = self._served or self._busy
        self._changed_at = trio.current_time()
        if idle:
            self._idle.set()
            self._idle = trio.Event()
        else:
            self._answered = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return what may pass, a head always whole; nothing after the end or a refusal.

        Raises:
            trio.BrokenResourceError: As the stream's.
            trio.ClosedResourceError: Likewise.
        """
        try:
            while not (passed := self._guard.take()):
                data = await self._stream.receive_some(max_bytes)
                if not data:
                    self._guard.end()
                    return b""
                self._guard.receive(bytes(data))
        except Refusal as refusal:
            await self._refuse(refusal)
            return b""
        return passed

    async def send_all(self, data: bytes) -> None:
        """Send what Hypercorn says, unless the client has been answered already.

        Raises:
            trio.BrokenResourceError: The client is gone, or did not take it in time.
            trio.ClosedResourceError: `abort` was called.
        """
        if self._muted:
            return
        self._answered = self._answered or not data.startswith(_INTERIM)
        with trio.move_on_after(SEND_SECONDS) as limit:
            await self._stream.send_all(data)
        if limit.cancelled_caught:
            self.abort()
            raise trio.BrokenResourceError("the client did not read in time")

    async def send_eof(self) -> None:
        """As the stream's."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """As the stream's."""
        self.note(idle=True)
        await self._stream.aclose()

    def abort(self) -> None:
        """Close the socket now; whoever waits for it is told. Idempotent."""
        self.note(idle=True)
        self.socket.close()

    async def _refuse(self, refusal: Refusal) -> None:
        if self._guard.within:
            if self._answered:
                return  # a verdict on the head; whoever got it knows enough
        elif self._busy:
            await self._idle.wait()
        self._muted = True
        request_id = self._guard.request_id
        answer = self._refused(self.address, refusal, request_id)
        with trio.move_on_after(LINGER_SECONDS):
            await part(self._stream, answer.response(request_id=request_id), LINGER_BYTES)


async def part(stream: trio.SocketStream, answer: bytes, linger_bytes: int) -> None:
    """Say the last word, and read what the client still sends, so that it comes to see that.

    Args:
        stream: To the client; may be gone.
        answer: A whole one.
        linger_bytes: How much is read; 0 only sends.

    Cancellation:
        Safe. What was not read yet may destroy the answer.
    """
    taken = 0
    try:
        await stream.send_all(answer)
        await stream.send_eof()
        while taken < linger_bytes and (data := await stream.receive_some()):
            taken += len(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # it did not wait for the answer


class GuardedConnection(TCPServer):
    """Hypercorn's server of one connection, which tells the guard where it is."""

    def __init__(
        self, app: AppWrapper, config: Config, context: WorkerContext, stream: GuardedStream
    ) -> None:
        """Prepare; `run` serves."""
        self._guarded = stream
        self._ended = False
        # It asks for a TLS stream, and copes with one that is none.
        typed = cast("trio.SSLStream[trio.SocketStream]", stream)
        super().__init__(app, config, context, cast("LifespanState", ConnectionState({})), typed)

    async def protocol_send(self, event: Event) -> None:
        """Pass on what the protocol says."""
        if isinstance(event, Updated):
            self._guarded.note(idle=event.idle)
            if self._ended:
                return  # else it would wait for the next request of a client that is gone
        await super().protocol_send(event)

    async def _read_data(self) -> None:
        await super()._read_data()
        self._ended = True
        await self.idle_task.stop()
