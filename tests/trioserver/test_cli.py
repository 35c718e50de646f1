"""Tokens at the terminal: making them, checking them, and a client that renews its own."""

import re
import time
from typing import Final

import jwt
import pytest

from tests.redis_server import RedisServer, free_port
from tests.trioserver.terminal import Ran, Run
from trioserver import listen as client
from trioserver.auth import Claims, Verifier
from trioserver.grant import NO_GRANT
from trioserver.listen import Listening
from trioserver.revocation import ENTRIES_KEY
from trioserver.settings import Settings

SECRET: Final = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def run(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run ``trioserver``, with an empty Redis and a secret of its own."""
    monkeypatch.setenv("JWT_SECRET_KEY", SECRET)
    return run


def claims(token: str) -> Claims:
    """Return what a token says, as the server reads it."""
    return Verifier(Settings(jwt_secret_key=SECRET)).verify(token.strip(), time.time())


def test_a_token_has_a_name(run: Run) -> None:
    """The one that was asked for, else a different one each time; so it can be revoked by it."""
    assert "7f3c" == claims(run("gentoken", "--user", "ann", "--jti", "7f3c").out).jti
    names = {claims(run("gentoken", "--user", "ann").out).jti for _ in range(3)}
    assert 3 == len(names)
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in names)
    assert 1 == run("gentoken", "--user", "ann", "--jti", "x" * 257).code


def test_a_token_may_grant_topics(run: Run) -> None:
    """Each of the three may be said several times; what is no topic is refused."""
    said = ("--topics", "news.**", "--topics", "a", "--publish", "room.*", "--join", "status")
    grant = claims(run("gentoken", "--user", "ann", *said).out).topics
    assert (("news.**", "a"), ("room.*",)) == (grant.subscribe.texts, grant.publish.texts)
    assert ("status",) == grant.join
    assert NO_GRANT == claims(run("gentoken", "--user", "ann").out).topics
    assert 1 == run("gentoken", "--user", "ann", "--join", "room.*").code


def test_a_good_token(run: Run) -> None:
    """One line says whose it is, what its name is, and for how long it is good."""
    token = run("gentoken", "--user", "ann", "--jti", "7f", "--ttl", "9000").out.strip()
    ran = run("checktoken", token)
    assert (0, "") == (ran.code, ran.err)
    assert re.fullmatch(r"good: user ann, jti 7f, expires in (89\d\d|9000) s\n", ran.out)


def test_a_claim_on_topics_that_is_none(run: Run) -> None:
    """The token is good all the same, and whoever looks at it is told what is wrong."""
    claim = {"sub": "ann", "exp": time.time() + 60, "topics": "news.**"}
    ran = run("checktoken", jwt.encode(claim, SECRET, algorithm="HS256"))
    assert 0 == ran.code
    assert ran.out.startswith("good: user ann, ")
    assert ran.err.startswith("trioserver: it grants no topics: the claim topics: ")


@pytest.mark.parametrize("whom", [("--jti", "7f"), ("--user", "ann"), ("--all", "--before", "now")])
def test_a_revoked_token_is_not_good(run: Run, whom: tuple[str, ...]) -> None:
    """Nor is it at the door; others are."""
    token = run("gentoken", "--user", "ann", "--jti", "7f").out.strip()
    assert 0 == run("revoke", "--jti", "7e").code
    assert 0 == run("revoke", "--user", "bob").code
    assert 0 == run("checktoken", token).code
    assert 0 == run("revoke", *whom).code
    assert Ran(1, "", "trioserver: the token has been revoked\n") == run("checktoken", token)


def test_nobody_knows_whether_it_is_revoked(
    run: Run, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Redis that is away, refuses or is not there is no reason to call a token just good."""
    token = run("gentoken", "--user", "ann").out.strip()
    redis.command("SET", ENTRIES_KEY, "x")
    outputs = [run("checktoken", token)]
    monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{free_port()}/0")
    outputs.append(run("checktoken", token))
    monkeypatch.delenv("REDIS_URL")
    outputs.append(run("checktoken", token))
    for ran in outputs:
        assert (0, 1) == (ran.code, ran.err.count("\n")), ran.err
        assert ran.err.startswith("trioserver: revocations cannot be read: ")
        assert ran.out.endswith(" s; revocations not checked\n")


def test_listening_as_a_user_goes_on_for_ever(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes itself new tokens; whoever was given one has only that."""
    asked: list[Listening] = []

    async def listen(listening: Listening, *_: object) -> None:
        asked.append(listening)

    monkeypatch.setattr(client, "listen", listen)
    assert 0 == run("listen", "--user", "ann").code
    assert 0 == run("listen", "--token", "t").code
    assert 2 == run("listen", "--token", "t", "--user", "ann").code
    assert 2 == run("listen").code

    ann, given = asked
    assert ann.renew is not None
    assert {"ann"} == {claims(token).user for token in (ann.token, ann.renew())}
    assert claims(ann.renew()).expires_at > time.time() + 80_000
    assert ("t", None) == (given.token, given.renew)
