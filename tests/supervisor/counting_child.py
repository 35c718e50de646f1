"""A worker that counts on the board, and otherwise lives as `stub_child` does.

    python -m tests.supervisor.counting_child DIRECTORY worker --slot N --generation G --life NAME

Before it joins the board it writes down, in the file ``found-NAME``, how many connections and
workers it finds there. Then it opens three.
"""

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Final

from tests.supervisor import stub_child
from trioserver.board import Board, Limits
from trioserver.board_map import BoardMap
from trioserver.status import BOARD_FD

CONNECTIONS: Final = 3


def counted(fd: int) -> tuple[int, int]:
    """Return how many connections and workers are on a board, as a bystander sees it."""
    with contextlib.closing(BoardMap(fd)) as board:
        column = board.words[board.connections : board.connections + board.segments]
        with column:
            return sum(column.tolist()), board.owners()


def main() -> None:
    """Be a worker."""
    life = sys.argv[sys.argv.index("--life") + 1]
    Path(sys.argv[1], f"found-{life}").write_text(json.dumps(counted(BOARD_FD)))
    board = Board.attach(BOARD_FD, Limits())
    for _ in range(CONNECTIONS):
        if board.admit(None, time.monotonic()) is None:
            board.opened(None)
    stub_child.main()


if __name__ == "__main__":
    main()
