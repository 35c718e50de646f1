"""Run the supervisor as a program: ``python run_supervisor.py JSON``.

The JSON has ``settings`` (of `Settings`), ``timing`` (of `Timing`), ``commands`` (of `Commands`)
and ``flags``. Errors end it the way the command line ends.
"""

import json
import sys
from pathlib import Path
from typing import Any

from supervisor.children import Commands
from supervisor.loop import supervise
from supervisor.slots import Timing
from trioserver.errors import SettingsError, TrioserverError
from trioserver.settings import Settings


def main() -> int:
    """Run it and return the exit code."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    values = given["settings"]
    settings = Settings(**{**values, "data_dir": Path(values["data_dir"])})
    commands = Commands(**{name: tuple(argv) for name, argv in given["commands"].items()})
    try:
        return supervise(
            settings,
            flags=given["flags"],
            snapshot=settings.snapshot(),
            commands=commands,
            timing=Timing(**given["timing"]),
        )
    except TrioserverError as error:
        sys.stderr.write(f"{error}\n")
        return 4 if isinstance(error, SettingsError) else 1


if __name__ == "__main__":
    sys.exit(main())
