"""Frames of durable topics: the same whoever gets them, live or in a page."""

import msgspec

from tests.trioserver.topic_stage import decoded, entry, notice, place, point, where
from tests.trioserver.wire import page
from trioserver import envelope
from trioserver.clock import Stamp
from trioserver.ledger import Change, Gap, Notice
from trioserver.topic_frames import frame_of, render


def test_the_frame_of_an_entry_is_the_one_that_clients_get() -> None:
    """A notification is one frame, a change one for each of its ids."""
    one = envelope.decode(entry(1))
    change = envelope.Change(point(1), point(2), 0, "expired", ["a", "b"])
    assert isinstance(one, envelope.Notice)
    (message,) = decoded(frame_of(one, "kept.1", Stamp()))
    assert ("kept.1", 1, where(1)) == (message["topic"], message["seq"], message["position"])
    assert ["a", "b"] == [update["id"] for update in decoded(frame_of(change, "kept.1", Stamp()))]


def test_a_page_is_what_clients_get_of_it_in_its_order() -> None:
    """Gaps, notifications and updates; what is counted is beside the frames."""
    found = page(
        Gap(1, 2, 2, "trimmed"), notice(3), Change(place(4), "cancelled", ["a", "b"]), notice(5)
    )
    rendering = render(found, "kept.1", Stamp())
    messages = decoded(rendering.data)
    assert ["gap", "order", "update", "update", "order"] == [one["type"] for one in messages]
    assert {"kept.1"} == {one["topic"] for one in messages}
    assert [None, where(3), where(4), where(4), where(5)] == [
        one.get("position") for one in messages
    ]
    assert (found, 2, ("trimmed",)) == (rendering.page, rendering.notices, rendering.gaps)


def test_what_is_live_is_what_a_page_brings() -> None:
    """A client that reads a notification gets the very frame that the others got."""
    one = envelope.decode(entry(1))
    assert isinstance(one, envelope.Notice)
    kept = msgspec.structs.replace(notice(1), payload=bytes(one.payload))
    assert frame_of(one, "kept.1", Stamp()) == render(page(kept), "kept.1", Stamp()).data


def test_what_is_unwanted_is_neither_in_the_frames_nor_counted() -> None:
    """Each notification is asked about once."""
    asked: list[str] = []

    def is_unwanted(one: Notice) -> bool:
        asked.append(one.id)
        return one.id == "t00-1"

    rendering = render(page(notice(1), notice(2)), "kept.1", Stamp(), is_unwanted)
    assert [2] == [one["seq"] for one in decoded(rendering.data)]
    assert (["t00-1", "t00-2"], 1) == (asked, rendering.notices)
