"""TLS over real sockets, against OpenSSL's client."""

import contextlib
import errno
import gc
import hmac
import random
import select
import socket
import ssl
import struct
import time
import weakref
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tests.trioserver.certificates import LIMIT, Authority, Client, received
from tests.trioserver.wire import Pair, unread
from trioserver import tls
from trioserver.envelope import Entry
from trioserver.outbox import Outbox, OutboxLimits
from trioserver.tls import RECORD_BYTES, TlsSocket, wrap


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Who is trusted."""
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two connected sockets with the smallest buffers there are."""
    with Pair(1) as made:
        yield made


@pytest.fixture
def server(authority: Authority, pair: Pair) -> Iterator[TlsSocket]:
    """Our end, which has not said anything."""
    with wrap(authority.server(), pair.server) as made:
        yield made


@pytest.fixture
def client(authority: Authority, pair: Pair, server: TlsSocket) -> Client:
    """The other end, connected, after the handshake."""
    made = Client(pair.client, authority.client())
    made.shake(server)
    return made


@pytest.fixture
def epoll(server: TlsSocket) -> Iterator[select.epoll]:
    """What the pump would see of our end."""
    with select.epoll() as made:
        made.register(server.fileno(), select.EPOLLIN)
        yield made


class Forger:
    """A client of TLS 1.2 that writes records which OpenSSL would not."""

    def __init__(self, authority: Authority, pair: Pair) -> None:
        context = authority.client()
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("ECDHE+AESGCM")
        self._log = authority.directory / "keys"
        context.keylog_filename = str(self._log)
        self._client = Client(pair.client, context)
        self._sequence = 1

    def shake(self, server: TlsSocket) -> None:
        """Do the handshake, and take the keys that were agreed on."""
        self._client.shake(server)
        assert "TLSv1.2" == self._client.tls.version()
        line = self._log.read_text().splitlines()[-1].split()
        random, master = bytes.fromhex(line[1]), bytes.fromhex(line[2])
        cipher = self._client.tls.cipher()
        assert cipher is not None
        size, digest = (32, "sha384") if cipher[0].endswith("SHA384") else (16, "sha256")
        seed = b"key expansion" + self._client.server_random + random
        block, step = b"", seed
        while len(block) < 2 * size + 8:
            step = hmac.digest(master, step, digest)
            block += hmac.digest(master, step + seed, digest)
        self._key, self._iv = AESGCM(block[:size]), block[2 * size : 2 * size + 4]

    def record(self, kind: int, plain: bytes) -> bytes:
        """Return a record."""
        number = struct.pack("!Q", self._sequence)
        self._sequence += 1
        head = bytes((kind, 3, 3))
        sealed = self._key.encrypt(
            self._iv + number, plain, number + head + struct.pack("!H", len(plain))
        )
        return head + struct.pack("!H", 8 + len(sealed)) + number + sealed

    def renegotiation(self) -> bytes:
        """Return the beginning of another handshake, which is answered with an alert."""
        return self.record(22, b"\x01\0\0\0")


def everything(server: TlsSocket, client: Client, data: bytes) -> bytes:
    """Send all of it as the outbox would, while the client reads; return what it read."""
    sent, found = 0, b""
    limit = time.monotonic() + LIMIT
    while len(found) < len(data):
        assert time.monotonic() < limit
        try:
            sent += server.send(data[sent:]) if sent < len(data) else 0
        except BlockingIOError:
            select.select([client.sock], [], [], 0.05)
        found += client.read()
    assert sent == len(data)
    return found


def begun(server: TlsSocket) -> bool:
    """Return what it says now: a type checker takes it for what it was."""
    return server.begun


def fill(server: TlsSocket) -> int:
    """Stuff the socket with what is no TLS until it takes nothing more; return how much."""
    filling = 0
    while select.select([], [server], [], 0.05)[1]:
        filling += socket.socket.send(server, b"x" * 1000)
    with contextlib.suppress(BlockingIOError):
        while True:
            filling += socket.socket.send(server, b"x")
    return filling


def arrived(server: TlsSocket, data: bytes) -> None:
    """Wait until all of it is in the kernel's hands on our side."""
    limit = time.monotonic() + LIMIT
    found = b""
    while data != found:
        assert time.monotonic() < limit
        assert select.select([server], [], [], LIMIT)[0]
        found = socket.socket.recv(server, len(data), socket.MSG_PEEK)


def discard(sock: socket.socket, count: int) -> None:
    """Read exactly so many bytes."""
    while count:
        assert select.select([sock], [], [], LIMIT)[0]
        count -= len(sock.recv(count))


