"""One connection's part of a chat session: what it counts, what it answers, and when."""

import msgspec
import pytest

from tests.trioserver.chat_stage import ANY, NOW, Answer, Guest
from trioserver import chat_store
from trioserver.chat import ANSWER_BYTES, CROWDED_BYTES, CROWDED_MESSAGES, PIECE_BYTES, Chat
from trioserver.chat_store import CREATED, LEAVES, RESUMED, STAYS, Attached
from trioserver.errors import CloseReason

LARGE = "x" * 16_000
"""Of these few make a crowd, as bytes."""


class Desk:
    """Stores what chats count, when it is told to."""

    def __init__(self) -> None:
        self.away = False
        self.counted = self.repeated = self.refused = 0
        self.waiting: list[Chat] = []
        self.gone: list[Chat] = []

    def put(self, chat: Chat) -> None:
        """Take note."""
        chat.due = True
        self.waiting.append(chat)

    def left(self, chat: Chat) -> None:
        """Take note."""
        self.gone.append(chat)

    def open(self, session_id: str = "", user: str | None = None) -> Guest:
        """Let a connection come."""
        guest = Guest("aa.1.1-1")
        guest.chat = Chat(self, guest, "aa.1.1-1.1", session_id, user)
        return guest

    def seat(self, session_id: str = "", user: str | None = None) -> Guest:
        """Let a connection come, and have its session at once."""
        guest = self.open(session_id, user)
        attach(guest)
        return guest


def attach(guest: Guest, count: int = 0, ids: str = "", *, asked_for: str | None = None) -> None:
    """Tell a connection's chat that it has its session."""
    outcome = RESUMED if count else CREATED
    came = Attached(outcome=outcome, count=count, ids=ids, turn=7, before="")
    guest.chat.attached(came, guest.chat.owner if asked_for is None else asked_for)


def write(guest: Guest) -> tuple[int, str, bytes]:
    """Write a chat, successfully; return count, owner and whether it leaves."""
    said = guest.chat.says()
    guest.chat.confirmed()
    return said[4], said[5], said[7]


# ---- Counting


def test_answers_wait_until_the_count_is_stored() -> None:
    """What has been counted since a write began waits for the next one."""
    desk = Desk()
    guest = desk.seat()
    guest.say("a", "b")
    guest.chat.says()
    guest.say("c")
    assert ([], [guest.chat] * 2) == (guest.answers, desk.waiting)
    guest.chat.confirmed()
    assert ([1, 2], 2) == (guest.counts, guest.chat.count)
    write(guest)
    assert ([1, 2, 3], 3, 3) == (guest.counts, guest.chat.count, desk.counted)


def test_what_is_refused_is_taken_back() -> None:
    """All that waits, also what is being written; the next count is as if it had never been."""
    guest = Desk().seat()
    guest.say("a")
    write(guest)
    guest.say("b", which="m1")
    guest.chat.says()
    guest.say("c")
    guest.chat.refuse()
    assert [1, 0, 0] == guest.counts
    assert (1, "", STAYS) == write(guest)
    guest.say("b", which="m1")
    write(guest)
    assert Answer("message_response", 2, "b", NOW, "b", "m1") == guest.answers[-1]


def test_without_anybody_who_stores_it_is_refused_at_once() -> None:
    """Nothing is kept that cannot be stored."""
    desk = Desk()
    guest = desk.seat()
    desk.away = True
    guest.say("a")
    assert (["unavailable"], 1) == ([one.code for one in guest.answers], desk.refused)


# ---- Crowds


