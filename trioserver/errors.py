"""Errors, sorted by who must act; and the one table of ways in which a connection ends.

    TrioserverError
    ├── SettingsError      the operator: a setting is impossible          (exit code 4)
    ├── CommandError       the operator: a command cannot be carried out  (exit code 1)
    ├── RedisError         nobody, wait: Redis did not do what was asked
    │   ├── RedisUnavailable   it did not answer; whether it acted is unknown
    │   └── RedisRefused       it answered with an error
    ├── AuthError          the client: its token is not good enough
    └── ClientError        the client: one message was wrong; it is answered with ``error``

A ``ClientError`` never ends a connection; a `CloseReason` always does. Expected ends of a
connection travel as a `CloseReason` value, not as an exception: exceptions are for bugs.
"""

import enum

import attrs


class TrioserverError(Exception):
    """Everything this project raises on purpose. ``str()`` of it is one line for a person."""


@attrs.frozen
class SettingsError(TrioserverError):
    """A setting has an impossible value.

    Rendered as one line: setting, problem, example.
    """

    setting: str
    problem: str
    example: str = ""

    def __str__(self) -> str:
        line = f"{self.setting}: {self.problem}"
        return f"{line} (example: {self.example})" if self.example else line


class CommandError(TrioserverError):
    """A command of the CLI cannot be carried out; the text says what to do."""


class RedisError(TrioserverError):
    """Redis did not do what was asked."""


class RedisUnavailable(RedisError):  # noqa: N818 - reads as the state it reports
    """Redis did not answer in time, or the connection broke: the outcome is unknown."""


class RedisRefused(RedisError):  # noqa: N818 - reads as the state it reports
    """Redis answered with an error reply: the command had no effect."""


class AuthError(TrioserverError):
    """A token was refused. The text is for the log; clients get one generic sentence."""

    def __init__(self, problem: str, *, outcome: str = "invalid", retry_after: int = 0) -> None:
        super().__init__(problem)
        self.outcome = outcome
        """Label of ``auth_total``: ``invalid``, ``expired``, ``revoked`` or ``unknown_key``."""
        self.retry_after = retry_after
        """Seconds after which the same token may be good: more than 0 with ``unknown_key`` only,
        which is no verdict but the want of a key that is being fetched."""


@attrs.frozen
class ClientError(TrioserverError):
    """One message of a client was wrong; the connection lives.

    Attributes:
        code: The value of ``code`` in the ``error`` message, a lower-case word.
        message: One sentence for the developer of the client.
        ref: The client's own ``ref``, if the message carried one.
    """

    code: str
    message: str
    ref: str | None = None

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class CloseReason(enum.Enum):
    """Every way a WebSocket connection ends: one row each, used by code, clients and metrics.

    The member's name in lower case is ``reason`` in ``goodbye`` and the label of
    ``websocket_closes_total``. Codes 44xx are ours; 4400, 4401 and 4403 say: do not come back
    unchanged.
    """

    # name            code  reconnect  text in the close frame
    NORMAL = (1000, False, "bye")
    GOING_AWAY = (1001, True, "server is going away")
    PROTOCOL_ERROR = (1002, False, "protocol error")
    UNSUPPORTED_DATA = (1003, False, "only text messages are understood")
    INVALID_UTF8 = (1007, False, "text is not UTF-8")
    POLICY = (1008, False, "policy violated")
    TOO_BIG = (1009, False, "message too big")
    INTERNAL_ERROR = (1011, True, "internal error")
    OVERLOAD = (1013, True, "overloaded, try later")
    BAD_REQUEST = (4400, False, "bad request")
    UNAUTHORIZED = (4401, False, "unauthorized")
    FORBIDDEN = (4403, False, "forbidden")
    AUTH_TIMEOUT = (4408, True, "no credentials in time")
    SUPERSEDED = (4409, False, "superseded or too many connections")
    TOO_SLOW = (4410, True, "reading too slowly")
    NO_PONG = (4411, True, "no answer to pings")
    RATE = (4429, True, "too many requests")
    # No close frame can be sent in these two; the code is what a client's own stack reports.
    PEER_CLOSED = (1005, False, "the client closed")
    PEER_LOST = (1006, True, "the connection broke")

    def __init__(self, code: int, reconnect: bool, text: str) -> None:  # noqa: FBT001
        self.code = code
        """WebSocket close code."""
        self.reconnect = reconnect
        """Whether the same client may come back with the same credentials."""
        self.text = text
        """Reason in the close frame: at most 123 bytes of UTF-8."""
        self.label = self.name.lower()
        """Metrics label and ``reason`` of ``goodbye``."""

    @classmethod
    def labels(cls) -> tuple[str, ...]:
        """Return the closed label set, for metrics."""
        return tuple(reason.label for reason in cls)

    @property
    def by_peer(self) -> bool:
        """Whether the other side ended it: nothing can or need be said to it any more."""
        return self in {CloseReason.PEER_CLOSED, CloseReason.PEER_LOST}
