"""A child that is nothing but a lifeline: ``python lifeline_child.py DIRECTORY MODE ...``.

Writes what it is told to do into DIRECTORY, and does not do it before ``finish`` is there.

    good    starts, beats, finishes when told
    hang    starts, then blocks its loop
"""

import os
import sys
from pathlib import Path

import trio

from trioserver.lifeline import Lifeline, tie_to_parent
from trioserver.status import CONTROL_FD, Beat, Drain


def note(directory: Path, name: str, order: Drain) -> None:
    """Write an order down, whole or not at all."""
    draft = directory / f".{name}"
    draft.write_text(f"{order.seconds} {order.propagation} {order.quick}")
    draft.rename(directory / name)


def block_the_loop() -> None:
    """Do something without end, as a bug would."""
    while True:
        pass


async def main(directory: Path, mode: str) -> None:
    """Be a child."""
    lifeline = Lifeline(
        CONTROL_FD, lambda: Beat(ready=True), drain_seconds=30.0, drain_propagation=5.0
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(lifeline.run)
        lifeline.started()
        (directory / "pid").write_text(str(os.getpid()))
        if mode == "hang":
            await trio.sleep(0.1)
            block_the_loop()
        note(directory, "drain", await lifeline.wait_drain())
        note(directory, "hurry", await lifeline.wait_hurry())
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    tie_to_parent()
    trio.run(main, Path(sys.argv[1]), sys.argv[2])
