"""The internal port's server in this process, with an application that records what reaches it."""

import contextlib
import socket
from collections.abc import AsyncIterator

import attrs
import trio

from tests.trioserver.gateway_process import LIMIT_SECONDS
from trioserver.gateway.body import Receive
from trioserver.gateway.client_rate import ClientRate
from trioserver.gateway.front import Front, Scope, Send
from trioserver.gateway.problem import Problem
from trioserver.gateway.serve import Server
from trioserver.metrics import Tally
from trioserver.peers import Peers


@attrs.define(eq=False, kw_only=True)
class Served:
    """A server on a port of its own.

    Attributes:
        server: What serves.
        address: Where.
        paths: Of all requests that have reached the application.
        tally: What was counted around it.
        refused: Statuses of requests that never reached it.
    """

    address: tuple[str, int]
    paths: list[str] = attrs.field(factory=list)
    tally: Tally = attrs.field(factory=Tally)
    refused: list[int] = attrs.field(factory=list)
    server: Server = attrs.field(init=False)

    async def ask(self, data: bytes) -> bytes:
        """Send all this; return all that comes until the end of the connection."""
        answers = b""
        with trio.fail_after(LIMIT_SECONDS):
            async with await self.dial() as stream:
                await stream.send_all(data)
                async for part in stream:
                    answers += part
        return answers

    async def dial(self) -> trio.SocketStream:
        """Return a new connection."""
        return await trio.open_tcp_stream(*self.address)

    async def application(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer with the body of the request."""
        self.paths.append(scope["path"])
        status, body = 200, b""
        if scope["method"] == "POST":
            try:
                body = await scope["state"]["body"].read()
            except Problem as problem:
                status = problem.status
        lines = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": lines})
        await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def serving(
    rate: ClientRate | None = None, *, peers: Peers | None = None, places: int = 100
) -> AsyncIterator[Served]:
    """Serve until the block ends, and a second longer at most."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        served = Served(address=listener.getsockname())
        front = Front(served.application, served.tally, rate)
        served.server = Server(
            front,
            listener.fileno(),
            peers=peers,
            rate=rate,
            refused=served.refused.append,
            places=places,
        )
        with trio.fail_after(2 * LIMIT_SECONDS):
            async with trio.open_nursery() as nursery:
                await nursery.start(served.server.run)
                yield served
                served.server.stop(1.0)
