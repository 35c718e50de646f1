"""The messages: what is understood, what is refused, and what cannot be forged."""

import datetime as dt
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioserver import messages
from trioserver.errors import ClientError
from trioserver.ledger import MAX_MARKED
from trioserver.messages import BadPublish, notification, publication

refs = st.none() | st.text(st.characters(codec="utf-8"), max_size=64)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=10,
)
raws = json_values.map(lambda value: msgspec.Raw(json.dumps(value).encode()))
devices = st.none() | st.from_regex(r"\A[!-~]{1,64}\Z")
positions = st.none() | st.text(st.characters(codec="utf-8"), max_size=messages.MAX_POSITION)
ids = st.from_regex(r"\A[a-z0-9-]{1,64}\Z")
seqs = st.integers(1, 1 << 40)
client_messages = st.one_of(
    st.builds(
        messages.Auth,
        st.text(st.characters(codec="utf-8")),
        devices,
        positions,
        st.booleans(),
        st.none() | st.from_regex(r"\A[A-Za-z0-9._-]{1,32}\Z"),
        refs,
    ),
    st.builds(messages.Refresh, st.text(st.characters(codec="utf-8")), refs),
    st.builds(messages.Message, raws, refs),
    st.builds(messages.Ping, refs),
    st.builds(messages.Ack, st.none() | seqs, st.none() | ids, refs),
    st.builds(
        messages.Read,
        st.lists(ids, max_size=MAX_MARKED),
        st.none() | seqs | ids,
        refs,
    ),
)


@given(client_messages)
def test_decode_undoes_encode(message: messages.ClientMessage) -> None:
    """Each type of message survives the way over the wire."""
    again = messages.decode(messages.encode(message))
    assert type(message) is type(again)
    assert messages.encode(message) == messages.encode(again)


@given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
def test_decoding_raises_nothing_but_a_client_error(data: bytes) -> None:
    """Whatever the bytes."""
    code = "none"
    try:
        messages.decode(data)
    except ClientError as error:
        code = error.code
    assert code in {"none", "bad_json", "bad_message", "unknown_type"}


