"""Who signed this? Tokens in, what was signed out: with one key, with several, or an issuer's.

The algorithm is fixed by the key, never by the token: a secret verifies HMAC tokens only, a public
key only its own family, so neither ``none`` nor a public key used as an HMAC secret gets anywhere.

PyJWT decides what a good token is. Nearly all its time goes into parsing the header anew for every
token and into looking at base64 character by character, yet a back end puts the same header into
all its tokens. So the headers of a few accepted tokens are remembered, see `Signatures`.

A token that nobody signed costs one check per key at most, and only with keys for its algorithm.
"""

import binascii
from collections.abc import Callable, Iterable
from typing import Final, Protocol
from weakref import WeakKeyDictionary

import jwt
from jwt.algorithms import Algorithm

from trioserver.errors import AuthError
from trioserver.jwks import Keyring, NoKey
from trioserver.verification_key import Key, fitting

_MAX_HEADERS: Final = 16
"""Headers remembered per key; a back end has one per algorithm and key id. At most 128 KiB."""

NOT_OURS: Final = (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError)
"""What is raised at a token that another key may have signed; all else is wrong with any key."""


class Signed(Protocol):
    """Signatures by somebody who is trusted."""

    def payload(self, token: str) -> bytes:
        """Return what was signed.

        Raises:
            AuthError: No key of this name is known, or not yet.
            jwt.PyJWTError: The token is malformed, or not signed with our key.
            ValueError: The same.
            RecursionError: Its header is nested too deeply.
        """


class Signatures:
    """Signatures made with one key: a token in, what was signed out.

    PyJWT judges every header that is new: the algorithm, ``crit``, ``b64`` and all the rest. When
    a token with a new header has turned out to be good, the header is remembered. From then on a
    token with the very same header segment needs only its base64 decoded and its signature
    checked, which is done by PyJWT's own algorithm with the key it has prepared. A token in which
    anything else is unusual goes to PyJWT all the same, so this is never laxer nor stricter.

    Args:
        key: The one.
        algorithms: Of which those are accepted that the key is for.
        name: What the key is called in a complaint.

    Raises:
        SettingsError: None of the algorithms fits the key.
    """

    def __init__(self, key: Key, algorithms: Iterable[str], name: str = "the key") -> None:
        self._jws = jwt.PyJWS(options={"enforce_minimum_key_length": True})
        self._key = key
        self._algorithms = fitting(key, algorithms, name)
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

    def knows(self, header: str) -> bool:
        """Tell whether a token with this header, as it is encoded, has been accepted."""
        return header.encode() in self._known

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


class Either:
    """Signatures made with one key, or with the one before it."""

    def __init__(self, first: Signed, second: Signed) -> None:
        self._first = first
        self._second = second

    def payload(self, token: str) -> bytes:
        """See `Signed.payload`."""
        try:
            return self._first.payload(token)
        except NOT_OURS:
            return self._second.payload(token)


class Issued:
    """Signatures made with the keys that an issuer publishes, or with one from a file.

    The key that is at hand comes first. Asking the issuer for another is for tokens that are
    nobody's so far: else those of the file's key would have it asked again and again.

    Args:
        keyring: The issuer's keys; somebody keeps it fresh.
        own: Signatures with the key from the file.
        vet: Called with what the issuer has signed, which it may have signed for somebody else;
            raises if so. What the key from the file has signed is not its matter.
    """

    def __init__(
        self,
        keyring: Keyring,
        own: Signatures | None = None,
        vet: Callable[[bytes], None] | None = None,
    ) -> None:
        self._keyring = keyring
        self._own = own
        self._vet = vet
        # A newer set has new keys, even where they are the same: the old ones fade away.
        self._by_key: WeakKeyDictionary[jwt.PyJWK, Signatures] = WeakKeyDictionary()

    def payload(self, token: str) -> bytes:
        """See `Signed.payload`. Never fetches."""
        keyring, own = self._keyring, self._own
        now = keyring.clock()
        if own is None:
            return self._issued(token, keyring.key_for(token, now))
        held = keyring.held(token, now)
        if held is None or own.knows(token.partition(".")[0]):
            try:
                return own.payload(token)
            except NOT_OURS:
                return self._issued(token, held or keyring.key_for(token, now))
        try:
            return self._issued(token, held)
        except NOT_OURS:
            return own.payload(token)

    def _issued(self, token: str, key: jwt.PyJWK | NoKey) -> bytes:
        if isinstance(key, NoKey):
            if key.retry_after:
                raise AuthError(
                    "the issuer is being asked for the token's key",
                    outcome="unknown_key",
                    retry_after=key.retry_after,
                )
            raise AuthError("the issuer has no such key")
        signatures = self._by_key.get(key)
        if signatures is None:
            signatures = Signatures(key.key, (key.algorithm_name,))
            self._by_key[key] = signatures
        payload = signatures.payload(token)
        # Only now: strangers, who invent headers, do not fill what is remembered of them.
        self._keyring.accepted(token, key)
        if self._vet is not None:
            self._vet(payload)
        return payload


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
