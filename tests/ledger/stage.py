"""Where it is played: a real Redis, a proxy in front of it, and the server behind that.

The server speaks to Redis through the proxy, so that its subscriptions can be made deaf while
everything else works. Publishers that need only Redis speak to it directly.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Self

import trio

from tests.redis_server import RedisServer
from tests.running import READY_SECONDS, Running, eventually, running
from tests.toxic import Toxic

API_KEY: Final = "a-key-for-tests-a-key-for-tests-a-key"

SUBSCRIBE: Final = b"SUBSCRIBE\r\n"


class Deafening(Toxic):
    """A proxy in front of Redis that can make subscriptions deaf, and only them.

    The connection lives, commands on others are answered, but nothing comes any more on those
    that had subscribed when `deafen` was called. New ones are as good as ever.
    """

    def __init__(self, upstream: tuple[str, int]) -> None:
        super().__init__(upstream)
        self._ears: set[_Ear] = set()

    def deafen(self) -> int:
        """Make every present subscription deaf; return how many there were. From any thread."""
        subscribed = [ear for ear in list(self._ears) if ear.subscribed and not ear.deaf]
        for ear in subscribed:
            ear.deaf = True
        return len(subscribed)

    async def _relay(self, client: trio.SocketStream) -> None:
        ear = _Ear(client)
        self._ears.add(ear)
        try:
            await super()._relay(ear)  # type: ignore[arg-type]
        finally:
            self._ears.discard(ear)


class _Ear(trio.abc.Stream):
    """The proxy's stream to a client of Redis, which listens for who subscribes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self.subscribed = False
        self.deaf = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self._stream.receive_some(max_bytes)
        self.subscribed = self.subscribed or SUBSCRIBE in data
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self.deaf:
            await trio.lowlevel.checkpoint()
        else:
            await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


class ProxyThread:
    """A proxy with a thread and a loop of its own, for those who block."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.proxy = Deafening(upstream)
        self._up = threading.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()
        self._thread = threading.Thread(target=trio.run, args=(self._run,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._up.wait(READY_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        self._token.run_sync_soon(self._scope.cancel)
        self._thread.join(READY_SECONDS)

    async def _run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with self._scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.proxy.run)
                self._up.set()


class Stage:
    """Redis, the proxy and the server. Everything here blocks, but not for long.

    Attributes:
        redis: The Redis that holds the ledger.
        proxy: Between the server and that Redis.
        server: Workers and gateway.
    """

    def __init__(self, redis: RedisServer, proxy: Deafening, server: Running) -> None:
        self.redis = redis
        self.proxy = proxy
        self.server = server
        status = self.status()
        self.address = _address(status["address"])
        """Of the public port; it survives whatever happens to workers."""
        self.api = _address(status["admin_address"])
        """Of the internal port."""

    def status(self) -> dict[str, Any]:
        """Return the supervisor's word on everything."""
        status = self.server.status()
        assert status is not None, self.server.log[-2000:]
        return status

    def worker_pids(self) -> list[int]:
        """Return who serves now, by slot; empty slots are left out."""
        return [one["pid"] for one in self.status()["workers"] if one["pid"]]

    def subscriptions(self) -> int:
        """Return how many connections Redis counts as subscribed."""
        reply = self.redis.command("CLIENT", "LIST", "TYPE", "pubsub")
        assert isinstance(reply, bytes)
        return len(reply.splitlines())

    def signal_worker(self, slot: int, number: signal.Signals) -> int | None:
        """Signal the worker of a slot; return its pid, or None if the slot is empty now."""
        pid: int | None = self.status()["workers"][slot]["pid"]
        if pid is not None:
            _kill(pid, number)
        return pid

    @staticmethod
    def wake(pid: int) -> None:
        """Let a stopped process go on, if it is still there."""
        _kill(pid, signal.SIGCONT)

    def heal(self, seconds: float = READY_SECONDS) -> None:
        """Undo what lasts, and wait until a message sent now would arrive."""
        try:
            self.redis.resume()
        except AssertionError:
            # A test that was cut short has not started it again.
            self.redis.start()
        for pid in self.worker_pids():
            self.wake(pid)
        eventually(self._well, seconds, f"all is well again\n{self.status()}")

    def _well(self) -> bool:
        status = self.status()
        workers = status["workers"]
        return bool(
            status["ready"]
            and status["gateway"]["ready"]
            and not status["reloading"]
            and all(worker["ready"] for worker in workers)
            and self.subscriptions() >= len(workers)
        )


@contextlib.contextmanager
def stage(
    directory: Path,
    *,
    workers: int = 2,
    proxied: bool = True,
    environ: Mapping[str, str] | None = None,
    config: Mapping[str, str] | None = None,
) -> Iterator[Stage]:
    """Set everything up for the time of the block.

    Args:
        directory: For data, logs and state.
        workers: How many.
        proxied: Whether the server speaks to Redis through the proxy, which costs time.
        environ: Further settings of the server.
        config: Further directives of Redis.
    """
    with (
        RedisServer(directory / "redis", config=config) as redis,
        ProxyThread(("127.0.0.1", redis.port)) as thread,
        running(
            directory / "server",
            workers=workers,
            environ={
                "REDIS_URL": f"redis://127.0.0.1:{thread.proxy.port if proxied else redis.port}/0",
                "API_KEYS": API_KEY,
                "DRAIN_SECONDS": "3s",
                # Few users get much here, and whole herds come back at once.
                "NOTIFICATIONS_PER_MINUTE_PER_USER": "0",
                "HANDSHAKES_PER_SECOND": "0",
                **(environ or {}),
            },
        ) as server,
    ):
        yield Stage(redis, thread.proxy, server)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def _kill(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