class TestHandshake:
    """How it begins."""

    def test_byte_by_byte(self, authority: Authority, pair: Pair, server: TlsSocket) -> None:
        """A handshake whose bytes trickle goes on with each of them, and never blocks."""
        client = Client(pair.client, authority.client())
        wants = set()
        limit = time.monotonic() + LIMIT
        assert server.version() is None
        while server.version() is None:
            for byte in client.step():
                pair.client.send(bytes((byte,)))
                assert select.select([server], [], [], LIMIT)[0]
                wants.add(server.handshake())
            assert time.monotonic() < limit

        assert {tls.READ, 0} == wants
        assert "TLSv1.3" == server.version() == client.tls.version()

    def test_silence(self, server: TlsSocket) -> None:
        """Where nothing has come, more is waited for, without blocking."""
        assert tls.READ == server.handshake()

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    def test_versions(
        self, authority: Authority, pair: Pair, server: TlsSocket, version: ssl.TLSVersion
    ) -> None:
        """TLS 1.2 and 1.3 are spoken, both with forward secrecy, and http/1.1 inside."""
        theirs = authority.client()
        theirs.minimum_version = theirs.maximum_version = version
        theirs.set_alpn_protocols(["h2", "http/1.1"])
        client = Client(pair.client, theirs)

        client.shake(server)

        pair.client.send(client.records(b"hello"))
        assert b"hello" == received(server)
        assert "http/1.1" == client.tls.selected_alpn_protocol()
        cipher = client.tls.cipher()
        assert cipher is not None
        assert cipher[0].startswith(("TLS_", "ECDHE-"))

    @pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
    def test_old_version(self, authority: Authority, pair: Pair, server: TlsSocket) -> None:
        """TLS 1.1 is refused, and the client is told why."""
        theirs = authority.client()
        theirs.minimum_version = theirs.maximum_version = ssl.TLSVersion.TLSv1_1
        theirs.set_ciphers("ALL:@SECLEVEL=0")
        client = Client(pair.client, theirs)
        pair.client.send(client.step())
        assert select.select([server], [], [], LIMIT)[0]

        with pytest.raises(ssl.SSLError, match="UNSUPPORTED_PROTOCOL"):
            server.handshake()

        assert select.select([pair.client], [], [], LIMIT)[0]
        with pytest.raises(ssl.SSLError, match=r"(?i)alert protocol version"):
            client.step()

    def test_plain_http(self, pair: Pair, server: TlsSocket) -> None:
        """A client that speaks plain HTTP is told in plain HTTP, at once."""
        pair.client.send(b"GET /ws HTTP/1.1\r\nHost: h\r\n\r\n")
        assert select.select([server], [], [], LIMIT)[0]

        with pytest.raises(OSError, match="HTTP_REQUEST"):
            server.handshake()
        server.close()

        assert select.select([pair.client], [], [], LIMIT)[0]
        answer = pair.client.recv(4096)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"speaks TLS" in answer

    @pytest.mark.parametrize("garbage", [b"\x00" * 64, b"\x16\x03\x01\xff\xff" + b"x" * 64, b"?"])
    def test_garbage(self, pair: Pair, server: TlsSocket, garbage: bytes) -> None:
        """What is no TLS fails at once or waits for more; the end is a failure in any case."""
        pair.client.send(garbage)
        pair.client.shutdown(socket.SHUT_WR)

        def to_the_end() -> None:
            for _ in range(3):
                assert select.select([server], [], [], LIMIT)[0]
                server.handshake()

        with pytest.raises(OSError, match=r"(?i)ssl|TLS"):
            to_the_end()

    def test_first_words(
        self,
        authority: Authority,
        pair: Pair,
        server: TlsSocket,
        epoll: select.epoll,
    ) -> None:
        """What comes in one piece with the end of the handshake is had from the next recv."""
        client = Client(pair.client, authority.client())
        pair.client.send(client.step())
        assert epoll.poll(LIMIT)
        assert tls.READ == server.handshake()
        assert select.select([pair.client], [], [], LIMIT)[0]
        last = client.step()
        last += client.records(b"GET ", b"/ws")
        pair.client.send(last)
        arrived(server, last)

        assert 0 == server.handshake()

        # The reason for that promise: epoll does not know.
        assert [] == epoll.poll(0)
        assert b"GET /ws" == server.recv(1 << 14)

    def test_full_socket(self, authority: Authority, pair: Pair, server: TlsSocket) -> None:
        """A handshake whose answer does not fit goes on when the socket takes bytes again."""
        client = Client(pair.client, authority.client())
        pair.client.send(client.step())
        filling = fill(server)
        assert select.select([server], [], [], LIMIT)[0]

        assert tls.WRITE == server.handshake()

        discard(pair.client, filling)
        client.shake(server)

    def test_no_tickets(self, pair: Pair, client: Client, server: TlsSocket) -> None:
        """After a handshake nothing is left to send that nobody would use."""
        assert not begun(server)
        assert not unread(pair.client)


