"""The client of the load generator without a compiler: `client.c`, statement by statement.

It costs several times as much, so it is the bottleneck where the other is not; the results say so.
What it understands is described in `client.py`.

    python -m bench.slow_client PORT REDIS_PORT TOKENS_FILE PATIENCE_MS
"""

import array
import contextlib
import os
import re
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from bench import backend
from bench.client import Reply

NAP_SECONDS: Final = 0.0001
"""Let something come together. A client that looks at every message at once must be woken for every
message, and the one who wakes it pays: on the loopback that is the server in its send, for half of
its time; over a network it would be nobody."""

EVENTS: Final = 512
READ_BYTES: Final = 256 << 10
LARGEST_WINDOW: Final = 1024
ADDRESSES: Final = 8
"""One client address has 28,000 ports towards one server."""

IP_BIND_ADDRESS_NO_PORT: Final = 24

KEY: Final = "dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT: Final = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
"""The pair of RFC 6455, 1.3."""

MASK: Final = b"\x37\xfa\x21\x3d"
TEXT: Final = 0x81
CLOSE: Final = 0x88
PING: Final = 0x89
_SHORT: Final = 125
"""Longest payload with a head of two bytes."""

_NUMBER: Final = re.compile(rb'"n":(\d+)')
_COUNT: Final = re.compile(rb'"count":(\d+)')
_SEQ: Final = re.compile(rb'"seq":(\d+)')

_BEFORE_PAYLOAD: Final = b'{"type":"notification","payload":'

Progress = Callable[[], int]

GREETINGS: Final = 1
JOINED: Final = 2
"""What `open` waits for."""


class Peer:
    """One connection."""

    __slots__ = ("answered", "newest", "place", "rest", "seqs", "sock", "upgraded")

    def __init__(self, place: int, sock: socket.socket) -> None:
        self.place = place
        """Its number, and its user's: u0, u1, ..."""
        self.sock = sock
        self.upgraded = False
        self.rest = b""
        """The beginning of a frame whose end has not come yet."""
        self.answered = 0
        """By the end of the last phase."""
        self.newest = -1
        """Highest index of this phase."""
        self.seqs = 0
        """What the seq of a durable notification is ahead of its index; 0 while unknown."""


class Phase:
    """One command's worth of messages.

    Each message has an index for each peer that is to get it; a byte per peer and index tells what
    has come.
    """

    def __init__(self, kind: str, first: int, messages: int, each: int, peers: int) -> None:
        self.kind = kind
        self.first = first
        """Number of its first message; numbers go on from phase to phase."""
        self.messages = messages
        self.each = each
        self.expected = 0
        """How many are to come, over all peers."""
        self.received = 0
        self.replied = 0
        """Publishes that Redis has answered."""
        self.seen = bytearray(peers * each)
        self.start = 0
        self.interval = 0
        self.latency: array.array[int] | None = None
        self.topic = b""
        """What each message of a topic says of itself."""

    def asked_of(self, peer: Peer, peers: int) -> int:
        """Return how many messages this one of so many peers sends; it knows none beyond them."""
        if self.kind == "paced":
            return (self.expected - peer.place + peers - 1) // peers
        return self.each if self.kind == "echo" else 0

    def measure(self, place: int) -> None:
        """Keep how long a message of an open loop took, from when it was due."""
        if self.latency is not None:
            self.latency[place] = time.monotonic_ns() - (self.start + place * self.interval)


