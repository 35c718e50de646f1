"""Who is this? JSON Web Tokens in, verified claims out. Pure: the time is passed in.

Whose signatures count is told by the settings, and checked by `signatures`: a secret and the one
before it, a public key, the keys that an issuer publishes (`jwks`). ``exp`` and ``sub`` are
required; PyJWT would let a token without ``exp`` live for ever.

What is in a token and is not what RFC 7519 says it is makes the token bad, also where nothing here
depends on it (``iat``, ``jti``): a token whose age or name cannot be told could not be revoked by
it, and whoever revokes it should not have to find that out. ``topics`` is no claim of RFC 7519: one
that means something else grants nothing, and harms nothing (`grant`).

One refusal looks like another to the client. The outcome (`AuthError.outcome`) is for logs and
metrics.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import jwt
import msgspec

from trioserver import verification_key
from trioserver.errors import AuthError, SettingsError
from trioserver.grant import NO_GRANT, Grant, checked_claim, of_claim
from trioserver.jwks import Keyring
from trioserver.settings import Settings
from trioserver.signatures import Either, Issued, Signatures, Signed

MAX_TOKEN: Final = 8 << 10
"""Bytes of a token; the longest header line we take."""

MAX_USER: Final = 128
"""Bytes of a user id, UTF-8."""

MAX_JTI: Final = 256
"""Bytes of a token's own id, UTF-8."""

_DISTANT: Final = 1e11
"""Seconds since 1970 beyond which no sane time lies (the year 5138)."""


