"""The command ``revoke``: tokens that are good no more."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import click
import msgspec

from trioserver.cli_options import (
    date_and_time,
    load_settings,
    where_is_redis,
    with_settings,
    written_as,
)
from trioserver.errors import CommandError, RedisRefused, RedisUnavailable
from trioserver.messages import rfc3339
from trioserver.setting_kinds import DURATION, Kind
from trioserver.settings import Settings

if TYPE_CHECKING:
    from trioserver.auth import Claims
    from trioserver.redis_direct import BlockingLink, Reply
    from trioserver.revocation import Ago, Command, Revocation

TIMEOUT_SECONDS: Final = 5.0

PAGE: Final = 1000


@attrs.frozen
class _Distance:
    """A moment so many seconds from now, by a clock that is not this machine's."""

    seconds: float


def _moment(text: str) -> "_Distance | float":
    """Return a distance from now, or what a date and time with a time zone is since 1970."""
    if text == "now":
        return _Distance(0.0)
    if "-" in text or ":" in text:
        return date_and_time(text, "10m")
    try:
        return _Distance(DURATION.parse(text))
    except ValueError as problem:
        if "from" in str(problem):  # a duration, but too long
            raise
        return date_and_time(text, "10m")


def _end(text: str) -> float:
    moment = _moment(text)
    return time.time() + moment.seconds if isinstance(moment, _Distance) else moment


_before: Final = written_as(Kind(parse=_moment))
_until: Final = written_as(Kind(parse=_end))


@click.command()
@with_settings("ws_port", "data_dir", "redis_url")
@click.option("--jti", metavar="J", help="The token with this jti.")
@click.option("--user", metavar="U", help="All tokens of this user (sub) issued so far.")
@click.option("--all", "everyone", is_flag=True, help="All tokens issued --before a moment.")
@click.option(
    "--before",
    callback=_before,
    metavar="MOMENT",
    help="Only what was issued up to then: now (for --user the default) or 10m (ago), by the clock "
    "of Redis plus 2 s; or 2026-11-20T18:00:00Z, as iat says.",
)
@click.option(
    "--until",
    callback=_until,
    metavar="MOMENT",
    help="When these tokens have expired anyway: 12h (from now), 2026-12-20T18:00:00Z. "
    "Default: in 30 days.",
)
@click.option("--list", "listing", is_flag=True, help="Print the revocations that there are.")
@click.option("--script", is_flag=True, help="Print the Lua script, for other languages.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON objects.")
def revoke(  # noqa: PLR0913 - its options
    config_file: Path | None,
    jti: str | None,
    user: str | None,
    *,
    before: _Distance | float | None,
    until: float | None,
    everyone: bool,
    listing: bool,
    script: bool,
    as_json: bool,
    **flags: str | None,
) -> None:
    """Make tokens good no more; who is connected with one is gone within 2 seconds.

    A token is named by its jti, or by its user or not at all and by when it was issued (iat). What
    was issued in the very second of --before is revoked, too, and so is what has no iat. The user
    can come back with a token issued later.

    Whoever issues tokens may have a clock that is a little ahead, so now means two seconds from
    now. If your issuer's may be further ahead, or if you issue a new token at once, say --before
    with a date by the issuer's clock.

    A revocation lapses at --until: say it if tokens live longer than 30 days, or if yours have no
    iat. It cannot be taken back; two of the same kind are joined: the later moments count.

    \b
      trioserver revoke --jti 7f3c2a --until 12h
      trioserver revoke --user 42
      trioserver revoke --user 42 --before "$(date -u +%FT%TZ)"
      trioserver revoke --all --before 2026-11-20T18:00:00Z
      trioserver revoke --list
    """  # noqa: D301 - to click this means: leave the next lines as they are
    from trioserver import revocation  # noqa: PLC0415

    asked = [jti is not None, user is not None, everyone, listing, script]
    if sum(asked) != 1:
        raise click.UsageError("say one of --jti J, --user U, --all, --list and --script")
    if (listing or script) and (before is not None or until is not None):
        raise click.UsageError("--before and --until go with --jti, --user or --all")
    if jti is not None and before is not None:
        raise click.UsageError("--before does not go with --jti: say --until")
    if everyone and before is None:
        raise click.UsageError(
            "say --before MOMENT with --all; now means everybody has to come back"
        )
    if script:
        click.echo(revocation.SCRIPT, nl=False)
        return
    settings = load_settings(flags, config_file).settings
    if listing:
        _list(settings, as_json=as_json)
        return
    try:
        command = revocation.revoke(
            token=jti,
            user=user,
            everyone=everyone,
            before=None if jti is not None else _issued(before),
            until=until,
            prefix=settings.channel_prefix,
        )
    except revocation.RevocationRefused as refusal:
        raise CommandError(f"this cannot be revoked: {refusal}") from None
    _revoke(settings, command, as_json=as_json)


