"""Finding the values of settings: layers, sources, one-line errors."""

from pathlib import Path

import attrs
import pytest

from tests.trioserver.loading import HOME, SECRET, environment, refusal
from trioserver.errors import SettingsError
from trioserver.settings import Settings, all_settings, find
from trioserver.settings_load import FlagOption, flag_options, load


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a working directory of its own: ``trioserver.toml`` is looked for there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def file_refusal(path: Path, content: str) -> str:
    """Return the one line with which this file is refused."""
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        load({}, HOME, path)
    return str(caught.value)


class TestLayers:
    """Which value counts."""

    def test_defaults(self) -> None:
        """Without any layer, the documented defaults are in force."""
        loaded = load({}, HOME, None)

        expected = attrs.evolve(Settings(), data_dir=Path("/home/jo/.local/state/trioserver/8081"))
        assert expected == loaded.settings
        assert {one.env: "default" for one in all_settings().values()} == loaded.sources
        assert () == loaded.warnings

    def test_flags_beat_environment_beats_file_beats_default(self, directory: Path) -> None:
        """The strongest layer that has a value wins, value by value, and is named."""
        file = directory / "my.toml"
        file.write_text("ws_port = 1\nadmin_port = 2\nworkers = 3\n")

        loaded = load({"ws_port": "21"}, HOME | {"WS_PORT": "11", "ADMIN_PORT": "12"}, file)

        found = loaded.settings
        assert (21, 12, 3, "0.0.0.0") == (
            found.ws_port,
            found.admin_port,
            found.workers,
            found.ws_host,
        )
        assert ("--ws-port", "environment", f"file {file}", "default") == tuple(
            loaded.sources[name] for name in ("WS_PORT", "ADMIN_PORT", "WORKERS", "WS_HOST")
        )

    @pytest.mark.parametrize(
        ("canonical", "alias"),
        [
            ("WS_HOST", "HOST"),
            ("WS_PORT", "PORT"),
            ("WS_PORT", "WEBSOCKET_PORT"),
            ("JWT_SECRET_KEY", "JWT_SECRET"),
            ("WS_MAX_CONNECTIONS", "MAX_CONNECTIONS"),
            ("LOG_LEVEL", "LOGGER_LEVEL"),
        ],
    )
    def test_canonical_name_beats_alias(self, canonical: str, alias: str) -> None:
        """An alias works alone, in the environment and as a flag, and loses against the name."""
        one = all_settings()[canonical.lower()]
        weak, strong = {
            "WS_HOST": ("10.0.0.1", "10.0.0.2"),
            "JWT_SECRET_KEY": (SECRET, SECRET * 2),
            "LOG_LEVEL": ("error", "debug"),
        }.get(canonical, ("81", "82"))
        option = "--" + alias.lower().replace("_", "-")

        for given_values in ({canonical: strong, alias: weak}, {alias: weak, canonical: strong}):
            settings = environment(**given_values).settings
            assert one.parse(strong) == getattr(settings, one.name)
        for flags in ({option: weak, one.name: strong}, {one.name: strong, option: weak}):
            assert one.parse(strong) == getattr(load(flags, HOME, None).settings, one.name)
        alone = environment(**{alias: weak})
        assert one.parse(weak) == getattr(alone.settings, one.name)
        assert f"environment {alias}" == alone.sources[canonical]
        flag = load({option: weak}, HOME, None)
        assert (one.parse(weak), option) == (
            getattr(flag.settings, one.name),
            flag.sources[canonical],
        )

    def test_environment_is_shared_with_others(self) -> None:
        """Unknown names and empty values in the environment are nobody's business."""
        loaded = environment(WS_PROT="1", TRIO="x", WS_PORT="", PORT="8090", JWT_SECRET="")

        assert (8090, None) == (loaded.settings.ws_port, loaded.settings.jwt_secret_key)
        assert () == loaded.warnings

    def test_kubernetes_service_variables(self) -> None:
        """What Kubernetes injects for a service is ignored, with a warning that names it."""
        loaded = environment(
            REDIS_HOST="redis", REDIS_PORT="tcp://10.0.0.1:6379", WS_PORT="udp://10.0.0.2:1"
        )

        assert (6379, 8081) == (loaded.settings.redis_port, loaded.settings.ws_port)
        assert ("default", "default") == (
            loaded.sources["REDIS_PORT"],
            loaded.sources["WS_PORT"],
        )
        assert ["WS_PORT", "REDIS_PORT"] == [line.split()[0] for line in loaded.warnings]
        assert 'REDIS_PORT (environment): "tcp://10.0.0.1:6379" is ignored' in loaded.warnings[1]

    def test_kubernetes_value_as_a_flag_is_a_mistake(self) -> None:
        """Only the environment is shared with Kubernetes: elsewhere the value is refused."""
        assert "is not a port number" in refusal({"redis_port": "tcp://10.0.0.1:6379"})

    def test_flags_not_given(self) -> None:
        """A flag that is None was not given."""
        assert 8081 == load({"ws_port": None, "--port": None}, HOME, None).settings.ws_port

    def test_empty_flag_unsets(self) -> None:
        """An empty flag takes an optional setting back to "not set"."""
        settings = load({"redis_url": ""}, HOME | {"REDIS_URL": "redis://h"}, None).settings

        assert settings.redis_url is None
        assert settings.embedded_redis