class SlowClient:
    """All connections, the publisher, and the counts since the last reply."""

    def __init__(self, port: int, redis_port: int, tokens: list[str], patience_ms: int) -> None:
        self._port = port
        self._tokens = tokens
        self._patience_ns = patience_ms * 1_000_000
        """Without progress for so long, the rest is lost."""
        self._peers: list[Peer] = []
        self._by_fd: dict[int, Peer] = {}
        self._upgraded = 0
        self._departed = 0
        self._epoll = select.epoll()
        self._redis = socket.create_connection(("127.0.0.1", redis_port))
        self._redis.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._publisher = backend.Link(redis_port)
        self._epoll.register(self._publisher.fileno(), select.EPOLLIN)
        self._redis.sendall(b"*3\r\n$6\r\nCLIENT\r\n$5\r\nREPLY\r\n$3\r\nOFF\r\n")
        self._phase = Phase("nothing", 0, 0, 0, 0)
        self._clear()

    def _clear(self) -> None:
        self._lost = self._doubled = self._reordered = self._failed = 0
        self._greeted = self._joined = self._pings = self._heartbeats = 0
        self._trouble = ""

    def _fail(self, peer: Peer | None, what: str, data: bytes = b"") -> None:
        self._failed += 1
        if not self._trouble:
            words = data[:100].decode("ascii", "replace")
            self._trouble = f"connection {peer.place if peer else -1}: {what} {words}"

    def _gone(self, peer: Peer, why: str, data: bytes = b"") -> None:
        self._fail(peer, why, data)
        self._departed += 1
        self._by_fd.pop(peer.sock.fileno(), None)
        peer.sock.close()

    # Sending

    def _send_frame(self, peer: Peer, opcode: int, payload: bytes) -> None:
        size = len(payload)
        key = int.from_bytes((MASK * ((size + 3) >> 2))[:size], "little")
        masked = (int.from_bytes(payload, "little") ^ key).to_bytes(size, "little")
        frame = bytes((0x80 | opcode, 0x80 | size)) + MASK + masked
        try:
            sent = peer.sock.send(frame)
        except OSError:
            sent = 0
        if sent != len(frame):
            self._gone(peer, "cannot send")

    def _send_echo(self, peer: Peer, index: int) -> None:
        number = peer.answered + index + 1
        self._send_frame(peer, 1, b'{"type":"message","payload":{"n":%d}}' % number)

    @staticmethod
    def _message(number: int, size: int) -> bytes:
        body = _BEFORE_PAYLOAD + b'{"n":%d,"pad":"' % number
        return body + b"x" * (size - 3 - len(body)) + b'"}}'

    def _publication(self, channel: bytes, number: int, size: int) -> bytes:
        body = self._message(number, size)
        return b"*3\r\n$7\r\nPUBLISH\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (
            len(channel),
            channel,
            len(body),
            body,
        )

    def _durable_publication(self, template: bytes, user: int, number: int, size: int) -> bytes:
        # Without what says the same as the arguments, and the brace at its end.
        payload = self._message(number, size)[len(_BEFORE_PAYLOAD) : -1]
        return backend.publication(template, f"u{user}", payload)

    def _take_replies(self) -> None:
        for reply in self._publisher.replies():
            self._phase.replied += 1
            if not isinstance(reply, list) or reply[-1] != b"accepted":
                self._fail(None, "not accepted:", str(reply).encode())

    # Receiving

    def _record(self, peer: Peer, index: int) -> bool:
        """Account for one index of the phase at ``peer``; return whether it is new."""
        phase = self._phase
        at = peer.place * phase.each + index
        if phase.seen[at]:
            self._doubled += 1
            return False
        phase.seen[at] = 1
        phase.received += 1
        if index < peer.newest:
            self._reordered += 1
        else:
            peer.newest = index
        return True

    def _take_notification(self, peer: Peer, text: bytes) -> None:
        phase = self._phase
        found = _NUMBER.search(text)
        place = int(found[1]) - phase.first if found else 0
        peers = len(self._peers)
        if not found or place >= phase.messages:
            self._fail(peer, "never published:", text)
        elif place < 0:
            self._doubled += 1  # Of an earlier phase.
        elif phase.kind == "fanout":
            if phase.topic not in text:
                self._fail(peer, "not of this topic:", text)
            self._record(peer, place)
        elif place % peers != peer.place:
            self._fail(peer, "not for this user:", text)
        elif self._record(peer, place // peers):
            phase.measure(place)
            if phase.kind == "durable":
                self._check_seq(peer, place // peers, text)

    def _check_seq(self, peer: Peer, index: int, text: bytes) -> None:
        """Compare the seq with that of the first that came, which says all the others.

        The ledger counts what it accepts for a user, without a hole and in the order of publishing.
        """
        found = _SEQ.search(text)
        seq = int(found[1]) if found else -1
        if not peer.seqs and seq > index:
            peer.seqs = seq - index
        if seq != peer.seqs + index:
            self._fail(peer, "not its seq:", text)

    def _take_answer(self, peer: Peer, text: bytes) -> None:
        phase = self._phase
        counted, echoed = _COUNT.search(text), _NUMBER.search(text)
        count = int(counted[1]) if counted else 0
        index = count - 1 - peer.answered
        peers = len(self._peers)
        asked = phase.asked_of(peer, peers)
        if count < 1 or (echoed and int(echoed[1]) != count) or index >= asked:
            self._fail(peer, "never asked for:", text)
        elif index < 0:
            self._doubled += 1
        elif self._record(peer, index):
            if phase.kind == "paced":
                phase.measure(index * peers + peer.place)
            elif index + 1 < phase.each:
                self._send_echo(peer, index + 1)

    def _take_text(self, peer: Peer, text: bytes) -> None:
        if text.startswith(b'{"type":"notification"'):
            self._take_notification(peer, text)
        elif text.startswith(b'{"type":"message_response"'):
            self._take_answer(peer, text)
        elif text.startswith(b'{"type":"connection_established"'):
            self._greeted += 1
        elif text.startswith(b'{"type":"subscribed"'):
            self._joined += 1
        elif text.startswith(b'{"type":"heartbeat"'):
            self._heartbeats += 1
        else:
            self._fail(peer, "not expected:", text)

    def _take_frame(self, peer: Peer, data: bytes, start: int) -> int:
        """Process the frame at ``start``; return where it ends, ``start`` if it is incomplete."""
        available = len(data) - start
        if available < 2:  # noqa: PLR2004 - the shortest head
            return start
        length, head = data[start + 1], 2
        if length > _SHORT:
            head = 4 if length == _SHORT + 1 else 10
            length = int.from_bytes(data[start + 2 : start + head], "big")
        end = start + head + length
        if available < head or end > len(data):
            return start
        payload = data[start + head : end]
        if data[start] == TEXT:
            self._take_text(peer, payload)
        elif data[start] == PING:
            self._pings += 1
            self._send_frame(peer, 10, payload)
        elif data[start] == CLOSE:
            self._gone(peer, "closed by the server", payload[2:])
        else:
            self._gone(peer, "no frame of ours")
        return end

    def _take_head(self, peer: Peer, data: bytes) -> int:
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:  # noqa: PLR2004 - not found
            return 0
        if not data.startswith(b"HTTP/1.1 101 ") or ACCEPT not in data[:end]:
            self._gone(peer, "refused:", data[:end])
            return end
        peer.upgraded = True
        self._upgraded += 1
        return end

    def _readable(self, peer: Peer) -> None:
        try:
            data = peer.sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._gone(peer, "connection lost")
            return
        if peer.rest:
            data = peer.rest + data
        taken = 0 if peer.upgraded else self._take_head(peer, data)
        before = -1
        while peer.upgraded and taken != before and peer.sock.fileno() >= 0:
            before = taken
            taken = self._take_frame(peer, data, taken)
        peer.rest = data[taken:]

    def turn(self, seconds: float) -> None:
        """Process what has come; wait for it for at most so long."""
        by_fd = self._by_fd
        for fd, _ in self._epoll.poll(seconds, EVENTS):
            peer = by_fd.get(fd)
            if peer is not None:
                self._readable(peer)
            elif fd == self._publisher.fileno():
                self._take_replies()

    def _reach(self, progress: Progress, goal: int) -> bool:
        """Turn until ``progress()`` is ``goal``; return False if nothing moves any more."""
        seen, deadline = progress(), time.monotonic_ns() + self._patience_ns
        while (now := progress()) < goal:
            self.turn(0.1)
            time.sleep(NAP_SECONDS)
            if now != seen:
                seen, deadline = now, time.monotonic_ns() + self._patience_ns
            elif time.monotonic_ns() > deadline:
                return False
        return True

    def _received(self) -> int:
        return self._phase.received

    def _replied(self) -> int:
        return self._phase.replied

    # Commands

    def perform(self, line: str) -> Reply:
        """Do what a line says, and say what became of it."""
        wall, cpu = time.monotonic_ns(), time.process_time_ns()
        units = self._command(line.split(maxsplit=4))
        reply = Reply(
            units=units,
            wall_ns=time.monotonic_ns() - wall,
            cpu_ns=time.process_time_ns() - cpu,
            lost=self._lost,
            doubled=self._doubled,
            reordered=self._reordered,
            failed=self._failed,
            greeted=self._greeted,
            joined=self._joined,
            pings=self._pings,
            heartbeats=self._heartbeats,
            trouble=self._trouble,
        )
        self._clear()
        return reply

    def _command(self, words: list[str]) -> int:
        match words:
            case "open", count, concurrency, awaited, path:
                return self._open(int(count), int(concurrency), int(awaited), path.strip())
            case "fanout", messages, size, *topic:
                return self._fanout(int(messages), int(size), "".join(topic))
            case ("unicast" | "durable") as kind, messages, size, window, *path:
                return self._in_rounds(kind, int(messages), int(size), int(window), path)
            case "echo", each:
                return self._echo(int(each))
            case "latency" | "paced", messages, rate, *size, path:
                sizes = [int(one) for one in size]
                return self._open_loop(int(messages), int(rate), sizes, Path(path.strip()))
            case ["counts"]:
                return 0
        sys.exit(f"client: not understood: {words}")

    def _begin(self, kind: str, messages: int, each: int, expected: int) -> Phase:
        first = self._phase.first + self._phase.messages
        self._phase = Phase(kind, first, messages, each, len(self._peers))
        self._phase.expected = expected
        for peer in self._peers:
            peer.newest = -1
        return self._phase

    def _end(self) -> int:
        phase, peers = self._phase, len(self._peers)
        self._lost += phase.expected - phase.received
        for peer in self._peers:
            peer.answered += phase.asked_of(peer, peers)
        if phase.kind == "durable":
            for peer in self._peers:
                if peer.seqs:
                    peer.seqs += (phase.messages - peer.place + peers - 1) // peers
        self._phase = Phase("nothing", phase.first + phase.messages, 0, 0, 0)
        return phase.received

    def _connect(self, path: str) -> None:
        place = len(self._peers)
        sock = socket.socket()
        peer = Peer(place, sock)
        self._peers.append(peer)
        sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # No TIME_WAIT: the next run needs the ports.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.settimeout(5)
        request = (
            f"GET {path}?token={self._tokens[place]} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\n"
            f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {KEY}\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n"
        )
        try:
            sock.bind((f"127.0.0.{1 + place % ADDRESSES}", 0))
            sock.connect(("127.0.0.1", self._port))
            sock.sendall(request.encode())
        except OSError as error:
            self._gone(peer, f"cannot connect: {error}")
            return
        sock.setblocking(False)
        self._by_fd[sock.fileno()] = peer
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def _open(self, count: int, concurrency: int, awaited: int, path: str) -> int:
        before, departed = self._upgraded, self._departed
        count = min(count, len(self._tokens) - len(self._peers))
        started = settled = 0
        deadline = time.monotonic_ns() + self._patience_ns
        while settled < count and time.monotonic_ns() < deadline:
            while started < count and started - settled < concurrency:
                self._connect(path)
                started += 1
            self.turn(0.1)
            time.sleep(NAP_SECONDS)
            now = self._upgraded - before + self._departed - departed
            if now != settled:
                settled, deadline = now, time.monotonic_ns() + self._patience_ns
        opened = self._upgraded - before
        self._failed += max(0, count - settled)
        if awaited & GREETINGS and not self._reach(lambda: self._greeted, opened):
            self._lost += opened - self._greeted
        if awaited & JOINED and not self._reach(lambda: self._joined, opened):
            self._lost += opened - self._joined
        return opened

    def _fanout(self, messages: int, size: int, topic: str) -> int:
        receivers = len(self._by_fd)
        phase = self._begin("fanout", messages, messages, messages * receivers)
        channel = b"channels:broadcast"
        if topic:
            channel, phase.topic = b"topic:" + topic.encode(), f'"topic":"{topic}"'.encode()
        for place in range(messages):
            self._redis.sendall(self._publication(channel, phase.first + place, size))
            if not self._reach(self._received, (place + 1) * receivers):
                break
        return self._end()

    def _in_rounds(self, kind: str, messages: int, size: int, window: int, path: list[str]) -> int:
        template = Path(path[0].strip()).read_bytes() if path else b""
        phase = self._begin(kind, messages, -(-messages // len(self._peers)), messages)
        for sent in range(0, messages, window):
            stop = min(sent + window, messages)
            if not path:
                self._publish_users(phase, range(sent, stop), size)
            else:
                self._publish_durably(phase, range(sent, stop), size, template)
            if not self._reach(self._received, stop):
                break
            if path and not self._reach(self._replied, stop):
                break
        return self._end()

    def _publish_durably(self, phase: Phase, places: range, size: int, template: bytes) -> None:
        peers = len(self._peers)
        commands = [
            self._durable_publication(template, at % peers, phase.first + at, size) for at in places
        ]
        self._publisher.send(b"".join(commands))

    def _publish_users(self, phase: Phase, places: range, size: int) -> None:
        peers = len(self._peers)
        self._redis.sendall(
            b"".join(
                self._publication(b"user_noti:u%d" % (at % peers), phase.first + at, size)
                for at in places
            )
        )

    def _echo(self, each: int) -> int:
        peers = list(self._by_fd.values())
        phase = self._begin("echo", 0, each, each * len(peers))
        for peer in peers if each else ():
            self._send_echo(peer, 0)
        self._reach(self._received, phase.expected)
        return self._end()

    def _open_loop(self, messages: int, rate: int, sizes: list[int], path: Path) -> int:
        """Start messages at a fixed rate, each when it is due.

        With a size they are published to users, without one the connections say them.
        """
        kind, numbers = ("unicast", messages) if sizes else ("paced", 0)
        phase = self._begin(kind, numbers, -(-messages // len(self._peers)), messages)
        late = array.array("q", [-1]) * messages
        latency = phase.latency = array.array("q", [-1]) * messages
        phase.interval = 1_000_000_000 // rate
        phase.start = time.monotonic_ns() + 1_000_000
        sent, seen, deadline = 0, -1, 0
        while phase.received < messages:
            now = time.monotonic_ns()
            due = min((now - phase.start) // phase.interval + 1, messages, sent + LARGEST_WINDOW)
            if due > sent:
                for place in range(sent, due):
                    late[place] = now - (phase.start + place * phase.interval)
                self._start(phase, range(sent, due), sizes)
                sent = due
            if sent + phase.received != seen:
                seen, deadline = sent + phase.received, now + self._patience_ns
            elif now > deadline:
                break
            self._turn_until(phase.start + sent * phase.interval if sent < messages else None)
            if not sizes:
                time.sleep(NAP_SECONDS)
        path.write_bytes(struct.pack(f"{2 * messages}q", *_interleaved(late, latency)))
        return self._end()

    def _start(self, phase: Phase, places: range, sizes: list[int]) -> None:
        for size in sizes:
            self._publish_users(phase, places, size)
        peers = self._peers
        for at in places if not sizes else ():
            peer = peers[at % len(peers)]
            if peer.sock.fileno() >= 0:
                self._send_echo(peer, at // len(peers))

    def _turn_until(self, moment_ns: int | None) -> None:
        """Wait until something comes or that moment does; an epoll alone waits whole ms."""
        seconds = 0.1
        if moment_ns is not None:
            seconds = max(0.0, (moment_ns - time.monotonic_ns()) / 1e9)
        if select.select([self._epoll], [], [], seconds)[0]:
            self.turn(0)

    def serve(self) -> None:
        """Obey standard input until it ends."""
        waiting = select.poll()
        waiting.register(0, select.POLLIN)
        waiting.register(self._epoll.fileno(), select.POLLIN)
        line = b""
        while True:
            ready = dict(waiting.poll())
            if self._epoll.fileno() in ready:
                self.turn(0)
            if 0 not in ready:
                continue
            part = os.read(0, 2000)
            if not part:
                return  # Whoever started this has no more to ask.
            line += part
            if line.endswith(b"\n"):
                answer = msgspec.json.encode(self.perform(line.decode()))
                os.write(1, answer + b"\n")
                line = b""


def _interleaved(late: "array.array[int]", latency: "array.array[int]") -> list[int]:
    return [value for pair in zip(late, latency, strict=True) for value in pair]


def main(port: str, redis_port: str, tokens: str, patience_ms: str) -> None:
    """Run the client."""
    names = Path(tokens).read_text().split()
    with contextlib.suppress(KeyboardInterrupt):
        SlowClient(int(port), int(redis_port), names, int(patience_ms)).serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
