"""One setting apart from its value: its example, its default, its printed form."""

from pathlib import Path

import pytest

from tests.trioserver.loading import SECRET, environment
from trioserver.settings import all_settings


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a working directory of its own: ``trioserver.toml`` is looked for there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestSetting:
    """What a setting says of itself."""

    def test_every_example_and_default_is_good(self, directory: Path) -> None:
        """Each documented example and default is accepted by its own setting."""
        del directory
        for one in all_settings().values():
            one.parse(one.example)
            if one.default and not set(one.default) & set("<, "):
                assert one.default == one.show(one.parse(one.default))

    def test_secrets_are_masked_everywhere(self) -> None:
        """Neither the repr nor a shown value contains a secret."""
        loaded = environment(
            JWT_SECRET_KEY=SECRET,
            REDIS_PASSWORD="hunter2",
            REDIS_URL="redis://:hunter2@h",
        )

        for text in (repr(loaded), repr(loaded.settings)):
            assert SECRET not in text
            assert "hunter2" not in text
        assert "***" == all_settings()["jwt_secret_key"].show(SECRET)
        assert not all_settings()["jwt_secret_key"].show(None)
