"""The pump over real sockets: who is called, who is not, and that nothing spins."""

import contextlib
import itertools
import select
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable

import attrs
import pytest
import trio

from tests.trioserver.wire import LIMIT, Pair, unread, until
from trioserver import pump as pump_module
from trioserver.pump import LINGER_BYTES, LINGER_SECONDS, READ, WRITE, Door, Pump
from trioserver.timers import IDLE


class SimplePeer:
    """Counts its calls; reads what comes."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.bucket = IDLE
        self.calls: list[str] = []
        self.data = b""
        self.bug: Exception | None = None
        self.hook: Callable[[], None] = lambda: None

    def readable(self) -> None:
        """Read."""
        self.calls.append("readable")
        self.hook()
        self.data += self.sock.recv(1 << 16)

    def writable(self) -> None:
        """Note it."""
        self.calls.append("writable")

    def hung_up(self) -> None:
        """Note it."""
        self.calls.append("hung_up")
        self.hook()

    def due(self, now: float) -> None:
        """Note it."""
        self.calls.append("due")
        self.hook()

    def failed(self, bug: Exception) -> None:
        """Note it."""
        self.bug = bug


@attrs.define(eq=False)
class Bench:
    """A pump with pairs of sockets to register."""

    pump: Pump
    bugs: list[Exception]
    stack: contextlib.ExitStack

    def pair(self) -> Pair:
        """Return a pair that is closed in the end."""
        return self.stack.enter_context(Pair())

    def peer(self, interest: int = READ) -> tuple[socket.socket, SimplePeer]:
        """Return a client and its registered peer."""
        pair = self.pair()
        peer = SimplePeer(pair.server)
        self.pump.register(peer, interest)
        return pair.client, peer

    def quiet(self) -> bool:
        """Return whether nothing registered would wake the pump now."""
        return self.pump._epoll.poll(0) == []


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[Bench]:
    """Run a pump."""
    bugs: list[Exception] = []
    with trio.fail_after(LIMIT), contextlib.ExitStack() as stack:
        pump = Pump(bugs.append)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.run)
            nursery.start_soon(pump.run_timers)
            yield Bench(pump, bugs, stack)
            nursery.cancel_scope.cancel()


async def test_a_readable_socket_is_read_and_a_silent_one_left_alone() -> None:
    """Only who has bytes is called."""
    async with running() as bench:
        client, peer = bench.peer()
        _, silent = bench.peer()
        client.send(b"hello")
        await until(lambda: peer.data == b"hello")
        assert (["readable"], []) == (peer.calls, silent.calls)
        assert 2 == len(bench.pump)


async def test_a_raising_peer_ends_alone() -> None:
    """The bug is logged, its peer is told, everybody else is served on."""
    async with running() as bench:
        clients, peers = zip(*(bench.peer() for _ in range(5)), strict=True)

        def bug() -> None:
            bench.pump.forget(peers[2])
            raise LookupError("a bug")

        peers[2].hook = bug
        for client in clients:
            client.send(b"x")
        await until(lambda: sum(len(peer.data) for peer in peers) == 4)
        assert isinstance(peers[2].bug, LookupError)
        assert [peers[2].bug] == bench.bugs
        clients[0].send(b"y")
        await until(lambda: peers[0].data == b"xy")


async def test_a_raising_timer_ends_alone() -> None:
    """The same for moments on the wheel."""
    async with running() as bench:
        owners = [SimplePeer(bench.pair().server) for _ in range(5)]

        def bug() -> None:
            raise LookupError("a bug")

        owners[2].hook = bug
        for owner in owners:
            bench.pump.wheel.schedule(owner, bench.pump.now)
        await until(lambda: all(owner.calls == ["due"] for owner in owners))
        assert isinstance(owners[2].bug, LookupError)
        assert 1 == len(bench.bugs)


async def test_a_peer_ended_by_another_in_the_same_round_is_not_called() -> None:
    """What was reported before it ended is nobody's any more."""
    async with running() as bench:
        one, two = bench.peer(), bench.peer()

        def forget(other: SimplePeer) -> Callable[[], None]:
            return lambda: bench.pump.forget(other)

        one[1].hook, two[1].hook = forget(two[1]), forget(one[1])
        one[0].send(b"x")
        two[0].send(b"x")
        await until(lambda: 1 == len(one[1].calls + two[1].calls))
        await trio.sleep(0.02)
        assert 1 == len(one[1].calls + two[1].calls)


