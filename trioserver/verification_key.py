"""The keys of the settings, to verify tokens with: from a PEM file, and which algorithms one fits.

Asked when the settings are checked and again by whoever verifies, so that a key which no worker
could start with is refused together with the settings.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt.algorithms import Algorithm

from trioserver.errors import SettingsError
from trioserver.setting_kinds import quoted

PublicKey = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey | Ed448PublicKey
Key = str | PublicKey

_NEEDED: Final = {
    "RS": "RSA",
    "PS": "RSA",
    "ES256": "EC on secp256r1",
    "ES384": "EC on secp384r1",
    "ES512": "EC on secp521r1",
    "Ed": "Ed25519 or Ed448",
    "HS": "a secret",
}
"""What an algorithm needs, by its name or the beginning of it."""

_jws: Final = jwt.PyJWS(options={"enforce_minimum_key_length": True})


def read(path: Path) -> PublicKey:
    """Return the public key in a PEM file.

    Raises:
        SettingsError: There is none, or it is of a kind that signs no tokens.
    """
    problem: object = "it is of a kind that signs no tokens"
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        problem = error
    else:
        if isinstance(key, PublicKey):
            return key
    raise SettingsError(
        "JWT_PUBLIC_KEY_FILE", f"{quoted(str(path))} holds no usable key: {problem}", "key.pem"
    )


def fitting(
    key: Key, algorithms: Iterable[str], name: str = "the key"
) -> dict[str, tuple[Algorithm, object]]:
    """Return the algorithms that a key is for, each with the key as it wants it.

    PyJWT would raise a TypeError at a token with an algorithm of another family.

    Args:
        key: A secret or a public key.
        algorithms: Those of the settings.
        name: What the key is called in a complaint.

    Raises:
        SettingsError: None of them fits.
    """
    found: dict[str, tuple[Algorithm, object]] = {}
    problem: object = None
    for one in algorithms:
        algorithm = _jws.get_algorithm_by_name(one)
        try:
            prepared = algorithm.prepare_key(key)
        except (jwt.InvalidKeyError, TypeError) as error:
            needed = _NEEDED.get(one) or _NEEDED.get(one[:2])
            public = needed is not None and not isinstance(key, str)
            problem = f"it is {_kind(key)}, {one} needs {needed}" if public else error
            continue
        problem = algorithm.check_key_length(prepared)
        if problem is None:
            found[one] = (algorithm, prepared)
    if not found:
        raise SettingsError("JWT_ALGORITHMS", f"none of them fits {name}: {problem}")
    return found


def _kind(key: Key) -> str:
    if isinstance(key, EllipticCurvePublicKey):
        return f"EC on {key.curve.name}"
    return "RSA" if isinstance(key, RSAPublicKey) else "Ed25519 or Ed448"
