"""The command ``presence``: who is there, in the whole fleet."""

from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import click
import msgspec

from trioserver.cli_options import load_settings, note, where_is_redis, with_settings
from trioserver.errors import CommandError, RedisRefused, RedisUnavailable
from trioserver.messages import Attendee, Presence, rfc3339
from trioserver.settings import Settings
from trioserver.statedir import StateDir

if TYPE_CHECKING:
    from trioserver.fleet import Connected, Whereabouts
    from trioserver.redis_link import RedisLink

T = TypeVar("T")

STATUS_SECONDS: Final = 2.0


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """All servers on one Redis."""

    servers: int
    workers: int
    unique_users: int
    """Different users who are connected, about."""
    connections_here: int | None
    """On this machine's server; None if none is running."""
    lives: list[str]
    """The workers, by the names of their lives: ``<server>.<boot>.<number>``."""


@click.command()
@with_settings("ws_port", "data_dir", "redis_url")
@click.option("--user", metavar="U", help="Where this user is connected.")
@click.option("--topic", metavar="T", help="Who is subscribed to this topic.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; of a long list one object each.")
def presence(
    config_file: Path | None,
    user: str | None,
    topic: str | None,
    *,
    as_json: bool,
    **flags: str | None,
) -> None:
    """Say who is connected, on all servers: the fleet, a user, or a topic.

    What a worker has left behind that was killed does not count: the answer is right within ten
    seconds after that, and usually at once. Of topics that are not among the server's
    PRESENCE_TOPICS nothing is known.

    \b
      trioserver presence
      trioserver presence --user 42
      trioserver presence --topic room:7
    """  # noqa: D301 - to click this means: leave the next lines as they are
    if user is not None and topic is not None:
        raise click.UsageError("say either --user U or --topic T")
    settings = load_settings(flags, config_file).settings
    if user is not None:
        _show_user(user, _asked(settings, lambda link: _whereabouts(link, user)), as_json=as_json)
    elif topic is not None:
        _show_topic(settings, topic, as_json=as_json)
    else:
        _show_fleet(_asked(settings, lambda link: _fleet(link, settings)), as_json=as_json)


def _asked(settings: Settings, question: "Callable[[RedisLink], Awaitable[T]]") -> T:
    """Return what a question to Redis is answered with."""
    import trio  # noqa: PLC0415

    from trioserver.redis_link import open_link  # noqa: PLC0415

    where = where_is_redis(settings)

    async def asked() -> T:
        async with open_link(where, client_name="trioserver-presence", lanes=1) as link:
            return await question(link)

    try:
        return trio.run(asked)
    except (RedisUnavailable, RedisRefused) as problem:
        raise CommandError(str(problem)) from None


async def _whereabouts(link: "RedisLink", user: str) -> "Whereabouts":
    from trioserver.registry import connections  # noqa: PLC0415

    return await connections(link, user)


def _show_user(user: str, where: "Whereabouts", *, as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.encode({"user": user, **msgspec.structs.asdict(where)}))
        return
    more = " or more" if where.more else ""
    click.echo(f"user {user}: {_number(len(where.connections), 'connection')}{more}")
    for one in where.connections:
        click.echo(f"  {_connection_line(one)}")


def _connection_line(one: "Connected") -> str:
    about = [one.device and f"device {one.device}", one.client_type, one.ip, one.agent]
    since = rfc3339(one.since * 1000)
    return ", ".join([f"{one.connection_id} since {since}", *filter(None, about)])


def _show_topic(settings: Settings, topic: str, *, as_json: bool) -> None:
    from trioserver.topics import is_name  # noqa: PLC0415

    if not is_name(topic):
        raise CommandError(f"{topic!r} is no name of a topic")

    async def pages(link: "RedisLink") -> None:
        from trioserver.presence_page import members  # noqa: PLC0415

        page = await members(link, topic)
        if not page.connections:
            _doubt(settings, topic)
        _show_page(page, first=True, as_json=as_json)
        while page.next is not None:
            page = await members(link, topic, page.next)
            _show_page(page, first=False, as_json=as_json)

    _asked(settings, pages)


def _doubt(settings: Settings, topic: str) -> None:
    """Say what it may also mean that nobody is subscribed.

    Raises:
        CommandError: It means nothing at all.
    """
    from trioserver.topics import Patterns  # noqa: PLC0415

    if not Patterns.of(settings.presence_topics).matches(topic):
        raise CommandError(
            f"nobody keeps who is subscribed to {topic}: PRESENCE_TOPICS does not name it"
        )
    note("nobody, or it is not among the PRESENCE_TOPICS of the server")


def _show_page(page: Presence, *, first: bool, as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.encode(page))
        return
    if first:
        counts = f"{_number(page.connections, 'connection')} of {_number(page.users, 'user')}"
        click.echo(f"topic {page.topic}: {counts}")
    for one in page.members:
        click.echo(f"  {_attendee_line(one)}")


def _attendee_line(one: Attendee) -> str:
    about = [one.device and f"device {one.device}", one.client_type]
    return ", ".join([f"{one.user} since {one.since}", *filter(None, about)])


async def _fleet(link: "RedisLink", settings: Settings) -> Fleet:
    from trioserver import presence  # noqa: PLC0415
    from trioserver.presence_page import ask  # noqa: PLC0415
    from trioserver.registry import unique_users  # noqa: PLC0415

    living = sorted(presence.lives(*await ask(link, presence.lives_read())).living)
    return Fleet(
        servers=len(_by_server(living)),
        workers=len(living),
        unique_users=await unique_users(link) or 0,
        connections_here=_connections_here(settings),
        lives=living,
    )


def _connections_here(settings: Settings) -> int | None:
    from trioserver.control_client import ask  # noqa: PLC0415
    from trioserver.status import StatusReply  # noqa: PLC0415

    try:
        reply = ask(StateDir(settings.data_dir).control_socket, "status", STATUS_SECONDS)
    except CommandError:
        return None
    if not isinstance(reply, StatusReply):
        return None
    return sum(worker.connections for worker in reply.workers)


def _show_fleet(fleet: Fleet, *, as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.encode(fleet))
        return
    servers = f"{_number(fleet.workers, 'worker')} on {_number(fleet.servers, 'server')}"
    click.echo(f"{servers}, about {_number(fleet.unique_users, 'user')} connected")
    for server, workers in sorted(_by_server(fleet.lives).items()):
        click.echo(f"  server {server}: {_number(workers, 'worker')}")
    if fleet.connections_here is not None:
        click.echo(f"the server of this machine: {_number(fleet.connections_here, 'connection')}")


def _by_server(lives: list[str]) -> Counter[str]:
    return Counter(life.partition(".")[0] for life in lives)


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


COMMANDS: Final = (presence,)
