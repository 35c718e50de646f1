"""One slow reader under each policy, while 99 others see no delay."""

import re
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import attrs
import pytest

from tests.integration.crowds import Crowd, Visit, Visitor
from tests.integration.measuring import address
from tests.redis_server import RedisServer
from tests.running import SECRET, Running, eventually, running
from trioserver.publisher import Publisher
from trioserver.settings import Settings

OTHERS: Final = 99
ROUNDS: Final = 20
AT_ONCE: Final = 10
PUBLISHED: Final = ROUNDS * AT_ONCE
KEYS: Final = 7
"""Different ones; few enough to wait all at once, so that conflating alone makes enough room."""

FILLING: Final = "x" * 2_000
"""So that far more is published than may wait, whatever the kernel takes. Bytes are what bounds it
here: how many frames that is, depends on how many came in one turn of the server."""

SECONDS: Final = 30.0
"""For what takes a moment."""

DELAY_SECONDS: Final = 1.0
"""What is a delay for the others. The machine may stop for a moment, the slow one for longer: it
reads nothing before all is published."""

ENVIRON: Final = {
    "SLOW_CONSUMERS": "topic:tick=drop_oldest,topic:price=conflate,topic:news=spill,inbox=spill",
    "PUBLIC_TOPICS": "**",
    "DURABLE_TOPICS": "news",
    "TOPIC_HISTORY_LENGTH": "1000",
    "OUTBOX_MAX_BYTES": "64k",
    "WS_WRITE_BUFFER_SIZE": "16k",
    "WS_WRITE_WAIT": "60s",
    "WS_PING_INTERVAL": "0",
    "HEARTBEAT_INTERVAL": "0",
    "MAX_CONNECTIONS_PER_USER": "0",
}
"""Little is hidden in the kernel, and nothing comes that was not published."""

BACK_END: Final = Settings(
    jwt_secret_key=SECRET,
    notifications_per_minute_per_user=0,
    durable_topics=("news",),
    topic_history_length=1000,
)


