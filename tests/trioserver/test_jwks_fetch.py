"""Fetching keys from a real server: slow, huge, broken, redirecting, gone, and with new keys."""

import datetime as dt
import ipaddress
import json
import ssl
from pathlib import Path
from typing import Final

import attrs
import jwt
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.trioserver.issuer import Answer, Issuer, repeats, response, says
from tests.trioserver.wire import until
from trioserver.jwks import MAX_DOCUMENT, Keyring, NoKey, Pace
from trioserver.jwks_fetch import FetchError, fetch, keep_fresh
from trioserver.jwks_url import Target

LIMIT: Final = 10.0
"""Seconds for whatever should happen at once."""
SHORT: Final = 0.3
"""A deadline that a test waits for."""
KEYS = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("old", "new")}


def document(*names: str) -> bytes:
    """Return a key set with these keys."""
    keys = [
        {**jwt.algorithms.ECAlgorithm.to_jwk(KEYS[name].public_key(), as_dict=True), "kid": name}
        for name in names
    ]
    return json.dumps({"keys": keys}).encode()


def token(name: str) -> str:
    """Return a token that was signed with that key."""
    return jwt.encode({"sub": "ann"}, KEYS[name], algorithm="ES256", headers={"kid": name})


@pytest.fixture
async def issuer(nursery: trio.Nursery) -> Issuer:
    """A server of keys, without TLS."""
    made = Issuer(says(response(document("old"))))
    await made.start(nursery)
    return made


async def test_the_document_comes_back(issuer: Issuer) -> None:
    """One GET, of the path in the URL, with nothing in it that identifies anybody."""
    with trio.fail_after(LIMIT):
        assert document("old") == await fetch(issuer.target())
    (request,) = issuer.requests
    line, *headers = request.decode().rstrip().split("\r\n")
    assert "GET /keys?x=1 HTTP/1.1" == line
    names = {header.partition(":")[0].lower() for header in headers}
    assert {"host", "accept", "accept-encoding", "user-agent", "connection"} == names
    assert f"Host: 127.0.0.1:{issuer.port}" in headers


GOOD: dict[str, Answer] = {
    "in pieces": says(*(bytes([byte]) for byte in response(b"[]"))),
    "chunked": says(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n[\r\n1\r\n]\r\n0\r\n\r\n"
    ),
    "until the end": says(b"HTTP/1.0 200 OK\r\n\r\n[]"),
    "whole, and then silence": says(response(b"[]"), end=False),
    "behind interim answers": says(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 3, response(b"[]")),
    "identity": says(response(b"[]", "200 OK", "Content-Encoding: identity")),
    "the largest": says(response(b"[]" + b" " * (MAX_DOCUMENT - 2))),
}


@pytest.mark.parametrize("answer", GOOD.values(), ids=GOOD)
async def test_every_way_to_send_a_document_is_understood(issuer: Issuer, answer: Answer) -> None:
    """The end is known as soon as it is there."""
    issuer.answer = answer
    with trio.fail_after(LIMIT):
        assert b"[]" == (await fetch(issuer.target())).rstrip()


