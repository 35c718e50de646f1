"""The life of a notification as JSON."""

import json

import attrs

from trioserver.gateway.life_page import life_page
from trioserver.life import DeviceLife, Event, Trace

NOTHING = Trace(
    id="p07-x",
    user="42",
    type="order",
    state="accepted",
    why="",
    seq=0,
    place="",
    accepted=None,
    expires=None,
    due=None,
    fallback=None,
    events=(),
    devices=(),
)


def test_everything_that_is_known() -> None:
    """Moments are RFC 3339 with milliseconds, devices are told one by one."""
    devices = (
        DeviceLife(name="phone", sent=1000, received=1001, acked=1002, read=1003, attempts=2),
        DeviceLife(name="", why="the device has not come since"),
    )
    told = json.loads(
        life_page(
            attrs.evolve(
                NOTHING,
                state="read",
                seq=7,
                accepted=1763630000123,
                expires=1763630001000,
                due=1763630000000,
                fallback=1763630000500,
                events=(Event(kind="received", at=1001), Event(kind="read", at=1003)),
                devices=devices,
            )
        )
    )

    assert {
        "id": "p07-x",
        "to": {"user": "42"},
        "type": "order",
        "state": "read",
        "why": None,
        "seq": 7,
        "accepted_at": "2025-11-20T09:13:20.123Z",
        "expires_at": "2025-11-20T09:13:21.000Z",
        "deliver_at": "2025-11-20T09:13:20.000Z",
        "fallback_at": "2025-11-20T09:13:20.500Z",
        "events": [
            {"event": "received", "at": "1970-01-01T00:00:01.001Z"},
            {"event": "read", "at": "1970-01-01T00:00:01.003Z"},
        ],
        "devices": [
            {
                "device": "phone",
                "sent_at": "1970-01-01T00:00:01.000Z",
                "received_at": "1970-01-01T00:00:01.001Z",
                "acked_at": "1970-01-01T00:00:01.002Z",
                "read_at": "1970-01-01T00:00:01.003Z",
                "attempts": 2,
                "why": None,
            },
            {
                "device": None,
                "sent_at": None,
                "received_at": None,
                "acked_at": None,
                "read_at": None,
                "attempts": 0,
                "why": "the device has not come since",
            },
        ],
    } == told


def test_what_is_not_known_is_null() -> None:
    """The shape is always the same; moments that no calendar has are not known."""
    told = json.loads(life_page(attrs.evolve(NOTHING, user=None, expires=10**17, why="trimmed")))

    assert ({"all": True}, None, None, None, "trimmed") == (
        told["to"],
        told["seq"],
        told["expires_at"],
        told["accepted_at"],
        told["why"],
    )


def test_of_a_topic() -> None:
    """It says which."""
    told = json.loads(life_page(attrs.evolve(NOTHING, id="t03-x", user=None, topic="room.7")))

    assert ({"topic": "room.7"}, []) == (told["to"], told["devices"])
