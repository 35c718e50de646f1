"""How many requests of one client are answered: ``API_REQUESTS_PER_SECOND``.

A client is whoever has one of ``API_KEYS``, wherever it calls from; without a good key it is the
address, so guessing keys is bounded, and costs nobody who knows one anything. Addresses are those
of `trioserver.peers`: behind a trusted proxy the client's own, of IPv6 a whole /64, and on this
machine nobody's unless ``LIMIT_LOOPBACK`` is set: then there is no limit, with or without a key.

Health and metrics are not counted: a monitor must not be shut out by whoever shares its address.
What the guard refuses is, whatever path it meant.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from trioserver.buckets import Buckets, Rate
from trioserver.gateway.api_keys import ApiKeys
from trioserver.peers import Peers, peer_address

BURST_SECONDS: Final = 2.0
"""How much of the rate may come at once."""

EXEMPT: Final = frozenset({"/healthz", "/readyz", "/health", "/metrics"})


class ClientRate:
    """The limit, and who has used how much of it."""

    def __init__(self, keys: ApiKeys, peers: Peers, per_second: float) -> None:
        """Begin with full buckets.

        Args:
            keys: Tells the clients apart that have one.
            peers: Tells whose address the others come from.
            per_second: Requests of one client; 0 is no limit.
        """
        self._keys = keys
        self._peers = peers
        burst = max(1, math.ceil(per_second * BURST_SECONDS))
        self._buckets: Buckets[int] = Buckets(Rate(count=per_second, burst=burst))
        self.detail = f"One client has {per_second:g} requests a second, and {burst} at once."
        """For the client that had more."""

    def take(self, scope: Mapping[str, Any], now: float) -> float:
        """Count a request, if that may be.

        Args:
            scope: Of ASGI.
            now: Seconds of a clock that does not jump.

        Returns:
            0.0, or after how many seconds it may be; then it is not counted.
        """
        if scope["path"] in EXEMPT:
            return 0.0
        client = self._client(scope["client"], scope["headers"])
        return 0.0 if client is None else self._buckets.take(client, now)

    def take_refused(self, address: int | None, now: float) -> float:
        """Count what was no request, against the address.

        Args:
            address: Its key; None is not limited.
            now: As above.

        Returns:
            As above.
        """
        return 0.0 if address is None else self._buckets.take(address, now)

    def _client(self, peer: object, headers: Iterable[tuple[bytes, bytes]]) -> int | None:
        peers = self._peers
        given = [value for name, value in headers if name == peers.header]
        header = b",".join(given).decode("latin-1") if given else None
        address = peers.key(peers.client(peer_address(peer), header))
        if address is None:
            return None
        number = self._keys.number(headers)
        # No address is negative.
        return address if number is None else -1 - number
