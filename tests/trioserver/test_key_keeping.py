"""Keeping an issuer's keys: a real server that is slow, broken, huge, elsewhere or gone."""

import itertools
import json
import random
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any, Final

import attrs
import jwt
import pytest
import structlog
import trio
from cryptography.hazmat.primitives.asymmetric import ec
from structlog.typing import FilteringBoundLogger
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.trioserver import wire
from tests.trioserver.issuer import Answer, Issuer, repeats, response, says
from tests.trioserver.token_table import pem_of
from tests.trioserver.wire import until
from trioserver.auth import Verifier
from trioserver.errors import AuthError, SettingsError
from trioserver.jwks import MAX_DOCUMENT, Keyring, Pace
from trioserver.jwks_fetch import FetchError, keep_fresh
from trioserver.key_keeping import COMPLAINT_SECONDS, Report, keep, keyring_of, look_up
from trioserver.settings import Settings

QUICK: Final = Pace(refresh=0.2, retry=0.02)
SLOW: Final = Pace(refresh=3600.0, retry=600.0)
"""Asks once, and then not again while a test runs."""
KEYS: Final = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("old", "new")}
Line = MutableMapping[str, Any]


def document(*names: str) -> bytes:
    """Return a key set with these keys."""
    keys = [
        {**jwt.algorithms.ECAlgorithm.to_jwk(KEYS[name].public_key(), as_dict=True), "kid": name}
        for name in names
    ]
    return json.dumps({"keys": keys}).encode()


def token(name: str, kid: str | None = None) -> str:
    """Return a token that was signed with that key, perhaps under another name."""
    claims = {"sub": "ann", "exp": time.time() + 3600}
    return jwt.encode(claims, KEYS[name], algorithm="ES256", headers={"kid": kid or name})


def outcome(verifier: Verifier, text: str) -> str:
    """Return what comes of a token."""
    try:
        verifier.verify(text, time.time())
    except AuthError as error:
        return error.outcome
    return "ok"


class Log:
    """A logger, and its lines."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.logger: FilteringBoundLogger = structlog.wrap_logger(
            None,
            processors=[self._take],
            wrapper_class=structlog.make_filtering_bound_logger(0),
        )

    def _take(self, _logger: object, method: str, line: Line) -> Line:
        self.lines.append({"level": method, **line})
        raise structlog.DropEvent

    def events(self, event: str) -> list[Line]:
        """Return the lines of one kind."""
        return [line for line in self.lines if line["event"] == event]


@attrs.define(eq=False)
class Stage:
    """An issuer, and a worker's keys from there."""

    issuer: Issuer
    keyring: Keyring
    verifier: Verifier
    log: Log

    def outcome(self, text: str) -> str:
        """Return what comes of a token."""
        return outcome(self.verifier, text)

    async def becomes(self, expected: str, text: str) -> None:
        """Wait until that comes of a token."""
        await until(lambda: self.outcome(text) == expected)

    async def failed(self, times: int) -> None:
        """Wait until as many more fetches in a row have failed."""
        goal = self.keyring.failures + times
        await until(lambda: self.keyring.failures >= goal)


def settings_of(issuer: Issuer) -> Settings:
    """Return settings that name this issuer."""
    url = f"http://127.0.0.1:{issuer.port}/keys"
    return Settings(jwt_algorithms=("ES256",), jwt_jwks_url=url)


async def staged(nursery: trio.Nursery, pace: Pace, answer: Answer) -> Stage:
    """Run an issuer and the keeping of its keys."""
    issuer = Issuer(answer)
    await issuer.start(nursery)
    settings = settings_of(issuer)
    keyring = Keyring(settings.jwt_algorithms, pace)
    stage = Stage(issuer, keyring, Verifier(settings, keyring), Log())
    nursery.start_soon(keep, keyring, settings, stage.log.logger)
    return stage


@pytest.fixture
async def stage(nursery: trio.Nursery) -> Stage:
    """An issuer with one key, which is already known here, asked often."""
    made = await staged(nursery, QUICK, says(response(document("old"))))
    await made.becomes("ok", token("old"))
    return made


OK = b"HTTP/1.1 200 OK\r\n"
TROUBLE: dict[str, tuple[Answer, str]] = {
    "500": (says(response(b"", "500 Internal Server Error")), "the answer is 500"),
    "a redirect": (
        says(response(b"", "302 Found", "Location: https://evil.example/")),
        "the answer is 302",
    ),
    "too much": (says(OK + b"Content-Length: %d\r\n\r\n" % (MAX_DOCUMENT + 1)), "is longer than"),
    "too much without end": (repeats(OK + b"Connection: close\r\n\r\n", b"x" * 9999), "is longer"),
    "no keys": (says(response(b'{"keys":[]}')), "no usable key"),
    "no JSON": (says(response(b"<html>")), "no key set"),
    "no HTTP": (says(b"\0"), "is not HTTP"),
}


