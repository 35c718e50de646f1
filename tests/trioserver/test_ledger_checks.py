"""What cannot be published is refused before anything is written; all JSON can."""

import pytest

from tests.trioserver.ledger_stage import (
    ANN,
    PAYLOAD,
    TRACE,
    Stage,
    new_id,
)
from trioserver import ledger, messages
from trioserver.ledger import DAY_MS, Rules

# --- what is refused


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("id", "x"), ("id", "p00-01932d3c-1c00-7abc-8def-0123456789ab"), ("id", "")),
        *(("payload", b"{"), ("payload", b""), ("payload", b"1 2"), ("payload", b"{'a':1}")),
        *(("payload", b"NaN"), ("payload", b"[Infinity]"), ("payload", b"-nan")),
        *(("payload", b"0x10"), ("payload", b"[007]"), ("payload", b"[-01]"), ("payload", b"1.")),
        *(("payload", b"[.5]"), ("payload", b"+1"), ("payload", b"[1e]"), ("payload", b"[1.e5]")),
        *(("payload", b'"a\nb"'), ("payload", b'["x\\"\t"]'), ("payload", b'"\x00"')),
        *(("payload", b'"\xff"'), ("payload", b'"\xc0\xaf"'), ("payload", b'"\xed\xa0\x80"')),
        *(("payload", b'"\xf4\x90\x80\x80"'), ("payload", b'"\xe2\x82"'), ("payload", b'"\x80"')),
        *(("payload", b"[" * 1001 + b"]" * 1001), ("payload", b'"' + b"x" * 10_239 + b'"')),
        *(("type", ""), ("type", "x" * 65), ("type", b"\xff"), ("type", "gap")),
        *(("ttl", 999), ("ttl", 30 * DAY_MS + 1), ("ttl", "1e5"), ("ttl", "-5"), ("ttl", "")),
        *(("channel", ""), ("channel", "x" * 1025), ("traceparent", TRACE[:-1])),
        *(("traceparent", ""), ("traceparent", "x" * 55)),
        *(("idempotency_key", ""), ("idempotency_key", "x" * 129), ("idempotency_ttl", 0)),
        *(("collapse_key", ""), ("collapse_key", "x" * 129), ("fallback_after", 0)),
        *(("fallback_after", 31 * DAY_MS), ("deliver_at", 99_999_999_999_999)),
        *(("deliver_at", "now"), ("max", 0), ("events", "-1"), ("max_size", "big")),
        *(("rate", "-1"), ("rate", "many"), ("rate", 10**10), ("priority", 2), ("priority", "yes")),
        *(("user", "bob"), ("ID", "x")),
    ],
)
def test_a_bad_request_has_no_effect(stage: Stage, name: str, value: str | bytes | int) -> None:
    """What cannot be published as asked is refused before anything is written."""
    stage.due()
    request: dict[str, str | bytes | int] = {"id": new_id(ANN), "payload": PAYLOAD}
    request[name] = value
    arguments = [part for pair in request.items() for part in pair]

    with pytest.raises(RuntimeError, match=r"^BADREQUEST "):
        stage.raw("publish", ledger.key("meta", ANN), *arguments)
    assert stage.names() == []


@pytest.mark.parametrize(
    "payload",
    [
        *(
            b"1",
            b"-0.5e+10",
            b"[0,-0,1E9,1.05]",
            b"null",
            b'""',
            b"[true,false,{}]",
            b' {"a" : []} ',
        ),
        *(b'{\n\t"a": 1,\r\n"b": "x"}', b'"\\n\\"\\\\"', b'"\\u0000 nan 0x10 007"', b'"a\x7f"'),
        *('"äß€😀한국\u2028\U0010ffff\ud7ff\ue000"'.encode(), b'["\\\\", "\\\\\\""]', b"[1,2 , 3]"),
        b'"' + b"x" * 10_238 + b'"',
    ],
)
def test_all_json_is_accepted(stage: Stage, payload: bytes) -> None:
    """A payload is any JSON, and comes out as it went in."""
    stage.publish(payload=payload)

    [notice] = stage.read().notices
    assert payload == notice.payload


def test_reserved_types_are_refused(stage: Stage) -> None:
    """Nobody can publish what looks as if the server or a client had said it."""
    for kind in messages.RESERVED_TYPES:
        with pytest.raises(RuntimeError, match=rf"^BADREQUEST the type {kind} is reserved"):
            stage.publish(type=kind)
    for kind in ("notification", "gaps", "gap ", "a" * 64, "ping.pong", "Gap", "읽기"):
        stage.publish(type=kind)


def test_a_payload_may_be_as_large_as_the_operator_allows(stage: Stage) -> None:
    """The limit is in bytes; 0 is none."""
    stage.rules = Rules(max_payload=3)
    stage.publish(payload=b"123")
    with pytest.raises(RuntimeError, match=r"^BADREQUEST the payload has more than 3 bytes"):
        stage.publish(payload=b"1234")
    stage.rules = Rules(max_payload=0)
    stage.publish(payload=b'"' + b"x" * 100_000 + b'"')
