"""Settings: layers, spellings, limits, one-line errors, snapshots."""
# ruff: noqa: SIM300 - the expected value stands first

from collections.abc import Mapping
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import settings as patience
from hypothesis import strategies as st

from trioserver import settings as module
from trioserver.errors import SettingsError
from trioserver.settings import FlagOption, Loaded, Settings, all_settings, load, mask_url

SECRET = "k" * 32
HOME = {"HOME": "/home/jo"}
PUBLIC_PEM = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----\n"


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a working directory of its own: ``trioserver.toml`` is looked for there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def environment(**values: str) -> Loaded:
    """Load from the environment alone."""
    return load({}, HOME | values, None)


def refusal(
    flags: Mapping[str, str] | None = None, environ: Mapping[str, str] | None = None
) -> str:
    """Return the one line with which this is refused."""
    with pytest.raises(SettingsError) as caught:
        load(flags or {}, HOME | dict(environ or {}), None)
    line = str(caught.value)
    assert line.isprintable()
    return line


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

    def test_documented_figures(self) -> None:
        """The defaults that users rely on are what the documentation promises."""
        settings = load({}, HOME, None).settings

        assert ("0.0.0.0", 8081, "127.0.0.1", 9081) == (
            settings.ws_host,
            settings.ws_port,
            settings.admin_host,
            settings.admin_port,
        )
        assert (16384, 10240, 1048576, 256, 10000) == (
            settings.ws_max_message_size,
            settings.notification_max_size,
            settings.outbox_max_bytes,
            settings.outbox_max_frames,
            settings.ws_max_connections,
        )
        assert (30.0, 60.0, 10.0, 30.0, 300.0, 5.0, 10.0, 30.0, 5.0) == (
            settings.ws_ping_interval,
            settings.ws_pong_wait,
            settings.ws_write_wait,
            settings.heartbeat_interval,
            settings.connection_timeout,
            settings.handshake_timeout,
            settings.auth_timeout,
            settings.drain_seconds,
            settings.drain_propagation,
        )
        assert module.usable_cpus() == settings.workers >= 1

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


