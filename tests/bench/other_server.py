"""A server to compare with, and to find out whether faults are counted: it makes them on order.

    python other_server.py PORT REDIS_PORT WORKERS

What is published to the channel ``faults`` is the list of faults from then on, as JSON. A fault
strikes one number in ten: see `Faulty.deliver`. What the ledger publishes is delivered, too, in the
product's form, and so is what is published to a topic that a token joins.
"""

import asyncio
import contextlib
import os
import signal
import sys
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, urlsplit

import hiredis
import jwt
import msgspec
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

SECRET = "bench-secret-bench-secret-bench-secret"


PATHS = {"/ws", "/ws/chat/"}


def claims_of(path: str) -> dict[str, Any]:
    """Return what the token in the query says."""
    token = parse_qs(urlsplit(path).query)["token"][0]
    claims: dict[str, Any] = jwt.decode(token, SECRET, algorithms=["HS256"])
    return claims


def topical(topic: str, data: bytes) -> str:
    """Return the frame of a notification of a topic."""
    published = msgspec.json.decode(data)
    frame = {"type": published["type"], "topic": topic, "payload": published["payload"]}
    return msgspec.json.encode(frame).decode()


def durable(envelope: bytes) -> str:
    """Return the frame of a notification from the ledger."""
    _, point, _, name, kind, payload, *_ = msgspec.json.decode(envelope[2:])
    frame = {
        "type": kind,
        "id": name,
        "seq": int(point.rpartition("-")[2]) // 4096,
        "payload": payload,
        "position": f"1.{point}",
    }
    return msgspec.json.encode(frame).decode()


FAULTS = {
    3: "lost",
    4: "misnumbered",
    5: "doubled",
    6: "closed",
    7: "reordered",
    8: "elsewhere",
    9: "stray",
}


class Faulty:
    """All connections of the worker."""

    def __init__(self) -> None:
        self.faults: set[str] = set()
        self.connections: dict[str, ServerConnection] = {}
        self.joined: dict[str, list[str]] = {}
        self.held: str | None = None

    def refuse(self, connection: ServerConnection, request: Request) -> Response | None:
        """Refuse bad tokens, and paths that are nowhere."""
        if urlsplit(request.path).path not in PATHS:
            return connection.respond(HTTPStatus.NOT_FOUND, "nowhere")
        try:
            claims_of(request.path)
        except jwt.PyJWTError:
            return connection.respond(HTTPStatus.UNAUTHORIZED, "no")
        return None

    async def serve(self, connection: ServerConnection) -> None:
        """Answer one client."""
        assert connection.request is not None
        claims = claims_of(connection.request.path)
        user = claims["sub"]
        self.connections[user] = connection
        self.joined[user] = claims.get("topics", {}).get("join", [])
        count = 0
        with contextlib.suppress(ConnectionClosed):
            for topic in self.joined[user]:
                said = msgspec.json.encode({"type": "subscribed", "topic": topic})
                await connection.send(said.decode())
            async for _ in connection:
                count += 1
                answer = msgspec.json.encode({"type": "message_response", "count": count})
                await self.deliver(connection, count, answer.decode())
        del self.connections[user]

    async def publish(self, channel: bytes, data: bytes) -> None:
        """Deliver what came from Redis."""
        if channel == b"faults":
            self.faults = set(msgspec.json.decode(data))
            return
        text = durable(data) if data.startswith(b"\x01n") else data.decode()
        topic = channel.decode().removeprefix("topic:")
        if channel.startswith(b"topic:"):
            text = topical(topic, data)
        number = msgspec.json.decode(text)["payload"]["n"]
        for user, connection in list(self.connections.items()):
            ours = {"channels:broadcast", f"user_noti:{user}", *self.joined[user]}
            if topic in ours:
                with contextlib.suppress(ConnectionClosed):
                    await self.deliver(connection, number, text)

    async def deliver(self, connection: ServerConnection, number: int, text: str) -> None:
        """Send one message, or do to it what is ordered for its number."""
        fault = FAULTS.get(number % 10)
        if fault not in self.faults:
            fault = None
        match fault:
            case "lost":
                return
            case "closed":
                await connection.close(1001)
                return
            case "reordered":
                self.held = text
                return
            case "stray":
                await connection.send('{"type":"surprise"}')
            case "misnumbered":
                text = text.replace('"seq":', '"seq":1')
            case "elsewhere":
                text = text.replace('"topic":"', '"topic":"not-')
        await connection.send(text)
        if fault == "doubled":
            await connection.send(text)
        if self.held is not None:
            late, self.held = self.held, None
            await connection.send(late)


async def work(port: int, redis_port: int) -> None:
    """Serve until killed."""
    faulty = Faulty()
    reader, writer = await asyncio.open_connection("127.0.0.1", redis_port)
    writer.write(b"PSUBSCRIBE user_noti:* topic:*\r\nSUBSCRIBE channels:broadcast faults\r\n")
    parser = hiredis.Reader(notEnoughData=Ellipsis)
    async with serve(faulty.serve, "127.0.0.1", port, process_request=faulty.refuse):
        while data := await reader.read(65536):
            parser.feed(data)
            while (message := parser.gets()) is not Ellipsis:
                if message[0] in {b"message", b"pmessage"}:
                    await faulty.publish(message[-2], message[-1])


def main(port: str, redis_port: str) -> None:
    """Run one worker, as a child, until a signal."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        asyncio.run(work(int(port), int(redis_port)))
        os._exit(1)

    def stop(*_: object) -> None:
        os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGINT, stop)
    os.waitpid(child, 0)


if __name__ == "__main__":
    main(*sys.argv[1:3])
