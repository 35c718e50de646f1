"""The shell around the policy: waits, tells it what happened, carries out what it wants.

One thread, one selector, no decisions. Each turn: wait for descriptors, a signal or the policy's
next deadline, but never longer than a second; hand over what came; reap; hand over the time.

`supervise` is the composition root: it takes what only one server may have (the state directory,
the ports), puts the parts together, and gives everything back in the order that the next server
needs.
"""

import collections
import contextlib
import functools
import logging
import os
import random
import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Final

import attrs

from supervisor import events
from supervisor.children import Children, Commands
from supervisor.control import ControlServer
from supervisor.doors import Address, Buffers, PortTakenError, open_doors, printable, reachable
from supervisor.embedded import Answer, Probe, find_server, server_argv, tethered
from supervisor.lives import Lives
from supervisor.policy import Plan, Policy
from supervisor.processes import Processes, raise_descriptor_limit, seal_descriptors
from supervisor.report import Identity
from supervisor.slots import Timing
from supervisor.snapshot import Outcome, SnapshotReader, obstacle
from supervisor.wakeup import Wakeup
from trioserver import __version__, logs
from trioserver.board_map import create as create_board
from trioserver.errors import SettingsError
from trioserver.settings import Settings
from trioserver.statedir import StateDir
from trioserver.status import Beat, Drain, Report

_TURN_SECONDS: Final = 1.0
"""The longest wait. The policy takes a longer gap between two turns for a pause of the machine."""

_PROBE_SECONDS: Final = 0.01
"""Between two looks at a Redis that is starting, which takes some 30 ms."""

_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

_ORPHANS_SECONDS: Final = 3.0
"""For the children of a killed supervisor to end; they take half of it."""

_ORPHANS_POLL_SECONDS: Final = 0.05

_UNLIMITED_CONNECTIONS: Final = 50_000
"""Whose addresses there is room for if there may be any number of connections."""

_LAST_WORDS_SECONDS: Final = 1.0
"""For callers to take their last replies."""


