"""Commands to Redis, awaited from Trio: redis-py's asyncio connections inside trio-asyncio.

Theory
    A crossing from Trio to asyncio and back costs about 80 us, a command in a large batch 2 us.
    So callers never cross: they append to one queue and wait. A few *lanes*, each one long-lived
    asyncio task with one connection, take everything that is waiting and carry it as one
    pipeline. A lane is roused at once when nothing is under way. While something is, requests
    collect; another lane is roused only if they have waited `PATIENCE_SECONDS`, so that one slow
    command does not hold up everybody.

    Nothing that happens to a caller reaches a connection. A caller that is cancelled or runs out
    of time only stops waiting; its reply is read all the same and thrown away. If replies have
    not come by the latest deadline of their batch, or anything else goes wrong, the connection is
    closed: one with a reply outstanding is never used again, so no caller can ever get the reply
    to somebody else's command.

What is redis-py's here: addresses, TLS, AUTH, SELECT, the parser, the classes of errors. Its
connections are used directly, because its pipeline costs ten times as much per command (a timeout
and some hooks for each reply). Its retries are off: they repeat commands whose outcome is unknown
and hide that Redis is away. Who may repeat a command is the caller, who knows whether it is safe.

Replies are as Redis sent them (RESP2): bytes, int, None, and lists of these.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import attrs
import redis.asyncio.connection as redis_asyncio
import redis.exceptions
import trio
import trio_asyncio

from trioserver.endpoint import Endpoint
from trioserver.errors import RedisRefused, RedisUnavailable
from trioserver.logs import get_logger
from trioserver.redis_direct import CONNECT_SECONDS, Reply, describe, make_connection
from trioserver.resp import Argument, pack

__all__ = ["RedisLink", "Reply", "open_link"]

DEFAULT_LANES: Final = 10
"""As many connections as REDIS_POOL_SIZE allows by default; they are opened when needed."""

TIMEOUT_SECONDS: Final = 1.0
"""For one command: a Redis that needs longer is as good as away."""

RESOLVE_SECONDS: Final = 6.0
"""For the address of a host name: where the first name server is dead, answers come after 5 s."""

PATIENCE_SECONDS: Final = 0.002
"""How long requests wait behind a batch under way before they get a lane of their own."""

QUEUE_REQUESTS: Final = 10_000
"""Requests that wait; further callers wait for room, within their own time."""

BATCH_COMMANDS: Final = 1_000
BATCH_BYTES: Final = 1 << 20
"""A batch is closed when it has reached one of these: its last reply is not too far away."""

_log = get_logger()


# Requests and the queue between Trio and asyncio. Both run in one thread, turn by turn, so plain
# attributes are enough; what crosses is only the wake-up.


@attrs.define(eq=False)
class _Request:
    """What one caller waits for."""

    name: str
    """The first command's, for messages."""
    packed: bytes
    commands: int
    deadline: float
    """On Trio's clock, which is the asyncio loop's too."""
    answered: trio.Event = attrs.field(factory=trio.Event)
    replies: list[Reply | RedisRefused] = attrs.field(factory=list)
    problem: str = ""
    """Why there are no replies; empty if there are."""
    abandoned: bool = False
    """Nobody waits any more."""

    def answer(self, problem: str = "") -> None:
        self.problem = problem
        self.answered.set()


