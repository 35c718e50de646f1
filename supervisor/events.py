"""What the policy is told, and what it wants done: values without behaviour.

`Event` in, `Action` out; the loop translates both to and from the operating system.
"""

import enum
import signal

import attrs

from trioserver.status import StatusReply, Verdict


class Kind(enum.StrEnum):
    """What a child is. The value is its name in logs."""

    WORKER = "worker"
    GATEWAY = "gateway"
    REDIS = "redis"


# --- events -------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Begin:
    """The loop runs; nothing has been spawned yet. The first event, once."""


@attrs.frozen(kw_only=True)
class Spawned:
    """A `Spawn` was carried out. Always the very next event after it."""

    kind: Kind
    slot: int
    generation: int
    pid: int


@attrs.frozen(kw_only=True)
class SpawnFailed:
    """A `Spawn` could not be carried out. Always the very next event after it."""

    kind: Kind
    slot: int
    generation: int
    reason: str


@attrs.frozen(kw_only=True)
class Started:
    """A worker or the gateway says that a client could connect to it."""

    pid: int


@attrs.frozen(kw_only=True)
class Beat:
    """A worker or the gateway shows that its loop turns."""

    pid: int
    connections: int
    ready: bool
    why: str


@attrs.frozen(kw_only=True)
class RedisAnswered:
    """The embedded Redis answered a PING. ``loading``: with "wait, I am reading my files"."""

    pid: int
    loading: bool = False


@attrs.frozen(kw_only=True)
class Exited:
    """A child was reaped, perhaps one that nobody here has started.

    Attributes:
        pid: Its process id, free for reuse from now on.
        code: Its exit code, or minus the number of the signal that killed it.
    """

    pid: int
    code: int


@attrs.frozen(kw_only=True)
class SignalCame:
    """Somebody sent the supervisor a signal."""

    signal: signal.Signals


@attrs.frozen(kw_only=True)
class Asked:
    """A request arrived on the control socket; it wants one `Reply` with the same number."""

    request: int
    op: str


@attrs.frozen(kw_only=True)
class SnapshotReady:
    """New settings were read and may be used, by `TakeSnapshot`."""

    generation: int
    drain: "DrainTimes"


@attrs.frozen(kw_only=True)
class SnapshotFailed:
    """New settings were not to be had, or cannot be changed without a restart."""

    generation: int
    reason: str


@attrs.frozen(kw_only=True)
class Tick:
    """Time has passed."""


ChildEvent = Spawned | SpawnFailed | Started | Beat | RedisAnswered | Exited
Event = ChildEvent | Begin | SignalCame | Asked | SnapshotReady | SnapshotFailed | Tick


# --- actions ------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Spawn:
    """Start a process; answered with `Spawned` or `SpawnFailed` before anything else happens."""

    kind: Kind
    slot: int
    generation: int


@attrs.frozen(kw_only=True)
class Kill:
    """Send a signal to a child that has not been reaped."""

    pid: int
    signal: signal.Signals


@attrs.frozen(kw_only=True)
class SendDrain:
    """Order a worker or the gateway to finish; the fields are those of the order."""

    pid: int
    seconds: float
    propagation: float
    quick: bool
    replaced: bool = False


@attrs.frozen(kw_only=True)
class CloseDoor:
    """Nobody will accept at this slot's socket again: let the kernel use the others, or refuse."""

    slot: int


@attrs.frozen(kw_only=True)
class TakeSnapshot:
    """Have a fresh interpreter read the settings for this generation."""

    generation: int


@attrs.frozen(kw_only=True)
class DropSnapshot:
    """Nothing of this generation will be spawned any more; stop reading its settings, too."""

    generation: int


@attrs.frozen(kw_only=True)
class Reply:
    """Answer a request."""

    request: int
    reply: StatusReply | Verdict


@attrs.frozen(kw_only=True)
class Announce:
    """Everything is ready for the first time: tell the person in front of the terminal."""

    seconds: float
    """Since the start."""


@attrs.frozen(kw_only=True)
class Say:
    """Write a line to the log."""

    level: str
    """``debug``, ``info``, ``warning`` or ``error``."""
    event: str
    fields: dict[str, object] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Exit:
    """Every child is gone: end with this code. The last action, once."""

    code: int


Action = (
    Spawn
    | Kill
    | SendDrain
    | CloseDoor
    | TakeSnapshot
    | DropSnapshot
    | Reply
    | Announce
    | Say
    | Exit
)


# --- shared values ------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class DrainTimes:
    """How long an ordinary drain may take, as configured."""

    seconds: float
    """From the order to SIGKILL, everything included (``DRAIN_SECONDS``)."""
    propagation: float
    """Of these, how long to go on accepting (``DRAIN_PROPAGATION``)."""
