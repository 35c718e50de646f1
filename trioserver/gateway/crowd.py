"""Who is connected to the internal port, and who goes when there is no room. Pure.

A connection that has no request under way costs nobody anything to lose: clients expect the end of
one that rests, and one that is silent from the beginning may be there to take up room. So it is not
the newcomer that is refused, which might be a monitor, but the one that has rested longest that
goes. Only if all of them have requests under way nobody can come.

One address has only a part of the places, unless there is nobody to say which clients it stands
for: loopback, and proxies that are trusted.
"""

from collections.abc import Iterator
from typing import Final, Generic, Protocol, TypeVar

MAX_CONNECTIONS: Final = 512
"""At once, so that descriptors are left for Redis and files."""

SHARES: Final = 4
"""One address has this part of the places at most."""


class Member(Protocol):
    """A connection."""

    @property
    def address(self) -> int | None:
        """Under which key it counts; None if it does not."""

    @property
    def resting_since(self) -> float | None:
        """Since when there has been no request under way; None while there is one."""

    def abort(self) -> None:
        """End it now."""


M = TypeVar("M", bound=Member)


class Crowd(Generic[M]):
    """All who are connected."""

    def __init__(self, places: int = MAX_CONNECTIONS) -> None:
        """Begin with nobody.

        Args:
            places: How many there are.
        """
        self._places = places
        self._share = max(1, places // SHARES)
        self._members: set[M] = set()

    def __iter__(self) -> Iterator[M]:
        return iter(tuple(self._members))

    def __len__(self) -> int:
        return len(self._members)

    @property
    def is_full(self) -> bool:
        """Whether somebody has to go for the next one."""
        return len(self._members) >= self._places

    def admit(self, newcomer: M) -> bool:
        """Take somebody in, if there is or can be made room; return whether it was."""
        address = newcomer.address
        if address is not None:
            neighbours = [member for member in self._members if member.address == address]
            if len(neighbours) >= self._share and not self._make_room(neighbours):
                return False
        if self.is_full and not self._make_room(self._members):
            return False
        self._members.add(newcomer)
        return True

    def leave(self, member: M) -> None:
        """Forget somebody who is gone. Idempotent."""
        self._members.discard(member)

    def _make_room(self, among: "list[M] | set[M]") -> bool:
        resting = {member: since for member in among if (since := member.resting_since) is not None}
        if not resting:
            return False
        longest = min(resting, key=resting.__getitem__)
        self.leave(longest)
        longest.abort()
        return True