def _issued(before: _Distance | float | None) -> "float | Ago":
    from trioserver.revocation import Ago  # noqa: PLC0415

    if isinstance(before, float):
        return before
    return Ago(before.seconds if before else 0.0)


def _link(settings: Settings) -> "BlockingLink":
    from trioserver.redis_direct import BlockingLink  # noqa: PLC0415

    return BlockingLink(where_is_redis(settings), client_name="trioserver-revoke")


def _revoke(settings: Settings, command: "Command", *, as_json: bool) -> None:
    from trioserver.revocation import Outcome, refusal  # noqa: PLC0415

    with _link(settings) as link:
        try:
            reply = _ask(link, command)
        except RedisUnavailable as problem:
            raise CommandError(f"{problem}; whether it is revoked is unknown, try again") from None
        except RedisRefused as refused:
            reason = refusal(str(refused)) or refused
            raise CommandError(f"this cannot be revoked: {reason}") from None
    outcome = Outcome.of(reply)
    if as_json:
        fields = _fields(outcome.revocation)
        click.echo(msgspec.json.encode({**fields, "new": outcome.new, "count": outcome.entries}))
    else:
        done = "revoked" if outcome.new else "revoked already"
        click.echo(f"{done}: {_line(outcome.revocation)}")


def is_revoked(settings: Settings, claims: "Claims") -> bool:
    """Ask Redis whether a token is revoked.

    Raises:
        CommandError: There is no Redis to be asked.
        RedisError: It did not answer, or refused.
    """
    from trioserver import revocation  # noqa: PLC0415

    names = [b"all", b"u:" + claims.user.encode()]
    if claims.jti:
        names.append(b"t:" + claims.jti.encode())
    with _link(settings) as link:
        found = _ask(link, revocation.entries_of(names))
    revoked = revocation.Revoked()
    revoked.learn(revocation.revocations_in(names, found))
    return revoked.covers(claims)


def _list(settings: Settings, *, as_json: bool) -> None:
    with _link(settings) as link:
        for one in _revocations(link):
            click.echo(msgspec.json.encode(_fields(one)) if as_json else _line(one))


def _revocations(link: "BlockingLink") -> "Iterator[Revocation]":
    """Return what there is, oldest first, page by page."""
    from trioserver import revocation  # noqa: PLC0415

    after = 0
    newest = revocation.seq_in(_ask(link, ("GET", revocation.SEQ_KEY)))
    while after < newest:
        names, last = revocation.names_in(_ask(link, revocation.page_after(after, newest, PAGE)))
        if not names:
            return
        found = _ask(link, revocation.entries_of(names))
        now = time.time()
        yield from (one for one in revocation.revocations_in(names, found) if one.until > now)
        if last <= after:
            return
        after = last


def _ask(link: "BlockingLink", command: "Command") -> "Reply":
    (reply,) = link.pipeline([command], timeout=TIMEOUT_SECONDS)
    if isinstance(reply, RedisRefused):
        raise reply
    return reply


def _line(one: "Revocation") -> str:
    until = rfc3339(one.until * 1000)
    if one.token is not None:
        return f"the token {one.token}; lapses {until}"
    whose = "everybody" if one.user is None else f"user {one.user}"
    return f"all tokens of {whose} issued up to {rfc3339(one.before * 1000)}; lapses {until}"


def _fields(one: "Revocation") -> dict[str, object]:
    whom: dict[str, object] = {"all": True}
    if one.token is not None:
        return {"jti": one.token, "until": rfc3339(one.until * 1000)}
    if one.user is not None:
        whom = {"user": one.user}
    return {**whom, "before": rfc3339(one.before * 1000), "until": rfc3339(one.until * 1000)}


COMMANDS: Final = (revoke,)