class Loop:
    """One supervisor at work."""

    def __init__(
        self,
        *,
        settings: Settings,
        policy: Policy,
        processes: Processes,
        children: Children,
        snapshot_argv: Sequence[str],
        announce: Callable[[float], None],
    ) -> None:
        """Put the parts together; nothing happens before `run`.

        Args:
            settings: Those of the start, which a reload may not contradict.
            policy: Decides; started with the time of `time.monotonic`.
            processes: Reaps.
            children: Spawns, and talks to them.
            snapshot_argv: The command that reads the settings again.
            announce: Called once, with the seconds since the start: everything is ready.
        """
        self._settings = settings
        self._policy = policy
        self._processes = processes
        self._children = children
        self._announce = announce
        self._log = logs.get_logger()
        self._selector = selectors.DefaultSelector()
        self._wakeup = Wakeup()
        self._selector.register(self._wakeup, selectors.EVENT_READ, self._signalled)
        self._state = StateDir(settings.data_dir)
        self._control = ControlServer(self._state.control_socket, self._selector, self._asked)
        self._snapshots = SnapshotReader(processes, self._selector, snapshot_argv, os.environ)
        self._probe: Probe | None = None
        self._code: int | None = None

    def run(self) -> int:
        """Supervise until it is over; return the exit code. Every child is gone by then."""
        self._handle(events.Begin())
        while self._code is None:
            for key, mask in self._selector.select(self._patience()):
                key.data(mask)
            self._reap()
            self._ask_redis()
            self._control.tick(time.monotonic())
            self._handle(events.Tick())
        return self._code

    def stop_listening(self) -> None:
        """Remove the control socket: who asks now finds no server."""
        self._control.stop_listening()

    def close(self) -> None:
        """Deliver the last replies and let go of everything. The very last thing."""
        self._control.close(_LAST_WORDS_SECONDS)
        self._snapshots.close()
        self._forget_probe()
        self._wakeup.close()
        self._selector.close()

    def _patience(self) -> float:
        wait = min(self._policy.next_deadline() - time.monotonic(), _TURN_SECONDS)
        return max(0.0, min(wait, _PROBE_SECONDS) if self._probe is not None else wait)

    # --- what happened --------------------------------------------------------------------------

    def _handle(self, event: events.Event) -> None:
        queue = collections.deque(self._policy.handle(event, time.monotonic()))
        while queue:
            result = self._perform(queue.popleft())
            if result is not None:
                queue.extend(self._policy.handle(result, time.monotonic()))

    def _signalled(self, _mask: int) -> None:
        for number in self._wakeup.came():
            # SIGCHLD only wakes: several may have merged into one, so each turn reaps anyway.
            if number is not signal.SIGCHLD:
                self._log.info("signal", signal=number.name)
                self._handle(events.SignalCame(signal=number))

    def _asked(self, number: int, op: str) -> None:
        self._handle(events.Asked(request=number, op=op))

    def _hear(self, pid: int, _mask: int = 0) -> None:
        reports, more = self._children.receive(pid)
        for report in reports:
            self._handle(_translated(pid, report))
        if not more:
            # It closed its end and may live on: its silence will tell.
            self._forget(pid)

    def _reap(self) -> None:
        for pid, code in self._processes.reap():
            outcome = self._snapshots.reaped(pid, code)
            if outcome is not None:
                self._handle(self._judged(outcome))
                continue
            self._hear(pid)  # Its last words come before its end.
            self._forget(pid)
            self._children.bury(pid)
            if self._probe is not None and self._probe.pid == pid:
                self._forget_probe()
            self._handle(events.Exited(pid=pid, code=code))

    def _ask_redis(self) -> None:
        probe = self._probe
        answer = probe.poll() if probe is not None else Answer.NONE
        if probe is None or answer is Answer.NONE:
            return
        if answer is Answer.PONG:
            self._forget_probe()
        self._handle(events.RedisAnswered(pid=probe.pid, loading=answer is Answer.LOADING))

    def _judged(self, outcome: Outcome) -> events.Event:
        generation, snapshot = outcome.generation, outcome.snapshot
        reason = outcome.reason or obstacle(self._settings, snapshot)
        if reason:
            return events.SnapshotFailed(generation=generation, reason=reason)
        try:
            self._children.keep_snapshot(generation, snapshot)
        except OSError as error:  # No memory, no descriptors: no reason to end what runs.
            reason = f"the new settings could not be kept: {error}"
            return events.SnapshotFailed(generation=generation, reason=reason)
        drain = drain_times(Settings.restore(snapshot))
        return events.SnapshotReady(generation=generation, drain=drain)

    # --- what is wanted -------------------------------------------------------------------------

    def _perform(  # noqa: C901 - one line per action
        self, action: events.Action
    ) -> events.Event | None:
        match action:
            case events.Spawn():
                return self._spawn(action)
            case events.Kill():
                self._processes.kill(action.pid, action.signal)
            case events.CloseDoor(slot=slot):
                self._children.close_door(slot)
            case events.SendDrain():
                self._children.send(action.pid, _order(action))
            case events.TakeSnapshot():
                return self._take_snapshot(action.generation)
            case events.DropSnapshot():
                self._snapshots.drop(action.generation)
                self._children.drop_snapshot(action.generation)
            case events.Reply():
                self._control.reply(action.request, action.reply)
            case events.Announce():
                self._announce(action.seconds)
            case events.Say():
                self._log.log(_LEVELS[action.level], action.event, **action.fields)
            case events.Exit():
                self._code = action.code
        return None

    def _spawn(self, action: events.Spawn) -> events.Event:
        kind, slot, generation = action.kind, action.slot, action.generation
        try:
            pid = self._children.spawn(kind, slot, generation)
        except OSError as error:
            return events.SpawnFailed(
                kind=kind, slot=slot, generation=generation, reason=str(error)
            )
        pair = self._children.pair(pid)
        if pair is not None:
            hear = functools.partial(self._hear, pid)
            self._selector.register(pair, selectors.EVENT_READ, hear)
        if kind is events.Kind.REDIS:
            self._probe = Probe(self._state.redis_socket, pid)
        return events.Spawned(kind=kind, slot=slot, generation=generation, pid=pid)

    def _forget(self, pid: int) -> None:
        pair = self._children.pair(pid)
        if pair is not None:
            self._selector.unregister(pair)
            self._children.forget(pid)

    def _forget_probe(self) -> None:
        if self._probe is not None:
            self._probe.close()
            self._probe = None

    def _take_snapshot(self, generation: int) -> events.Event | None:
        try:
            self._snapshots.begin(generation)
        except OSError as error:
            reason = f"the command that reads the settings could not be started: {error}"
            return events.SnapshotFailed(generation=generation, reason=reason)
        return None


