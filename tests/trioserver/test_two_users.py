"""Two users of one server: whatever the one says, of the other it learns and changes nothing.

The real command and a real Redis. One user has secrets; the other knows all that could be known
of them without being sent them (ids, positions, names of devices) and tries everything, under
names made to be mistaken for others. Redis' MONITOR shows on whose keys the server works for it.
"""

import itertools
import json
import re
import socket
from collections.abc import Iterator
from typing import Final

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.integration.clients import token
from tests.integration.crowds import Crowd, Visit, Visitor
from tests.integration.measuring import address
from tests.redis_server import RedisServer
from tests.running import SECRET, running
from trioserver.ledger import Accepted, encoded, partition
from trioserver.messages import MAX_POSITION
from trioserver.position import NOWHERE
from trioserver.publisher import Publisher
from trioserver.resp import pack
from trioserver.settings import Settings

MARK: Final = "nobody-elses-business"
"""In everything that is only for its owner."""

STRANGE: Final = ("*", "?", "[a-z]", "{x}", "}{", "%2A", "%", ":", "/../", " ", "é", "\\")
"""What means something to Redis, in names of keys, or where those are made."""

UNHURRIED: Final = Settings(jwt_secret_key=SECRET, notifications_per_minute_per_user=0)
ENVIRON: Final = {
    "HANDSHAKES_PER_SECOND": "0",
    "MAX_CONNECTIONS_PER_USER": "0",
    "MESSAGES_PER_MINUTE_PER_USER": "0",
}
ASKING: Final = ("subscribe", "history", "presence", "publish", "resume", "message")
PHONE: Final = "phone"
SECONDS: Final = 20.0
"""For what takes a moment."""

KEY: Final = re.compile(
    r"(?:test:)?ts:\{(?:p[0-6][0-9]|t[01][0-9]|all|fleet|revoked)\}:[A-Za-z0-9_.@%:-]*"
)
"""Of any key that the server makes: one slot, and nothing in it as users write it."""

NO_KEYS: Final = frozenset({"PUBLISH", "TIME", "SPUBLISH"})
"""Commands that the scripts use and that have none; a channel is called as its user is."""

_numbers = itertools.count()


class Spy:
    """What Redis is asked to do, and by whom."""

    def __init__(self, redis: RedisServer) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SECONDS)
        self._socket.connect(str(redis.path))
        self._redis = redis
        self._data = ""
        self._socket.sendall(pack("MONITOR"))
        self._barriers = itertools.count()

    def close(self) -> None:
        """Look no more."""
        self._socket.close()

    def keys(self) -> set[str]:
        """Return the keys that the server has worked on since the last call."""
        barrier = f"barrier-{next(self._barriers)}"
        self._redis.command("ECHO", barrier)
        while f'"{barrier}"' not in self._data:
            self._data += self._socket.recv(1 << 16).decode("latin-1")
        seen, _, self._data = self._data.partition(f'"{barrier}"')
        return {key for line in seen.splitlines() for key in self._keys(line)}

    def _keys(self, line: str) -> Iterator[str]:
        match = re.fullmatch(r"\+?[0-9.]+ \[\d+ ([^\]]+)\] (.*)", line)
        # Scripts are seen twice: as they are called, and with what they call.
        if match is None or match[1].startswith("unix:"):
            return
        command, *words = re.findall(r'"((?:[^"\\]|\\.)*)"', match[2])
        if command in {"EVALSHA", "EVAL"}:
            yield from words[2 : 2 + int(words[1])]
        elif match[1] == "lua" and command.upper() not in NO_KEYS:
            yield from words[:1]


