"""The page about publishing is true: its examples run, its tables are complete."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.redis_server import RedisServer
from trioserver import ledger
from trioserver.ledger import Topic
from trioserver.publisher import Options, Publisher

ROOT: Final = Path(__file__).parent.parent
PAGE: Final = (ROOT / "docs/publishing.md").read_text(encoding="utf-8")
SCRIPT: Final = ledger.SCRIPTS["publish"]
USERS: Final = ["42", "ann@example.com", "Jörg Müller", "a:b{c}%*/\\'\"$x", "ünï", "~"]
"""Users whose ids are written differently in keys."""

SECONDS: Final = 30.0


def examples(language: str) -> list[str]:
    """Return the page's examples that are to be run, in one language."""
    return re.findall(rf"<!-- run: {language} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the script, as the page says to get it."""
    command = [sys.executable, "-m", "trioserver", "script", "publish"]
    with (tmp_path / "publish.lua").open("wb") as script:
        subprocess.run(command, stdout=script, check=True, timeout=SECONDS)
    return tmp_path


def run(command: list[str], folder: Path, redis: RedisServer) -> subprocess.CompletedProcess[str]:
    """Run an example."""
    environ = {**os.environ, "REDIS_URL": redis.url}
    return subprocess.run(
        command,
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def assert_published(redis: RedisServer, user: str, name: str, point: str, payload: bytes) -> None:
    """Check that a user got a notification, as the answer says, and where Python would put it."""
    with Publisher(redis.url) as publisher:
        life, standing = publisher.notification(name), publisher.why(user)
    assert life is not None
    assert (user, "order.shipped", "accepted") == (life.user, life.type, life.state)
    assert f"1.{point}" == standing.position
    entries = redis.command("XRANGE", ledger.key("inbox", user), "-", "+")
    assert isinstance(entries, list)
    assert payload == entries[-1][1][5]


@pytest.mark.parametrize("number", range(5))
def test_python(redis: RedisServer, tmp_path: Path, number: int) -> None:
    """Each example publishes: to user 42, the last two to topics."""
    ran = run([sys.executable, "-W", "error", "-c", examples("python")[number]], tmp_path, redis)

    assert (0, "") == (ran.returncode, ran.stderr)
    with Publisher(redis.url) as publisher:
        assert publisher.why("42").known == (number < 3)
    rooms = [redis.command("EXISTS", ledger.key("inbox", Topic(f"room.{n}"))) for n in (7, 8)]
    assert [int(number >= 3), int(number == 3)] == rooms
    assert 5 == len(examples("python"))


@pytest.mark.skipif(
    not all(map(shutil.which, ("redis-cli", "gzip", "od"))), reason="needs redis-cli, gzip and od"
)
@pytest.mark.parametrize("user", USERS)
def test_shell(redis: RedisServer, folder: Path, user: str) -> None:
    """The example publishes to whomever; options are passed on."""
    [example] = examples("sh")
    (folder / "publish.sh").write_text(example)
    payload = '{"order": "1017 ä"}'
    command = ["sh", "publish.sh", user, payload, "type", "order.shipped", "ttl", "3600000"]
    ran = run(command, folder, redis)

    assert (0, "") == (ran.returncode, ran.stderr)
    name, point, seq, outcome = ran.stdout.splitlines()
    assert ("1", "accepted") == (seq, outcome)
    assert_published(redis, user, name, point, payload.encode())

    refused = run([*command, "nonsense", "1"], folder, redis)
    assert 0 != refused.returncode
    assert "BADREQUEST unknown argument nonsense" in refused.stdout + refused.stderr


# A client of Redis in twenty lines, for there is no package to install: commands in, replies out.
HARNESS: Final = """
import { connect } from "node:net";
import { publish } from "./publish.mjs";

const socket = connect(process.argv[2]);
let buffered = "";
const waiting = [];
socket.setEncoding("utf8");
socket.on("data", (text) => {
  buffered += text;
  for (let reply; waiting.length && (reply = parse()); ) {
    buffered = buffered.slice(reply.length);
    const [resolve, reject] = waiting.shift();
    reply.error ? reject(new Error(reply.error)) : resolve(reply.value);
  }
});

function parse(at = 0) {
  const end = buffered.indexOf("\\r\\n", at);
  if (end < 0) return null;
  const line = buffered.slice(at + 1, end);
  let next = end + 2;
  switch (buffered[at]) {
    case "-": return { error: line, length: next };
    case ":": return { value: Number(line), length: next };
    case "$": return { value: buffered.slice(next, next + +line), length: next + +line + 2 };
    case "*": {
      const value = [];
      for (let n = +line; n > 0; n--) {
        const item = parse(next);
        if (!item) return null;
        value.push(item.value);
        next = item.length;
      }
      return { value, length: next };
    }
    default: return { value: line, length: next };
  }
}

const call = (...args) => new Promise((resolve, reject) => {
  waiting.push([resolve, reject]);
  const parts = args.map((arg) => `$${Buffer.byteLength(arg)}\\r\\n${arg}\\r\\n`);
  socket.write(`*${args.length}\\r\\n${parts.join("")}`);
});

const options = JSON.parse(process.argv[5]);
try {
  const payload = JSON.parse(process.argv[4]);
  console.log(JSON.stringify(await publish(call, process.argv[3], payload, options)));
} catch (error) {
  console.log(JSON.stringify({ error: error.message }));
}
socket.end();
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.parametrize("user", USERS)
def test_javascript(redis: RedisServer, folder: Path, user: str) -> None:
    """The example publishes to whomever, loads the script itself, and knows what not to repeat."""
    [example] = examples("javascript")
    (folder / "publish.mjs").write_text(example)
    (folder / "harness.mjs").write_text(HARNESS)

    def publish(payload: str, **options: object) -> dict[str, Any]:
        arguments = [str(redis.path), user, payload, json.dumps(options)]
        ran = run(["node", "harness.mjs", *arguments], folder, redis)
        assert (0, "") == (ran.returncode, ran.stderr)
        return dict(json.loads(ran.stdout))

    accepted = publish('{"order":"1017 ä"}', type="order.shipped", idempotency_key="k")
    position = accepted["position"]
    assert (1, "accepted") == (accepted["seq"], accepted["outcome"])
    payload = '{"order":"1017 ä"}'.encode()
    assert_published(redis, user, accepted["id"], position.removeprefix("1."), payload)

    again = publish('{"order":"1017 ä"}', type="order.shipped", idempotency_key="k")
    assert accepted | {"outcome": "duplicate"} == again
    assert publish("2", idempotency_key="k")["error"].startswith("IDEMPOTENCY ")


def test_every_option_is_on_the_page() -> None:
    """The table has what Python takes and what the script takes, and nothing else."""
    table = PAGE.partition("<!-- options -->")[2].partition("## Answers")[0]
    rows = [row.split(" | ") for row in table.strip().splitlines()[2:]]
    python = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    script = {name for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    text = SCRIPT.text.decode()
    known = re.search(r"known = \{(.*?)\}", text.partition("-- publish:")[2], re.DOTALL)

    assert set(Options.__annotations__) == python
    assert known is not None
    assert {*re.findall(r"(\w+) = 1", known[1]), "sender"} == script
    assert "known.sender = 1" in text


def test_every_outcome_and_error_is_on_the_page() -> None:
    """What the script may answer is explained."""
    for word in ("accepted", "scheduled", "duplicate", "BADREQUEST", "IDEMPOTENCY"):
        assert word in SCRIPT.text.decode()
        assert f"`{word}" in PAGE


def test_links_lead_somewhere() -> None:
    """Sections and pages that the page refers to exist."""
    headings = re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        page, _, anchor = target.partition("#")
        assert not page or (ROOT / "docs" / page).exists(), target
        assert page or anchor in anchors, target
