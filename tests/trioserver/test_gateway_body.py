"""Bodies: taken whatever they are, kept only if wanted and not too large, never waited for long."""

from collections.abc import Iterable

import pytest
import trio

from trioserver.gateway import body as module
from trioserver.gateway.body import Body, Message
from trioserver.gateway.problem import Problem

GONE: Message = {"type": "http.disconnect"}


def piece(data: bytes, *, more: bool = True) -> Message:
    """Return a part of a body as ASGI has it."""
    return {"type": "http.request", "body": data, "more_body": more}


class Client:
    """The sending side of a request."""

    def __init__(self, headers: Iterable[tuple[bytes, bytes]] = (), *, wanted: bool = True) -> None:
        # As long as Hypercorn's queue.
        self._send, self._receive = trio.open_memory_channel[Message](10)
        self.body = Body(self._receive.receive, headers, wanted=wanted)

    async def send(self, *messages: Message) -> None:
        """Send these; waits if the body is not being taken."""
        for message in messages:
            await self._send.send(message)


async def read(client: Client) -> bytes | int:
    """Return the body, or the status of the problem."""
    try:
        return await client.body.read()
    except Problem as problem:
        return problem.status


async def test_parts_are_put_together(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """A body in many parts is what was sent; an empty one is empty, not an error."""
    parts, empty = Client(), Client()
    for client in (parts, empty):
        nursery.start_soon(client.body.run)
    await parts.send(
        *[piece(b"%d" % (number % 10)) for number in range(50)], piece(b"", more=False)
    )
    await empty.send(piece(b"", more=False))

    assert b"0123456789" * 5 == await read(parts)
    assert b"" == await read(empty)
    assert parts.body.ended


@pytest.mark.parametrize(
    ("size", "good"), [(module.MAX_BYTES, True), (module.MAX_BYTES + 1, False)]
)
async def test_the_limit(
    size: int, *, good: bool, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """So many bytes are taken and not one more, however they are cut."""
    client = Client()
    nursery.start_soon(client.body.run)
    half = size // 2
    await client.send(piece(b"x" * half), piece(b"x" * (size - half), more=False))

    assert (b"x" * size if good else 413) == await read(client)


async def test_too_much_is_known_before_it_has_come(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """A declared length is believed at once, and an endless body ends where it is too large."""
    declared = Client([(b"content-length", b"65537")])
    endless = Client()
    for client in (declared, endless):
        nursery.start_soon(client.body.run)
    await endless.send(*[piece(b"x" * 1000)] * 66)
    began = trio.current_time()

    assert (413, 413) == (await read(declared), await read(endless))
    assert began == trio.current_time()


async def test_a_slow_body_has_one_deadline(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """A byte a second does not extend the time for all of it."""
    client = Client()
    nursery.start_soon(client.body.run)
    began = trio.current_time()

    async def drip() -> None:
        while True:
            await client.send(piece(b"x"))
            await trio.sleep(1.0)

    nursery.start_soon(drip)
    status = await read(client)

    assert 408 == status
    assert module.READ_SECONDS == pytest.approx(trio.current_time() - began)
    nursery.cancel_scope.cancel()


async def test_a_client_that_goes_in_the_middle(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """Half a body is never taken for a whole one."""
    client = Client()
    nursery.start_soon(client.body.run)
    await client.send(piece(b'{"a":1}'), GONE)

    assert 400 == await read(client)
    assert client.body.ended


async def test_what_nobody_wants_is_taken_all_the_same(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """The queue never fills, wanted or not, read or not, too large or not."""
    for wanted in (True, False):
        client = Client(wanted=wanted)
        nursery.start_soon(client.body.run)
        with trio.fail_after(5.0):
            await client.send(*[piece(b"x" * 10_000)] * 100, piece(b"", more=False), GONE)
        with trio.fail_after(5.0):
            await client.body.linger()


@pytest.mark.parametrize("ending", [piece(b"", more=False), GONE])
async def test_lingering_ends_with_the_body(
    ending: Message, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """It lasts until the client has said everything, or is gone."""
    client = Client()
    nursery.start_soon(client.body.run)
    began = trio.current_time()

    async def send() -> None:
        await client.send(piece(b"x"))
        await trio.sleep(1.0)
        await client.send(ending)

    nursery.start_soon(send)
    await client.body.linger()

    assert 1.0 == pytest.approx(trio.current_time() - began)


async def test_lingering_is_bounded(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """Who says nothing is waited for two seconds, who says too much is not waited for at all."""
    silent, flood = Client(), Client()
    for client in (silent, flood):
        nursery.start_soon(client.body.run)
    began = trio.current_time()
    await silent.body.linger()
    silence = trio.current_time() - began

    async def pour() -> None:
        while True:
            await flood.send(piece(b"x" * 65_536))

    nursery.start_soon(pour)
    await flood.body.linger()

    assert module.LINGER_SECONDS == pytest.approx(silence)
    assert silence == pytest.approx(trio.current_time() - began)
    nursery.cancel_scope.cancel()
