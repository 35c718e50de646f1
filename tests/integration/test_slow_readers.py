"""Slow readers: together they may bind so much memory, and no more; nobody else loses anything."""

import json
import re
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import attrs
import pytest

from tests.integration.crowds import Crowd, Visit, Visitor
from tests.integration.measuring import Audience, Usage, address
from tests.redis_server import RedisServer
from tests.running import SECRET, Running, eventually, running
from trioserver.publisher import Publisher
from trioserver.resp import pack
from trioserver.settings import Settings

MIB: Final = 1 << 20
FILLING: Final = "x" * 9_000
SECONDS: Final = 20.0
"""For what takes a moment."""

ENVIRON: Final = {
    "WS_WRITE_WAIT": "60s",
    "WS_WRITE_BUFFER_SIZE": "16k",
    "HANDSHAKES_PER_SECOND": "0",
    "MAX_CONNECTIONS_PER_USER": "0",
}
"""Only the budget cuts: not the deadline; and little is hidden in the kernel."""


@attrs.frozen(kw_only=True)
class Load:
    """Who reads nothing, and how much is waiting for them in the end."""

    budget: int
    """Bytes."""
    greedy: int
    """Clients who are sent more than the budget has room for."""
    modest: int
    """Clients who are sent little."""
    most: int
    """Bytes by which the worker may grow at its peak."""
    messages: int = 100
    """To each of the greedy: less than one outbox may hold."""
    share: int = 8
    """One of so many goes to the modest, too."""


PUBLISHED: Final = 200
"""More than an outbox holds, and fewer than the ledger."""

UNHURRIED: Final = Settings(jwt_secret_key=SECRET, notifications_per_minute_per_user=0)

EVERYDAY: Final = Load(budget=4 * MIB, greedy=40, modest=15, most=20 * MIB)
THOUSAND: Final = Load(budget=32 * MIB, greedy=900, modest=100, share=20, most=132 * MIB)


def cut(server: Running) -> int:
    """Return how many were cut for reading too slowly, as the metrics have it."""
    page = server.get("/metrics")[1]
    found = re.search(rb'^websocket_closes_total{reason="too_slow"} (\S+)$', page, re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


class Flood:
    """Publishes to many at once, and broadcasts that an audience counts."""

    def __init__(self, redis: RedisServer, audience: Audience) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SECONDS)
        self._socket.connect(str(redis.path))
        self._audience = audience
        self.broadcasts = 0

    def close(self) -> None:
        """Let Redis go."""
        self._socket.close()

    def round(self, users: Sequence[str], number: int) -> None:
        """Send something of its own to each, and a broadcast to all; wait until that has come."""
        commands = []
        for user in users:
            payload = {"number": number, "user": user, "filling": FILLING}
            message = json.dumps({"type": "told", "payload": payload})
            commands.append(pack("PUBLISH", f"user_noti:{user}", message))
        payload = {"number": self.broadcasts, "at": time.perf_counter()}
        message = json.dumps({"type": "numbered", "payload": payload})
        commands.append(pack("PUBLISH", "channels:broadcast", message))
        self.broadcasts += 1
        self._socket.sendall(b"".join(commands))
        replies = 0
        while replies < len(commands):
            replies += self._socket.recv(1 << 16).count(b"\r\n")
        self.wait(lambda: all(len(got) == self.broadcasts for got in self._audience.numbers))

    def wait(self, condition: Callable[[], bool]) -> None:
        """Let the audience listen until something is true."""
        limit = time.perf_counter() + SECONDS
        while not condition():
            assert time.perf_counter() < limit, "somebody has lost something"
            self._audience.listen(time.perf_counter() + 0.01)


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(EVERYDAY, id="some"),
        pytest.param(THOUSAND, id="a thousand", marks=[pytest.mark.slow, pytest.mark.timeout(300)]),
    ],
)
def test_slow_readers_share_a_budget_and_the_largest_are_cut(tmp_path: Path, load: Load) -> None:
    """Memory stays bounded, those with little to take keep it, and the quick lose nothing."""
    environ = ENVIRON | {"OUTBOX_BUDGET_BYTES": str(load.budget)}
    with (
        RedisServer(tmp_path / "redis") as redis,
        running(
            tmp_path / "server", workers=1, environ=environ | {"REDIS_URL": redis.url}
        ) as server,
        Audience(address(server), 20) as audience,
        Crowd(address(server)) as crowd,
    ):
        greedy = [f"greedy-{number}" for number in range(load.greedy)]
        everybody = greedy + [f"modest-{number}" for number in range(load.modest)]
        for at in range(0, len(everybody), 100):
            names = everybody[at : at + 100]
            crowd.come((Visit(user=name, receive_buffer=4096) for name in names), SECONDS)
        assert len(everybody) == len(crowd.staying)
        crowd.stop_listening()
        flood = Flood(redis, audience)
        with Usage.of_worker(server).growth() as growth:
            for number in range(load.messages):
                flood.round(greedy if number % load.share else everybody, number)
            grown = growth()
        flood.close()
        crowd.listen_again()
        crowd.wait(
            lambda: all(one.over or complete(one, load) for one in crowd.visitors), "end", 60
        )
        staying = crowd.staying
        eventually(lambda: cut(server) == len(everybody) - len(staying), SECONDS, "all are counted")
    assert {one.visit.user for one in staying} > set(everybody) - set(greedy)
    # The budget has room for some of what the greedy are sent, and for no more.
    assert load.greedy - load.budget // (load.messages * len(FILLING)) <= cut_ones(crowd)
    assert [list(range(load.messages))] * 20 == audience.numbers
    assert grown < load.most, grown / MIB