class _Queue:
    """Requests on their way from Trio to the lanes."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.room = trio.Event()
        """Set, and replaced, whenever requests were taken."""
        self._loop = loop
        self._waiting: deque[_Request] = deque()
        self._sleepers: list[asyncio.Future[None]] = []
        """Idle lanes. The last to fall asleep is roused first: few connections stay in use."""
        self._roused = False
        """A lane is on its way; it will take what comes until then."""
        self._busy = 0
        self._patience: asyncio.TimerHandle | None = None

    @property
    def full(self) -> bool:
        return len(self._waiting) >= QUEUE_REQUESTS

    def put(self, request: _Request) -> None:
        """Queue ``request``. From Trio."""
        self._waiting.append(request)
        if self._roused:
            return
        if not self._busy:
            self._rouse()
        elif self._patience is None and self._sleepers:
            self._patience = self._loop.call_later(PATIENCE_SECONDS, self._out_of_patience)

    async def take(self) -> list[_Request]:
        """Wait for requests and return them; `done` must follow. From asyncio."""
        while not (batch := self._take()):
            sleeper: asyncio.Future[None] = self._loop.create_future()
            self._sleepers.append(sleeper)
            await sleeper
        self._busy += 1
        return batch

    def done(self) -> None:
        """Say that what was taken has been answered. From asyncio."""
        self._busy -= 1

    def close(self, problem: str) -> None:
        """Answer everything that waits with ``problem``."""
        while self._waiting:
            self._waiting.popleft().answer(problem)
        self._make_room()

    def _take(self) -> list[_Request]:
        self._roused = False
        batch: list[_Request] = []
        taken = commands = size = 0
        now = trio.current_time()
        while self._waiting and commands < BATCH_COMMANDS and size < BATCH_BYTES:
            request = self._waiting.popleft()
            taken += 1
            # Never sent, so certainly without effect; and too late to be of use.
            if request.abandoned or request.deadline <= now:
                continue
            batch.append(request)
            commands += request.commands
            size += len(request.packed)
        if self._waiting:
            self._rouse()
        elif self._patience is not None:
            self._patience.cancel()
            self._patience = None
        if taken:
            self._make_room()
        return batch

    def _make_room(self) -> None:
        self.room.set()
        self.room = trio.Event()

    def _rouse(self) -> None:
        while self._sleepers:
            sleeper = self._sleepers.pop()
            if not sleeper.done():  # a lane that is being stopped has cancelled it
                sleeper.set_result(None)
                self._roused = True
                return

    def _out_of_patience(self) -> None:
        self._patience = None
        if self._waiting and not self._roused:
            self._rouse()


class RedisLink:
    """Commands to one Redis; made by `open_link`."""

    def __init__(self, where: Endpoint, queue: _Queue, observe: Callable[[float], object]) -> None:
        self._observe = observe
        self._target = where.target
        self._queue = queue
        self._closed = False

    async def execute(
        self,
        *command: Argument,
        timeout: float = TIMEOUT_SECONDS,  # noqa: ASYNC109 - also the lane's deadline
    ) -> Reply:
        """Run one command that does not block.

        Args:
            command: Name and arguments.
            timeout: Seconds for everything: the queue, a connection, the reply.

        Raises:
            RedisRefused: Redis answered with an error; the text begins with its code.
            RedisUnavailable: No reply. Whether the command had an effect is unknown.

        Cancellation:
            Safe for everybody else; whether the command had an effect is unknown.
        """
        (reply,) = await self.pipeline([command], timeout=timeout)
        if isinstance(reply, RedisRefused):
            raise reply
        return reply

    async def pipeline(
        self,
        commands: Iterable[tuple[Argument, ...]],
        *,
        timeout: float = TIMEOUT_SECONDS,  # noqa: ASYNC109 - also the lane's deadline
    ) -> list[Reply | RedisRefused]:
        """Run several commands, in order, in one round trip; not a transaction.

        Args:
            commands: Name and arguments of each.
            timeout: Seconds for everything: the queue, a connection, all replies.

        Returns:
            One reply per command; `RedisRefused`, as a value, for those that Redis refused.

        Raises:
            RedisUnavailable: Not all replies came. Which commands had an effect is unknown.

        Cancellation:
            Safe for everybody else; which commands had an effect is unknown.
        """
        listed = list(commands)
        if not listed:
            await trio.lowlevel.checkpoint()
            return []
        first = listed[0][0]
        request = _Request(
            name=first.decode(errors="replace") if isinstance(first, bytes) else str(first),
            packed=b"".join([pack(*command) for command in listed]),
            commands=len(listed),
            deadline=trio.current_time() + timeout,
        )
        with trio.move_on_at(request.deadline):
            await self._ask(request)
        if not request.answered.is_set():
            request.problem = f"no answer within {timeout:g} s"
        if request.problem:
            raise RedisUnavailable(f"{request.name}: {request.problem} ({self._target})")
        self._observe(timeout - (request.deadline - trio.current_time()))
        return request.replies

    async def ping(self, *, timeout: float = TIMEOUT_SECONDS) -> float:  # noqa: ASYNC109
        """Return the seconds that a PING takes from here and back.

        Raises:
            RedisUnavailable: No reply.
            RedisRefused: Redis answered with an error.
        """
        started = trio.current_time()
        await self.execute(b"PING", timeout=timeout)
        return trio.current_time() - started

    async def _ask(self, request: _Request) -> None:
        """Queue ``request`` and wait; it is abandoned if that is cut short."""
        try:
            while self._queue.full and not self._closed:
                await self._queue.room.wait()
            if self._closed:
                request.answer("the link is closed")
            else:
                self._queue.put(request)
            await request.answered.wait()
        finally:
            request.abandoned = True

    def _close(self) -> None:
        self._closed = True
        self._queue.close("the link is closed")


class _Lane:
    """One connection and the asyncio task that owns it: nobody else ever touches it."""

    def __init__(self, where: Endpoint, client_name: str, queue: _Queue) -> None:
        self._connection: redis_asyncio.AbstractConnection = make_connection(
            redis_asyncio,
            where,
            socket_connect_timeout=None,  # a limit for all of it: see `_connect`
            socket_timeout=None,  # a deadline per batch, not a timer per reply
        )
        self._where = where
        self._set_name = pack("CLIENT", "SETNAME", client_name)
        self._queue = queue

    async def run(self) -> None:
        """Carry batches until cancelled."""
        try:
            while True:
                batch = await self._queue.take()
                try:
                    await self._carry(batch)
                finally:
                    self._queue.done()
        finally:
            # Not "nowait": a TLS transport that has not said goodbye would outlive its loop.
            with suppress(redis.exceptions.RedisError, OSError):
                await self._connection.disconnect()

    async def _carry(self, batch: list[_Request]) -> None:
        """Get ``batch`` answered, one way or the other."""
        problem = "the link is closed"  # unless we get further: that is what cancelled us
        try:
            # Not bounded by what the callers can wait: where names are found slowly, each batch
            # would break off the attempt that the next one could have used.
            await self._connect()
            now = trio.current_time()
            batch = [one for one in batch if one.deadline > now and not one.abandoned]
            if batch:
                async with asyncio.timeout_at(max(request.deadline for request in batch)):
                    await self._exchange(batch)
            return
        except TimeoutError:
            problem = "no answer in time"
        except (redis.exceptions.RedisError, OSError) as error:
            problem = self._where.masked(describe(error))
        except Exception:  # noqa: BLE001 - a bug must not end the worker, and must not go unseen
            _log.exception("redis: a bug of ours broke a connection")
            problem = "internal error"
        finally:
            unanswered = [request for request in batch if not request.answered.is_set()]
            for request in unanswered:
                request.answer(problem)
            if unanswered:
                # Replies may be outstanding: this connection must never carry anything again.
                await self._connection.disconnect(nowait=True)

    async def _connect(self) -> None:
        connection = self._connection
        # Bytes or the end of the stream while nothing was asked: closed by Redis, or confused.
        if connection.is_connected and await connection.can_read():
            await connection.disconnect(nowait=True)
        if connection.is_connected:
            return
        resolving = 0.0
        if self._where.path is None:
            # Only to know how long it takes: redis-py resolves by itself, once more.
            loop = asyncio.get_running_loop()
            started = loop.time()
            async with asyncio.timeout(RESOLVE_SECONDS):
                await loop.getaddrinfo(self._where.host, self._where.port)
            resolving = loop.time() - started
        async with asyncio.timeout(resolving + CONNECT_SECONDS):
            await connection.connect()  # type: ignore[no-untyped-call]
            # Not redis-py's "client_name": there, a user who may not use CLIENT has no connection.
            await connection.send_packed_command(self._set_name, check_health=False)
            with suppress(redis.exceptions.ResponseError):
                await connection.read_response()

    async def _exchange(self, batch: list[_Request]) -> None:
        connection = self._connection
        await connection.send_packed_command(
            b"".join([request.packed for request in batch]), check_health=False
        )
        for request in batch:
            for _ in range(request.commands):
                reply: Reply | RedisRefused
                try:
                    reply = await connection.read_response()
                except redis.exceptions.ResponseError as error:
                    reply = RedisRefused(self._where.masked(describe(error)))
                request.replies.append(reply)
            request.answer()


@asynccontextmanager
async def open_link(
    where: Endpoint,
    *,
    client_name: str = "trioserver",
    lanes: int = DEFAULT_LANES,
    observe: Callable[[float], object] = lambda _seconds: None,
) -> AsyncIterator[RedisLink]:
    """Open a `RedisLink` for the time of the block; Redis need not be there.

    Args:
        where: The Redis.
        client_name: For CLIENT LIST; no spaces.
        lanes: Most connections at a time; each is opened when it is first needed.
        observe: Called with the seconds that each answered request took.

    Cancellation:
        Callers still waiting get `RedisUnavailable`; all connections are closed.
    """
    failure: Exception | None = None
    async with trio_asyncio.open_loop() as loop, trio.open_nursery() as nursery:
        # The default would end the whole worker for a hiccup of one transport.
        loop.set_exception_handler(_asyncio_problem)
        # The loop's own resolver is a thread that cannot be left alone: a link that is closed
        # while it looks a name up would hang for ever.
        resolve = trio_asyncio.trio_as_aio(trio.socket.getaddrinfo)
        loop.getaddrinfo = resolve
        queue = _Queue(loop)
        link = RedisLink(where, queue, observe)
        for _ in range(lanes):
            nursery.start_soon(_run_lane, loop, _Lane(where, client_name, queue))
        try:
            yield link
        except Exception as error:  # noqa: BLE001 - raised below, outside of the nurseries, which
            failure = error  # would wrap what the caller's own block raised into groups
        finally:
            link._close()  # noqa: SLF001 - the other half of the same idea
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _run_lane(loop: trio_asyncio.TrioEventLoop, lane: _Lane) -> None:
    await loop.run_aio_coroutine(lane.run())


def _asyncio_problem(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    _log.warning(
        "redis: asyncio complains",
        problem=context.get("message", ""),
        error=repr(context.get("exception")),
    )
