"""What values become before they are logged: nothing secret, nothing endless."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trioserver.readable_log import Log, fail, readable_log
from trioserver import logs
from trioserver.log_redaction import redact

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiI0MiJ9.c2lnbmF0dXJl"


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    """A log of its own; what it takes over is given back afterwards."""
    with readable_log(tmp_path) as log:
        yield log


class TestSecrets:
    """What never appears."""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("GET /ws?token=abc.d&position=1", "GET /ws?token=***&position=1"),
            ("/ws?access_token=abc", "/ws?access_token=***"),
            ("JWT_SECRET_KEY=abc other=1", "JWT_SECRET_KEY=*** other=1"),
            ("token='a b' x", "token=*** x"),
            ('password="a b', "password=***"),
            ("Authorization: Bearer abc", "Authorization: Bearer ***"),
            ("Authorization: Basic dXNlcg==", "Authorization: Basic ***"),
            ("BEARER  abc", "BEARER  ***"),
            ("bearer.abc.def.ghi, trioserver.v1", "bearer.***, trioserver.v1"),
            ("bearer%20abc", "bearer%20***"),
            ("[(b'authorization', b'Bearer abc')]", "[(b'authorization', b'Bearer ***')]"),
            ('{"type":"auth","token":"abc"}', '{"type":"auth","token":***}'),
            ('{"type":"auth","token": "abc', '{"type":"auth","token": ***'),
            ("{'api_key': 'abc', 'x': 1}", "{'api_key': ***, 'x': 1}"),
            (r'"{\"token\":\"abc\"}"', r'"{\"token\":***}"'),
            (f"refused {JWT}!", "refused ***!"),
            (JWT[:30], "***"),
            ("redis://:hunter2@h:1/0", "redis://***@h:1/0"),
            ("the token is expired", "the token is expired"),
            ("https://example.com/a?b=1", "https://example.com/a?b=1"),
            ("plain", "plain"),
        ],
    )
    def test_shapes(self, text: str, expected: str) -> None:
        """Secrets inside of text are masked, their surroundings stay."""
        assert expected == redact(text)

    @pytest.mark.parametrize(
        "key", ["token", "jwt_secret_key", "Password", "Authorization", "API-Key api_key", "Cookie"]
    )
    def test_keys(self, log: Log, key: str) -> None:
        """A value with a telling name is masked, at any depth; yes, no and nothing are not."""
        logs.get_logger().info("x", **{key: 7}, deep={key: ["hunter2"]}, request={key: None})

        assert "***" == log.last[key]
        assert {key: "***"} == log.last["deep"]
        assert {key: None} == log.last["request"]

    def test_everywhere_in_a_line(self, log: Log) -> None:
        """Event, values, keys, nested values and tracebacks are all masked."""
        try:
            fail(f"bad token {JWT}")
        except ValueError:
            logs.get_logger(bound=JWT).exception(
                f"x {JWT}", a=JWT, b=[JWT], c={JWT: JWT.encode()}, d=ValueError(JWT)
            )

        text = log.path.read_text()
        assert JWT[4:] not in text
        assert 7 <= text.count("***")

    @pytest.mark.parametrize("start", [0, 300, 16_000, 16_383])
    def test_cutting_never_uncovers(self, log: Log, start: int) -> None:
        """A token is masked also where a long text is cut in the middle of it."""
        token = "eyJ" + "Q" * 9000

        logs.get_logger().info("x", text="." * start + token + "." * 9000)

        assert "Q" not in log.lines[0]

    @pytest.mark.parametrize(
        "hostile",
        [
            "a-",
            "token",
            "token-",
            "a://b:",
            "bearer ",
            "bearer.",
            "eyJ",
            "'token':'",
            "token=",
            " ",
        ],
    )
    def test_hostile_text_is_cheap(self, hostile: str) -> None:
        """Masking takes time in proportion to the text, whatever it repeats."""
        # Steps are counted by the clock of the process; a quadratic pattern takes seconds.
        before = resource.getrusage(resource.RUSAGE_SELF).ru_utime

        redact(("token" + hostile * 16_384)[:16_384])

        assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 0.5


class TestValues:
    """What is left of a value."""

    def test_values(self, log: Log) -> None:
        """Whatever is logged arrives as something that every reader of JSON understands."""
        logs.get_logger().info(
            "x",
            number=float("inf"),
            huge=1 << 5000,
            path=Path("/x"),
            raw=b"\xffab",
            nested={"a": [1, {"b": {"c": 2}}], 3: {True}},
            wide=list(range(100)),
            nothing=None,
        )

        last = log.last
        assert ("inf", "/x", "\\xffab", None) == tuple(
            last[key] for key in ("number", "path", "raw", "nothing")
        )
        assert str(last["huge"]).startswith("0x1")
        assert {"a": [1, {"b": "{'c': 2}"}], "3": [True]} == last["nested"]
        assert list(range(32)) == last["wide"]

    def test_long_values_are_cut(self, log: Log) -> None:
        """A long value keeps its beginning and its end, in 512 characters."""
        logs.get_logger().info("x", text="a" + "b" * 10_000 + "c", other="d" * 512)

        text = str(log.last["text"])
        assert (512, "a", "c") == (len(text), text[0], text[-1])
        assert "d" * 512 == log.last["other"]

    def test_recursion(self, log: Log) -> None:
        """A value that contains itself is cut off."""
        value: list[object] = []
        value.append(value)

        logs.get_logger().info("x", value=value)

        assert "x" == log.last["event"]
