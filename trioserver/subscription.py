"""The hot subscription: one connection per worker on which everything published arrives.

Theory
    `Subscription.run` is the only owner of the connection. It lives through one *link* after the
    other: connect, greet, subscribe everything wanted, be ``up``, read until a fault, start over
    after a pause. Three tasks share a link, in one nursery: the reader (the only one that
    receives), the writer (the only one that sends) and the watch (which notices silence). The
    first of them to end, by whatever, ends the link. There is no other way out: the end of the
    stream, an exception, an error reply and a reply that nobody asked for are all *faults*.

    Which channels are wanted and confirmed is the business of `trioserver.roster`, which counts
    replies. A `Batch` is who waits for such a count: all channels that were asked for while the
    previous SUBSCRIBE was on its way share one.

    While the link is down, `Subscription.follow` collects; the next link asks for everything at
    once, and ``up`` means that all of it is confirmed.

    What Redis says on one link arrives in order, so a PING is also a milestone: when its answer
    has been read, everything that Redis had said before has been delivered. That is how somebody
    who misses a message can tell "lost" from "not yet read": see `Subscription.milestone`.

The reader is the hottest loop of a worker besides sending: about 0.5 us per message, of which
most is hiredis. It calls ``deliver`` and awaits only what that returns. It gives other tasks
their turn every `MESSAGES_PER_TURN` messages, because one read may carry thousands.
"""

import math
import random
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, NoReturn, Protocol

import attrs
import hiredis
import trio

from trioserver.endpoint import Endpoint, tls_context
from trioserver.errors import RedisError, RedisUnavailable
from trioserver.logs import get_logger
from trioserver.rate_limit import RateLimited
from trioserver.resp import (
    MESSAGE,
    PING,
    Confirmation,
    Greeting,
    Pong,
    interpret,
    subscribe,
    unsubscribe,
)
from trioserver.roster import Roster

if TYPE_CHECKING:
    import ssl

Deliver = Callable[[bytes, bytes], Awaitable[None] | None]
"""Takes (channel, payload). What it returns is awaited before the next message is looked at."""

CONNECT_SECONDS: Final = 1.0
"""For the connection, TLS and the greeting together, once the address is known."""

RESOLVE_SECONDS: Final = 6.0
"""For the address of a host name: where the first name server is dead, answers come after 5 s."""

RETRY_FIRST: Final = 0.1
RETRY_CAP: Final = 5.0
RETRY_CAP_LOCAL: Final = 0.5
"""Seconds: the pause before attempt n is random between 0 and min(cap, first * 2**n). On a Unix
socket no crowd of strangers comes back with us, so there is no reason to be late."""

STEADY_SECONDS: Final = 5.0
"""A link that was up for less than this died young."""

YOUNG_DEATHS_PER_DOUBLING: Final = 20
"""An accident that repeats itself may kill some links in a row, and each gets its successor
within a second; but where every link dies young, because of what we do or what somebody else
does to us, subscribing to thousands of channels over and over makes it worse."""

LINGER_SECONDS: Final = 1.0
"""How long a released channel stays subscribed: most clients that leave come right back."""

GATHER_SECONDS: Final = 0.005
"""Longest time for which requests are collected while the previous ones are unconfirmed."""

SILENCE_SECONDS: Final = 2.7
"""Without a byte from Redis for this long, the link is given up. After a quarter of it Redis is
asked for a sign of life, so it has 2 s to give one; a twelfth of it is how often we look. So a
black hole is noticed within 3 s."""

REPORT_SECONDS: Final = 60.0
"""At most one log line per this time about the same bug."""

FAULT_REPORT_SECONDS: Final = 5.0
"""During an outage: least time between two log lines about why it goes on."""

READ_BYTES: Final = 64 * 1024
"""Above 128 KiB malloc maps fresh pages for every read: 6 us more per message that comes alone."""

MESSAGES_PER_TURN: Final = 128

_NOTHING: Final = object()
"""What hiredis returns when no reply is complete; its default, False, is a value of RESP3."""

_EXPECTED: Final = (
    OSError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
    hiredis.HiredisError,
    RedisError,
)
"""How a link ends without any bug of ours."""

_log = get_logger()


class Waiter(Protocol):
    """Who is told that a batch is confirmed."""

    def followed(self) -> None:
        """Take note. Must not raise: if it does, that is logged, and is nobody else's trouble."""


