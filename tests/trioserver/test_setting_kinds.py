"""Kinds of values: spellings, limits, how they are printed."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as patience
from hypothesis import strategies as st

from tests.trioserver.loading import environment, refusal
from trioserver import setting_kinds
from trioserver.setting_kinds import mask_url

DURATIONS = st.floats(min_value=0, max_value=setting_kinds.YEAR_SECONDS).map(
    lambda value: round(value, 9)
)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a working directory of its own: ``trioserver.toml`` is looked for there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


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

    def test_api_keys(self) -> None:
        """Keys are separated by commas; space around them and repetitions do not count."""
        assert ("first-key", "2nd+/=") == environment(
            API_KEYS="first-key, 2nd+/= ,first-key"
        ).settings.api_keys

    @pytest.mark.parametrize("text", ["s3cret,", ",", "s3cret a", "s3cret:x", "s3crét", "s" * 257])
    def test_bad_api_keys(self, text: str) -> None:
        """Keys that could not be sent, or mean something else some day, are refused unprinted."""
        line = refusal(environ={"API_KEYS": text})

        assert line.startswith("API_KEYS (environment): the value is not a list of keys: ")
        assert "s3c" not in line

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
            ("REDIS_HOST", "redis..svc", '"redis..svc" is not a host name or an IP address'),
            ("REDIS_HOST", "x" * 64, "is not a host name or an IP address"),
            ("REDIS_HOST", "a." * 127, "is not a host name or an IP address"),
            ("REDIS_HOST", "h:6379", '"h:6379" is not a host name or an IP address'),
            ("REDIS_HOST", "1::2::3", '"1::2::3" is not a host name or an IP address'),
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
            ("NOTIFICATION_TTL", "0", '"0" is not from 1s to 30d'),
            ("NOTIFICATION_TTL", "31d", '"31d" is not from 1s to 30d'),
            ("INBOX_MAX_LENGTH", "0", '"0" is not a whole number from 1 to 100000'),
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

    @pytest.mark.parametrize(
        "host", ["h", "redis_1.a-b.internal.", "10.0.0.1", "::1", "fe80::1%eth0", "x" * 63]
    )
    def test_hosts(self, host: str) -> None:
        """Names, with one dot at the end or none, and addresses of both kinds."""
        assert host == environment(REDIS_HOST=host).settings.redis_host

    @pytest.mark.parametrize(
        "url",
        [
            "redis://localhost",
            "redis://user:p%40ss%2Fw@redis_1.internal:6379/3",
            "rediss://[::1]:6379",
            "unix:///run/redis.sock?db=2",
            "unix://:secret@/run/redis.sock",
        ],
    )
    def test_redis_urls(self, url: str) -> None:
        """What redis-py takes for a URL is taken."""
        assert url == environment(REDIS_URL=url).settings.redis_url


class TestWriting:
    """Printed values can be given as input again."""

    @patience(deadline=None)
    @given(DURATIONS)
    def test_durations(self, seconds: float) -> None:
        """A printed duration means the same float, whether bare numbers are seconds or not."""
        for kind in (setting_kinds.DURATION, setting_kinds.MILLISECONDS):
            assert seconds == kind.parse(kind.show(seconds))

    @patience(deadline=None)
    @given(st.integers(0, setting_kinds.GIB))
    def test_sizes(self, size: int) -> None:
        """A printed size means the same number of bytes."""
        assert size == setting_kinds.SIZE.parse(setting_kinds.SIZE.show(size))

    def test_shown(self) -> None:
        """Values are printed in the largest unit that needs no fraction."""
        durations = [0.0, 0.25, 0.0001, 1.5, 60.0, 90.0, 3600.0, 86400.0]
        sizes = [0, 1, 1024, 1025, 1 << 20, 3 << 30]

        assert ["0", "250ms", "0.0001s", "1500ms", "1m", "90s", "1h", "1d"] == [
            setting_kinds.DURATION.show(value) for value in durations
        ]
        assert ["0", "1", "1KiB", "1025", "1MiB", "3GiB"] == [
            setting_kinds.SIZE.show(value) for value in sizes
        ]

    def test_no_topics(self) -> None:
        """An empty list has a word of its own, as an empty value counts for nothing."""
        kind = setting_kinds.TOPIC_PATTERNS
        assert ["none", "news.**,a"] == [kind.show(()), kind.show(("news.**", "a"))]
        assert () == environment(PRESENCE_TOPICS="none").settings.presence_topics


class TestMask:
    """Credentials in URLs."""

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