BOMBS: dict[str, tuple[bytes, str | None]] = {
    "nothing": (b"", "bad_json"),
    "text": (b"hello", "bad_json"),
    "list": (b'[{"type":"ping"}]', "bad_json"),
    "string": (b'"ping"', "bad_json"),
    "number": (b"1", "bad_json"),
    "null": (b"null", "bad_json"),
    "half": (b'{"type":"ping"', "bad_json"),
    "two": (b'{"type":"ping"}{"type":"ping"}', "bad_json"),
    "NaN": (b'{"type":"message","payload":NaN}', "bad_json"),
    "nesting": (b'{"type":"message","payload":' + b"[" * 200_000 + b"]" * 200_000 + b"}", None),
    "nesting in an unknown field": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", None),
    "nesting without end": (b"[" * 200_000, "bad_json"),
    "NUL": (b'{"type":"ping"\0}', "bad_json"),
    "lone surrogate": (b'{"type":"ping","ref":"\\ud800"}', "bad_json"),
    "invalid UTF-8 in ref": (b'{"type":"ping","ref":"\xff"}', None),
    "invalid UTF-8 in type": (b'{"type":"\xff"}', None),
    "invalid UTF-8 in the ref of the unknown": (b'{"type":"?","ref":"\xff"}', None),
    "no type": (b'{"payload":1}', "bad_message"),
    "empty": (b"{}", "bad_message"),
    "type of a wrong type": (b'{"type":1}', "bad_message"),
    "type null": (b'{"type":null}', "bad_message"),
    "unknown": (b'{"type":"nope","ref":"r"}', "unknown_type"),
    "a type of the server": (b'{"type":"goodbye"}', "unknown_type"),
    "case": (b'{"type":"Ping"}', "unknown_type"),
    "auth without a token": (b'{"type":"auth"}', "bad_message"),
    "token of a wrong type": (b'{"type":"auth","token":1}', "bad_message"),
    "ref of a wrong type": (b'{"type":"ping","ref":1}', "bad_message"),
    "ref too long": (b'{"type":"ping","ref":"%b"}' % (b"x" * 65), "bad_message"),
    "device empty": (b'{"type":"auth","token":"t","device":""}', "bad_message"),
    "device too long": (
        b'{"type":"auth","token":"t","device":"%b"}' % (b"x" * 65),
        "bad_message",
    ),
    "device with a space": (b'{"type":"auth","token":"t","device":"a b"}', "bad_message"),
    "device with a line break": (b'{"type":"auth","token":"t","device":"a\\n"}', "bad_message"),
    "device of a wrong type": (b'{"type":"auth","token":"t","device":1}', "bad_message"),
    "position too long": (
        b'{"type":"auth","token":"t","position":"%b"}' % (b"x" * 257),
        "bad_message",
    ),
    "position of a wrong type": (b'{"type":"auth","token":"t","position":[]}', "bad_message"),
    "a number for a truth": (b'{"type":"auth","token":"t","ack":1}', "bad_message"),
    "null for a truth": (b'{"type":"auth","token":"t","ack":null}', "bad_message"),
    "seq 0": (b'{"type":"ack","seq":0}', "bad_message"),
    "seq negative": (b'{"type":"ack","seq":-1}', "bad_message"),
    "seq too large": (b'{"type":"ack","seq":1099511627777}', "bad_message"),
    "seq beyond all": (b'{"type":"ack","seq":%b}' % (b"9" * 5000), "bad_message"),
    "seq no whole number": (b'{"type":"ack","seq":1.5}', "bad_message"),
    "seq as text": (b'{"type":"ack","seq":"1"}', "bad_message"),
    "seq a truth": (b'{"type":"ack","seq":true}', "bad_message"),
    "id empty": (b'{"type":"ack","id":""}', "bad_message"),
    "id too long": (b'{"type":"ack","id":"%b"}' % (b"x" * 65), "bad_message"),
    "id with other characters": (b'{"type":"ack","id":"p07*"}', "bad_message"),
    "id with a space": (b'{"type":"read","ids":["a b"]}', "bad_message"),
    "id with a line break": (b'{"type":"read","ids":["a\\n"]}', "bad_message"),
    "id in ack with a line break": (b'{"type":"ack","id":"a\\n"}', "bad_message"),
    "up_to with a line break": (b'{"type":"read","up_to":"a\\n"}', "bad_message"),
    "id of a wrong type": (b'{"type":"read","ids":[1]}', "bad_message"),
    "ids null": (b'{"type":"read","ids":null}', "bad_message"),
    "ids no list": (b'{"type":"read","ids":"a"}', "bad_message"),
    "too many ids": (
        b'{"type":"read","ids":[%b]}' % b",".join([b'"a"'] * 101),
        "bad_message",
    ),
    "up_to 0": (b'{"type":"read","up_to":0}', "bad_message"),
    "up_to of a wrong type": (b'{"type":"read","up_to":[1]}', "bad_message"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bad_messages_have_their_code(bomb: str) -> None:
    """Each wrong message is told apart, and none does more."""
    data, code = BOMBS[bomb]
    with pytest.raises(ClientError) as caught:
        messages.decode(data)
    assert code in {caught.value.code, None}
    if bomb == "unknown":
        assert "r" == caught.value.ref
    assert len(messages.encode(messages.Error(caught.value.code, caught.value.message))) < 1000


RIGHT: dict[str, bytes] = {
    "unknown fields": b'{"type":"ping","position":"x","ack":{"deep":[1]}}',
    "a huge integer": b'{"type":"message","payload":' + b"9" * 10_000 + b"}",
    "past the largest float": b'{"type":"message","payload":1e999}',
    "many keys": b'{"type":"message","payload":{%b}}'
    % b",".join(b'"k%d":0' % i for i in range(100_000)),
    "spaces": b' \n\t{ "type" : "message" } ',
    "no payload": b'{"type":"message"}',
    "type last": b'{"payload":1,"type":"message"}',
    "escaped": b'{"\\u0074ype":"message"}',
    "escaped NUL": b'{"type":"ping","ref":"\\u0000"}',
    "ref of 64": b'{"type":"ping","ref":"%b"}' % (b"x" * 64),
    "auth with everything": b'{"type":"auth","token":"t","device":"%b","position":"%b","ack":true}'
    % (b"~" * 64, b"x" * 256),
    "auth with nulls": b'{"type":"auth","token":"t","device":null,"position":null,"ref":null}',
    "an empty position": b'{"type":"auth","token":"t","position":""}',
    "the largest seq": b'{"type":"ack","seq":1099511627776}',
    "a hundred ids": b'{"type":"read","ids":[%b]}' % b",".join([b'"a"'] * 100),
    "an id of 64": b'{"type":"ack","id":"%b"}' % (b"x" * 64),
    "up_to a seq": b'{"type":"read","up_to":5}',
    "up_to an id": b'{"type":"read","up_to":"p07-0192f0c4"}',
}


@pytest.mark.parametrize("name", RIGHT)
def test_odd_messages_that_are_right(name: str) -> None:
    """Unknown fields and strange but valid JSON are no errors."""
    messages.decode(RIGHT[name])


def test_defaults_of_what_clients_may_leave_out() -> None:
    """A client that knows only the first release says no more than it did."""
    assert messages.Auth("t", None, None, False, None) == messages.decode(
        b'{"type":"auth","token":"t"}'
    )
    assert messages.Ack(None, None, None) == messages.decode(b'{"type":"ack"}')
    assert messages.Read([], None, None) == messages.decode(b'{"type":"read"}')


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            messages.Durable(
                "mail", "p07-x", 3, msgspec.Raw(b'{"a": 1}'), "T", "1.e0.1-12288", 1, 0
            ),
            {
                "type": "mail",
                "id": "p07-x",
                "seq": 3,
                "payload": {"a": 1},
                "timestamp": "T",
                "position": "1.e0.1-12288",
                "attempt": 1,
                "unread": 0,
            },
        ),
        (
            messages.Durable("mail", "all-x", 3, messages.NULL, "T", "p", 2, None, "all", "00-1"),
            {
                "type": "mail",
                "id": "all-x",
                "seq": 3,
                "payload": None,
                "timestamp": "T",
                "position": "p",
                "attempt": 2,
                "stream": "all",
                "traceparent": "00-1",
            },
        ),
        (
            messages.Gap(from_seq=0, to_seq=0, missing=0, reason="epoch"),
            {"type": "gap", "from_seq": 0, "to_seq": 0, "missing": 0, "reason": "epoch"},
        ),
        (
            messages.Gap(from_seq=1, to_seq=9, missing=8, reason="trimmed", stream="all"),
            {
                "type": "gap",
                "from_seq": 1,
                "to_seq": 9,
                "missing": 8,
                "reason": "trimmed",
                "stream": "all",
            },
        ),
        (
            messages.Update("p07-x", "read", "p", 0),
            {"type": "update", "id": "p07-x", "state": "read", "position": "p", "unread": 0},
        ),
        (
            messages.Update("all-x", "expired", "p", None, "all"),
            {"type": "update", "id": "all-x", "state": "expired", "position": "p", "stream": "all"},
        ),
        (messages.Acked(0, "r"), {"type": "ack", "seq": 0, "ref": "r"}),
        (messages.Marked(0, "r"), {"type": "read", "unread": 0, "ref": "r"}),
    ],
)
def test_what_the_ledger_says_on_the_wire(
    message: msgspec.Struct, expected: dict[str, object]
) -> None:
    """A zero is said, what does not apply is left out."""
    assert expected == json.loads(messages.encode(message))