async def test_many_timers_let_others_have_their_turn() -> None:
    """A batch of moments yields; one scheduled anew meanwhile is not fired twice."""
    async with running() as bench:
        sock = bench.pair().server
        owners = [SimplePeer(sock) for _ in range(1000)]
        for owner in owners:
            bench.pump.wheel.schedule(owner, bench.pump.now)
        turns = 0
        while not all(owner.calls for owner in owners):
            fired = sum(len(owner.calls) for owner in owners)
            turns += 0 < fired < 1000
            await trio.lowlevel.checkpoint()
        assert turns >= 2
        later = bench.pump.now + 60
        first, second = owners[:2]
        first.hook = lambda: bench.pump.wheel.schedule(second, later)
        second.hook = lambda: bench.pump.wheel.schedule(first, later)
        bench.pump.wheel.schedule(first, bench.pump.now)
        bench.pump.wheel.schedule(second, bench.pump.now)
        await until(lambda: 3 == len(first.calls + second.calls))
        await trio.sleep(0.25)
        assert 3 == len(first.calls + second.calls)


async def test_interest_is_what_was_asked_for() -> None:
    """WRITE calls writable, nothing calls nobody, READ again finds what came meanwhile."""
    async with running() as bench:
        client, peer = bench.peer(0)
        client.send(b"x")
        await trio.sleep(0.02)
        assert [] == peer.calls
        bench.pump.watch(peer, WRITE)
        await until(lambda: "writable" in peer.calls)
        bench.pump.watch(peer, 0)
        assert bench.quiet()
        bench.pump.watch(peer, READ)
        await until(lambda: peer.data == b"x")


async def test_a_paused_peer_that_is_half_closed_does_not_spin() -> None:
    """The end of the stream waits until the peer is read again."""
    async with running() as bench:
        client, peer = bench.peer(0)
        client.shutdown(socket.SHUT_WR)
        await trio.sleep(0.05)
        assert bench.quiet()
        assert [] == peer.calls


async def test_a_paused_peer_that_is_reset_is_told() -> None:
    """A dead socket cannot be masked: hung_up is called, and after forget it is quiet."""
    async with running() as bench:
        client, peer = bench.peer(0)
        peer.hook = lambda: bench.pump.forget(peer)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        await until(lambda: peer.calls == ["hung_up"])
        await trio.sleep(0.02)
        assert ["hung_up"] == peer.calls
        assert bench.quiet()


async def test_a_descriptor_is_unregistered_before_it_is_closed() -> None:
    """While a duplicate lives elsewhere, a closed socket must not go on reporting."""
    async with running() as bench:
        client, peer = bench.peer()
        with socket.socket(fileno=socket.dup(peer.fd)) as duplicate:
            bench.pump.linger(peer.sock, peer)
            client.send(b"more")
            client.shutdown(socket.SHUT_WR)
            await until(lambda: peer.sock.fileno() == -1)
            assert unread(duplicate)
            assert bench.quiet()
            assert 0 == len(bench.pump)


async def test_forget_is_idempotent_and_replace_takes_over() -> None:
    """Who was replaced cannot unregister his successor."""
    async with running() as bench:
        client, old = bench.peer()
        new = SimplePeer(old.sock)
        bench.pump.replace(new)
        bench.pump.forget(old)
        client.send(b"x")
        await until(lambda: new.data == b"x")
        bench.pump.forget(new)
        bench.pump.forget(new)
        client.send(b"y")
        assert bench.quiet()
        assert b"" == old.data


