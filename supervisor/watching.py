"""Patience: what to do about a child that is silent, will not start, or will not go.

silent   5 s   unready: the rest of the world is told not to count on it
        15 s   SIGABRT: it dumps the stacks of its threads, so that one learns why
        17 s   SIGKILL: also for one that is stopped and cannot even do that
not started in 60 s, or told to finish and not gone in time: the same end
"""

import signal
from collections.abc import Iterator

from supervisor.events import Action, Beat, Kill, Kind, Say
from supervisor.slots import Life, Table, Timing


def watch(table: Table, timing: Timing, now: float) -> list[Action]:
    """Look at everybody, and act on those whose time is up. Idempotent at one moment."""
    return [action for life in table.lives() for action in _look_at(life, timing, now)]


def hear(life: Life, beat: Beat, now: float) -> list[Action]:
    """Take note of a beat. Before `Started` it proves nothing: the start must end in time."""
    actions: list[Action] = []
    if life.started_at is not None:
        life.heard_at = now
    if life.silent:
        life.silent = False
        actions.append(say("info", "child beats again", life))
    if life.ready and not beat.ready:
        actions.append(say("warning", "child unready", life, why=beat.why))
    elif beat.ready and not life.ready:
        actions.append(say("info", "child ready", life))
    life.connections, life.ready, life.why = beat.connections, beat.ready, beat.why
    return actions


def forgive(table: Table, now: float) -> None:
    """Count everybody's patience from now: the one who did not listen was the supervisor."""
    for life in table.owners():
        life.heard_at = now


def say(level: str, event: str, life: Life, **fields: object) -> Say:
    """Return a log line about one process."""
    about: dict[str, object] = {"kind": str(life.kind), "pid": life.pid}
    if life.kind is Kind.WORKER:
        about["slot"] = life.slot
    if life.kind is not Kind.REDIS:
        about["generation"] = life.generation
    return Say(level=level, event=event, fields={**about, **fields})


def _look_at(life: Life, timing: Timing, now: float) -> Iterator[Action]:
    if life.kill_at is not None:
        if life.killed_at is None and now >= life.kill_at:
            life.killed_at = now
            yield say("warning", "child killed", life)
            yield Kill(pid=life.pid, signal=signal.SIGKILL)
    elif life.started_at is None:
        if life.quiet(now, timing.startup):
            yield from _abort(life, timing, now, f"did not start within {timing.startup:g} s")
    elif life.beats:
        if life.quiet(now, timing.abort_silence):
            yield from _abort(
                life, timing, now, f"gave no sign of life for {timing.abort_silence:g} s"
            )
        elif not life.silent and life.quiet(now, timing.unready_silence):
            life.silent = True
            yield say("warning", "child silent", life, seconds=timing.unready_silence)


def _abort(life: Life, timing: Timing, now: float, why: str) -> Iterator[Action]:
    life.aborted_for = why
    yield say("error", "child hangs", life, why=why)
    if life.kind is Kind.REDIS:
        # Its SIGABRT writes a page about itself that helps nobody.
        life.kill_at = life.killed_at = now
        yield Kill(pid=life.pid, signal=signal.SIGKILL)
    else:
        life.kill_at = now + timing.abort_grace
        yield Kill(pid=life.pid, signal=signal.SIGABRT)
