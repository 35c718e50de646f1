"""The keys of an issuer, by name: what its JWKS says, and when to ask for it again. Pure.

A token names the key it was signed with (``kid``), and the issuer publishes its keys as a JSON Web
Key Set (RFC 7517). `Keyring` is asked for a key once per token, synchronously, and never fetches:
it says when it is time to (`Keyring.due_at`), and somebody else does (`jwks_fetch`).

When
    every ``refresh`` seconds; and earlier when a token names a key that is not there, but never
    twice within ``retry`` seconds, however many tokens there are and whatever they name. After a
    failure again after ``retry`` seconds, then less and less often.

What is answered meanwhile
    Keys that are known go on being good when the issuer cannot be reached (stale while error), for
    at most ``lifetime`` seconds; then there are none. A key that a newer set does not have any more
    is gone at once.

    Of an unknown key nobody says no before a fetch that began after it was first asked for has
    come back without it: until then the client is told to come again (`NoKey.retry_after`). So an
    issuer may sign with a new key in the moment it publishes it, and no client throws a good token
    away. The no is good for ``retry`` seconds, then it is asked again: whoever asks for names in
    advance wins nothing. For a token whose algorithm is not in ``JWT_ALGORITHMS`` nobody is asked.

What is a key
    Public keys for signatures only: no secrets, no private halves, no RSA below 2,048 bits. The
    algorithm belongs to the key and not to the token: its ``alg``, else what its curve says, else
    for RSA the first RSA algorithm in ``JWT_ALGORITHMS``. One that is not in there makes no key.
"""

import base64
import binascii
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import attrs
import jwt
import msgspec

from trioserver.errors import AuthError, TrioserverError

MAX_DOCUMENT: Final = 256 << 10
"""Bytes of a key set. Those of large issuers have 2 to 30 KiB, certificates included."""

MAX_KEYS: Final = 100
MAX_KID: Final = 256
"""Characters of a key's name."""

MAX_ASKED: Final = 64
"""Names of unknown keys that one fetch is to tell about."""

_SOON: Final = 2
"""Seconds after which to come again when the answer is on its way."""
_MAX_HEADERS: Final = 64
_MAX_HEADER: Final = 1024
"""Characters of a token's header, to be remembered as one of so many."""

RSA_BITS: Final = range(2048, 8193)
"""Below: NIST SP 800-131A. Above: verifying takes too long."""

_BY_CURVE: Final = {
    "P-256": "ES256",
    "P-384": "ES384",
    "P-521": "ES512",
    "Ed25519": "EdDSA",
    "Ed448": "EdDSA",
}


class KeySetError(TrioserverError):
    """What the issuer sent is no key set, or has no key that can be used."""


@attrs.frozen(kw_only=True)
class KeySet:
    """The usable keys of one document."""

    keys: Mapping[str, jwt.PyJWK]
    """By name; one without a name has the empty one."""
    skipped: tuple[str, ...] = ()
    """Why others cannot be used, for the log."""

    def find(self, kid: str) -> jwt.PyJWK | None:
        """Return the key of that name; without a name, the only key there is."""
        if not kid and len(self.keys) == 1:
            return next(iter(self.keys.values()))
        return self.keys.get(kid) if kid else None


@attrs.frozen
class NoKey:
    """There is no key for a token."""

    retry_after: int
    """Seconds after which it may be known; 0 if it is known not to exist."""


@attrs.frozen(kw_only=True)
class Pace:
    """How often an issuer is asked, in seconds."""

    refresh: float = 300.0
    """After a success. Different in each worker, so that they do not ask all at once."""
    retry: float = 10.0
    """Between two fetches at least."""
    lifetime: float = 86_400.0
    """How long keys stay good when the issuer cannot be reached."""


# A document.


class _Document(msgspec.Struct):
    keys: list[dict[str, object]]


_decode_document = msgspec.json.Decoder(_Document).decode