class Stage:
    """A server, its Redis, and clients."""

    def __init__(self, redis: RedisServer, crowd: Crowd) -> None:
        self.redis = redis
        self.crowd = crowd
        self.publisher = Publisher(redis.unix_url, settings=UNHURRIED)

    def join(self, user: str, query: str = "") -> Visitor:
        """Connect; return when the first message has come, or there will be none."""
        (visitor,) = self.crowd.come([Visit(user=user, query=query)], SECONDS)
        return visitor

    def ask(self, visitor: Visitor, message: dict[str, object]) -> None:
        """Say something, and listen until it has an answer and all before it has come."""
        visitor.say(message | {"ref": "r"})
        self.listen(visitor, "r")
        visitor.say({"type": "ping", "ref": "barrier"})
        self.listen(visitor, "barrier")

    def listen(self, visitor: Visitor, ref: str) -> None:
        """Listen until the answer to a message has come, or the end."""
        before = len([one for one in visitor.messages if one.get("ref") == ref])

        def answered() -> bool:
            return len([one for one in visitor.messages if one.get("ref") == ref]) > before

        self.crowd.wait(lambda: visitor.over or answered(), f"an answer to {ref}", SECONDS)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One worker, which lives through all of it without a traceback."""
    with (
        RedisServer(tmp_path_factory.mktemp("redis")) as redis,
        running(
            tmp_path_factory.mktemp("server"), workers=1, environ=ENVIRON | {"REDIS_URL": redis.url}
        ) as server,
        Crowd(address(server)) as crowd,
    ):
        made = Stage(redis, crowd)
        yield made
        made.publisher.close()
        assert "Traceback" not in server.log


devices = st.sampled_from(["", PHONE, *(one for one in STRANGE if one.isascii() and one != " ")])
names = st.tuples(st.sampled_from(["", "u"]), st.sampled_from(["", *STRANGE])).map("".join)


class TwoUsers(RuleBasedStateMachine):
    """A victim, who is sent secrets, and an attacker, who says whatever comes to mind."""

    secrets = Bundle[Accepted]("secrets")

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage
        self.spy = Spy(stage.redis)
        self.sent: list[str] = []
        """Ids of the secrets."""
        self.attackers: list[Visitor] = []
        self.now: Visitor | None = None
        """The attacker's connection."""
        self.epoch = ""
        """Names the history of the victim's notifications."""
        self.own = 0
        self.came = False
        """Whether the victim has been there."""

    @initialize(target=secrets, victim=names, attacker=names, near=st.booleans())
    def meet(self, victim: str, attacker: str, *, near: bool) -> Accepted:
        """Let there be two, each example its own; half of them share a partition."""
        number = next(_numbers)
        self.victim, self.attacker = f"{victim}{number}", f"{attacker}{number}"
        tail = itertools.count()
        while self.victim == self.attacker or (
            near and partition(self.victim) != partition(self.attacker)
        ):
            self.attacker = f"{attacker}{number}*{next(tail)}"
        return self._secret()

    @rule(target=secrets)
    def tell_the_victim(self) -> Accepted:
        """Publish a secret."""
        return self._secret()

    def _secret(self) -> Accepted:
        accepted = self.stage.publisher.publish(f"{MARK}-{len(self.sent)}", user=self.victim)
        self.sent.append(accepted.id)
        self.epoch = accepted.position.split(".")[1]
        return accepted

    @rule()
    def tell_whoever_listens_to_the_victim(self) -> None:
        """Publish a secret that is kept nowhere."""
        message = json.dumps({"type": "told", "payload": MARK})
        self.stage.redis.command("PUBLISH", f"user_noti:{self.victim}", message)

    @rule()
    def tell_the_attacker(self) -> None:
        """Publish something that the attacker may know."""
        self.stage.publisher.publish(self.own, user=self.attacker)
        self.own += 1

    @rule(data=st.data(), known=secrets, device=devices, ack=st.booleans(), early=st.booleans())
    def come(
        self, data: st.DataObject, known: Accepted, device: str, *, ack: bool, early: bool
    ) -> None:
        """Connect with the victim's position, or parts of it, and its device's name."""
        position = data.draw(self._positions(known.position))
        self._come({"device": device, "position": position}, ack=ack, early=early)

    def _come(self, wish: dict[str, str], *, ack: bool = False, early: bool) -> None:
        self.leave()
        self._quiet()
        wish = {name: value for name, value in wish.items() if value}
        if early:
            query = "&".join(f"{name}={_quoted(value)}" for name, value in wish.items())
            visitor = self.stage.join(self.attacker, f"{query}&ack={ack:d}")
        else:
            visitor = self._nameless(wish | {"ack": ack})
        self.now = visitor if visitor.staying else None
        self.attackers.append(visitor)
        self._look()

    def _nameless(self, wish: dict[str, object]) -> Visitor:
        """Connect, and say the rest in a message."""
        crowd = self.stage.crowd
        (visitor,) = crowd.send([Visit(user="")])
        crowd.wait(lambda: visitor.status is not None, "the handshake", SECONDS)
        assert 101 == visitor.status
        visitor.say({"type": "auth", "token": token(self.attacker), "ref": "a"} | wish)
        crowd.wait(lambda: visitor.messages or visitor.over, "an answer", SECONDS)
        return visitor

    @precondition(lambda self: self.now)
    @rule(known=secrets, by=st.sampled_from(["id", "seq"]))
    def acknowledge(self, known: Accepted, by: str) -> None:
        """Acknowledge what is the victim's."""
        self.say({"type": "ack", by: getattr(known, by)})

    @precondition(lambda self: self.now)
    @rule(known=secrets, up_to=st.sampled_from(["", "id", "seq"]))
    def mark(self, known: Accepted, up_to: str) -> None:
        """Mark as read what is the victim's."""
        which = {"up_to": getattr(known, up_to)} if up_to else {"ids": [known.id]}
        self.say({"type": "read", **which})

    @precondition(lambda self: self.now)
    @rule(
        data=st.data(),
        kind=st.sampled_from(ASKING),
    )
    def ask_for_it(self, data: st.DataObject, kind: str) -> None:
        """Ask for the victim's channel by all names that it might have."""
        name = encoded(self.victim)
        channel = data.draw(
            st.sampled_from(
                [
                    *(f"user_noti:{self.victim}", f"user:{self.victim}", "*", "user_noti:*"),
                    *(f"user_noti:{self.attacker}\nuser_noti:{self.victim}", f"*:inbox:{name}"),
                ]
            )
        )
        self.say({"type": kind, "channel": channel, "user": self.victim, "payload": channel})

    @precondition(lambda self: self.now)
    @rule()
    def become(self) -> None:
        """Go on as the victim, with a token that was found: not on this connection."""
        visitor = self.now
        assert visitor is not None
        self._quiet()
        visitor.say({"type": "refresh", "token": token(self.victim)})
        self.stage.crowd.wait(lambda: visitor.over, "the end", SECONDS)
        self.now = None
        assert (4403, "forbidden") == visitor.closing
        self._look()

    @precondition(lambda self: not self.came)
    @rule()
    def be_the_victim(self) -> None:
        """Connect as the victim for a moment, so that there is a device to be mistaken for."""
        visitor = self.stage.join(self.victim, f"device={PHONE}")
        self.stage.crowd.leave([visitor])
        self.came = True
        self.spy.keys()

    def say(self, message: dict[str, object]) -> None:
        """Say something, take what comes, and look at it."""
        visitor = self.now
        assert visitor is not None
        self._quiet()
        self.stage.ask(visitor, message)
        if visitor.over:
            self.now = None
        self._look()

    def leave(self) -> None:
        """Let the attacker hang up, as usual."""
        if self.now is not None:
            self.stage.crowd.leave([self.now])
            self.now = None

    def _quiet(self) -> None:
        """Forget what was asked of Redis on other accounts."""
        self.spy.keys()

    def _look(self) -> None:
        """Look at what the attacker has got, and on whose account Redis was asked."""
        for visitor in self.attackers:
            got = json.dumps(visitor.messages, ensure_ascii=False)
            assert MARK not in got
            assert not [one for one in self.sent if one in got]
        keys = self.spy.keys()
        assert not [key for key in keys if not KEY.fullmatch(key)]
        if not self.came:
            assert not [key for key in keys if key.endswith(f":{encoded(self.victim)}")]

    def _positions(self, known: str) -> st.SearchStrategy[str]:
        """Return positions as the victim has them, put together in all ways."""
        _, epoch, rest = known.split(".", 2)
        mine = [one["position"] for each in self.attackers for one in each.messages
                if "position" in one]  # fmt: skip
        parts = st.sampled_from([f"{epoch}.{rest}", NOWHERE, *(one[2:] for one in mine[-3:])])
        return st.one_of(
            st.just(known),
            st.just(""),
            st.just(f"1.{epoch}.0-0"),
            st.builds("1.{}.{}".format, parts, parts),
            st.sampled_from(STRANGE).map(lambda strange: f"{known}{strange}"),
        ).filter(lambda position: len(position) <= MAX_POSITION)

    def teardown(self) -> None:
        """See that the victim has lost nothing, and that nobody has read it for him."""
        try:
            if hasattr(self, "victim"):
                self._check()
        finally:
            self.spy.close()
            self.stage.crowd.scatter()

    def _check(self) -> None:
        stage = self.stage
        self.leave()
        if not self.sent:
            return
        for one in self.sent:
            life = stage.publisher.notification(one)
            assert life is not None
            assert life.state in ({"accepted", "sent", "received"} if self.came else {"accepted"})
        # A client that knows which history it is in, and has seen nothing of it.
        visitor = stage.join(self.victim, f"position=1.{self.epoch}.0-0")
        assert visitor.established, visitor.messages
        stage.crowd.wait(lambda: len(_ids(visitor)) >= len(self.sent), "all of it", SECONDS)
        stage.ask(visitor, {"type": "message"})
        assert self.sent == _ids(visitor)
        unread = [one["unread"] for one in visitor.messages if "id" in one]
        assert len(self.sent) == unread[-1]


