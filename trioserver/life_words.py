"""How a user stands and the life of a notification, in words for a terminal."""

from collections.abc import Iterator, Sequence

from trioserver.life import MAX_ENTRIES, DeviceLife, Standing, Trace
from trioserver.messages import rfc3339

NAMELESS = "(no name)"


def standing_text(standing: Standing) -> str:
    """Return how a user stands, a line per device."""
    kept = str(standing.retained) if standing.all_counted else f"{standing.retained} or more"
    head = (
        f"user {standing.user}: {standing.unread} unread, {kept} kept, newest seq {standing.seq}, "
        f"position {standing.position}"
    )
    if not standing.devices:
        return f"{head}\n  no device has come in the last 30 days"
    rows = [("device", "last seen", "sent", "received", "acked", "outstanding")]
    rows.extend(
        (
            device.name or NAMELESS,
            rfc3339(device.seen),
            str(device.sent),
            str(device.received),
            str(device.acked),
            str(device.outstanding),
        )
        for device in standing.devices
    )
    lines = [head, *_table(rows)]
    if not standing.all_counted:
        lines.append(f"  (only the first {MAX_ENTRIES} kept entries were counted)")
    return "\n".join(lines)


def trace_text(trace: Trace) -> str:
    """Return the life of a notification: what happened when, then a line per device."""
    whom = "everyone" if trace.user is None else f"user {trace.user}"
    if trace.topic is not None:
        whom = f"topic {trace.topic}"
    number = f", seq {trace.seq}" if trace.seq else ""
    why = f" ({trace.why})" if trace.why else ""
    lines = [f"{trace.id}: {trace.state}{why}", f"  {trace.type}, for {whom}{number}"]
    moments = (
        ("accepted", trace.accepted),
        ("deliver at", trace.due),
        ("fallback at", trace.fallback),
        *((event.kind, event.at) for event in trace.events),
        ("expires", trace.expires),
    )
    lines.extend(f"  {what:<12} {rfc3339(when)}" for what, when in moments if when is not None)
    if trace.devices:
        rows = [(device.name or NAMELESS, _history(device)) for device in trace.devices]
        lines += ["  devices", *(f"  {line}" for line in _table(rows))]
    elif trace.user is not None:
        lines.append("  no device has come in the last 30 days")
    return "\n".join(lines)


def _history(device: DeviceLife) -> str:
    moments = (
        ("sent", device.sent),
        ("received", device.received),
        ("acked", device.acked),
        ("read", device.read),
    )
    parts = [f"{what} {rfc3339(when)}" for what, when in moments if when is not None]
    if device.why:
        parts.append(f"not received: {device.why}")
    if device.attempts:
        parts.append(f"attempt {device.attempts}")
    return ", ".join(parts)


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield f"  {'  '.join(cells)}".rstrip()