def supervise(
    settings: Settings,
    *,
    flags: Sequence[str],
    snapshot: bytes,
    commands: Commands | None = None,
    timing: Timing | None = None,
) -> int:
    """Run the server in the foreground, until a signal or a ``stop`` ends it.

    Call it from the main thread of a process that has nothing else to do: it takes over signals,
    children and the limit of open descriptors. Prints one line to standard output when everything
    is ready for the first time; the rest goes to the log.

    Args:
        settings: Checked, secrets included.
        flags: Of the command line, for reading the settings again at a reload.
        snapshot: `Settings.snapshot`, for the first generation.
        commands: What is executed, if not the product.
        timing: The numbers that the policy decides by, if not the product's.

    Returns:
        The exit code: 0 stopped, 1 could not stop everything, 3 first start failed, 4 a child
        refused its configuration at the first start. Every child is gone.

    Raises:
        SettingsError: A setting turned out to be impossible here. Nothing was started.
        CommandError: Another server has the state directory or a port. Nothing was started.
    """
    began = time.monotonic()
    logs.configure(settings, "supervisor")
    seal_descriptors()
    raise_descriptor_limit()
    state = StateDir(settings.data_dir)
    state.create()
    commands = _with_redis(commands or Commands(), settings, state)
    # When the last replies go out, in `Loop.close`, all that is `held` is free again: whoever
    # waited for "stop" may start the next server at once.
    with contextlib.ExitStack() as at_last, contextlib.ExitStack() as held:
        held.callback(state.acquire().release)
        state.clear_metrics()
        doors, admin_door = _wait_for_doors(settings, state)
        for door in (*doors, admin_door):
            held.enter_context(door)
        board = _make_board(settings)
        held.callback(os.close, board)
        processes = Processes()
        children = Children(
            processes,
            commands,
            doors=doors,
            admin_door=admin_door,
            board=board,
            lives=Lives(state.next_boot(time.time()), settings.workers),
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(state.metrics_dir)},
        )
        held.callback(children.close)
        children.keep_snapshot(1, snapshot)
        plan = _plan(settings, doors[0], admin_door)
        loop = Loop(
            settings=settings,
            policy=_policy(plan, began, timing or Timing()),
            processes=processes,
            children=children,
            snapshot_argv=(*commands.snapshot, *flags),
            announce=functools.partial(_announce, settings, plan.identity),
        )
        at_last.callback(loop.close)
        held.callback(loop.stop_listening)
        _say_listening(plan.identity, state)
        return loop.run()


def drain_times(settings: Settings) -> events.DrainTimes:
    """Return what the policy needs to know of the settings."""
    return events.DrainTimes(seconds=settings.drain_seconds, propagation=settings.drain_propagation)