# Stored payloads.


@given(raws)
def test_a_good_payload_goes_out_as_it_is(payload: msgspec.Raw) -> None:
    """Byte by byte."""
    assert bytes(payload) == bytes(messages.checked(bytes(payload)))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b" ",
        b"hello",
        b"{",
        b'{"a":1}{',
        b'"\xff"',
        b'{"a":"\xed\xa0\x80"}',
        b'"\xc3"',
        b"NaN",
        b"007",
        b'"\x01"',
        b'"\\ud800"',
        b"[" * 200_000 + b"]" * 200_000,
        b"\xef\xbb\xbf1",
    ],
)
def test_a_bad_payload_becomes_null(payload: bytes) -> None:
    """Someone else's script may have stored anything; a frame must be JSON in UTF-8."""
    assert messages.NULL == messages.checked(payload)


@given(st.binary())
def test_any_stored_bytes_become_json(payload: bytes) -> None:
    """Whatever was stored, the frame around it can be parsed."""
    durable = messages.Durable("mail", "p07-x", 1, messages.checked(payload), "T", "p", 1)
    json.loads(messages.encode(durable).decode(), parse_constant=pytest.fail)


# Raw publications.


def published(data: bytes, limit: int = 0) -> dict[str, object]:
    """Return what clients get for a raw publication."""
    found = json.loads(notification(publication(data, limit), "2026-11-20T06:19:42.000Z"))
    assert isinstance(found, dict)
    return found


def test_a_raw_publication_keeps_its_type_and_payload_and_nothing_else() -> None:
    """Nobody can forge an id, a seq or a position."""
    forged = {"id": "p07-x", "seq": 9, "position": "p", "timestamp": "1970", "unread": 3}
    data = {"type": "mail", "payload": {"a": [1]}, **forged}
    assert {
        "type": "mail",
        "payload": {"a": [1]},
        "timestamp": "2026-11-20T06:19:42.000Z",
    } == published(json.dumps(data).encode())
    assert "notification" == published(b'{"payload":null}')["type"]


@pytest.mark.parametrize("kind", sorted(messages.RESERVED_TYPES))
def test_reserved_types_cannot_be_published(kind: str) -> None:
    """Nobody can speak as the server, or as a client."""
    for data in (
        json.dumps({"type": kind, "payload": 1}).encode(),
        json.dumps({"type": kind, "payload": 1}).encode().replace(b'"t', b'"\\u0074', 1),
        b'{"type":"mail","payload":1,"type":"%b"}' % kind.encode(),
    ):
        with pytest.raises(BadPublish, match="reserved"):
            published(data)


