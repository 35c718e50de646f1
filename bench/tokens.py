"""Tokens of the client's users."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import jwt

SECRET: Final = "bench-secret-bench-secret-bench-secret"  # noqa: S105 - of servers that last seconds
"""Signs the tokens; servers to compare with are expected to know it."""

TOKEN_SECONDS: Final = 36_000
"""Longer than any run."""


def write(path: Path, users: int, joins: Sequence[str] = ()) -> Path:
    """Write the tokens of the users u0, u1 and so on, one per line; return ``path``.

    Args:
        path: Where to.
        users: How many.
        joins: Topics that their connections join by themselves.
    """
    claims: dict[str, object] = {"exp": int(time.time()) + TOKEN_SECONDS}
    if joins:
        claims["topics"] = {"join": list(joins)}
    path.write_text(
        "".join(
            jwt.encode({"sub": f"u{user}", **claims}, SECRET, algorithm="HS256") + "\n"
            for user in range(users)
        )
    )
    return path
