"""A smoke run of an installed trioserver, on any Python: ``smoke.py PATH_OF_THE_COMMAND``.

Starts the server on its embedded Redis, listens as one user, publishes, and requires that the
notification arrives, to the right one only. Needs nothing but the standard library.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main(command: str) -> None:
    """Run it; exits non-zero with the reason if anything is not as promised."""
    with tempfile.TemporaryDirectory() as directory:
        environ = {
            **os.environ,
            "DATA_DIR": f"{directory}/state",
            "WS_HOST": "127.0.0.1",
            "WS_PORT": "18081",
            "ADMIN_PORT": "19081",
            "DRAIN_PROPAGATION": "0s",
        }
        with Path(directory, "log").open("wb") as log:
            server = subprocess.Popen(
                [command, "supervise", "--workers", "2"],
                env=environ,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            assert "trioserver is ready" in line, Path(directory, "log").read_text()
            arrived(command, environ)
        finally:
            server.terminate()
            assert server.wait(30) == 0, Path(directory, "log").read_text()
    print("smoke run passed:", line.strip())


def arrived(command: str, environ: dict[str, str]) -> None:
    """Publish to two users and require that each sees its own."""
    clients = {
        user: subprocess.Popen(
            [command, "listen", "--user", user],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for user in ("a", "b")
    }
    try:
        for client in clients.values():
            assert client.stdout is not None
            assert "connection_established" in client.stdout.readline()
        began = time.monotonic()
        for user in clients:
            subprocess.run(
                [command, "publish", "--user", user, json.dumps({"for": user})],
                env=environ,
                check=True,
                stdout=subprocess.DEVNULL,
            )
        for user, client in clients.items():
            assert client.stdout is not None
            notification = json.loads(client.stdout.readline())
            assert notification["payload"] == {"for": user}, notification
        assert time.monotonic() - began < 10
    finally:
        for client in clients.values():
            client.kill()
            client.wait()


if __name__ == "__main__":
    main(sys.argv[1])
