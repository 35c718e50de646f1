"""What supervisor, children and commands say to each other: values and their encoding.

Two conversations, both JSON, so that the old code of one process understands the new code of
another across a reload (the supervisor itself lives through reloads and is then the oldest).

*The control pair* of each child, an ``AF_UNIX SOCK_SEQPACKET`` pair, one message per packet:

    ================  =====================  ================================================
    direction         message                when
    ================  =====================  ================================================
    child -> parent   `Started`              once: a worker could accept, the gateway serves
    child -> parent   `Beat`                 every second from the child's Trio loop, and at
                                             once when ``ready`` or ``why`` changes
    parent -> child   `Drain`                finish; a later one can only ask for more haste
    parent -> child   *end of file*          the supervisor is gone: finish quickly
    ================  =====================  ================================================

*The control socket* in the state directory, a stream of lines: one `Request` per line, one
answer per request, in the order in which the answers become known. ``status`` is answered with
a `StatusReply` at once; ``reload`` and ``stop`` with a `Verdict` when their outcome is certain.
The verdict of ``stop`` comes when the ports and the state directory are free again.

What is tolerated: unknown fields are ignored, a message of an unknown type or of a higher
version ``v`` decodes to ``None`` and is skipped, an unknown ``op`` gets a `Verdict` that says so.
A version is raised only when an old reader would misunderstand; new fields need a default.
"""

from collections.abc import Mapping
from typing import Final, TypeVar

import msgspec

CONTROL_FD: Final = 3
"""In a child: its end of the control pair."""
LISTEN_FD: Final = 4
"""In a child: its listening socket, owned by the supervisor and open across lives."""
SETTINGS_FD: Final = 5
"""In a child: the settings snapshot; read it with ``os.pread`` from 0, the offset is shared."""

BOARD_FD: Final = 6
"""In a worker: memory that all workers of the server share (`board_map`). The gateway has none."""

VERSION: Final = 1
"""Version of every message in this module."""

PACKET_BYTES: Final = 65536
"""Upper bound of one packet on a control pair, and of one line on the control socket."""


class Started(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="started"):
    """A client could connect to this child from now on."""

    v: int = VERSION


class Beat(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="beat"):
    """The child's loop turns, and this is how it is."""

    v: int = VERSION
    connections: int = 0
    """Connections that it holds now."""
    ready: bool = False
    """Whether a message sent to a client of this child now would arrive."""
    why: str = ""
    """Why it is not ready, in a few words; empty while it is."""


class Drain(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="drain"):
    """Finish: refuse newcomers, close what is open, end."""

    v: int = VERSION
    seconds: float
    """Time for all of it, propagation included. The supervisor kills soon after."""
    propagation: float = 0.0
    """Seconds to go on accepting first, until load balancers know; 0 = stop accepting at once."""
    quick: bool = False
    """Say goodbye to everybody at once instead of spreading it over ``seconds``."""
    replaced: bool = False
    """Somebody else serves the same socket: leave to them who waits in its queue."""


Report = Started | Beat
"""What a child says."""
Order = Drain
"""What a child is told. One type so far; a union once there are more."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One line to the control socket."""

    op: str
    """``status``, ``reload`` or ``stop``."""
    v: int = VERSION


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a ``reload`` or ``stop``, or the refusal of any request."""

    ok: bool
    reason: str = ""
    """Why not, in one line; empty if it went well."""
    generation: int | None = None
    """The generation that serves now, after a reload."""


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One slot. ``pid`` is null while nobody owns it."""

    slot: int
    pid: int | None
    age_seconds: float | None
    connections: int
    restarts: int
    """How often the supervisor had to start somebody new here; reloads do not count."""
    ready: bool
    why: str
    """Why it is not ready; empty while it is."""


class GatewayStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The gateway's slot."""

    pid: int | None
    age_seconds: float | None
    restarts: int
    ready: bool
    why: str = ""


class RedisStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The embedded Redis; of an external one only ``ready`` means something."""

    embedded: bool
    pid: int | None
    age_seconds: float | None
    restarts: int
    ready: bool
    """Embedded: it answered since its start. External: some worker is ready, thus reaches it."""


class StatusReply(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to ``status``: the whole pool at one moment."""

    ready: bool
    """At least one worker is ready, every slot has a live owner, and no stop is under way."""
    workers: list[WorkerStatus]
    gateway: GatewayStatus
    redis: RedisStatus
    address: str
    """``host:port`` that is really bound, public; IPv6 hosts in brackets."""
    admin_address: str
    """The same of the internal port."""
    pid: int
    """The supervisor's."""
    generation: int
    """Which generation serves: 1 after the start, higher after each reload."""
    draining: bool
    """The server is stopping."""
    reloading: bool
    """A new generation is being raised beside this one."""
    version: str
    """The supervisor's; workers may be newer after a reload."""
    uptime_seconds: float
    """Since the supervisor started."""


def encode(message: Report | Order | Request | StatusReply | Verdict) -> bytes:
    """Return the message as one line of JSON without its newline."""
    return _encoder.encode(message)


def decode_report(packet: bytes) -> Report | None:
    """Return what a child said, or ``None`` if it is not understood."""
    return _known(packet, _reports)


def decode_order(packet: bytes) -> Order | None:
    """Return what the supervisor ordered, or ``None`` if it is not understood."""
    return _known(packet, _orders)


def decode_request(line: bytes) -> Request | None:
    """Return a request, its ``op`` unchecked, or ``None`` if the line is not one."""
    return _known(line, _requests)


def decode_reply(line: bytes) -> StatusReply | Verdict | None:
    """Return an answer of the control socket, or ``None`` if it is not understood."""
    try:
        # The shapes of the two answers are promised to people without a tag; "ok" tells them
        # apart.
        fields = _objects.decode(line)
        if "ok" in fields:
            return msgspec.convert(fields, Verdict)
        return msgspec.convert(fields, StatusReply)
    except msgspec.MsgspecError:
        return None


_Versioned = TypeVar("_Versioned", Report, Order, Request)


def _known(packet: bytes, decoder: msgspec.json.Decoder[_Versioned]) -> _Versioned | None:
    try:
        message = decoder.decode(packet)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return message if message.v <= VERSION else None


_encoder = msgspec.json.Encoder()
_reports: msgspec.json.Decoder[Report] = msgspec.json.Decoder(Started | Beat)
_orders: msgspec.json.Decoder[Order] = msgspec.json.Decoder(Drain)
_requests: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_objects: msgspec.json.Decoder[Mapping[str, object]] = msgspec.json.Decoder(dict[str, object])