class Claims(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a verified token says."""

    user: str
    expires_at: float
    """Seconds since 1970."""
    jti: str = ""
    """The token's own id; empty if it has none."""
    issued_at: float = 0.0
    """Seconds since 1970; 0.0 if it does not say, so that it counts as older than all others."""
    topics: Grant = NO_GRANT
    """What it allows with topics: nothing, if what it says of them is not understood."""


_NO_TOPICS: Final = msgspec.Raw()
"""In place of a claim that is not there."""


class _Claims(msgspec.Struct, frozen=True, gc=False):
    """The claims that are looked at; all others are the back end's own business."""

    sub: str
    exp: float
    nbf: float = 0.0
    iat: float = 0.0
    jti: str = ""
    aud: str | list[str] | None = None
    iss: str | None = None
    topics: msgspec.Raw = _NO_TOPICS


class _Audience(msgspec.Struct, frozen=True, gc=False):
    """For whom a token is, of whatever type that is."""

    aud: object = None


_decode_claims = msgspec.json.Decoder(_Claims).decode
_decode_audience = msgspec.json.Decoder(_Audience).decode


class Verifier:
    """Verifies tokens with the configured keys.

    Args:
        settings: Of which ``jwt_*`` count here.
        keyring: The keys behind ``JWT_JWKS_URL``; somebody else keeps it fresh (`key_keeping`).

    Raises:
        SettingsError: A key cannot be read or does not fit the algorithms, or there is none.
    """

    def __init__(self, settings: Settings, keyring: Keyring | None = None) -> None:
        self._leeway = settings.jwt_leeway
        self._audience = settings.jwt_audience
        self._issuer = settings.jwt_issuer
        # The signature and the header are PyJWT's. The claims are ours: their times are checked
        # against the `now` passed in, and a typed decoder costs a tenth of PyJWT's checks.
        self._signed = _signed(settings, keyring)
        # Bound once: it is called for every token.
        self._payload = self._signed.payload

    def verify(self, token: str, now: float) -> Claims:
        """Return the claims of ``token``. Never waits for anything.

        Args:
            token: Compact serialisation.
            now: Seconds since 1970.

        Raises:
            AuthError: With the outcome ``invalid`` or ``expired``; or ``unknown_key`` and a
                ``retry_after``, if the issuer must be asked for the key first.
        """
        if len(token) > MAX_TOKEN:
            raise AuthError("the token is too long")
        try:
            claims = _decode_claims(self._payload(token))
        except (jwt.PyJWTError, msgspec.MsgspecError, ValueError, RecursionError) as error:
            # ValueError, RecursionError: headers that the json module chokes on.
            raise AuthError(f"{type(error).__name__}: {error}") from None
        self._check_times(claims, now)
        if self._issuer is not None and claims.iss != self._issuer:
            raise AuthError("the token is from another issuer")
        if self._audience is not None and not self._for_us(claims.aud):
            raise AuthError("the token is for another audience")
        return Claims(
            user=check_user(claims.sub),
            expires_at=claims.exp,
            jti=claims.jti and _check_jti(claims.jti),
            issued_at=claims.iat,
            topics=NO_GRANT if claims.topics is _NO_TOPICS else of_claim(claims.topics),
        )

    def _check_times(self, claims: _Claims, now: float) -> None:
        if now >= _sane(claims.exp) + self._leeway:
            raise AuthError("the token has expired", outcome="expired")
        latest = now + self._leeway
        if claims.nbf and _sane(claims.nbf) > latest:
            raise AuthError("the token is not valid yet")
        if claims.iat and _sane(claims.iat) > latest:
            raise AuthError("the token is from the future")

    def _for_us(self, audience: str | list[str] | None) -> bool:
        """Whether ours is the audience or, as a whole, one of them (RFC 7519 4.1.3)."""
        return self._audience in (audience if isinstance(audience, list) else [audience])


def _signed(settings: Settings, keyring: Keyring | None) -> Signed:
    """Return whose signatures count."""
    algorithms = settings.jwt_algorithms
    if algorithms[0].startswith("HS"):
        return _signed_with_secret(settings)
    path = settings.jwt_public_key_file
    own = None if path is None else Signatures(verification_key.read(path), algorithms)
    if keyring is not None:
        # An issuer signs for many. Whoever has not said who we are is nobody's audience.
        vet = _refuse_audience if settings.jwt_audience is None else None
        return Issued(keyring, own, vet)
    if own is not None:
        return own
    if settings.jwt_jwks_url is not None:
        raise SettingsError("JWT_JWKS_URL", "its keys are not at hand here", "JWT_PUBLIC_KEY_FILE")
    raise SettingsError("JWT_PUBLIC_KEY_FILE", "no public key to verify tokens with", "key.pem")


def _refuse_audience(payload: bytes) -> None:
    """Refuse what an issuer has signed for somebody (RFC 7519 4.1.3)."""
    if _decode_audience(payload).aud is not None:
        raise AuthError("the token is for an audience (aud), and JWT_AUDIENCE is not set")


def _signed_with_secret(settings: Settings) -> Signed:
    secret, previous = settings.jwt_secret_key, settings.jwt_secret_key_previous
    if secret is None:
        raise SettingsError("JWT_SECRET_KEY", "no key to verify tokens with", "32 random bytes")
    current = Signatures(secret, settings.jwt_algorithms)
    if previous is None or previous == secret:
        return current
    name = "JWT_SECRET_KEY_PREVIOUS"
    return Either(current, Signatures(previous, settings.jwt_algorithms, name))


def _sane(moment: float) -> float:
    # NaN compares false, too.
    if not -_DISTANT < moment < _DISTANT:
        raise AuthError("a time in the token is beyond all reason")
    return moment


def _check_jti(jti: str) -> str:
    # What cannot be typed or is very long could not be revoked by name.
    if not jti.isprintable() or len(jti.encode()) > MAX_JTI:
        raise AuthError("jti is not a printable string, or too long")
    return jti


def check_user(subject: str) -> str:
    """Return the user's id if it may be one.

    Raises:
        AuthError: It is empty, too long or has characters that nobody sees.
    """
    # Printable: no control characters, line ends or lone surrogates, so it always encodes.
    if not subject or not subject.isprintable():
        raise AuthError("sub is not a printable string")
    if len(subject.encode()) > MAX_USER:
        raise AuthError("sub is too long")
    return subject


def sign(
    settings: Settings,
    user: str,
    expires_at: float,
    *,
    jti: str = "",
    issued_at: float = 0.0,
    topics: Sequence[str] | Mapping[str, Sequence[str]] = (),
) -> str:
    """Return a token for ``user``; for tools and tests, with the server's own secret.

    Args:
        settings: Of which ``jwt_*`` count here.
        user: Whose it is.
        expires_at: Seconds since 1970.
        jti: The token's own id; none if empty.
        issued_at: Seconds since 1970; not said if 0.
        topics: The claim of that name (see `grant`); not said if empty.

    Raises:
        SettingsError: Tokens are verified with a public key, so none can be made here.
        AuthError: That is no user's id, no token's, or no claim.
    """
    if settings.jwt_secret_key is None or not settings.jwt_algorithms[0].startswith("HS"):
        raise SettingsError(
            "JWT_SECRET_KEY", "tokens can be made only where the secret is known", "gentoken"
        )
    optional: dict[str, object] = {
        "jti": _check_jti(jti),
        "iat": round(issued_at, 3),
        "aud": settings.jwt_audience,
        "iss": settings.jwt_issuer,
        "topics": topics and checked_claim(topics),
    }
    claims: dict[str, object] = {"sub": check_user(user), "exp": int(expires_at)}
    claims |= {name: value for name, value in optional.items() if value}
    return jwt.encode(claims, settings.jwt_secret_key, algorithm=settings.jwt_algorithms[0])