class Batch:
    """Channels that were asked for together."""

    __slots__ = ("_confirmed", "_waiters")

    def __init__(self) -> None:
        self._confirmed = trio.Event()
        self._waiters: set[Waiter] = set()

    async def wait(self) -> None:
        """Return when Redis has confirmed all of them on one live link, after however many faults.

        Cancellation:
            Safe: the channels are subscribed all the same, until they are released.
        """
        await self._confirmed.wait()

    @property
    def confirmed(self) -> bool:
        """Whether `wait` would return at once."""
        return self._confirmed.is_set()

    def notify(self, waiter: Waiter) -> None:
        """Call ``waiter.followed()``, once, when `wait` returns; for those who are no task.

        Waking a task costs 10 us, and thousands may wait for one batch. Not for a batch that is
        `confirmed` already: nothing calls then.
        """
        self._waiters.add(waiter)

    def forget(self, waiter: Waiter) -> None:
        """Do not call ``waiter`` any more. Idempotent."""
        self._waiters.discard(waiter)

    def _confirm(self, bug: Callable[[str], None]) -> None:
        self._confirmed.set()
        while self._waiters:
            try:
                self._waiters.pop().followed()
            except Exception:  # noqa: BLE001 - reported there; the other waiters are not to blame
                bug("a waiter failed")


@attrs.frozen(kw_only=True)
class SubscriptionStatistics:
    """What a subscription has been through. Counters start at 0 and never fall."""

    up: bool
    channels: int
    """Followed now, lingering ones included."""
    messages: int
    links: int
    """How often it came up."""
    faults: int
    """Links that ended and attempts that failed."""
    fault: str
    """The latest of them, in words; empty if there was none."""
    deliver_failures: int
    """Messages whose ``deliver`` raised: bugs of ours."""


@attrs.define(eq=False)
class _Link:
    """One connection, and what its three tasks know of each other."""

    stream: trio.abc.Stream
    reader: hiredis.Reader
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    fault: str = ""
    """Why it ended; empty while it lives."""
    work: trio.Event = attrs.field(factory=trio.Event)
    """Set when the writer has something to do."""
    ping: bool = False
    """Whether the writer shall send PING."""
    asking: list[Callable[[], None]] = attrs.field(factory=list)
    """Who wants to know when the next PING has been answered."""
    pinged: deque[list[Callable[[], None]]] = attrs.field(factory=deque)
    """Who wants to know that of the PINGs that are on their way; one list for each."""
    waiting_since: float | None = None
    """When the reader began to wait for bytes; None while it is busy with messages."""
    up_mark: int | None = None
    """Confirmations that make it ``up``; None until the first round is taken."""
    up_since: float = math.inf

    def end(self, fault: str) -> None:
        """End it; the first to say why is believed."""
        self.fault = self.fault or fault
        self.scope.cancel()


