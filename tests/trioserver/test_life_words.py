"""What a person reads about users and notifications."""

from typing import Final

import attrs

from trioserver.life import Device, DeviceLife, Event, Standing, Trace
from trioserver.life_words import standing_text, trace_text

NOW: Final = 1_795_168_800_000
"""2026-11-20T10:00:00Z."""

PHONE: Final = Device(
    name="phone", seen=NOW - 500, sent=57, received=56, acked=5, all_received=0, outstanding=1
)
STANDING: Final = Standing(
    user="42",
    now=NOW,
    known=True,
    position="1.k3.1-233472",
    seq=57,
    unread=3,
    retained=12,
    all_counted=True,
    trimmed=0,
    devices=(PHONE, attrs.evolve(PHONE, name="", sent=0, received=0, acked=0, outstanding=12)),
)
TRACE: Final = Trace(
    id="p08-x",
    user="42",
    type="order.shipped",
    state="read",
    why="",
    seq=57,
    place="1-233472",
    accepted=NOW,
    expires=NOW + 3_600_000,
    due=None,
    fallback=NOW + 60_000,
    events=(Event(kind="received", at=NOW + 7), Event(kind="read", at=NOW + 2000)),
    devices=(
        DeviceLife(name="phone", sent=NOW + 2, received=NOW + 7, read=NOW + 2000, attempts=2),
        DeviceLife(name="", why="the device has not come since"),
    ),
)


def test_a_standing() -> None:
    """A line about the user, then a line per device under headings."""
    expected = """\
user 42: 3 unread, 12 kept, newest seq 57, position 1.k3.1-233472
  device     last seen                 sent  received  acked  outstanding
  phone      2026-11-20T09:59:59.500Z  57    56        5      1
  (no name)  2026-11-20T09:59:59.500Z  0     0         0      12"""
    assert expected == standing_text(STANDING)


def test_a_standing_without_devices() -> None:
    """It says so."""
    text = standing_text(attrs.evolve(STANDING, devices=()))
    assert "  no device has come in the last 30 days" == text.splitlines()[1]


def test_a_standing_that_was_not_counted_to_the_end() -> None:
    """It says that the numbers are only the least."""
    text = standing_text(attrs.evolve(STANDING, all_counted=False))
    assert "12 or more kept" in text
    assert "  (only the first 5000 kept entries were counted)" == text.splitlines()[-1]


def test_a_life() -> None:
    """What happened when, then what became of it on each device."""
    expected = """\
p08-x: read
  order.shipped, for user 42, seq 57
  accepted     2026-11-20T10:00:00.000Z
  fallback at  2026-11-20T10:01:00.000Z
  received     2026-11-20T10:00:00.007Z
  read         2026-11-20T10:00:02.000Z
  expires      2026-11-20T11:00:00.000Z
  devices
    phone      sent 2026-11-20T10:00:00.002Z, received 2026-11-20T10:00:00.007Z, \
read 2026-11-20T10:00:02.000Z, attempt 2
    (no name)  not received: the device has not come since"""
    assert expected == trace_text(TRACE)


def test_a_life_without_devices() -> None:
    """For everyone there are none to tell of; for a user without any it is said."""
    nobody = trace_text(attrs.evolve(TRACE, devices=()))
    assert "  no device has come in the last 30 days" == nobody.splitlines()[-1]

    everyone = trace_text(attrs.evolve(TRACE, user=None, devices=()))
    assert "  order.shipped, for everyone, seq 57" == everyone.splitlines()[1]
    assert "device" not in everyone

    topic = trace_text(attrs.evolve(TRACE, user=None, topic="room.7", devices=()))
    assert "  order.shipped, for topic room.7, seq 57" == topic.splitlines()[1]
    assert "device" not in topic


def test_a_life_that_has_not_begun() -> None:
    """What is scheduled has no seq; what was withdrawn has a reason."""
    scheduled = attrs.evolve(
        TRACE, state="cancelled", why="collapsed by p08-y", seq=0, due=NOW, events=()
    )
    lines = trace_text(scheduled).splitlines()
    assert "p08-x: cancelled (collapsed by p08-y)" == lines[0]
    assert "  order.shipped, for user 42" == lines[1]
    assert "  deliver at   2026-11-20T10:00:00.000Z" in lines
