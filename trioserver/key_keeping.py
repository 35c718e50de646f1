"""Keeping the keys of an issuer (``JWT_JWKS_URL``): a task of each worker, and what it logs.

The `Keyring` says when to ask, `jwks_fetch` asks, the `auth.Verifier` looks into the keyring and
never waits. The first fetch is at once; then every few minutes, at other times in each worker; and
as soon as it is allowed when a token names a key that is not known.
"""

import random
import ssl
from typing import Final, NoReturn

from structlog.typing import FilteringBoundLogger

from trioserver.jwks import Keyring, Pace
from trioserver.jwks_fetch import fetch, fetch_once, keep_fresh
from trioserver.jwks_url import Target
from trioserver.rate_limit import RateLimited
from trioserver.settings import Settings

REFRESH_SECONDS: Final = (240.0, 300.0)
"""Between two fetches when all is well."""

RETRY_SECONDS: Final = (10.0, 12.0)
"""Between two fetches at least."""

COMPLAINT_SECONDS: Final = 60.0
"""Between two lines about the same trouble."""


def keyring_of(settings: Settings, rng: random.Random | None = None) -> Keyring | None:
    """Return an empty keyring for the issuer in the settings; None if there is none.

    Args:
        settings: Of which ``jwt_*`` count here.
        rng: Chooses a pace of its own for each worker, so that they do not ask all at once.
    """
    if settings.jwt_jwks_url is None:
        return None
    rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
    pace = Pace(refresh=rng.uniform(*REFRESH_SECONDS), retry=rng.uniform(*RETRY_SECONDS))
    return Keyring(settings.jwt_algorithms, pace)


async def keep(keyring: Keyring, settings: Settings, log: FilteringBoundLogger) -> NoReturn:
    """Keep a keyring fresh until cancelled; failures are logged, never raised.

    Args:
        keyring: Of these settings; see `keyring_of`.
        settings: With ``jwt_jwks_url``.
        log: Is told when keys change, when they cannot be had and when plain http is used.

    Raises:
        SettingsError: The URL is none.
    """
    target = Target.parse(settings.jwt_jwks_url or "")
    if target.is_plain:
        log.warning("keys are fetched without TLS", setting="JWT_JWKS_URL", host=target.host)
    await keep_fresh(keyring, _Issuer(target).get, Report(keyring, log).take)


async def look_up(keyring: Keyring, settings: Settings) -> str:
    """Fetch once, for a command; return what is wrong, or nothing.

    Raises:
        SettingsError: The URL is none.
    """
    problems: list[str] = []
    target = Target.parse(settings.jwt_jwks_url or "")
    await fetch_once(keyring, _Issuer(target).get, lambda problem: problems.append(problem or ""))
    return problems[0] if keyring.failures else ""


class _Issuer:
    """Where the keys are, and whom to trust there."""

    def __init__(self, target: Target) -> None:
        self._target = target
        # Reading the system's authorities takes some 20 ms in which nobody is served: once.
        self._context = None if target.is_plain else ssl.create_default_context()

    async def get(self) -> bytes:
        """Return the document; see `jwks_fetch.fetch`."""
        return await fetch(self._target, context=self._context)


class Report:
    """What the log is told of fetches."""

    def __init__(self, keyring: Keyring, log: FilteringBoundLogger) -> None:
        self._keyring = keyring
        self._log = log
        self._quiet = RateLimited(COMPLAINT_SECONDS)
        self._names: frozenset[str] | None = None
        self._in_trouble = False

    def take(self, problem: str | None) -> None:
        """Take the outcome of one fetch; see `jwks_fetch.keep_fresh`."""
        failing = self._keyring.failures > 0
        if problem is not None:
            self._complain("the issuer's keys cannot be had" if failing else _SKIPPED, problem)
        if not failing:
            self._compare(self._keyring.names)
        self._in_trouble = failing

    def _complain(self, event: str, problem: str) -> None:
        held_back = self._quiet.due(event, self._keyring.clock())
        if held_back is not None:
            usable = self._keyring.usable(self._keyring.clock())
            self._log.warning(event, problem=problem, held_back=held_back, usable=usable)

    def _compare(self, names: frozenset[str]) -> None:
        """Log what has changed; that the issuer is back counts as a change."""
        before = self._names
        if names == before and not self._in_trouble:
            return
        self._names = names
        before = before or frozenset()
        self._log.info(
            "the issuer's keys",
            keys=len(names),
            added=sorted(names - before),
            withdrawn=sorted(before - names),
        )


_SKIPPED: Final = "some of the issuer's keys cannot be used"
