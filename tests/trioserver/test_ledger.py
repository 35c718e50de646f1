"""Names, commands and replies of the ledger; what its scripts do is in ``test_ledger_*.py``."""

import re
import zlib
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.redis_server import RedisServer
from tests.trioserver.ledger_calls import Caller
from tests.trioserver.ledger_stage import Stage
from trioserver import ledger, messages
from trioserver.ledger import (
    PARTITIONS,
    SCRIPTS,
    Accepted,
    Change,
    Gap,
    Notice,
    Notification,
    Page,
    Rules,
)
from trioserver.settings import Settings

RULES = Rules(max_length=9, events_max_length=8, max_payload=7, idempotency_ttl_ms=6)
UUID = "01932d3c-1c00-7abc-8def-0123456789ab"

users = st.text(min_size=1).filter(lambda text: text.isprintable())


def named(command: ledger.Command) -> dict[object, object]:
    """Return the arguments of a call by name."""
    arguments = command[4:]
    assert len(arguments) % 2 == 0
    return dict(zip(arguments[::2], arguments[1::2], strict=True))


def outcome(stage: Stage, script: str, key: str, *arguments: str) -> object:
    """Return the reply to a call, or the text of the error."""
    try:
        return stage.raw(script, key, *arguments)
    except RuntimeError as refused:
        return str(refused)


# --- names


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("ann.smith_42@x-y.org", "ann.smith_42@x-y.org"),
        ("a b", "a%20b"),
        ("{p00}:x", "%7Bp00%7D%3Ax"),
        ("50%", "50%25"),
        ("ü", "%C3%BC"),
        ("~", "%7E"),
        ("a\n", "a%0A"),
    ],
)
def test_users_are_encoded_in_keys(name: str, written: str) -> None:
    """All but a few characters are written in hexadecimal, so no user can leave a key's form."""
    assert written == ledger.encoded(name)


@given(users)
def test_a_user_has_one_slot(user: str) -> None:
    """All keys of a user begin with the partition in braces, and there is no other brace."""
    home = ledger.partition(user)

    assert home in PARTITIONS
    assert home == f"p{zlib.crc32(user.encode()) % 64:02d}"
    for kind in ("meta", "inbox", "holes", "cursors"):
        key = ledger.key(kind, user)
        assert re.fullmatch(rf"ts:\{{{home}\}}:{kind}:[A-Za-z0-9_.@%-]+", key)


def test_everyone_has_keys_of_their_own() -> None:
    """What is published to everyone lies in a partition that no user has."""
    assert ledger.key("meta", None) == "ts:{all}:meta:all"
    assert "all" not in PARTITIONS
    assert len(PARTITIONS) == 64
    assert ledger.due_key("p07") == "ts:{p07}:due"
    assert ledger.events_key("all") == "ts:{all}:events"


@given(st.integers(0, 2**48 - 1), st.sampled_from([*PARTITIONS, "all"]))
def test_ids(now_ms: int, home: str) -> None:
    """An id tells its partition; behind it is a UUID of version 7 with the time in front."""
    name = ledger.new_id(home, now_ms)

    assert home == ledger.partition_of(name)
    assert name != ledger.new_id(home, now_ms)
    assert ledger.notification_key(name) == f"ts:{{{home}}}:n:{name}"
    assert int(name.removeprefix(home).replace("-", "")[:12], 16) == now_ms


@pytest.mark.parametrize(
    "text",
    [
        *("", "p07", UUID, f"p7-{UUID}", f"p64-{UUID}", f"p07-{UUID}x", f"p07-{UUID}\n"),
        *(f"p07-{UUID.upper()}", f"p07-{UUID.replace('7abc', '4abc')}", f"p07_{UUID}"),
        *(f"p07-{UUID.replace('8def', '0def')}", f"{{p07}}-{UUID}", f"al-{UUID}"),
    ],
)
def test_what_is_no_id(text: str) -> None:
    """Nothing is looked up under a name that is not exactly an id."""
    assert ledger.partition_of(text) is None
    assert ledger.notification_key(text) is None


# --- scripts


def test_the_scripts_are_part_of_the_package() -> None:
    """Where the modules are installed, the scripts are: they are no loose files."""
    folder = resources.files("trioserver") / "lua"

    files = {entry.name for entry in folder.iterdir()}
    assert {"lib.lua", *(f"{name}.lua" for name in SCRIPTS)} <= files


def test_a_script_is_the_library_and_its_file() -> None:
    """Any language can call a script: two files, a newline between them, and their SHA-1."""
    folder = Path(ledger.__file__).parent / "lua"
    for name, script in SCRIPTS.items():
        text = (folder / "lib.lua").read_bytes() + b"\n" + (folder / f"{name}.lua").read_bytes()
        assert text == script.text
        assert name == script.name


def test_scripts_are_loaded_under_their_sha(redis: RedisServer) -> None:
    """Redis knows a script after `loads` by the name that commands use; before, it says so."""
    redis.command("SCRIPT", "FLUSH")
    command = [str(argument) for argument in ledger.due("p00", rules=RULES)]
    with pytest.raises(RuntimeError) as caught:
        redis.command(*command)
    assert ledger.is_noscript(str(caught.value))

    with Caller(redis.path) as caller:
        shas = [caller.run(load) for load in ledger.loads()]

    assert [script.sha.encode() for script in SCRIPTS.values()] == shas
    assert redis.command(*command) == [0, -1]