async def test_wait_settled_returns_when_those_who_were_there_are_gone() -> None:
    """At once if there is none; newcomers and those who stay are not waited for."""
    async with running() as bench:
        await bench.pump.wait_settled()
        peers = [bench.peer()[1] for _ in range(2)]
        staying = bench.peer()[1]
        done = trio.Event()

        async def wait() -> None:
            await bench.pump.wait_settled(staying)
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            for peer in peers:
                await trio.sleep(0.01)
                bench.peer()
                assert not done.is_set()
                bench.pump.forget(peer)
            await done.wait()


async def test_a_socket_is_waited_for_whoever_has_taken_it_over() -> None:
    """An arrival that is answered lingers under another name: it is the socket that counts."""
    async with running() as bench:
        _, first = bench.peer()
        done = trio.Event()

        async def wait() -> None:
            await bench.pump.wait_settled()
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            second = SimplePeer(first.sock)
            bench.pump.replace(second)
            assert not done.is_set()
            bench.pump.forget(second)
            await done.wait()


async def test_work_per_round_is_bounded() -> None:
    """More ready sockets than one round takes: others have their turn in between."""
    most = pump_module.EVENTS_PER_ROUND
    async with running() as bench:
        sock = bench.pair().server
        peers = []
        for _ in range(2 * most):
            peer = SimplePeer(socket.socket(fileno=socket.dup(sock.fileno())))
            bench.stack.callback(peer.sock.close)
            bench.pump.register(peer, WRITE)
            peers.append(peer)
        counts = set()
        for _ in range(20):
            await trio.lowlevel.checkpoint()
            counts.add(sum(len(peer.calls) for peer in peers))
        steps = sorted(counts)
        assert all(b - a <= 2 * most for a, b in itertools.pairwise(steps))
        assert len(steps) > 3
        for peer in peers:
            bench.pump.forget(peer)


# The door.


@contextlib.asynccontextmanager
async def open_door(bench: Bench) -> AsyncIterator[tuple[Door, list[socket.socket], int]]:
    """Open a door that collects whom it admits; its port comes last."""
    admitted: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:
        listening.setblocking(False)
        door = Door(bench.pump, listening, lambda sock, _: admitted.append(sock), bench.bugs.append)
        door.unlock()
        try:
            yield door, admitted, listening.getsockname()[1]
        finally:
            door.lock()
            for sock in admitted:
                sock.close()


def connect(bench: Bench, port: int, count: int) -> None:
    """Connect so many clients."""
    for _ in range(count):
        bench.stack.enter_context(socket.create_connection(("127.0.0.1", port)))


async def test_the_door_accepts_everybody_without_blocking_sockets() -> None:
    """More than one round takes; each admitted socket is non-blocking."""
    async with running() as bench, open_door(bench) as (_, admitted, port):
        connect(bench, port, 150)
        await until(lambda: 150 == len(admitted))
        assert {0.0} == {sock.gettimeout() for sock in admitted}


async def test_a_locked_door_accepts_nobody_until_it_is_emptied_or_unlocked() -> None:
    """Who waits stays in the queue; empty takes all of them."""
    async with running() as bench, open_door(bench) as (door, admitted, port):
        door.lock()
        door.lock()
        connect(bench, port, 100)
        await trio.sleep(0.05)
        assert [] == admitted
        door.empty()
        assert 100 == len(admitted)
        door.unlock()
        connect(bench, port, 1)
        await until(lambda: 101 == len(admitted))


async def test_a_bug_while_admitting_concerns_one_client() -> None:
    """The door stays open."""
    async with running() as bench, open_door(bench) as (door, admitted, port):
        taken = door._admit

        def stumble(sock: socket.socket, _name: object) -> None:
            door._admit = taken
            sock.close()
            raise LookupError("a bug")

        door._admit = stumble
        connect(bench, port, 1)
        await until(lambda: 1 == len(bench.bugs))
        connect(bench, port, 1)
        await until(lambda: 1 == len(admitted))


