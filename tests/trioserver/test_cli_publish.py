"""The commands of a back end at the terminal, on a real Redis."""

import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.redis_server import RedisServer, free_port
from tests.trioserver.ledger_calls import Caller
from tests.trioserver.terminal import Ran, Run
from trioserver import kept_topics, ledger
from trioserver.ledger import Owner, Rules, Topic, TopicRules
from trioserver.topics import Patterns

RULES: Final = Rules()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


def kept(redis: RedisServer, user: Owner) -> list[list[bytes]]:
    """Return the fields of the entries that are kept for a user."""
    entries = redis.command("XRANGE", ledger.key("inbox", user), "-", "+")
    assert isinstance(entries, list)
    return [fields for _, fields in entries]


def test_publish(run: Run, redis: RedisServer) -> None:
    """One line says id, seq and position; the notification is kept with what was said."""
    ran = run("publish", "--user", "ann", "--type", "order", "--ttl", "1h", '{"n": 1}')
    [fields] = kept(redis, "ann")
    name = fields[1].decode()

    assert (0, "") == (ran.code, ran.err)
    assert ran.out.startswith(f"accepted: {name}, seq 1, position 1.")
    assert 1 == ran.out.count("\n")
    assert [b"order", b'{"n": 1}'] == [fields[3], fields[5]]


def test_publish_as_json(run: Run) -> None:
    """A program reads one object per user."""
    ran = run("publish", "--user", "ann", "--json", "1")
    shown = json.loads(ran.out)

    assert {"user", "id", "position", "seq", "outcome"} == set(shown)
    assert ("ann", 1, "accepted") == (shown["user"], shown["seq"], shown["outcome"])
    everyone = json.loads(run("publish", "--all", "--json", "1").out)
    assert (True, "accepted") == (everyone["all"], everyone["outcome"])
    ephemeral = json.loads(run("publish", "--all", "--ephemeral", "--json", "1").out)
    assert ("ephemeral", 0) == (ephemeral["outcome"], ephemeral["receivers"])


