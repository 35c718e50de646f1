"""What the commands have in common."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from trioserver import cli_options
from trioserver.endpoint import Endpoint
from trioserver.errors import CommandError, SettingsError
from trioserver.setting_kinds import DURATION
from trioserver.settings import Settings


@click.command()
@cli_options.with_settings("ws_port")
@click.option("--for", "seconds", callback=cli_options.written_as(DURATION))
def command(config_file: Path | None, seconds: float | None, **flags: str | None) -> None:
    """Print what a command gets."""
    given = {name: value for name, value in flags.items() if value is not None}
    click.echo(f"{config_file} {seconds} {given} {cli_options.as_arguments(given, config_file)}")


def run(*arguments: str) -> tuple[int, str]:
    """Return exit code and output."""
    result = CliRunner().invoke(command, arguments)
    return result.exit_code, result.output


def test_every_setting_is_an_option_and_few_are_shown() -> None:
    """--help lists those that matter to the command; the others work too."""
    _, text = run("--help")
    assert "--ws-port" in text
    assert "--config" in text
    assert "--log-level" not in text

    code, text = run("--log-level", "debug", "--ws-port=9", "--config", "f.toml")
    assert 0 == code
    assert text.startswith("f.toml None ")
    assert "'log_level': 'debug'" in text
    assert "'--log-level=debug'" in text
    assert "'--config=f.toml'" in text


def test_values_that_are_written_like_settings() -> None:
    """A duration is understood as in a setting; what is none is wrong usage, and quoted."""
    assert (0, "None 90.0 {} []\n") == run("--for", "90s")
    code, text = run("--for", "soon")
    assert 2 == code
    assert "Invalid value for '--for': \"soon\" is not a duration" in text


def test_warnings_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What the loader warns of reaches the person, beside the output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REDIS_PORT", "tcp://10.0.0.1:6379")
    loaded = cli_options.load_settings({"ws_port": "9000"}, None)
    said = capsys.readouterr()

    assert 9000 == loaded.settings.ws_port
    assert said.err.startswith("trioserver: warning: ")
    assert "" == said.out


def test_generated_secrets(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """They are made where that is allowed, and said; else only found."""
    settings = Settings(data_dir=tmp_path / "state")
    with pytest.raises(SettingsError, match="JWT_SECRET_KEY"):
        cli_options.with_secrets(settings, create=False)
    made = cli_options.with_secrets(settings, create=True)
    assert "JWT_SECRET_KEY is not set" in capsys.readouterr().err

    assert made.jwt_secret_key is not None
    found = cli_options.with_secrets(settings, create=False)
    assert made.jwt_secret_key == found.jwt_secret_key
    assert "" == capsys.readouterr().err


def test_where_redis_is(tmp_path: Path) -> None:
    """The configured one, else the embedded one of a server that runs."""
    url = Settings(data_dir=tmp_path, redis_url="redis://h:1/2")
    assert Endpoint(host="h", port=1, db=2) == cli_options.where_is_redis(url)

    embedded = Settings(data_dir=tmp_path)
    with pytest.raises(CommandError, match="no trioserver is running with DATA_DIR"):
        cli_options.where_is_redis(embedded)
    (tmp_path / "redis.sock").touch()
    assert Endpoint(path=str(tmp_path / "redis.sock")) == cli_options.where_is_redis(embedded)