@pytest.mark.parametrize(("answer", "problem"), TROUBLE.values(), ids=TROUBLE)
async def test_known_keys_outlive_trouble(stage: Stage, answer: Answer, problem: str) -> None:
    """Their tokens are good all the time, the log says once what is wrong, and it passes."""
    stage.issuer.answer = answer
    for _ in range(3):
        await stage.failed(1)
        assert "ok" == stage.outcome(token("old"))
        assert "unknown_key" == stage.outcome(token("new"))
    (line,) = stage.log.events("the issuer's keys cannot be had")
    assert problem in line["problem"]
    assert ("warning", True) == (line["level"], line["usable"])

    stage.issuer.answer = says(response(document("old", "new")))
    await stage.becomes("ok", token("new"))
    assert "ok" == stage.outcome(token("old"))


async def test_known_keys_outlive_an_issuer_that_is_gone(nursery: trio.Nursery) -> None:
    """Nobody answers any more."""
    async with trio.open_nursery() as elsewhere:
        issuer = Issuer(says(response(document("old"))))
        await issuer.start(elsewhere)
        settings = settings_of(issuer)
        keyring = Keyring(settings.jwt_algorithms, QUICK)
        verifier, log = Verifier(settings, keyring), Log()
        nursery.start_soon(keep, keyring, settings, log.logger)
        await until(lambda: outcome(verifier, token("old")) == "ok")
        elsewhere.cancel_scope.cancel()
    await until(lambda: keyring.failures >= 3)
    assert "ok" == outcome(verifier, token("old"))
    (line,) = log.events("the issuer's keys cannot be had")
    assert "cannot connect" in line["problem"]


async def test_nobody_waits_for_a_slow_issuer(stage: Stage) -> None:
    """Verdicts come at once while it is silent, and it is asked once for all of them."""
    stage.issuer.answer = says(OK, end=False)
    asked = len(stage.issuer.requests)
    await until(lambda: len(stage.issuer.requests) > asked)
    asked = len(stage.issuer.requests)
    verdicts = [stage.outcome(token(name)) for name in ("old", "new") * 50]
    assert ["ok", "unknown_key"] * 50 == verdicts
    await wait_all_tasks_blocked()
    assert (asked, 1) == (len(stage.issuer.requests), stage.issuer.alive)


async def test_before_the_first_fetch_nobody_is_refused(nursery: trio.Nursery) -> None:
    """Clients of a server that has just started are told when to come again."""
    stage = await staged(nursery, QUICK, says(OK, end=False))
    with pytest.raises(AuthError) as caught:
        stage.verifier.verify(token("old"), time.time())
    assert "unknown_key" == caught.value.outcome
    assert 0 < caught.value.retry_after <= 3


async def test_invented_names_are_one_fetch(nursery: trio.Nursery) -> None:
    """A thousand tokens with names that nobody has: the issuer is asked once, if at all soon."""
    stage = await staged(nursery, SLOW, says(response(document("old"))))
    await stage.becomes("ok", token("old"))
    waits = []
    for number in range(1000):
        with pytest.raises(AuthError) as caught:
            stage.verifier.verify(token("new", f"invented-{number}"), time.time())
        waits.append(caught.value.retry_after)
    await wait_all_tasks_blocked()
    assert 1 == len(stage.issuer.requests)
    assert all(500 < wait <= 602 for wait in waits)
    assert "ok" == stage.outcome(token("old"))


async def test_keys_rotate_without_a_refusal(stage: Stage) -> None:
    """The new one is published, used, and the old one withdrawn: no good token is invalid."""
    seen: set[str] = set()

    async def use(name: str, done: Callable[[], bool]) -> None:
        while not done():
            seen.add(stage.outcome(token(name)))
            await trio.sleep(0.001)

    over = trio.Event()
    async with trio.open_nursery() as clients:
        clients.start_soon(use, "old", over.is_set)
        stage.issuer.answer = says(response(document("old", "new")))
        await stage.becomes("ok", token("new"))
        clients.start_soon(use, "new", over.is_set)
        asked = len(stage.issuer.requests)
        await until(lambda: len(stage.issuer.requests) >= asked + 2)
        over.set()
    assert {"ok"} == seen
    stage.issuer.answer = says(response(document("new")))
    await stage.becomes("invalid", token("old"))
    assert "ok" == stage.outcome(token("new"))
    changes = [
        (line["keys"], line["added"], line["withdrawn"])
        for line in stage.log.events("the issuer's keys")
    ]
    assert [(1, ["old"], []), (2, ["new"], []), (1, [], ["old"])] == changes


