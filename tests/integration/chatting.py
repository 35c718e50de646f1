"""Chat clients that come back until everything they have said is answered, and keep a ledger of it.

    chatter = Chatter(address(server), user="ann", pause=0.1)
    nursery.start_soon(chatter.run)
    ...
    chatter.finish()

A message without an answer is said again under its id: on the next connection, or after ``error``
``unavailable``. On each connection but the first the latest answered message is said again, too:
its answer must be the old one.

A chatter may also say everything without ids. Then what is said again is another message, and its
`PlainLedger` holds the server to what it promises of those: on a connection the counts are 1, 2, 3,
and so on whatever has been refused, and the next one begins where the last one has ended, or later
by no more than what was not answered.
"""

import json
from collections.abc import Iterable
from typing import Any, Final

import trio

from tests.integration.clients import token
from tests.integration.measuring import Address
from tests.trioserver.wire import CLOSE, PING, PONG, TEXT, frame, head, split_frames, text

BURST: Final = 3
"""Messages said at once; fewer than a session remembers."""

BACK_SECONDS: Final = 0.05
"""Before a client comes back: while a worker is being replaced, connections end at once."""

READ_BYTES: Final = 1 << 16


FIRST: Final = "first"
AGAIN: Final = "again"
"""In refs, before the number of a message: whether it had an answer already."""


class Ledger:
    """What was answered to the messages of one session, and what is wrong with it."""

    def __init__(self) -> None:
        self.said = 0
        """Messages; they have the numbers from 1 on."""
        self.counts: dict[int, int] = {}
        """By number, as each was answered first."""
        self.repeats = 0
        """Answers that said they were repeated."""
        self._wrong: list[str] = []

    def say(self, messages: int) -> None:
        """Begin so many new messages."""
        self.said += messages

    def unanswered(self) -> list[int]:
        """Return the numbers of what must be said again, in order."""
        if len(self.counts) == self.said:
            return []
        return [number for number in range(1, self.said + 1) if number not in self.counts]

    def sent(self, messages: int) -> None:
        """Enter that so many are on their way; with their ids it does not matter."""

    def refused(self, messages: int) -> None:
        """Enter that so many were not counted; the same."""

    def cut_off(self) -> None:
        """Enter that the connection has ended; the same."""

    def answer(self, number: int, count: int, *, repeated: bool) -> None:
        """Enter an answer. A second one to a message must say that it is, and be the same."""
        self.repeats += repeated
        before = self.counts.setdefault(number, count)
        if not 1 <= number <= self.said:
            self._wrong.append(f"message {number} was never said")
        if before != count:
            self._wrong.append(f"message {number} was {before} and then {count}")

    def established(self, count: int | None, *, resumed: bool) -> None:
        """Enter what the first message on a connection says of the session."""
        if self.counts and not resumed:
            self._wrong.append("the session was forgotten")
        newest = max(self.counts.values(), default=0)
        if count is not None and not newest <= count <= self.said:
            self._wrong.append(f"{newest} are answered, {self.said} said, and it has {count}")

    def again(self, number: int, count: int, *, repeated: bool) -> None:
        """Enter an answer to a message that was said again although it had been answered."""
        if not repeated:
            self._wrong.append(f"message {number} was counted again, as {count}")
        self.answer(number, count, repeated=repeated)

    def complain(self, what: str) -> None:
        """Enter what must not happen."""
        self._wrong.append(what)

    def faults(self, stored: int) -> list[str]:
        """Return all that is wrong when everything is over.

        Args:
            stored: The count that Redis has.
        """
        found = list(self._wrong)
        if self.unanswered():
            found.append(f"never answered: {self.unanswered()}")
        counted = sorted(self.counts.values())
        skipped = set(range(1, max(counted, default=0) + 1)) - set(counted)
        if skipped:
            found.append(f"skipped: {sorted(skipped)}")
        if len(counted) != len(set(counted)):
            found.append(f"two messages with one count: {counted}")
        if stored != self.said:
            found.append(f"{self.said} messages, and {stored} are stored")
        return found


