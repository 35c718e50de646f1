"""The gateway's process: its parts put together, its start, its end.

The supervisor runs ``python -m trioserver.gateway --generation G`` with the descriptors of
`trioserver.status`. Nesting spells the order of the end, from the inside out:

    last resort     ends the process when the time is over, whatever still hangs
      services      signs of life, questions, pings, counts, old logs
        server      answers requests, until the drain stops it

It is *ready* while it accepts; Redis and the workers have nothing to do with it, for it is there to
say how they are.
"""

import argparse
import datetime as dt
import os
import sys
from collections.abc import Sequence
from typing import Final

import trio

from trioserver import log_sweep, logs
from trioserver.control_client import ask_status
from trioserver.endpoint import endpoint
from trioserver.errors import CommandError, TrioserverError
from trioserver.gateway import metrics_page
from trioserver.gateway.app import Sources, make_app
from trioserver.gateway.front import Front
from trioserver.gateway.metrics_page import Scrape
from trioserver.gateway.probe import Probe
from trioserver.gateway.redis_watch import RedisWatch
from trioserver.gateway.serve import Server
from trioserver.lifeline import Lifeline, tie_to_parent
from trioserver.metrics import Exporter, Tally
from trioserver.redis_link import open_link
from trioserver.settings import Settings
from trioserver.statedir import StateDir
from trioserver.status import CONTROL_FD, LISTEN_FD, SETTINGS_FD, Beat, StatusReply

FRESH_SECONDS: Final = 0.1
"""How old an answer about the pool may be and still be given again."""

ASK_SECONDS: Final = 1.0
"""How long the supervisor, or the disk, may take for an answer."""

FLUSH_SECONDS: Final = 1.0
"""How often counts go to the metric files."""

GRACE_SECONDS: Final = 3.0
"""For requests that are under way at the end: answers here take milliseconds."""

SWEEP_SECONDS: Final = 3600.0
"""How often log files of earlier days are looked for."""


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
        self._redis = RedisWatch(self._tally)
        sources = Sources(
            pool=self._pool,
            scrape=self._scrape,
            redis=lambda: self._redis.latest,
            draining=lambda: self._draining,
            uptime=lambda: trio.current_time() - self._started_at,
        )
        self._server = Server(Front(make_app(sources), self._tally), LISTEN_FD)
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
        if self._exporter.problem:
            self._log.error("counts are not kept", problem=self._exporter.problem)
        async with trio.open_nursery() as outermost:
            outermost.start_soon(self._last_resort)
            async with trio.open_nursery() as services:
                await services.start(self._lifeline.run)
                for service in (
                    self._pool.run,
                    self._scrape.run,
                    self._watch_redis,
                    self._flush,
                    self._sweep_logs,
                ):
                    services.start_soon(service)
                async with trio.open_nursery() as doors:
                    await doors.start(self._server.run)
                    self._lifeline.started()
                    self._lifeline.changed()
                    self._log.info("gateway started", pid=os.getpid())
                    await self._drain()
                services.cancel_scope.cancel()
            outermost.cancel_scope.cancel()
        self._exporter.close()
        self._log.info("gateway ended")

    def _report(self) -> Beat:
        if self._draining:
            return Beat(ready=False, why="draining")
        ready = self._server.accepting
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
            metrics_page.scrape, self._state_dir.metrics_dir, abandon_on_cancel=True
        )
        if scraped.bad_files:
            self._tally.bad_metric_files += len(scraped.bad_files)
            self._log.warning("metric files were set aside", files=scraped.bad_files)
        return scraped

    async def _watch_redis(self) -> None:
        async with open_link(self._target, client_name="trioserver-gateway", lanes=1) as link:
            await self._redis.run(link)

    async def _flush(self) -> None:
        due = trio.current_time()
        while True:
            due += FLUSH_SECONDS
            await trio.sleep_until(due)
            self._tally.loop_lag = trio.current_time() - due
            self._tally.log_lines_dropped = logs.dropped()
            self._exporter.flush()
            due = max(due, trio.current_time() - FLUSH_SECONDS)

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

    async def _drain(self) -> None:
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
        self._server.stop(min(GRACE_SECONDS, max(0.0, order.seconds - order.propagation) / 2))
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


def _read_settings(fd: int) -> Settings:
    # The offset is shared with every other process that reads it.
    snapshot = os.pread(fd, os.fstat(fd).st_size, 0)
    os.close(fd)
    return Settings.restore(snapshot)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the gateway on the descriptors that the supervisor has placed; return the exit code."""
    parser = argparse.ArgumentParser(prog="trioserver.gateway", description=__doc__)
    parser.add_argument("--generation", type=int, required=True)
    generation = parser.parse_args(argv).generation
    tie_to_parent()
    for fd in (CONTROL_FD, LISTEN_FD):
        os.set_inheritable(fd, False)
    try:
        settings = _read_settings(SETTINGS_FD)
        logs.configure(settings, "gateway", generation=generation)
        trio.run(_run, settings, generation)
    except TrioserverError as error:
        logs.get_logger().error("the gateway cannot run", problem=str(error))
        return 4
    except Exception:  # noqa: BLE001 - as one line of our log; the supervisor sees the exit code
        logs.get_logger().exception("the gateway broke")
        return 1
    return 0


async def _run(settings: Settings, generation: int) -> None:
    await Gateway(settings, generation).run()


if __name__ == "__main__":
    sys.exit(main())
