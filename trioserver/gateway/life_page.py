"""The life of a notification as the API tells it. Pure."""

from typing import Final

import msgspec

from trioserver.life import DeviceLife, Trace
from trioserver.messages import rfc3339

_LATEST_MS: Final = 253_402_300_799_999
"""The end of the year 9999, the last that RFC 3339 can write."""


def life_page(trace: Trace) -> bytes:
    """Return the JSON of ``GET /api/v1/notifications/{id}``; what is not known is null."""
    return msgspec.json.encode(
        {
            "id": trace.id,
            "to": _recipient(trace),
            "type": trace.type,
            "state": trace.state,
            "why": trace.why or None,
            "seq": trace.seq or None,
            "accepted_at": _when(trace.accepted),
            "expires_at": _when(trace.expires),
            "deliver_at": _when(trace.due),
            "fallback_at": _when(trace.fallback),
            "events": [{"event": one.kind, "at": _when(one.at)} for one in trace.events],
            "devices": [_device(life) for life in trace.devices],
        }
    )


def _recipient(trace: Trace) -> dict[str, str | bool]:
    if trace.topic is not None:
        return {"topic": trace.topic}
    return {"all": True} if trace.user is None else {"user": trace.user}


def _device(life: DeviceLife) -> dict[str, str | int | None]:
    return {
        "device": life.name or None,
        "sent_at": _when(life.sent),
        "received_at": _when(life.received),
        "acked_at": _when(life.acked),
        "read_at": _when(life.read),
        "attempts": life.attempts,
        "why": life.why or None,
    }


def _when(milliseconds: int | None) -> str | None:
    if milliseconds is None or milliseconds > _LATEST_MS:
        return None
    return rfc3339(milliseconds)
