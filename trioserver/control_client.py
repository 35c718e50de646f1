"""The asking side of the control socket: once for commands, once for the gateway's Trio loop.

Both speak one request per connection. That costs a connection each (some 50 µs on a Unix socket)
and saves every thought about answers that come out of order or never.
"""

import socket
from pathlib import Path
from typing import Final, Literal

import trio

from trioserver.errors import CommandError
from trioserver.status import (
    PACKET_BYTES,
    Request,
    StatusReply,
    Verdict,
    decode_reply,
    encode,
)

Op = Literal["status", "reload", "stop"]

_REPLY_BYTES: Final = 1 << 20
"""A status has 100 bytes per worker, and there may be a thousand."""

_STATUS_SECONDS: Final = 2.0
"""The supervisor answers ``status`` between two turns of a loop that never waits."""


def ask(control_socket: Path, op: Op, timeout_seconds: float) -> StatusReply | Verdict:
    """Ask the supervisor, and block until it has answered.

    Args:
        control_socket: `StateDir.control_socket`.
        op: ``status`` is answered with a `StatusReply`, or a `Verdict` if it was refused;
            the others with a `Verdict`.
        timeout_seconds: For the answer. ``reload`` and ``stop`` answer when their outcome is
            certain, which takes as long as a start or a drain.

    Raises:
        CommandError: No server is running there, or it did not answer in time or sense.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as stream:
            # A limit per call, not for all together: connecting and sending never wait in practice.
            stream.settimeout(timeout_seconds)
            stream.connect(str(control_socket))
            stream.sendall(encode(Request(op=op)) + b"\n")
            with stream.makefile("rb") as lines:
                answer = lines.readline(_REPLY_BYTES)
    except (TimeoutError, BlockingIOError) as error:  # EAGAIN: its queue of callers is full
        raise _silent(op, timeout_seconds) from error
    except OSError as error:
        raise _nobody(control_socket, error) from error
    return _understood(answer, op)


async def ask_status(control_socket: Path, timeout_seconds: float = _STATUS_SECONDS) -> StatusReply:
    """Ask the supervisor how the pool is.

    Raises:
        CommandError: No server is running there, or it did not answer in time or sense.

    Cancellation:
        Safe; nothing is left behind.
    """
    answer = b""
    try:
        with trio.fail_after(timeout_seconds):
            stream = await trio.open_unix_socket(str(control_socket))
            async with stream:
                await stream.send_all(encode(Request(op="status")) + b"\n")
                while not answer.endswith(b"\n"):
                    part = await stream.receive_some(PACKET_BYTES)
                    if not part or len(answer) > _REPLY_BYTES:
                        break
                    answer += part
    except trio.TooSlowError as error:
        raise _silent("status", timeout_seconds) from error
    except (OSError, trio.BrokenResourceError) as error:
        raise _nobody(control_socket, error) from error
    reply = _understood(answer, "status")
    if isinstance(reply, Verdict):
        raise CommandError(f"the supervisor refused: {reply.reason}")
    return reply


def _understood(answer: bytes, op: Op) -> StatusReply | Verdict:
    if not answer.endswith(b"\n"):
        raise CommandError(f"the supervisor went away before it answered {op!r}")
    reply = decode_reply(answer)
    if reply is None:
        raise CommandError(f"the supervisor's answer to {op!r} makes no sense to this version")
    return reply


def _nobody(control_socket: Path, error: Exception) -> CommandError:
    if isinstance(error, PermissionError):
        return CommandError(f"may not talk to the trioserver with DATA_DIR {control_socket.parent}")
    return CommandError(f"no trioserver is running with DATA_DIR {control_socket.parent}")


def _silent(op: Op, timeout_seconds: float) -> CommandError:
    return CommandError(f"the supervisor did not answer {op!r} within {timeout_seconds:g} s")
