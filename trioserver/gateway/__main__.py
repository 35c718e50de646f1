"""The gateway's process: its parts put together, its start, its end.

The supervisor runs ``python -m trioserver.gateway --generation G`` with the descriptors of
`trioserver.status`. Nesting spells the order of the end, from the inside out:

    last resort     ends the process when the time is over, whatever still hangs
      link          to Redis
      services      signs of life, questions, pings, counts, the schedule, old logs
        server      answers requests, until the drain stops it

It is *ready* while it accepts; Redis and the workers have nothing to do with it, for it is there to
say how they are.
"""

import argparse
import datetime as dt
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final

import attrs
import trio

from trioserver import child, log_sweep, logs, metric_archive
from trioserver.control_client import ask_status
from trioserver.endpoint import endpoint
from trioserver.errors import CommandError, SettingsError
from trioserver.gateway.api import Api
from trioserver.gateway.api_keys import ApiKeys
from trioserver.gateway.app import Sources, make_app
from trioserver.gateway.client_rate import ClientRate
from trioserver.gateway.front import Application, Front
from trioserver.gateway.probe import Probe
from trioserver.gateway.redis_watch import RedisWatch
from trioserver.gateway.scrape import Scrape, Scraper
from trioserver.gateway.serve import Server
from trioserver.gateway.usage import Usage, processes, usage
from trioserver.gateway.user_count import UserCount
from trioserver.ledger import Rules, TopicRules
from trioserver.lifeline import Lifeline
from trioserver.metric_archive import Generations
from trioserver.metrics import Exporter, Tally
from trioserver.peers import Peers
from trioserver.publisher import TrioPublisher
from trioserver.redis_link import RedisLink, open_link
from trioserver.scheduler import Scheduler
from trioserver.settings import Settings
from trioserver.statedir import StateDir
from trioserver.status import CONTROL_FD, LISTEN_FD, Beat, StatusReply

FRESH_SECONDS: Final = 0.1
"""How old an answer about the pool may be and still be given again."""

ASK_SECONDS: Final = 1.0
"""How long the supervisor, or the disk, may take for an answer."""

FOLD_SECONDS: Final = 3.0
"""How often metric files of retired generations are looked for."""

GRACE_SECONDS: Final = 3.0
"""For requests that are under way at the end: answers here take milliseconds."""

SWEEP_SECONDS: Final = 3600.0
"""How often log files of earlier days are looked for."""

_CLOSED: Final = "Nothing was published: the server's PAYLOAD_SCHEMAS cannot be used."


