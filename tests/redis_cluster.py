"""A real Redis Cluster for tests: three masters that share the slots, ended by pid.

    with RedisCluster(tmp_path / "cluster") as cluster:
        cluster.command("SET", "ts:{p07}:x", 1)   # goes where the key lives
        cluster.owner("ts:{p07}:x").kill()

Nodes are `tests.redis_server.RedisServer`, so they die with the test process. Nothing is
replicated and nothing fails over: this shows what keys and scripts may do, not what survives.
"""

import contextlib
import itertools
import re
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.redis_server import RedisServer, free_port

NODES: Final = 3
SLOTS: Final = 16384
BUS_OFFSET: Final = 10_000
"""A node's bus listens this much above its port; that must be a port, and free."""

HIGHEST_PORT: Final = 65535
START_ATTEMPTS: Final = 5
"""A port that was free may be taken before Redis binds it; then another one is tried."""

JOIN_SECONDS: Final = 15.0
"""For three processes of one machine to know each other: usually two seconds, which is how long a
master waits after its start before it accepts writes."""


def free_port_with_bus() -> int:
    """Return a TCP port of the loopback that was free a moment ago, its bus port too."""
    while True:
        port = free_port()
        # The kernel prefers high ports; the lower ones have as many free.
        while port + BUS_OFFSET > HIGHEST_PORT:
            port -= BUS_OFFSET
        if all(_is_free(number) for number in (port, port + BUS_OFFSET)):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


class RedisCluster:
    """Three Redis processes that form one cluster.

    Args:
        directory: Where each node gets a directory of its own; short, as there are Unix sockets.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.nodes: list[RedisServer] = []
        """In the order of their slots."""

    def start(self) -> None:
        """Start the nodes, let them meet, and return when each sees a complete cluster.

        Raises:
            AssertionError: That took longer than `JOIN_SECONDS`, or a node did not start.
        """
        try:
            for number in range(NODES):
                self.nodes.append(self._start_node(number))
            self._join()
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL every node that runs; returns when they are gone."""
        for node in self.nodes:
            node.kill()

    def owner(self, key: str | bytes) -> RedisServer:
        """Return the node that holds the slot of ``key``."""
        slot = self.nodes[0].command("CLUSTER", "KEYSLOT", key)
        assert isinstance(slot, int)
        return next(
            node for node, slots in zip(self.nodes, _shares(), strict=True) if slot in slots
        )

    def command(self, *arguments: str | bytes | int, key: str | bytes | None = None) -> object:
        """Run one command where its key lives.

        Args:
            arguments: The command.
            key: What decides the node; None takes the command's first argument.

        Raises:
            RuntimeError: Redis answered with an error, whose text this is.
        """
        place = arguments[1] if key is None else key
        assert not isinstance(place, int), "the first argument is no key"
        return self.owner(place).command(*arguments)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    def _start_node(self, number: int) -> RedisServer:
        node = RedisServer(self.directory / str(number), config={"cluster-enabled": "yes"})
        for attempt in range(START_ATTEMPTS):
            node.port = free_port_with_bus()
            with contextlib.suppress(AssertionError):
                node.start()
                break
            assert attempt < START_ATTEMPTS - 1, f"node {number} does not start:\n{node.log}"
        return node

    def _join(self) -> None:
        deadline = time.monotonic() + JOIN_SECONDS
        for number, (node, slots) in enumerate(zip(self.nodes, _shares(), strict=True), start=1):
            # Without epochs of their own, all are 0 until they have quarrelled about it.
            node.command("CLUSTER", "SET-CONFIG-EPOCH", number)
            node.command("CLUSTER", "ADDSLOTS", *slots)
        for node in self.nodes:
            for other in self.nodes:
                # All to all: by hearsay it takes seconds longer.
                if other is not node:
                    node.command("CLUSTER", "MEET", "127.0.0.1", other.port)
        for node in self.nodes:
            _wait(lambda node=node: _sees_all(node), deadline)  # type: ignore[misc] # bound now


def _shares() -> Sequence[range]:
    """Return the slots of each node."""
    bounds = [SLOTS * number // NODES for number in range(NODES + 1)]
    return list(itertools.starmap(range, itertools.pairwise(bounds)))


def _sees_all(node: RedisServer) -> bool:
    info = node.command("CLUSTER", "INFO")
    assert isinstance(info, bytes)
    facts = dict(re.findall(r"(\w+):(\w+)", info.decode()))
    links = node.command("CLUSTER", "NODES")
    assert isinstance(links, bytes)
    # Messages published here go over these links; "ok" alone comes before the last is up.
    connected = links.decode().count(" connected ")
    return (
        facts["cluster_state"] == "ok"
        and facts["cluster_known_nodes"] == str(NODES)
        and facts["cluster_size"] == str(NODES)
        and connected == NODES
    )


def _wait(condition: Callable[[], bool], deadline: float) -> None:
    while not condition():
        assert time.monotonic() < deadline, f"no cluster within {JOIN_SECONDS} s"
        time.sleep(0.01)
