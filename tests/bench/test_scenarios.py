"""The scenarios, on the product, with numbers that mean nothing."""

from pathlib import Path

from bench import machine, stage, tokens
from bench.client import Program
from bench.results import Shares
from bench.scenarios import SCENARIOS
from bench.scenarios.chat import miscounted
from bench.servers import Product
from bench.stage import Plan, Props, bottleneck

TINY = Plan(
    deliveries=50,
    notifications=40,
    echoes=30,
    rate=500,
    seconds=0.1,
    window=8,
    concurrency=3,
    rest_seconds=0.0,
)


def test_every_scenario(program: Program, tmp_path: Path) -> None:
    """Each scenario does what it says, and the product loses, doubles and reorders nothing."""
    server, other = machine.cores()
    joins = SCENARIOS["topic"].joins
    props = Props(
        program=program,
        tokens={joins: tokens.write(tmp_path / "tokens", 40, joins)},
        server_core=server,
        client_core=other,
    )
    connections = dict.fromkeys(SCENARIOS, (2,)) | {"idle": (2, 5)}

    with stage.set_for(Product(), props, joins) as here:
        # One server for all; connections stay, so there are two more each time.
        played = {
            name: scenario.measure(here, TINY, connections[name])
            for name, scenario in SCENARIOS.items()
        }

    assert {
        "idle": 3,
        "connect": 1,
        "fanout": 25 * 9,
        "topic": 25 * 11,
        "unicast": 40,
        "durable": 40,
        "echo": 15 * 17,
        "chat": 15 * 19,
        "latency": 50,
        # As many as half of what the machine can do, the same for each.
        "chat-latency": played["chat-latency"].units // 23 * 23,
    } == {name: one.units for name, one in played.items()}
    assert {} == {name: one for name, one in played.items() if not one.valid}
    assert list(range(5, 25, 2)) == [one.greeted for one in played.values()]
    for name, one in played.items():
        assert SCENARIOS[name].headline in one.figures
        assert name == "idle" or one.figures[SCENARIOS[name].headline] > 0
        # Receipts come after the last delivery, which is when the clock of the shares stops; of so
        # few notifications they are nearly all there is.
        assert 0 < one.shares.worker < (20 if name == "durable" else 2)


def test_miscounted() -> None:
    """A session that is missing, lags behind, ran ahead or was forgotten is one that is wrong."""
    before = {b"a": 3, b"b": 3, b"c": 3, b"d": 3}
    after = {b"a": 8, b"b": 7, b"c": 9}

    assert 0 == miscounted({b"a": 3}, after, sessions=1, each=5)
    assert 3 == miscounted(before, after, sessions=4, each=5)
    assert 5 == miscounted(before, after, sessions=6, each=5)


def test_rows() -> None:
    """A slope is one measurement over a range, everything else is one per number."""
    idle, fanout = SCENARIOS["idle"], SCENARIOS["fanout"]

    assert [(2_000, 10_000)] == idle.rows(())
    assert [(10, 30)] == idle.rows((10, 20, 30))
    assert [(20, 100)] == idle.rows((100,))
    assert [(2_000,), (5_000,), (10_000,)] == fanout.rows(())
    assert [(10,), (20,)] == fanout.rows((10, 20))


def test_bottleneck() -> None:
    """Whoever had nothing left of a core held up the others."""

    def held_up(worker: float, redis: float, client: float) -> str:
        return bottleneck(Shares(worker=worker, redis=redis, client=client, others=0.0))

    assert "client" == held_up(0.95, 0.0, 0.9)
    assert "server" == held_up(0.9, 0.0, 0.89)
    assert "client and Redis" == held_up(0.8, 0.45, 0.45)
    assert "nobody" == held_up(0.8, 0.2, 0.3)


def test_scaled() -> None:
    """Less work is the same kind of work."""
    plan = Plan().scaled(0.001)

    assert (400, 100, 200) == (plan.deliveries, plan.notifications, plan.echoes)
    assert (Plan().size, Plan().rate) == (plan.size, plan.rate)
    assert 1 == Plan().scaled(1e-9).deliveries
    assert 1 == plan.warming(3)
