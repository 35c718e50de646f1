"""The API: a real gateway on a real Redis, and every answer that a back end can get."""

import datetime as dt
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs
import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from tests.redis_server import RedisServer, wait_until
from tests.toxic import Toxic
from tests.trioserver.gateway_process import Answer, GatewayProcess
from tests.trioserver.ledger_calls import Caller, Ears
from trioserver import ledger, position
from trioserver.endpoint import Endpoint
from trioserver.gateway import api, publish_request
from trioserver.gateway.api import Api
from trioserver.gateway.api_keys import ApiKeys
from trioserver.gateway.problem import Problem
from trioserver.publisher import TrioPublisher
from trioserver.redis_link import open_link
from trioserver.settings import Settings
from trioserver.tally import HTTP_STATUSES, OTHER

PATH = "/api/v1/notifications"
KEY = {"X-API-Key": "a-key"}
SETTINGS = Settings(
    api_keys=("a-key", "another"),
    logger_encoding="json",
    log_level="debug",
    inbox_max_length=50,
    api_requests_per_second=0,
    durable_topics=("room.*",),
    topic_history_length=2,
)
DOCS = Path(__file__).parent.parent.parent / "docs" / "api.md"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis for all tests that leave it as it was."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def gateway(
    redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayProcess]:
    """One gateway for all tests that leave it as it was."""
    settings = attrs.evolve(SETTINGS, redis_url=redis.unix_url)
    with GatewayProcess(tmp_path_factory.mktemp("gw"), settings) as process:
        process.wait_started()
        yield process


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that may be ill-treated, and forgets nothing when it is killed."""
    with RedisServer(tmp_path / "redis", config={"appendfsync": "always"}) as server:
        yield server


async def publish(
    process: GatewayProcess,
    to: object,
    payload: object = "x",
    headers: Mapping[str, str] = KEY,
    **more: object,
) -> Answer:
    """Publish by HTTP."""
    body = json.dumps({"to": to, "payload": payload, **more}).encode()
    return await process.post(PATH, body, headers)


def inbox(redis: RedisServer, owner: ledger.Owner) -> list[dict[bytes, bytes]]:
    """Return the entries of an inbox, as Redis has them."""
    with Caller(redis.path) as caller:
        entries = caller.ask("XRANGE", ledger.key("inbox", owner), "-", "+")
    return [dict(zip(fields[::2], fields[1::2], strict=True)) for _, fields in entries]


def problem(answer: Answer) -> str:
    """Return the detail of an answer that has to be problem details."""
    assert "application/problem+json" == answer.headers["Content-Type"]
    body = json.loads(answer.body)
    assert answer.status == body["status"]
    detail = body.get("detail", "")
    assert isinstance(detail, str)
    return detail


class TestPublish:
    """What is accepted is in Redis."""

    async def test_to_one(self, gateway: GatewayProcess, redis: RedisServer) -> None:
        """202 with id and position, and by then the notification is in the user's inbox."""
        answer = await publish(
            gateway,
            {"user": "one"},
            {"n": 1},
            {**KEY, "traceparent": TRACE},
            type="order",
            ttl="1h",
        )

        assert 202 == answer.status
        body = json.loads(answer.body)
        [entry] = inbox(redis, "one")
        assert {"id", "position"} == body.keys()
        assert body["id"] == entry[b"i"].decode()
        assert ledger.partition("one") == ledger.partition_of(body["id"])
        place = position.parse(body["position"])
        assert place is not None
        assert 1 == position.seq_of(place.user)
        assert (b"order", {"n": 1}) == (entry[b"t"], json.loads(entry[b"p"]))
        assert TRACE.encode() == entry[b"c"]

    async def test_to_many(self, gateway: GatewayProcess, redis: RedisServer) -> None:
        """Each user gets one of their own, once; what is wrong with one is said of that one."""
        answer = await publish(gateway, {"users": ["m1", "m2", "m1", "x" * 129]})

        assert 202 == answer.status
        lines = json.loads(answer.body)["notifications"]
        assert ["m1", "m2", "x" * 129] == [line["user"] for line in lines]
        assert [lines[0]["id"], lines[1]["id"]] == [
            entry[b"i"].decode() for user in ("m1", "m2") for entry in inbox(redis, user)
        ]
        assert (422, True) == (lines[2]["status"], "128 bytes" in lines[2]["error"])

    async def test_to_everyone(self, gateway: GatewayProcess, redis: RedisServer) -> None:
        """A broadcast with a ttl is durable, in the stream of everyone."""
        answer = await publish(gateway, {"all": True}, "sale")

        assert 202 == answer.status
        body = json.loads(answer.body)
        place = position.parse(body["position"])
        assert place is not None
        assert ("", True) == (place.user, bool(place.all))
        assert body["id"] in [entry[b"i"].decode() for entry in inbox(redis, None)]

    async def test_to_a_durable_topic(self, gateway: GatewayProcess, redis: RedisServer) -> None:
        """Id and position, and by then it is in the topic's stream; its life is found by its id."""
        answers = [await publish(gateway, {"topic": "room.7"}, n, type="said") for n in range(3)]
        body = json.loads(answers[2].body)
        life = json.loads((await gateway.get(f"{PATH}/{body['id']}", KEY)).body)

        assert {202} == {answer.status for answer in answers}
        kept = inbox(redis, ledger.Topic("room.7"))
        assert [b"1", b"2"] == [entry[b"p"] for entry in kept]
        assert body["id"] == kept[1][b"i"].decode()
        place = position.parse(body["position"])
        assert place is not None
        assert ("", 3) == (place.user, position.seq_of(place.all))
        assert ({"topic": "room.7"}, "said", 3) == (life["to"], life["type"], life["seq"])

    async def test_to_a_live_topic(self, gateway: GatewayProcess, redis: RedisServer) -> None:
        """Whoever is subscribed hears of it; there is no id, and nothing is kept."""
        with Caller(redis.path) as listener:
            listener.ask("SUBSCRIBE", "topic:ticker")
            answer = await publish(gateway, {"topic": "ticker"}, 7, key="acme")
            heard = listener.next()

        assert (202, {"id": None, "position": None}) == (answer.status, json.loads(answer.body))
        assert {"type": "notification", "payload": 7, "key": "acme"} == json.loads(heard[2])  # type: ignore[index]
        assert [] == inbox(redis, ledger.Topic("ticker"))

    async def test_to_several_topics(self, gateway: GatewayProcess) -> None:
        """A line per topic, each once; what is wrong with one is said of that one."""
        to = {"topics": ["room.8", "ticker", "room.8", "a b"]}
        answer = await publish(gateway, to, collapse_key="c")

        assert 202 == answer.status
        lines = json.loads(answer.body)["notifications"]
        assert ["room.8", "ticker", "a b"] == [line["topic"] for line in lines]
        assert ledger.partition(ledger.Topic("room.8")) == ledger.partition_of(lines[0]["id"])
        assert "collapse_key means nothing for ticker, which is a live topic." == lines[1]["error"]
        assert [422, 422] == [line["status"] for line in lines[1:]]
        alone = await publish(gateway, {"topic": "ticker"}, ttl=60)
        assert (422, True) == (alone.status, "ttl means nothing" in problem(alone))

    async def test_ephemeral(self, gateway: GatewayProcess, redis: RedisServer) -> None:
        """With ttl 0 nothing is kept: it goes out as a raw publication, without an id."""
        with Caller(redis.path) as listener:
            listener.ask("SUBSCRIBE", "user_noti:eph")
            answer = await publish(gateway, {"user": "eph"}, {"n": 1}, ttl=0)
            heard = listener.next()

        assert (202, {"id": None, "position": None}) == (answer.status, json.loads(answer.body))
        assert [b"message", b"user_noti:eph"] == heard[:2]  # type: ignore[index]
        assert {"type": "notification", "payload": {"n": 1}} == json.loads(heard[2])  # type: ignore[index]
        assert [] == inbox(redis, "eph")

    async def test_repeated(self, gateway: GatewayProcess, redis: RedisServer) -> None:
        """The same idempotency key gives the same answer; for something else it is a conflict."""
        to = {"user": "idem"}
        first = await publish(gateway, to, 1, idempotency_key="k")
        again = await publish(gateway, to, 1, {**KEY, "Idempotency-Key": "k"})
        other = await publish(gateway, to, 2, idempotency_key="k")
        several = await publish(gateway, {"users": ["idem"]}, 2, idempotency_key="k")

        assert (202, 202, 409, 409) == (
            *(first.status, again.status),
            *(other.status, several.status),
        )
        assert json.loads(first.body) == json.loads(again.body)
        assert problem(other)
        assert 1 == len(inbox(redis, "idem"))

    async def test_later(self, gateway: GatewayProcess, redis: RedisServer) -> None:
        """What is scheduled has an id, no position, and is in no inbox yet."""
        when = dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)
        answer = await publish(gateway, {"user": "later"}, deliver_at=when.isoformat())
        body = json.loads(answer.body)
        life = json.loads((await gateway.get(f"{PATH}/{body['id']}", KEY)).body)

        assert (202, None) == (answer.status, body["position"])
        assert [] == inbox(redis, "later")
        assert ("accepted", None) == (life["state"], life["seq"])
        assert abs(when - dt.datetime.fromisoformat(life["deliver_at"])).total_seconds() < 0.002

    async def test_the_gateway_delivers_what_is_due(
        self, gateway: GatewayProcess, redis: RedisServer
    ) -> None:
        """A notification with ``deliver_at`` is in the inbox when its time has come."""
        when = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=0.3)
        answer = await publish(gateway, {"user": "soon"}, deliver_at=when.isoformat())
        await wait_until(lambda: inbox(redis, "soon"))

        assert dt.datetime.now(dt.UTC) >= when - dt.timedelta(milliseconds=2)
        [entry] = inbox(redis, "soon")
        assert json.loads(answer.body)["id"] == entry[b"i"].decode()

    async def test_limits_are_the_servers(
        self, gateway: GatewayProcess, redis: RedisServer
    ) -> None:
        """INBOX_MAX_LENGTH holds for what comes by HTTP."""
        for _ in range(3):
            users = {"users": ["full"] + [f"u{number}" for number in range(30)]}
            await publish(gateway, users)
        for _ in range(60):
            await publish(gateway, {"user": "full"})

        assert 50 == len(inbox(redis, "full"))

    async def test_a_worker_hears_of_it(self, gateway: GatewayProcess, redis: RedisServer) -> None:
        """The envelope goes out on the user's channel."""
        with Ears(redis.path) as ears:
            answer = await publish(gateway, {"user": "heard"})
            heard = [one for one in ears.heard() if one.channel == "user_noti:heard"]

        assert [json.loads(answer.body)["id"]] == [one.rest[0] for one in heard]


