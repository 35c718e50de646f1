"""Secrets that nobody has configured: made once, kept in the state directory, found again.

    jwt.secret    what tokens are signed with, without JWT_SECRET_KEY
    api.secret    the one API key, without API_KEYS

So a server runs before anybody has read a page about it, and is not open to everybody meanwhile.
"""

from typing import Final

import attrs

from trioserver.errors import SettingsError
from trioserver.settings import Settings
from trioserver.statedir import StateDir

JWT: Final = "jwt"
API: Final = "api"
"""Names of the secrets in the state directory."""


@attrs.frozen(kw_only=True)
class Completed:
    """Settings with the secrets that they lacked."""

    settings: Settings
    notes: tuple[str, ...] = ()
    """What an operator should be told: one line for each secret that was made just now."""


def complete(settings: Settings, *, create: bool) -> Completed:
    """Add the generated secrets to settings in which nobody has configured any.

    Args:
        settings: As loaded.
        create: Whether to make what is not there yet: a server does. A command about one does
            not, and gets the secret of tokens only.

    Raises:
        SettingsError: A secret cannot be read or made; or the one for tokens is not there and
            may not be made.
    """
    notes: list[str] = []
    state = StateDir(settings.data_dir)

    def make(name: str, setting: str) -> str:
        state.create()
        notes.append(f"{setting} is not set: a random one is kept in {state.secret_path(name)}")
        return state.secret(name)

    if settings.jwt_secret_key is None and settings.jwt_algorithms[0].startswith("HS"):
        secret = state.read_secret(JWT) or (make(JWT, "JWT_SECRET_KEY") if create else None)
        if secret is None:
            raise SettingsError(
                "JWT_SECRET_KEY",
                f"is not set, and no server has made one in {state.path}",
                "JWT_SECRET_KEY=$(openssl rand -hex 32)",
            )
        settings = attrs.evolve(settings, jwt_secret_key=secret)
    if settings.api_keys is None and create:
        key = state.read_secret(API) or make(API, "API_KEYS")
        settings = attrs.evolve(settings, api_keys=(key,))
    return Completed(settings=settings, notes=tuple(notes))
