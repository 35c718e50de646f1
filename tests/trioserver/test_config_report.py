"""The settings on paper: table, single value, JSON, page."""

import json
from pathlib import Path

import pytest

from trioserver import config_report
from trioserver.errors import SettingsError
from trioserver.settings import all_settings
from trioserver.settings_load import Loaded, load


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """Some settings from each layer, secrets among them."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "trioserver.toml"
    file.write_text('log_level = "debug"\nredis_pool_size = 3\n')
    return load(
        {"--port": "8090"},
        {
            "HOME": "/h",
            "JWT_SECRET": "hunter2" * 8,
            "REDIS_URL": "redis://:hunter2@redis:6379/0",
            "WS_WRITE_WAIT": "250ms",
        },
        None,
    )


def test_table(loaded: Loaded) -> None:
    """The table has a line per setting: aligned name, value as one writes it, source."""
    lines = config_report.report(loaded).splitlines()

    assert len(all_settings()) == len(lines)
    assert [one.env for one in all_settings().values()] == [line.split()[0] for line in lines]
    fields = {name: rest for name, *rest in (line.split(maxsplit=2) for line in lines)}
    assert ["8090", "--port"] == fields["WS_PORT"]
    assert ["***", "environment JWT_SECRET"] == fields["JWT_SECRET_KEY"]
    assert ["redis://***@redis:6379/0", "environment"] == fields["REDIS_URL"]
    assert ["250ms", "environment"] == fields["WS_WRITE_WAIT"]
    assert ["debug", "file trioserver.toml"] == fields["LOG_LEVEL"]
    assert ["-", "default"] == fields["LOG_DIR"]
    assert 1 == len({line.index("  default") for line in lines if line.endswith("  default")})


def test_json(loaded: Loaded) -> None:
    """The JSON has numbers where values are numbers, and null where nothing is set."""
    document = json.loads(config_report.report_json(loaded))

    assert [one.env for one in all_settings().values()] == list(document)
    assert {"value": 8090, "source": "--port"} == document["WS_PORT"]
    assert {"value": 0.25, "source": "environment"} == document["WS_WRITE_WAIT"]
    assert {"value": ["HS256"], "source": "default"} == document["JWT_ALGORITHMS"]
    assert {"value": None, "source": "default"} == document["LOG_DIR"]
    assert {"value": "***", "source": "environment JWT_SECRET"} == document["JWT_SECRET_KEY"]
    assert "redis://***@redis:6379/0" == document["REDIS_URL"]["value"]


def test_secrets_are_masked(loaded: Loaded) -> None:
    """No output contains a secret."""
    outputs = [config_report.report(loaded), config_report.report_json(loaded)]
    outputs += [config_report.get(loaded, one.env) for one in all_settings().values()]

    assert "hunter2" not in "".join(outputs)


@pytest.mark.parametrize("name", ["WS_PORT", "ws_port", "PORT", "--ws-port", "websocket-port"])
def test_get(loaded: Loaded, name: str) -> None:
    """One value can be asked for by each name of its setting."""
    assert "8090" == config_report.get(loaded, name)


def test_get_unset(loaded: Loaded) -> None:
    """What is not set is empty, so that a shell can test it."""
    assert not config_report.get(loaded, "LOG_DIR")


def test_get_unknown(loaded: Loaded) -> None:
    """An unknown name is answered with the one that was probably meant."""
    with pytest.raises(SettingsError, match=r"^WS_PROT: is not a setting; did you mean WS_PORT\?$"):
        config_report.get(loaded, "WS_PROT")
    with pytest.raises(SettingsError, match=r"^ZZZZZ: is not a setting$"):
        config_report.get(loaded, "ZZZZZ")


def test_page() -> None:
    """The page has one row per setting, with default, unit, aliases and example."""
    page = config_report.page()

    for one in all_settings().values():
        assert 1 == page.count(f"\n| `{one.env}` |")
        assert f"\n## {one.group}\n" in page
        assert one.about in page
    assert (
        "| `WS_PORT` | `8081` | - | The public port. 0 takes any free one. "
        "Also `PORT` or `WEBSOCKET_PORT`. | `WS_PORT=8081` |\n" in page
    )
    assert "| `HEARTBEAT_INTERVAL` | `30s` | milliseconds |" in page
