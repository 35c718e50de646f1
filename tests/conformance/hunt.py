"""The process in which libFuzzer runs; `tests.conformance.fuzz` starts it and looks at its finds.

    python -m tests.conformance.hunt TARGET SECONDS DIRECTORY

Inputs that reach something new go to ``DIRECTORY/new``, one that breaks a rule, hangs or eats
memory to ``DIRECTORY/finding-…``.
"""

import importlib
import os
import sys
from pathlib import Path
from typing import Final

# By name, because it is no dependency of the project and has no types.
atheris = importlib.import_module("atheris")
with atheris.instrument_imports(include=["trioserver"]):
    from tests.conformance.targets import TARGETS, Target

INPUT_SECONDS: Final = 5
MEMORY_MB: Final = 512


def main(name: str, seconds: str, scratch: str) -> None:
    """Fuzz; does not return, because libFuzzer ends its process."""
    os.nice(19)
    target, directory = TARGETS[name], Path(scratch)
    arguments = [
        sys.argv[0],
        str(directory / "new"),
        str(target.directory),
        f"-dict={dictionary(target, directory)}",
        f"-artifact_prefix={directory}/finding-",
        f"-max_len={target.max_bytes}",
        f"-max_total_time={seconds}",
        f"-timeout={INPUT_SECONDS}",
        f"-rss_limit_mb={MEMORY_MB}",
        "-print_final_stats=1",
    ]
    atheris.Setup(arguments, target.check)
    atheris.Fuzz()


def dictionary(target: Target, directory: Path) -> Path:
    """Write the target's words as libFuzzer reads them."""
    path = directory / "words"
    lines = ('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in target.words)
    path.write_text("".join(lines))
    return path


if __name__ == "__main__":
    main(*sys.argv[1:])
