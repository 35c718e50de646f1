"""Front: what happens around every request, whatever the application does."""

import json

import pytest
import trio
import trio.testing

from trioserver.gateway.body import Message, Receive
from trioserver.gateway.front import (
    Application,
    Front,
    Scope,
    Send,
    path_label,
)
from trioserver.metrics import Tally


class Exchange:
    """One request through a `Front`: a client that sends a body of many parts."""

    def __init__(
        self, app: Application, path: str = "/healthz", method: str = "GET", parts: int = 100
    ) -> None:
        self.tally = Tally()
        self.sent: list[Message] = []
        self.left = parts
        self._front = Front(app, self.tally)
        self._scope: Scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"host", b"x")],
        }

    async def run(self) -> None:
        """Serve the request."""
        with trio.fail_after(5):
            await self._front(self._scope, self._receive, self._send)

    @property
    def status(self) -> int:
        """Status of the response."""
        status: int = self.sent[0]["status"]
        return status

    @property
    def body(self) -> bytes:
        """Body of the response."""
        return b"".join(message.get("body", b"") for message in self.sent)

    async def _receive(self) -> Message:
        await trio.lowlevel.checkpoint()
        if not self.left:
            await trio.sleep_forever()
        self.left -= 1
        return {"type": "http.request", "body": b"x", "more_body": self.left > 0}

    async def _send(self, message: Message) -> None:
        await trio.lowlevel.checkpoint()
        self.sent.append(message)


async def ok(_scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with what was received."""
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body + b"ok"})


async def broken(_scope: Scope, _receive: Receive, _send: Send) -> None:
    """Fail before the response."""
    raise RuntimeError("a bug")


async def broken_halfway(_scope: Scope, _receive: Receive, send: Send) -> None:
    """Fail within the response."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    raise RuntimeError("a bug")


async def test_an_answer_gets_its_request_id_and_is_counted() -> None:
    """The id goes into the response, the request into the metrics."""
    exchange = Exchange(ok)
    await exchange.run()

    headers = dict(exchange.sent[0]["headers"])
    assert 16 == len(headers[b"x-request-id"])
    assert 1 == exchange.tally.http["/healthz", "200"]


async def test_bodies_are_read_and_thrown_away() -> None:
    """An application that does not ask sees no body, and the client's is taken all the same."""
    exchange = Exchange(ok)
    await exchange.run()

    assert b"ok" == exchange.body
    assert 0 == exchange.left


@pytest.mark.parametrize(("method", "body"), [("POST", b"x" * 100), ("GET", b"")])
async def test_an_application_may_ask_for_the_body(method: str, body: bytes) -> None:
    """Where the method is one that has a body, ``state`` has it."""

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        body = await scope["state"]["body"].read()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    exchange = Exchange(app, method=method)
    await exchange.run()

    assert body == exchange.body


async def test_the_end_of_an_answer_waits_for_the_end_of_the_request(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The client has all of the answer at once; what would hang up on it comes when it is done."""
    exchange = Exchange(ok, parts=0)  # says nothing, and would go on
    async with trio.open_nursery() as nursery:
        nursery.start_soon(exchange.run)
        await trio.testing.wait_all_tasks_blocked()
        early = [*exchange.sent]
        began = trio.current_time()

    assert [(b"ok", True)] == [(message["body"], message["more_body"]) for message in early[1:]]
    assert {"type": "http.response.body", "body": b""} == exchange.sent[-1]
    assert 2.0 == pytest.approx(trio.current_time() - began)


async def test_a_bug_in_a_route_is_a_500() -> None:
    """An exception ends that request with a problem; it goes no further."""
    exchange = Exchange(broken, "/elsewhere")
    await exchange.run()

    assert 500 == exchange.status
    assert "Internal Server Error" == json.loads(exchange.body)["title"]
    assert 1 == exchange.tally.http["other", "500"]


async def test_a_bug_after_the_response_began_adds_nothing_to_it() -> None:
    """What was sent cannot be taken back: nothing follows, and nothing is raised."""
    exchange = Exchange(broken_halfway)
    await exchange.run()

    assert ["http.response.start"] == [message["type"] for message in exchange.sent]


async def test_what_is_no_request_is_passed_on() -> None:
    """Lifespan and WebSocket scopes reach the application untouched."""
    seen: list[Scope] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        seen.append(scope)

    async def nothing() -> Message:
        raise AssertionError

    async def nowhere(_message: Message) -> None:
        raise AssertionError

    await Front(app, Tally())({"type": "lifespan"}, nothing, nowhere)

    assert [{"type": "lifespan"}] == seen


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/api/v1/notifications", "/api/v1/notifications"),
        ("/api/v1/notifications/p07-x", "/api/v1/notifications/{id}"),
        ("/api/v1/notifications/p07-x/y", "/api/v1/notifications/p07-x/y"),
        ("/api/v1/notification", "/api/v1/notification"),
        ("/healthz", "/healthz"),
    ],
)
def test_ids_are_left_out_where_paths_are_counted(path: str, label: str) -> None:
    """All notifications count under one name."""
    assert label == path_label(path)
