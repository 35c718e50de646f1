"""Generated secrets: made once, found again, never in place of a configured one."""

import stat
from pathlib import Path

import pytest

from trioserver.errors import SettingsError
from trioserver.generated_secrets import API, JWT, complete
from trioserver.settings import Settings
from trioserver.statedir import StateDir


def test_they_are_made_once_and_said_once(tmp_path: Path) -> None:
    """The first start makes both, kept for the owner alone; the second finds the same, silently."""
    bare = Settings(data_dir=tmp_path / "state")
    first = complete(bare, create=True)
    second = complete(bare, create=True)

    assert first.settings == second.settings
    assert ((), 2) == (second.notes, len(first.notes))
    assert first.settings.api_keys is not None
    assert (86, 86) == (
        len(first.settings.jwt_secret_key or ""),
        len(first.settings.api_keys[0]),
    )
    assert first.settings.jwt_secret_key != first.settings.api_keys[0]
    for name, setting, note in zip(
        (JWT, API), ("JWT_SECRET_KEY", "API_KEYS"), first.notes, strict=True
    ):
        path = StateDir(bare.data_dir).secret_path(name)
        assert f"{setting} is not set: a random one is kept in {path}" == note
        assert 0o600 == stat.S_IMODE(path.stat().st_mode)


def test_configured_ones_stay(tmp_path: Path) -> None:
    """What an operator has said is left alone, and nothing is written."""
    settings = Settings(data_dir=tmp_path / "state", jwt_secret_key="k" * 32, api_keys=("a", "b"))

    assert settings == complete(settings, create=True).settings
    assert not settings.data_dir.exists()


def test_a_public_key_needs_no_secret(tmp_path: Path) -> None:
    """Where tokens are checked with a public key, from a file or an issuer, none is made."""
    for url in (None, "https://login.example.com/keys"):
        settings = Settings(
            data_dir=tmp_path / str(url is None), jwt_algorithms=("RS256",), jwt_jwks_url=url
        )
        completed = complete(settings, create=True)

        assert completed.settings.jwt_secret_key is None
        assert ["api.secret"] == [path.name for path in settings.data_dir.glob("*.secret")]


def test_a_command_makes_nothing(tmp_path: Path) -> None:
    """Without a server's secret a command says so; with one it gets that of tokens only."""
    settings = Settings(data_dir=tmp_path / "state")
    with pytest.raises(SettingsError, match="JWT_SECRET_KEY: is not set, and no server has made"):
        complete(settings, create=False)
    assert not settings.data_dir.exists()

    made = complete(settings, create=True).settings
    found = complete(settings, create=False)

    assert (made.jwt_secret_key, None) == (found.settings.jwt_secret_key, found.settings.api_keys)
    assert () == found.notes