def _ids(visitor: Visitor) -> list[str]:
    """Return the ids of the notifications that a visitor has got."""
    return [one["id"] for one in visitor.messages if "seq" in one and "id" in one]


def _quoted(value: str) -> str:
    return "".join(f"%{byte:02X}" for byte in value.encode())


def test_what_is_known_of_a_user_is_of_no_use_to_another(stage: Stage) -> None:
    """Each way once: positions, devices, ids, numbers, channels, a token."""
    lives = TwoUsers(stage)
    try:
        known = lives.meet(victim="u", attacker="*", near=True)
        assert isinstance(known, Accepted)
        _, epoch, place = known.position.split(".")
        for early in (True, False):
            for position in (known.position, f"1.{epoch}.0-0", f"1.{NOWHERE}.{epoch}.{place}"):
                lives._come({"device": PHONE, "position": position}, ack=True, early=early)
            for by in ("id", "seq"):
                lives.acknowledge(known=known, by=by)
            for up_to in ("", "id", "seq"):
                lives.mark(known=known, up_to=up_to)
            for kind in ASKING:
                lives.say({"type": kind, "channel": f"user_noti:{lives.victim}"})
            lives.be_the_victim()
        lives._come({}, early=True)
        lives.become()
    finally:
        lives.teardown()


def _run(stage: Stage, examples: int, steps: int) -> None:
    class Here(TwoUsers):
        def __init__(self) -> None:
            super().__init__(stage)

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            # A shorter way to a failure is not worth the minutes of looking for it.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_one_user_learns_and_changes_nothing_of_another(stage: Stage) -> None:
    """Whatever it says, and whatever it is called."""
    _run(stage, 35, 25)


@pytest.mark.slow
@pytest.mark.timeout(1_200)
def test_one_user_learns_and_changes_nothing_of_another_in_two_thousand_lives(
    stage: Stage,
) -> None:
    """The same, for longer."""
    _run(stage, 2_000, 25)