async def test_plain_http_is_said_once(stage: Stage) -> None:
    """At the beginning, and not with every fetch."""
    asked = len(stage.issuer.requests)
    await until(lambda: len(stage.issuer.requests) > asked + 2)
    (line,) = stage.log.events("keys are fetched without TLS")
    assert ("warning", "127.0.0.1") == (line["level"], line["host"])


async def test_clients_come_again_for_a_new_key(stage: Stage) -> None:
    """On the wire: 503 with a time before the upgrade, 1013 after it; and then they get in."""
    async with wire.running(verifier=stage.verifier) as worker:
        client = await worker.dial()
        await client.send(wire.head(credential=token("new")))
        status, answer = await client.response()
        assert 503 == status
        assert b"\r\nRetry-After: " in answer
        client.hang_up()

        client = await worker.nameless()
        await client.send(wire.text({"type": "auth", "token": token("new")}))
        goodbye = await client.message()
        assert ("overload", True) == (goodbye["reason"], goodbye["reconnect"])
        client.hang_up()

        stage.issuer.answer = says(response(document("old", "new")))
        await stage.becomes("ok", token("new"))
        for name in ("old", "new"):
            client = await worker.dial()
            await client.send(wire.head(credential=token(name)))
            assert 101 == (await client.response())[0]
            client.hang_up()
        await worker.settled()
        assert (2, 2, 0) == tuple(
            worker.tally.auth[key] for key in ("ok", "unknown_key", "invalid")
        )


async def test_a_command_looks_once(nursery: trio.Nursery) -> None:
    """It gets the keys, or the reason why there are none."""
    issuer = Issuer(says(response(document("old"))))
    await issuer.start(nursery)
    settings = settings_of(issuer)
    keyring = Keyring(settings.jwt_algorithms)
    assert "" == await look_up(keyring, settings)
    assert "ok" == outcome(Verifier(settings, keyring), token("old"))
    issuer.answer = says(response(b"", "404 Not Found"))
    assert "404" in await look_up(Keyring(settings.jwt_algorithms), settings)
    assert 2 == len(issuer.requests)


async def test_a_url_that_is_none_is_a_settings_error() -> None:
    """Should it come this far."""
    settings = Settings(jwt_algorithms=("ES256",), jwt_jwks_url="keys")
    keyring = Keyring(["ES256"])
    with pytest.raises(SettingsError, match="JWT_JWKS_URL"):
        await keep(keyring, settings, Log().logger)
    with pytest.raises(SettingsError, match="JWT_JWKS_URL"):
        await look_up(keyring, settings)


def test_each_worker_has_a_pace_of_its_own() -> None:
    """Never faster than every 10 s, never slower than every 5 minutes; none without an issuer."""
    settings = Settings(jwt_algorithms=("ES256",), jwt_jwks_url="https://login.example.com/keys")
    assert keyring_of(Settings()) is None
    paces = set()
    for seed in range(50):
        keyring = keyring_of(settings, random.Random(seed))
        assert keyring is not None
        assert ("ES256",) == keyring.algorithms
        assert 10.0 <= keyring._pace.retry <= 12.0
        assert 240.0 <= keyring._pace.refresh <= 300.0
        paces.add(keyring._pace)
    assert 50 == len(paces)
    default = keyring_of(settings)
    assert default is not None
    assert time.monotonic is default.clock


# With the virtual clock.


@attrs.define(eq=False)
class Scripted:
    """An issuer on the virtual clock."""

    answer: bytes | Exception
    seconds: float = 0.0
    times: list[float] = attrs.field(factory=list)

    async def get(self) -> bytes:
        """Answer after a while."""
        self.times.append(trio.current_time())
        await trio.sleep(self.seconds)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@attrs.define(eq=False)
class Virtual:
    """Keys that are kept on the virtual clock, with the pace of the product."""

    issuer: Scripted
    keyring: Keyring
    verifier: Verifier
    log: Log