def test_every_type_of_ours_is_reserved() -> None:
    """A new message type cannot be forgotten in the list."""
    ours = {
        str(kind.__struct_config__.tag)
        for kind in vars(messages).values()
        if isinstance(kind, type)
        and issubclass(kind, msgspec.Struct)
        and kind.__struct_config__.tag is not None
    }
    assert "connection_established" in ours
    assert ours <= messages.RESERVED_TYPES


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"1",
        b"[]",
        b"{}",
        b'{"type":"mail"}',
        b'{"type":1,"payload":1}',
        b'{"type":null,"payload":1}',
        b'{"type":"","payload":1}',
        b'{"type":"%b","payload":1}' % (b"x" * 65),
        b'{"payload":"\xff"}',
        b'{"payload":1,"extra":"\xff"}',
        b'{"payload":1} trailing',
        b'\xef\xbb\xbf{"payload":1}',
        b'{"payload":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"payload":"\x01"}',
        b'{"payload":"a\nb"}',
        b'{"payload":"\\q"}',
        b'{"payload":01}',
        b'{"payload":NaN}',
        b'{"payload":[1,]}',
        b"\x01ledger envelope",
    ],
)
def test_malformed_publications_are_refused(data: bytes) -> None:
    """What clients could not parse never reaches them, and the reason does not repeat it."""
    with pytest.raises(BadPublish) as caught:
        published(data)
    assert len(str(caught.value)) < 200


@given(st.binary() | st.binary().map(lambda data: b'{"payload":' + data + b"}"))
def test_what_is_accepted_is_json_in_utf8(data: bytes) -> None:
    """Any bytes are refused with BadPublish or become a frame that every client can parse."""
    try:
        frame = notification(publication(data, 0), "T")
    except BadPublish:
        return
    json.loads(frame.decode(), parse_constant=pytest.fail)


@given(json_values)
def test_payloads_arrive_unchanged(payload: object) -> None:
    """Any JSON value is a payload."""
    for ascii_only in (True, False):
        data = json.dumps({"payload": payload}, ensure_ascii=ascii_only).encode()
        assert payload == published(data)["payload"]


def test_the_size_of_a_payload_is_limited() -> None:
    """The limit counts the payload's own bytes; none is no limit."""
    data = b'{"type":"mail","payload":"%b"}' % (b"x" * 98)
    assert "x" * 98 == published(data, 100)["payload"]
    with pytest.raises(BadPublish, match="larger"):
        published(data, 99)
    assert published(data, 0)


def test_raw_publish_makes_what_is_understood() -> None:
    """The command line and the workers agree."""
    assert {"a": 1} == published(messages.raw_publish("mail", b'{"a": 1}'))["payload"]
    for payload in (b"", b"{", b"\xff", b'"\xff"', b"NaN", b"[" * 100_000):
        with pytest.raises(BadPublish):
            messages.raw_publish("mail", payload)


@pytest.mark.parametrize("level", [(b"[", b"]"), (b'{"a":', b"}"), (b' [ "]", ', b"]")])
@pytest.mark.parametrize("depth", [1, messages.MAX_DEPTH, messages.MAX_DEPTH + 1, 900])
def test_how_deep_a_payload_is(level: tuple[bytes, bytes], depth: int) -> None:
    """Whatever it is nested of: exactly so many levels may be."""
    opens, closes = level
    payload = opens * depth + b"1" + closes * depth
    assert (depth > messages.MAX_DEPTH) is messages.is_too_deep(msgspec.Raw(payload))


@pytest.mark.parametrize(
    "payload",
    [
        b'"' + b"[" * 2000 + b'"',
        b'"' + b'\\"[' * 2000 + b'"',
        b'{"\\\\":"' + b"{" * 2000 + b'"}',
        b"[" + b",".join([b"[[]]"] * 1000) + b"]",
    ],
)
def test_what_only_looks_deep(payload: bytes) -> None:
    """Brackets in text, and many beside each other, are no levels."""
    msgspec.json.decode(payload)
    assert not messages.is_too_deep(msgspec.Raw(payload))


# Times.


@given(st.datetimes(dt.datetime(1970, 1, 1), dt.datetime(9999, 1, 1)))  # noqa: DTZ001
def test_moments_are_rfc_3339_with_milliseconds(moment: dt.datetime) -> None:
    """What is written is read back to the millisecond, in UTC."""
    aware = moment.replace(tzinfo=dt.UTC)
    # In whole numbers: timestamp() is a float, which rounds in the far future.
    seconds = (
        aware.replace(microsecond=0) - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    ).total_seconds()
    milliseconds = int(seconds) * 1000 + moment.microsecond // 1000
    written = messages.rfc3339(milliseconds)
    assert 24 == len(written)
    assert written.endswith("Z")
    assert aware.replace(
        microsecond=moment.microsecond // 1000 * 1000
    ) == dt.datetime.fromisoformat(written)