class TestLife:
    """What became of a notification."""

    async def test_life(self, gateway: GatewayProcess) -> None:
        """State, times and events are told; what is not known is null."""
        answer = await publish(
            gateway, {"user": "life"}, type="order", ttl=60, fallback_after="10s"
        )
        body = json.loads(answer.body)
        life = await gateway.get(f"{PATH}/{body['id']}", KEY)

        assert (200, "application/json") == (life.status, life.headers["Content-Type"])
        told = json.loads(life.body)
        times = [
            dt.datetime.fromisoformat(told.pop(name))
            for name in ("accepted_at", "fallback_at", "expires_at")
        ]
        assert abs(times[0] - dt.datetime.now(dt.UTC)).total_seconds() < 10
        assert [10, 60] == [(time - times[0]).total_seconds() for time in times[1:]]
        assert {"accepted"} <= {told["state"]}
        assert isinstance(told.pop("events"), list)
        assert {
            "id": body["id"],
            "to": {"user": "life"},
            "type": "order",
            "state": "accepted",
            "why": None,
            "seq": 1,
            "deliver_at": None,
            "devices": [],
        } == told

    async def test_of_a_broadcast(self, gateway: GatewayProcess) -> None:
        """It says that it was for everyone."""
        answer = await publish(gateway, {"all": True})
        life = await gateway.get(f"{PATH}/{json.loads(answer.body)['id']}", KEY)

        assert {"all": True} == json.loads(life.body)["to"]

    @pytest.mark.parametrize(
        "name", ["x", "p07-", "p07-0192f0c4-0000-7000-8000-000000000000", "%00", "..", "a%2Fb"]
    )
    async def test_unknown(self, gateway: GatewayProcess, name: str) -> None:
        """What is not known, or cannot be an id, is a 404."""
        answer = await gateway.get(f"{PATH}/{name}", KEY)

        assert 404 == answer.status
        problem(answer)


