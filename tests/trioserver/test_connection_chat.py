"""A connection on a chat path: who answers first, who logs in when, and whose session it is."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from tests.trioserver.test_feed import envelope, notice, place
from tests.trioserver.wire import (
    LIMIT,
    TEXT,
    Client,
    Worker,
    head,
    page,
    running,
    text,
    token,
    topic,
    until,
)
from trioserver.connection import Connection
from trioserver.errors import CloseReason
from trioserver.outbox import OutboxLimits


@asynccontextmanager
async def chatting(
    user: str = "", *, patient: bool = False, path: str = "/ws/chat/"
) -> AsyncIterator[tuple[Worker, Client, Connection]]:
    """Connect to a chat path; Redis says nothing about the session unless the test does."""
    with trio.fail_after(LIMIT):
        async with running(send_buffer=4096) as worker:
            worker.reading.patient = patient
            client = await worker.dial(4096)
            await client.send(head(path, credential=token(user) if user else None))
            await until(lambda: len(worker.listener.connections) == 1)
            yield worker, client, worker.only()


async def greeted(client: Client) -> dict[str, object]:
    """Return the first message."""
    status, _ = await client.response()
    assert 101 == status
    return await client.message()


@pytest.mark.parametrize("session_first", [True, False])
async def test_the_backlog_goes_on_whoever_answers_first(*, session_first: bool) -> None:
    """All pages are read, and what is published then comes, in whatever order Redis answers."""
    more = page(notice(1), reached=place(1), more=True, why="", all_point="e0.0-0")
    async with chatting("ann", patient=True) as (worker, client, connection):
        await until(lambda: len(worker.reading.wanted) == 1)
        if session_first:
            connection.seated("")
        worker.reading.answer(more)
        worker.reading.wanted = [one for one in worker.reading.wanted if not one[1]]
        if not session_first:
            connection.seated("")
        assert "connection_established" == (await greeted(client))["type"]
        assert "p00-1" == (await client.message())["id"]
        assert [False] == [everyone for _, everyone in worker.reading.wanted]
        worker.reading.answer(page(start=place(1), reached=place(1), why=""))
        worker.receive(topic("ann"), envelope(2))
        assert "p00-2" == (await client.message())["id"]


async def test_who_logs_in_before_there_is_a_session_is_not_too_slow() -> None:
    """The first message is the user's, and it is one."""
    async with chatting() as (_, client, connection):
        await client.send(text({"type": "auth", "token": token("ann")}))
        await until(lambda: connection.user == "ann")
        assert connection.reason is None
        connection.seated("")
        established = await greeted(client)
        assert ("connection_established", "ann") == (established["type"], established["user"])


async def test_who_logs_in_reads_first_what_it_was_sent_before() -> None:
    """A client that has not read its answers is told who it is behind them, and is not cut off."""
    async with chatting() as (_, client, connection):
        connection.seated("new")
        assert "user" not in await greeted(client)
        answer = b"\x81\x7e\x27\x10" + b'"' + b"x" * 9998 + b'"'
        while connection.outbox.waiting_bytes < 500_000:
            connection.answer_chat(answer, 1)
        await client.send(text({"type": "auth", "token": token("ann")}))
        await until(lambda: connection.claims is not None)
        assert (None, None) == (connection.reason, connection.user)
        while connection.user is None:
            opcode, payload = await client.frame()
            assert (TEXT, answer[4:]) == (opcode, payload)
        connection.seated("")
        while (frame := await client.frame())[1] == answer[4:]:
            pass
        assert b'"user":"ann"' in frame[1]


async def test_somebody_elses_session_ends_a_user_and_asks_a_stranger() -> None:
    """Who has a token is not the one; who has none may still be, for as long as AUTH_TIMEOUT."""
    async with chatting("bob") as (_, client, connection):
        connection.not_yours()
        assert CloseReason.FORBIDDEN is connection.reason
        assert "forbidden" == (await greeted(client))["reason"]
    mine = "01234567-89ab-4cde-8f01-23456789abcd"
    async with chatting(path=f"/ws/chat/?session_id={mine}") as (_, client, connection):
        connection.not_yours()
        assert "unauthenticated" == (await greeted(client))["code"]
        await client.send(text({"type": "message"}))
        assert "unauthenticated" == (await client.message())["code"]
        await client.send(text({"type": "auth", "token": token("ann")}))
        await until(lambda: connection.user == "ann")
        connection.seated("")
        established = await client.message()
        assert (mine, "ann") == (established["session_id"], established["user"])


