"""Who is this? JSON Web Tokens in, verified claims out. Pure: the time is passed in.

The algorithm is fixed by the configured key, never by the token: a secret verifies HMAC tokens
only, a public key only its own family, so neither ``none`` nor a public key used as an HMAC
secret gets anywhere. ``exp`` and ``sub`` are required; PyJWT would let a token without ``exp``
live for ever.

One refusal looks like another to the client. The outcome (`AuthError.outcome`) is for logs and
metrics.
"""

from pathlib import Path
from typing import Final

import attrs
import jwt
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from trioserver.errors import AuthError, SettingsError
from trioserver.settings import Settings

MAX_TOKEN: Final = 8 << 10
"""Bytes of a token; the longest header line we take."""

MAX_USER: Final = 128
"""Bytes of a user id, UTF-8."""

_DISTANT: Final = 1e11
"""Seconds since 1970 beyond which no sane time lies (the year 5138)."""


@attrs.frozen(kw_only=True)
class Claims:
    """What a verified token says."""

    user: str
    expires_at: float
    """Seconds since 1970."""


class Verifier:
    """Verifies tokens with the configured key.

    Raises:
        SettingsError: The key cannot be read or does not fit the algorithms.
    """

    def __init__(self, settings: Settings) -> None:
        self._leeway = settings.jwt_leeway
        self._algorithms = list(settings.jwt_algorithms)
        self._audience = settings.jwt_audience
        self._issuer = settings.jwt_issuer
        self._key = _key(settings)
        # Times are checked here, against the `now` passed in.
        self._decoder = jwt.PyJWT(
            {
                "require": ["exp", "sub"],
                "verify_exp": False,
                "verify_nbf": False,
                "verify_iat": False,
                "verify_aud": self._audience is not None,
                "enforce_minimum_key_length": True,
            }
        )

    def verify(self, token: str, now: float) -> Claims:
        """Return the claims of ``token``.

        Args:
            token: Compact serialisation.
            now: Seconds since 1970.

        Raises:
            AuthError: With the outcome ``invalid`` or ``expired``.
        """
        if len(token) > MAX_TOKEN:
            raise AuthError("the token is too long")
        try:
            claims = self._decoder.decode(
                token,
                self._key,
                algorithms=self._algorithms,
                audience=self._audience,
                issuer=self._issuer,
            )
        except (jwt.PyJWTError, ValueError, RecursionError) as error:
            # ValueError, RecursionError: JSON that the json module chokes on.
            raise AuthError(f"{type(error).__name__}: {error}") from None
        expires_at = _seconds(claims, "exp")
        if now >= expires_at + self._leeway:
            raise AuthError("the token has expired", outcome="expired")
        if "nbf" in claims and now < _seconds(claims, "nbf") - self._leeway:
            raise AuthError("the token is not valid yet")
        return Claims(user=_user(claims["sub"]), expires_at=expires_at)


def _key(settings: Settings) -> str | bytes:
    if not settings.jwt_algorithms[0].startswith("HS"):
        try:
            pem = Path(settings.jwt_public_key_file or "").read_bytes()
            load_pem_public_key(pem)
        except (OSError, ValueError) as error:
            raise SettingsError(
                "JWT_PUBLIC_KEY_FILE", f"no public key can be read from it: {error}", "key.pem"
            ) from None
        return pem
    if settings.jwt_secret_key is None:
        raise SettingsError("JWT_SECRET_KEY", "no key to verify tokens with", "32 random bytes")
    return settings.jwt_secret_key


def _seconds(claims: dict[str, object], name: str) -> float:
    value = claims[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AuthError(f"{name} is not a number")
    # Compared before float(): JSON has integers beyond it. NaN compares false.
    if not -_DISTANT < value < _DISTANT:
        raise AuthError(f"{name} is beyond all reason")
    return float(value)


def _user(subject: object) -> str:
    # Printable: no control characters, line ends or lone surrogates, so it always encodes.
    if not isinstance(subject, str) or not subject or not subject.isprintable():
        raise AuthError("sub is not a printable string")
    if len(subject.encode()) > MAX_USER:
        raise AuthError("sub is too long")
    return subject


def sign(settings: Settings, user: str, expires_at: float) -> str:
    """Return a token for ``user``; for tools and tests, with the server's own secret.

    Raises:
        SettingsError: Tokens are verified with a public key, so none can be made here.
        AuthError: That is no user's id.
    """
    if settings.jwt_secret_key is None or not settings.jwt_algorithms[0].startswith("HS"):
        raise SettingsError(
            "JWT_SECRET_KEY", "tokens can be made only where the secret is known", "gentoken"
        )
    claims: dict[str, object] = {"sub": _user(user), "exp": int(expires_at)}
    if settings.jwt_audience is not None:
        claims["aud"] = settings.jwt_audience
    if settings.jwt_issuer is not None:
        claims["iss"] = settings.jwt_issuer
    return jwt.encode(claims, settings.jwt_secret_key, algorithm=settings.jwt_algorithms[0])
