"""Who reaches what: every endpoint, on both ports, without a key, with a wrong one, a good one."""

from collections.abc import Iterator, Mapping

import attrs
import pytest
import trio

from tests.trioserver.gateway_process import LIMIT_SECONDS, GatewayProcess
from tests.trioserver.test_gateway import NO_REDIS
from tests.trioserver.wire import running

GOOD = "good-key-0123456789abcdef"
NO_KEY: Mapping[str, str] = {}
WRONG = (
    {"X-API-Key": "wrong"},
    {"X-API-Key": GOOD[:-1]},
    {"X-API-Key": GOOD + "x"},
    {"X-API-Key": ""},
    {"Authorization": "Bearer wrong"},
    {"Authorization": f"Basic {GOOD}"},
    {"Cookie": f"X-API-Key={GOOD}"},
)
OPEN = ("/healthz", "/readyz", "/metrics")
NOTIFICATIONS = "/api/v1/notifications"
LIFE = f"{NOTIFICATIONS}/nothing"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """One gateway that knows one key."""
    settings = attrs.evolve(NO_REDIS, api_keys=(GOOD,))
    with GatewayProcess(tmp_path_factory.mktemp("gw"), settings) as process:
        process.wait_started()
        yield process


@pytest.mark.parametrize("given", [NO_KEY, *WRONG])
async def test_without_a_good_key_the_api_is_closed(
    gateway: GatewayProcess, given: Mapping[str, str]
) -> None:
    """401 for publishing and for asking; what is open stays open; what is not there is 404."""
    for answer in (
        await gateway.post(NOTIFICATIONS, b"[]", given),
        await gateway.get(LIFE, given),
        await gateway.get(f"{LIFE}?api_key={GOOD}&X-API-Key={GOOD}", given),
    ):
        assert 401 == answer.status
        assert "Bearer" == answer.headers["WWW-Authenticate"]
        assert GOOD.encode() not in answer.body
    assert [200] * 3 == [(await gateway.get(path, given)).status for path in OPEN]
    for path in ("/", "/ws", "/admin", "/api", "/api/v1", f"{NOTIFICATIONS}/", f"{LIFE}/x"):
        assert 404 == (await gateway.get(path, given)).status


@pytest.mark.parametrize("given", [{"X-API-Key": GOOD}, {"Authorization": f"Bearer {GOOD}"}])
async def test_with_a_good_key_the_api_judges_the_request(
    gateway: GatewayProcess, given: Mapping[str, str]
) -> None:
    """It gets as far as the request's own faults, and opens nothing else."""
    assert 422 == (await gateway.post(NOTIFICATIONS, b"[]", given)).status
    assert 404 == (await gateway.get(LIFE, given)).status
    assert 405 == (await gateway.get(NOTIFICATIONS, given)).status
    assert 404 == (await gateway.get("/admin", given)).status
    assert 403 == (await gateway.get("/ws", {"Upgrade": "websocket", **given})).status


@pytest.mark.parametrize("given", [NO_KEY, WRONG[0], {"X-API-Key": GOOD}])
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("path", ["/metrics", NOTIFICATIONS, LIFE, "/", "/admin"])
async def test_the_public_port_has_nothing_of_it(
    path: str, method: str, given: Mapping[str, str]
) -> None:
    """No key opens the API or the metrics where everybody may knock."""
    lines = [f"{method} {path} HTTP/1.1", "Host: x"]
    lines += [f"{name}: {value}" for name, value in given.items()]
    async with running() as worker:
        client = await worker.dial()
        with trio.fail_after(LIMIT_SECONDS):
            await client.send("\r\n".join([*lines, "", ""]).encode())
            status, _ = await client.response()
        await client.aclose()

    assert 404 == status