@pytest.mark.parametrize("error", ["ERR no NOSCRIPT", "BADREQUEST x", "", "NOAUTH "])
def test_other_errors_are_not_for_want_of_a_script(error: str) -> None:
    """Only what Redis says about an unknown script means that."""
    assert not ledger.is_noscript(error)


@pytest.mark.parametrize("name", list(SCRIPTS))
@pytest.mark.parametrize(
    ("key", "arguments", "problem"),
    [
        ("meta:ann", (), "does not begin with"),
        ("ts:{p/1}:meta:ann", (), "does not begin with"),
        ("ts:{p01}:cursors:ann", (), "the key is not"),
        ("ts:{p01}:meta:a b", (), "the key is not"),
        ("ts:{p01}:due:", (), "the key is not"),
        ("ts:{p01}:meta:ann", ("nonsense", "1"), "unknown argument nonsense"),
        ("ts:{p01}:meta:ann", ("limit\r\n-ERR", "1"), "unknown argument limit"),
    ],
)
def test_what_is_no_call(
    redis: RedisServer, name: str, key: str, arguments: tuple[str, ...], problem: str
) -> None:
    """A key that is not the script's, or an argument it does not know, is an error, no guess."""
    stage = Stage(redis)
    stage.due()

    with pytest.raises(RuntimeError, match=f"^BADREQUEST .*{problem}"):
        stage.raw(name, key, *arguments)
    assert stage.names() == []
    stage.close()


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "due"])
def test_users_who_are_not_at_home(redis: RedisServer, name: str) -> None:
    """A key in the wrong partition, or of a user written otherwise, would be read by nobody."""
    stage = Stage(redis)
    stage.due()
    enough = {"publish": ("payload", "1", "id"), "cancel": ("id",)}.get(name, ("device",))
    keys = ["ts:{p00}:meta:ann", "ts:{all}:meta:ann", f"ts:{{{ledger.partition('ü')}}}:meta:%c3%bc"]
    keys.append(f"ts:{{{ledger.partition('x' * 129)}}}:meta:{'x' * 129}")
    for key in keys:
        identity = ledger.new_id(key[4:7], 1) if enough[-1] == "id" else "d"
        reply = outcome(stage, name, key, *enough, identity)
        assert reply == [b"unknown"] or str(reply).startswith(ledger.BAD_REQUEST)
    assert stage.names() == []
    stage.close()


def test_reserved_types_are_the_same_in_both_languages() -> None:
    """The script refuses exactly the types that the protocol keeps for itself."""
    found = re.search(rb"local RESERVED = ((?:[^\n]*'\n?)+)", SCRIPTS["publish"].text)
    assert found is not None

    words = re.findall(r"'([^']*)'", found[1].decode())

    assert set("".join(words).split()) == messages.RESERVED_TYPES


# --- commands


def test_the_rules_are_those_of_the_settings() -> None:
    """Limits come from the settings, durations as milliseconds."""
    settings = Settings(
        inbox_max_length=5,
        events_max_length=6,
        notification_max_size=7,
        idempotency_ttl=1.5,
        notifications_per_minute_per_user=8,
    )

    rules = Rules.of(settings)

    assert rules == Rules(
        max_length=5, events_max_length=6, max_payload=7, idempotency_ttl_ms=1500, rate=8
    )


def test_a_rate_is_said_if_there_is_one() -> None:
    """The script limits nothing by itself."""
    one = Notification(user="ann", payload=b"1", ttl_ms=5, id="i")

    assert 50 == named(ledger.publish(one, rules=Rules(rate=50)))["rate"]
    assert {"rate", "priority"}.isdisjoint(named(ledger.publish(one, rules=Rules())))


def test_a_publish_says_what_is_set() -> None:
    """What was left out is not said, so that the script's defaults hold."""
    one = Notification(user="ann", payload=b"1", ttl_ms=5, id="i")

    command = ledger.publish(one, rules=RULES)

    key = ledger.key("meta", "ann")
    assert command[:4] == ("EVALSHA", SCRIPTS["publish"].sha, 1, key)
    assert named(command) == {
        "id": "i",
        "payload": b"1",
        "type": "notification",
        "ttl": 5,
        "max": 9,
        "events": 8,
        "max_size": 7,
        "idempotency_ttl": 6,
    }


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        ("RATELIMITED 1200", 1.2),
        ("RATELIMITED 1 and more", 0.001),
        ("RATELIMITED soon", 1.0),
        ("BADREQUEST RATELIMITED 1", None),
        ("OOM", None),
    ],
)
def test_a_refusal_for_now_says_how_long(error: str, seconds: float | None) -> None:
    """The wait is in seconds; other errors have none."""
    assert seconds == ledger.wait_of(error)