def cut_ones(crowd: Crowd) -> int:
    """Return how many have been cut; who was told why was told that it was too slow."""
    assert {one.code for one in crowd.visitors} <= {None, 4410}
    return len(crowd.visitors) - len(crowd.staying)


def complete(visitor: Visitor, load: Load) -> bool:
    """Whether everything has come that was for a visitor, in order."""
    modest = visitor.visit.user.startswith("modest")
    got = {
        kind: [one["payload"]["number"] for one in visitor.messages if one["type"] == kind]
        for kind in ("told", "numbered")
    }
    return {
        "told": list(range(0, load.messages, load.share if modest else 1)),
        "numbered": list(range(load.messages)),
    } == got


def test_who_was_cut_gets_the_rest_when_it_comes_back(tmp_path: Path) -> None:
    """What it could not take is in the ledger: nothing is missing then, and nothing comes twice."""
    environ = ENVIRON | {"OUTBOX_MAX_FRAMES": "64"}
    with (
        RedisServer(tmp_path / "redis") as redis,
        running(
            tmp_path / "server", workers=1, environ=environ | {"REDIS_URL": redis.url}
        ) as server,
        Crowd(address(server)) as crowd,
        Publisher(redis.url, settings=UNHURRIED) as back_end,
    ):
        (slow,) = crowd.come([Visit(user="ann", receive_buffer=4096)])
        crowd.stop_listening()
        for number in range(PUBLISHED):
            back_end.publish({"number": number, "filling": FILLING}, user="ann")
        eventually(lambda: cut(server) == 1, SECONDS, "it is cut")
        crowd.listen_again()
        crowd.wait(lambda: slow.over, "it is cut", SECONDS)
        position = [one["position"] for one in slow.messages if "position" in one][-1]
        (again,) = crowd.come([Visit(user="ann", query=f"position={position}")])
        crowd.wait(lambda: numbers(again)[-1:] == [PUBLISHED - 1], "it gets the rest", SECONDS)
        crowd.listen(0.1)
    assert list(range(PUBLISHED)) == numbers(slow) + numbers(again)


def numbers(visitor: Visitor) -> list[int]:
    """Return what a visitor has got."""
    return [one["payload"]["number"] for one in visitor.messages if "id" in one]