class TestRefusals:
    """Requests that are wrong, and what they are told."""

    @pytest.mark.parametrize(
        ("body", "status", "said"),
        [
            (b"", 400, "empty"),
            (b"{", 400, "not JSON"),
            (b'{"to":{"user":"r"},"payload":1,"ttl":"x"}', 422, '"ttl" is not a duration'),
            (b'{"to":{"user":"r"},"payload":1,"ttl":0.5}', 422, ""),
            (b'{"to":{"user":"r"},"payload":1,"ttl":99999999}', 422, ""),
            (b'{"to":{"user":"r"},"payload":1,"type":"gap"}', 422, "reserved"),
            (b'{"to":{"user":"r"},"payload":1,"type":""}', 422, ""),
            (b'{"to":{"user":""},"payload":1}', 422, "128 bytes"),
            (b'{"to":{"users":["","\\u0000"]},"payload":1}', 422, "128 bytes"),
            (b'{"to":{"user":"r"},"payload":1,"idempotency_key":""}', 422, "idempotency_key"),
            (b'{"to":{"user":"r"},"payload":1,"ttl":0,"collapse_key":"c"}', 422, "collapse_key"),
            (
                b'{"to":{"user":"r"},"payload":1,"deliver_at":"2999-01-01T00:00:00Z"}',
                422,
                "30 days",
            ),
            (b'{"to":{"user":"r"},"payload":1,"fallback_after":-1}', 422, ""),
            (b'{"to":{"user":"r"},"payload":"' + b"x" * 10_240 + b'"}', 413, "10240 bytes"),
        ],
    )
    async def test_of_content(
        self, gateway: GatewayProcess, redis: RedisServer, body: bytes, status: int, said: str
    ) -> None:
        """The status says whose fault it is, the detail what it is, and nothing is published."""
        answer = await gateway.post(PATH, body, KEY)

        assert status == answer.status
        assert said in problem(answer)
        assert [] == inbox(redis, "r")

    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ({}, 401),
            ({"X-API-Key": "a-kez"}, 401),
            ({"X-API-Key": ""}, 401),
            ({"Authorization": "Basic a-key"}, 401),
            ({"Authorization": "Bearer another"}, 202),
            ({"X-API-Key": "another"}, 202),
            ({**KEY, "Content-Type": "text/plain"}, 415),
        ],
    )
    async def test_of_headers(
        self, gateway: GatewayProcess, headers: dict[str, str], status: int
    ) -> None:
        """A key is needed in one of two headers, and the body has to be called JSON."""
        answer = await publish(gateway, {"user": "h"}, headers=headers)

        assert status == answer.status
        assert (status == 401) == ("WWW-Authenticate" in answer.headers)

    async def test_of_asking_without_a_key(self, gateway: GatewayProcess) -> None:
        """Nor does anybody without a key learn what became of a notification."""
        published = await publish(gateway, {"user": "secret"})
        answer = await gateway.get(f"{PATH}/{json.loads(published.body)['id']}")

        assert 401 == answer.status

    async def test_of_methods(self, gateway: GatewayProcess) -> None:
        """What is not offered is a 405 that says what is."""
        listing = await gateway.get(PATH, KEY)
        deleting = await gateway.get(f"{PATH}/x", KEY, method="DELETE")

        assert (405, "POST") == (listing.status, listing.headers["Allow"])
        assert (405, {"GET", "HEAD"}) == (
            deleting.status,
            set(deleting.headers["Allow"].split(", ")),
        )

    async def test_without_keys_nobody_is_let_in(self, tmp_path: Path) -> None:
        """A gateway that was given no keys refuses everybody."""
        settings = attrs.evolve(SETTINGS, api_keys=None, redis_url="redis://127.0.0.1:1/0")
        with GatewayProcess(tmp_path, settings) as process:
            process.wait_started()
            answers = [await publish(process, {"user": "u"}, headers=h) for h in ({}, KEY)]

        assert [401, 401] == [answer.status for answer in answers]


