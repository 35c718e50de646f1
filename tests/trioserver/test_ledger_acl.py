"""The ledger's scripts for a Redis user who may not do everything."""

from pathlib import Path
from typing import Final

from tests.redis_server import RedisServer
from tests.trioserver.ledger_calls import Caller
from tests.trioserver.ledger_everyday import Everyday

RIGHTS: Final = ("on", ">secret", "~ts:*", "&*", "+@all", "-@admin", "-@dangerous")
"""What hosted Redis and careful operators give to applications."""


def test_scripts_need_no_dangerous_rights(tmp_path: Path) -> None:
    """All scripts do all their work with the rights that applications usually get."""
    with RedisServer(tmp_path / "redis") as redis, Caller(redis.path) as caller:
        caller.ask("ACL", "SETUSER", "app", *RIGHTS)
        caller.ask("AUTH", "app", "secret")
        everyday = Everyday(caller)
        everyday.publish(collapse_key="k")
        everyday.everything()
        # Once more, of what is there already; nobody listens, so nobody may show it.
        everyday.publish(collapse_key="k")
        everyday.everything()
