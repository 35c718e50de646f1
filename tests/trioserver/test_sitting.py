"""A chat connection's seat: taken once, kept when its client logs in, given back."""

import uuid

import trio

from tests.trioserver.wire import chats
from trioserver.errors import CloseReason
from trioserver.sitting import Sitting


class Guest:
    """Sits; notes what it is told."""

    connection_id = "w0-1"
    reason: CloseReason | None = None

    def __init__(self) -> None:
        self.seats: list[str] = []
        self.ends: list[CloseReason] = []

    def seated(self, why: str) -> None:
        """Note it."""
        self.seats.append(why)

    def end(self, reason: CloseReason) -> None:
        """Note it."""
        self.ends.append(reason)

    def answer_chat(self, answers: bytes, number: int) -> None:
        """Nothing is ever answered without Redis."""

    def not_yours(self) -> None:
        """Nobody says so without Redis."""

    def resume(self) -> None:
        """Nothing to do."""


def said(sitting: Sitting) -> list[object]:
    """Return what a seat knows of the session, and of the feed."""
    return [sitting.why, sitting.page]


def log_bug(what: str, bug: BaseException) -> None:
    """Fail."""
    raise AssertionError(what) from bug


async def test_nothing_is_known_before_anybody_sits() -> None:
    """A connection without a credential has no session yet."""
    sitting = Sitting()
    assert (None, None, False) == (sitting.session_id, sitting.count, sitting.crowded)
    sitting.leave()


async def test_a_seat_is_a_session_that_is_not_known_yet() -> None:
    """A new one has an id at once, one that was asked for has that; neither has a count."""
    asked = str(uuid.uuid4())
    for session_id in ("", asked):
        sitting = Sitting(asked=session_id)
        sitting.sit(Guest(), chats(log_bug), None)
        assert sitting.session_id is not None
        assert 4 == uuid.UUID(sitting.session_id).version
        assert (session_id or sitting.session_id) == sitting.session_id
        assert (None, None) == (sitting.count, sitting.why)


async def test_who_logs_in_keeps_the_seat() -> None:
    """What had been said about the anonymous one does not count any more."""
    sitting, guest = Sitting(), Guest()
    sitting.sit(guest, chats(log_bug), None)
    before = sitting.chat
    sitting.why, sitting.page = "", ("p", "", b"")
    sitting.logs_in("")
    sitting.sit(guest, chats(log_bug), "ann")
    assert before is sitting.chat
    assert [None, None] == said(sitting)


async def test_a_crowd_of_messages_holds_the_client_up(autojump_clock: trio.abc.Clock) -> None:
    """Who says much before there is a session is not read on; who has left is not held up."""
    sitting, guest = Sitting(), Guest()
    sitting.sit(guest, chats(log_bug), None)
    assert sitting.chat is not None
    crowded = [sitting.crowded]
    for _ in range(1000):
        sitting.chat.message(b"1", None, None, "T")  # type: ignore[arg-type] # a payload
    crowded.append(sitting.crowded)
    sitting.leave()
    sitting.leave()
    crowded.append(sitting.crowded)
    assert [False, True, False] == crowded
    assert [] == guest.ends


async def test_who_names_another_session_gets_that_one() -> None:
    """A client that logs in may have a session of its own; the anonymous one is let go."""
    desk, guest, mine = chats(log_bug), Guest(), str(uuid.uuid4())
    sitting = Sitting(asked=str(uuid.uuid4()))
    sitting.sit(guest, desk, None)
    before = sitting.chat
    sitting.logs_in(mine)
    sitting.sit(guest, desk, "ann")
    assert before is not sitting.chat
    assert mine == sitting.session_id


async def test_a_refused_seat_is_asked_for_again_by_who_logs_in() -> None:
    """The session is a user's: who turns out to be that user has asked for it already."""
    mine, desk, guest = str(uuid.uuid4()), chats(log_bug), Guest()
    sitting = Sitting(asked=mine)
    sitting.sit(guest, desk, None)
    sitting.lose(7.0)
    assert (None, 7.0) == (sitting.session_id, sitting.refused_at)
    sitting.logs_in("")
    sitting.sit(guest, desk, "ann")
    assert (mine, None) == (sitting.session_id, sitting.refused_at)
