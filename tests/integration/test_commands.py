"""The commands of a back end, and the terminal's client, with a running server."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.integration.clients import client, receive, url
from tests.running import Running, eventually


@contextlib.contextmanager
def listening(server: Running, user: str, *options: str) -> Iterator[Iterator[dict[str, Any]]]:
    """Run ``trioserver listen``; yield what it shows, heartbeats left out."""
    with subprocess.Popen(
        [*server.command(), "listen", "--user", user, "--url", url(server), *options],
        env=server.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        messages = map(json.loads, process.stdout)
        try:
            yield (message for message in messages if message["type"] != "heartbeat")
        finally:
            process.kill()


def published(server: Running, user: str, payload: object) -> dict[str, Any]:
    """Publish; return the answer."""
    ran = server.run("publish", "--user", user, "--json", json.dumps(payload))
    assert 0 == ran.returncode, ran.stderr
    return dict(json.loads(ran.stdout))


def test_listen_shows_what_was_missed(server: Running) -> None:
    """What was published while nobody was there comes first, and nothing twice."""
    missed = [published(server, "dora", number) for number in range(3)]
    with listening(server, "dora", "--device", "terminal") as shown:
        assert "connection_established" == next(shown)["type"]
        assert [one["id"] for one in missed] == [next(shown)["id"] for _ in missed]
        live = published(server, "dora", 3)
        assert live["id"] == next(shown)["id"]


def test_listen_goes_on_from_a_position(server: Running) -> None:
    """--position is where it goes on, whatever the server remembers."""
    first, *others = (published(server, "emil", number) for number in range(3))
    for _ in range(2):
        with listening(server, "emil", "--position", first["position"]) as shown:
            assert next(shown)["position"].startswith(first["position"])
            assert [one["id"] for one in others] == [next(shown)["id"] for _ in others]


def test_listen_acknowledges(server: Running) -> None:
    """With --ack what was shown is acknowledged, and ``why`` and ``trace`` tell of it."""
    with listening(server, "fred", "--device", "terminal", "--ack") as shown:
        next(shown)
        accepted = published(server, "fred", {"n": 1})
        assert accepted["id"] == next(shown)["id"]

        def acked() -> bool:
            standing = json.loads(server.run("why", "fred", "--json").stdout)
            return [("terminal", 1, 0)] == [
                (one["name"], one["acked"], one["outstanding"]) for one in standing["devices"]
            ]

        eventually(acked, 10, "the acknowledgement is known")
    trace = server.run("trace", accepted["id"])

    assert (0, f"{accepted['id']}: acked") == (trace.returncode, trace.stdout.splitlines()[0])
    [device] = json.loads(server.run("trace", accepted["id"], "--json").stdout)["devices"]
    assert device["sent"] <= device["received"] <= device["acked"]


def test_cancel_reaches_who_shows_it(server: Running) -> None:
    """A connected device is told that a notification was withdrawn."""
    with client(server, "gina") as socket:
        accepted = published(server, "gina", 1)
        assert accepted["id"] == receive(socket)["id"]

        cancelled = server.run("cancel", accepted["id"])

        assert (0, "cancelled\n") == (cancelled.returncode, cancelled.stdout)
        update = receive(socket)
        assert ("update", accepted["id"], "cancelled") == (
            update["type"],
            update["id"],
            update["state"],
        )
    assert f"{accepted['id']}: cancelled" in server.run("trace", accepted["id"]).stdout


def test_output_that_cannot_be_written_is_one_clear_line(server: Running) -> None:
    """The notification was accepted by then: nobody shall think that it was not."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*server.command(), "publish", "--user", "ivy", "1"],
            env=server.environ,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
            check=False,
        )
    assert (1, 1) == (done.returncode, done.stderr.count("\n")), done.stderr
    assert "may have been done" in done.stderr
