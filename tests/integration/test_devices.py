"""Several devices of one user: what is read on one, what another has missed, what a pong proves."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from websockets.sync.client import ClientConnection, connect

from tests.integration.clients import PATIENCE, nothing_more, receive, token, url
from tests.running import Running, eventually


@contextlib.contextmanager
def device(server: Running, user: str, query: str) -> Iterator[tuple[ClientConnection, Any]]:
    """Connect as a device; give the socket and the first message."""
    with connect(url(server, f"?token={token(user)}{query}")) as socket:
        established = json.loads(socket.recv(timeout=PATIENCE))
        assert "connection_established" == established["type"]
        yield socket, established


def publish(server: Running, user: str, payload: str, *options: str) -> str:
    """Publish as a back end; return the id."""
    done = server.run("publish", "--json", "--user", user, payload, *options)
    assert 0 == done.returncode, done.stderr
    return str(json.loads(done.stdout)["id"])


def life(server: Running, notification: str) -> dict[str, Any]:
    """Return what the API says of a notification."""
    key = (server.data_dir / "api.secret").read_text().strip()
    credential: dict[str, Any] = {"X-API-Key": key}
    status, body = server.get(f"/api/v1/notifications/{notification}", **credential)
    assert 200 == status, body
    return dict(json.loads(body))


def test_what_one_device_reads_changes_the_badge_of_the_other(server: Running) -> None:
    """Each frame has the user's number of unread ones; ``read`` is answered where it was said."""
    with (
        device(server, "dora", "&device=phone") as (phone, _),
        device(server, "dora", "&device=laptop") as (laptop, _),
    ):
        first = publish(server, "dora", "1")
        publish(server, "dora", "2")
        for socket in (phone, laptop):
            assert [1, 2] == [receive(socket)["unread"] for _ in range(2)]
        phone.send(json.dumps({"type": "read", "ids": [first], "ref": "r"}))
        assert {"type": "read", "unread": 1, "ref": "r"} == receive(phone)
        update = receive(laptop)
        assert ("update", first, "read", 1) == tuple(
            update[name] for name in ("type", "id", "state", "unread")
        )
        assert nothing_more(phone)


def test_a_device_that_comes_back_gets_exactly_what_it_missed(server: Running) -> None:
    """Notifications in order, what was read or withdrawn meanwhile, and nothing of the rest."""
    with device(server, "emil", "&device=phone") as (phone, _):
        publish(server, "emil", "1")
        receive(phone)
        # The ledger knows of the receipt before the device goes.
        why = eventually(
            lambda: "received" if "seq 1" in server.run("why", "emil").stdout else None, 10, "why"
        )
        assert why
    with device(server, "emil", "&device=laptop") as (laptop, established):
        assert not established["resumed"]
        assert nothing_more(laptop), "the phone has received all there was"
        second, third = publish(server, "emil", "2"), publish(server, "emil", "3")
        for _ in range(2):
            receive(laptop)
        withdrawn = server.run("cancel", third)
        assert (0, "") == (withdrawn.returncode, withdrawn.stderr)
        assert "cancelled" == receive(laptop)["state"]
        laptop.send(json.dumps({"type": "read", "ids": [second], "ref": "r"}))
        assert 1 == receive(laptop)["unread"], "the first one is unread still"
        fourth = publish(server, "emil", "4")
    with device(server, "emil", "&device=phone") as (phone, established):
        assert established["resumed"]
        got = [receive(phone) for _ in range(5)]
        assert [(second, "notification"), (second, "update")] == [
            (one["id"], one["type"]) for one in got[:2]
        ]
        assert {(third, "cancelled"), (second, "read")} == {
            (one["id"], one["state"]) for one in got[2:4]
        }
        assert (fourth, 4, 2) == (got[4]["id"], got[4]["payload"], got[4]["unread"])
        assert nothing_more(phone)


def test_a_bare_websocket_has_received_after_its_pong(server: Running) -> None:
    """No client code: any WebSocket library answers pings, and that is the receipt."""
    with device(server, "fay", "") as (socket, _):
        notification = publish(server, "fay", "1")
        receive(socket)
        found = eventually(
            lambda: one if (one := life(server, notification))["state"] == "received" else None,
            10,
            "the receipt",
        )
        (mine,) = found["devices"]
        assert (None, True, True) == (
            mine["device"],
            bool(mine["sent_at"]),
            bool(mine["received_at"]),
        )
        assert "received" in server.run("trace", notification).stdout


def test_a_client_that_does_not_acknowledge_is_told_again_when_it_comes_back(
    server: Running,
) -> None:
    """With ``ack=1`` what was received and not acknowledged comes again, with its attempt."""
    with device(server, "gus", "&device=phone&ack=1") as (socket, _):
        first, second = publish(server, "gus", "1"), publish(server, "gus", "2")
        for _ in range(2):
            assert 1 == receive(socket)["attempt"]
        socket.send(json.dumps({"type": "ack", "id": first, "ref": "a"}))
        assert {"type": "ack", "seq": 1, "ref": "a"} == receive(socket)
    with device(server, "gus", "&device=phone&ack=1") as (socket, established):
        assert established["resumed"]
        again = receive(socket)
        assert (second, True) == (again["id"], again["attempt"] >= 1)
        assert nothing_more(socket)


def test_broadcasts_are_kept_too(server: Running) -> None:
    """A device that was away when everyone was told gets it, once."""
    with device(server, "hal", "&device=phone") as (_, established):
        where = established["position"]
    done = server.run("publish", "--all", "--json", '"to everyone"')
    assert 0 == done.returncode, done.stderr
    with device(server, "hal", f"&position={where}") as (socket, _):
        got = receive(socket)
        assert ("all", "to everyone") == (got["stream"], got["payload"])
        assert nothing_more(socket)
