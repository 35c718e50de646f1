"""A worker's life for tests of the board: ``python -m tests.trioserver.board_life FD LIMITS``.

LIMITS is JSON. Joins the board and says ``ready``; then obeys one line at a time, each answered by
one line of JSON:

    admit KEY N       try so many handshakes of one address, open what is admitted; how many
    shut KEY N        close so many connections; null
    fill KEY          admit and open until refused a hundred times; how many
    churn SECONDS     admit, open and close as fast as it goes; how many are open at the end
    hurry SECONDS     handshakes as fast as they go; the moments of those admitted
    count             [connections, unlisted, lives]
    close             leave the board in order; null
"""

import json
import sys
import time
from typing import Final

from trioserver.board import Board, Limits

PATIENCE: Final = 100
"""Refusals after which a limit is believed."""


def admit(board: Board, key: int | None) -> bool:
    """Admit and open one connection, as a listener would; return whether it came to that."""
    if board.admit(key, time.monotonic()) is not None:
        return False
    board.opened(key)
    return True


def churn(board: Board, seconds: float, keys: int = 300) -> int:
    """Open as often as possible and close every second one; return how many stay open."""
    end = time.monotonic() + seconds
    mine: list[int] = []
    turn = 0
    while time.monotonic() < end:
        turn += 1
        key = turn * 7 % keys
        if admit(board, key):
            mine.append(key)
        if mine and turn % 3 == 0:
            board.closed(mine.pop(turn % len(mine)))
    return len(mine)


def hurry(board: Board, seconds: float) -> list[float]:
    """Return when handshakes were admitted."""
    times = []
    now = time.monotonic()
    end = now + seconds
    while now < end:
        now = time.monotonic()
        if board.admit(None, now) is None:
            times.append(now)
    return times


def fill(board: Board, key: int | None) -> int:
    """Return how many got in before the limit."""
    opened = refused = 0
    while refused < PATIENCE:
        if admit(board, key):
            opened += 1
        else:
            refused += 1
    return opened


def obey(board: Board, words: list[str]) -> object:
    """Carry out one line."""
    order = words[0]
    key = int(words[1]) if order in {"admit", "shut", "fill"} else None
    match order:
        case "admit":
            return sum(admit(board, key) for _ in range(int(words[2])))
        case "shut":
            for _ in range(int(words[2])):
                board.closed(key)
        case "fill":
            return fill(board, key)
        case "churn":
            return churn(board, float(words[1]))
        case "hurry":
            return hurry(board, float(words[1]))
        case "count":
            return list(board.statistics())
        case _:
            board.close()
    return None


def main() -> None:
    """Be a life until standard input ends."""
    board = Board.attach(int(sys.argv[1]), Limits(**json.loads(sys.argv[2])))
    print("ready", flush=True)  # noqa: T201 - that is how it talks
    for line in sys.stdin:
        print(json.dumps(obey(board, line.split())), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