class TestValues:
    """How values are written."""

    @pytest.mark.parametrize(
        ("text", "seconds"),
        [
            ("30s", 30.0),
            ("5m", 300.0),
            ("250ms", 0.25),
            ("1h", 3600.0),
            ("7d", 604800.0),
            (" 1.5 s ", 1.5),
            ("10", 10.0),
            ("0", 0.0),
            ("2S", 2.0),
        ],
    )
    def test_durations(self, text: str, seconds: float) -> None:
        """Durations carry a unit; a bare number counts seconds."""
        assert seconds == environment(WS_WRITE_WAIT=text).settings.ws_write_wait

    @pytest.mark.parametrize("name", ["HEARTBEAT_INTERVAL", "CONNECTION_TIMEOUT"])
    def test_milliseconds(self, name: str) -> None:
        """In the two settings that are known in milliseconds, a bare number counts these."""
        for text, seconds in {"1500": 1.5, "30s": 30.0, "250ms": 0.25, "0": 0.0}.items():
            assert seconds == getattr(environment(**{name: text}).settings, name.lower())

    @pytest.mark.parametrize(
        ("text", "size"),
        [
            ("16KiB", 16384),
            ("1MiB", 1048576),
            ("16k", 16384),
            ("16kb", 16384),
            ("1 GiB", 1 << 30),
            ("512", 512),
            ("512b", 512),
            ("0", 0),
        ],
    )
    def test_sizes(self, text: str, size: int) -> None:
        """Sizes are bytes, or binary multiples of them."""
        assert size == environment(OUTBOX_MAX_BYTES=text).settings.outbox_max_bytes

    def test_booleans(self) -> None:
        """Eight words are booleans, in any case."""
        for expected, words in {True: "true 1 YES on", False: "False 0 no off"}.items():
            for word in words.split():
                assert expected is environment(REDIS_USE_TLS=word).settings.redis_use_tls

    def test_lists_and_choices(self) -> None:
        """Lists have commas; choices ignore case and know their synonyms."""
        settings = environment(JWT_ALGORITHMS="hs256, HS512,HS256", LOG_LEVEL="WARN").settings

        assert (("HS256", "HS512"), "warning") == (settings.jwt_algorithms, settings.log_level)

    def test_paths_are_absolute(self, directory: Path) -> None:
        """Relative paths start at the working directory, also for processes elsewhere."""
        settings = environment(LOG_DIR="logs", DATA_DIR="../state").settings

        assert (directory / "logs", directory.parent / "state") == (
            settings.log_dir,
            settings.data_dir,
        )

    @pytest.mark.parametrize(
        ("name", "text", "problem"),
        [
            ("WS_PORT", "abc", '"abc" is not a port number'),
            ("WS_PORT", "65536", '"65536" is not a port number from 0 to 65535'),
            ("WS_PORT", "-1", '"-1" is not a port number'),
            ("WS_PORT", "8_081", '"8_081" is not a port number'),
            ("WS_PORT", "٨٠٨١", '"٨٠٨١" is not a port number'),
            ("WS_PORT", "9" * 5000, "is not a port number"),
            ("WS_HOST", "a b", '"a b" is not a host name or an IP address'),
            ("WORKERS", "0", '"0" is not a whole number from 1 to 1024'),
            ("REDIS_PORT", "0", '"0" is not a port number from 1 to 65535'),
            ("WS_WRITE_WAIT", "10 parsecs", '"10 parsecs" is not a duration'),
            ("WS_WRITE_WAIT", "-1s", '"-1s" is not a duration'),
            ("WS_WRITE_WAIT", "366d", '"366d" is not from 0 to 365d'),
            ("WS_PONG_WAIT", "0", '"0" is not from 1ms to 365d'),
            ("DRAIN_SECONDS", "0", '"0" is not from 1ms to 1d'),
            ("JWT_LEEWAY", "2h", '"2h" is not from 0 to 1h'),
            ("OUTBOX_MAX_BYTES", "1.5MiB", '"1.5MiB" is not a size in bytes'),
            ("OUTBOX_MAX_BYTES", "2GiB", '"2GiB" is not from 0 to 1GiB'),
            ("JWT_QUERY_TOKEN", "maybe", '"maybe" is not true or false'),
            ("LOG_LEVEL", "loud", '"loud" is not one of debug, info, warning, error, critical'),
            ("LOGGER_ENCODING", "xml", '"xml" is not one of auto, json, console'),
            ("WS_MODE", "fast", '"fast" is not one of debug, development, test, release, '),
            ("JWT_ALGORITHMS", "none", '"none" is not one of HS256, HS384, HS512, RS256'),
            ("JWT_ALGORITHMS", "HS256,RS256", '"HS256,RS256" mixes algorithms'),
            ("USER_CHANNEL", "user_noti", '"user_noti" does not contain {user} exactly once'),
            ("USER_CHANNEL", "{user}:{user}", "does not contain {user} exactly once"),
            ("BROADCAST_CHANNEL", "a\u2028b", '"a\\u2028b" contains a control character'),
            ("CHANNEL_PREFIX", "a\nb", '"a\\nb" contains a control character (a newline'),
            ("JWT_AUDIENCE", "a\udcffb", '"a\\udcffb" is not UTF-8'),
        ],
    )
    def test_bad_values(self, name: str, text: str, problem: str) -> None:
        """A bad value gives one line: setting, where it came from, problem, example."""
        line = refusal(environ={name: text})

        assert line.startswith(f"{name} (environment): ")
        assert problem in line
        assert f"(example: {name}=" in line
        assert len(line) < 250

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

    @pytest.mark.parametrize(
        "url",
        [
            "redis://localhost",
            "redis://user:p@ss/w@redis_1.internal:6379/3?health_check_interval=5",
            "rediss://[::1]:6379",
            "unix:///run/redis.sock?db=2",
            "unix://:secret@/run/redis.sock",
        ],
    )
    def test_redis_urls(self, url: str) -> None:
        """What redis-py takes for a URL is taken."""
        assert url == environment(REDIS_URL=url).settings.redis_url

    def test_every_example_and_default_is_good(self, directory: Path) -> None:
        """Each documented example and default is accepted by its own setting."""
        del directory
        for one in all_settings().values():
            one.parse(one.example)
            if one.default and not set(one.default) & set("<, "):
                assert one.default == one.show(one.parse(one.default))


