"""The commands of a back end at the terminal: publish, cancel, why, trace, script.

Each opens a `Publisher` for one call. That and what comes with it is imported when it is needed:
``trioserver --help`` should not pay for a Redis client.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import click
import msgspec

from trioserver.cli_options import (
    date_and_time,
    load_settings,
    note,
    where_is_redis,
    with_settings,
    written_as,
)
from trioserver.errors import CommandError
from trioserver.ledger import SCRIPTS, Accepted
from trioserver.life_words import standing_text, trace_text
from trioserver.messages import rfc3339
from trioserver.setting_kinds import DURATION, Kind, duration

if TYPE_CHECKING:
    from trioserver.publisher import Options, Publisher, RateLimited, Result

EXIT_FAILURE: Final = 1

_shown_settings = with_settings("ws_port", "data_dir", "redis_url")


def _moment(text: str) -> float:
    """Return seconds since 1970 for ``+5m`` or a date and time with a time zone."""
    if text.startswith("+"):
        return time.time() + DURATION.parse(text[1:])
    return date_and_time(text, "+5m")


_duration: Final = written_as(duration(low=0.001))
_deliver_at: Final = written_as(Kind(parse=_moment))


def _publisher(
    flags: dict[str, str | None], config_file: Path | None, *, publishing: bool = False
) -> "Publisher":
    from trioserver.publisher import Publisher  # noqa: PLC0415

    settings = load_settings(flags, config_file).settings
    if not publishing:
        # To look at something, or to withdraw it, nobody needs to read schemas.
        settings = attrs.evolve(settings, payload_schemas=None)
    return Publisher(where_is_redis(settings), settings=settings)


@click.command()
@_shown_settings
@click.option("--user", "users", multiple=True, metavar="U", help="To this user; may be repeated.")
@click.option("--all", "everyone", is_flag=True, help="To every user, those who are away too.")
@click.option("--topic", "topics", multiple=True, metavar="T", help="To this topic; as --user.")
@click.option("--type", "kind", default="notification", show_default=True, metavar="TYPE")
@click.option(
    "--ttl",
    callback=_duration,
    metavar="TIME",
    help="Keep it so long: 90s, 1h, 7d (the default; of topics 1h, or what the server says).",
)
@click.option("--ephemeral", is_flag=True, help="For who is connected now; nothing is kept.")
@click.option("--idempotency-key", metavar="KEY", help="Publish once, however often this runs.")
@click.option(
    "--collapse-key", metavar="KEY", help="Replace the one before with this key, if nobody has it."
)
@click.option(
    "--deliver-at",
    callback=_deliver_at,
    metavar="MOMENT",
    help="Later: +5m or 2026-11-20T18:00:00Z.",
)
@click.option(
    "--fallback-after",
    callback=_duration,
    metavar="TIME",
    help='Write an event "undelivered" if no device has it by then.',
)
@click.option(
    "--priority", is_flag=True, help="Also if the user has got as many as may be in a minute."
)
@click.option("--key", metavar="KEY", help="What it is about; for topics that are live only.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object per recipient.")
@click.argument("payload", metavar="PAYLOAD_JSON")
def publish(  # noqa: PLR0913 - its options
    config_file: Path | None,
    users: tuple[str, ...],
    topics: tuple[str, ...],
    payload: str,
    *,
    kind: str,
    ttl: float | None,
    idempotency_key: str | None,
    collapse_key: str | None,
    deliver_at: float | None,
    fallback_after: float | None,
    key: str | None,
    everyone: bool,
    ephemeral: bool,
    priority: bool,
    as_json: bool,
    **flags: str | None,
) -> None:
    """Publish a notification.

    Every device of the user gets it: now if it is connected, else when it comes back. Of a topic
    those get it who are subscribed; if it is durable, also those who come later. That is what
    DURABLE_TOPICS says or, if this command has none, what the server has said in Redis.

    The answer comes when Redis has it. PAYLOAD_JSON is any JSON value; - reads it from standard
    input.

    \b
      trioserver publish --user 42 '{"order": 1017}' --type order.shipped
      trioserver publish --all '"Back in ten minutes"' --ephemeral
      trioserver publish --user 42 --user 43 '"Good morning"' --deliver-at +8h --ttl 1h
      trioserver publish --topic room.7 '"Dinner is ready"'
    """  # noqa: D301 - to click this means: leave the next lines as they are
    if bool(users) + bool(topics) + everyone != 1:
        raise click.UsageError("say either --user U or --topic T or --all")
    if ephemeral and ttl is not None:
        raise click.UsageError("say either --ttl or --ephemeral")
    options: Options = {
        "type": kind,
        "ttl": 0 if ephemeral else ttl,
        "idempotency_key": idempotency_key,
        "collapse_key": collapse_key,
        "deliver_at": deliver_at,
        "fallback_after": fallback_after,
        "priority": priority,
        "key": key,
    }
    # A surrogate stands for bytes that are no text; they are refused as such.
    data = payload.encode(errors="surrogateescape") if payload != "-" else sys.stdin.buffer.read()
    with _publisher(flags, config_file, publishing=True) as publisher:
        _publish(publisher, data, _Whom(users, topics), options, as_json=as_json)


@attrs.frozen
class _Whom:
    """The recipients: users, or topics; none of either is everyone."""

    users: tuple[str, ...]
    topics: tuple[str, ...]

    @property
    def each(self) -> list[dict[str, object]]:
        """Each of them, as JSON has it."""
        if not self.users and not self.topics:
            return [{"all": True}]
        users: list[dict[str, object]] = [{"user": name} for name in self.users]
        return users or [{"topic": name} for name in self.topics]

    def publish(
        self, publisher: "Publisher", payload: bytes, options: "Options"
    ) -> "Sequence[Result]":
        """Publish to each."""
        match (self.users, self.topics):
            case ([user], _):
                return [publisher.publish(payload, user=user, **options)]
            case (_, [topic]):
                return [publisher.publish(payload, topic=topic, **options)]
            case ([], []):
                return [publisher.publish(payload, everyone=True, **options)]
            case ([], topics):
                return publisher.publish(payload, topics=topics, **options)
            case (users, _):
                return publisher.publish(payload, users=users, **options)


def _publish(
    publisher: "Publisher",
    data: bytes,
    whom: _Whom,
    options: "Options",
    *,
    as_json: bool,
) -> None:
    """Publish and print; exits with a failure if somebody was refused."""
    from trioserver.publisher import (  # noqa: PLC0415
        PublishInterrupted,
        PublishRefused,
        RateLimited,
    )

    interrupted: PublishInterrupted | None = None
    results: Sequence[Result]
    is_kept = options.get("ttl") != 0
    if whom.topics and is_kept and publisher.topic_rules() is None:
        note(
            "warning: no server has said which topics are durable, and DURABLE_TOPICS is not set:"
            " this is only for who is subscribed now"
        )
    try:
        results = whom.publish(publisher, data, options)
    except RateLimited as limited:
        raise CommandError(f"not published: {_limit_text(limited)}") from None
    except PublishRefused as refusal:
        raise CommandError(f"this cannot be published: {refusal}") from None
    except PublishInterrupted as problem:
        interrupted, results = problem, problem.results
    for one, result in zip(whom.each, results, strict=True):
        if as_json:
            click.echo(msgspec.json.encode({**one, **_fields(result)}))
        else:
            [(what, name)] = one.items()
            head = f"{what} {name}: " if len(results) > 1 else ""
            text = f"{head}{_line(result, options.get('deliver_at'))}"
            click.echo(text, err=not isinstance(result, Accepted))
    if interrupted is not None:
        raise interrupted
    if not all(isinstance(result, Accepted) for result in results):
        sys.exit(EXIT_FAILURE)


def _line(result: "Result", due: object) -> str:
    from trioserver.publisher import Ephemeral, RateLimited  # noqa: PLC0415

    if isinstance(result, RateLimited):
        return f"not published: {_limit_text(result)}"
    if isinstance(result, Exception):
        return f"not published: {result}"
    if isinstance(result, Ephemeral):
        if not result.receivers:
            return "published; nobody is connected to receive it"
        return f"published; {result.receivers} worker{'s' * (result.receivers > 1)} listening"
    if not result.position:
        when = f", due {rfc3339(round(due * 1000))}" if isinstance(due, float) else ""
        return f"{result.outcome}: {result.id}{when}"
    return f"{result.outcome}: {result.id}, seq {result.seq}, position {result.position}"


def _limit_text(limited: "RateLimited") -> str:
    return f"{limited}; wait so long, or say --priority"


def _fields(result: "Result") -> dict[str, object]:
    from trioserver.publisher import RateLimited  # noqa: PLC0415

    if isinstance(result, RateLimited):
        return {"outcome": "limited", "error": str(result), "retry_after": result.retry_after}
    if isinstance(result, Exception):
        return {"outcome": "refused", "error": str(result)}
    return msgspec.structs.asdict(result)


@click.command()
@_shown_settings
@click.argument("notification", metavar="ID")
def cancel(config_file: Path | None, notification: str, **flags: str | None) -> None:
    """Withdraw a notification: who has not got it never will, who shows it is told.

    ID is what publish printed. Exits 1 if it is too late (it has been read or has expired) or if
    there is none.
    """
    with _publisher(flags, config_file) as publisher:
        outcome = publisher.cancel(notification)
    click.echo(outcome)
    sys.exit(0 if outcome == "cancelled" else EXIT_FAILURE)


@click.command()
@_shown_settings
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@click.argument("user", metavar="USER")
def why(config_file: Path | None, user: str, *, as_json: bool, **flags: str | None) -> None:
    """Say how a user stands: devices, how far each is, what is outstanding.

    For "why did they not get it?". The numbers of a device are seqs: everything up to there was
    sent to it, has arrived there, was acknowledged by it. trioserver trace ID tells more about one
    notification.
    """
    with _publisher(flags, config_file) as publisher:
        standing = publisher.why(user)
    if as_json:
        click.echo(msgspec.json.encode(attrs.asdict(standing)))
    elif standing.known:
        click.echo(standing_text(standing))
    if not standing.known:
        raise CommandError(
            f"nothing is known of user {user}: in the last 45 days nothing was published, and "
            "no device came"
        )


@click.command()
@_shown_settings
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@click.argument("notification", metavar="ID")
def trace(
    config_file: Path | None, notification: str, *, as_json: bool, **flags: str | None
) -> None:
    """Tell the life of a notification: when it was sent, received, acked, read, or why not.

    ID is what publish printed. What is known of a notification is kept until a day after it has
    expired; of one to a topic, five minutes.
    """
    with _publisher(flags, config_file) as publisher:
        found = publisher.notification(notification)
    if found is None:
        raise CommandError(
            f"nothing is known of {notification}: it was not accepted, or has expired more than "
            f"{_forgotten_after(notification)} ago"
        )
    click.echo(msgspec.json.encode(attrs.asdict(found)) if as_json else trace_text(found))


def _forgotten_after(notification: str) -> str:
    """Return how long something is known of a notification after its end."""
    return "five minutes" if notification.startswith("t") else "a day"


@click.command()
@click.option("--sha", is_flag=True, help="Print the SHA1 by which EVALSHA knows it.")
@click.argument("name", metavar="NAME", type=click.Choice(sorted(SCRIPTS)))
def script(name: str, *, sha: bool) -> None:
    """Print a Lua script of the ledger, to publish from any language that can call Redis.

    NAME is publish, cancel or one of the others. docs/publishing.md says how to call it.

    \b
      redis-cli -x SCRIPT LOAD < <(trioserver script publish)
    """  # noqa: D301 - as above
    if sha:
        click.echo(SCRIPTS[name].sha)
    else:
        click.echo(SCRIPTS[name].text, nl=False)  # one byte more, and the SHA1 is another


COMMANDS: Final = (publish, cancel, why, trace, script)