OK = b"HTTP/1.1 200 OK\r\n"
BROKEN: dict[str, tuple[Answer, str]] = {
    "not found": (says(response(b"no", "404 Not Found")), "404"),
    "server error": (says(response(b"oops", "500 Internal Server Error")), "500"),
    "no content": (says(b"HTTP/1.1 204 No Content\r\n\r\n"), "204"),
    "not modified": (says(b"HTTP/1.1 304 Not Modified\r\n\r\n"), "304"),
    "partial": (says(response(b"[]", "206 Partial Content")), "206"),
    "compressed": (says(response(b"\x1f\x8b", "200 OK", "Content-Encoding: gzip")), "compressed"),
    "end at once": (says(), "not HTTP"),
    "end in the head": (says(OK), "not HTTP"),
    "end in the body": (says(OK + b"Content-Length: 9\r\n\r\n[]"), "not HTTP"),
    "end in a chunk": (says(OK + b"Transfer-Encoding: chunked\r\n\r\n9\r\n[]"), "not HTTP"),
    "garbage": (says(b"\x00\xff\r\n\r\n"), "not HTTP"),
    "another protocol": (says(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), "not HTTP"),
    "two lengths": (says(OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n[]"), "not HTTP"),
    "a length of many digits": (
        says(OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n"),
        "not HTTP",
    ),
    "a negative length": (says(OK + b"Content-Length: -1\r\n\r\n"), "not HTTP"),
    "another protocol instead": (says(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"), "not HTTP"),
    "too long by its head": (says(OK + b"Content-Length: 262145\r\n\r\n"), "longer"),
    "too long without a length": (repeats(b"HTTP/1.0 200 OK\r\n\r\n", b"x" * 9999), "longer"),
    "too long in chunks": (
        repeats(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1;" + b"y" * 999 + b"\r\nx\r\n"),
        "longer",
    ),
    "a head without end": (repeats(OK, b"X: " + b"y" * 999 + b"\r\n"), "not HTTP"),
    "interim answers without end": (repeats(b"", b"HTTP/1.1 103 E\r\n\r\n"), "interim"),
}


@pytest.mark.parametrize(("answer", "problem"), BROKEN.values(), ids=BROKEN)
async def test_whatever_else_comes_is_a_failed_fetch(
    issuer: Issuer, answer: Answer, problem: str
) -> None:
    """With a line that says why; the connection is closed, and no more is read than needed."""
    issuer.answer = answer
    with trio.fail_after(LIMIT), pytest.raises(FetchError, match=problem) as caught:
        await fetch(issuer.target())
    assert "\n" not in str(caught.value)
    await until(lambda: not issuer.alive)


@pytest.mark.parametrize(
    "answer",
    [
        says(end=False),
        says(OK, end=False),
        says(OK + b"Content-Length: 9\r\n\r\n[]", end=False),
        repeats(OK, b"X", 0.02),
        repeats(OK + b"Content-Length: 99999\r\n\r\n", b"x", 0.02),
        repeats(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", 0.02),
    ],
)
async def test_slow_answers_have_one_deadline(issuer: Issuer, answer: Answer) -> None:
    """For everything: whoever drips gets no more time than whoever is silent."""
    issuer.answer = answer
    begin = trio.current_time()
    with trio.fail_after(LIMIT), pytest.raises(FetchError, match=r"within 0\.3 s"):
        await fetch(issuer.target(), seconds=SHORT)
    assert SHORT <= trio.current_time() - begin < SHORT + 2.0
    await until(lambda: not issuer.alive)


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary", "308 Permanent"])
async def test_redirects_lead_nowhere(issuer: Issuer, nursery: trio.Nursery, status: str) -> None:
    """The setting says where the keys are; nobody else is asked."""
    elsewhere = Issuer(says(response(document("old"))))
    await elsewhere.start(nursery)
    location = f"Location: http://127.0.0.1:{elsewhere.port}/keys"
    issuer.answer = says(response(b"", status, location))
    with trio.fail_after(LIMIT), pytest.raises(FetchError, match=status[:3]):
        await fetch(issuer.target())
    assert (1, 0) == (len(issuer.requests), len(elsewhere.requests))


async def test_nobody_there_is_a_failed_fetch() -> None:
    """A refused connection, a name that does not exist, an address that does not answer."""
    with trio.socket.socket() as unused:
        await unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with trio.fail_after(LIMIT), pytest.raises(FetchError, match="cannot connect"):
            await fetch(Target.parse(f"http://127.0.0.1:{port}/"))
    with trio.fail_after(LIMIT), pytest.raises(FetchError):
        await fetch(Target.parse("http://nowhere.invalid/"), seconds=5.0)


async def test_a_cancelled_fetch_closes_its_connection(issuer: Issuer) -> None:
    """And is cancelled at once."""
    issuer.answer = says(end=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch, issuer.target())
        await until(lambda: bool(issuer.requests))
        nursery.cancel_scope.cancel()
    await until(lambda: not issuer.alive)


def certificate(directory: Path, name: str, days: int = 1) -> tuple[ssl.SSLContext, Path]:
    """Return a server's context with a certificate that it signed itself, and the certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    try:
        names: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        names = x509.DNSName(name)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=3))
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = directory / f"{name}.{days}.pem"
    path.write_bytes(made.public_bytes(Encoding.PEM))
    both = directory / f"{name}.{days}.both.pem"
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    both.write_bytes(private + path.read_bytes())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(both)
    return context, path


async def test_tls_is_checked(nursery: trio.Nursery, tmp_path: Path) -> None:
    """A certificate of somebody else, of nobody or of yesterday gets no request."""
    ours, path = certificate(tmp_path, "127.0.0.1")
    other, other_path = certificate(tmp_path, "login.example.com")
    expired, expired_path = certificate(tmp_path, "127.0.0.1", days=-1)
    for server, trusted, problem in (
        (ours, path, ""),
        (ours, None, "verify failed"),
        (other, other_path, "mismatch"),
        (expired, expired_path, "expired"),
    ):
        issuer = Issuer(says(response(document("old"))))
        await issuer.start(nursery, server)
        context = None if trusted is None else ssl.create_default_context(cafile=str(trusted))
        with trio.fail_after(LIMIT):
            if not problem:
                target = issuer.target(scheme="https")
                assert document("old") == await fetch(target, context=context)
                continue
            with pytest.raises(FetchError, match=problem):
                await fetch(issuer.target(scheme="https"), context=context)
        assert [] == issuer.requests


async def test_a_tls_handshake_has_the_same_deadline(issuer: Issuer) -> None:
    """A server that takes the connection and says nothing, and one that does not speak TLS."""
    target = issuer.target(scheme="https")
    with trio.fail_after(LIMIT), pytest.raises(FetchError, match=r"within 0\.3 s"):
        await fetch(target, seconds=SHORT)
    with trio.socket.socket() as door:
        await door.bind(("127.0.0.1", 0))
        door.listen()

        async def speak_otherwise() -> None:
            connection, _ = await door.accept()
            with connection:
                await connection.send(response(b"[]"))
                await connection.recv(1 << 16)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(speak_otherwise)
            port = door.getsockname()[1]
            with trio.fail_after(LIMIT), pytest.raises(FetchError, match="the connection broke"):
                await fetch(Target.parse(f"https://127.0.0.1:{port}/"))


@attrs.define(eq=False)
class Scripted:
    """An issuer on the virtual clock."""

    answer: bytes | Exception = attrs.field(factory=lambda: document("old"))
    seconds: float = 0.0
    times: list[float] = attrs.field(factory=list)
    under_way: int = 0
    reports: list[str | None] = attrs.field(factory=list)

    async def get(self) -> bytes:
        """Answer after a while."""
        assert self.under_way == 0
        self.under_way += 1
        self.times.append(trio.current_time())
        await trio.sleep(self.seconds)
        self.under_way -= 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@attrs.define(eq=False)
class Kept:
    """A keyring that is kept fresh."""

    issuer: Scripted
    keyring: Keyring

    def find(self, name: str) -> jwt.PyJWK | NoKey:
        """Ask for a key now."""
        return self.keyring.key_for(token(name), trio.current_time())


@pytest.fixture
async def kept(nursery: trio.Nursery, autojump_clock: MockClock) -> Kept:
    """A keyring with the pace of the product, and an issuer on the virtual clock."""
    made = Kept(Scripted(), Keyring(["ES256"], Pace(), trio.current_time))
    nursery.start_soon(keep_fresh, made.keyring, made.issuer.get, made.issuer.reports.append)
    await wait_all_tasks_blocked()
    return made


async def test_the_first_fetch_is_at_once_and_then_regularly(
    kept: Kept, autojump_clock: MockClock
) -> None:
    """An hour has thirteen fetches, and as many reports."""
    start = trio.current_time()
    assert isinstance(kept.find("old"), jwt.PyJWK)
    await trio.sleep(3601)
    assert [start + 300.0 * number for number in range(13)] == kept.issuer.times
    assert [None] * 13 == kept.issuer.reports


async def test_a_new_key_is_fetched_when_a_token_has_it(
    kept: Kept, autojump_clock: MockClock
) -> None:
    """Thousands of such tokens are one fetch, begun as soon as the retry time allows."""
    kept.issuer.answer = document("old", "new")
    start = trio.current_time()
    await trio.sleep(1)
    for _ in range(2000):
        assert NoKey(11) == kept.find("new")
    await trio.sleep(9.1)
    assert isinstance(kept.find("new"), jwt.PyJWK)
    assert [start, start + 10.0] == kept.issuer.times


async def test_unknown_keys_never_cause_more_than_one_fetch_per_retry(
    kept: Kept, autojump_clock: MockClock
) -> None:
    """Ten minutes of tokens with invented keys, against a server that takes its time."""
    kept.issuer.seconds = 3.0
    start = trio.current_time()
    while trio.current_time() < start + 600:
        await trio.sleep(0.5)
        kept.keyring.key_for(
            jwt.encode({}, KEYS["old"], "ES256", {"kid": "x"}), trio.current_time()
        )
        assert isinstance(kept.find("old"), jwt.PyJWK)
    pairs = zip(kept.issuer.times, kept.issuer.times[1:], strict=False)
    assert 45 <= len(kept.issuer.times) <= 61
    assert all(later - earlier >= 10.0 for earlier, later in pairs)


async def test_while_the_issuer_is_away_its_keys_stay_good(
    kept: Kept, autojump_clock: MockClock
) -> None:
    """A day of failures, then an end; and right again after the first success."""
    kept.issuer.answer = FetchError("gone")
    await trio.sleep(86_399)
    assert isinstance(kept.find("old"), jwt.PyJWK)
    await trio.sleep(1)
    assert isinstance(kept.find("old"), NoKey)
    assert {"gone"} == set(kept.issuer.reports[1:])
    assert 280 <= len(kept.issuer.times) <= 300

    kept.issuer.answer = document("new")
    kept.find("new")
    await trio.sleep(10.1)
    assert isinstance(kept.find("new"), jwt.PyJWK)
    assert kept.issuer.reports[-1] is None


async def test_a_document_that_is_none_is_a_failure(kept: Kept, autojump_clock: MockClock) -> None:
    """What was known stays; what is skipped is reported."""
    for answer in (b"<html>", b'{"keys":[]}', b"x" * (MAX_DOCUMENT + 1)):
        kept.issuer.answer = answer
        await trio.sleep(310)
        assert isinstance(kept.find("old"), jwt.PyJWK)
        assert kept.issuer.reports[-1] is not None
    kept.issuer.answer = document("old", "old")
    await trio.sleep(310)
    assert "'old': another one has its name" == kept.issuer.reports[-1]
    assert 0 == kept.keyring.failures


async def test_rotating_keys_over_the_wire(issuer: Issuer, nursery: trio.Nursery) -> None:
    """A server that changes its keys: the new ones are found, the withdrawn ones are gone."""
    keyring = Keyring(["ES256"], Pace(refresh=0.3, retry=0.05), trio.current_time)
    reports: list[str | None] = []

    async def get() -> bytes:
        return await fetch(issuer.target())

    def is_good(name: str) -> bool:
        return isinstance(keyring.key_for(token(name), trio.current_time()), jwt.PyJWK)

    nursery.start_soon(keep_fresh, keyring, get, reports.append)
    await until(lambda: is_good("old"))
    issuer.answer = says(response(document("old", "new")))
    await until(lambda: is_good("new"))
    await until(lambda: is_good("old"))
    issuer.answer = says(response(document("new")))
    await until(lambda: not is_good("old"))
    issuer.answer = says(response(b"", "500 Internal Server Error"))
    await until(lambda: keyring.failures >= 3)
    await until(lambda: is_good("new"))
    assert "the answer is 500, not 200" == reports[-1]
