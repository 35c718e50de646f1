"""The end of a worker: close the door, say goodbye to everybody, within a given time.

    unready at once    the caller sees to that
    propagation        go on accepting until load balancers know; 0 at a reload
    the door           who waits in the accept queue is answered with 503: closing a queue that
                       is not empty would reset them
    goodbyes           spread over a window, so that those who come back elsewhere come at
                       `GOODBYES_PER_SECOND` at most; the window leaves time for the last ones
    the deadline       whoever has not closed by then is cut

A second order may ask for more haste at any moment: then everybody is told at once.
"""

from typing import Final

import trio

from trioserver.connection import CLOSE_SECONDS
from trioserver.errors import CloseReason
from trioserver.lifeline import Lifeline
from trioserver.listener import Listener
from trioserver.pump import Door
from trioserver.status import Drain

GOODBYES_PER_SECOND: Final = 500
"""As many handshakes as a fleet takes per second without trouble."""

LAST_WORDS_SECONDS: Final = 1.0
"""In a quick stop: time for goodbyes to leave."""

_MARGIN_SECONDS: Final = 1.0


async def drain(
    order: Drain, lifeline: Lifeline, listener: Listener, door: Door, connections: trio.CancelScope
) -> Drain:
    """End every connection; they are gone when ``connections`` is.

    Args:
        order: How much time there is.
        lifeline: Tells when that changes.
        listener: Whose connections are ended.
        door: Accepts until it is closed here.
        connections: The scope of their tasks; its deadline is set.

    Returns:
        The order that was carried out in the end, which may be a quicker one.

    Cancellation:
        Leaves some connections without a goodbye.
    """
    deadline = trio.current_time() + order.seconds
    if not order.quick:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_drain_in_order, order, listener, door, nursery.cancel_scope)
            # Cancelled when the goodbyes are said; then the order stands as it was.
            order = await lifeline.wait_hurry()
            deadline = trio.current_time() + order.seconds
            nursery.cancel_scope.cancel()
    _close_door(listener, door)
    for connection in tuple(listener.connections):
        connection.end(CloseReason.GOING_AWAY)
    if order.quick:
        deadline = min(deadline, trio.current_time() + LAST_WORDS_SECONDS)
    connections.deadline = deadline
    return order


async def _drain_in_order(
    order: Drain, listener: Listener, door: Door, done: trio.CancelScope
) -> None:
    began = trio.current_time()
    await trio.sleep(order.propagation)
    _close_door(listener, door)
    leaving = list(listener.connections)
    start = trio.current_time()
    time_left = began + order.seconds - start - CLOSE_SECONDS - _MARGIN_SECONDS
    window = min(max(0.0, time_left), len(leaving) / GOODBYES_PER_SECOND)
    for number, connection in enumerate(leaving):
        await trio.sleep_until(start + window * number / len(leaving))
        connection.end(CloseReason.GOING_AWAY)
    done.cancel()


def _close_door(listener: Listener, door: Door) -> None:
    """Answer who waits in the accept queue with 503, then accept no more; idempotent."""
    listener.draining = True
    if door.open:
        door.empty()
        door.lock()
