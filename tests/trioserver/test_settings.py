"""The table of settings: its figures, what follows from it, snapshots."""

from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import settings as patience
from hypothesis import strategies as st

from tests.trioserver.loading import HOME, environment
from trioserver import settings as module
from trioserver.errors import SettingsError
from trioserver.setting_kinds import YEAR_SECONDS
from trioserver.settings import Settings
from trioserver.settings_load import load


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a working directory of its own: ``trioserver.toml`` is looked for there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestDefaults:
    """What holds if nobody says anything."""

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
        assert (604800.0, 1000, 10000, 300.0, 30.0, 5, None) == (
            settings.notification_ttl,
            settings.inbox_max_length,
            settings.events_max_length,
            settings.idempotency_ttl,
            settings.ack_wait,
            settings.max_redeliveries,
            settings.api_keys,
        )
        assert module.usable_cpus() == settings.workers >= 1


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


TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
PATHS = st.text(st.characters(codec="utf-8", exclude_characters="\x00/"), min_size=1).map(
    lambda name: Path("/x", name)
)
DURATIONS = st.floats(min_value=0, max_value=YEAR_SECONDS).map(lambda value: round(value, 9))
BY_TYPE: dict[object, st.SearchStrategy[object]] = {
    int: st.integers(0, 1 << 40),
    float: DURATIONS,
    bool: st.booleans(),
    str: TEXTS,
    str | None: st.none() | TEXTS,
    Path: PATHS,
    Path | None: st.none() | PATHS,
    tuple[str, ...]: st.lists(TEXTS).map(tuple),
    tuple[str, ...] | None: st.none() | st.lists(TEXTS).map(tuple),
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