def _make_board(settings: Settings) -> int:
    # It lives as long as the supervisor, and so does its size. WORKERS cannot change in a reload,
    # WS_MAX_CONNECTIONS can: whatever it becomes is counted and enforced. But with many more
    # connections than there were to be, some addresses find no room in the table, and get more
    # than their share.
    connections = settings.ws_max_connections or _UNLIMITED_CONNECTIONS
    try:
        return create_board(settings.workers, connections)
    except OSError as error:
        problem = f"there is no memory to count so many connections: {error.strerror}"
        raise SettingsError("WS_MAX_CONNECTIONS", problem, "10000") from error


def _with_redis(commands: Commands, settings: Settings, state: StateDir) -> Commands:
    if not settings.embedded_redis or commands.redis:
        return commands
    server = server_argv(find_server(os.environ.get("PATH")), state)
    return attrs.evolve(commands, redis=tuple(tethered(server, state)))


def _wait_for_doors(
    settings: Settings, state: StateDir
) -> tuple[list[socket.socket], socket.socket]:
    # An orderly end removes the control socket. If it is still there, the last supervisor was
    # killed, and its children, who have seen that, may need a moment to let go of the ports.
    killed = state.control_socket.exists()
    deadline = time.monotonic() + (_ORPHANS_SECONDS if killed else 0.0)
    while True:
        try:
            return _open_doors(settings)
        except PortTakenError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_ORPHANS_POLL_SECONDS)


def _open_doors(settings: Settings) -> tuple[list[socket.socket], socket.socket]:
    public = Address(
        host=settings.ws_host,
        port=settings.ws_port,
        host_setting="WS_HOST",
        port_setting="WS_PORT",
    )
    internal = Address(
        host=settings.admin_host,
        port=settings.admin_port,
        host_setting="ADMIN_HOST",
        port_setting="ADMIN_PORT",
    )
    buffers = Buffers(receive=settings.ws_read_buffer_size, send=settings.ws_write_buffer_size)
    doors = open_doors(public, settings.workers, buffers)
    try:
        (admin_door,) = open_doors(internal, 1, Buffers())
    except BaseException:
        for door in doors:
            door.close()
        raise
    return doors, admin_door


def _plan(settings: Settings, door: socket.socket, admin_door: socket.socket) -> Plan:
    return Plan(
        workers=settings.workers,
        embedded_redis=settings.embedded_redis,
        drain=drain_times(settings),
        identity=Identity(
            address=printable(door),
            admin_address=printable(admin_door),
            pid=os.getpid(),
            version=__version__,
        ),
    )


def _policy(plan: Plan, now: float, timing: Timing) -> Policy:
    rng = random.Random()  # noqa: S311 - jitter
    return Policy(plan, rng=rng, now=now, timing=timing)


def _translated(pid: int, report: Report) -> events.Event:
    if isinstance(report, Beat):
        return events.Beat(
            pid=pid, connections=report.connections, ready=report.ready, why=report.why
        )
    return events.Started(pid=pid)


def _order(action: events.SendDrain) -> Drain:
    return Drain(
        seconds=action.seconds,
        propagation=action.propagation,
        quick=action.quick,
        replaced=action.replaced,
    )


def _say_listening(identity: Identity, state: StateDir) -> None:
    logs.get_logger().info(
        "listening",
        address=identity.address,
        admin_address=identity.admin_address,
        data_dir=str(state.path),
    )


def _announce(settings: Settings, identity: Identity, seconds: float) -> None:
    workers = "1 worker" if settings.workers == 1 else f"{settings.workers} workers"
    redis = "embedded Redis" if settings.embedded_redis else f"Redis {settings.redis_target}"
    line = (
        f"trioserver is ready: {settings.ws_scheme}://{reachable(identity.address)}/ws  "
        f"({workers}, {redis}, "
        f"internal http://{reachable(identity.admin_address)}, {seconds:.1f} s)\n"
    )
    with contextlib.suppress(OSError):  # Nobody has to read it.
        os.write(1, line.encode())