@pytest.fixture
async def virtual(nursery: trio.Nursery, autojump_clock: MockClock) -> Virtual:
    """An issuer with one key, which is already known here."""
    settings = Settings(jwt_algorithms=("ES256",), jwt_jwks_url="https://login.example.com/keys")
    keyring = Keyring(["ES256"], Pace(), trio.current_time)
    made = Virtual(Scripted(document("old")), keyring, Verifier(settings, keyring), Log())
    take = Report(keyring, made.log.logger).take
    nursery.start_soon(keep_fresh, keyring, made.issuer.get, take)
    await wait_all_tasks_blocked()
    return made


@pytest.mark.parametrize("seconds", [0.0, 3.0])
async def test_a_flood_of_invented_names_is_one_fetch_per_ten_seconds(
    virtual: Virtual, autojump_clock: MockClock, seconds: float
) -> None:
    """A thousand tokens in ten minutes, of an issuer that takes its time or does not."""
    virtual.issuer.seconds = seconds
    start = trio.current_time()
    good = token("old")
    for number in range(1000):
        text = token("new", f"invented-{number}")
        assert outcome(virtual.verifier, text) in {"unknown_key", "invalid"}
        await trio.sleep(0.6)
        assert "ok" == outcome(virtual.verifier, good)
    times = virtual.issuer.times
    assert all(later - earlier >= 10.0 for earlier, later in itertools.pairwise(times))
    assert 2 <= len(times) <= (trio.current_time() - start) / 10.0 + 1


async def test_a_name_that_the_issuer_does_not_have_is_refused(
    virtual: Virtual, autojump_clock: MockClock
) -> None:
    """First it is looked for; then the same token is plainly invalid."""
    text = token("new", "invented")
    assert "unknown_key" == outcome(virtual.verifier, text)
    await trio.sleep(10.1)
    assert "invalid" == outcome(virtual.verifier, text)


async def test_a_new_key_is_good_when_the_client_comes_again(
    virtual: Virtual, autojump_clock: MockClock
) -> None:
    """After the time that it was told, and not later."""
    await trio.sleep(20)
    virtual.issuer.answer = document("old", "new")
    text = token("new")
    with pytest.raises(AuthError) as caught:
        virtual.verifier.verify(text, time.time())
    assert 1 <= caught.value.retry_after <= 2
    await trio.sleep(caught.value.retry_after)
    assert "ok" == outcome(virtual.verifier, text)


async def test_trouble_is_told_again_but_not_with_every_fetch(
    virtual: Virtual, autojump_clock: MockClock
) -> None:
    """Once a minute at most, with how often it was not told; and its end is told."""
    await trio.sleep(1)
    virtual.issuer.answer = FetchError("gone")
    await trio.sleep(1000)
    lines = virtual.log.events("the issuer's keys cannot be had")
    failures = virtual.keyring.failures
    assert 2 <= len(lines) <= 1000 / COMPLAINT_SECONDS + 1
    assert failures - 3 <= len(lines) + sum(line["held_back"] for line in lines) <= failures
    assert len(lines) < failures

    virtual.issuer.answer = document("old")
    await trio.sleep(600)
    *_, last = virtual.log.lines
    assert ("info", "the issuer's keys", 1, [], []) == (
        *(last["level"], last["event"], last["keys"]),
        *(last["added"], last["withdrawn"]),
    )
    before = len(virtual.log.lines)
    await trio.sleep(3600)
    assert before == len(virtual.log.lines)


async def test_keys_that_cannot_be_used_are_told(
    virtual: Virtual, autojump_clock: MockClock
) -> None:
    """The others are good all the same."""
    virtual.issuer.answer = document("old", "old")
    await trio.sleep(301)
    (line,) = virtual.log.events("some of the issuer's keys cannot be used")
    assert "another one has its name" in line["problem"]
    assert "ok" == outcome(virtual.verifier, token("old"))


async def test_a_file_beside_needs_no_issuer(nursery: trio.Nursery, tmp_path: Path) -> None:
    """Its tokens are good while the issuer has never answered."""
    path = tmp_path / "own.pem"
    path.write_bytes(pem_of(KEYS["new"]))
    issuer = Issuer(says(OK, end=False))
    await issuer.start(nursery)
    settings = attrs.evolve(settings_of(issuer), jwt_public_key_file=path)
    keyring = Keyring(settings.jwt_algorithms, QUICK)
    verifier = Verifier(settings, keyring)
    nursery.start_soon(keep, keyring, settings, Log().logger)
    await until(lambda: bool(issuer.requests))
    assert "ok" == outcome(verifier, token("new"))
    assert "unknown_key" == outcome(verifier, token("old"))
