"""Who is this? JSON Web Tokens in, verified claims out. Pure: the time is passed in.

The algorithm is fixed by the configured key, never by the token: a secret verifies HMAC tokens
only, a public key only its own family, so neither ``none`` nor a public key used as an HMAC
secret gets anywhere. ``exp`` and ``sub`` are required; PyJWT would let a token without ``exp``
live for ever.

One refusal looks like another to the client. The outcome (`AuthError.outcome`) is for logs and
metrics.
"""

import base64
from pathlib import Path
from typing import Final

import attrs
import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
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


class _Claims(msgspec.Struct, frozen=True, gc=False):
    """The claims that are looked at; all others are the back end's own business."""

    sub: str
    exp: float
    nbf: float = 0.0
    aud: str | list[str] | None = None
    iss: str | None = None


_decode_claims = msgspec.json.Decoder(_Claims).decode


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
        # The signature and the header are PyJWT's. The claims are ours: their times are checked
        # against the `now` passed in, and a typed decoder costs a tenth of PyJWT's checks.
        self._signatures = jwt.PyJWS(options={"enforce_minimum_key_length": True})

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
            payload = self._signatures.decode(token, self._key, algorithms=self._algorithms)
            claims = _decode_claims(payload)
        except (jwt.PyJWTError, msgspec.MsgspecError, ValueError, RecursionError) as error:
            # ValueError, RecursionError: headers that the json module chokes on.
            raise AuthError(f"{type(error).__name__}: {error}") from None
        if now >= _sane(claims.exp) + self._leeway:
            raise AuthError("the token has expired", outcome="expired")
        if now < _sane(claims.nbf) - self._leeway:
            raise AuthError("the token is not valid yet")
        if self._issuer is not None and claims.iss != self._issuer:
            raise AuthError("the token is from another issuer")
        if self._audience is not None and not self._for_us(claims.aud):
            raise AuthError("the token is for another audience")
        return Claims(user=check_user(claims.sub), expires_at=claims.exp)

    def _for_us(self, audience: str | list[str] | None) -> bool:
        """Whether ours is the audience or, as a whole, one of them (RFC 7519 4.1.3)."""
        return self._audience in (audience if isinstance(audience, list) else [audience])


PublicKey = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey | Ed448PublicKey
Key = str | jwt.PyJWK | PublicKey


def _key(settings: Settings) -> Key:
    """Return the key in the form that costs least per token: parsed, once."""
    first, *others = settings.jwt_algorithms
    if not first.startswith("HS"):
        return _public_key(settings.jwt_public_key_file)
    secret = settings.jwt_secret_key
    if secret is None:
        raise SettingsError("JWT_SECRET_KEY", "no key to verify tokens with", "32 random bytes")
    if others:
        return secret
    # A PyJWK is for one algorithm. PyJWT would look at a bare secret again for every token: is
    # it PEM, is it JSON?
    encoded = base64.urlsafe_b64encode(secret.encode()).rstrip(b"=").decode()
    return jwt.PyJWK({"kty": "oct", "k": encoded, "alg": first})


def _public_key(path: Path | None) -> PublicKey:
    problem: object = "it is of a kind that signs no tokens"
    try:
        key = load_pem_public_key(Path(path or "").read_bytes())
    except (OSError, ValueError) as error:
        problem = error
    else:
        if isinstance(key, PublicKey):
            return key
    raise SettingsError(
        "JWT_PUBLIC_KEY_FILE", f"no public key can be read from it: {problem}", "key.pem"
    )


def _sane(moment: float) -> float:
    # NaN compares false, too.
    if not -_DISTANT < moment < _DISTANT:
        raise AuthError("a time in the token is beyond all reason")
    return moment


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
    claims: dict[str, object] = {"sub": check_user(user), "exp": int(expires_at)}
    if settings.jwt_audience is not None:
        claims["aud"] = settings.jwt_audience
    if settings.jwt_issuer is not None:
        claims["iss"] = settings.jwt_issuer
    return jwt.encode(claims, settings.jwt_secret_key, algorithm=settings.jwt_algorithms[0])