async def test_an_outage_of_the_ledger_is_told_although_there_is_a_session() -> None:
    """The first message says that nobody knows what was missed."""
    async with chatting("ann", patient=True) as (_, client, connection):
        connection.seated("")
        connection.establish(None, "unavailable", b"")
        established = await greeted(client)
        assert ("unavailable", False) == (established["reason"], established["resumed"])
        assert "position" not in established


async def test_a_second_page_before_there_is_a_session_costs_nothing_of_the_first() -> None:
    """An interruption while the session is awaited: what was read before it comes all the same."""
    async with chatting("ann", patient=True) as (worker, client, connection):
        await until(lambda: len(worker.reading.wanted) == 1)
        worker.reading.answer(page(notice(1), reached=place(1), why="", all_point="e0.0-0"))
        connection.catch_up()
        worker.reading.wanted = [one for one in worker.reading.wanted if not one[1]]
        worker.reading.answer(page(start=place(1), reached=place(1), why=""))
        connection.seated("")
        assert "connection_established" == (await greeted(client))["type"]
        assert "p00-1" == (await client.message())["id"]
        worker.receive(topic("ann"), envelope(2))
        assert "p00-2" == (await client.message())["id"]


async def test_who_is_asked_for_a_token_is_read_again() -> None:
    """Whatever it has said before: its ``auth`` is heard, although it was held up for a while."""
    path = "/ws/chat/?session_id=01234567-89ab-4cde-8f01-23456789abcd"
    async with chatting(path=path) as (_, client, connection):
        await client.send(b"".join(text({"type": "message", "payload": n}) for n in range(70)))
        sitting = connection._sitting
        assert sitting is not None
        chat = sitting.chat
        assert chat is not None
        await until(lambda: chat.crowded)
        chat.refuse()
        chat.denied()
        assert "unauthenticated" == (await greeted(client))["code"]
        await client.send(text({"type": "auth", "token": token("ann")}))
        await until(lambda: connection.user == "ann")


async def test_what_comes_behind_a_login_that_waits_is_the_users() -> None:
    """It is processed when the client has read what it was sent before, and not as a stranger's."""
    async with chatting() as (_, client, connection):
        connection.seated("new")
        await greeted(client)
        answer = b"\x81\x7e\x27\x10" + b'"' + b"x" * 9998 + b'"'
        while connection.outbox.waiting_bytes < 500_000:
            connection.answer_chat(answer, 1)
        again = text({"type": "refresh", "token": token("ann"), "ref": "r"})
        await client.send(text({"type": "auth", "token": token("ann")}) + again)
        await until(lambda: connection.claims is not None)
        while (frame := await client.frame())[1] == answer[4:]:
            if connection.user is not None:
                connection.seated("")
        found = [json.loads(frame[1])]
        while len(found) < 2:
            found.append(await client.message())
        assert {"connection_established", "token_refreshed"} == {one["type"] for one in found}


async def test_a_login_that_ends_the_connection_enters_nowhere() -> None:
    """The refusals of the session that it leaves are too much: then nobody has come."""
    said = text({"type": "message", "ref": "r" * 60})
    other = {"session_id": "01234567-89ab-4cde-8f01-23456789abcd"}
    with trio.fail_after(LIMIT):
        async with running(limits=OutboxLimits(max_bytes=16_384)) as worker:
            client = await worker.dial()
            await client.send(head("/ws/chat/"))
            await until(lambda: len(worker.listener.connections) == 1)
            connection = worker.only()
            await client.send(said * 60)
            await until(lambda: worker.tally.messages_in == 60)
            await client.send(said * 90 + text({"type": "auth", "token": token("ann")} | other))
            await until(lambda: connection.reason is not None)
            assert topic("ann") not in worker.hub
            assert [] == worker.register.entered
            assert 0 == worker.tally.users