class Subscription:
    """Channels of one Redis that this worker follows.

    Args:
        endpoint: Where Redis is.
        deliver: Called with each message, in the order of arrival. What it raises is logged and
            counted; the message is lost, the link is not.
        on_change: Called whenever `up` has flipped.
        client_name: For CLIENT LIST; no spaces.
        linger: Seconds for which a released channel stays subscribed.
        silence: Seconds without a byte from Redis after which the link is given up.
        jitter: Source of the pauses between attempts; seed it for a repeatable run.
        turn_over: Called when others are about to have their turn, after messages. Must not raise.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        deliver: Deliver,
        on_change: Callable[[], None],
        *,
        client_name: str = "trioserver",
        linger: float = LINGER_SECONDS,
        silence: float = SILENCE_SECONDS,
        jitter: random.Random | None = None,
        turn_over: Callable[[], None] = lambda: None,
    ) -> None:
        self.up = False
        """Whether everything that was followed when the link came is confirmed on it."""
        self._endpoint = endpoint
        self._deliver = deliver
        self._on_change = on_change
        self._turn_over = turn_over
        self._client_name = client_name
        self._silence = silence
        self._retry_cap = RETRY_CAP if endpoint.path is None else RETRY_CAP_LOCAL
        self._jitter = jitter or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._tls = None if endpoint.tls is None else tls_context(endpoint.tls)

        self._link: _Link | None = None
        self._roster = Roster(linger=linger)
        self._gathering: list[Batch] = []
        """Who waits for the writer's next round. Several only after a link has ended."""
        self._unconfirmed: deque[tuple[int, list[Batch]]] = deque()
        """Rounds on their way: how many confirmations complete them, and who waits for that."""

        self._attempts = 0
        """Failed ones since it was last up."""
        self._young_deaths = 0
        """Links in a row, up to now, that died young."""
        self._fault = self._fault_logged = ""
        self._next_fault_log = -math.inf
        self._bugs = RateLimited(REPORT_SECONDS)
        self._messages = self._links = self._faults = self._deliver_failures = 0

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> NoReturn:
        """Keep the subscription alive until cancelled. Started at once, `up` or not.

        Cancellation:
            The connection is closed; what was followed stays followed for another `run`.
        """
        task_status.started()
        while True:
            fault = ""
            try:
                fault = await self._one_link()
            finally:
                self._lost(fault)  # empty: not a fault, we are being stopped
            doublings = self._attempts + self._young_deaths / YOUNG_DEATHS_PER_DOUBLING
            pause = min(self._retry_cap, RETRY_FIRST * 2.0 ** min(doublings, 10.0))
            self._attempts += 1
            await trio.sleep(self._jitter.uniform(0, pause))

    def follow(self, channel: bytes) -> Batch | None:
        """Want ``channel`` until `release`. Idempotent.

        Returns:
            None if Redis has confirmed it already: what is published from now on arrives. Else
            the batch to wait for.
        """
        if self._roster.follow(channel):
            return None
        if not self._roster.is_joining(channel):
            # Asked for, unconfirmed. Rounds are confirmed in order, so the last one will do.
            return self._unconfirmed[-1][1][-1]
        if not self._gathering:
            self._gathering.append(Batch())
            self._wake()
        return self._gathering[-1]

    def release(self, channel: bytes) -> None:
        """No longer want ``channel``. Idempotent; takes effect some time after ``linger``."""
        if self._roster.release(channel, trio.current_time()):
            self._wake()

    def reconnect(self, reason: str) -> None:
        """Drop the link at once and make a new one. Nothing happens if there is none."""
        if self._link is not None:
            self._link.end(reason)

    def milestone(self, reached: Callable[[], None]) -> bool:
        """Find out when everything that Redis has said on this link so far has been delivered.

        Args:
            reached: Called then, once; never if the link ends before. Must not raise.

        Returns:
            Whether it is `up`; if not, nothing is called.
        """
        if self._link is None or not self.up:
            return False
        self._link.asking.append(reached)
        self._link.ping = True
        self._link.work.set()
        return True

    def statistics(self) -> SubscriptionStatistics:
        """Return what happened so far."""
        return SubscriptionStatistics(
            up=self.up,
            channels=len(self._roster),
            messages=self._messages,
            links=self._links,
            faults=self._faults,
            fault=self._fault,
            deliver_failures=self._deliver_failures,
        )

    # One link, from the connection to the fault.

    async def _one_link(self) -> str:
        """Connect and live; return the fault that ended it."""
        try:
            resolving = await _resolve(self._endpoint)
            with trio.move_on_after(resolving + CONNECT_SECONDS) as limit:
                link = await self._open()
            if limit.cancelled_caught:
                return f"no connection within {CONNECT_SECONDS:g} s"
        except Exception as error:  # noqa: BLE001 - as in `_run_part`
            return self._fault_of(error)
        self._link = link
        link.work.set()  # the first round: everything that is wanted
        try:
            with link.scope:
                async with trio.open_nursery() as nursery:
                    for part in (self._read, self._write, self._watch):
                        nursery.start_soon(self._run_part, part, link)
        finally:
            await trio.aclose_forcefully(link.stream)
        return link.fault

    async def _open(self) -> _Link:
        stream = await _connect(self._endpoint, self._tls)
        try:
            reader = hiredis.Reader(notEnoughData=_NOTHING)
            greeting = Greeting(where=self._endpoint, client_name=self._client_name)
            say = greeting.hello()
            while not greeting.done:
                if say:
                    await stream.send_all(say)
                say = greeting.receive(await _next_reply(stream, reader))
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return _Link(stream, reader)

    async def _run_part(self, part: Callable[[_Link], Awaitable[str]], link: _Link) -> None:
        """Run the reader, the writer or the watch: whatever its end is, it ends the link."""
        try:
            fault = await part(link)
        except Exception as error:  # noqa: BLE001 - a bug must not end the worker
            fault = self._fault_of(error)
        link.end(fault)

    def _fault_of(self, error: Exception) -> str:
        """Return what to call the end of a link, or of an attempt; a bug of ours is logged."""
        if isinstance(error, _EXPECTED):
            return _describe(error)
        self._log_bug("a bug of ours ended the link")
        return "internal error"

    async def _read(self, link: _Link) -> str:
        """Feed the parser and handle what comes out, until the end of the stream."""
        receive = link.stream.receive_some
        feed = link.reader.feed
        now = trio.current_time
        while True:
            await self._handle(link)  # the first time: what came behind the greeting
            link.waiting_since = now()
            data = await receive(READ_BYTES)
            link.waiting_since = None
            if not data:
                return "Redis closed the connection"
            feed(data)  # type: ignore[arg-type] # the stub forgets bytearray

    async def _handle(self, link: _Link) -> None:
        """Handle every complete reply that the parser holds. The hot loop."""
        gets = link.reader.gets
        deliver = self._deliver
        left = MESSAGES_PER_TURN
        try:
            while (reply := gets()) is not _NOTHING:
                if isinstance(reply, list) and len(reply) == 3 and reply[0] == MESSAGE:  # noqa: PLR2004
                    self._messages += 1
                    try:
                        waiting = deliver(reply[1], reply[2])
                        if waiting is not None:
                            self._turn_over()
                            await waiting
                    except Exception:  # noqa: BLE001 - reported there; the next is not to blame
                        self._deliver_failed()
                elif (meaning := interpret(reply)) is not None:
                    self._take(link, meaning)
                left -= 1
                if not left:
                    left = MESSAGES_PER_TURN
                    self._turn_over()
                    await trio.lowlevel.checkpoint()
        finally:
            # Also behind a fault: what came before it was good, and the next link may be far off.
            self._turn_over()

    def _take(self, link: _Link, meaning: Confirmation | Pong) -> None:
        """Take what is no message."""
        if isinstance(meaning, Confirmation):
            self._roster.confirm(meaning)
            self._settle(link)
        elif link.pinged:
            for reached in link.pinged.popleft():
                reached()

    async def _write(self, link: _Link) -> NoReturn:
        """Send what there is to send; bounded by the watch, for Redis answers all of it."""
        while True:
            with trio.move_on_at(self._roster.next_sweep()):
                await link.work.wait()
            link.work = trio.Event()
            batches = await self._send_round(link)
            if batches:
                # Who comes now shares the next round, instead of a command of their own.
                with trio.move_on_after(GATHER_SECONDS):
                    await batches[-1].wait()

    async def _send_round(self, link: _Link) -> list[Batch]:
        """Send one round; return who waits for it."""
        ping, link.ping = link.ping, False
        take = self._roster.take(trio.current_time())
        batches, self._gathering = self._gathering, []
        if take.subscribe and not batches:
            batches.append(Batch())  # for those who will ask before it is confirmed
        if batches:
            self._unconfirmed.append((take.mark, batches))
        if link.up_mark is None:
            link.up_mark = take.mark
        self._settle(link)
        if ping:
            asking, link.asking = link.asking, []
            link.pinged.append(asking)
            await link.stream.send_all(PING)
        for commands in (subscribe(take.subscribe), unsubscribe(take.unsubscribe)):
            for command in commands:
                await link.stream.send_all(command)
        return batches

    async def _watch(self, link: _Link) -> str:
        """Return when Redis has been silent for too long, even after a PING."""
        look = self._silence / 12
        silent_since: float | None = None
        pinged = False
        away = 0.0
        """For how long this process itself was stopped or busy: that is no silence of Redis."""
        while True:
            before = trio.current_time()
            await trio.sleep(look)
            now = trio.current_time()
            since = link.waiting_since
            if since is None:
                continue
            if since != silent_since:
                silent_since, pinged, away = since, False, 0.0
            away += min(max(0.0, now - before - 2 * look), now - since)
            silence = now - silent_since - away
            if silence > self._silence:
                return f"Redis was silent for {silence:.1f} s"
            if silence > self._silence / 4 and not pinged:
                pinged = link.ping = True
                link.work.set()

    # What the tasks of a link and the callers share.

    def _wake(self) -> None:
        if self._link is not None:
            self._link.work.set()

    def _settle(self, link: _Link) -> None:
        """Tell those whose count has been reached."""
        confirmations = self._roster.confirmations
        if not self.up and link.up_mark is not None and confirmations >= link.up_mark:
            self.up = True
            link.up_since = trio.current_time()
            self._links += 1
            self._fault_logged = ""
            _log.info(
                "redis subscription is up",
                target=self._endpoint.target,
                channels=len(self._roster),
                failed_attempts=self._attempts,
            )
            self._attempts = 0
            self._on_change()
        while self._unconfirmed and self._unconfirmed[0][0] <= confirmations:
            for batch in self._unconfirmed.popleft()[1]:
                batch._confirm(self._log_bug)  # noqa: SLF001 - the other half of the same idea

    def _lost(self, fault: str) -> None:
        """The link has ended, or never came: start over with what is wanted."""
        link, self._link = self._link, None
        if link is not None:
            young = trio.current_time() - link.up_since < STEADY_SECONDS
            self._young_deaths = self._young_deaths + 1 if young else 0
        if fault:
            self._fault = fault
            self._faults += 1
            self._log_fault(fault)
        self._roster.lost()
        waiting = [batch for _, batches in self._unconfirmed for batch in batches]
        self._gathering = waiting + self._gathering
        self._unconfirmed.clear()
        if self.up:
            self.up = False
            try:
                self._on_change()
            except Exception:  # noqa: BLE001 - no link is left that it could end
                self._log_bug("who was told that the link is down failed")

    def _deliver_failed(self) -> None:
        self._deliver_failures += 1
        self._log_bug("a message could not be delivered")

    # Logs.

    def _log_fault(self, fault: str) -> None:
        """Log why an outage began, and why it goes on if that has changed."""
        now = trio.current_time()
        begins = not self._fault_logged
        if begins or (fault != self._fault_logged and now >= self._next_fault_log):
            self._fault_logged = fault
            self._next_fault_log = now + FAULT_REPORT_SECONDS
            event = "redis subscription is down" if begins else "redis subscription is still down"
            _log.warning(event, target=self._endpoint.target, reason=fault)

    def _log_bug(self, event: str) -> None:
        """Log the exception being handled, which is nobody's fault but ours."""
        held_back = self._bugs.due(event, trio.current_time())
        if held_back is not None:
            _log.exception(f"redis subscription: {event}", held_back=held_back)