class TestBodies:
    """Bodies that are too large, too slow, cut off, or that nobody asked for."""

    async def test_too_large(self, gateway: GatewayProcess) -> None:
        """The refusal arrives whole, also at a client that goes on sending."""
        for size in (65_537, 200_000, 1_000_000):
            answer = await gateway.post(PATH, b"x" * size, KEY)

            assert 413 == answer.status
            assert "65536 bytes" in problem(answer)

    async def test_declared_too_large(self, gateway: GatewayProcess) -> None:
        """Who says that much will come is told before any of it has."""
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nX-API-Key: a-key\r\nContent-Length: 9999999"
        began = trio.current_time()
        async with await gateway.connect() as stream:
            await stream.send_all(f"{head}\r\n\r\n".encode())
            answer = await _response(stream)

        assert answer.startswith(b"HTTP/1.1 413 ")
        assert trio.current_time() - began < 1.5

    async def test_in_chunks(self, gateway: GatewayProcess) -> None:
        """A body without a length is read to its end, and has the same limit."""
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nX-API-Key: a-key\r\nConnection: close\r\n"
        head += "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        parts = [b'{"to":{"user":"c"},', b'"payload":"', b"x" * 100, b'"}']
        small = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
        large = b"1000\r\n%b\r\n" % (b"x" * 4096) * 20 + b"0\r\n\r\n"

        assert 202 == (await gateway.ask(head.encode() + small)).status
        assert 413 == (await gateway.ask(head.encode() + large)).status

    async def test_cut_off(self, gateway: GatewayProcess, redis: RedisServer) -> None:
        """Half a request publishes nothing, and holds nothing."""
        body = b'{"to":{"user":"cut"},"payload":1}'
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nX-API-Key: a-key\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body) + 1}\r\n\r\n"
        seen = gateway.log.count('"status": 400')
        async with await gateway.connect() as stream:
            await stream.send_all(head.encode() + body)
            await stream.send_eof()
            with trio.fail_after(5.0):
                await stream.receive_some()
        await wait_until(lambda: gateway.log.count('"status": 400') > seen)

        assert [] == inbox(redis, "cut")

    async def test_two_on_one_connection(self, gateway: GatewayProcess) -> None:
        """A connection stays open for the next request."""
        body = b'{"to":{"user":"two"},"payload":1}'
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nX-API-Key: a-key\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        async with await gateway.connect() as stream:
            await stream.send_all(head.encode() + body)
            first = await _response(stream)
            await stream.send_all(head.encode() + body)
            second = await _response(stream)

        assert first.startswith(b"HTTP/1.1 202 ")
        assert second.startswith(b"HTTP/1.1 202 ")

    @pytest.mark.slow
    async def test_too_slow(self, gateway: GatewayProcess) -> None:
        """A body that does not come is waited for ten seconds, then refused."""
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nX-API-Key: a-key\r\nContent-Length: 100"
        began = trio.current_time()
        async with await gateway.connect() as stream:
            await stream.send_all(f"{head}\r\n\r\nx".encode())
            with trio.fail_after(15.0):
                answer = await stream.receive_some()

        assert answer.startswith(b"HTTP/1.1 408 ")
        assert 9.5 < trio.current_time() - began < 12


