"""All that publishers, workers and the scheduler do for one user, once."""

from typing import Final

from tests.trioserver.ledger_calls import Caller
from trioserver import ledger
from trioserver.ledger import Accepted, Notification, Page, Rules

USER: Final = "ann"
HOME: Final = ledger.partition(USER)
RULES: Final = Rules(max_length=4)
DAY: Final = 86_400_000


class Everyday:
    """All that publishers, workers and the scheduler do for one user."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self.ids: list[str] = []

    def publish(self, **options: object) -> Accepted:
        """Publish something."""
        notification = Notification(
            user=USER,
            payload=b'{"n":1}',
            ttl_ms=DAY,
            id=ledger.new_id(HOME, self.caller.now()),
            **options,  # type: ignore[arg-type] # as they are
        )
        self.ids.append(notification.id)
        return ledger.accepted(self.caller.run(ledger.publish(notification, rules=RULES)))

    def read(self, device: str = "a", point: str = "", *, ack: bool = False) -> Page:
        """Connect and read."""
        command = ledger.read(USER, device=device, point=point, connect=True, ack=ack)
        return ledger.page(self.caller.run(command))

    def everything(self) -> None:
        """Do all of it."""
        page = self.read()
        point = f"{page.epoch}.{page.reached}"
        run, rules = self.caller.run, RULES
        run(ledger.report(USER, rules=rules, device="a", sent=point, all_point=point))
        run(ledger.report(USER, rules=rules, device="", received=point, acked_seq=3))
        run(ledger.report(USER, rules=rules, device="a", received=point, acked_id=self.ids[0]))
        self.publish(collapse_key="k", idempotency_key="i", fallback_after_ms=DAY)
        self.publish(collapse_key="k", deliver_at_ms=self.caller.now() + DAY)
        run(ledger.mark(USER, rules=rules, device="a", by="me", ids=self.ids[:3]))
        run(ledger.mark(USER, rules=rules, device="", by="me", up_to=3, up_to_id=self.ids[0]))
        for one in self.ids[:4]:
            run(ledger.cancel(USER, one, rules=rules))
        for one in self.ids:
            for kind in "xfd":
                self.caller.ask("ZADD", ledger.due_key(HOME), "XX", 1, f"{kind}:{one}")
        run(ledger.due(HOME, rules=rules))
        for _ in range(3):
            self.publish()
        self.read("b", ack=True)
        self.read("", "zzz.5-4096")