async def _resolve(endpoint: Endpoint) -> float:
    """Return how long it takes to find the address; to connect, it is looked up once more.

    Raises:
        OSError: There is none.
        RedisUnavailable: It takes too long.
    """
    if endpoint.path is not None:
        return 0.0
    started = trio.current_time()
    with trio.move_on_after(RESOLVE_SECONDS):
        await trio.socket.getaddrinfo(endpoint.host, endpoint.port)
        return trio.current_time() - started
    raise RedisUnavailable(f"no address of {endpoint.host} within {RESOLVE_SECONDS:g} s")


async def _connect(endpoint: Endpoint, tls: "ssl.SSLContext | None") -> trio.abc.Stream:
    if endpoint.path is not None:
        return await trio.open_unix_socket(endpoint.path)
    stream = await trio.open_tcp_stream(endpoint.host, endpoint.port)
    if tls is None:
        return stream
    # Servers just close, without a farewell of TLS: "https_compatible" makes that an ordinary end.
    return trio.SSLStream(stream, tls, server_hostname=endpoint.host, https_compatible=True)


async def _next_reply(stream: trio.abc.Stream, reader: hiredis.Reader) -> object:
    while (reply := reader.gets()) is _NOTHING:
        data = await stream.receive_some(READ_BYTES)
        if not data:
            raise RedisUnavailable("Redis closed the connection during the greeting")
        reader.feed(data)  # type: ignore[arg-type] # the stub forgets bytearray
    return reply


def _describe(error: BaseException) -> str:
    """Return one line for a person: what Redis said, or what the system did."""
    if isinstance(error, RedisError):
        return str(error)
    cause = f" ({error.__cause__})" if error.__cause__ is not None else ""
    return f"{str(error) or type(error).__name__}{cause}"