@attrs.frozen(kw_only=True)
class Place:
    """A running server, and where to publish."""

    server: Running
    back_end: Publisher

    def metric(self, series: str) -> int:
        """Return a count of the server."""
        page = self.server.get("/metrics")[1].decode()
        found = re.search(rf"^{re.escape(series)} (\S+)$", page, re.MULTILINE)
        return int(float(found[1])) if found is not None else 0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One worker, so that all are its clients."""
    directory = tmp_path_factory.mktemp("slow")
    with (
        RedisServer(directory / "redis") as redis,
        running(
            directory / "server", workers=1, environ=ENVIRON | {"REDIS_URL": redis.url}
        ) as server,
        Publisher(redis.url, settings=BACK_END) as back_end,
    ):
        yield Place(server=server, back_end=back_end)


def disconnected(place: Place, slow: Visitor) -> None:
    """It ends as too slow; what it was sent until then came whole and in order."""
    assert slow.over
    assert slow.code in {None, 4410}  # It may have read too late even for that.
    got = numbers(slow)
    assert list(range(len(got))) == got
    assert len(got) < PUBLISHED
    series = 'websocket_closes_total{reason="too_slow"}'
    eventually(lambda: place.metric(series) == 1, SECONDS, "it is counted")


def dropped(place: Place, slow: Visitor) -> None:
    """What it did not get is counted, where it would have come."""
    reached = 0
    gaps = 0
    for message in told(slow):
        if message["type"] == "gap":
            assert ("slow", "tick") == (message["reason"], message["topic"])
            reached += message["missing"]
            gaps += message["missing"]
        else:
            assert reached == message["payload"]["n"]
            reached += 1
    assert PUBLISHED == reached == len(numbers(slow)) + gaps
    assert gaps > 0
    series = 'slow_consumers_total{policy="drop_oldest"}'
    eventually(lambda: place.metric(series) == gaps, SECONDS, "they are counted")


def conflated(place: Place, slow: Visitor) -> None:
    """It has the newest of each key, and less of what was older; nothing is said to be missing."""
    got = numbers(slow)
    assert ["tick"] * len(got) == [message["type"] for message in told(slow)]
    newest = {number % KEYS: number for number in range(PUBLISHED)}
    assert newest == {number % KEYS: number for number in got}
    for key in range(KEYS):
        ascending = [number for number in got if number % KEYS == key]
        assert sorted(ascending) == ascending
    assert len(got) < PUBLISHED
    series = 'slow_consumers_total{policy="conflate"}'
    missing = PUBLISHED - len(got)
    eventually(lambda: place.metric(series) == missing, SECONDS, "they are counted")


def spilled(place: Place, slow: Visitor) -> None:
    """It was told that it lags, and got everything in the end, in order and once."""
    assert list(range(PUBLISHED)) == numbers(slow)
    kinds = [message["type"] for message in told(slow)]
    assert {"tick", "lagging"} == set(kinds)
    assert kinds[-1] == "tick"
    series = 'slow_consumers_total{policy="spill"}'
    least = kinds.count("lagging")
    eventually(lambda: place.metric(series) >= least, SECONDS, "they are counted")


@attrs.frozen(kw_only=True)
class Case:
    """What is published where, and what the slow one is to have of it."""

    topic: str
    """Empty for the notifications of a user, all of whose devices these are."""
    verdict: Callable[[Place, Visitor], None]
    keyed: bool = False


CASES: Final = {
    "disconnect": Case(topic="plain", verdict=disconnected),
    "drop_oldest": Case(topic="tick", verdict=dropped),
    "conflate": Case(topic="price", verdict=conflated, keyed=True),
    "spill": Case(topic="news", verdict=spilled),
    "spill of an inbox": Case(topic="", verdict=spilled),
}


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_one_slow_reader_delays_nobody(place: Place, case: Case) -> None:
    """Under each policy the 99 others get all at once, and the slow one what its policy says."""
    with Crowd(address(place.server)) as others, Crowd(address(place.server)) as alone:
        others.come(visit(number) for number in range(OTHERS))
        (slow,) = alone.come([visit(OTHERS, receive_buffer=4096)])
        if case.topic:
            for crowd in (others, alone):
                subscribe(crowd, case.topic)
        delays = [publish(place, case, others, turn) for turn in range(ROUNDS)]
        *_, second, worst = sorted(delays)
        assert second <= DELAY_SECONDS
        assert worst <= 5 * DELAY_SECONDS
        for other in others.visitors:
            assert list(range(PUBLISHED)) == numbers(other)
        last = set(range(PUBLISHED - KEYS, PUBLISHED))
        alone.wait(lambda: slow.over or last <= set(numbers(slow)), "the slow one", SECONDS)
        alone.listen(0.05)
        case.verdict(place, slow)


def visit(number: int, receive_buffer: int = 0) -> Visit:
    """Return one of the clients: all of one user, as his devices."""
    return Visit(user="ann", query=f"device=d{number}", receive_buffer=receive_buffer)


def subscribe(crowd: Crowd, topic: str) -> None:
    """Have everybody subscribe, and wait until that is so."""
    for visitor in crowd.visitors:
        visitor.say({"type": "subscribe", "topic": topic})
    crowd.wait(
        lambda: all(one.messages[-1]["type"] == "subscribed" for one in crowd.visitors),
        "all are subscribed",
        SECONDS,
    )


def publish(place: Place, case: Case, others: Crowd, turn: int) -> float:
    """Publish some; return how many seconds later the last of the others had all of it."""
    before = sum(len(one.messages) for one in others.visitors)
    began = time.perf_counter()
    for number in range(turn * AT_ONCE, (turn + 1) * AT_ONCE):
        payload = {"n": number, "filling": FILLING}
        if not case.topic:
            place.back_end.publish(payload, type="tick", user="ann")
        elif case.keyed:
            place.back_end.publish(payload, type="tick", topic=case.topic, key=f"{number % KEYS}")
        else:
            place.back_end.publish(payload, type="tick", topic=case.topic)
    expected = before + OTHERS * AT_ONCE
    others.wait(
        lambda: sum(len(one.messages) for one in others.visitors) >= expected,
        "the others have it",
        SECONDS,
    )
    return time.perf_counter() - began


def told(visitor: Visitor) -> list[dict[str, Any]]:
    """Return what a visitor got of what was published, and what was said about that."""
    kinds = {"tick", "gap", "lagging"}
    return [message for message in visitor.messages if message["type"] in kinds]


def numbers(visitor: Visitor) -> list[int]:
    """Return the numbers of what a visitor has got."""
    return [one["payload"]["n"] for one in visitor.messages if one["type"] == "tick"]
