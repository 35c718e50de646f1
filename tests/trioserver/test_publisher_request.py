"""What a caller asks for: mistakes are found before anything is sent."""

import datetime as dt
from typing import Any, Final, cast

import attrs
import msgspec
import pytest

from trioserver import ledger
from trioserver.messages import RESERVED_TYPES
from trioserver.publisher.request import Draft, Options, PublishRefused, checked_user, draft
from trioserver.settings import Settings

NOW: Final = 1_763_630_000.0
SETTINGS: Final = Settings()
DAY: Final = 86_400


def made(payload: object = 1, settings: Settings = SETTINGS, **options: object) -> Draft:
    """Return a draft."""
    return draft(payload, cast("Options", options), settings, NOW)


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({"n": 1, "ä": [None, True, 1.5]}, '{"n":1,"ä":[null,true,1.5]}'.encode()),
        ("text", b'"text"'),
        (None, b"null"),
        (b'{"as": "it is"}', b'{"as": "it is"}'),
        (bytearray(b"1"), b"1"),
        (memoryview(b"[2]"), b"[2]"),
        (msgspec.Raw(b' {"raw":1} '), b' {"raw":1} '),
        (dt.date(2026, 1, 1), b'"2026-01-01"'),
    ],
)
def test_payloads(payload: object, expected: bytes) -> None:
    """Objects become JSON, bytes are JSON already and stay as they are."""
    assert expected == made(payload).payload


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b"{} {}",
        b"\xff",
        b'"\xff"',
        msgspec.Raw(b""),
        object(),
        {1, object()},
        "\ud800",
        "x" * 10_240,
        b"[" * 5_000 + b"]" * 5_000,
    ],
)
def test_what_is_no_payload(payload: object) -> None:
    """What cannot be JSON, or is too large, is refused with a sentence."""
    with pytest.raises(PublishRefused, match="payload"):
        made(payload)


def test_the_largest_payload() -> None:
    """The limit is the settings': one byte more is refused, 0 is no limit."""
    small = attrs.evolve(SETTINGS, notification_max_size=10)
    assert b'"12345678"' == made("12345678", small).payload
    with pytest.raises(PublishRefused, match="larger than 10 bytes"):
        made("123456789", small)
    assert 100_001 == len(
        made("x" * 99_999, attrs.evolve(SETTINGS, notification_max_size=0)).payload
    )


@pytest.mark.parametrize("name", ["", "x" * 65, "ä" * 33, "\ud800", 7, None, *RESERVED_TYPES])
def test_what_is_no_type(name: object) -> None:
    """Reserved names and what is no name are refused."""
    with pytest.raises(PublishRefused):
        made(type=name)
    assert "ä" * 32 == made(type="ä" * 32).type


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (0, 0),
        (1, 1000),
        (1.5, 1500),
        (30 * DAY, 30 * DAY * 1000),
        (dt.timedelta(minutes=2), 120_000),
    ],
)
def test_durations(value: object, expected: int | None) -> None:
    """Seconds or timedeltas become milliseconds."""
    assert expected == made(ttl=value).ttl_ms
    assert expected == made(fallback_after=value).fallback_after_ms


def test_short_durations() -> None:
    """What is not 0 does not become 0; what would be gone at once is refused."""
    assert 1 == made(fallback_after=0.0001).fallback_after_ms
    for short in (0.0001, 0.999):
        with pytest.raises(PublishRefused, match="ttl is less than 1 s, and not 0"):
            made(ttl=short)


@pytest.mark.parametrize("name", ["ttl", "fallback_after"])
@pytest.mark.parametrize(
    "value", [-1, 30 * DAY + 1, float("nan"), float("inf"), "1h", True, dt.timedelta(-1)]
)
def test_what_is_no_duration(name: Any, value: Any) -> None:
    """The refusal names the option."""
    with pytest.raises(PublishRefused, match=f"^{name} is "):
        made(**{name: value})


def test_moments() -> None:
    """A moment is aware or in seconds since 1970, and within 30 days."""
    moment = dt.datetime.fromtimestamp(NOW + 60, dt.timezone(dt.timedelta(hours=5)))
    expected = round((NOW + 60) * 1000)

    assert expected == made(deliver_at=moment).deliver_at_ms
    assert expected == made(deliver_at=NOW + 60).deliver_at_ms
    assert round((NOW - 60) * 1000) == made(deliver_at=NOW - 60).deliver_at_ms
    for wrong in (moment.replace(tzinfo=None), NOW + 31 * DAY, -1, True, "now", float("nan")):
        with pytest.raises(PublishRefused, match=r"^deliver_at "):
            made(deliver_at=wrong)


