"""What children of the supervisor have in common: their first and last lines, and their counting.

    def main(argv: Sequence[str] | None = None) -> int:
        ...
        return child.run("gateway", work, generation=generation)

    async def work(settings: Settings) -> None:
        async with trio.open_nursery() as services:
            services.start_soon(child.keep_counting, tally, exporter)

What differs between children is theirs: the lifeline, the order of their parts, the drain.
"""

import contextlib
import os
from collections.abc import Awaitable, Callable
from typing import Final, NoReturn

import trio

from trioserver import logs
from trioserver.errors import TrioserverError
from trioserver.lifeline import tie_to_parent
from trioserver.metrics import Exporter, Tally
from trioserver.settings import Settings
from trioserver.status import BOARD_FD, CONTROL_FD, LISTEN_FD, SETTINGS_FD

FLUSH_SECONDS: Final = 1.0
"""How often counts go to the metric files."""

EXIT_CLEAN: Final = 0
EXIT_FAILURE: Final = 1
EXIT_SETTINGS: Final = 4


def run(
    process: str,
    work: Callable[[Settings], Awaitable[None]],
    *,
    generation: int,
    slot: int | None = None,
) -> int:
    """Be a child of the supervisor, on the descriptors that it has placed; return the exit code.

    Args:
        process: What to be called in the log: ``gateway``, ``worker-0``.
        work: Run by Trio with the settings; the process ends with it.
        generation: The process's.
        slot: The place of a worker.

    Returns:
        0 if the work was done; 4 if it is impossible with these settings; 1 if it broke, which is
        in the log with its traceback.

    Raises:
        SystemExit: The supervisor is gone already.
    """
    tie_to_parent()
    for fd in (CONTROL_FD, LISTEN_FD, SETTINGS_FD):
        os.set_inheritable(fd, False)
    with contextlib.suppress(OSError):  # The gateway has no board, nor who was started by hand.
        os.set_inheritable(BOARD_FD, False)
    try:
        settings = _read_settings(SETTINGS_FD)
        logs.configure(settings, process, slot=slot, generation=generation)
        trio.run(work, settings)
    except TrioserverError as error:
        logs.get_logger().error("the process cannot run", child=process, problem=str(error))
        return EXIT_SETTINGS
    except Exception:  # noqa: BLE001 - as one line of our log; the supervisor sees the exit code
        logs.get_logger().exception("the process broke", child=process)
        return EXIT_FAILURE
    return EXIT_CLEAN


def _read_settings(fd: int) -> Settings:
    # With pread, because the offset is shared with every other process that reads it.
    snapshot = os.pread(fd, os.fstat(fd).st_size, 0)
    os.close(fd)
    return Settings.restore(snapshot)


async def keep_counting(
    tally: Tally, exporter: Exporter, refresh: Callable[[float], object] = lambda _now: None
) -> NoReturn:
    """Once a second, bring the tally up to date and write it out; until cancelled.

    Args:
        tally: Of this process. How late the loop is and what the log has dropped is noted here.
        exporter: Of the tally. That it cannot write is logged, once until it can again.
        refresh: Called with Trio's clock before each flush, for whatever else is up to the second.

    Cancellation:
        Safe. What was counted since the last flush is written by `Exporter.close`.
    """
    log = logs.get_logger()
    said = ""
    due = trio.current_time()
    while True:
        if exporter.problem != said:
            said = exporter.problem
            if said:
                log.error("counts are not kept", problem=said)
            else:
                log.info("counts are kept again")
        due += FLUSH_SECONDS
        await trio.sleep_until(due)
        now = trio.current_time()
        tally.loop_lag = now - due
        tally.log_lines_dropped = logs.dropped()
        refresh(now)
        exporter.flush()
        # After a pause one late tick is enough.
        due = max(due, now - FLUSH_SECONDS)
