"""A stand-in for worker and gateway: speaks the control protocol with the standard library only.

    python -I -S stub_child.py DIRECTORY worker|gateway [--slot N] --generation G

How it behaves is read, at its start, from the first of these files that exists in DIRECTORY:
``worker-1.2`` (slot 1 of generation 2), ``worker.2``, ``worker-1``, ``worker`` (likewise for the
gateway, without a slot). It holds one word:

    good         the default: starts, beats ready, obeys
    crash        exits with 1 before it has started
    refuse       exits with 4 before it has started
    never        beats, but never starts
    mute         starts, then neither beats nor listens
    unready      starts, beats not ready
    brief        starts, beats, and exits with 1 after 50 ms
    stubborn     starts and beats, and ignores orders, end of file and SIGTERM
    lingering    good, but takes half a second to end
    garbage      says things that nobody understands, then is good
"""

import json
import os
import pathlib
import select
import signal
import socket
import sys
import time

BEAT_SECONDS = 0.1


def main() -> None:
    """Be a child."""
    directory, kind, *options = sys.argv[1:]
    given = dict(zip(options[::2], options[1::2], strict=True))
    name = kind if "--slot" not in given else f"{kind}-{given['--slot']}"
    behaviour = "good"
    for file in (f"{name}.{given['--generation']}", f"{kind}.{given['--generation']}", name, kind):
        path = pathlib.Path(directory, file)
        if path.exists():
            behaviour = path.read_text()
            break
    # The settings must be there, and readable from the start although the offset is shared.
    settings = json.loads(os.pread(5, 1 << 20, 0))
    pair = socket.socket(fileno=3)
    Child(pair, behaviour, note=settings["ws_max_connections"]).run()


class Child:
    """One life."""

    def __init__(self, pair: socket.socket, behaviour: str, note: int) -> None:
        """Take the pair; nothing is said yet."""
        self.pair = pair
        self.behaviour = behaviour
        self.note = note

    def say(self, **message: object) -> None:
        """Send one packet."""
        self.pair.send(json.dumps({"v": 1, **message}).encode())

    def run(self) -> None:
        """Live as told."""
        if self.behaviour in ("crash", "refuse"):
            sys.stderr.write("the stub refuses to live\n")
            sys.exit(1 if self.behaviour == "crash" else 4)
        if self.behaviour == "garbage":
            self.pair.send(b"\xff\x00")
            self.say(type="song", text="la")
            self.say(type="beat", v=99)
        if self.behaviour == "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.behaviour != "never":
            self.say(type="started", extra="a field of the future")
        born = time.monotonic()
        while True:
            if self.behaviour == "mute":
                signal.pause()
            if self.behaviour == "brief" and time.monotonic() > born + 0.05:
                sys.exit(1)
            ready = self.behaviour not in ("unready", "never")
            why = "" if ready else "told so"
            self.beat(ready=ready, why=why)
            self.listen()

    def beat(self, *, ready: bool, why: str) -> None:
        """Beat; the number of connections is the setting ``ws_max_connections``."""
        try:
            self.say(type="beat", connections=self.note, ready=ready, why=why)
        except OSError:
            if self.behaviour != "stubborn":
                sys.exit(0)

    def listen(self) -> None:
        """Wait for an order, for as long as there is between two beats."""
        if self.behaviour == "stubborn":
            time.sleep(BEAT_SECONDS)
            return
        readable, _, _ = select.select([self.pair], [], [], BEAT_SECONDS)
        if readable:
            packet = self.pair.recv(65536)
            if not packet or json.loads(packet)["type"] == "drain":
                if self.behaviour == "lingering":
                    time.sleep(0.5)
                sys.exit(0)


if __name__ == "__main__":
    main()
