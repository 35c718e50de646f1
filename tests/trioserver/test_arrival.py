"""What comes before a request head: the head of a proxy, TLS; over real sockets."""

import contextlib
import socket
import ssl
import struct
import time

import pytest
import trio
import trustme

from tests.trioserver.wire import Client, Worker, head, running, token, until
from trioserver.arrival import Arrival
from trioserver.board import Limits
from trioserver.certificate import context
from trioserver.peers import Peers

LOCAL = Peers(["127.0.0.0/8"])
"""Trusts the proxies on this machine, as which the tests come."""

V2 = b"\r\n\r\n\0\r\nQUIT\n"


def proxy_v1(address: str = "192.0.2.7") -> bytes:
    """Return a head of version 1 for a client."""
    return f"PROXY TCP4 {address} 127.0.0.1 5000 8081\r\n".encode()


def proxy_v2(address: str = "192.0.2.7") -> bytes:
    """Return a head of version 2 for a client."""
    body = socket.inet_aton(address) + socket.inet_aton("127.0.0.1") + struct.pack("!HH", 5000, 81)
    return V2 + struct.pack("!BBH", 0x21, 0x11, len(body)) + body


async def address_after(worker: Worker, data: bytes, *, piece: int = 0) -> str:
    """Send a proxy's head and a handshake, perhaps in pieces; return whom we take it for."""
    client = await worker.dial()
    client.stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    step = piece or len(data)
    for start in range(0, len(data), step):
        await client.send(data[start : start + step])
        await trio.lowlevel.checkpoint()
    assert 101 == (await client.response())[0]
    await client.message()
    address = worker.only().caller.address
    await client.aclose()
    await worker.settled()
    return address


@pytest.mark.parametrize("prefix", [proxy_v1(), proxy_v2()])
@pytest.mark.parametrize("piece", [0, 1, 7])
async def test_a_trusted_proxy_says_whose_connection_it_is(prefix: bytes, piece: int) -> None:
    """Both versions, in one segment with the request or byte by byte."""
    async with running(peers=LOCAL) as worker:
        data = prefix + head(credential=token())
        assert "192.0.2.7" == await address_after(worker, data, piece=piece)


async def test_a_proxy_may_come_for_itself_or_without_a_head() -> None:
    """LOCAL and UNKNOWN mean the proxy; without a head it is an ordinary request."""
    handshake = head(credential=token())
    async with running(peers=LOCAL) as worker:
        for prefix in (b"PROXY UNKNOWN\r\n", V2 + b"\x20\0\0\0", b""):
            for piece in (0, 1):
                found = await address_after(worker, prefix + handshake, piece=piece)
                assert "127.0.0.1" == found


async def test_nobody_else_may_say_whose_connection_it_is() -> None:
    """From a peer that is not trusted, a proxy's head is a bad request."""
    async with running() as worker:
        client = await worker.dial()
        await client.send(proxy_v1() + head(credential=token()))
        assert 400 == (await client.response())[0]


@pytest.mark.parametrize(
    "bad", [b"PROXY TCP4 x y 1 2\r\n", V2 + b"\x21\x11\xff\xff", b"PROXY " + b"x" * 200]
)
async def test_a_broken_head_of_a_proxy_ends_its_connection(bad: bytes) -> None:
    """Nothing is answered: there is nobody who would understand it."""
    async with running(peers=LOCAL) as worker:
        client = await worker.dial()
        await client.send(bad)
        with pytest.raises((trio.BrokenResourceError, AssertionError)):
            await client.response()
        await worker.settled()


async def test_a_head_of_a_proxy_that_does_not_come_has_the_deadline_of_the_handshake() -> None:
    """Half a head, then silence: the socket is closed, and nothing is left."""
    async with running(peers=LOCAL, handshake_timeout=0.2) as worker:
        client = await worker.dial()
        await client.send(proxy_v1()[:20])
        assert b"" == await client.rest()
        await worker.settled()


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["X-Forwarded-For: 198.51.100.4"], "198.51.100.4"),
        (["X-Forwarded-For: 203.0.113.9, 198.51.100.4"], "198.51.100.4"),
        (["X-Forwarded-For: 203.0.113.9", "X-Forwarded-For: 198.51.100.4"], "198.51.100.4"),
        (["X-Forwarded-For: rubbish"], "127.0.0.1"),
        (["Forwarded: for=198.51.100.4"], "127.0.0.1"),
        ([], "127.0.0.1"),
    ],
)
async def test_the_header_of_a_trusted_proxy_counts(lines: list[str], expected: str) -> None:
    """The nearest entry that no trusted proxy stands for; the other header is not read."""
    async with running(peers=LOCAL) as worker:
        assert expected == await address_after(worker, head("/ws", *lines, credential=token()))


