"""What children are started with, and the talk with them."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from supervisor.children import Children, Commands
from supervisor.events import Kind
from supervisor.lives import Lives
from tests.supervisor.counting_child import counted
from tests.supervisor.harness import Family, eventually, no_descriptors_left, open_fds
from trioserver.board_map import BoardMap, create
from trioserver.status import BOARD_FD, Beat, Drain, Started

TALKER = ("/bin/sh", "-c", 'printf "$0" >&3; sleep 60')


@pytest.fixture
def board() -> Iterator[int]:
    """Return a board."""
    fd = create(2, 100)
    yield fd
    os.close(fd)


class World:
    """Children whose commands are small scripts."""

    def __init__(self, directory: Path, family: Family, board: int, closing: ExitStack) -> None:
        """Prepare."""
        self.output = directory / "output"
        show = f"echo $* $X > {self.output}.part; cat /proc/self/fd/5 >> {self.output}.part"
        show = f"{show}; mv {self.output}.part {self.output}; sleep 60"
        self.doors = [closing.enter_context(socket.socket()) for _ in range(3)]
        self.children = Children(
            family.processes,
            Commands(
                worker=("/bin/sh", "-c", show, "worker"),
                gateway=("/bin/sh", "-c", show, "gateway"),
                redis=("/bin/sh", "-c", f"echo $LC_ALL > {self.output}; sleep 60"),
            ),
            doors=self.doors[:2],
            admin_door=self.doors[2],
            board=board,
            lives=Lives("s.1", 2),
            env={"X": "x", "PATH": "/bin"},
        )

    def shown(self) -> str:
        """Return what a child has written down."""
        eventually(lambda: self.output.exists() and self.output.read_text() != "")
        text = self.output.read_text()
        self.output.unlink()
        return text


@pytest.fixture
def world(directory: Path, family: Family, board: int) -> Iterator[World]:
    """Return a world."""
    with ExitStack() as closing:
        world = World(directory, family, board, closing)
        yield world
        world.children.close()


def test_each_child_is_told_its_place_and_its_generation(world: World) -> None:
    """And gets its own listening socket and its generation's settings."""
    world.children.keep_snapshot(1, b"one")
    world.children.keep_snapshot(2, b"two")

    worker = world.children.spawn(Kind.WORKER, 1, 1)
    assert world.shown() == "--slot 1 --generation 1 --life s.1.1 x\none"
    gateway = world.children.spawn(Kind.GATEWAY, 0, 2)
    assert world.shown() == "--generation 2 x\ntwo"

    assert open_fds(worker)[4] == open_fds()[world.doors[1].fileno()]
    assert open_fds(worker)[BOARD_FD].startswith("/memfd:board")
    assert BOARD_FD not in open_fds(gateway)
    assert open_fds(gateway)[4] == open_fds()[world.doors[2].fileno()]


def test_a_newcomer_learns_who_was_buried(world: World, family: Family) -> None:
    """Workers only: nobody in the fleet knows of a gateway."""
    world.children.keep_snapshot(1, b"")
    pids = [world.children.spawn(kind, 0, 1) for kind in (Kind.WORKER, Kind.GATEWAY, Kind.WORKER)]
    for pid in pids:
        family.processes.kill(pid, signal.SIGKILL)
        family.code_of(pid)
        world.children.bury(pid)
    world.output.unlink(missing_ok=True)
    world.children.spawn(Kind.WORKER, 1, 1)

    said = "--slot 1 --generation 1 --life s.1.3 --after s.1.1,s.1.2 x\n"
    assert said == world.shown()


def test_burying_needs_no_descriptor(world: World, family: Family, board: int) -> None:
    """There may be none left just when a worker with many connections has died."""
    world.children.keep_snapshot(1, b"")
    pid = world.children.spawn(Kind.WORKER, 0, 1)
    family.processes.kill(pid, signal.SIGKILL)
    family.code_of(pid)
    # What a process leaves that ends without a word.
    dead = BoardMap(board)
    dead.words[dead.connections + dead.claim()] = 3
    dead.close()
    assert (3, 1) == counted(board)
    with no_descriptors_left():
        world.children.bury(pid)

    assert (0, 0) == counted(board)


