"""Tokens of the client's users."""

import time
from pathlib import Path
from typing import Final

import jwt

SECRET: Final = "bench-secret-bench-secret-bench-secret"  # noqa: S105 - of servers that last seconds
"""Signs the tokens; servers to compare with are expected to know it."""

TOKEN_SECONDS: Final = 36_000
"""Longer than any run."""


def write(path: Path, users: int) -> Path:
    """Write the tokens of the users u0, u1 and so on, one per line; return ``path``."""
    expires = int(time.time()) + TOKEN_SECONDS
    path.write_text(
        "".join(
            jwt.encode({"sub": f"u{user}", "exp": expires}, SECRET, algorithm="HS256") + "\n"
            for user in range(users)
        )
    )
    return path
