"""The proxy of the stage: deaf is a subscription that lives and says nothing, and nobody else."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import hiredis
import pytest

from tests.ledger.stage import ProxyThread
from tests.redis_server import RedisServer
from trioserver.resp import pack


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own."""
    with RedisServer(tmp_path) as server:
        yield server


class Line:
    """One connection that says commands and hears what comes."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=5)
        self._reader = hiredis.Reader(notEnoughData=Ellipsis)

    def say(self, *command: str | bytes) -> None:
        """Say a command."""
        self.socket.sendall(pack(*command))

    def hear(self) -> object:
        """Return what comes next."""
        while (reply := self._reader.gets()) is Ellipsis:
            data = self.socket.recv(4096)
            assert data
            self._reader.feed(data)
        return reply

    def ask(self, *command: str | bytes) -> object:
        """Say a command and return the reply."""
        self.say(*command)
        return self.hear()


def test_only_present_subscriptions_become_deaf(redis: RedisServer) -> None:
    """They stay connected and hear nothing; commands and new subscriptions work."""
    with (
        ProxyThread(("127.0.0.1", redis.port)) as thread,
        contextlib.ExitStack() as sockets,
    ):
        subscribed, commands, later = (Line(thread.proxy.port) for _ in range(3))
        for line in (subscribed, commands, later):
            sockets.enter_context(line.socket)
        subscribed.ask("SUBSCRIBE", "news")
        assert b"PONG" == commands.ask("PING")

        assert 1 == thread.proxy.deafen()
        assert 0 == thread.proxy.deafen(), "already deaf"
        later.ask("SUBSCRIBE", "news")
        assert 2 == commands.ask("PUBLISH", "news", "hello"), "Redis believes it is heard"

        assert [b"message", b"news", b"hello"] == later.hear()
        subscribed.say("PING")
        subscribed.socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            subscribed.hear()