async def test_the_header_of_anybody_else_does_not_count() -> None:
    """X-Forwarded-For from a peer that is not trusted is never used."""
    forged = head("/ws", "X-Forwarded-For: 198.51.100.4", credential=token())
    async with running() as worker:
        assert "127.0.0.1" == await address_after(worker, forged)


async def test_limits_count_the_address_that_a_proxy_names() -> None:
    """One address of a proxy's clients is refused, another one behind it is not."""
    limits = Limits(connections=0, address_connections=2, handshakes=0, address_handshakes=0)

    def handshake(address: str) -> bytes:
        return head("/ws", f"X-Forwarded-For: {address}", credential=token())

    async def status(worker: Worker, address: str) -> int:
        client = await worker.dial()
        await client.send(handshake(address))
        return (await client.response())[0]

    async with running(peers=LOCAL, board=limits) as worker:
        assert [101, 101, 429, 101] == [
            await status(worker, address)
            for address in ("192.0.2.1", "192.0.2.1", "192.0.2.1", "192.0.2.2")
        ]
        # All of a /64 is one address.
        assert [101, 101, 429, 101] == [
            await status(worker, address)
            for address in ("2001:db8::1", "2001:db8::2", "2001:db8::3", "2001:db8:0:1::1")
        ]


async def test_silent_sockets_of_one_address_are_bounded() -> None:
    """One address cannot take all descriptors by saying nothing; who talks frees the place."""
    peers = Peers(limit_loopback=True)
    async with running(peers=peers, max_arrivals_per_address=3) as worker:
        silent = [await worker.dial() for _ in range(3)]
        await until(lambda: len(worker.listener.arrivals) == 3)
        late = await worker.dial()
        status, answer = await late.response()
        assert 429 == status
        assert b"Retry-After: " in answer
        await silent[0].send(head(credential=token()))
        assert 101 == (await silent[0].response())[0]
        await silent[1].aclose()
        await until(lambda: len(worker.listener.arrivals) == 1)
        again = await worker.dial()
        await again.send(head(credential=token()))
        assert 101 == (await again.response())[0]
        await silent[2].aclose()
        await until(lambda: not worker.listener.arrivals)
        assert {} == worker.listener._arriving