OUT_OF_DESCRIPTORS = """
    import resource, socket, sys, time
    import trio
    from trioserver.pump import ACCEPT_PAUSE, Door, Pump

    async def main():
        pump = Pump(print)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        listening = socket.create_server(("127.0.0.1", 0), backlog=256)
        listening.setblocking(False)
        client = [socket.create_connection(listening.getsockname()) for _ in range(10)]
        filler = []
        while True:
            try:
                filler.append(socket.socket())
            except OSError:
                break
        for _ in range(3):
            filler.pop().close()
        admitted, pauses, bugs = [], [], []
        door = Door(pump, listening, lambda sock, _: admitted.append(sock), pauses.append)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.run)
            nursery.start_soon(pump.run_timers)
            door.unlock()
            started, cpu = time.monotonic(), time.process_time()
            await trio.sleep(1.0)
            assert len(admitted) == 3, admitted
            assert 2 <= len(pauses) <= 1.0 / ACCEPT_PAUSE + 1, pauses
            assert time.process_time() - cpu < 0.3, "it spins"
            for sock in filler:
                sock.close()
            with trio.fail_after(1):
                while len(admitted) < 10:
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        print("recovered")

    trio.run(main)
"""


def test_out_of_descriptors_the_door_pauses_and_recovers() -> None:
    """EMFILE costs a pause, not a spin; who waits in the queue is taken afterwards."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(OUT_OF_DESCRIPTORS)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ("recovered\n", 0) == (done.stdout, done.returncode), done.stderr


# Lingering.


async def test_the_last_bytes_arrive_although_input_lies_unread() -> None:
    """The client gets them and FIN, not RST."""
    async with running() as bench:
        client, peer = bench.peer(0)
        client.send(b"x" * 2000)
        peer.sock.send(b"goodbye")
        bench.pump.linger(peer.sock, peer)
        with contextlib.suppress(BlockingIOError):
            while True:
                client.send(b"y" * 2000)
        await trio.sleep(0.05)
        client.setblocking(True)
        assert b"goodbye" == client.recv(100)
        assert b"" == client.recv(100)
        client.close()
        await until(lambda: 0 == len(bench.pump))
        assert -1 == peer.sock.fileno()
        assert 0 == len(bench.pump.wheel)


async def test_lingering_is_bounded_in_time() -> None:
    """A client that neither speaks nor closes is let go after two seconds."""
    async with running() as bench:
        _, peer = bench.peer()
        bench.pump.linger(peer.sock, peer)
        started = time.monotonic()
        await until(lambda: 0 == len(bench.pump))
        assert LINGER_SECONDS <= time.monotonic() - started + 0.15 <= LINGER_SECONDS + 1
        assert -1 == peer.sock.fileno()


async def test_lingering_is_bounded_in_bytes() -> None:
    """A client that goes on talking is cut after a megabyte."""
    async with running() as bench:
        client, peer = bench.peer()
        bench.pump.linger(peer.sock, peer)
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 4 * LINGER_BYTES:
                try:
                    sent += client.send(b"x" * 65536)
                except BlockingIOError:
                    await trio.sleep(0.001)
        assert LINGER_BYTES <= sent < 2 * LINGER_BYTES
        await until(lambda: 0 == len(bench.pump))


@pytest.mark.parametrize("how", ["close", "reset", "gone before"])
async def test_lingering_ends_with_the_client(how: str) -> None:
    """The end of the stream, an error and a socket that is dead already."""
    async with running() as bench:
        client, peer = bench.peer(0)
        if how != "close":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if how == "gone before":
            client.close()
            await until(lambda: "hung_up" in peer.calls)
        bench.pump.linger(peer.sock, peer)
        client.close()
        await until(lambda: 0 == len(bench.pump), 1.0)
        assert -1 == peer.sock.fileno()
        assert 0 == len(bench.pump.wheel)


async def test_the_end_of_the_pump_leaves_the_sockets_open() -> None:
    """They belong to their peers, who may still forget them."""
    async with running() as bench:
        _, peer = bench.peer()
        other = bench.peer()[1]
        pump = bench.pump
        stack = bench.stack.pop_all()
    with stack:
        assert peer.sock.fileno() >= 0
        assert select.select([], [peer.sock], [], 0)[1]
        pump.watch(peer, 0)
        pump.forget(peer)
        pump.linger(other.sock, other)