class TestReading:
    """What comes in."""

    def test_many_records(
        self, pair: Pair, client: Client, server: TlsSocket, epoll: select.epoll
    ) -> None:
        """Many small records in one segment are one event of epoll, and one recv."""
        messages = [b"%d;" % number for number in range(12)]
        records = client.records(*messages)
        pair.client.send(records)
        arrived(server, records)
        assert epoll.poll(LIMIT)

        assert b"".join(messages) == server.recv(1 << 14)

        assert [] == epoll.poll(0)
        with pytest.raises(BlockingIOError):
            server.recv(1 << 14)

    @pytest.mark.parametrize("size", [1, 100, 1 << 14])
    def test_large_record(self, pair: Pair, client: Client, server: TlsSocket, size: int) -> None:
        """A record larger than what is asked for arrives whole, and leaves nothing behind."""
        data = random.Random(1).randbytes(16_000)
        rest = client.records(data)
        found = b""
        limit = time.monotonic() + LIMIT
        while len(found) < len(data):
            assert time.monotonic() < limit
            if rest and select.select([], [pair.client], [], 0)[1]:
                rest = rest[pair.client.send(rest) :]
            try:
                piece = server.recv(size)
            except BlockingIOError:
                continue
            assert len(piece) <= size + (1 << 14)
            found += piece

        assert data == found
        assert not unread(server)

    def test_part_of_a_record(self, pair: Pair, client: Client, server: TlsSocket) -> None:
        """A record that is not complete is nothing yet."""
        record = client.records(b"whole")
        pair.client.send(record[:-1])
        assert select.select([server], [], [], LIMIT)[0]
        with pytest.raises(BlockingIOError):
            server.recv(100)

        pair.client.send(record[-1:])

        assert b"whole" == received(server)

    def test_no_data(
        self, pair: Pair, client: Client, server: TlsSocket, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A client that keeps us decrypting and never says anything is given up."""
        assert tls.FRUITLESS_BYTES > 17 << 10
        monkeypatch.setattr(tls, "FRUITLESS_BYTES", 100)
        whole, long = client.records(b"x" * 60), client.records(b"x" * 200)
        for part, found in ((whole[:70], b""), (whole[70:], b"x" * 60), (long[:90], b"")):
            pair.client.send(part)
            arrived(server, part)
            if found:
                assert found == server.recv(100)
            else:
                with pytest.raises(BlockingIOError):
                    server.recv(100)
        pair.client.send(long[90:110])

        with pytest.raises(OSError, match="WITHOUT_DATA"):
            received(server)

    def test_answers_without_end(self, authority: Authority) -> None:
        """A client that makes OpenSSL answer and answer is given up before that fills memory."""

        def flood(client: socket.socket, forger: Forger, server: TlsSocket) -> None:
            for _ in range(10_000):
                # What accounts for it comes along.
                client.sendall(forger.renegotiation() + forger.record(23, b"x" * 10))
                for _ in range(4):
                    with contextlib.suppress(BlockingIOError):
                        server.recv(RECORD_BYTES)

        with Pair(1 << 18) as pair, wrap(authority.server(), pair.server) as server:
            forger = Forger(authority, pair)
            forger.shake(server)
            pair.client.settimeout(LIMIT)
            with pytest.raises(OSError, match="TOO_MANY_ANSWERS"):
                flood(pair.client, forger, server)
            assert server._outgoing.pending < 32 << 10

    def test_close_notify(
        self, pair: Pair, client: Client, server: TlsSocket, epoll: select.epoll
    ) -> None:
        """The end that comes behind data, from a client that keeps its socket, is seen by epoll."""
        data = client.records(b"last") + client.closing()
        pair.client.send(data)
        arrived(server, data)

        assert b"last" == server.recv(1 << 14)

        assert epoll.poll(LIMIT)
        assert b"" == server.recv(1 << 14)
        assert b"" == server.recv(1 << 14)

    def test_ragged_end(self, pair: Pair, client: Client, server: TlsSocket) -> None:
        """An end without close_notify is an end like any other."""
        pair.client.send(client.records(b"last"))
        assert b"last" == received(server)
        pair.client.shutdown(socket.SHUT_WR)

        assert b"" == received(server)

    def test_reset(self, pair: Pair, client: Client, server: TlsSocket) -> None:
        """A reset is an OSError, for who reads and for who writes."""
        pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        pair.client.close()

        with pytest.raises(ConnectionResetError):
            received(server)
        with pytest.raises(OSError):  # noqa: PT011 - BrokenPipeError or as above
            server.send(b"x")

    def test_forgery(
        self, pair: Pair, client: Client, server: TlsSocket, epoll: select.epoll
    ) -> None:
        """What follows a record that was tampered with is not read, nor is anything sent then."""
        forged = bytearray(client.records(b"forged"))
        forged[-1] ^= 1
        pair.client.send(forged)

        for _ in range(2):
            with pytest.raises(OSError) as caught:  # noqa: PT011 - looked at below
                received(server)
            assert not isinstance(caught.value, BlockingIOError)
        with pytest.raises(OSError, match="TLS failed"):
            server.send(b"x")

    def test_forgery_behind_data(
        self, pair: Pair, client: Client, server: TlsSocket, epoll: select.epoll
    ) -> None:
        """What came before a forged record counts; epoll tells that there is more to know."""
        good, forged = client.records(b"good"), bytearray(client.records(b"forged"))
        forged[-1] ^= 1
        data = good + forged
        pair.client.send(data)
        arrived(server, data)
        assert b"good" == server.recv(1 << 14)

        assert epoll.poll(LIMIT)
        with pytest.raises(OSError) as caught:  # noqa: PT011 - looked at below
            server.recv(1 << 14)
        assert errno.EPROTO == caught.value.errno


class TestWriting:
    """What goes out."""

    def test_much(self, client: Client, server: TlsSocket) -> None:
        """A megabyte through the smallest buffers arrives as it was, in many parts."""
        data = random.Random(2).randbytes(1 << 20)

        assert data == everything(server, client, data)

    def test_part(self, pair: Pair, client: Client, server: TlsSocket) -> None:
        """Of what is encrypted already only the last byte stays, and only that says so."""
        data = b"x" * (1 << 20)
        sent = server.send(data)

        assert 0 < sent < len(data)
        assert RECORD_BYTES - 1 == sent % RECORD_BYTES
        assert begun(server)
        with pytest.raises(BlockingIOError):
            server.send(data[sent:])

        limit = time.monotonic() + LIMIT
        found = b""
        while begun(server):
            assert time.monotonic() < limit
            found += client.read()
            with contextlib.suppress(BlockingIOError):
                assert 1 == server.send(b"x")
        while len(found) <= sent:
            assert time.monotonic() < limit
            found += client.read()
        assert data[: sent + 1] == found

    def test_single_byte(self, pair: Pair, client: Client, server: TlsSocket) -> None:
        """A byte that does not fit is begun although none was taken; it is sent only once."""
        filling = fill(server)
        for _ in range(2):
            with pytest.raises(BlockingIOError):
                server.send(b"y")
        assert begun(server)

        discard(pair.client, filling)
        assert select.select([], [server], [], LIMIT)[1]

        assert 1 == server.send(b"y")
        assert not begun(server)
        assert 1 == server.send(b"z")
        found = b""
        while len(found) < 2:
            assert select.select([pair.client], [], [], LIMIT)[0]
            found += client.read()
        assert b"yz" == found

    def test_nothing(self, client: Client, server: TlsSocket) -> None:
        """To send nothing is to take nothing."""
        assert 0 == server.send(b"") == server.sendmsg([])

    @pytest.mark.parametrize("seed", range(5))
    def test_vectors(self, client: Client, server: TlsSocket, seed: int) -> None:
        """Frames sent many at a time arrive in order; what is left never hides a begun frame."""
        rng = random.Random(seed)
        sizes = (2, 3, 100, RECORD_BYTES - 1, RECORD_BYTES, RECORD_BYTES + 1, 30_000)
        frames = [rng.randbytes(rng.choice(sizes)) for _ in range(120)]
        expected = b"".join(frames)
        found, offset = b"", 0
        limit = time.monotonic() + LIMIT
        while len(found) < len(expected):
            assert time.monotonic() < limit
            if frames:
                try:
                    sent = server.sendmsg([memoryview(frames[0])[offset:], *frames[1:20]]) + offset
                except BlockingIOError:
                    sent = offset
                while frames and sent >= len(frames[0]):
                    sent -= len(frames.pop(0))
                offset = sent
                # An outbox may drop all frames that were not begun, and knows them by this.
                assert offset or not begun(server)
            found += client.read(rng.randrange(1, 20_000))
        assert expected == found

    def test_no_way_past(self, client: Client, server: TlsSocket) -> None:
        """What would read or write without encryption is refused."""
        for way in ("sendall", "sendto", "recv_into", "makefile", "recvmsg", "sendfile", "dup"):
            with pytest.raises(OSError, match="past TLS"):
                getattr(server, way)(b"secret")
        with pytest.raises(OSError, match="past TLS"):
            server.sendmsg([b"x"], [(1, 2, b"")])


class TestEnd:
    """How it ends."""

    def test_shutdown(self, pair: Pair, client: Client, server: TlsSocket) -> None:
        """Shutting down says close_notify, waits for nothing, and reading goes on to the end."""
        server.send(b"bye")
        pair.client.send(client.records(b"unread"))
        server.shutdown(socket.SHUT_WR)

        found = b""
        while not found:
            assert select.select([pair.client], [], [], LIMIT)[0]
            found = client.read()
        assert b"bye" == found
        assert select.select([pair.client], [], [], LIMIT)[0]
        with pytest.raises(EOFError):
            client.read()
        assert b"unread" == received(server)
        pair.client.send(client.closing())
        assert b"" == received(server)

    def test_shutdown_before_the_handshake(self, pair: Pair, server: TlsSocket) -> None:
        """Who never spoke TLS is just shut down."""
        server.shutdown(socket.SHUT_WR)

        assert select.select([pair.client], [], [], LIMIT)[0]
        assert b"" == pair.client.recv(10)

    def test_shutdown_of_a_full_socket(self, client: Client, server: TlsSocket) -> None:
        """A record that is stuck does not keep a shutdown from happening, now."""
        server.send(b"x" * (1 << 20))

        server.shutdown(socket.SHUT_WR)

        assert begun(server)

    def test_no_cycle(self, authority: Authority, pair: Pair, client: Client) -> None:
        """A socket is freed with its last reference, failed or not: no collector is needed."""
        with Pair(1) as other:
            sock = wrap(authority.server(), other.server)
            other.client.send(b"GET / HTTP/1.1\r\n\r\n")
            assert select.select([sock], [], [], LIMIT)[0]
            gc.disable()
            try:
                with pytest.raises(OSError, match="HTTP_REQUEST"):
                    sock.handshake()
                gone = weakref.ref(sock)
                sock.close()
                del sock
                assert gone() is None
            finally:
                gc.enable()


class Owner:
    """Hears of an outbox and does nothing about it."""

    def blocked(self) -> None:
        """See `Outbox`."""

    def overflowed(self) -> None:
        """See `Outbox`."""

    def broke(self) -> None:
        """See `Outbox`."""

    def entered(self, entry: Entry, *, everyone: bool) -> bool:
        """See `Outbox`."""
        raise AssertionError

    def entered_topic(self, topic: bytes, entry: Entry, frame: bytes) -> bool:
        """See `Outbox`."""
        raise AssertionError


class TestOutbox:
    """The outbox over such a socket."""

    def test_slow_reader(self, client: Client, server: TlsSocket) -> None:
        """All frames reach a client that reads slowly, in their order."""
        rng = random.Random(3)
        outbox = Outbox(server, OutboxLimits(max_bytes=1 << 22, max_frames=0), Owner())
        frames = [rng.randbytes(rng.choice((2, 60, 3_000, 12_000))) for _ in range(150)]
        found = b""
        for frame in frames:
            assert outbox.offer(frame)
            if rng.random() < 0.5:
                found += client.read(rng.randrange(1, 5_000))
                outbox.flush()
        limit = time.monotonic() + LIMIT
        while len(found) < sum(map(len, frames)):
            assert time.monotonic() < limit
            outbox.flush()
            found += client.read()
        assert b"".join(frames) == found
        assert outbox.empty

    @pytest.mark.parametrize("read_before", range(0, 12_000, 1_500))
    def test_farewell(self, client: Client, server: TlsSocket, read_before: int) -> None:
        """When frames are dropped, whole ones have arrived, and the farewell is the next."""
        outbox = Outbox(server, OutboxLimits(), Owner())
        frames = [b"<%d:" % number + b"x" * 900 + b">" for number in range(100)]
        for frame in frames:
            assert outbox.offer(frame)
        found = client.read(read_before) if read_before else b""
        outbox.flush()
        outbox.finish(b"<farewell>", drop=True)
        limit = time.monotonic() + LIMIT
        while not found.endswith(b"<farewell>"):
            assert time.monotonic() < limit
            outbox.flush()
            found += client.read()

        body = found.removesuffix(b"<farewell>")
        assert b"".join(frames)[: len(body)] == body
        assert body.endswith(b">")
        assert len(body) < 100 * 900