def key_set(document: bytes, algorithms: Sequence[str]) -> KeySet:
    """Read a key set.

    Args:
        document: JSON, at most `MAX_DOCUMENT` bytes.
        algorithms: ``JWT_ALGORITHMS``, all of them with public keys.

    Raises:
        KeySetError: It is none, or has no usable key.
    """
    if len(document) > MAX_DOCUMENT:
        raise KeySetError(f"the key set is longer than {MAX_DOCUMENT} bytes")
    try:
        entries = _decode_document(document).keys
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise KeySetError(f"that is no key set: {error}") from None
    if len(entries) > MAX_KEYS:
        raise KeySetError(f"the key set has more than {MAX_KEYS} keys")
    keys: dict[str, jwt.PyJWK] = {}
    skipped = []
    for entry in entries:
        kid = entry.get("kid", "")
        try:
            if not isinstance(kid, str) or len(kid) > MAX_KID:
                raise KeySetError("its name is none")  # noqa: TRY301 - one row of the table
            if kid in keys:
                raise KeySetError("another one has its name")  # noqa: TRY301
            keys[kid] = _key(entry, algorithms)
        except KeySetError as problem:
            skipped.append(f"{kid!r:.80}: {problem}")
    if not keys:
        raise KeySetError(f"the key set has no usable key ({'; '.join(skipped[:3]) or 'empty'})")
    return KeySet(keys=keys, skipped=tuple(skipped))


def _key(entry: dict[str, object], algorithms: Sequence[str]) -> jwt.PyJWK:
    if entry.get("kty") not in ("RSA", "EC", "OKP"):
        raise KeySetError("it is no public key")
    if "d" in entry:
        raise KeySetError("its private half is public")
    operations = entry.get("key_ops", ["verify"])
    if entry.get("use", "sig") != "sig" or not (
        isinstance(operations, list) and "verify" in operations
    ):
        raise KeySetError("it is not for signatures")
    algorithm = _algorithm(entry, algorithms)
    if algorithm is None or algorithm not in algorithms:
        raise KeySetError("its algorithm is not in JWT_ALGORITHMS")
    try:
        key = jwt.PyJWK(entry, algorithm)
    except Exception as error:  # noqa: BLE001 - two libraries at somebody else's numbers
        raise KeySetError(f"it cannot be read: {type(error).__name__}") from None
    if entry["kty"] == "RSA" and key.key.key_size not in RSA_BITS:
        raise KeySetError(f"it has {key.key.key_size} bits")
    return key


def _algorithm(entry: dict[str, object], algorithms: Sequence[str]) -> str | None:
    """Return what the key is for; None if that cannot be told."""
    named, curve = entry.get("alg"), entry.get("crv")
    if entry["kty"] == "RSA":
        rsa = [name for name in algorithms if name.startswith(("RS", "PS"))]
        fitting = next((name for name in rsa if named is None or name == named), None)
    else:
        fitting = _BY_CURVE.get(curve) if isinstance(curve, str) else None
    return fitting if named is None or named == fitting else None


# The keyring.


class _Header(msgspec.Struct, frozen=True, gc=False):
    kid: str | None = None
    alg: str = ""


_decode_header = msgspec.json.Decoder(_Header).decode