class PlainLedger(Ledger):
    """The same for messages without ids: of some nobody knows whether they were counted."""

    def __init__(self) -> None:
        super().__init__()
        self._last: int | None = 0
        """What the session has counted; None while this connection does not know it."""
        self._least = 0
        """What it has counted at least..."""
        self._doubtful = 0
        """... and how many more it may have: what was refused after that, or never answered."""
        self._under_way = 0

    def sent(self, messages: int) -> None:
        """Enter that so many are on their way."""
        self._under_way += messages

    def refused(self, messages: int) -> None:
        """Enter that so many are not counted, which is certain if this connection goes on."""
        self._under_way -= messages
        self._doubtful += messages

    def cut_off(self) -> None:
        """Enter that the connection has ended."""
        self._doubtful += self._under_way
        self._under_way, self._last = 0, None

    def established(self, count: int | None, *, resumed: bool) -> None:
        """Enter what the first message on a connection says of the session."""
        if self.counts and not resumed:
            self._wrong.append("the session was forgotten")
        if count is None:
            return
        if self._last is not None and count != self._last:
            self._wrong.append(f"it had {self._last}, and has {count}")
        if not self._least <= count <= self._least + self._doubtful:
            most = self._least + self._doubtful
            self._wrong.append(f"it has from {self._least} to {most}, and says {count}")
        self._last = self._least = count
        self._doubtful = 0

    def answer(self, number: int, count: int, *, repeated: bool) -> None:
        """Enter an answer: the next count, whatever was refused meanwhile."""
        if repeated or number in self.counts or not 1 <= number <= self.said:
            self._wrong.append(f"message {number} was not said, or not again")
        if self._last is None or count != self._last + 1:
            self._wrong.append(f"{self._last} was followed by {count}")
        self.counts[number] = self._last = self._least = count
        self._under_way -= 1
        self._doubtful = 0

    def faults(self, stored: int) -> list[str]:
        """Return all that is wrong when everything is over; see `Ledger.faults`."""
        found = list(self._wrong)
        if self.unanswered():
            found.append(f"never answered: {self.unanswered()}")
        if stored != self._least:
            found.append(f"the last was {self._least}, and {stored} are stored")
        return found


class _OverError(Exception):
    """The server has ended the connection."""


