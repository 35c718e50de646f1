"""A worker process: its parts put together, its start, its drain. ``python -m trioserver.worker``.

Nesting spells the order of the end, from the inside out:

    services       pump, timers, Redis, subscription, canary, signs of life, metrics
      connections  one task and nursery each
        the door   accepts, until the drain closes it

A worker is *started* as soon as a client could connect, with Redis or without: connections are
taken and told ``unavailable``. It is *ready* while its canary is fresh (a message it published
came back on the ordinary path), it has room, and it is not draining.
"""

import argparse
import gc
import math
import os
import resource
import secrets
import socket
import ssl
import sys
import time
from collections.abc import Awaitable
from typing import Final, NoReturn

import attrs
import trio

from trioserver import certificate, child, health, herald, key_keeping, logs
from trioserver.attendance import Attendance
from trioserver.auth import Verifier
from trioserver.board import Board, Limits
from trioserver.board_map import BoardError
from trioserver.buckets import Buckets, Rate
from trioserver.canary import Canary
from trioserver.chats import Chats
from trioserver.connection import Connection
from trioserver.deflate import Compressor
from trioserver.delivery import Delivery
from trioserver.desk import Desk
from trioserver.drain import drain
from trioserver.endpoint import endpoint
from trioserver.envelope import Entry
from trioserver.errors import CloseReason
from trioserver.handshake import Refusal
from trioserver.hub import Hub
from trioserver.ledger import Rules, TopicRules
from trioserver.lifeline import Lifeline
from trioserver.listener import Listener
from trioserver.metrics import Exporter, Tally
from trioserver.origins import Origins
from trioserver.outbox import Budget, OutboxLimits
from trioserver.peers import Peers
from trioserver.pump import Door, Pump
from trioserver.rate_limit import RateLimited
from trioserver.reader import Reader
from trioserver.receipts import Receipts
from trioserver.redis_link import RedisLink, open_link
from trioserver.registry import Registry
from trioserver.revocation import Revoked
from trioserver.revocation_watch import RevocationWatch, end_covered
from trioserver.settings import Settings
from trioserver.shared import Pace, Shared
from trioserver.slow_policies import Policies, Policy
from trioserver.speaker import Speaker
from trioserver.statedir import StateDir
from trioserver.status import BOARD_FD, CONTROL_FD, LISTEN_FD, Beat, Drain
from trioserver.subscription import Subscription
from trioserver.topics import Patterns
from trioserver.track import Track

FULL_SHARE: Final = 0.95
RESERVED: Final = 64
"""Of the descriptors, how many may be clients' sockets; the rest, and never less than so many, is
for Redis (a pool and a subscription), logs, metrics, what Trio has (about 25 in all), and luck."""

UNEVEN: Final = 1.2
"""SO_REUSEPORT spreads by hash: the fullest worker has about this many times its share."""


CATCH_UP_PER_TURN: Final = 256
"""Connections that are told to look into the ledger between two checkpoints."""

MESSAGE_BURST: Final = 20
"""Messages that a user may send at once."""

REQUESTS_PER_MESSAGE: Final = 100
"""Receipts and pings are answers to what was sent and signs of life: who comes back to a full inbox
on three devices has thousands to send."""

FIRST_LOOK_SECONDS: Final = 1.0
"""At the start, for hearing who is revoked. Clients wait in the queue of the socket meanwhile;
without Redis the door opens all the same, to tell them that it is away."""

LAST_REPORTS_SECONDS: Final = 1.0
"""At the end, for telling the ledger what clients have received."""


@attrs.frozen(kw_only=True)
class Identity:
    """Which worker this is."""

    slot: int
    generation: int
    life: str = attrs.field(factory=lambda: f"{secrets.token_hex(4)}.{time.time_ns() // 10**6:x}.0")
    """``<server>.<boot>.<n>``, in hex, hex and decimal; a random server's if no supervisor says."""
    after: tuple[str, ...] = ()
    """Lives of this server that ended before this one began, the latest last."""

    @property
    def name(self) -> str:
        """Names the process among its siblings, and its metric files."""
        return f"w{self.slot}.{self.generation}"

    @property
    def unique(self) -> str:
        """Names it in the whole fleet, now and later."""
        return self.life