async def _response(stream: trio.SocketStream) -> bytes:
    """Return one response, whose body is a JSON object."""
    data = b""
    with trio.fail_after(5.0):
        while not (b"\r\n\r\n{" in data and data.endswith(b"}")):
            data += await stream.receive_some()
    return data


class TestPage:
    """The page of the documentation."""

    @pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
    async def test_its_example(self, gateway: GatewayProcess, redis: RedisServer) -> None:
        """The command for copying publishes."""
        [script] = re.findall(r"<!-- run: shell -->\n```sh\n(.*?)```", DOCS.read_text(), re.DOTALL)
        with trio.fail_after(10.0):
            ran = await trio.run_process(
                ["sh", "-ec", script],
                env={**os.environ, "API": f"http://127.0.0.1:{gateway.port}", "API_KEY": "a-key"},
                capture_stdout=True,
                capture_stderr=True,
            )

        assert {"id", "position"} == json.loads(ran.stdout).keys()
        assert json.loads(ran.stdout)["id"] in [
            entry[b"i"].decode() for entry in inbox(redis, "42")
        ]

    def test_its_problems(self) -> None:
        """Every status that is counted, and is not a success or a bug, has its row."""
        rows = set(re.findall(r"^\| (\d{3}) \|", DOCS.read_text(), re.MULTILINE))

        assert set(HTTP_STATUSES) - {"200", "202", "431", "500", OTHER} == rows


