"""WebSocket clients for the integration tests: websockets' own, blocking, an independent peer."""

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any, Final

from websockets.sync.client import ClientConnection, connect

from tests.running import SECRET, Running
from trioserver.auth import sign
from trioserver.settings import Settings

PATIENCE: Final = 10.0


def token(user: str, seconds: float = 3600) -> str:
    """Return a good token."""
    return sign(Settings(jwt_secret_key=SECRET), user, time.time() + seconds)


def url(server: Running, query: str = "") -> str:
    """Return the address of the server's WebSocket."""
    status = server.status()
    assert status is not None
    return f"ws://{status['address']}/ws{query}"


@contextlib.contextmanager
def client(server: Running, user: str, **options: Any) -> Iterator[ClientConnection]:
    """Connect as a user; ``connection_established`` has been received."""
    with connect(
        url(server), additional_headers={"Authorization": f"Bearer {token(user)}"}, **options
    ) as socket:
        assert receive(socket)["type"] == "connection_established"
        yield socket


def receive(socket: ClientConnection, seconds: float = PATIENCE) -> dict[str, Any]:
    """Return the next message that is no heartbeat."""
    while True:
        message = json.loads(socket.recv(timeout=seconds))
        if message["type"] != "heartbeat":
            return dict(message)


def nothing_more(socket: ClientConnection) -> bool:
    """Return whether nothing was waiting: a round trip shows that all sent before has come."""
    socket.send('{"type":"ping","ref":"barrier"}')
    return receive(socket) == {"type": "pong", "ref": "barrier"}
