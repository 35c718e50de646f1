"""The end of a worker: take nobody new, say goodbye to everybody, within a given time.

    unready at once    the caller sees to that
    propagation        go on accepting until load balancers know; 0 at a reload
    the door           at a reload it is closed at once: the successor accepts from the same
                       socket, and who has been accepted already may finish the handshake. In a
                       stop nobody else would accept, so it stays open to the end, and whoever
                       comes is told so (503) instead of being left to wait
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
from trioserver.pump import LINGER_SECONDS, Door
from trioserver.status import Drain

GOODBYES_PER_SECOND: Final = 500
"""As many handshakes as a fleet takes per second without trouble."""

LAST_WORDS_SECONDS: Final = 1.0
"""In a quick stop: time for goodbyes to leave."""

QUICK_LINGER_SECONDS: Final = 0.3

ARRIVAL_SECONDS: Final = 2.0
"""For handshakes that were under way when a successor took over: several round trips."""


async def drain(
    order: Drain, lifeline: Lifeline, listener: Listener, door: Door, connections: trio.CancelScope
) -> float:
    """End every connection; they are gone when ``connections`` is.

    Args:
        order: How much time there is, and whether somebody else serves the socket.
        lifeline: Tells when that changes.
        listener: Whose connections are ended.
        door: Accepts; closed here only if somebody else serves the socket.
        connections: The scope of their tasks; its deadline is set.

    Returns:
        When all must be over, lingering sockets included: a moment on Trio's clock.

    Cancellation:
        Leaves some connections without a goodbye.
    """
    over = trio.current_time() + order.seconds
    if not order.quick:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_drain_in_order, order, listener, door, nursery.cancel_scope)
            # Cancelled when the goodbyes are said; then the order stands as it was.
            order = await lifeline.wait_hurry()
            over = trio.current_time() + order.seconds
            nursery.cancel_scope.cancel()
    _take_nobody_new(order, listener, door)
    listener.draining = True
    for connection in tuple(listener.connections):
        connection.end(CloseReason.GOING_AWAY)
    if order.quick:
        over = min(over, trio.current_time() + LAST_WORDS_SECONDS)
    # What is left then is for the sockets that linger.
    connections.deadline = over - (QUICK_LINGER_SECONDS if order.quick else LINGER_SECONDS)
    return over


async def _drain_in_order(
    order: Drain, listener: Listener, door: Door, done: trio.CancelScope
) -> None:
    began = trio.current_time()
    await trio.sleep(order.propagation)
    _take_nobody_new(order, listener, door)
    leaving = list(listener.connections)
    start = trio.current_time()
    time_left = began + order.seconds - start - CLOSE_SECONDS - LINGER_SECONDS
    window = min(max(0.0, time_left), len(leaving) / GOODBYES_PER_SECOND)
    for number, connection in enumerate(leaving):
        await trio.sleep_until(start + window * number / len(leaving))
        connection.end(CloseReason.GOING_AWAY)
    if order.replaced:
        # Those whose handshake was under way get their goodbye with everybody else's.
        with trio.move_on_at(start + max(window, min(ARRIVAL_SECONDS, time_left))):
            await listener.wait_no_arrivals()
    done.cancel()


def _take_nobody_new(order: Drain, listener: Listener, door: Door) -> None:
    if order.replaced:
        door.lock()
    else:
        listener.draining = True