def test_publish_too_many(run: Run, redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says how long to wait, and what to say if it is urgent; the command fails."""
    monkeypatch.setenv("NOTIFICATIONS_PER_MINUTE_PER_USER", "1")
    line = r"not published: .* too many .* in \d+\.\d s; wait so long, or say --priority"
    assert 0 == run("publish", "--user", "ann", "1").code

    alone = run("publish", "--user", "ann", "1")
    both = run("publish", "--user", "ann", "--user", "bob", "1")
    shown = run("publish", "--user", "ann", "--user", "bob", "--json", "1").out.splitlines()

    assert (1, "") == (alone.code, alone.out)
    assert re.fullmatch(rf"trioserver: {line}\n", alone.err)
    assert (1, 1) == (both.code, both.out.count("\n"))
    assert re.fullmatch(rf"user ann: {line}\n", both.err)
    ann, _ = map(json.loads, shown)
    assert ("ann", "limited") == (ann["user"], ann["outcome"])
    assert 0 < ann["retry_after"] <= 60
    assert 0 == run("publish", "--user", "ann", "--priority", "1").code
    assert 0 == run("publish", "--all", "1").code
    assert (2, 1) == (len(kept(redis, "ann")), len(kept(redis, "bob")))


def test_publish_what_does_not_fit(
    run: Run, redis: RedisServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The refusal says where and what was wanted; kept or not."""
    schemas = tmp_path / "schemas.json"
    schemas.write_text('{"order": {"properties": {"n": {"type": "integer"}}}}')
    monkeypatch.setenv("PAYLOAD_SCHEMAS", str(schemas))

    for more in ((), ("--ephemeral",)):
        ran = run("publish", "--user", "ann", "--type", "order", *more, '{"n": "hunter2"}')
        assert (1, "") == (ran.code, ran.out)
        assert ": /n is not of type integer\n" in ran.err
        assert "hunter2" not in ran.err
    assert 0 == run("publish", "--user", "ann", "--type", "order", '{"n": 2}').code
    assert 1 == len(kept(redis, "ann"))


def test_schemas_that_cannot_be_used(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is published without the check that was asked for."""
    monkeypatch.setenv("PAYLOAD_SCHEMAS", "none.json")

    ran = run("publish", "--user", "ann", "1")

    assert 4 == ran.code
    assert "PAYLOAD_SCHEMAS" in ran.err


def test_publish_to_several(run: Run, redis: RedisServer) -> None:
    """A line per user; who is refused is told beside the output, and the command fails."""
    ran = run("publish", "--user", "ann", "--user", "bob", "1")
    lines = ran.out.splitlines()
    assert 0 == ran.code
    assert ["user ann: accepted: ", "user bob: accepted: "] == [line[:20] for line in lines]

    ran = run("publish", "--user", "ann", "--user", "", "--json", "1")
    assert 1 == ran.code
    ann, nobody = map(json.loads, ran.out.splitlines())
    assert ("accepted", "refused") == (ann["outcome"], nobody["outcome"])
    assert nobody["error"].startswith("a user has 1 to 128 bytes")
    ran = run("publish", "--user", "ann", "--user", "x" * 200, "1")
    assert (1, 1) == (ran.code, len(ran.out.splitlines()))
    assert "not published: a user has" in ran.err
    assert 3 == len(kept(redis, "ann"))


def test_publish_to_everyone(run: Run, redis: RedisServer) -> None:
    """It is kept once."""
    assert run("publish", "--all", '"Hello"').out.startswith("accepted: all-")
    assert 1 == len(kept(redis, None))


def test_publish_to_topics(run: Run, redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """DURABLE_TOPICS are kept and have ids; of the others it is said whether anybody listens."""
    monkeypatch.setenv("DURABLE_TOPICS", "room.*")
    durable = run("publish", "--topic", "room.7", "--ttl", "1h", "1")
    live = run("publish", "--topic", "ticker", "--key", "acme", "1")
    both = run("publish", "--topic", "room.7", "--topic", "ticker", "--json", "2")
    wrong = run("publish", "--topic", "ticker", "--topic", "a b", "2")
    refused = run("publish", "--topic", "ticker", "--ttl", "1h", "1")

    assert durable.out.startswith("accepted: t")
    assert ", seq 1, position 1.0.0-0." in durable.out
    assert Ran(0, "published; nobody is connected to receive it\n", "") == live
    first, second = map(json.loads, both.out.splitlines())
    assert ("room.7", 2, "ticker", 0) == (
        *(first["topic"], first["seq"]),
        *(second["topic"], second["receivers"]),
    )
    assert (1, "topic ticker: published; nobody is connected to receive it\n") == (
        wrong.code,
        wrong.out,
    )
    assert wrong.err.startswith("topic a b: not published: a topic has 1 to 128")
    assert "trioserver: this cannot be published: ttl means nothing for ticker" in refused.err
    assert [b"1", b"2"] == [fields[5] for fields in kept(redis, Topic("room.7"))]
    trace = run("trace", durable.out.split()[1].rstrip(","))
    assert ", for topic room.7, seq 1\n" in trace.out


def test_publish_to_topics_as_the_server_says(run: Run, redis: RedisServer) -> None:
    """Without DURABLE_TOPICS the command goes by the server's; if it hears none, it warns."""
    unheard = run("publish", "--topic", "room.7", "1")
    ephemeral = run("publish", "--topic", "room.7", "--ephemeral", "1")
    rules = TopicRules(durable=Patterns.of(["room.*"]), max_length=1, ttl_ms=60_000)
    redis.command(*kept_topics.said(rules))
    first, last = (run("publish", "--topic", "room.7", number) for number in "23")
    live = run("publish", "--topic", "ticker", "4")

    assert "published; nobody is connected to receive it\n" == unheard.out
    assert unheard.err.startswith("trioserver: warning: no server has said which topics are dur")
    assert ["", "", "", ""] == [ran.err for ran in (ephemeral, first, last, live)]
    assert first.out.startswith("accepted: t")
    [fields] = kept(redis, Topic("room.7"))
    assert b"3" == fields[5]
    assert "published; nobody is connected to receive it\n" == live.out


def test_publish_from_standard_input(
    run: Run, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """- reads the payload from there."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO('[1,\n"ä"]'.encode())))
    assert 0 == run("publish", "--user", "ann", "-").code
    assert '[1,\n"ä"]'.encode() == kept(redis, "ann")[0][5]


def test_publish_for_who_is_connected(run: Run, redis: RedisServer) -> None:
    """--ephemeral says whether anybody listened, and keeps nothing."""
    ran = run("publish", "--user", "ann", "--ephemeral", "1")
    assert Ran(0, "published; nobody is connected to receive it\n", "") == ran
    with Caller(redis.path) as listener:
        listener.ask("SUBSCRIBE", "user_noti:ann")
        ran = run("publish", "--user", "ann", "--ephemeral", "1")
    assert Ran(0, "published; 1 worker listening\n", "") == ran
    assert 0 == redis.command("DBSIZE")


def test_publish_once(run: Run) -> None:
    """With an idempotency key the second run gets the first answer; another payload fails."""
    first = run("publish", "--user", "ann", "--idempotency-key", "k", "1")
    again = run("publish", "--user", "ann", "--idempotency-key", "k", "1")
    other = run("publish", "--user", "ann", "--idempotency-key", "k", "2")

    assert first.out.replace("accepted", "duplicate") == again.out
    assert (1, "") == (other.code, other.out)
    assert other.err.startswith("trioserver: this cannot be published: this key was used")


def test_publish_later(run: Run, redis: RedisServer) -> None:
    """A moment is relative or a date with a time zone; the answer says when."""
    ran = run("publish", "--user", "ann", "--deliver-at", "+1h", "--fallback-after", "10m", "1")
    assert ran.out.startswith("scheduled: ")
    assert ", due 20" in ran.out
    name = ran.out.split()[1].rstrip(",")
    stored = redis.command("HGETALL", ledger.notification_key(name) or "")
    assert isinstance(stored, list)
    life = dict(zip(stored[::2], stored[1::2], strict=True))
    assert 600_000 == int(life[b"fallback"]) - int(life[b"due"])

    past = run("publish", "--user", "ann", "--deliver-at", "2026-01-01T00:00:00Z", "1")
    assert past.out.startswith(("accepted: ", "scheduled: "))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["1"], "say either --user U or --topic T or --all"),
        (["--user", "a", "--topic", "b", "1"], "say either --user U or --topic T or --all"),
        (["--user", "a", "--all", "1"], "say either --user U or --topic T or --all"),
        (["--user", "a", "--ttl", "1h", "--ephemeral", "1"], "say either --ttl or --ephemeral"),
        (["--user", "a", "--ttl", "soon", "1"], '"soon" is not a duration'),
        (["--user", "a", "--ttl", "0", "1"], "is not from"),
        (["--user", "a", "--deliver-at", "+x", "1"], '"+x" is not a duration'),
        (["--user", "a", "--deliver-at", "tomorrow", "1"], "is not a moment, such as +5m"),
        (["--user", "a", "--deliver-at", "2026-11-20T18:00", "1"], "has no time zone"),
    ],
)
def test_publish_wrong_usage(
    run: Run, redis: RedisServer, arguments: list[str], problem: str
) -> None:
    """Exit code 2 and what to say instead; nothing is published."""
    ran = run("publish", *arguments)

    assert (2, "") == (ran.code, ran.out)
    assert problem in ran.err
    assert 0 == redis.command("DBSIZE")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--user", "a", "{"], "the payload is not JSON"),
        (["--user", "a", "\udcff"], "the payload is not JSON"),
        (["--user", "a", '"\udcff"'], "the payload has text that is not Unicode"),
        (["--user", "a", "--ttl", "0.5s", "1"], "ttl is less than 1 s"),
        (["--user", "", "1"], "a user has 1 to 128 bytes"),
        (["--user", "a", "--type", "goodbye", "1"], "the type goodbye is reserved"),
        (["--user", "a", "--ephemeral", "--collapse-key", "c", "1"], "collapse_key means nothing"),
        (["--user", "a", json.dumps("x" * 10_240)], "the payload is larger than 10240 bytes"),
    ],
)
def test_publish_refused(run: Run, redis: RedisServer, arguments: list[str], problem: str) -> None:
    """One line and exit code 1; nothing is published."""
    ran = run("publish", *arguments)

    assert (1, "") == (ran.code, ran.out)
    assert ran.err.startswith(f"trioserver: this cannot be published: {problem}")
    assert 1 == ran.err.count("\n")
    assert 0 == redis.command("DBSIZE")


def test_without_redis(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says what is missing, also where the server would have its own Redis."""
    monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{free_port()}")
    ran = run("publish", "--user", "ann", "1")
    assert 1 == ran.code
    assert ran.err.startswith("trioserver: whether it was published is unknown: ")
    ran = run("publish", "--user", "ann", "--user", "bob", "1")
    *lines, last = ran.err.splitlines()
    assert (1, "") == (ran.code, ran.out)
    assert ["user ann: not published: ", "user bob: not published: "] == [
        line[:25] for line in lines
    ]
    assert last.startswith("trioserver: 0 of 2 recipients are served, then: whether ")
    monkeypatch.setenv("REDIS_URL", "")
    for command in (["publish", "--user", "ann", "1"], ["why", "ann"], ["trace", "p00-x"]):
        ran = run(*command)
        assert (1, "") == (ran.code, ran.out)
        assert ran.err.startswith("trioserver: no trioserver is running with DATA_DIR ")


def published(run: Run, user: str = "ann") -> dict[str, Any]:
    """Publish to a user; return the answer."""
    return dict(json.loads(run("publish", "--user", user, "--json", "1").out))


def test_cancel(run: Run, redis: RedisServer) -> None:
    """It says what came of it, and fails if nothing did."""
    name = published(run)["id"]

    assert Ran(0, "cancelled\n", "") == run("cancel", name)
    assert [] == [fields for fields in kept(redis, "ann") if fields[0] == b"i"]
    assert Ran(1, "too late\n", "") == run("cancel", name)
    assert Ran(1, "unknown\n", "") == run("cancel", ledger.new_id("p00", 1))
    ran = run("cancel", "nonsense")
    assert (1, "") == (ran.code, ran.out)
    assert '"nonsense" is no notification\'s id' in ran.err


def test_why(run: Run, redis: RedisServer) -> None:
    """The user in a line, then a line per device."""
    with Caller(redis.path) as caller:
        caller.run(ledger.read("ann", device="phone", connect=True))
    position = published(run)["position"]
    ran = run("why", "ann")
    head, headings, phone = ran.out.splitlines()

    assert 0 == ran.code
    assert f"user ann: 1 unread, 1 kept, newest seq 1, position {position}" == head
    assert ["device", "last", "seen", "sent", "received", "acked", "outstanding"] == (
        headings.split()
    )
    assert ["phone", "0", "0", "0", "1"] == [phone.split()[0], *phone.split()[2:]]
    shown = json.loads(run("why", "ann", "--json").out)
    assert (1, "phone") == (shown["unread"], shown["devices"][0]["name"])


def test_why_of_a_stranger(run: Run) -> None:
    """Nothing is known, and the exit code says so."""
    ran = run("why", "nobody")
    assert (1, "") == (ran.code, ran.out)
    assert ran.err.startswith("trioserver: nothing is known of user nobody: ")
    ran = run("why", "nobody", "--json")
    assert (1, False) == (ran.code, json.loads(ran.out)["known"])


def test_trace(run: Run, redis: RedisServer) -> None:
    """The life of a notification, with what happened on each device."""
    accepted = published(run)
    point = accepted["position"].removeprefix("1.")
    with Caller(redis.path) as caller:
        caller.run(ledger.read("ann", device="phone", connect=True))
        caller.run(ledger.report("ann", rules=RULES, device="phone", received=point))
    ran = run("trace", accepted["id"])

    assert 0 == ran.code
    assert f"{accepted['id']}: received" == ran.out.splitlines()[0]
    assert "    phone  sent 20" in ran.out
    shown = json.loads(run("trace", accepted["id"], "--json").out)
    assert ("received", "phone") == (shown["state"], shown["devices"][0]["name"])


def test_trace_of_nothing(run: Run) -> None:
    """An id of which nothing is known, and what is no id, fail in one line."""
    unknown = run("trace", ledger.new_id("p00", 1))
    assert (1, "") == (unknown.code, unknown.out)
    assert "it was not accepted, or has expired" in unknown.err
    assert "is no notification's id" in run("trace", "x").err


@pytest.mark.parametrize("name", sorted(ledger.SCRIPTS))
def test_script(run: Run, redis: RedisServer, name: str) -> None:
    """What is printed is, byte for byte, what Redis knows under the printed SHA1."""
    text = run("script", name).out
    sha = redis.command("SCRIPT", "LOAD", text)

    assert isinstance(sha, bytes)
    assert f"{sha.decode()}\n" == run("script", name, "--sha").out
    assert ledger.SCRIPTS[name].text == text.encode()


def test_an_unknown_script(run: Run) -> None:
    """The names are listed."""
    ran = run("script", "nonsense")
    assert 2 == ran.code
    assert "'publish'" in ran.err