@pytest.mark.parametrize("name", ["idempotency_key", "collapse_key"])
def test_keys(name: Any) -> None:
    """Keys are any text of 1 to 128 bytes."""
    goods: list[Any] = ["a", "ä" * 64, "with space: {x}"]
    for good in goods:
        assert good == getattr(made(**{name: good}), name)
    wrongs: list[Any] = ["", "ä" * 65, "\ud800", 5, b"x"]
    for wrong in wrongs:
        with pytest.raises(PublishRefused, match=f"^{name} "):
            made(**{name: wrong})


def test_trace_context() -> None:
    """It travels along; one that is malformed is as good as none, as its specification says."""
    good = f"00-{'a' * 32}-{'b' * 16}-01"
    assert good == made(traceparent=good).traceparent
    for wrong in ("", "00", f"{good}-more", good.upper(), 7):
        assert made(traceparent=wrong).traceparent is None


def test_what_keeps_nothing_needs_no_memory() -> None:
    """Ephemeral and an option that needs a memory contradict each other."""
    assert made(ttl=0).ephemeral
    assert not made(ttl=1).ephemeral
    assert not made().ephemeral
    lasting: dict[str, Any] = {
        "idempotency_key": "k",
        "collapse_key": "k",
        "deliver_at": NOW,
        "fallback_after": 5,
    }
    for name, value in lasting.items():
        with pytest.raises(PublishRefused, match=f"^{name} means nothing with ttl 0"):
            made(ttl=0, **{name: value})


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_priority_is_true_or_false(value: Any) -> None:
    """What only looks like a yes is none."""
    assert (False, True) == (made().priority, made(priority=True).priority)
    with pytest.raises(PublishRefused, match=r"^priority is True or False"):
        made(priority=value)


def test_a_misspelt_option_is_refused() -> None:
    """It would change silently what becomes of the notification."""
    with pytest.raises(PublishRefused, match="there is no option tll"):
        made(tll=5)


def test_options_are_those_of_a_draft() -> None:
    """Each option ends in a field of the draft: none is forgotten on the way."""
    fields = {field.name.removesuffix("_ms") for field in attrs.fields(Draft)}
    assert set(Options.__annotations__) == fields - {"settings", "topics", "payload"}


@pytest.mark.parametrize("user", ["", "a\n", "ä" * 65, "\ud800", 42, None, b"ann"])
def test_what_is_no_user(user: object) -> None:
    """1 to 128 bytes of printable text."""
    with pytest.raises(PublishRefused, match="user"):
        checked_user(user)


def test_addressed() -> None:
    """A notification has an id of its recipient's partition, and the default lifetime."""
    one = made({"n": 1}, type="order", collapse_key="c")
    ann = one.addressed("ann", NOW, name_channel=False)
    everyone = one.addressed(None, NOW, name_channel=False)

    assert ("ann", b'{"n":1}', "order", "c") == (ann.user, ann.payload, ann.type, ann.collapse_key)
    assert 7 * DAY * 1000 == ann.ttl_ms
    assert ledger.partition("ann") == ledger.partition_of(ann.id)
    assert ledger.EVERYONE == ledger.partition_of(everyone.id)
    assert ann.id != one.addressed("ann", NOW, name_channel=False).id
    assert (None, None) == (ann.channel, everyone.channel)
    with pytest.raises(PublishRefused):
        one.addressed("", NOW, name_channel=False)


def test_channels() -> None:
    """They are named only where the settings are the server's own."""
    settings = attrs.evolve(SETTINGS, channel_prefix="stage:", user_channel="u:{user}")
    one = made(1, settings, ttl=5)

    assert "stage:u:a b" == one.addressed("a b", NOW, name_channel=True).channel
    assert "stage:channels:broadcast" == one.addressed(None, NOW, name_channel=True).channel
    assert 5000 == one.addressed("ann", NOW, name_channel=True).ttl_ms
    with pytest.raises(PublishRefused):
        one.channel("")


def test_raw() -> None:
    """What is ephemeral is what a plain PUBLISH would carry."""
    assert {"type": "t", "payload": [1]} == msgspec.json.decode(made([1], type="t", ttl=0).raw())
