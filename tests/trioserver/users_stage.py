"""What a Redis knows of users, for tests of how they are counted."""

from typing import cast

from tests.redis_server import RedisServer
from trioserver import users
from trioserver.ledger import Command
from trioserver.users import COUNT_KEY


def run(redis: RedisServer, command: Command) -> object:
    """Run a command, with the script at hand."""
    redis.command("SCRIPT", "LOAD", users.USERS.text)
    return redis.command(*cast("tuple[str | bytes | int, ...]", command))


def number(redis: RedisServer, life: str = "aa.1.1") -> int:
    """Return how many are written down for a life."""
    return cast("int", redis.command("PFCOUNT", users.key(life)))


def lifetimes(redis: RedisServer) -> list[int]:
    """Return how long the keys with users last, in ms."""
    keys = cast("list[bytes]", redis.command("KEYS", f"{COUNT_KEY}:*"))
    return [cast("int", redis.command("PTTL", key)) for key in keys]