def room(settings: Settings, descriptors: int) -> int:
    """Return how many connections a worker may have that knows of no other; 0 means no limit.

    Args:
        settings: ``WS_MAX_CONNECTIONS`` is for all workers together.
        descriptors: How many files the process may have open.
    """
    share = math.ceil(settings.ws_max_connections / settings.workers * UNEVEN)
    if settings.workers == 1:
        share = settings.ws_max_connections
    clamp = sockets(descriptors)
    return min(share, clamp) if share else clamp


def sockets(descriptors: int) -> int:
    """Return how many clients' sockets a worker may have that can have so many files open."""
    return max(1, min(int(descriptors * FULL_SHARE), descriptors - RESERVED))


def board_limits(settings: Settings) -> Limits:
    """Return what the settings say about the whole server."""
    return Limits(
        connections=settings.ws_max_connections,
        address_connections=settings.max_connections_per_ip,
        handshakes=settings.handshakes_per_second,
        address_handshakes=settings.handshakes_per_second_per_ip,
    )


def _tls(settings: Settings) -> ssl.SSLContext | None:
    """Return how the public port speaks TLS; None if it does not."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return certificate.context(settings.tls_cert, settings.tls_key)


def message_rates(settings: Settings, *, weight: int = 1) -> Buckets[str]:
    """Return how many messages each user may send to this worker.

    Args:
        settings: Of which the limit per minute counts.
        weight: So many of what is asked for are one message.
    """
    most = settings.messages_per_minute_per_user
    burst = max(MESSAGE_BURST, most // 5)
    return Buckets(Rate(count=most * weight, period=60, burst=burst * weight))


class Worker:
    """One worker's parts. Built inside `trio.run`."""

    def __init__(self, settings: Settings, identity: Identity, sock: socket.socket) -> None:
        self._settings = settings
        self._log = logs.get_logger()
        self._quiet = RateLimited(interval_seconds=10.0)
        self._started_at = time.monotonic()
        self._draining = False
        self._beaten = (False, "")
        self._refused = 0
        """Of the chat messages that were refused, those that are in the tally."""
        self.tally = Tally()
        self.pump = Pump(lambda bug: self._log_bug("pump", bug))
        hub = Hub()
        prefix = settings.channel_prefix
        user_channel = prefix + settings.user_channel
        broadcast = (prefix + settings.broadcast_channel).encode()
        head: Track[Entry] = Track()
        self._delivery = delivery = self._make_delivery(hub, head, broadcast)
        state = StateDir(settings.data_dir)
        target = endpoint(settings, state.redis_socket)
        self._target = target
        self._client_name = f"trioserver-{identity.unique}"
        self._subscription = Subscription(
            target,
            self._receive,
            self._link_changed,
            client_name=self._client_name,
            turn_over=delivery.turn_over,
        )
        self._subscription.follow(broadcast)
        self._join_fleet(settings, identity)
        self._keyring = key_keeping.keyring_of(settings)
        self._has_key = settings.jwt_public_key_file is not None
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        board, max_connections = self._join_board(settings, descriptors)
        rules = Rules.of(settings)
        self._reader = Reader(self._log_bug, lambda problem: self._log_trouble("read", problem))
        self._receipts = Receipts(
            rules, self.tally, self._log_bug, lambda problem: self._log_trouble("told", problem)
        )
        before, after = user_channel.split("{user}")
        self._shared = shared = Shared(
            pump=self.pump,
            hub=hub,
            follower=self._subscription,
            reader=self._reader,
            receipts=self._receipts,
            rules=rules,
            head=head,
            verifier=Verifier(settings, self._keyring),
            revoked=self._revoked,
            board=board,
            registry=self._registry,
            chats=self._chats,
            chat_anonymous=settings.chat_anonymous,
            desk=self._desk,
            policies=delivery.policies,
            rates=message_rates(settings),
            requests=message_rates(settings, weight=REQUESTS_PER_MESSAGE),
            tally=self.tally,
            pace=Pace(
                ping_interval=settings.ws_ping_interval,
                pong_wait=settings.ws_pong_wait,
                heartbeat_interval=settings.heartbeat_interval,
                idle_timeout=settings.connection_timeout,
                write_wait=settings.ws_write_wait,
                auth_timeout=settings.auth_timeout,
                ack_wait=settings.ack_wait,
                max_redeliveries=settings.max_redeliveries,
            ),
            outbox_limits=OutboxLimits(
                max_bytes=settings.outbox_max_bytes,
                max_frames=settings.outbox_max_frames,
                budget=Budget(settings.outbox_budget_bytes),
                turn=delivery.turn,
                on_given_up=self._given_up,
            ),
            max_message=settings.ws_max_message_size,
            user_topic=lambda user: f"{before}{user}{after}".encode(),
            broadcast_topic=broadcast,
            wall=time.time,
            compressor=Compressor() if settings.ws_deflate else None,
            log_bug=self._log_bug,
            log_end=self._log_end,
            log_claim=lambda problem: self._log_quietly("a token grants no topics", problem),
        )
        shared.outbox_limits.budget.on_exceeded = shared.cut_largest
        delivery.outbox_of = shared.excluding.get
        self._listener = Listener(
            shared=shared,
            worker_id=identity.unique,
            max_connections=max_connections,
            max_sockets=sockets(descriptors),
            handshake_timeout=settings.handshake_timeout,
            query_token=settings.jwt_query_token,
            origins=Origins(settings.ws_allowed_origins),
            peers=Peers(settings.trusted_proxies, limit_loopback=settings.limit_loopback),
            max_arrivals_per_address=settings.max_connections_per_ip,
            tls=_tls(settings),
            log_refused=self._log_refused,
            pages={
                "/healthz": lambda: (200, health.JSON, health.liveness_body()),
                "/readyz": self._readyz,
                "/health": self._health,
            },
        )
        self._door = Door(self.pump, sock, self._listener.admit, self._log_pause)
        self._identity = identity
        self._canary: Canary | None = None
        self.lifeline = Lifeline(
            CONTROL_FD,
            self._report,
            drain_seconds=settings.drain_seconds,
            drain_propagation=settings.drain_propagation,
        )
        self._exporter = Exporter(self.tally, state.metrics_dir, identity.name)
        self._drain_began: float | None = None
        self._came_back = trio.Event()
        """Set when the subscription is up again."""
        self._last_reports = trio.Event()
        """Set when nobody is connected any more."""

    def _join_fleet(self, settings: Settings, identity: Identity) -> None:
        """Make what this worker shares with all others through Redis, and follow its channels."""
        prefix = settings.channel_prefix
        self._revoked = Revoked()
        self._watch = RevocationWatch(
            self._revoked,
            self._end_revoked,
            lambda problem: self._log_quietly("revocations cannot be read", problem),
            prefix=prefix,
            on_change=self._changed,
        )
        self._registry = Registry(
            identity.unique,
            identity.after,
            settings.max_connections_per_user,
            prefix=prefix,
            log_bug=self._log_bug,
            log_trouble=lambda problem: self._log_quietly("the register is not kept", problem),
        )
        self._chats = Chats(
            life=identity.unique,
            ttl=settings.session_ttl,
            prefix=prefix,
            log_bug=self._log_bug,
            log_trouble=lambda problem: self._log_quietly("counts cannot be stored", problem),
        )
        self._desk = self._open_desk(settings)
        self._hints = frozenset({self._watch.channel, self._registry.channel, self._chats.channel})
        for channel in self._hints:
            self._subscription.follow(channel)

    def _make_delivery(self, hub: Hub, head: Track[Entry], broadcast: bytes) -> Delivery:
        settings = self._settings
        return Delivery(
            hub=hub,
            head=head,
            policies=Policies.of(settings.slow_consumers),
            tally=self.tally,
            broadcast_topic=broadcast,
            topic_prefix=f"{settings.channel_prefix}topic:".encode(),
            max_payload=settings.notification_max_size,
            log_malformed=self._log_malformed,
        )

    def _open_desk(self, settings: Settings) -> Desk:
        """Return what the topics of all connections share."""
        rules = TopicRules.of(settings)
        self._attendance = Attendance(
            prefix=settings.channel_prefix,
            announced=Patterns.of(settings.announced_topics),
            give_up=self._registry.link_lost,
            log_bug=self._log_bug,
            log_trouble=lambda problem: self._log_quietly("presence is not kept", problem),
        )
        self._registry.watch(self._attendance)
        self._speaker = Speaker(
            rules,
            prefix=settings.channel_prefix,
            log_bug=self._log_bug,
            log_trouble=lambda problem: self._log_quietly("clients cannot publish", problem),
        )
        return Desk(
            prefix=settings.channel_prefix,
            rules=rules,
            public=Patterns.of(settings.public_topics),
            max_topics=settings.max_topics_per_connection,
            presence=Patterns.of(settings.presence_topics),
            speaker=self._speaker,
            attendance=self._attendance,
        )

    def _given_up(self, policy: Policy, count: int) -> None:
        """Count what slow clients did without."""
        self.tally.slow_consumers[policy.value] += count

    async def run(self) -> None:
        """Serve until told to drain, then drain; returns when the last connection is gone."""
        async with trio.open_nursery() as services:
            await services.start(self.lifeline.run)
            services.start_soon(self.pump.run)
            services.start_soon(self.pump.run_timers)
            services.start_soon(child.keep_counting, self.tally, self._exporter, self._refresh)
            if self._keyring is not None:
                services.start_soon(key_keeping.keep, self._keyring, self._settings, self._log)
            reported = trio.Event()
            services.start_soon(self._talk_to_redis, reported)
            async with trio.open_nursery() as connections:
                self._listener.open(connections)
                with trio.move_on_after(FIRST_LOOK_SECONDS):
                    await self._watch.first_look()
                self._door.unlock()
                self.lifeline.started()
                self._log.info("worker started", pid=os.getpid(), life=self._identity.life)
                _settle_garbage_collector()
                order = await self.lifeline.wait_drain()
                over = await self._drain(order, connections.cancel_scope)
            self._last_reports.set()
            # Goodbyes may still be on their way through sockets that linger.
            with trio.move_on_at(over):
                await self.pump.wait_settled(self._door)
            if self._door.open:
                self._door.empty()
                self._door.lock()
            with trio.move_on_after(2 * LAST_REPORTS_SECONDS):
                await reported.wait()
            services.cancel_scope.cancel()
        self.pump.close()
        self._shared.board.close()
        self._refresh(trio.current_time())
        self._exporter.close()
        self._log.info("worker ended")

    async def _talk_to_redis(self, reported: trio.Event) -> None:
        """Be connected to Redis until nobody needs it; ``reported`` is set when all was said."""
        async with (
            open_link(
                self._target,
                client_name=self._client_name,
                lanes=self._settings.redis_pool_size,
                observe=self.tally.redis_latency.observe,
            ) as link,
            trio.open_nursery() as nursery,
        ):
            self._canary = Canary(
                link,
                self._subscription,
                self._identity.unique,
                prefix=self._settings.channel_prefix,
                on_change=self._changed,
            )
            nursery.start_soon(self._subscription.run)
            nursery.start_soon(self._canary.run)
            nursery.start_soon(self._reader.run, link)
            nursery.start_soon(self._receipts.run, link)
            nursery.start_soon(self._watch.run, link)
            nursery.start_soon(self._registry.run, link)
            nursery.start_soon(self._chats.run, link)
            nursery.start_soon(self._speaker.run, link)
            nursery.start_soon(self._attendance.run, link)
            nursery.start_soon(self._catch_up)
            nursery.start_soon(self._say_what_is_kept, link)
            await self._last_reports.wait()
            with trio.move_on_after(LAST_REPORTS_SECONDS):
                async with trio.open_nursery() as last:
                    # Neither waits for the other: a slow Redis may cost us one of them only.
                    last.start_soon(self._chats.finish, link)
                    last.start_soon(self._speaker.finish, link)
                    last.start_soon(self._attendance.finish, link)
                    last.start_soon(self._registry.finish, link)
                    last.start_soon(self._receipts.finish, link)
            reported.set()
            nursery.cancel_scope.cancel()

    async def _say_what_is_kept(self, link: RedisLink) -> None:
        await herald.keep_saying(
            link,
            self._desk.rules,
            is_over=lambda: self._draining,
            log_trouble=lambda problem: self._log_quietly("publishers cannot be told", problem),
        )

    def _link_changed(self) -> None:
        head = self._shared.head
        head.forget()
        if self._subscription.up:
            # A page that is under way may be older than the link: it does not count.
            head.begin()
            self._came_back.set()
            # What was said on these channels meanwhile is in Redis as well.
            self._watch.hint()
            self._registry.hinted()
        else:
            self._registry.link_lost()
            self._chats.link_lost()
        if self._canary is not None:
            self._canary.link_changed()
        self._changed()

    async def _catch_up(self) -> NoReturn:
        """Have everybody look into the ledger whenever the subscription has come back.

        What was published meanwhile is there, and nowhere else.
        """
        while True:
            await self._came_back.wait()
            self._came_back = trio.Event()
            for number, connection in enumerate(tuple(self._shared.connections)):
                connection.catch_up()
                if number % CATCH_UP_PER_TURN == 0:
                    await trio.lowlevel.checkpoint()

    def _receive(self, channel: bytes, payload: bytes) -> Awaitable[None] | None:
        self.tally.redis_messages += 1
        canary = self._canary
        if canary is not None and channel == canary.channel:
            canary.returned(payload, trio.current_time())
        elif channel not in self._hints:
            return self._delivery.receive(channel, payload)
        elif channel == self._registry.channel:
            self._registry.hinted(payload)
        elif channel == self._chats.channel:
            self._chats.hinted(payload)
        else:
            self._watch.hint()
        return None

    async def _end_revoked(self) -> None:
        """End connections whose token has just turned out to be revoked."""
        ended = await end_covered(self._shared.connections, self._revoked, self._log_bug)
        if ended:
            self._log.info("connections with revoked tokens ended", connections=ended)

    def _join_board(self, settings: Settings, descriptors: int) -> tuple[Board, int]:
        """Return the board and how many connections this worker may have on its own account."""
        limits = board_limits(settings)
        try:
            board = Board.attach(BOARD_FD, limits)
        except (BoardError, OSError) as problem:
            self._log.warning("limits are those of this worker alone", problem=str(problem))
            alone = attrs.evolve(limits, connections=room(settings, descriptors))
            return Board.alone(alone), alone.connections
        os.close(BOARD_FD)
        return board, sockets(descriptors)

    # Health.

    def _why_not_ready(self) -> str:
        """Return why a message sent now might not arrive; empty if it would."""
        if self._draining:
            return "draining"
        if self._canary is None:
            return "starting"
        if not self._canary.fresh:
            return self._canary.why
        if why := self._why_not_judging():
            return why
        limit = self._listener.max_connections
        if 0 < limit <= len(self._listener.connections) or self._shared.board.full:
            return "full"
        return ""

    def _why_not_judging(self) -> str:
        """Return why it cannot be told which tokens are good; empty if it can."""
        if not self._watch.fresh:
            # Redis answers, but not to this: who is revoked would get in.
            return "revocations not read"
        keys = self._keyring
        if keys is not None and not self._has_key and not keys.usable(keys.clock()):
            # A reload would send everybody here, to be told to come again.
            return "no keys of the issuer yet"
        return ""

    def _report(self) -> Beat:
        why = self._why_not_ready()
        self._beaten = (not why, why)
        return Beat(connections=len(self._listener.connections), ready=not why, why=why)

    def _changed(self) -> None:
        """Tell the supervisor at once when readiness has changed."""
        why = self._why_not_ready()
        if (not why, why) != self._beaten:
            self.lifeline.changed()

    def _readyz(self) -> tuple[int, str, bytes]:
        why = self._why_not_ready()
        return 503 if why else 200, health.JSON, health.readiness_body(ready=not why, why=why)

    def _health(self) -> tuple[int, str, bytes]:
        canary = self._canary
        trip = canary.round_trip if canary is not None and canary.fresh else None
        why = self._why_not_ready()
        state = health.Health(
            ready=not why,
            redis_ping_seconds=trip,
            redis_error="" if trip is not None or canary is None else canary.why,
            connections=len(self._listener.connections),
            users=self.tally.users,
            uptime_seconds=time.monotonic() - self._started_at,
        )
        return state.status, health.JSON, state.body(time.time())

    def _refresh(self, now: float) -> None:
        """Bring the tally up to the second, and readiness that depends on nothing but time."""
        tally = self.tally
        tally.outbox_bytes = sum([one.waiting_bytes for one in self._shared.blocked])
        tally.chat_messages = self._chats.counted
        tally.errors["unavailable"] += self._chats.refused - self._refused
        self._refused = self._chats.refused
        tally.redis_reconnects = max(0, self._subscription.statistics().links - 1)
        if self._canary is not None:
            age = self._canary.age(now)
            # Before the first has come back, its age is that of the worker.
            tally.canary_age = time.monotonic() - self._started_at if age is None else age
        if self._drain_began is not None:
            tally.shutdown_seconds = now - self._drain_began
        self._changed()

    async def _drain(self, order: Drain, connections: trio.CancelScope) -> float:
        self._draining = True
        self._drain_began = trio.current_time()
        self.lifeline.changed()
        self._log.info("draining", connections=len(self._listener.connections), quick=order.quick)
        return await drain(order, self.lifeline, self._listener, self._door, connections)

    # Logs.

    def _log_bug(self, doing: str, bug: BaseException) -> None:
        self._log.error("bug", doing=doing, exc_info=bug)

    def _log_malformed(self, topic: bytes, problem: str) -> None:
        self._log_quietly(
            "malformed publication", problem, channel=topic.decode("utf-8", "replace")
        )

    def _log_pause(self, error: OSError) -> None:
        self._log_quietly("cannot accept", str(error))

    def _log_quietly(self, event: str, problem: str, **fields: str) -> None:
        """Log what may come in floods: once per interval, with how often it was held back."""
        held_back = self._quiet.due(event, trio.current_time())
        if held_back is not None:
            self._log.warning(event, problem=problem, held_back=held_back, **fields)

    def _log_trouble(self, what: str, problem: str) -> None:
        self._log_quietly(f"the ledger cannot be {what}", problem)

    def _log_refused(self, refusal: Refusal, request_id: str) -> None:
        self._log.debug(
            "handshake refused",
            status=refusal.status,
            problem=refusal.problem,
            request_id=request_id,
        )

    def _log_end(self, connection: Connection, reason: CloseReason) -> None:
        self._log.debug(
            "connection ended",
            connection_id=connection.connection_id,
            user=connection.user,
            reason=reason.label,
        )


def _settle_garbage_collector() -> None:
    """Keep the collector away from what lives as long as the process.

    Connections free themselves by reference counts; a full collection of ten thousand of them
    takes tens of milliseconds in which nobody is served.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


def main(argv: list[str] | None = None) -> int:
    """Run one worker on the descriptors the supervisor has placed; return the exit code."""
    parser = argparse.ArgumentParser(prog="trioserver.worker")
    parser.add_argument("--slot", type=int, required=True)
    parser.add_argument("--generation", type=int, required=True)
    parser.add_argument("--life")
    parser.add_argument("--after", type=lambda names: tuple(names.split(",")), default=())
    arguments = parser.parse_args(argv)
    given = {"life": arguments.life} if arguments.life else {}
    identity = Identity(
        slot=arguments.slot, generation=arguments.generation, after=arguments.after, **given
    )

    async def work(settings: Settings) -> None:
        sock = socket.socket(fileno=LISTEN_FD)
        sock.setblocking(False)
        await Worker(settings, identity, sock).run()

    return child.run(
        f"worker-{identity.slot}", work, slot=identity.slot, generation=identity.generation
    )


if __name__ == "__main__":
    sys.exit(main())
