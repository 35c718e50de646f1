"""Hostile tokens against a worker: nobody gets in, and nobody learns why not."""

import re
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote_from_bytes

import attrs
import jwt
import pytest

from tests.trioserver import wire
from tests.trioserver.token_table import (
    BAD,
    GOOD,
    KEYS,
    NOW,
    SETTINGS,
    forged,
    pem_of,
    private_pem_of,
    strangers,
)
from trioserver.auth import Verifier, sign
from trioserver.settings import Settings

EXPIRED = {
    "expired": forged({**GOOD, "exp": NOW - 31}),
    "expired in 1970": forged({**GOOD, "exp": 0}),
    "expired before 1970": forged({**GOOD, "exp": -1}),
}
HEADER_BYTES = 8 << 10
"""Of a request head at most."""


async def refused(worker: wire.Worker, head: bytes) -> bytes:
    """Return the whole answer to a handshake, apart from the hour and its number."""
    client = await worker.dial()
    await client.send(head)
    answer = await client.rest()
    await client.aclose()
    return re.sub(rb"\r\n(Date|X-Request-ID): [^\r]*", b"", answer)


async def refused_by_header(worker: wire.Worker, token: str) -> bytes:
    """Return the answer to a handshake with the token in a header."""
    return await refused(worker, wire.head(credential=token))


async def refused_by_query(worker: wire.Worker, token: str) -> bytes:
    """Return the answer to a handshake with the token in the query."""
    quoted = quote_from_bytes(token.encode("utf-8", "surrogatepass"), safe="")
    return await refused(worker, wire.head(f"/ws?token={quoted}"))


async def refused_by_message(worker: wire.Worker, token: str) -> tuple[object, int]:
    """Return how a connection ended that has sent the token in a message."""
    client = await worker.nameless()
    await client.send(wire.text({"type": "auth", "token": token}))
    goodbye = await client.message()
    opcode, payload = await client.frame()
    assert wire.CLOSE == opcode
    await client.aclose()
    return goodbye["reason"], int.from_bytes(payload[:2], "big")


def fits_a_header(token: str) -> bool:
    """Tell whether a token can stand in a header at all."""
    return token.isascii() and token.isprintable() and 0 < len(token) < HEADER_BYTES - 512


def fits_a_query(token: str) -> bool:
    """Tell the same of the query, where more is quoted."""
    quoted = quote_from_bytes(token.encode("utf-8", "surrogatepass"))
    return is_text(token) and len(quoted) < HEADER_BYTES - 512


def is_text(token: str) -> bool:
    """Tell whether there is a way to write it down in UTF-8."""
    return not any(0xD800 <= ord(letter) < 0xE000 for letter in token)


@attrs.define(eq=False)
class Door:
    """A worker, and what it says to strangers."""

    worker: wire.Worker
    said: bytes

    async def refuses(self, name: str, token: str) -> None:
        """Show a token in every way there is; each gets the one answer, and nothing else."""
        worker = self.worker
        if fits_a_header(token):
            assert self.said == await refused_by_header(worker, token), name
        if fits_a_query(token):
            assert self.said == await refused_by_query(worker, token), name
        if is_text(token):
            assert ("unauthorized", 4401) == await refused_by_message(worker, token), name
        await worker.settled()
        assert 0 == worker.tally.auth["ok"], name


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    """A worker that takes the table's time for now."""
    async with wire.running(verifier=Verifier(SETTINGS)) as worker:
        worker.shared.wall = lambda: NOW
        said = await refused_by_header(worker, "nonsense")
        assert said.startswith(b"HTTP/1.1 401 ")
        yield Door(worker, said)


async def test_bad_tokens_get_one_answer(door: Door) -> None:
    """Before the upgrade and after it: the same bytes for all, whatever is wrong."""
    for name, token in {**BAD, **EXPIRED, **strangers("HS256")}.items():
        await door.refuses(name, token)
    assert 0 == door.worker.tally.auth["ok"]


async def test_a_claim_on_topics_that_is_none_closes_no_door(door: Door) -> None:
    """Who has it is let in, and the log is told; of other tokens it is told nothing."""
    told: list[str] = []
    door.worker.shared.log_claim = told.append
    for token in (forged({**GOOD, "topics": "a"}), forged(GOOD)):
        client = await door.worker.nameless()
        await client.send(wire.text({"type": "auth", "token": token}))
        assert "connection_established" == (await client.message())["type"]
        await client.aclose()
    [problem] = told
    assert problem.startswith("the claim topics: ")


async def test_the_answer_says_nothing_of_the_token(door: Door) -> None:
    """No part of it comes back, and no reason but that it was not accepted."""
    token = forged({**GOOD, "sub": "canary"}, {"alg": "HS256", "kid": "canary"}, "x" * 32)
    for answer in (
        await refused_by_header(door.worker, token),
        await refused_by_query(door.worker, token),
    ):
        assert door.said == answer
        assert not any(part.encode() in answer for part in (*token.split("."), "canary"))


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
async def test_a_public_key_opens_no_door(algorithm: str, tmp_path: Path) -> None:
    """Neither as a secret, nor with the header of somebody else's key; its own tokens do."""
    path = tmp_path / "key.pem"
    path.write_bytes(pem_of(KEYS[algorithm]))
    settings = Settings(jwt_public_key_file=path, jwt_algorithms=(algorithm,))
    pem = pem_of(KEYS[algorithm])
    confused = {
        f"{name}, {len(key)} bytes": forged(GOOD, {"alg": name}, key)
        for name in ("HS256", algorithm, "none")
        for key in (pem, pem.strip())
    }
    async with wire.running(verifier=Verifier(settings)) as worker:
        worker.shared.wall = lambda: NOW
        door = Door(worker, await refused_by_header(worker, "nonsense"))
        for name, token in {**confused, **strangers(algorithm)}.items():
            await door.refuses(name, token)
        client = await worker.dial()
        good = jwt.encode(GOOD, private_pem_of(KEYS[algorithm]), algorithm=algorithm)
        await client.send(wire.head(credential=good))
        assert 101 == (await client.response())[0]


async def test_both_secrets_open_the_door_in_the_overlap() -> None:
    """While the secret changes nobody is refused; when the old one is gone, its tokens are."""
    old = Settings(jwt_secret_key="o" * 32)
    overlap = attrs.evolve(old, jwt_secret_key="n" * 32, jwt_secret_key_previous="o" * 32)
    tokens = [sign(one, "ann", NOW + 60) for one in (old, overlap)]
    async with wire.running(verifier=Verifier(overlap)) as worker:
        worker.shared.wall = lambda: NOW
        for token in tokens * 5:
            client = await worker.dial()
            await client.send(wire.head(credential=token))
            assert 101 == (await client.response())[0]
            assert "connection_established" == (await client.message())["type"]
            client.hang_up()
            await worker.settled()
        assert (10, 0) == (worker.tally.auth["ok"], worker.tally.auth["invalid"])
        worker.shared.verifier = Verifier(attrs.evolve(overlap, jwt_secret_key_previous=None))
        assert b"401" in (await refused_by_header(worker, tokens[0]))[:16]
        await worker.settled()


def test_the_tables_tokens_can_be_sent() -> None:
    """So that nothing above is refused only because it never arrived as it is."""
    assert 40 <= sum(map(fits_a_header, BAD.values()))
    assert ["lone surrogate"] == [name for name, token in BAD.items() if not is_text(token)]
