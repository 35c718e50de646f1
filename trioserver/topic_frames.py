"""What clients are told of durable topics: entries and pages of the ledger, as frames. Pure.

The position in a frame is the topic's own, so that one frame is good for all who get it, whether it
comes live or in a page.
"""

from collections.abc import Callable, Iterable

import attrs
import msgspec

from trioserver import frames, ledger, messages, position
from trioserver.clock import Stamp
from trioserver.envelope import Change, Entry, Notice
from trioserver.ledger import Page


@attrs.frozen(kw_only=True)
class Rendering:
    """A page of a durable topic as clients get it."""

    page: Page
    data: bytes
    """Frames."""
    notices: int
    gaps: tuple[str, ...]
    """Their reasons."""


def frame_of(entry: Entry, topic: str, stamp: Stamp) -> bytes:
    """Return what clients are told of an entry of a durable topic: the same for all of them.

    Args:
        entry: What was published.
        topic: Its name.
        stamp: Writes moments.

    Returns:
        One frame for a notification. For a change one for each notification that it is about.
    """
    where = position.join("", entry.point)
    if isinstance(entry, Change):
        return _updates(entry.state, entry.ids, where, topic)
    return _durable(entry, entry.point, entry.payload, topic, where, stamp)


def render(
    page: Page,
    topic: str,
    stamp: Stamp,
    is_unwanted: Callable[[ledger.Notice], bool] = lambda _notice: False,
) -> Rendering:
    """Return a page as clients get it.

    Args:
        page: Of a durable topic.
        topic: Its name.
        stamp: Writes moments.
        is_unwanted: Asked once about each notification, in order, whether to leave it out.
    """
    found: list[bytes] = []
    gaps: list[str] = []
    notices = 0
    for item in page.items:
        if isinstance(item, ledger.Gap):
            found.append(_gap(item, topic))
            gaps.append(item.reason)
            continue
        where = position.join("", f"{page.epoch}.{item.place}")
        if isinstance(item, ledger.Change):
            found.append(_updates(item.state, item.ids, where, topic))
        elif not is_unwanted(item):
            notices += 1
            payload = messages.checked(item.payload)
            found.append(_durable(item, item.place, payload, topic, where, stamp))
    return Rendering(page=page, data=b"".join(found), notices=notices, gaps=tuple(gaps))


def _durable(
    item: Notice | ledger.Notice,
    place: str,
    payload: msgspec.Raw,
    topic: str,
    where: str,
    stamp: Stamp,
) -> bytes:
    milliseconds, number = position.order(place)
    notification = messages.Durable(
        type=item.type,
        id=item.id,
        seq=number // position.SEQ_SPAN,
        payload=payload,
        timestamp=stamp.at(milliseconds),
        position=where,
        attempt=1,
        traceparent=item.traceparent,
        topic=topic,
        sender=item.sender,
    )
    return frames.encode_text(messages.encode(notification))


def _updates(state: str, ids: Iterable[str], where: str, topic: str) -> bytes:
    updates = [messages.Update(one, state, where, topic=topic) for one in ids]
    return b"".join([frames.encode_text(messages.encode(update)) for update in updates])


def _gap(gap: ledger.Gap, topic: str) -> bytes:
    message = messages.Gap(
        from_seq=gap.from_seq,
        to_seq=gap.to_seq,
        missing=gap.missing,
        reason=gap.reason,
        topic=topic,
    )
    return frames.encode_text(messages.encode(message))
