"""Who is this? JSON Web Tokens in, verified claims out. Pure: the time is passed in.

The algorithm is fixed by the configured key, never by the token: a secret verifies HMAC tokens
only, a public key only its own family, so neither ``none`` nor a public key used as an HMAC
secret gets anywhere. ``exp`` and ``sub`` are required; PyJWT would let a token without ``exp``
live for ever.

PyJWT decides what a good token is. Nearly all its time goes into parsing the header anew for every
token and into looking at base64 character by character, yet a back end puts the same header into
all its tokens. So the headers of a few accepted tokens are remembered, see `_Signatures`.

One refusal looks like another to the client. The outcome (`AuthError.outcome`) is for logs and
metrics.
"""

import binascii
from collections.abc import Iterable
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
from jwt.algorithms import Algorithm

from trioserver.errors import AuthError, SettingsError
from trioserver.settings import Settings

MAX_TOKEN: Final = 8 << 10
"""Bytes of a token; the longest header line we take."""

MAX_USER: Final = 128
"""Bytes of a user id, UTF-8."""

_MAX_HEADERS: Final = 16
"""Headers remembered per key; a back end has one per algorithm and key id. At most 128 KiB."""

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
        self._audience = settings.jwt_audience
        self._issuer = settings.jwt_issuer
        # The signature and the header are PyJWT's. The claims are ours: their times are checked
        # against the `now` passed in, and a typed decoder costs a tenth of PyJWT's checks.
        self._signatures = _Signatures(_key(settings), settings.jwt_algorithms)

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
            claims = _decode_claims(self._signatures.payload(token))
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
Key = str | PublicKey


class _Signatures:
    """Signatures made with one key: a token in, what was signed out.

    PyJWT judges every header that is new: the algorithm, ``crit``, ``b64`` and all the rest. When
    a token with a new header has turned out to be good, the header is remembered. From then on a
    token with the very same header segment needs only its base64 decoded and its signature
    checked, which is done by PyJWT's own algorithm with the key it has prepared. A token in which
    anything else is unusual goes to PyJWT all the same, so this is never laxer nor stricter.

    Raises:
        SettingsError: None of the algorithms fits the key.
    """

    def __init__(self, key: Key, algorithms: Iterable[str]) -> None:
        self._jws = jwt.PyJWS(options={"enforce_minimum_key_length": True})
        self._key = key
        self._algorithms = self._fitting(algorithms)
        self._known: dict[bytes, tuple[Algorithm, object]] = {}

    def payload(self, token: str) -> bytes:
        """Return what was signed.

        Raises:
            jwt.PyJWTError: The token is malformed or not signed with our key.
            ValueError: The same.
            RecursionError: Its header is nested too deeply.
        """
        signed, _, tail = token.encode().rpartition(b".")
        header, _, body = signed.partition(b".")
        known = self._known.get(header)
        if known is None:
            return self._judged(token, header)
        try:
            payload, signature = _decoded(body), _decoded(tail)
        except ValueError:
            return self._judged(token, header)
        algorithm, key = known
        if not algorithm.verify(signed, key, signature):
            raise jwt.InvalidSignatureError("Signature verification failed")
        return payload

    def _judged(self, token: str, header: bytes) -> bytes:
        judged = self._jws.decode_complete(token, self._key, algorithms=list(self._algorithms))
        if header not in self._known:
            # Only whoever has the key gets here, so strangers cannot push anything out. A back
            # end with a new header in each token has them all judged, as if none was remembered.
            if len(self._known) == _MAX_HEADERS:
                del self._known[next(iter(self._known))]
            self._known[header] = self._algorithms[judged["header"]["alg"]]
        payload: bytes = judged["payload"]
        return payload

    def _fitting(self, algorithms: Iterable[str]) -> dict[str, tuple[Algorithm, object]]:
        """Return the algorithms that this key is for, each with the key as it wants it.

        PyJWT would raise a TypeError at a token with an algorithm of another family.
        """
        fitting: dict[str, tuple[Algorithm, object]] = {}
        problem: object = None
        for name in algorithms:
            algorithm = self._jws.get_algorithm_by_name(name)
            try:
                key = algorithm.prepare_key(self._key)
            except (jwt.InvalidKeyError, TypeError) as error:
                problem = error
                continue
            problem = algorithm.check_key_length(key)
            if problem is None:
                fitting[name] = (algorithm, key)
        if not fitting:
            raise SettingsError("JWT_ALGORITHMS", f"none of them fits the key: {problem}")
        return fitting


_STANDARD: Final = bytes.maketrans(b"-_+/=", b"+/...")
"""From the base64 of URLs to the other one; what is no part of the former becomes invalid."""


def _decoded(segment: bytes) -> bytes:
    """Return the bytes that a canonical base64url segment without padding stands for.

    Raises:
        ValueError: It is something else.
    """
    standard = segment.translate(_STANDARD) + b"=" * (-len(segment) % 4)
    decoded = binascii.a2b_base64(standard, strict_mode=True)
    # Several texts are decoded to the same bytes, even strictly: the last bits may be anything.
    if binascii.b2a_base64(decoded, newline=False) != standard:
        raise ValueError("not canonical")
    return decoded


def _key(settings: Settings) -> Key:
    if not settings.jwt_algorithms[0].startswith("HS"):
        return _public_key(settings.jwt_public_key_file)
    if settings.jwt_secret_key is None:
        raise SettingsError("JWT_SECRET_KEY", "no key to verify tokens with", "32 random bytes")
    return settings.jwt_secret_key


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
