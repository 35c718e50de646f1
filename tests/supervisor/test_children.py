"""What children are started with, and the talk with them."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from supervisor.children import Children, Commands
from supervisor.events import Kind
from tests.supervisor.harness import Family, eventually, open_fds
from trioserver.status import Beat, Drain, Started

TALKER = ("/bin/sh", "-c", 'printf "$0" >&3; sleep 60')


class World:
    """Children whose commands are small scripts."""

    def __init__(self, directory: Path, family: Family, closing: ExitStack) -> None:
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
            env={"X": "x", "PATH": "/bin"},
        )

    def shown(self) -> str:
        """Return what a child has written down."""
        eventually(lambda: self.output.exists() and self.output.read_text() != "")
        text = self.output.read_text()
        self.output.unlink()
        return text


@pytest.fixture
def world(directory: Path, family: Family) -> Iterator[World]:
    """Return a world."""
    with ExitStack() as closing:
        world = World(directory, family, closing)
        yield world
        world.children.close()


def test_each_child_is_told_its_place_and_its_generation(world: World) -> None:
    """And gets its own listening socket and its generation's settings."""
    world.children.keep_snapshot(1, b"one")
    world.children.keep_snapshot(2, b"two")

    worker = world.children.spawn(Kind.WORKER, 1, 1)
    assert world.shown() == "--slot 1 --generation 1 x\none"
    gateway = world.children.spawn(Kind.GATEWAY, 0, 2)
    assert world.shown() == "--generation 2 x\ntwo"

    assert open_fds(worker)[4] == open_fds()[world.doors[1].fileno()]
    assert open_fds(gateway)[4] == open_fds()[world.doors[2].fileno()]


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


def test_a_spawn_that_fails_leaves_nothing_behind(family: Family) -> None:
    """No pair for a child that never was."""
    with socket.socket() as door:
        children = Children(
            family.processes,
            Commands(worker=("/nowhere",)),
            doors=[door],
            admin_door=door,
            env={},
        )
        children.keep_snapshot(1, b"")
        before = len(open_fds())
        with pytest.raises(FileNotFoundError):
            children.spawn(Kind.WORKER, 0, 1)

        assert len(open_fds()) == before
        children.close()


def says(*packets: str) -> Commands:
    """Return a worker that says these packets and ends."""
    script = "".join(f"printf '{packet}' >&3; " for packet in packets)
    return Commands(worker=("/bin/sh", "-c", script))


def test_what_a_child_says_is_heard_in_order_to_its_end(family: Family) -> None:
    """Unknown things are skipped; the end of the conversation is noticed."""
    commands = says('{"type":"started"}', "tralala", '{"type":"beat","connections":3}')
    with socket.socket() as door:
        children = Children(family.processes, commands, doors=[door], admin_door=door, env={})
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


def test_a_child_that_talks_without_end_is_heard_in_portions(family: Family) -> None:
    """Its siblings get their turn."""
    commands = says(*['{"type":"started"}'] * 100)
    with socket.socket() as door:
        children = Children(family.processes, commands, doors=[door], admin_door=door, env={})
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