class Chatter:
    """One client with one session."""

    def __init__(self, where: Address, *, user: str, pause: float, plain: bool = False) -> None:
        self.ledger = PlainLedger() if plain else Ledger()
        self.session_id = ""
        self.connections = 0
        """How many were established."""
        self.refusals = 0
        """How often it was told ``unavailable``."""
        self._where = where
        self._user = user
        """Empty for an anonymous client."""
        self._plain = plain
        """Whether its messages have no ids."""
        self._pause = pause
        self._finished = False

    def finish(self) -> None:
        """Say nothing new; `run` returns when all is answered."""
        self._finished = True

    @property
    def over(self) -> bool:
        """Whether there is nothing left to say."""
        return self._finished and not self.ledger.unanswered()

    async def run(self) -> None:
        """Talk until finished, over as many connections as it takes."""
        while not self.over:
            try:
                async with await trio.open_tcp_stream(*self._where) as stream:
                    await self._talk(_Wire(stream))
            except (OSError, trio.BrokenResourceError, _OverError):
                self.ledger.cut_off()
                await trio.sleep(BACK_SECONDS)

    async def _talk(self, wire: "_Wire") -> None:
        query = f"?session_id={self.session_id}" if self.session_id else ""
        await wire.shake_hands(f"/ws/chat/{query}", token(self._user) if self._user else None)
        established, *more = await wire.hear()
        self._sit_down(established)
        if self.ledger.counts and not self._plain:
            await self._say(wire, [f"{AGAIN} {max(self.ledger.counts)}"])
        await self._say(wire, [f"{FIRST} {number}" for number in self.ledger.unanswered()])
        await self._take(wire, more)
        while not self.over:
            if not self.ledger.unanswered():
                await trio.sleep(self._pause)
                self.ledger.say(BURST)
                await self._say(wire, [f"{FIRST} {number}" for number in self.ledger.unanswered()])
            await self._take(wire, await wire.hear())

    async def _say(self, wire: "_Wire", refs: list[str]) -> None:
        self.ledger.sent(len(refs))
        await wire.say(refs, plain=self._plain)

    def _sit_down(self, message: dict[str, Any]) -> None:
        if message["type"] == "goodbye":
            # As it happens to those who come in the last moments of a worker.
            raise _OverError
        assert "connection_established" == message["type"], message
        self.connections += 1
        self.ledger.established(message["count"], resumed=message["resumed"])
        self.session_id = message["session_id"]

    async def _take(self, wire: "_Wire", messages: Iterable[dict[str, Any]]) -> None:
        refused = []
        for message in messages:
            kind = message["type"]
            if kind == "message_response":
                self._enter(message)
            elif kind == "error" and message["code"] == "unavailable":
                refused.append(message)
            elif kind == "connection_established":
                # What the first one could not say, for want of Redis.
                self.ledger.established(message["count"], resumed=message["resumed"])
            elif kind == "goodbye" and message["reason"] == "going_away":
                raise _OverError
            elif kind != "heartbeat":
                self.ledger.complain(f"not expected: {message}")
        if refused:
            self.refusals += len(refused)
            self.ledger.refused(len(refused))
            await trio.sleep(max(message["retry_after_ms"] for message in refused) / 1000)
            await self._say(wire, [message["ref"] for message in refused])

    def _enter(self, message: dict[str, Any]) -> None:
        which, _, number = message["ref"].partition(" ")
        message_id = None if self._plain else number
        if (message_id, number) != (message.get("id"), str(message["payload"])):
            self.ledger.complain(f"the answer of another message: {message}")
        enter = self.ledger.again if which == AGAIN else self.ledger.answer
        enter(int(number), message["count"], repeated=message.get("repeated", False))


class _Wire:
    """A connection, at the level of bytes. Its end is an `_OverError`."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._data = b""
        self._closed = False

    async def shake_hands(self, path: str, credential: str | None) -> None:
        """Ask for a WebSocket; whoever is refused for a moment may come again."""
        await self._stream.send_all(head(path, credential=credential))
        while b"\r\n\r\n" not in self._data:
            await self._read()
        answer, _, self._data = self._data.partition(b"\r\n\r\n")
        if answer.startswith(b"HTTP/1.1 503 "):
            raise _OverError
        assert answer.startswith(b"HTTP/1.1 101 "), answer

    async def say(self, refs: Iterable[str], *, plain: bool) -> None:
        """Send the messages with these refs, which end in their numbers; plain ones have no ids."""
        said = []
        for ref in refs:
            number = ref.rpartition(" ")[2]
            which = {} if plain else {"id": number}
            said.append({"type": "message", "payload": int(number), "ref": ref} | which)
        if said:
            await self._stream.send_all(b"".join(map(text, said)))

    async def hear(self) -> list[dict[str, Any]]:
        """Return the messages that have come; waits for the first."""
        heard: list[dict[str, Any]] = []
        while True:
            # Something may have come with the head.
            frames, self._data = split_frames(self._data)
            for opcode, payload in frames:
                if opcode == TEXT:
                    heard.append(json.loads(payload))
                elif opcode == PING:
                    await self._stream.send_all(frame(PONG, payload))
                elif opcode == CLOSE:
                    self._closed = True
            if heard:
                return heard
            if self._closed:
                raise _OverError
            await self._read()

    async def _read(self) -> None:
        data = await self._stream.receive_some(READ_BYTES)
        if not data:
            raise _OverError
        self._data += data
