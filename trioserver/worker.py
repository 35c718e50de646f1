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
import sys
import time
from collections.abc import Awaitable
from typing import Final, NoReturn

import attrs
import trio

from trioserver import child, health, logs
from trioserver.auth import Verifier
from trioserver.canary import Canary
from trioserver.connection import Connection
from trioserver.deflate import Compressor
from trioserver.delivery import Delivery
from trioserver.drain import drain
from trioserver.endpoint import endpoint
from trioserver.envelope import Entry
from trioserver.errors import CloseReason
from trioserver.hub import Hub
from trioserver.ledger import Rules
from trioserver.lifeline import Lifeline
from trioserver.listener import Listener
from trioserver.metrics import Exporter, Tally
from trioserver.origins import Origins
from trioserver.outbox import OutboxLimits
from trioserver.pump import Door, Pump
from trioserver.rate_limit import RateLimited
from trioserver.reader import Reader
from trioserver.receipts import Receipts
from trioserver.redis_link import open_link
from trioserver.settings import Settings
from trioserver.shared import Pace, Shared
from trioserver.statedir import StateDir
from trioserver.status import CONTROL_FD, LISTEN_FD, Beat, Drain
from trioserver.subscription import Subscription
from trioserver.track import Track

FULL_SHARE: Final = 0.95
"""Of the descriptors, how many may be connections; the rest is for Redis, logs and luck."""

UNEVEN: Final = 1.2
"""SO_REUSEPORT spreads by hash: the fullest worker has about this many times its share."""


CATCH_UP_PER_TURN: Final = 256
"""Connections that are told to look into the ledger between two checkpoints."""

LAST_REPORTS_SECONDS: Final = 1.0
"""At the end, for telling the ledger what clients have received."""


@attrs.frozen(kw_only=True)
class Identity:
    """Which worker this is."""

    slot: int
    generation: int
    nonce: str = attrs.field(factory=lambda: secrets.token_hex(4))

    @property
    def name(self) -> str:
        """Names the process among its siblings, and its metric files."""
        return f"w{self.slot}.{self.generation}"

    @property
    def unique(self) -> str:
        """Names it in the whole fleet, now and later."""
        return f"{self.name}-{self.nonce}"


def room(settings: Settings, descriptors: int) -> int:
    """Return how many connections this worker may have; 0 means no limit.

    Args:
        settings: ``WS_MAX_CONNECTIONS`` is for all workers together.
        descriptors: How many files the process may have open.
    """
    share = math.ceil(settings.ws_max_connections / settings.workers * UNEVEN)
    if settings.workers == 1:
        share = settings.ws_max_connections
    clamp = int(descriptors * FULL_SHARE)
    return min(share, clamp) if share else clamp


class Worker:
    """One worker's parts. Built inside `trio.run`."""

    def __init__(self, settings: Settings, identity: Identity, sock: socket.socket) -> None:
        self._settings = settings
        self._log = logs.get_logger()
        self._quiet = RateLimited(interval_seconds=10.0)
        self._started_at = time.monotonic()
        self._draining = False
        self._beaten = (False, "")
        self.tally = Tally()
        self.pump = Pump(lambda bug: self._log_bug("pump", bug))
        hub = Hub()
        prefix = settings.channel_prefix
        user_channel = prefix + settings.user_channel
        broadcast = (prefix + settings.broadcast_channel).encode()
        head: Track[Entry] = Track()
        self._delivery = Delivery(
            hub=hub,
            head=head,
            tally=self.tally,
            broadcast_topic=broadcast,
            max_payload=settings.notification_max_size,
            log_malformed=self._log_malformed,
        )
        state = StateDir(settings.data_dir)
        target = endpoint(settings, state.redis_socket)
        self._target = target
        self._client_name = f"trioserver-{identity.unique}"
        self._subscription = Subscription(
            target, self._receive, self._link_changed, client_name=self._client_name
        )
        self._subscription.follow(broadcast)
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
            verifier=Verifier(settings),
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
                max_bytes=settings.outbox_max_bytes, max_frames=settings.outbox_max_frames
            ),
            max_message=settings.ws_max_message_size,
            user_topic=lambda user: f"{before}{user}{after}".encode(),
            broadcast_topic=broadcast,
            wall=time.time,
            compressor=Compressor() if settings.ws_deflate else None,
            log_bug=self._log_bug,
            log_end=self._log_end,
        )
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._listener = Listener(
            shared=shared,
            worker_id=identity.unique,
            max_connections=room(settings, descriptors),
            max_sockets=int(descriptors * FULL_SHARE),
            handshake_timeout=settings.handshake_timeout,
            query_token=settings.jwt_query_token,
            origins=Origins(settings.ws_allowed_origins),
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

    async def run(self) -> None:
        """Serve until told to drain, then drain; returns when the last connection is gone."""
        async with trio.open_nursery() as services:
            await services.start(self.lifeline.run)
            services.start_soon(self.pump.run)
            services.start_soon(self.pump.run_timers)
            services.start_soon(child.keep_counting, self.tally, self._exporter, self._refresh)
            reported = trio.Event()
            services.start_soon(self._talk_to_redis, reported)
            async with trio.open_nursery() as connections:
                self._listener.open(connections)
                self._door.unlock()
                self.lifeline.started()
                self._log.info("worker started", pid=os.getpid())
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
            with trio.move_on_after(LAST_REPORTS_SECONDS):
                await reported.wait()
            services.cancel_scope.cancel()
        self.pump.close()
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
            nursery.start_soon(self._catch_up)
            await self._last_reports.wait()
            with trio.move_on_after(LAST_REPORTS_SECONDS):
                await self._receipts.finish(link)
            reported.set()
            nursery.cancel_scope.cancel()

    def _link_changed(self) -> None:
        head = self._shared.head
        head.forget()
        if self._subscription.up:
            # A page that is under way may be older than the link: it does not count.
            head.begin()
            self._came_back.set()
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
            return None
        return self._delivery.receive(channel, payload)

    # Health.

    def _why_not_ready(self) -> str:
        """Return why a message sent now might not arrive; empty if it would."""
        if self._draining:
            return "draining"
        if self._canary is None:
            return "starting"
        if not self._canary.fresh:
            return self._canary.why
        limit = self._listener.max_connections
        if 0 < limit <= len(self._listener.connections):
            return "full"
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
    arguments = parser.parse_args(argv)
    identity = Identity(slot=arguments.slot, generation=arguments.generation)

    async def work(settings: Settings) -> None:
        sock = socket.socket(fileno=LISTEN_FD)
        sock.setblocking(False)
        await Worker(settings, identity, sock).run()

    return child.run(
        f"worker-{identity.slot}", work, slot=identity.slot, generation=identity.generation
    )


if __name__ == "__main__":
    sys.exit(main())
