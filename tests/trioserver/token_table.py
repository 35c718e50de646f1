"""Tokens for tests: good ones of every family, and a table of hostile ones."""

import base64
import hashlib
import hmac
import json
from typing import Final

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from trioserver.settings import Settings

NOW: Final = 1_800_000_000.0
"""Seconds since 1970 at which the tokens of the tables are to be looked at."""
SECRET: Final = "0123456789abcdef0123456789abcdef"
SETTINGS: Final = Settings(jwt_secret_key=SECRET, jwt_leeway=30.0)
GOOD: dict[str, object] = {"sub": "ann", "exp": NOW + 60}

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
KEYS: dict[str, PrivateKey] = {
    "RS256": RSA,
    "RS384": RSA,
    "RS512": RSA,
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "ES384": ec.generate_private_key(ec.SECP384R1()),
    "ES512": ec.generate_private_key(ec.SECP521R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
STRANGE: dict[str, PrivateKey] = {
    "RS256": rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
"""Keys of somebody else."""


def encoded(part: object) -> str:
    """Return one part of a token."""
    raw = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def forged(claims: object, header: object = None, secret: str | bytes = SECRET) -> str:
    """Return a token with a right HS256 signature, whatever its parts are."""
    key = secret if isinstance(secret, bytes) else secret.encode()
    first = encoded({"alg": "HS256", "typ": "JWT"} if header is None else header)
    signed = f"{first}.{encoded(claims)}"
    return f"{signed}.{encoded(hmac.digest(key, signed.encode(), hashlib.sha256))}"


def pem_of(key: PrivateKey) -> bytes:
    """Return the public half."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def private_pem_of(key: PrivateKey) -> bytes:
    """Return the private half."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


HEADERS: dict[str, dict[str, object]] = {
    "a path": {"kid": "../../dev/null"},
    "an absolute path": {"kid": "/dev/null"},
    "SQL": {"kid": "x' UNION SELECT 'key';--"},
    "a URL": {"kid": "https://evil.example/key.pem"},
    "a command": {"kid": "key.pem|/usr/bin/id"},
    "a pattern": {"kid": "*"},
    "NUL": {"kid": "a\0b"},
    "a line end": {"kid": "a\r\nb"},
    "no name": {"kid": ""},
    "not a known name": {"kid": "nobody's"},
    "7 KiB": {"kid": "k" * (5 << 10)},
    "jwk": {"jwk": {"kty": "oct", "k": "YXR0YWNrZXI"}},
    "jku": {"jku": "https://evil.example/keys"},
    "x5u": {"x5u": "https://evil.example/chain"},
    "x5c": {"x5c": ["MIIB"]},
    "x5t": {"x5t": "AAAA"},
    "zip": {"zip": "DEF"},
    "cty": {"cty": "JWT"},
}
"""What strangers put into headers, so that their own key may be used; or to be carried on."""


def strangers(algorithm: str) -> dict[str, str]:
    """Return tokens that strangers have signed with keys of their own, by what they tried."""
    key: PrivateKey | bytes = b"x" * 64
    more: dict[str, object] = {}
    if not algorithm.startswith("HS"):
        key = STRANGE[algorithm]
        whole = jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key(), as_dict=True)
        more = {"jwk": {**whole, "alg": algorithm}, "kid": "k"}
    signer = key if isinstance(key, bytes) else private_pem_of(key)
    return {
        name: jwt.encode(GOOD, signer, algorithm=algorithm, headers=headers)
        for name, headers in {**HEADERS, "a key of his own": more}.items()
    }


DEEP = b'{"sub":"ann","exp":1e10,"x":' + b"[" * 2_500 + b"]" * 2_500 + b"}"
BAD: dict[str, str] = {
    "nothing": "",
    "dots": "..",
    "one part": "abc",
    "four parts": forged(GOOD) + ".x",
    "not ASCII": forged(GOOD) + "ä",
    "line end": forged(GOOD) + "\n",
    "lone surrogate": "\ud800" + forged(GOOD),
    "NUL": "\0",
    "none": f"{encoded({'alg': 'none'})}.{encoded(GOOD)}.",
    "NoNe": f"{encoded({'alg': 'NoNe'})}.{encoded(GOOD)}.",
    "none, signed": forged(GOOD, {"alg": "none"}),
    "empty algorithm": forged(GOOD, {"alg": ""}),
    "no algorithm": forged(GOOD, {"typ": "JWT"}),
    "algorithm of a wrong type": forged(GOOD, {"alg": ["HS256"]}),
    "algorithm null": forged(GOOD, {"alg": None}),
    "lower-case algorithm": forged(GOOD, {"alg": "hs256"}),
    "HS512 where HS256 is set": jwt.encode(GOOD, SECRET * 2, algorithm="HS512"),
    "no signature": forged(GOOD).rpartition(".")[0] + ".",
    "wrong key": forged(GOOD, secret="x" * 32),
    "empty key": forged(GOOD, secret=""),
    "truncated signature": forged(GOOD)[:-2],
    "header a list": forged(GOOD, ["HS256"]),
    "header no JSON": forged(GOOD, b"{"),
    "unknown crit": forged(GOOD, {"alg": "HS256", "crit": ["x"], "x": 1}),
    "crit b64": forged(GOOD, {"alg": "HS256", "crit": ["b64"], "b64": False}),
    "crit of a wrong type": forged(GOOD, {"alg": "HS256", "crit": "x"}),
    "crit empty": forged(GOOD, {"alg": "HS256", "crit": []}),
    "crit without its member": forged(GOOD, {"alg": "HS256", "crit": ["b64"]}),
    "b64 without crit": forged(GOOD, {"alg": "HS256", "b64": False}),
    "another algorithm named twice": forged(GOOD, b'{"alg":"HS256","alg":"none"}'),
    "kid of a wrong type": forged(GOOD, {"alg": "HS256", "kid": 1}),
    "claims a list": forged([GOOD]),
    "claims a string": forged("ann"),
    "claims no JSON": forged(b"{"),
    "claims not UTF-8": forged(b'{"sub":"\xff","exp":1e10}'),
    "nested": forged(DEEP),
    "unfinished nesting": forged(b"[" * 5_900),
    "an integer of 4,500 digits": forged(b'{"sub":"ann","exp":' + b"9" * 4_500 + b"}"),
    "9 KiB": forged({**GOOD, "x": "y" * (9 << 10)}),
    "no exp": forged({"sub": "ann"}),
    "exp null": forged({**GOOD, "exp": None}),
    "exp a string": forged({**GOOD, "exp": str(NOW + 60)}),
    "exp true": forged({**GOOD, "exp": True}),
    "exp a list": forged({**GOOD, "exp": [NOW + 60]}),
    "exp infinite": forged({**GOOD, "exp": float("inf")}),
    "exp minus infinite": forged({**GOOD, "exp": float("-inf")}),
    "exp 1e308": forged({**GOOD, "exp": 1e308}),
    "exp -1e308": forged({**GOOD, "exp": -1e308}),
    "exp in the year 10000": forged({**GOOD, "exp": 253402300800}),
    "exp not a number": forged({**GOOD, "exp": float("nan")}),
    "nbf in the future": forged({**GOOD, "nbf": NOW + 31}),
    "nbf a string": forged({**GOOD, "nbf": "0"}),
    "nbf null": forged({**GOOD, "nbf": None}),
    "iat in the future": forged({**GOOD, "iat": NOW + 31}),
    "iat 1e308": forged({**GOOD, "iat": 1e308}),
    "iat -1e308": forged({**GOOD, "iat": -1e308}),
    "iat a string": forged({**GOOD, "iat": "yesterday"}),
    "iat null": forged({**GOOD, "iat": None}),
    "iat true": forged({**GOOD, "iat": True}),
    "jti a number": forged({**GOOD, "jti": 42}),
    "jti null": forged({**GOOD, "jti": None}),
    "jti a list": forged({**GOOD, "jti": ["a"]}),
    "jti of 257": forged({**GOOD, "jti": "x" * 257}),
    "jti of 129 characters, 258 bytes": forged({**GOOD, "jti": "ä" * 129}),
    "jti with a line end": forged({**GOOD, "jti": "a\nb"}),
    "jti with NUL": forged({**GOOD, "jti": "a\0"}),
    "jti with a surrogate": forged(b'{"sub":"ann","exp":1e10,"jti":"\\ud800"}'),
    "no sub": forged({"exp": NOW + 60}),
    "sub null": forged({**GOOD, "sub": None}),
    "sub a number": forged({**GOOD, "sub": 42}),
    "sub a list": forged({**GOOD, "sub": ["ann"]}),
    "sub empty": forged({**GOOD, "sub": ""}),
    "sub of 129": forged({**GOOD, "sub": "x" * 129}),
    "sub of 65 characters, 130 bytes": forged({**GOOD, "sub": "ä" * 65}),
    "sub with a line end": forged({**GOOD, "sub": "ann\nbob"}),
    "sub with NUL": forged({**GOOD, "sub": "ann\0"}),
    "sub with a surrogate": forged(b'{"sub":"\\ud800","exp":1e10}'),
    "sub with U+2028": forged({**GOOD, "sub": "ann\u2028"}),
}
"""Tokens that `SETTINGS` do not accept, by what is wrong with them."""