class TestFile:
    """The TOML file."""

    def test_kinds_of_values(self, directory: Path) -> None:
        """TOML's own types and text mean the same; keys may be canonical names or aliases."""
        file = directory / "my.toml"
        file.write_text(
            'port = "8090"\nWS_MAX_MESSAGE_SIZE = "16k"\njwt_query_token = false\n'
            'jwt_algorithms = ["HS256", "HS512"]\nauth_timeout = 0.5\nheartbeat_interval = 250\n'
            'redis_password = ""\n'
        )

        settings = load({}, HOME, file).settings

        assert (8090, 16384, False, ("HS256", "HS512"), 0.5, 0.25, None) == (
            settings.ws_port,
            settings.ws_max_message_size,
            settings.jwt_query_token,
            settings.jwt_algorithms,
            settings.auth_timeout,
            settings.heartbeat_interval,
            settings.redis_password,
        )

    @pytest.mark.parametrize("order", ["port = 1\nws_port = 2\n", "ws_port = 2\nport = 1\n"])
    def test_canonical_key_beats_alias(self, directory: Path, order: str) -> None:
        """Also in the file the canonical name wins, in whatever order."""
        file = directory / "my.toml"
        file.write_text(order)

        assert 2 == load({}, HOME, file).settings.ws_port

    def test_default_file(self, directory: Path) -> None:
        """The default file is read if it is there; a named one replaces it."""
        (directory / "trioserver.toml").write_text("ws_port = 1\n")
        named = directory / "other.toml"
        named.write_text("ws_port = 2\n")
        flag = directory / "flag.toml"
        flag.write_text("ws_port = 3\n")

        variable = HOME | {"TRIOSERVER_CONFIG": str(named)}
        assert 1 == load({}, HOME, None).settings.ws_port
        assert 2 == load({}, variable, None).settings.ws_port
        assert 3 == load({}, variable, flag).settings.ws_port

    def test_named_file_must_exist(self, directory: Path) -> None:
        """A file that somebody names and that is not there ends the start, saying who named it."""
        missing = directory / "missing.toml"

        with pytest.raises(SettingsError, match=r"^--config: .*missing\.toml.* No such file"):
            load({}, HOME, missing)
        line = refusal(environ={"TRIOSERVER_CONFIG": str(missing)})
        assert line.startswith('TRIOSERVER_CONFIG (environment): "')

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ("ws_prot = 1\n", "ws_prot (file {}): is not a setting; did you mean ws_port?"),
            ("zzzzzz = 1\n", "zzzzzz (file {}): is not a setting"),
            ('"a\\nb" = 1\n', "a\\nb (file {}): is not a setting"),
            (
                "[ws_port]\nx = 1\n",
                (
                    "WS_PORT (file {}): is neither text, number, true, false nor a list of these "
                    "(example: ws_port = 8081)"
                ),
            ),
            (
                'ws_port = "abc"\n',
                'WS_PORT (file {}): "abc" is not a port number (example: ws_port = 8081)',
            ),
            (
                "ws_host = true\nws_write_wait = nan\n",
                'WS_WRITE_WAIT (file {}): "NaN" is not a duration (example: ws_write_wait = "10s")',
            ),
        ],
    )
    def test_refusals(self, directory: Path, content: str, expected: str) -> None:
        """An unknown key and a bad value are named together with the file, spelt as in TOML."""
        file = directory / "my.toml"

        assert expected.format(file) == file_refusal(file, content)

    def test_not_toml(self, directory: Path) -> None:
        """A file that is no TOML, or no text, is refused with the place of the mistake."""
        file = directory / "my.toml"

        assert "line 1" in file_refusal(file, "ws_port 8081\n")
        file.write_bytes(b"\xff\xfe")
        with pytest.raises(SettingsError, match="is not TOML"):
            load({}, HOME, file)

    def test_directory_as_file(self, directory: Path) -> None:
        """A directory is refused like any other file that cannot be read."""
        with pytest.raises(SettingsError, match=r"cannot be read: Is a directory"):
            load({}, HOME, directory)


