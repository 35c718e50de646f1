"""A herd that resumes and resumes: byte-level clients on one epoll, as fast as Python can.

Each member keeps its position, takes a few notifications, breaks the connection wherever it
stands and comes back at once. It has only one thing to find out: whether seqs go up one by one.
"""

import contextlib
import random
import select
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Final
from urllib.parse import quote

import msgspec

from tests.integration.clients import token
from tests.trioserver.wire import CLOSE, PING, PONG, TEXT, frame, head, split_frames

MOST_TAKEN: Final = 6
"""Notifications before a member leaves again: few enough to leave amid a backlog, too."""

POLL_SECONDS: Final = 0.05
READ_BYTES: Final = 1 << 16
_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER: leave by RST, which keeps no port waiting."""


class _Said(msgspec.Struct, frozen=True):
    """As much of a message as matters here."""

    type: str
    seq: int = 0
    id: str = ""
    position: str = ""
    reason: str = ""


_said = msgspec.json.Decoder(_Said)


class Member:
    """One client, through all its connections.

    Attributes:
        user: Its user.
        reached: The seq of the newest notification it has taken.
        ids: Of all it has taken: the first has seq 1.
        resumes: How often it was accepted with a position.
        greeted: Whether `connection_established` has come on this connection.
    """

    def __init__(self, user: str, credential: str) -> None:
        self.user = user
        self.reached = 0
        self.ids: list[str] = []
        self.resumes = 0
        self.greeted = False
        self.sock: socket.socket | None = None
        self._credential = credential
        self._position = ""
        self._data = b""
        self._upgraded = False

    def request(self) -> bytes:
        """Return the head of its next handshake."""
        path = f"/ws?position={quote(self._position)}" if self._position else "/ws"
        return head(path, credential=self._credential)

    def begin(self, sock: socket.socket) -> None:
        """Start over on a new connection."""
        self.sock, self._data, self._upgraded, self.greeted = sock, b"", False, False

    def take(self, data: bytes) -> tuple[list[str], bytes]:
        """Take what came; return what is wrong with it, and what to answer."""
        self._data += data
        if not self._upgraded:
            answer, end, rest = self._data.partition(b"\r\n\r\n")
            if not end:
                return [], b""
            if b" 101 " not in answer:
                return [f"{self.user} was answered {answer!r}"], b""
            self._upgraded, self._data = True, rest
            self.resumes += bool(self._position)
        frames, self._data = split_frames(self._data)
        wrong: list[str] = []
        replies = b""
        for opcode, payload in frames:
            if opcode == TEXT:
                wrong += self._hear(_said.decode(payload))
            elif opcode == PING:
                replies += frame(PONG, payload)
            elif opcode == CLOSE:
                wrong.append(f"{self.user} at {self.reached} was closed: {payload!r}")
        return wrong, replies

    def _hear(self, said: _Said) -> list[str]:
        wrong = []
        self.greeted = self.greeted or said.type == "connection_established"
        if said.type == "gap" or said.reason == "unavailable":
            wrong.append(f"{self.user} at {self.reached}: {said}")
        elif said.type == "notification":
            if said.seq != self.reached + 1:
                wrong.append(f"{self.user} at {self.reached}: {said}")
            self.reached = said.seq
            self.ids.append(said.id)
        self._position = said.position or self._position
        return wrong


class Herd:
    """Members that resume until there were enough.

    Attributes:
        wrong: What should not be.
        lost: Connections that the server broke; it has no reason to.
    """

    def __init__(self, address: tuple[str, int], users: Sequence[str], each: int) -> None:
        credentials: Mapping[str, str] = {user: token(user) for user in users}
        self.members = [Member(user, credentials[user]) for user in users for _ in range(each)]
        self.wrong: list[str] = []
        self.lost = 0
        self._address = address
        self._dice = random.Random(len(users))
        self._epoll = select.epoll()
        self._by_fd: dict[int, Member] = {}
        self._quota: dict[Member, int] = {}
        self._leaving = False

    @property
    def resumes(self) -> int:
        """How often somebody has come back."""
        return sum(member.resumes for member in self.members)

    def gather(self, seconds: float) -> None:
        """Connect everybody, and wait until all have been greeted."""
        deadline = time.monotonic() + seconds
        for member in self.members:
            self._enter(member)
        while not all(member.greeted for member in self.members):
            assert time.monotonic() < deadline, "not everybody was greeted"
            self._turn()

    def resume(self, goal: int, seconds: float) -> None:
        """Let them come and go until there were ``goal`` resumes, or the time is over."""
        self._leaving = True
        deadline = time.monotonic() + seconds
        while self.resumes < goal and time.monotonic() < deadline:
            self._turn()

    def stampede(self) -> None:
        """Let everybody leave and come back at once, and stay."""
        self._leaving = False
        for member in self.members:
            self._leave(member)
            self._enter(member)

    def settle(self, heads: Mapping[str, int], seconds: float) -> None:
        """Wait until all of each user's members have reached its newest seq; else it is wrong."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if all(member.reached >= heads[member.user] for member in self.members):
                return
            self._turn()
        self.wrong += [
            f"{member.user} is at {member.reached} of {heads[member.user]} after {seconds} s"
            for member in self.members
            if member.reached < heads[member.user]
        ]

    def close(self) -> None:
        """Leave for good."""
        for member in self.members:
            self._leave(member)
        self._epoll.close()

    def _turn(self) -> None:
        for descriptor, _ in self._epoll.poll(POLL_SECONDS):
            member = self._by_fd.get(descriptor)
            if member is not None:
                self._read(member)

    def _enter(self, member: Member) -> None:
        # The loopback connects at once, unless the accept queue is full; then waiting is right.
        sock = socket.create_connection(self._address, timeout=5)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        sock.sendall(member.request())
        sock.setblocking(False)
        member.begin(sock)
        self._by_fd[sock.fileno()] = member
        self._epoll.register(sock, select.EPOLLIN)
        self._quota[member] = member.reached + self._dice.randint(1, MOST_TAKEN)

    def _leave(self, member: Member) -> None:
        sock = member.sock
        if sock is not None:
            member.sock = None
            del self._by_fd[sock.fileno()]
            self._epoll.unregister(sock)
            sock.close()

    def _read(self, member: Member) -> None:
        sock = member.sock
        assert sock is not None
        try:
            data = sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.lost += 1
            self._leave(member)
            self._enter(member)
            return
        wrong, replies = member.take(data)
        self.wrong += wrong
        if replies:
            with contextlib.suppress(OSError):
                sock.send(replies)
        if self._leaving and member.reached >= self._quota[member]:
            self._leave(member)
            self._enter(member)
