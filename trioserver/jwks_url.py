"""Where an issuer publishes its keys: what ``JWT_JWKS_URL`` may say.

Plain ``http`` is for loopback and for meshes that do their own TLS: whoever can change the answer
on its way can make tokens (`Target.is_plain`, to warn).
"""

import re
from typing import Final
from urllib.parse import urlsplit

import attrs

from trioserver.errors import SettingsError

SETTING: Final = "JWT_JWKS_URL"
EXAMPLE: Final = "https://login.example.com/.well-known/jwks.json"


@attrs.frozen(kw_only=True)
class Target:
    """Where a document is."""

    host: str
    port: int
    is_plain: bool
    """Whether it is ``http``."""
    path: str
    """With the query."""
    authority: str
    """For the ``Host`` header."""

    @classmethod
    def parse(cls, url: str) -> "Target":
        """Return what a URL says.

        Raises:
            SettingsError: It is no URL for a JWKS.
        """
        try:
            # Printable ASCII: urlsplit() leaves out line ends, and others are not for the wire.
            if not re.fullmatch(r"[!-~]+", url):
                raise ValueError("has characters that no URL has")  # noqa: TRY301 - one table
            parts = urlsplit(url)
            port = parts.port
            # As the lookup will: labels that no name has must not wait until then.
            (parts.hostname or "").encode("idna")
        except ValueError as error:
            raise SettingsError(SETTING, str(error), EXAMPLE) from None
        if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
            raise SettingsError(SETTING, "is no URL with https:// (or http://)", EXAMPLE)
        if "@" in parts.netloc or parts.fragment:
            raise SettingsError(SETTING, "has a user name or a fragment", EXAMPLE)
        plain = parts.scheme == "http"
        return cls(
            host=parts.hostname,
            port=port or (80 if plain else 443),
            is_plain=plain,
            path=(parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
            authority=parts.netloc,
        )