@pytest.mark.parametrize(
    ("text", "which", "at_once"),
    [
        (LARGE, "m1", 1),
        # The answer is a little smaller than what it is reckoned with before it is made.
        ("x" * (CROWDED_BYTES // 16 - ANSWER_BYTES), None, 1),
        ("x", None, 0),
    ],
    ids=["answered at once", "less than it seemed", "still too many"],
)
async def test_who_was_not_read_is_read_again(text: str, which: str | None, at_once: int) -> None:
    """Whatever becomes of messages that came before there was a session."""
    guest = Desk().open(ANY, "ann")
    number = 0
    while not guest.chat.crowded:
        number += 1
        guest.say(text, which=which)
    assert 0 == guest.resumed
    attach(guest, 1, "\nm1 1")
    assert at_once == guest.resumed
    write(guest)
    assert (False, 1, number) == (guest.chat.crowded, guest.resumed, len(guest.answers))


def test_answers_go_in_pieces() -> None:
    """An outbox may be small: only what is larger by itself is larger than a piece."""
    guest = Desk().seat()
    guest.say(*[LARGE] * 12, *["x"] * 500, "y" * (2 * PIECE_BYTES), "z")
    write(guest)
    assert list(range(1, 515)) == guest.counts
    (large,) = [size for size in guest.pieces if size > PIECE_BYTES]
    assert 2 * PIECE_BYTES < large < 2 * PIECE_BYTES + ANSWER_BYTES
    assert (514, True) == (sum(guest.batches), len(guest.pieces) < 12)
    guest.pieces.clear()
    guest.say(*["x"] * 1000)
    guest.chat.refuse()
    assert 1514 == len(guest.answers)
    assert 1 < len(guest.pieces) < 10
    assert max(guest.pieces) <= PIECE_BYTES


def test_who_is_ended_by_an_answer_gets_no_more() -> None:
    """Not the next piece either."""
    guest = Desk().seat()
    guest.say(*[LARGE] * 12)
    guest.on_answer = lambda _answer: guest.end(CloseReason.TOO_SLOW)
    write(guest)
    assert 1 == len(guest.batches)


# ---- Logging in


def test_a_login_is_told_when_it_is_stored() -> None:
    """Not by the answer to a write that was under way: that one did not say whose it is."""
    desk = Desk()
    guest = desk.seat()
    guest.say("a")
    guest.chat.says()
    guest.chat.adopt("ann")
    guest.chat.confirmed()
    assert ([1], ["new"], guest.chat) == (guest.counts, guest.seats, desk.waiting[-1])
    assert (1, "ann", STAYS) == write(guest)
    assert ["new", ""] == guest.seats


def test_a_login_that_comes_while_it_is_attached() -> None:
    """Is written, and then told once."""
    guest = Desk().open()
    guest.chat.adopt("ann")
    attach(guest, asked_for="")
    assert [] == guest.seats
    assert (0, "ann", STAYS) == write(guest)
    assert ["new"] == guest.seats


async def test_a_stranger_is_told_that_it_is_not_his() -> None:
    """Who may still be its user is not ended; what he has said is refused, and he is read on."""
    guest = Desk().open(ANY)
    guest.early = True
    guest.say(*["x"] * CROWDED_MESSAGES)
    guest.chat.denied()
    assert (None, 1, 1, [0] * CROWDED_MESSAGES) == (
        guest.reason,
        guest.denials,
        guest.resumed,
        guest.counts,
    )
    guest.say("y")
    assert CROWDED_MESSAGES == len(guest.answers)
    guest.chat.leave()


def test_a_user_is_ended_if_it_is_another_users() -> None:
    """There is nothing that he could say."""
    guest = Desk().open(ANY, "bob")
    guest.chat.denied()
    assert (CloseReason.FORBIDDEN, 0) == (guest.reason, guest.denials)


# ---- Going


def test_who_leaves_is_written_and_not_answered() -> None:
    """Who says it again, by its id, gets that count."""
    desk = Desk()
    guest = desk.seat()
    guest.say("a")
    guest.chat.leave()
    guest.chat.leave()
    assert [guest.chat] == desk.gone
    assert (1, "", LEAVES) == write(guest)
    assert [] == guest.answers


def test_who_departs_is_answered() -> None:
    """His connection lives on, so that he waits: nothing is counted then without an answer."""
    desk = Desk()
    guest = desk.seat()
    guest.say("a")
    write(guest)
    guest.say("b")
    guest.chat.says()
    guest.say("c")
    guest.chat.depart()
    assert ([1, 0, 0], [guest.chat]) == (guest.counts, desk.gone)
    assert (1, "", LEAVES) == write(guest)
    guest.chat.message(msgspec.Raw(b"1"), None, None, NOW)
    guest.chat.depart()
    assert (3, 1) == (len(guest.answers), len(desk.gone))


def test_what_is_written_names_the_holder() -> None:
    """In the order of the script's arguments."""
    guest = Desk().seat(ANY, "ann")
    guest.say("a", which="m1")
    assert (
        *(chat_store.key(ANY), "aa.1.1-1.1", 7, 1, 1, "ann", "\nm1 1"),
        STAYS,
    ) == guest.chat.says()
