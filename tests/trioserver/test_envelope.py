"""Envelopes: what the scripts really publish, and whatever else may be on a channel."""

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from tests.redis_server import RedisServer, wait_until
from tests.trioserver.ledger_calls import Caller
from trioserver import envelope, ledger, position
from trioserver.endpoint import Endpoint
from trioserver.envelope import Came, Change, Notice, Said
from trioserver.ledger import Notification, Owner, Rules, Topic
from trioserver.messages import NULL, BadPublish
from trioserver.subscription import Subscription

LIMIT = 20.0
"""Seconds after which a test is stuck."""

RULES = Rules()
DAY_MS = 86_400_000

NOTICE = [
    *("e0.1000-4096", "e0.1001-8192", 2, "p07-x", "mail", {"a": [1]}),
    *(1001 + DAY_MS, None, "eve"),
]
CHANGE = ["e0.1000-4096", "e0.1001-4097", 2, "read", ["p07-x", "p07-y"], "w0-1"]
SAID = ["w0-1", "ann", "mail", "k", {"a": [1]}, 1]
CAME = ["join", "ann", 3]


def notice(*values: object) -> bytes:
    """Return the envelope of a notification with these values."""
    return b"\x01n" + json.dumps(list(values)).encode()


def change(*values: object) -> bytes:
    """Return the envelope of an update with these values."""
    return b"\x01u" + json.dumps(list(values)).encode()


def test_a_notice_is_what_was_written() -> None:
    """Each value in its place, the payload byte by byte."""
    found = envelope.decode(
        b'\x01n["e0.0-0","e0.1-4096",7,"p07-x","mail",{"b" :\t[1.50]},9,"00-trace"]'
    )
    assert (
        Notice(
            "e0.0-0",
            "e0.1-4096",
            7,
            "p07-x",
            "mail",
            msgspec.Raw(b'{"b" :\t[1.50]}'),
            9,
            "00-trace",
        )
        == found
    )
    assert isinstance(found, Notice)
    assert b'{"b" :\t[1.50]}' == bytes(found.payload)


def test_a_change_is_what_was_written() -> None:
    """Each value in its place."""
    assert Change("e0.1000-4096", "e0.1001-4097", 2, "read", ["p07-x", "p07-y"], "w0-1") == (
        envelope.decode(change(*CHANGE))
    )


def said(*values: object) -> bytes:
    """Return the envelope of what a client has said, with these values."""
    return b"\x01t" + json.dumps(list(values)).encode()


def came(*values: object) -> bytes:
    """Return the envelope of somebody's coming, with these values."""
    return b"\x01p" + json.dumps(list(values)).encode()


@pytest.mark.parametrize(
    "one",
    [
        Said("w0-1", "ann", "mail", "k", msgspec.Raw(b'{"b" :[1.50]}'), 1),
        Said("", "", "brève", None, msgspec.Raw('"値 🙂"'.encode()), 0),
    ],
)
def test_what_a_client_says_is_what_another_hears(one: Said) -> None:
    """Each value comes out as it went in, the payload byte by byte."""
    data = envelope.said(
        bytes(one.payload),
        type=one.type,
        connection=one.connection,
        user=one.user,
        key=one.key,
        exclude=one.exclude == 1,
    )
    found = envelope.decode(data)

    assert data.startswith(b"\x01t[")
    assert isinstance(found, Said)
    assert one == msgspec.structs.replace(found, payload=one.payload)
    assert bytes(one.payload) == bytes(found.payload)


def test_who_came_is_what_was_written() -> None:
    """Each value in its place."""
    assert Came("join", "ann", 3) == envelope.decode(came(*CAME))


def test_what_is_optional_may_be_missing_and_what_is_new_is_ignored() -> None:
    """Scripts of the next release may say more, those of the last may have said less."""
    for values, data in ((NOTICE, notice), (CHANGE, change), (SAID, said), (CAME, came)):
        assert envelope.decode(data(*values)) == envelope.decode(data(*values, {"new": [1]}, 2))
    assert envelope.decode(notice(*NOTICE[:-1])) == envelope.decode(notice(*NOTICE[:-2]))
    found = envelope.decode(change(*CHANGE[:-1]))
    assert isinstance(found, Change)
    assert "" == found.by