class TestConflicts:
    """What concerns several settings, or the machine."""

    def test_drain(self) -> None:
        """The first part of a drain is shorter than the whole, and shrinks with it by default."""
        assert (
            "DRAIN_PROPAGATION (environment): 5s is not shorter than DRAIN_SECONDS (5s) "
            "(example: DRAIN_PROPAGATION=0)"
            == refusal(environ={"DRAIN_SECONDS": "5s", "DRAIN_PROPAGATION": "5"})
        )
        assert 0.5 == environment(DRAIN_SECONDS="3s").settings.drain_propagation
        assert 5.0 == environment(DRAIN_SECONDS="1h").settings.drain_propagation
        assert (
            2.0
            == environment(DRAIN_SECONDS="3s", DRAIN_PROPAGATION="2s").settings.drain_propagation
        )

    def test_ports(self) -> None:
        """Both ports on one address are refused; on two addresses, or free ones, they are not."""
        assert "ADMIN_PORT (default): 9081 is also WS_PORT (example: ADMIN_PORT=9082)" == refusal(
            environ={"WS_PORT": "9081"}
        )
        assert "example: ADMIN_PORT=1)" in refusal(
            environ={"WS_PORT": "65535", "ADMIN_PORT": "65535", "WS_HOST": "127.0.0.1"}
        )
        environment(WS_PORT="9081", WS_HOST="10.0.0.1")
        environment(WS_PORT="0", ADMIN_PORT="0")

    def test_channels(self) -> None:
        """No user may own the broadcast channel; the setting that was changed is blamed."""
        line = refusal(environ={"BROADCAST_CHANNEL": "user_noti:all"})
        assert line.startswith('BROADCAST_CHANNEL (environment): BROADCAST_CHANNEL "user_noti:all"')
        line = refusal(environ={"USER_CHANNEL": "channels:{user}"})
        assert line.startswith('USER_CHANNEL (environment): BROADCAST_CHANNEL "channels:broadcast"')
        environment(USER_CHANNEL="channels:user:{user}")
        environment(USER_CHANNEL="channels:{user}:x", BROADCAST_CHANNEL="channels::x")

    @pytest.mark.parametrize(("name", "least"), [("HS256", 32), ("HS384", 48), ("HS512", 64)])
    def test_short_secret(self, name: str, least: int) -> None:
        """A secret shorter than the hash of its algorithm is refused; bytes count."""
        line = refusal(environ={"JWT_SECRET": "é" * (least // 2 - 1), "JWT_ALGORITHMS": name})

        assert (
            f"JWT_SECRET_KEY (environment JWT_SECRET): {least - 2} bytes are too few: "
            f"{name} needs at least {least} (example: JWT_SECRET=$(openssl rand -base64 48))"
            == line
        )
        environment(JWT_SECRET="é" * (least // 2), JWT_ALGORITHMS=name)

    def test_longest_hash_decides(self) -> None:
        """With several algorithms the secret is long enough for all."""
        assert "32 bytes are too few: HS256,HS512 needs at least 64" in refusal(
            environ={"JWT_SECRET": SECRET, "JWT_ALGORITHMS": "HS256,HS512"}
        )

    def test_public_key(self, directory: Path) -> None:
        """Algorithms with a public key need a file that holds one, and nothing else."""
        rsa = {"JWT_ALGORITHMS": "RS256,ES256,EdDSA"}
        key = directory / "key.pem"
        with_key = rsa | {"JWT_PUBLIC_KEY_FILE": str(key)}

        assert refusal(environ=rsa).startswith(
            "JWT_PUBLIC_KEY_FILE (default): is not set, but JWT_ALGORITHMS=RS256,ES256,EdDSA needs"
        )
        assert f'"{key}" cannot be read: No such file or directory' in refusal(environ=with_key)
        key.write_text("hello")
        assert f'"{key}" is not a PEM file with a public key' in refusal(environ=with_key)
        key.write_text(PUBLIC_PEM.replace("PUBLIC", "PRIVATE"))
        assert f'"{key}" holds a private key' in refusal(environ=with_key)
        key.write_text(PUBLIC_PEM)
        loaded = environment(**with_key)
        assert (key, ("RS256", "ES256", "EdDSA")) == (
            loaded.settings.jwt_public_key_file,
            loaded.settings.jwt_algorithms,
        )

    @pytest.mark.parametrize("name", ["DATA_DIR", "LOG_DIR"])
    def test_directories(self, directory: Path, name: str) -> None:
        """A directory setting that names a file is refused; one that does not exist is not."""
        file = directory / "file"
        file.touch()

        assert f'{name} (environment): "{file}" is not a directory' in refusal(
            environ={name: str(file)}
        )
        environment(**{name: str(directory / "new")})
        environment(**{name: str(directory)})

    @pytest.mark.parametrize(
        ("environ", "expected"),
        [
            ({"REDIS_URL": "redis://h"}, []),
            ({"REDIS_HOST": "h", "REDIS_DB": "1"}, []),
            (
                {"REDIS_URL": "redis://h", "REDIS_HOST": "x", "REDIS_PASSWORD": "p"},
                [
                    "REDIS_HOST (environment): has no effect, because REDIS_URL is set",
                    "REDIS_PASSWORD (environment): has no effect, because REDIS_URL is set",
                ],
            ),
            (
                {"REDIS_DB": "1"},
                [
                    (
                        "REDIS_DB (environment): has no effect, "
                        "because neither REDIS_URL nor REDIS_HOST is set"
                    )
                ],
            ),
        ],
    )
    def test_redis_values_without_effect(
        self, environ: dict[str, str], expected: list[str]
    ) -> None:
        """What was said about Redis and is not used is told in one line each."""
        assert tuple(expected) == environment(**environ).warnings

    def test_keys_without_effect(self, directory: Path) -> None:
        """A key for the other sort of algorithms is told to be useless."""
        key = directory / "key.pem"
        key.write_text(PUBLIC_PEM)

        [idle_file] = environment(JWT_PUBLIC_KEY_FILE=str(key)).warnings
        [idle_secret] = environment(
            JWT_PUBLIC_KEY_FILE=str(key), JWT_ALGORITHMS="RS256", JWT_SECRET_KEY=SECRET
        ).warnings
        assert "JWT_ALGORITHMS uses a shared secret" in idle_file
        assert "JWT_ALGORITHMS uses a public key" in idle_secret
        assert SECRET not in idle_secret


class TestDataDir:
    """Where state is kept."""

    @pytest.mark.parametrize(
        ("environ", "expected"),
        [
            ({"XDG_STATE_HOME": "/state", "HOME": "/h"}, "/state/trioserver/8081"),
            ({"XDG_STATE_HOME": "relative", "HOME": "/h"}, "/h/.local/state/trioserver/8081"),
            ({"HOME": "/h", "WS_PORT": "90"}, "/h/.local/state/trioserver/90"),
            ({"HOME": "/h", "DATA_DIR": "/d"}, "/d"),
        ],
    )
    def test_default(self, environ: dict[str, str], expected: str) -> None:
        """It follows XDG and the port, so that two servers have two directories."""
        assert Path(expected) == load({}, environ, None).settings.data_dir

    def test_no_home(self) -> None:
        """A user without a home directory is asked for the setting, not given a strange place."""
        with pytest.raises(SettingsError, match=r"^DATA_DIR \(default\): .*DATA_DIR=/var/lib"):
            load({}, {"HOME": "."}, None)


class TestFlags:
    """What the command line offers."""

    def test_options(self) -> None:
        """There is one option per setting, with its aliases, under the attribute's name."""
        options = {option.setting: option for option in module.flag_options()}

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
        for option in module.flag_options():
            for name in option.names:
                found = module.find(name)
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


class TestRedisTarget:
    """Where Redis is, for people."""

    @pytest.mark.parametrize(
        ("environ", "expected"),
        [
            ({"REDIS_URL": "redis://u:hunter2@h:1/2"}, "redis://***@h:1/2"),
            ({"REDIS_HOST": "h", "REDIS_PASSWORD": "hunter2"}, "redis://h:6379/0"),
            ({"REDIS_HOST": "::1", "REDIS_USE_TLS": "1"}, "rediss://[::1]:6379/0"),
            ({"DATA_DIR": "/d"}, "embedded, in /d"),
        ],
    )
    def test_target(self, environ: dict[str, str], expected: str) -> None:
        """The target names the place, and never a password."""
        settings = environment(**environ).settings

        assert expected == settings.redis_target
        assert expected.startswith("embedded") is settings.embedded_redis
        assert "hunter2" not in repr(settings)

    @patience(deadline=None)
    @given(
        scheme=st.sampled_from(["redis", "rediss", "unix", "anything"]),
        password=st.text(min_size=1).map("pw-{}-pw".format),
    )
    def test_mask(self, scheme: str, password: str) -> None:
        """No password in a URL survives masking, however odd it is."""
        assert "pw-" not in mask_url(f"{scheme}://user:{password}@host:1/0")

    def test_mask_query(self) -> None:
        """A password in the query is masked, what has none stays as it is."""
        assert "unix:///s?db=1&password=***&x=1" == mask_url("unix:///s?db=1&password=p&x=1")
        assert "redis://host" == mask_url("redis://host")


TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
PATHS = st.text(st.characters(codec="utf-8", exclude_characters="\x00/"), min_size=1).map(
    lambda name: Path("/x", name)
)
DURATIONS = st.floats(min_value=0, max_value=module.YEAR_SECONDS).map(lambda value: round(value, 9))
BY_TYPE: dict[object, st.SearchStrategy[object]] = {
    int: st.integers(0, 1 << 40),
    float: DURATIONS,
    bool: st.booleans(),
    str: TEXTS,
    str | None: st.none() | TEXTS,
    Path: PATHS,
    Path | None: st.none() | PATHS,
    tuple[str, ...]: st.lists(TEXTS).map(tuple),
}
ANY_SETTINGS = st.builds(
    Settings, **{field.name: BY_TYPE[field.type] for field in attrs.fields(Settings)}
)


class TestSnapshot:
    """The way of the settings from the supervisor to its children."""

    @patience(deadline=None)
    @given(ANY_SETTINGS)
    def test_round_trip(self, settings: Settings) -> None:
        """What is restored is what the snapshot was taken of, secrets included."""
        assert settings == Settings.restore(settings.snapshot())

    def test_other_release(self) -> None:
        """Unknown settings are ignored and missing ones have their defaults."""
        restored = Settings.restore(b'{"ws_port": 1, "data_dir": "/d", "from_the_future": [1]}')

        assert Settings(ws_port=1, data_dir=Path("/d")) == restored

    @pytest.mark.parametrize("garbage", [b"", b"\xff", b"{", b"[]", b'{"ws_port": "x"}', b'"\xff"'])
    def test_garbage(self, garbage: bytes) -> None:
        """What is no snapshot is refused in one line."""
        with pytest.raises(SettingsError, match=r"^settings snapshot: cannot be read: .+$"):
            Settings.restore(garbage)


class TestWriting:
    """Printed values can be given as input again."""

    @patience(deadline=None)
    @given(DURATIONS)
    def test_durations(self, seconds: float) -> None:
        """A printed duration means the same float, whether bare numbers are seconds or not."""
        for kind in (module.DURATION, module.MILLISECONDS):
            assert seconds == kind.parse(kind.show(seconds))

    @patience(deadline=None)
    @given(st.integers(0, module.GIB))
    def test_sizes(self, size: int) -> None:
        """A printed size means the same number of bytes."""
        assert size == module.SIZE.parse(module.SIZE.show(size))

    def test_shown(self) -> None:
        """Values are printed in the largest unit that needs no fraction."""
        durations = [0.0, 0.25, 0.0001, 1.5, 60.0, 90.0, 3600.0, 86400.0]
        sizes = [0, 1, 1024, 1025, 1 << 20, 3 << 30]

        assert ["0", "250ms", "0.0001s", "1500ms", "1m", "90s", "1h", "1d"] == [
            module.DURATION.show(value) for value in durations
        ]
        assert ["0", "1", "1KiB", "1025", "1MiB", "3GiB"] == [
            module.SIZE.show(value) for value in sizes
        ]

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