class Gateway:
    """The gateway's parts. Built inside `trio.run`."""

    def __init__(self, settings: Settings, generation: int) -> None:
        self._settings = settings
        self._log = logs.get_logger()
        self._state_dir = StateDir(settings.data_dir)
        self._target = endpoint(settings, self._state_dir.redis_socket)
        self._started_at = trio.current_time()
        self._draining = False
        self._pool_problem = ""
        self._fold_problem = ""
        self._unread: tuple[str, ...] = ()
        self._tally = Tally()
        identity = f"gateway.{generation}"
        self._exporter = Exporter(self._tally, self._state_dir.metrics_dir, identity)
        self._pool = Probe(
            self._ask_pool,
            unknown=None,
            fresh_seconds=FRESH_SECONDS,
            timeout_seconds=ASK_SECONDS + 0.1,  # its own limit comes first, and is logged
        )
        self._scrape = Probe(
            self._read_metrics,
            unknown=None,
            fresh_seconds=FRESH_SECONDS,
            timeout_seconds=ASK_SECONDS,
        )
        self._scraper = Scraper(self._state_dir.metrics_dir)
        self._reading = trio.CapacityLimiter(1)
        no_usage: Mapping[str, Usage] = {}
        self._usage = Probe(
            self._read_usage,
            unknown=no_usage,
            fresh_seconds=FRESH_SECONDS,
            timeout_seconds=ASK_SECONDS,
        )
        self._redis = RedisWatch()
        self._users = UserCount()
        self._server: Server | None = None
        self._lifeline = Lifeline(
            CONTROL_FD,
            self._report,
            drain_seconds=settings.drain_seconds,
            drain_propagation=settings.drain_propagation,
        )

    async def run(self) -> None:
        """Serve until told to drain, then drain.

        Returns when the last request is answered. If one cannot be, the process ends without
        returning from here: see `_last_resort`.
        """
        async with trio.open_nursery() as outermost:
            outermost.start_soon(self._last_resort)
            async with self._open_link() as link, trio.open_nursery() as services:
                await services.start(self._lifeline.run)
                services.start_soon(child.keep_counting, self._tally, self._exporter)
                for service in (
                    self._pool.run,
                    self._scrape.run,
                    self._usage.run,
                    self._fold,
                    self._sweep_logs,
                ):
                    services.start_soon(service)
                services.start_soon(self._redis.run, link)
                services.start_soon(self._users.run, link)
                services.start_soon(self._scheduler(link).run)
                await self._serve(link)
                services.cancel_scope.cancel()
            outermost.cancel_scope.cancel()
        self._exporter.close()
        self._log.info("gateway ended")

    def _scheduler(self, link: RedisLink) -> Scheduler:
        tally = self._tally

        def settled(count: int) -> None:
            tally.schedule_settled += count

        def failed() -> None:
            tally.schedule_failures += 1

        return Scheduler(link, Rules.of(self._settings), settled=settled, failed=failed)

    async def _serve(self, link: RedisLink) -> None:
        """Answer requests until the drain is over."""
        settings = self._settings
        keys = ApiKeys(settings.api_keys or ())
        peers = Peers(settings.trusted_proxies, limit_loopback=settings.limit_loopback)
        rate = ClientRate(keys, peers, settings.api_requests_per_second)
        front = Front(self._app(link, keys), self._tally, rate)
        self._server = server = Server(
            front, LISTEN_FD, peers=peers, rate=rate, refused=self._count_refused
        )
        async with trio.open_nursery() as doors:
            await doors.start(server.run)
            self._lifeline.started()
            self._lifeline.changed()
            self._log.info("gateway started", pid=os.getpid())
            await self._drain(server)

    def _app(self, link: RedisLink, keys: ApiKeys) -> Application:
        sources = Sources(
            pool=self._pool,
            scrape=self._scrape,
            usage=self._usage,
            redis=lambda: self._redis.latest,
            users=lambda: self._users.latest,
            draining=lambda: self._draining,
            uptime=lambda: trio.current_time() - self._started_at,
        )
        publisher, closed = self._publisher(link)
        api = Api(
            keys,
            publisher,
            max_payload=self._settings.notification_max_size,
            count=self._count_published,
            closed=closed,
        )
        return make_app(sources, api)

    def _publisher(self, link: RedisLink) -> tuple[TrioPublisher, str]:
        """Return what publishes, and why it must not; empty if it may."""
        topics = TopicRules.of(self._settings)
        try:
            return TrioPublisher(link, settings=self._settings, topics=topics), ""
        except SettingsError as error:
            # The file was good when the settings of this generation were checked. Without it
            # nothing may be published, but monitors, and who asks what became of something, still
            # have to be answered; and the end of this process would change nothing about it.
            self._log.error("nothing can be published", problem=str(error))
            unchecked = attrs.evolve(self._settings, payload_schemas=None)
            return TrioPublisher(link, settings=unchecked, topics=topics), _CLOSED

    def _open_link(self) -> AbstractAsyncContextManager[RedisLink]:
        return open_link(
            self._target,
            client_name="trioserver-gateway",
            lanes=self._settings.redis_pool_size,
            observe=self._tally.redis_latency.observe,
        )

    def _count_published(self, outcome: str) -> None:
        self._tally.published[outcome] += 1

    def _count_refused(self, status: int) -> None:
        self._tally.answered("", status)  # whatever path it meant

    def _report(self) -> Beat:
        if self._draining:
            return Beat(ready=False, why="draining")
        ready = self._server is not None and self._server.accepting
        return Beat(ready=ready, why="" if ready else "not serving")

    async def _ask_pool(self) -> StatusReply | None:
        reply, problem = None, ""
        try:
            reply = await ask_status(self._state_dir.control_socket, ASK_SECONDS)
        except CommandError as error:
            problem = str(error)
        # Monitors ask all the time; what changes is the event.
        if problem and not self._pool_problem:
            self._log.warning("the supervisor does not answer", problem=problem)
        elif self._pool_problem and not problem:
            self._log.info("the supervisor answers again")
        self._pool_problem = problem
        return reply

    async def _read_metrics(self) -> Scrape:
        self._exporter.flush()  # our own counts shall be as new as the page
        scraped = await trio.to_thread.run_sync(
            self._scraper.scrape, abandon_on_cancel=True, limiter=self._reading
        )
        self._note_bad_files(scraped.bad_files)
        self._tally.unread_metric_files += len(scraped.unread)
        if scraped.unread and not self._unread:
            self._log.warning("metric files could not be read", files=scraped.unread)
        self._unread = scraped.unread
        return scraped

    async def _read_usage(self) -> Mapping[str, Usage]:
        pids = processes(await self._pool.get())
        return await trio.to_thread.run_sync(usage, pids, abandon_on_cancel=True)

    async def _fold(self) -> None:
        """Put away metric files of generations that have retired, from time to time."""
        while True:
            await trio.sleep(FOLD_SECONDS)
            asked_at = time.time()
            reply = await self._ask_pool()
            if reply is not None:
                generations = Generations(
                    serving=reply.generation, reloading=reply.reloading, asked_at=asked_at
                )
                await self._fold_once(generations)

    async def _fold_once(self, generations: Generations) -> None:
        try:
            folded = await trio.to_thread.run_sync(
                metric_archive.fold,
                self._state_dir.metrics_dir,
                generations,
                abandon_on_cancel=True,
            )
        except OSError as error:
            if str(error) != self._fold_problem:
                self._log.warning("metric files cannot be put away", problem=str(error))
            self._fold_problem = str(error)
            return
        self._fold_problem = ""
        self._note_bad_files(folded.bad_files)
        self._tally.unread_metric_files += folded.unread

    def _note_bad_files(self, files: Sequence[str]) -> None:
        if files:
            self._tally.bad_metric_files += len(files)
            self._log.warning("metric files were set aside", files=files)

    async def _sweep_logs(self) -> None:
        """Compress and delete old log files, of all processes, once an hour."""
        if self._settings.log_dir is None:
            return
        while True:
            today = dt.datetime.now(dt.UTC).date()
            swept = await trio.to_thread.run_sync(
                log_sweep.sweep, self._settings.log_dir, today, abandon_on_cancel=True
            )
            if swept.failed:
                self._log.warning("log files could not be put away", files=swept.failed)
            await trio.sleep(SWEEP_SECONDS)

    async def _drain(self, server: Server) -> None:
        """Wait for the order to finish, and have the server finish."""
        order = await self._lifeline.wait_drain()
        # During a reload only this gateway goes, at once, and its successor answers already on
        # the same socket. When all go, monitors shall see it before the door closes.
        if order.propagation:
            self._draining = True
            self._lifeline.changed()
            with trio.move_on_after(order.propagation):
                order = await self._lifeline.wait_hurry()
        self._draining = True
        server.stop(min(GRACE_SECONDS, max(0.0, order.seconds - order.propagation) / 2))
        self._lifeline.changed()

    async def _last_resort(self) -> None:
        """End the process when its time is over, even if something cannot be cancelled."""
        order = await self._lifeline.wait_drain()
        with trio.move_on_after(order.seconds):
            hurry = await self._lifeline.wait_hurry()
            await trio.sleep(hurry.seconds)
        self._log.warning("requests were cut off at the end")
        self._exporter.close()
        os._exit(0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the gateway on the descriptors that the supervisor has placed; return the exit code."""
    parser = argparse.ArgumentParser(prog="trioserver.gateway", description=__doc__)
    parser.add_argument("--generation", type=int, required=True)
    generation = parser.parse_args(argv).generation

    async def work(settings: Settings) -> None:
        await Gateway(settings, generation).run()

    return child.run("gateway", work, generation=generation)


if __name__ == "__main__":
    sys.exit(main())
