"""Metrics that no process counts about itself: they are looked up when somebody asks."""

from collections.abc import Iterable, Mapping
from typing import Final

import attrs
from prometheus_client.core import Metric, Sample

from trioserver.gateway.redis_watch import RedisPing
from trioserver.gateway.usage import Usage
from trioserver.status import StatusReply, WorkerStatus


@attrs.frozen
class PoolFamily:
    """One metric: its name, type and meaning, and the name of its label, if it has one."""

    name: str
    type: str
    help: str
    label: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names, as in `metric_families.Family`."""
        return (self.label,) if self.label else ()

    def metric(self, values: Mapping[str, float]) -> Metric:
        """Return it with values, by label value; that of one without labels is ``""``."""
        # This library wants to add the ending of a counter itself.
        metric = Metric(self.name.removesuffix("_total"), self.help, self.type)
        metric.samples = [
            Sample(self.name, {self.label: member} if self.label else {}, value)
            for member, value in values.items()
        ]
        return metric


POOL_READY: Final = PoolFamily("pool_ready", "gauge", "Whether a client could be served now.")
REDIS_UP: Final = PoolFamily("redis_up", "gauge", "Whether Redis answered the gateway's last ping.")
REDIS_PING_SECONDS: Final = PoolFamily(
    "redis_ping_seconds",
    "gauge",
    "How long Redis took to answer the gateway's last ping; 0 if it did not.",
)
UNIQUE_USERS: Final = PoolFamily(
    "unique_users",
    "gauge",
    "Different users connected to the whole fleet, about; while Redis is away or knows of no "
    "worker, added up over this server's workers.",
)
WORKER_UP: Final = PoolFamily("worker_up", "gauge", "Whether the slot has a process.", "slot")
WORKER_READY: Final = PoolFamily(
    "worker_ready", "gauge", "Whether the slot's worker could serve a client now.", "slot"
)
WORKER_RESTARTS: Final = PoolFamily(
    "worker_restarts_total",
    "counter",
    "How often somebody new had to be started in the slot; reloads do not count.",
    "slot",
)
CPU_SECONDS: Final = PoolFamily(
    "process_cpu_seconds_total",
    "counter",
    "Processor time of the process that has this role now, since it started.",
    "process",
)
RESIDENT_BYTES: Final = PoolFamily(
    "process_resident_memory_bytes", "gauge", "Resident memory of the process.", "process"
)
OPEN_FDS: Final = PoolFamily(
    "process_open_fds", "gauge", "Descriptors that the process has open.", "process"
)

POOL_FAMILIES: Final = (
    POOL_READY,
    REDIS_UP,
    REDIS_PING_SECONDS,
    UNIQUE_USERS,
    WORKER_UP,
    WORKER_READY,
    WORKER_RESTARTS,
    CPU_SECONDS,
    RESIDENT_BYTES,
    OPEN_FDS,
)
"""All of them."""


def pool_metrics(
    reply: StatusReply | None, used: Mapping[str, Usage], ping: RedisPing, *, users: int
) -> list[Metric]:
    """Return all of them with their values.

    Args:
        reply: The supervisor's word; None while it has not answered, which is not "up".
        used: What processes use, by role.
        ping: How the gateway's last ping of Redis went.
        users: How many the fleet has.
    """
    workers: Iterable[WorkerStatus] = () if reply is None else reply.workers
    slots = {str(worker.slot): worker for worker in workers}
    return [
        POOL_READY.metric({"": reply is not None and reply.ready}),
        REDIS_UP.metric({"": ping.seconds is not None}),
        REDIS_PING_SECONDS.metric({"": ping.seconds or 0.0}),
        UNIQUE_USERS.metric({"": users}),
        WORKER_UP.metric({slot: worker.pid is not None for slot, worker in slots.items()}),
        WORKER_READY.metric({slot: worker.ready for slot, worker in slots.items()}),
        WORKER_RESTARTS.metric({slot: worker.restarts for slot, worker in slots.items()}),
        CPU_SECONDS.metric({role: one.cpu_seconds for role, one in used.items()}),
        RESIDENT_BYTES.metric({role: one.resident_bytes for role, one in used.items()}),
        OPEN_FDS.metric({role: one.open_fds for role, one in used.items()}),
    ]
