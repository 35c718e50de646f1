"""The messages between supervisor, children and commands."""

import json

import hypothesis.strategies as st
import pytest
from hypothesis import given

from trioserver.status import (
    Beat,
    Drain,
    GatewayStatus,
    RedisStatus,
    Request,
    Started,
    StatusReply,
    Verdict,
    WorkerStatus,
    decode_order,
    decode_reply,
    decode_report,
    decode_request,
    encode,
)

REPLY = StatusReply(
    ready=True,
    workers=[
        WorkerStatus(
            slot=0, pid=11, age_seconds=1.5, connections=3, restarts=0, ready=True, why=""
        ),
        WorkerStatus(
            slot=1,
            pid=None,
            age_seconds=None,
            connections=0,
            restarts=2,
            ready=False,
            why="next start in 0.4 s",
        ),
    ],
    gateway=GatewayStatus(pid=12, age_seconds=1.5, restarts=0, ready=True),
    redis=RedisStatus(embedded=True, pid=13, age_seconds=1.6, restarts=0, ready=True),
    address="0.0.0.0:8081",
    admin_address="127.0.0.1:9081",
    pid=10,
    generation=1,
    draining=False,
    reloading=False,
    version="0.1.0",
    uptime_seconds=2.0,
)


@pytest.mark.parametrize("report", [Started(), Beat(connections=3, ready=False, why="redis")])
def test_reports_survive_the_pair(report: Started | Beat) -> None:
    """What a child says is what the supervisor hears."""
    assert decode_report(encode(report)) == report


def test_orders_survive_the_pair() -> None:
    """What the supervisor orders is what a child gets."""
    order = Drain(seconds=26.0, propagation=5.0, quick=True)

    assert decode_order(encode(order)) == order


def test_requests_survive_the_socket() -> None:
    """What is asked is what is answered."""
    assert decode_request(encode(Request(op="status"))) == Request(op="status")


@pytest.mark.parametrize(
    "reply", [REPLY, Verdict(ok=True, generation=2), Verdict(ok=False, reason="no")]
)
def test_replies_are_told_apart(reply: StatusReply | Verdict) -> None:
    """Although neither shape has a tag."""
    assert decode_reply(encode(reply)) == reply


def test_status_has_the_promised_shape() -> None:
    """People read it with jq: one entry per slot, null where there is nobody."""
    status = json.loads(encode(REPLY))

    assert status["workers"][1] == {
        "slot": 1,
        "pid": None,
        "age_seconds": None,
        "connections": 0,
        "restarts": 2,
        "ready": False,
        "why": "next start in 0.4 s",
    }
    assert set(status["gateway"]) == {"pid", "age_seconds", "restarts", "ready", "why"}
    assert set(status["redis"]) == {"embedded", "pid", "age_seconds", "restarts", "ready"}
    assert set(status) == {
        "ready",
        "workers",
        "gateway",
        "redis",
        "address",
        "admin_address",
        "pid",
        "generation",
        "draining",
        "reloading",
        "version",
        "uptime_seconds",
    }


def test_unknown_fields_are_ignored() -> None:
    """They come from a newer release in the same conversation."""
    beat = b'{"type":"beat","connections":1,"ready":true,"why":"","loop_lag":0.1}'

    assert decode_report(beat) == Beat(connections=1, ready=True)
    assert decode_request(b'{"op":"stop","force":true}') == Request(op="stop")
    assert decode_order(b'{"type":"drain","seconds":1,"song":"la"}') == Drain(seconds=1)
    assert decode_reply(b'{"ok":true,"more":1}') == Verdict(ok=True)


@pytest.mark.parametrize(
    "packet",
    [
        b'{"type":"adopt","slot":1}',
        b'{"type":"beat","v":2}',
        b'{"type":"beat","connections":"many"}',
        b'{"connections":1}',
        b"[]",
        b"beat",
        b"",
        b"\xff",
    ],
)
def test_reports_that_are_not_understood_are_none(packet: bytes) -> None:
    """Unknown types, higher versions, nonsense: skipped, never an error."""
    assert decode_report(packet) is None


@given(st.binary() | st.text().map(str.encode))
def test_no_bytes_raise(packet: bytes) -> None:
    """Whatever comes in is decoded or skipped."""
    for decode in (decode_report, decode_order, decode_request, decode_reply):
        decode(packet)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_no_json_raises(value: object) -> None:
    """Also not in the fields that are known."""
    for packet in (value, {"type": "beat", "connections": value}, {"ok": value}, {"op": value}):
        raw = json.dumps(packet).encode()
        for decode in (decode_report, decode_order, decode_request, decode_reply):
            decode(raw)