class Keyring:
    """The keys of one issuer, and what is to be done to keep them.

    Args:
        algorithms: ``JWT_ALGORITHMS``.
        pace: How often the issuer is asked.
        clock: Seconds of the one clock that everybody takes ``now`` from; never goes backwards.
    """

    def __init__(
        self,
        algorithms: Sequence[str],
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.algorithms = tuple(algorithms)
        self.clock = clock
        self.on_wanted: Callable[[], None] = lambda: None
        """Called when `due_at` has come nearer. Must not raise."""
        self.failures = 0
        """Fetches that failed since the last that did not."""
        self._pace = pace or Pace()
        self._set: KeySet | None = None
        self._expires = -math.inf
        self._tried = -math.inf
        self._due = -math.inf
        self._wanted = False
        self._fetching = False
        self._asked: set[str] = set()
        """Unknown names since the last fetch began."""
        self._asking: set[str] = set()
        """Unknown names that the fetch under way is to tell about."""
        self._absent: set[str] = set()
        """Names that the last fetch which succeeded was to tell about, and did not bring."""
        self._known_at = -math.inf
        """When that fetch began."""
        self._by_header: dict[str, jwt.PyJWK] = {}
        """Keys by the encoded headers of accepted tokens, nearly as few as there are keys."""

    @property
    def due_at(self) -> float:
        """When to fetch next: a moment of the clock that is passed in, perhaps long past."""
        return self._tried + self._pace.retry if self._wanted else self._due

    def usable(self, now: float) -> bool:
        """Tell whether there are keys at all."""
        return self._set is not None and now < self._expires

    @property
    def names(self) -> frozenset[str]:
        """Return the names of the keys of the last set that was fetched."""
        return frozenset(self._set.keys if self._set is not None else ())

    def held(self, token: str, now: float) -> jwt.PyJWK | None:
        """Return the key that a token says it was signed with, if it is at hand.

        Args:
            token: Compact serialisation; nothing of it is verified here.
            now: What `clock` says.

        Raises:
            AuthError: It has no header that could be read.
        """
        if self._set is None or now >= self._expires:
            return None
        header = token.partition(".")[0]
        return self._by_header.get(header) or self._set.find(_read(header).kid or "")

    def accepted(self, token: str, key: jwt.PyJWK) -> None:
        """Remember the header of a token that has turned out to be signed with a key of ours.

        Args:
            token: Compact serialisation, verified.
            key: What `held` or `key_for` has just returned for it.
        """
        header = token.partition(".")[0]
        if header in self._by_header or len(header) > _MAX_HEADER:
            return
        if len(self._by_header) == _MAX_HEADERS:
            del self._by_header[next(iter(self._by_header))]
        self._by_header[header] = key

    def key_for(self, token: str, now: float) -> jwt.PyJWK | NoKey:
        """Return the key that a token says it was signed with. Never fetches.

        Args:
            token: Compact serialisation; nothing of it is verified here.
            now: What `clock` says.

        Raises:
            AuthError: It has no header that could be read.
        """
        key = self.held(token, now)
        if key is not None:
            return key
        header = _read(token.partition(".")[0])
        kid = header.kid or ""
        if header.alg not in self.algorithms:
            # No key that may come would be for it.
            return NoKey(0)
        if self.usable(now):
            if not kid or len(kid) > MAX_KID:
                return NoKey(0)
            if kid in self._absent and now < self._known_at + self._pace.retry:
                return NoKey(0)
        return self._later(kid, now)

    def _later(self, kid: str, now: float) -> NoKey:
        """Have the issuer asked for a key, as soon as that is allowed."""
        if self._fetching and kid in self._asking:
            return NoKey(_SOON)
        if len(self._asked) < MAX_ASKED and len(kid) <= MAX_KID:
            self._asked.add(kid)
        if not self._wanted:
            self._wanted = True
            self.on_wanted()
        # Rounded first: the sum of moments may be a hair above the whole seconds that it means.
        return NoKey(math.ceil(round(max(0.0, self.due_at - now), 3)) + _SOON)

    def began(self, now: float) -> None:
        """Note that a fetch has begun. One of `succeeded` and `failed` must follow."""
        self._tried = now
        self._fetching = True
        self._wanted = False
        # After a failure its names are still to be told about; there is room for as many again.
        self._asking = self._asked | (self._asking if len(self._asking) <= MAX_ASKED else set())
        self._asked = set()

    def succeeded(self, keys: KeySet, now: float) -> None:
        """Take over what a fetch has brought."""
        self._fetching = False
        self._set = keys
        self._expires = now + self._pace.lifetime
        self._due = now + self._pace.refresh
        self.failures = 0
        self._known_at = self._tried
        self._absent = self._asking - keys.keys.keys()
        self._asking = set()
        self._by_header.clear()

    def failed(self, now: float) -> None:
        """Note that a fetch has brought nothing: what is known stays good for a while."""
        # 2 ** 16 retries are a day and more; beyond it floats would overflow some day.
        self._fetching = False
        wait = self._pace.retry * 2.0 ** min(self.failures, 16)
        self._due = now + min(wait, max(self._pace.refresh, self._pace.retry))
        self.failures += 1


def _read(header: str) -> _Header:
    """Return what a token's encoded header says."""
    try:
        return _decode_header(base64.urlsafe_b64decode(header + "=="))
    except (binascii.Error, ValueError, msgspec.MsgspecError, RecursionError):
        raise AuthError("the token has no header that could be read") from None
