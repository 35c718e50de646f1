"""A resolver for tests that takes its time: every name is an address of the loopback."""

import socket
from typing import Any

import trio


class SlowResolver(trio.abc.HostnameResolver):
    """Finds 127.0.0.1, late. Install it inside of the run that shall use it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def getaddrinfo(  # type: ignore[override] # the order of the base, spelled shorter
        self, _host: bytes | None, port: int | None, *rest: int
    ) -> list[Any]:
        """Return the loopback after a while."""
        await trio.sleep(self.seconds)
        return socket.getaddrinfo("127.0.0.1", port, *rest)

    async def getnameinfo(self, sockaddr: tuple[Any, ...], flags: int) -> tuple[str, str]:
        """Not needed."""
        raise NotImplementedError