def test_envelopes_are_told_apart_from_raw_publications_by_their_first_byte() -> None:
    """JSON cannot begin with it, so nobody is both."""
    for ours in (notice(*NOTICE), change(*CHANGE), said(*SAID), came(*CAME)):
        assert ours.startswith(envelope.VERSION)
    for raw in (b"", b'{"payload":1}', b" {}", b"\x02n[]", b"n[]", b"\xef\xbb\xbf{}"):
        assert not raw.startswith(envelope.VERSION)
    with pytest.raises(json.JSONDecodeError):
        json.loads(envelope.VERSION)


BAD: dict[str, bytes] = {
    "nothing": b"",
    "no letter": b"\x01",
    "another letter": b"\x01x" + json.dumps(NOTICE).encode(),
    "another version": b"\x02n" + json.dumps(NOTICE).encode(),
    "a raw publication": b'{"payload":1}',
    "no array": b"\x01n",
    "an object": b'\x01n{"previous":"e0.0-0"}',
    "half": notice(*NOTICE)[:-1],
    "two": notice(*NOTICE) + b"[]",
    "a notice as something said": b"\x01t" + json.dumps(NOTICE).encode(),
    "something said too short": said(*SAID[:4]),
    "something said of a wrong type": said(1, *SAID[1:]),
    "something said whose payload is no JSON": said(*SAID).replace(b'{"a": [1]}', b"007"),
    "something said that is not UTF-8 and no JSON": said(*SAID).replace(b'{"a": [1]}', b'"\xff'),
    "a coming as something said": b"\x01t" + json.dumps(CAME).encode(),
    "a coming without a count": came(*CAME[:2]),
    "too short": notice(*NOTICE[:6]),
    "an update too short": change(*CHANGE[:4]),
    "a notice as an update": b"\x01u" + json.dumps(NOTICE).encode(),
    "an update as a notice": b"\x01n" + json.dumps(CHANGE).encode(),
    "points of a wrong type": notice(1, 2, *NOTICE[2:]),
    "unread of a wrong type": notice(*NOTICE[:2], "2", *NOTICE[3:]),
    "unread that is no whole number": notice(*NOTICE[:2], 1.5, *NOTICE[3:]),
    "ids of a wrong type": change(*CHANGE[:4], "p07-x"),
    "an id of a wrong type": change(*CHANGE[:4], [1]),
    "a payload that is no JSON": notice(*NOTICE).replace(b'{"a": [1]}', b"{1:2}"),
    "a payload with a number that is none": notice(*NOTICE).replace(b'{"a": [1]}', b"007"),
    "no payload": notice(*NOTICE).replace(b'{"a": [1]}', b""),
    "a payload of brackets": notice(*NOTICE).replace(
        b'{"a": [1]}', b"[" * 200_000 + b"]" * 200_000
    ),
    "brackets without end": b"\x01n" + b"[" * 200_000,
    "a state that is not UTF-8": change(*CHANGE).replace(b"read", b"re\xff"),
    "not UTF-8 and no JSON": notice(*NOTICE).replace(b'{"a": [1]}', b'"\xff'),
    "a point that is none": notice("e0.1000-4096", "e0.garbage", *NOTICE[2:]),
    "an empty point": notice("e0.1000-4096", "", *NOTICE[2:]),
    "an update whose point is none": change("e0.1000-4096", "e0.1000-x", *CHANGE[2:]),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_envelope_of_this_version_is_refused(name: str) -> None:
    """With a reason that is short, whatever was in it."""
    with pytest.raises(BadPublish) as caught:
        envelope.decode(BAD[name])
    assert 0 < len(str(caught.value)) < 200


@given(
    st.binary()
    | st.tuples(st.sampled_from([b"\x01n", b"\x01u", b"\x01t", b"\x01p"]), st.binary()).map(
        b"".join
    )
    | st.tuples(
        st.sampled_from([notice(*NOTICE), change(*CHANGE), said(*SAID), came(*CAME)]), st.data()
    ).map(lambda drawn: damaged(*drawn))
)
def test_any_bytes_are_refused_or_understood(data: bytes) -> None:
    """Nothing else is raised; what is understood can be placed, and sent as UTF-8."""
    try:
        found = envelope.decode(data)
    except BadPublish:
        return
    if isinstance(found, Notice | Change):
        milliseconds, number = position.order(found.point)
        assert milliseconds >= 0
        assert number >= 0
    if isinstance(found, Notice | Said):
        json.loads(bytes(found.payload).decode(), parse_constant=pytest.fail)
        found.type.encode()


def damaged(data: bytes, draw: st.DataObject) -> bytes:
    """Return ``data`` with a few bytes replaced."""
    found = bytearray(data)
    places = st.integers(0, len(data) - 1)
    for place, byte in draw.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=3)):
        found[place] = byte
    return bytes(found)


