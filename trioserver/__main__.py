"""``python -m trioserver``: the same as the command ``trioserver``."""

from trioserver.cli import main

main()
