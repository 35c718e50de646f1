"""The answer to ``status``, read off the slot table."""

import attrs

from supervisor.events import Kind
from supervisor.slots import Place, Table, Timing
from trioserver.status import GatewayStatus, RedisStatus, StatusReply, WorkerStatus


@attrs.frozen(kw_only=True)
class Identity:
    """What never changes while this supervisor lives."""

    address: str
    """``host:port`` of the public sockets, as bound."""
    admin_address: str
    """The same of the internal one."""
    pid: int
    version: str


@attrs.frozen(kw_only=True)
class Moment:
    """What the table does not know."""

    now: float
    uptime: float
    generation: int
    draining: bool
    reloading: bool


def status_of(table: Table, identity: Identity, timing: Timing, moment: Moment) -> StatusReply:
    """Describe the pool: one entry per slot, whoever owns it."""
    now = moment.now
    places = sorted(
        (place for place in table.places.values() if place.kind is Kind.WORKER),
        key=lambda place: place.slot,
    )
    some_ready = any(place.ready(now, timing) for place in places)
    all_owned = all(place.owned(now, timing) for place in places)
    return StatusReply(
        ready=some_ready and all_owned and not moment.draining,
        workers=[_worker(place, now, timing) for place in places],
        gateway=_gateway(table.places[Kind.GATEWAY, 0], now, timing),
        redis=_redis(table.places.get((Kind.REDIS, 0)), now, timing, some_ready=some_ready),
        address=identity.address,
        admin_address=identity.admin_address,
        pid=identity.pid,
        generation=moment.generation,
        draining=moment.draining,
        reloading=moment.reloading,
        version=identity.version,
        uptime_seconds=round(moment.uptime, 3),
    )


def _worker(place: Place, now: float, timing: Timing) -> WorkerStatus:
    return WorkerStatus(
        slot=place.slot,
        pid=_pid(place),
        age_seconds=_age(place, now),
        connections=place.life.connections if place.life is not None else 0,
        restarts=place.restarts,
        ready=place.ready(now, timing),
        why=place.why(now, timing),
    )


def _gateway(place: Place, now: float, timing: Timing) -> GatewayStatus:
    return GatewayStatus(
        pid=_pid(place),
        age_seconds=_age(place, now),
        restarts=place.restarts,
        ready=place.ready(now, timing),
        why=place.why(now, timing),
    )


def _redis(place: Place | None, now: float, timing: Timing, *, some_ready: bool) -> RedisStatus:
    if place is None:
        return RedisStatus(embedded=False, pid=None, age_seconds=None, restarts=0, ready=some_ready)
    return RedisStatus(
        embedded=True,
        pid=_pid(place),
        age_seconds=_age(place, now),
        restarts=place.restarts,
        ready=place.ready(now, timing),
    )


def _pid(place: Place) -> int | None:
    return place.life.pid if place.life is not None else None


def _age(place: Place, now: float) -> float | None:
    return round(now - place.life.spawned_at, 3) if place.life is not None else None