@pytest.mark.parametrize("bad", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\xaf", b"a\xf8\x88\x80"])
def test_a_payload_that_is_not_utf8_is_left_out(bad: bytes) -> None:
    """The rest is good, and clients must hear of the notification; such a frame would end them."""
    data = notice(*NOTICE).replace(b'{"a": [1]}', b'{"a": "' + bad + b'"}')
    found = envelope.decode(data)
    assert isinstance(found, Notice)
    assert NULL == found.payload
    assert NOTICE[:5] == [found.previous, found.point, found.unread, found.id, found.type]
    assert (NOTICE[6], NOTICE[7]) == (found.expires, found.traceparent)
    heard = envelope.decode(said(*SAID).replace(b'{"a": [1]}', b'{"a": "' + bad + b'"}'))
    assert Said("w0-1", "ann", "mail", "k", NULL, 1) == heard


def test_characters_beyond_ascii_survive() -> None:
    """Escaped or not, in everything that is text."""
    values = [*NOTICE[:4], "brève", {"ключ": "値 🙂"}, 9, None]
    for ascii_only in (True, False):
        found = envelope.decode(b"\x01n" + json.dumps(values, ensure_ascii=ascii_only).encode())
        assert isinstance(found, Notice)
        assert "brève" == found.type
        assert {"ключ": "値 🙂"} == json.loads(bytes(found.payload))


# What the scripts say.


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


class Listening:
    """Hears what is published to some users, as a worker does."""

    def __init__(self, redis: RedisServer, *channels: bytes) -> None:
        self.data: list[bytes] = []
        self.channels: list[bytes] = []
        self._subscription = Subscription(
            Endpoint(path=str(redis.path)), self._hear, lambda: None, client_name="listening"
        )
        self._wanted = channels

    def _hear(self, channel: bytes, data: bytes) -> None:
        self.channels.append(channel)
        self.data.append(data)

    async def begin(self, nursery: trio.Nursery) -> None:
        """Return when everything that is published from now on arrives."""
        nursery.start_soon(self._subscription.run)
        for channel in self._wanted:
            batch = self._subscription.follow(channel)
            if batch is not None:
                await batch.wait()

    async def heard(self, count: int) -> list[envelope.Entry]:
        """Return the entries, as soon as there are so many."""
        await wait_until(lambda: len(self.data) >= count)
        assert count == len(self.data)
        found = [envelope.decode(data) for data in self.data]
        entries = [one for one in found if isinstance(one, Notice | Change)]
        assert count == len(entries)
        return entries


def publish(caller: Caller, user: Owner, payload: bytes, **more: str | None) -> str:
    """Publish; return the id."""
    home = ledger.partition(user)
    one = Notification(
        user=user,
        payload=payload,
        ttl_ms=DAY_MS,
        id=ledger.new_id(home, caller.now()),
        type=more.pop("type", None) or "notification",
        **more,  # type: ignore[arg-type]
    )
    return ledger.accepted(caller.run(ledger.publish(one, rules=RULES))).id


PAYLOADS = [
    b"null",
    b"0",
    b'"text"',
    b'{"a":[1,2.5,-1e3,true,null,{"b":""}]}',
    b' {\t"spaces" :\r\n[ ] } ',
    '{"ключ":"値 🙂 \\u00e9 \\ud83d\\ude42 \\" \\\\ \\/"}'.encode(),
    b'"\x7f"',
    b"9007199254740993",
    b"[" + b",".join([b'"' + b"x" * 98 + b'"'] * 100) + b"]",
]
TYPES = ["notification", "order.shipped", "brève nouvelle", 'quo"ted', "back\\slash", "tab\there"]
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


CHANNELS: dict[Owner, str] = {
    "ann": "user_noti:ann",
    "jürgen müller": "user_noti:jürgen müller",
    "a%b:c{d}": "user_noti:a%b:c{d}",
    None: "channels:broadcast",
    Topic("a:b/c~d"): "topic:a:b/c~d",
}


@pytest.mark.parametrize("user", CHANNELS)
async def test_what_the_script_publishes_is_understood(redis: RedisServer, user: Owner) -> None:
    """Every payload, type and trace context; each entry names the one before it."""
    channel = CHANNELS[user].encode()
    with trio.fail_after(LIMIT), Caller(redis.path) as caller:
        async with trio.open_nursery() as nursery:
            listening = Listening(redis, channel)
            await listening.begin(nursery)
            now = caller.now()
            ids = [publish(caller, user, payload) for payload in PAYLOADS]
            ids += [publish(caller, user, b"1", type=kind) for kind in TYPES]
            ids.append(publish(caller, user, b"1", traceparent=TRACE))
            found = await listening.heard(len(ids))
            nursery.cancel_scope.cancel()
    assert {channel} == set(listening.channels)
    notices = [one for one in found if isinstance(one, Notice)]
    assert ids == [one.id for one in notices]
    payloads = [bytes(one.payload) for one in notices]
    assert [payload.strip() for payload in PAYLOADS] == [
        payload.strip() for payload in payloads[: len(PAYLOADS)]
    ]
    assert TYPES == [one.type for one in notices[len(PAYLOADS) : -1]]
    assert [None] * (len(ids) - 1) + [TRACE] == [one.traceparent for one in notices]
    counts = list(range(1, len(ids) + 1))
    assert counts == [position.seq_of(one.point) for one in notices]
    unread = counts if isinstance(user, str) else [0] * len(ids)
    assert unread == [one.unread for one in notices]
    epoch = position.epoch_of(notices[0].point)
    points = [f"{epoch}.0-0", *[one.point for one in notices]]
    assert points[:-1] == [one.previous for one in notices]
    assert all(now + DAY_MS <= one.expires < now + DAY_MS + LIMIT * 1000 for one in notices)


async def test_the_sender_is_understood(redis: RedisServer) -> None:
    """Who has published to a topic, also if the name is an odd one; None if nobody is said."""
    senders = ["ann", 'quo"ted', "back\\slash", "жук", "tab\there", None]
    with trio.fail_after(LIMIT), Caller(redis.path) as caller:
        async with trio.open_nursery() as nursery:
            listening = Listening(redis, b"topic:room")
            await listening.begin(nursery)
            for sender in senders:
                publish(caller, Topic("room"), b"1", sender=sender)
            found = await listening.heard(len(senders))
            nursery.cancel_scope.cancel()
    assert senders == [one.sender for one in found if isinstance(one, Notice)]


async def test_updates_are_understood(redis: RedisServer) -> None:
    """Read by somebody, and withdrawn; they are entries of the same chain."""
    by = 'w0-"1'
    with trio.fail_after(LIMIT), Caller(redis.path) as caller:
        async with trio.open_nursery() as nursery:
            listening = Listening(redis, b"user_noti:ann")
            await listening.begin(nursery)
            ids = [publish(caller, "ann", b"1") for _ in range(3)]
            caller.run(ledger.mark("ann", device="phone", by=by, ids=ids[:2], rules=RULES))
            caller.run(ledger.cancel("ann", ids[2], rules=RULES))
            caller.run(ledger.mark("ann", device="phone", by="", ids=ids, rules=RULES))
            found = await listening.heard(5)
            nursery.cancel_scope.cancel()
    read, cancelled = found[3:]
    assert isinstance(read, Change)
    assert isinstance(cancelled, Change)
    assert ("read", ids[:2], by, 1) == (read.state, read.ids, read.by, read.unread)
    assert ("cancelled", [ids[2]], "", 0) == (
        cancelled.state,
        cancelled.ids,
        cancelled.by,
        cancelled.unread,
    )
    assert [one.point for one in found[:-1]] == [one.previous for one in found[1:]]
    assert [1, 2, 3, 3, 3] == [position.seq_of(one.point) for one in found]
    assert sorted(found, key=lambda one: position.order(one.point)) == found
