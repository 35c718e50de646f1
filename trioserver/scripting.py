"""Runs commands of the ledger on a link; gives Redis the scripts if it lacks them.

Redis forgets scripts when it restarts, and says so instead of running them, so nothing has happened
to a command that is refused for that reason.
"""

from collections.abc import Callable, Iterable, Sequence

from trioserver import ledger
from trioserver.errors import RedisRefused
from trioserver.ledger import Command
from trioserver.redis_link import TIMEOUT_SECONDS, RedisLink, Reply


async def run(
    link: RedisLink,
    commands: Iterable[Command],
    *,
    loads: Callable[[], Sequence[Command]] = ledger.loads,
    timeout: float = TIMEOUT_SECONDS,  # noqa: ASYNC109 - also the lane's deadline
) -> list[Reply | RedisRefused]:
    """Run ``commands``, in order; see `RedisLink.pipeline`.

    Those that were refused for want of a script are run once more, behind the others.

    Args:
        link: To Redis.
        commands: Of `trioserver.ledger`, or of whoever has other scripts.
        loads: Returns the commands that make those scripts known.
        timeout: Seconds for each of the at most three round trips.

    Raises:
        RedisUnavailable: Not all replies came. Which commands had an effect is unknown.
    """
    listed = list(commands)
    replies = await link.pipeline(listed, timeout=timeout)
    missing = [
        number
        for number, reply in enumerate(replies)
        if isinstance(reply, RedisRefused) and ledger.is_noscript(str(reply))
    ]
    if missing:
        await link.pipeline(loads(), timeout=timeout)
        again = await link.pipeline([listed[number] for number in missing], timeout=timeout)
        for number, reply in zip(missing, again, strict=True):
            replies[number] = reply
    return replies