class TestErrors:
    """What an operator reads about a bad value."""

    def test_whole_line(self) -> None:
        """The line for a bad value is complete, and spelt as the operator spelt it."""
        assert (
            'WS_PORT (environment): "abc" is not a port number (example: WS_PORT=8081)'
            == refusal(environ={"WS_PORT": "abc"})
        )
        assert (
            'WS_PORT (environment PORT): "abc" is not a port number (example: PORT=8081)'
            == refusal(environ={"PORT": "abc"})
        )
        assert 'WS_PORT (--port): "abc" is not a port number (example: --port 8081)' == refusal(
            {"--port": "abc"}
        )

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("REDIS_PASSWORD", "hunter2\n"),
            ("JWT_SECRET_KEY", "hunter2\x00" + SECRET),
            ("REDIS_URL", "http://:hunter2@host"),
            ("REDIS_URL", "redis://:hunter2@host:port"),
        ],
    )
    def test_secrets_stay_out_of_errors(self, name: str, text: str) -> None:
        """The line about a bad secret does not contain it, nor does its cause."""
        with pytest.raises(SettingsError) as caught:
            environment(**{name: text})

        assert "hunter2" not in f"{caught.value!r} {caught.value.__cause__!r}"
        assert str(caught.value).startswith(f"{name} (environment): the value ")


class TestFlags:
    """What the command line offers."""

    def test_options(self) -> None:
        """There is one option per setting, with its aliases, under the attribute's name."""
        options = {option.setting: option for option in flag_options()}

        assert [field.name for field in attrs.fields(Settings)] == list(options)
        assert ("--ws-port", "--port", "--websocket-port") == options["ws_port"].names
        assert ("--workers",) == options["workers"].names
        assert (
            FlagOption(
                names=("--ws-port", "--port", "--websocket-port"),
                help="The public port. 0 takes any free one. Default: 8081.",
                setting="ws_port",
            )
            == options["ws_port"]
        )
        assert "JWT_SECRET_KEY in the environment" in options["jwt_secret_key"].help
        names = [name for option in options.values() for name in option.names]
        assert len(set(names)) == len(names)

    def test_every_option_loads(self) -> None:
        """Each name of each option is understood by load."""
        for option in flag_options():
            for name in option.names:
                found = find(name)
                assert found is not None
                assert option.setting == found.name

    @pytest.mark.parametrize(
        ("flag", "expected"),
        [
            ("--ws-prot", "--ws-prot: is not a setting; did you mean --ws-port?"),
            ("ws_prot", "--ws-prot: is not a setting; did you mean --ws-port?"),
            ("--zzzzzz", "--zzzzzz: is not a setting"),
        ],
    )
    def test_unknown_flag(self, flag: str, expected: str) -> None:
        """An unknown flag is named, together with the one that was probably meant."""
        assert expected == refusal({flag: "1"})
