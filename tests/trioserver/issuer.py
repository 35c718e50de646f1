"""An issuer of keys for tests: a real HTTP server on loopback that answers as it is told."""

import contextlib
import ssl
from collections.abc import Awaitable, Callable

import attrs
import trio

from trioserver.jwks_url import Target

Answer = Callable[[trio.abc.Stream], Awaitable[None]]


def response(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    """Return a whole answer."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def says(*parts: bytes, end: bool = True) -> Answer:
    """Return an answer of these bytes, and then the end of the stream, or silence."""

    async def answer(stream: trio.abc.Stream) -> None:
        for part in parts:
            await stream.send_all(part)
        if not end:
            # Until the client has had enough.
            assert not await stream.receive_some(1)

    return answer


def repeats(first: bytes, again: bytes, pause: float = 0.0) -> Answer:
    """Return an answer without end."""

    async def answer(stream: trio.abc.Stream) -> None:
        await stream.send_all(first)
        while True:
            await stream.send_all(again)
            with trio.move_on_after(pause):
                assert not await stream.receive_some(1)
                return

    return answer


@attrs.define(eq=False)
class Issuer:
    """A server that answers as it is told, one request per connection."""

    answer: Answer
    requests: list[bytes] = attrs.field(factory=list)
    alive: int = 0
    """Connections that are open."""
    port: int = 0

    def target(self, path: str = "/keys?x=1", scheme: str = "http") -> Target:
        """Return where it is."""
        return Target.parse(f"{scheme}://127.0.0.1:{self.port}{path}")

    async def start(self, nursery: trio.Nursery, context: ssl.SSLContext | None = None) -> None:
        """Begin to listen, with TLS if there is a context for it."""
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listener.socket.getsockname()[1]
        if context is None:
            nursery.start_soon(trio.serve_listeners, self.serve, [listener])
        else:
            secured = [trio.SSLListener(listener, context)]
            nursery.start_soon(trio.serve_listeners, self.serve, secured)

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Read one request head and answer it."""
        self.alive += 1
        # A client that hangs up in the middle is what half of the tests are about.
        with contextlib.suppress(trio.BrokenResourceError):
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                data = await stream.receive_some(1 << 16)
                if not data:
                    break
                head += data
            else:
                self.requests.append(head)
                await self.answer(stream)
        self.alive -= 1
        await trio.aclose_forcefully(stream)