class TestOutages:
    """Redis is away: never a 202 that was not stored."""

    async def test_away_and_back(self, own_redis: RedisServer, tmp_path: Path) -> None:
        """503 with Retry-After while it is away; when it is back, empty of scripts, 202."""
        settings = attrs.evolve(SETTINGS, redis_url=own_redis.unix_url)
        with GatewayProcess(tmp_path / "gw", settings) as process:
            process.wait_started()
            before = await publish(process, {"user": "u"})
            own_redis.kill()
            began = trio.current_time()
            away = await publish(process, {"user": "u"})
            several = await publish(process, {"users": ["u", "v"]})
            ephemeral = await publish(process, {"all": True}, ttl=0)
            asked = await process.get(f"{PATH}/{json.loads(before.body)['id']}", KEY)
            took = trio.current_time() - began
            own_redis.start()
            back = await publish(process, {"user": "u"})
            page = await process.get("/metrics")
            own = inbox(own_redis, "u")

        for answer in (away, several, ephemeral, asked):
            assert 503 == answer.status
            assert "1" == answer.headers["Retry-After"]
            assert "Redis" in problem(answer)
        assert "unknown" in problem(away)
        assert took < 15
        assert (202, 202) == (before.status, back.status)
        assert [json.loads(answer.body)["id"] for answer in (before, back)] == [
            entry[b"i"].decode() for entry in own
        ]
        assert {"accepted": 2, "unavailable": 4, "refused": 0} == {
            name: count
            for name, count in published(page).items()
            if name in {"accepted", "unavailable", "refused"}
        }

    async def test_killed_in_the_middle(
        self, own_redis: RedisServer, tmp_path: Path, nursery: trio.Nursery
    ) -> None:
        """A lost answer is a 503 that says so; repeated with its key, it is there once."""
        toxic = Toxic(own_redis.path)
        await nursery.start(toxic.run)
        settings = attrs.evolve(SETTINGS, redis_url=f"redis://127.0.0.1:{toxic.port}/0")
        with GatewayProcess(tmp_path / "gw", settings) as process:
            process.wait_started()
            await publish(process, {"user": "warm"})
            toxic.latency_seconds = 0.15
            answers: list[Answer] = []

            async def ask() -> None:
                answers.append(await publish(process, {"user": "mid"}, 1, idempotency_key="k"))

            async with trio.open_nursery() as asking:
                asking.start_soon(ask)
                await wait_until(lambda: inbox(own_redis, "mid"))
                toxic.cut()  # the reply is on its way
                own_redis.kill()
            toxic.latency_seconds = 0.0
            own_redis.start()
            again = await publish(process, {"user": "mid"}, 1, idempotency_key="k")
            entries = inbox(own_redis, "mid")
        nursery.cancel_scope.cancel()

        assert 503 == answers[0].status
        assert "unknown" in problem(answers[0])
        assert 202 == again.status
        assert [json.loads(again.body)["id"]] == [entry[b"i"].decode() for entry in entries]

    async def test_deaf(self, own_redis: RedisServer, tmp_path: Path) -> None:
        """A Redis that takes and never answers is a 503 within seconds; then all goes on."""
        settings = attrs.evolve(SETTINGS, redis_url=own_redis.unix_url)
        with GatewayProcess(tmp_path / "gw", settings) as process:
            process.wait_started()
            await publish(process, {"user": "u"})
            own_redis.pause()
            began = trio.current_time()
            deaf = await publish(process, {"user": "u"}, idempotency_key="k")
            took = trio.current_time() - began
            alive = await process.get("/healthz")
            own_redis.resume()
            back = await publish(process, {"user": "u"}, idempotency_key="k")
            entries = inbox(own_redis, "u")

        assert (503, 200, 202) == (deaf.status, alive.status, back.status)
        assert took < 8
        assert 2 == len(entries)

    async def test_refusing(self, own_redis: RedisServer, tmp_path: Path) -> None:
        """A Redis that is full says no: 503, and it is certain that nothing was published."""
        settings = attrs.evolve(SETTINGS, redis_url=own_redis.unix_url)
        with GatewayProcess(tmp_path / "gw", settings) as process:
            process.wait_started()
            await publish(process, {"user": "u"})
            own_redis.command("CONFIG", "SET", "maxmemory", "1")
            full = await publish(process, {"user": "u"})
            own_redis.command("CONFIG", "SET", "maxmemory", "0")
            entries = inbox(own_redis, "u")

        assert 503 == full.status
        assert "Nothing was published" in problem(full)
        assert 1 == len(entries)

    async def test_what_is_scheduled_survives_the_gateway(
        self, own_redis: RedisServer, tmp_path: Path
    ) -> None:
        """A gateway is killed; the next one delivers what the first one has accepted."""
        settings = attrs.evolve(SETTINGS, redis_url=own_redis.unix_url)
        when = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=1)
        with GatewayProcess(tmp_path / "gw", settings) as process:
            process.wait_started()
            answer = await publish(process, {"user": "u"}, deliver_at=when.isoformat())
            process.kill()
            process.start(generation=2)
            await wait_until(lambda: inbox(own_redis, "u"))

        assert dt.datetime.now(dt.UTC) >= when - dt.timedelta(milliseconds=2)
        assert [json.loads(answer.body)["id"]] == [
            entry[b"i"].decode() for entry in inbox(own_redis, "u")
        ]

    async def test_there_is_a_limit_for_all_of_it(
        self, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However many repetitions were left: when the time is over, the outcome is unknown."""
        monkeypatch.setattr(api, "PUBLISH_SECONDS", 0.2)
        wanted = publish_request.read(
            b'{"to":{"user":"u"},"payload":1}', [(b"content-type", b"application/json")], 0
        )
        async with open_link(Endpoint(path=str(own_redis.path))) as link:
            routes = Api(ApiKeys([]), TrioPublisher(link), max_payload=0, count=str)
            own_redis.pause()
            with pytest.raises(Problem, match="unknown") as caught:
                await routes._results(wanted)
            own_redis.resume()

        assert 503 == caught.value.status

    async def test_a_script_that_breaks(self, own_redis: RedisServer, tmp_path: Path) -> None:
        """What broke in the middle may have left something: nobody says that nothing was done."""
        settings = attrs.evolve(SETTINGS, redis_url=own_redis.unix_url)
        own_redis.command("SET", ledger.key("holes", "broken"), "no hash")
        own_redis.command("SET", ledger.key("inbox", "broken"), "no stream")
        with GatewayProcess(tmp_path / "gw", settings) as process:
            process.wait_started()
            answer = await publish(process, {"user": "broken"})

        assert 503 == answer.status
        assert "unknown" in problem(answer)

    async def test_a_request_under_way_is_finished_in_a_drain(
        self, own_redis: RedisServer, tmp_path: Path, nursery: trio.Nursery
    ) -> None:
        """What was begun is answered before the gateway ends, with what Redis has said."""
        toxic = Toxic(own_redis.path)
        await nursery.start(toxic.run)
        settings = attrs.evolve(SETTINGS, redis_url=f"redis://127.0.0.1:{toxic.port}/0")
        with GatewayProcess(tmp_path / "gw", settings) as process:
            process.wait_started()
            await publish(process, {"user": "warm"})
            toxic.latency_seconds = 0.15
            answers: list[Answer] = []

            async def ask() -> None:
                answers.append(await publish(process, {"user": "drained"}))

            async with trio.open_nursery() as asking:
                asking.start_soon(ask)
                await wait_until(lambda: inbox(own_redis, "drained"))
                process.drain(10.0)
            code = process.wait_exit()
        nursery.cancel_scope.cancel()

        assert (202, 0) == (answers[0].status, code)

    async def test_in_the_middle_of_many(
        self, own_redis: RedisServer, tmp_path: Path, nursery: trio.Nursery
    ) -> None:
        """Some were stored and some not: each user is told what is known of theirs."""
        toxic = Toxic(own_redis.path)
        await nursery.start(toxic.run)
        settings = attrs.evolve(SETTINGS, redis_url=f"redis://127.0.0.1:{toxic.port}/0")
        users = [f"u{number}" for number in range(1000)]
        with GatewayProcess(tmp_path / "gw", settings) as process:
            process.wait_started()
            await publish(process, {"user": "warm"})
            toxic.latency_seconds = 0.1
            answers: list[Answer] = []

            async def ask() -> None:
                answers.append(await publish(process, {"users": users}))

            async with trio.open_nursery() as asking:
                asking.start_soon(ask)
                await wait_until(lambda: inbox(own_redis, "u250"))
                toxic.mute_to_client = True
            stored = {user for user in users if inbox(own_redis, user)}
        nursery.cancel_scope.cancel()

        assert 202 == answers[0].status
        lines = json.loads(answers[0].body)["notifications"]
        assert users == [line["user"] for line in lines]
        accepted = {line["user"] for line in lines if "id" in line}
        assert accepted
        assert accepted <= stored
        assert accepted != set(users)
        for line in lines:
            if line["user"] not in stored:
                assert 503 == line["status"]


class TestLimits:
    """Not more than a user may get, and nothing that does not fit its schema."""

    async def test_too_many(self, own_redis: RedisServer, tmp_path: Path) -> None:
        """429 says when to come back; in a list it concerns one user; priority comes through."""
        settings = attrs.evolve(
            SETTINGS, redis_url=own_redis.unix_url, notifications_per_minute_per_user=1
        )
        to, both = {"user": "u"}, {"users": ["u", "v"]}
        with GatewayProcess(tmp_path / "gw", settings) as process:
            process.wait_started()
            await publish(process, to, idempotency_key="k")
            alone = await publish(process, to)
            some = json.loads((await publish(process, both)).body)["notifications"]
            with Caller(own_redis.path) as caller:
                caller.ask("HINCRBY", ledger.key("meta", "u"), "pace", -30_000_000)
            none = await publish(process, both)
            again = await publish(process, to, idempotency_key="k")
            urgent = await publish(process, both, priority=True)
            everyone = await publish(process, {"all": True}, priority=False)
            page = await process.get("/metrics")

        assert 429 == alone.status
        assert "too many notifications" in problem(alone)
        assert 1 <= int(alone.headers["Retry-After"]) <= 60
        assert (429, "u") == (some[0]["status"], some[0]["user"])
        assert 1 <= some[0]["retry_after"] <= 60
        assert "id" in some[1]
        assert (429, 429) == (none.status, json.loads(none.body)["status"])
        # Whoever comes back then finds room for both.
        assert 31 <= int(none.headers["Retry-After"]) <= 60
        assert (202, 202, 202) == (again.status, urgent.status, everyone.status)
        assert (2, 2) == (len(inbox(own_redis, "u")), len(inbox(own_redis, "v")))
        assert (4, 5) == (published(page)["limited"], published(page)["accepted"])

    @pytest.mark.parametrize("ttl", [60, 0])
    async def test_what_does_not_fit(
        self, own_redis: RedisServer, tmp_path: Path, ttl: int
    ) -> None:
        """422 says where and what was wanted, without the value; kept or not."""
        schemas = tmp_path / "schemas.json"
        schemas.write_text('{"order": {"properties": {"n": {"type": "integer"}}}}')
        settings = attrs.evolve(SETTINGS, redis_url=own_redis.unix_url, payload_schemas=schemas)
        to = {"user": "u"}
        with GatewayProcess(tmp_path / "gw", settings) as process:
            process.wait_started()
            refused = await publish(process, to, {"n": "hunter2"}, type="order", ttl=ttl)
            fitting = await publish(process, to, {"n": 1}, type="order", ttl=ttl)
            other = await publish(process, to, {"n": "x"}, ttl=ttl)

        assert (422, 202, 202) == (refused.status, fitting.status, other.status)
        assert "/n is not of type integer." in problem(refused)
        assert b"hunter2" not in refused.body


def published(page: Answer) -> dict[str, float]:
    """Return ``notifications_published_total`` by outcome."""
    return {
        sample.labels["outcome"]: sample.value
        for family in text_string_to_metric_families(page.body.decode())
        for sample in family.samples
        if sample.name == "notifications_published_total"
    }


async def test_what_is_counted(own_redis: RedisServer, tmp_path: Path) -> None:
    """Each outcome has its count, once per recipient; paths are counted without ids."""
    settings = attrs.evolve(SETTINGS, redis_url=own_redis.unix_url)
    when = (dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)).isoformat()
    with GatewayProcess(tmp_path / "gw", settings) as process:
        process.wait_started()
        await publish(process, {"user": "u"})
        await publish(process, {"users": ["u", "v", "x" * 200]})
        await publish(process, {"all": True}, ttl=0)
        await publish(process, {"user": "u"}, deliver_at=when)
        for payload in (1, 1, 2):
            await publish(process, {"user": "u"}, payload, idempotency_key="k")
        await publish(process, {"user": "u"}, type="gap")
        await publish(process, {"user": "u"}, headers={})
        await process.get(f"{PATH}/p07-x", KEY)
        page = await process.get("/metrics")

    requests = re.findall(
        r'^http_requests_total{path="/api/v1(.*?)",status="(\d+)"} ([1-9].*)$',
        page.body.decode(),
        re.MULTILINE,
    )
    assert {
        "accepted": 5,
        "scheduled": 1,
        "duplicate": 1,
        "limited": 0,
        "refused": 3,
        "unavailable": 0,
        "delivered": 0,
        "nobody": 0,
        "malformed": 0,
    } == published(page)
    assert [
        ("/notifications", "202", "6.0"),
        ("/notifications", "401", "1.0"),
        ("/notifications", "409", "1.0"),
        ("/notifications", "422", "1.0"),
        ("/notifications/{id}", "404", "1.0"),
    ] == sorted(requests)