def test_a_publish_with_everything() -> None:
    """Each option has its argument."""
    one = Notification(
        user=None,
        payload=b"1",
        type="t",
        ttl_ms=5,
        id="i",
        idempotency_key="k",
        collapse_key="c",
        deliver_at_ms=1,
        fallback_after_ms=2,
        traceparent="00",
        channel="x",
        priority=True,
    )

    command = ledger.publish(one, rules=RULES)

    assert command[3] == "ts:{all}:meta:all"
    assert (
        named(command).items()
        >= {
            "idempotency_key": "k",
            "collapse_key": "c",
            "deliver_at": 1,
            "fallback_after": 2,
            "traceparent": "00",
            "channel": "x",
            "priority": 1,
            "type": "t",
        }.items()
    )


def test_a_read_says_what_is_set() -> None:
    """A reader that says nothing sends limits only; else each option has its argument."""
    assert named(ledger.read("ann")) == {"limit": 64, "bytes": 262_144}
    command = ledger.read(
        None,
        device="d",
        point="p",
        channel="c",
        nonce="n",
        all_point="a",
        garbage=True,
        connect=True,
        ack=True,
        head=True,
        limit=1,
        max_bytes=2,
    )
    assert named(command) == {
        "device": "d",
        "point": "p",
        "channel": "c",
        "nonce": "n",
        "all": "a",
        "garbage": 1,
        "connect": 1,
        "ack": 1,
        "head": 1,
        "limit": 1,
        "bytes": 2,
    }
    assert hash(command) == hash(command[:])


def test_the_other_commands_say_what_is_set() -> None:
    """What was left out is not said."""
    assert named(ledger.report("ann", rules=RULES, device="")) == {"device": "", "events": 8}
    command = ledger.report(
        "ann",
        rules=RULES,
        device="d",
        sent="s",
        received="r",
        acked_seq=3,
        acked_id="i",
        all_point="a",
    )
    assert named(command) == {
        "device": "d",
        "events": 8,
        "sent": "s",
        "received": "r",
        "acked": 3,
        "acked_id": "i",
        "all": "a",
    }
    assert named(ledger.mark("ann", rules=RULES, device="d", by="b")) == {
        "device": "d",
        "by": "b",
        "events": 8,
    }
    command = ledger.mark(
        "ann", rules=RULES, device="d", by="b", ids=["i", "j"], up_to=3, up_to_id="k"
    )
    assert named(command).items() >= {"ids": "i j", "up_to": 3, "up_to_id": "k"}.items()
    assert named(ledger.cancel(None, "i", rules=RULES)) == {"id": "i", "events": 8}
    due = ledger.due("p07", rules=RULES, limit=3)
    assert due[3] == "ts:{p07}:due"
    assert named(due) == {"limit": 3, "events": 8, "max": 9}


# --- replies


def test_what_came_of_a_publish() -> None:
    """The answer has a position that a client could bring along."""
    user, everyone = f"p07-{UUID}".encode(), f"all-{UUID}".encode()

    assert ledger.accepted([user, b"e.1-4096", 1, b"accepted"]) == Accepted(
        f"p07-{UUID}", "1.e.1-4096", 1, "accepted"
    )
    assert ledger.accepted([everyone, b"e.1-4096", 1, b"duplicate"]) == Accepted(
        f"all-{UUID}", "1.0.0-0.e.1-4096", 1, "duplicate"
    )
    assert ledger.accepted([user, b"", 0, b"scheduled"]) == Accepted(
        f"p07-{UUID}", "", 0, "scheduled"
    )


def test_a_page() -> None:
    """Notifications, updates and gaps come in the order in which they were sent."""
    opening = [b"e", b"1-0", b"2-8192", 3, 1, b"trimmed", b"b.1-4096"]
    items = [
        [b"g", 1, 5, 4, b"trimmed"],
        [b"n", b"2-8192", b"i", b"t", b"{}", 99, 2, b"sent", b""],
        [b"n", b"2-8192", b"i", b"t", b"{}", 99, 2, b"sent", b"00-1"],
        [b"u", b"3-8193", b"read", b"i j"],
    ]

    page = ledger.page([*opening, *items])

    notice = Notice("2-8192", "i", "t", b"{}", 99, 2, "sent", None)
    assert page == Page(
        *("e", "1-0", "2-8192", 3, True, "trimmed", "b.1-4096"),
        [
            Gap(1, 5, 4, "trimmed"),
            notice,
            Notice("2-8192", "i", "t", b"{}", 99, 2, "sent", "00-1"),
            Change("3-8193", "read", ["i", "j"]),
        ],
    )
    assert notice.seq == 2


def test_an_empty_page() -> None:
    """Usually nothing was missed."""
    page = ledger.page([b"e", b"1-0", b"1-0", 0, 0, b"", b""])

    assert page == Page("e", "1-0", "1-0", 0, False, "", "", [])


def test_small_replies() -> None:
    """The others answer with numbers or a word."""
    assert ledger.acked([7]) == 7
    assert ledger.marked([3, 2]) == (3, 2)
    assert ledger.cancelled([b"too late"]) == "too late"
    assert ledger.settled([2, -1]) == (2, -1)
