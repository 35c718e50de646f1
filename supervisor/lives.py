"""Names for the lives of workers, and which of those lives are over.

A name is ``<server>.<boot>.<n>``, unique in the whole fleet for ever: `StateDir.next_boot` vouches
for the first two parts, and here spawns are counted. It begins the ids of connections, so users
see it: digits, letters and dots, some 22 of them.

Who was killed cannot tell the fleet that it is gone. So each newcomer learns the names of those who
were reaped before it, and tells it for them; nobody has to wait for a lease to end.
"""

import collections
from typing import Final

_REMEMBERED: Final = 16
"""Lives that are over. Most newcomers need one name, that of their predecessor..."""

_REMEMBERED_PER_SLOT: Final = 2
"""... but a server whose workers have all died at once needs them all, and each newcomer may be the
only one who lives long enough to pass them on."""


class Lives:
    """The lives of one boot. Pure."""

    def __init__(self, boot: str, slots: int) -> None:
        """Begin with nobody.

        Args:
            boot: Of `StateDir.next_boot`.
            slots: Workers of one generation.
        """
        self._boot = boot
        self._spawns = 0
        self._names: dict[int, str] = {}
        remembered = max(_REMEMBERED, _REMEMBERED_PER_SLOT * slots)
        self._over: collections.deque[str] = collections.deque(maxlen=remembered)

    @property
    def over(self) -> tuple[str, ...]:
        """The latest of those who were reaped, in that order."""
        return tuple(self._over)

    def next_name(self) -> str:
        """Return a name for the next life. No name is given twice, even if nothing came of it."""
        self._spawns += 1
        return f"{self._boot}.{self._spawns}"

    def began(self, pid: int, name: str) -> None:
        """Take note that somebody lives under that name."""
        self._names[pid] = name

    def ended(self, pid: int) -> bool:
        """Take note that a process was reaped; return whether it had a name."""
        name = self._names.pop(pid, None)
        if name is None:
            return False
        self._over.append(name)
        return True