# TLS.


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Return an authority that nobody but these tests trusts."""
    return trustme.CA()


@pytest.fixture(scope="module")
def server(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    """Return how the server speaks TLS."""
    folder = tmp_path_factory.mktemp("tls")
    issued = authority.issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    (folder / "key.pem").chmod(0o600)
    return context(folder / "cert.pem", folder / "key.pem")


async def secured(worker: Worker, authority: trustme.CA, prefix: bytes = b"") -> Client:
    """Connect with TLS, perhaps behind a proxy that sends something first."""
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    plain = await trio.open_tcp_stream("127.0.0.1", worker.port)
    if prefix:
        await plain.send_all(prefix)
    stream = trio.SSLStream(plain, trusting, server_hostname="localhost", https_compatible=True)
    await stream.do_handshake()
    return Client(stream)  # type: ignore[arg-type]  # Only the options of sockets are missing.


@pytest.mark.parametrize("prefix", [b"", proxy_v1(), proxy_v2()])
async def test_with_a_certificate_the_port_speaks_tls(
    server: ssl.SSLContext, authority: trustme.CA, prefix: bytes
) -> None:
    """Handshake, first message, an echo and a farewell, also behind the head of a proxy."""
    async with running(tls=server, peers=LOCAL if prefix else Peers()) as worker:
        client = await secured(worker, authority, prefix)
        await client.send(head(credential=token()))
        assert 101 == (await client.response())[0]
        assert "connection_established" == (await client.message())["type"]
        assert ("192.0.2.7" if prefix else "127.0.0.1") == worker.only().caller.address
        await worker.publish(b"user_noti:ann", "x" * 9000)
        assert "x" * 9000 == (await client.message())["payload"]
        worker.only().failed(RuntimeError())
        assert "internal_error" == (await client.message())["reason"]
        await client.aclose()
        await worker.settled()


async def test_refusals_come_through_tls(server: ssl.SSLContext, authority: trustme.CA) -> None:
    """Also an answer before the upgrade is readable, and says to come with TLS only."""
    async with running(tls=server) as worker:
        client = await secured(worker, authority)
        await client.send(head(credential="rubbish"))
        status, answer = await client.response()
        assert 401 == status
        assert b"Strict-Transport-Security: " in answer
        await client.aclose()
        await worker.settled()


async def test_a_page_without_tls_is_another_origin(
    server: ssl.SSLContext, authority: trustme.CA
) -> None:
    """What was sent in the clear may have been changed on the way."""
    for scheme, expected in (("https", 101), ("http", 403)):
        async with running(tls=server) as worker:
            client = await secured(worker, authority)
            origin = f"Origin: {scheme}://example.com"
            request = head("/ws", origin, credential=token())
            await client.send(request.replace(b"Host: localhost", b"Host: example.com"))
            assert expected == (await client.response())[0]
            await client.aclose()


async def test_who_does_not_speak_tls_is_gone_at_once(server: ssl.SSLContext) -> None:
    """Plain HTTP and garbage end their connection and cost nobody else anything."""
    for data in (head(credential=token()), b"\x16\x03\x01" + b"\xff" * 100, b"\0" * 50):
        async with running(tls=server) as worker:
            client = await worker.dial()
            await client.send(data)
            assert b" 101 " not in await client.rest()
            await client.aclose()
            await worker.settled()


async def test_a_tls_handshake_that_stalls_has_the_deadline_of_the_handshake(
    server: ssl.SSLContext,
) -> None:
    """Nothing, or half a ClientHello: closed in time, and nothing is left."""
    async with running(tls=server, handshake_timeout=0.2) as worker:
        began = time.monotonic()
        for data in (b"", b"\x16\x03\x01\x02\0\x01"):
            client = await worker.dial()
            if data:
                await client.send(data)
            assert b"" == await client.rest()
        assert time.monotonic() - began < 5
        await worker.settled()


async def test_many_tls_handshakes_share_the_pump(
    server: ssl.SSLContext, authority: trustme.CA
) -> None:
    """More come at once than one round takes, and all of them get through."""
    async with running(tls=server) as worker:
        established = []

        async def come() -> None:
            client = await secured(worker, authority)
            await client.send(head(credential=token()))
            assert 101 == (await client.response())[0]
            established.append(await client.message())
            await client.aclose()

        async with trio.open_nursery() as nursery:
            for _ in range(30):
                nursery.start_soon(come)
        assert 30 == len(established)
        assert [] == [one for one in worker.pump._peers.values() if isinstance(one, Arrival)]


async def test_half_a_client_hello_without_end_is_not_kept(server: ssl.SSLContext) -> None:
    """OpenSSL would keep 128 KiB of it per socket, before anybody has said who he is."""
    async with running(tls=server) as worker:
        client = await worker.dial()
        hello = b"\x16\x03\x01\x40\x00" + b"\x01\x01\xff\xff" + b"\x03\x03" + b"x" * 16_378
        with contextlib.suppress(trio.BrokenResourceError):
            for _ in range(8):
                await client.send(hello)
            await client.rest()
        await client.aclose()
        await worker.settled()
        assert 1 == worker.tally.refusals["400"]


async def test_who_speaks_http_to_tls_reads_the_answer(server: ssl.SSLContext) -> None:
    """However much it has sent: closing on unread bytes would take the answer back."""
    async with running(tls=server) as worker:
        client = await worker.dial()
        await client.send(head("/ws", "Cookie: " + "x" * 8000, credential=token()))
        status, answer = await client.response()
        assert 400 == status
        assert b"Connection: close" in answer
        await client.aclose()
        await worker.settled()


async def test_silent_clients_of_a_proxy_are_bounded_each_on_its_own() -> None:
    """Behind the PROXY protocol, the address that it names is what is counted."""
    async with running(peers=LOCAL, max_arrivals_per_address=3) as worker:
        for _ in range(3):
            silent = await worker.dial()
            await silent.send(proxy_v1() + b"GET ")
        await until(lambda: sum(worker.listener._arriving.values()) == 3)
        late = await worker.dial()
        await late.send(proxy_v1() + b"GET ")
        assert 429 == (await late.response())[0]
        other = await worker.dial()
        await other.send(proxy_v1("192.0.2.8") + head(credential=token()))
        assert 101 == (await other.response())[0]
        for client in worker.clients:
            await client.aclose()
        await worker.settled()
        assert {} == worker.listener._arriving


async def test_an_id_behind_the_head_is_of_another_request() -> None:
    """A refusal answers with the id of its own head, or with a new one."""
    async with running() as worker:
        client = await worker.dial()
        await client.send(b"PUT / HTTP/1.1\r\nHost: x\r\n\r\nX-Request-ID: of-the-next\r\n\r\n")
        _, answer = await client.response()
        assert b"of-the-next" not in answer
        assert b"X-Request-ID: " in answer


async def test_a_refusal_of_head_has_no_body() -> None:
    """The same head as for GET, and nothing behind it."""
    async with running() as worker:
        for path, status in (("/nope", 404), ("/ws", 405)):
            client = await worker.dial()
            await client.send(f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert status == (await client.response())[0]
            assert b"" == await client.rest()


async def test_two_tokens_are_none() -> None:
    """Whoever checks the first in front of us must not let in the second."""
    async with running() as worker:
        client = await worker.dial()
        await client.send(head(f"/ws?token=rubbish&token={token()}"))
        assert 400 == (await client.response())[0]
