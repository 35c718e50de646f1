"""A proxy that misbehaves on request: latency, silence in one direction, cuts, injected bytes.

    proxy = Toxic(("127.0.0.1", redis.port))
    await nursery.start(proxy.run)
    ... connect to 127.0.0.1, proxy.port ...
    proxy.mute_to_client = True     # the connection lives, nothing comes back

Every knob may be turned at any time and applies to the bytes read from then on.
"""

import math
from pathlib import Path
from typing import Final, NoReturn

import trio

CHUNK_BYTES: Final = 64 * 1024
BROKEN: Final = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)


class Toxic:
    """One listening port of the loopback, relayed to one upstream address.

    Attributes:
        port: Where to connect to; known once `run` has started.
        latency_seconds: Delay of each chunk, in each direction; order is kept.
        mute_to_client: What the server says is read and thrown away.
        mute_to_server: What clients say is read and thrown away.
        connections: How many were accepted so far.
    """

    def __init__(self, upstream: tuple[str, int] | Path) -> None:
        self.port = 0
        self.latency_seconds = 0.0
        self.mute_to_client = False
        self.mute_to_server = False
        self.connections = 0
        self._upstream = upstream
        self._live: dict[trio.CancelScope, trio.SocketStream] = {}

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> NoReturn:
        """Relay until cancelled."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._relay, listeners)
        raise AssertionError("unreachable")

    def cut(self) -> None:
        """End every connection now."""
        for scope in list(self._live):
            scope.cancel()

    async def inject(self, data: bytes) -> None:
        """Say ``data`` to the server on every connection, as if the client had."""
        for server in list(self._live.values()):
            await server.send_all(data)

    async def _relay(self, client: trio.SocketStream) -> None:
        self.connections += 1
        async with client:
            try:
                server = await self._connect()
            except OSError:
                return
            async with server, trio.open_nursery() as nursery:
                scope = nursery.cancel_scope
                self._live[scope] = server
                try:
                    for source, target in ((client, server), (server, client)):
                        send, receive = trio.open_memory_channel[tuple[float, bytes]](math.inf)
                        nursery.start_soon(self._read, source, send, source is server)
                        nursery.start_soon(_write, target, receive, scope)
                    await trio.sleep_forever()
                finally:
                    del self._live[scope]

    async def _connect(self) -> trio.SocketStream:
        if isinstance(self._upstream, Path):
            return await trio.open_unix_socket(str(self._upstream))
        return await trio.open_tcp_stream(*self._upstream)

    async def _read(
        self,
        source: trio.SocketStream,
        send: trio.MemorySendChannel[tuple[float, bytes]],
        from_server: bool,  # noqa: FBT001 - start_soon has no keywords
    ) -> None:
        async with send:
            try:
                while data := await source.receive_some(CHUNK_BYTES):
                    if not (self.mute_to_client if from_server else self.mute_to_server):
                        send.send_nowait((trio.current_time() + self.latency_seconds, data))
            except BROKEN:
                return


async def _write(
    target: trio.SocketStream,
    receive: trio.MemoryReceiveChannel[tuple[float, bytes]],
    both: trio.CancelScope,
) -> None:
    """Say each chunk when its time has come; the end of one direction is the end of both."""
    try:
        async for due, data in receive:
            await trio.sleep_until(due)
            await target.send_all(data)
    except BROKEN:
        pass
    both.cancel()