def test_redis_has_no_pair_and_no_locale(world: World) -> None:
    """It is not one of ours; a locale that is not installed would keep it from starting."""
    pid = world.children.spawn(Kind.REDIS, 0, 1)

    assert world.shown() == "C\n"
    assert world.children.pair(pid) is None
    assert world.children.receive(pid) == ([], False)
    world.children.send(pid, Drain(seconds=1))
    assert open_fds(pid)[1] == open_fds()[2]


def test_settings_cannot_be_changed_by_a_child(world: World) -> None:
    """They are sealed: its siblings read the same memory."""
    world.children.keep_snapshot(1, b"one")
    pid = world.children.spawn(Kind.WORKER, 0, 1)
    world.shown()

    with pytest.raises(PermissionError), Path(f"/proc/{pid}/fd/5").open("r+b") as settings:
        settings.write(b"two")


def test_a_dropped_snapshot_is_gone(world: World) -> None:
    """Nobody of that generation can be spawned any more."""
    before = len(open_fds())
    world.children.keep_snapshot(1, b"one")
    world.children.keep_snapshot(1, b"another")
    world.children.drop_snapshot(1)
    world.children.drop_snapshot(1)

    assert len(open_fds()) == before
    with pytest.raises(KeyError):
        world.children.spawn(Kind.WORKER, 0, 1)


def test_a_spawn_that_fails_leaves_nothing_behind(family: Family, board: int) -> None:
    """No pair for a child that never was."""
    with socket.socket() as door:
        children = only_workers(family, Commands(worker=("/nowhere",)), door, board)
        children.keep_snapshot(1, b"")
        before = len(open_fds())
        with pytest.raises(FileNotFoundError):
            children.spawn(Kind.WORKER, 0, 1)

        assert len(open_fds()) == before
        children.close()


def only_workers(family: Family, commands: Commands, door: socket.socket, board: int) -> Children:
    """Return children of which nothing but a worker can be spawned."""
    return Children(
        family.processes,
        commands,
        doors=[door],
        admin_door=door,
        board=board,
        lives=Lives("s.1", 1),
        env={},
    )


def says(*packets: str) -> Commands:
    """Return a worker that says these packets and ends."""
    script = "".join(f"printf '{packet}' >&3; " for packet in packets)
    return Commands(worker=("/bin/sh", "-c", script))


def test_what_a_child_says_is_heard_in_order_to_its_end(family: Family, board: int) -> None:
    """Unknown things are skipped; the end of the conversation is noticed."""
    commands = says('{"type":"started"}', "tralala", '{"type":"beat","connections":3}')
    with socket.socket() as door:
        children = only_workers(family, commands, door, board)
        children.keep_snapshot(1, b"")
        pid = children.spawn(Kind.WORKER, 0, 1)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

        assert children.receive(pid) == ([Started(), Beat(connections=3)], False)

        # It is dead, and cannot be told anything: that is nobody's fault.
        children.send(pid, Drain(seconds=1))
        children.forget(pid)
        children.forget(pid)
        assert children.pair(pid) is None
        children.close()


def test_a_child_that_talks_without_end_is_heard_in_portions(family: Family, board: int) -> None:
    """Its siblings get their turn."""
    commands = says(*['{"type":"started"}'] * 100)
    with socket.socket() as door:
        children = only_workers(family, commands, door, board)
        children.keep_snapshot(1, b"")
        pid = children.spawn(Kind.WORKER, 0, 1)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

        assert children.receive(pid) == ([Started()] * 64, True)
        assert children.receive(pid) == ([Started()] * 36, False)
        children.close()


def test_a_child_that_does_not_listen_blocks_nobody(world: World) -> None:
    """What it cannot take is dropped; its deadline comes all the same."""
    world.children.keep_snapshot(1, b"one")
    pid = world.children.spawn(Kind.WORKER, 0, 1)
    for _ in range(2000):
        world.children.send(pid, Drain(seconds=1))
