"""Tokens: PyJWT alone is the oracle for what we do with headers that we remember.

Whatever is done to a token, it is accepted or refused exactly as PyJWT does, be its header known
or new.
"""

import base64
import json
import string
from collections.abc import Callable
from functools import cache
from typing import Final

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from trioserver.signatures import Signatures
from trioserver.verification_key import Key

PrivateKey = (
    rsa.RSAPrivateKey
    | ec.EllipticCurvePrivateKey
    | ed25519.Ed25519PrivateKey
    | ed448.Ed448PrivateKey
)
SECRET: Final = "0123456789abcdef" * 4
FAMILIES: Final[dict[str, tuple[str | PrivateKey, tuple[str, ...]]]] = {
    "one length": (SECRET[:32], ("HS256",)),
    "several lengths": (SECRET, ("HS256", "HS384", "HS512")),
    "RSA": (rsa.generate_private_key(public_exponent=65537, key_size=2048), ("RS256", "PS256")),
    "P-256": (ec.generate_private_key(ec.SECP256R1()), ("ES256", "ES384")),
    "P-521": (ec.generate_private_key(ec.SECP521R1()), ("ES512",)),
    "Ed25519": (ed25519.Ed25519PrivateKey.generate(), ("EdDSA", "RS256")),
    "Ed448": (ed448.Ed448PrivateKey.generate(), ("EdDSA",)),
}
ORACLE: Final = jwt.PyJWS(options={"enforce_minimum_key_length": True})
GOOD_HEADERS: Final[list[dict[str, object]]] = [
    {},
    {"typ": None},
    {"kid": "a"},
    {"crit": ["b64"], "b64": True},
    {"b64": None},
    {"x": "~~~???>>>" * 3},
]
BAD_HEADERS: Final[list[dict[str, object]]] = [
    {"kid": 1},
    {"kid": None},
    {"crit": []},
    {"crit": ["x"], "x": 1},
    {"crit": ["b64"]},
    {"crit": "b64", "b64": True},
    {"b64": False},
    {"crit": ["b64"], "b64": False},
    {"alg": None},
    {"alg": ""},
    {"alg": ["HS256"]},
    {"alg": "NONE"},
    {"alg": "hs256"},
]
ALGORITHMS: Final = sorted(ORACLE.get_algorithms())
ALPHABET: Final = string.ascii_letters + string.digits + "-_"
# 61 bytes: the last character of each segment has bits that mean nothing.
PAYLOAD: Final = b'{"sub":"~~~???>>>","exp":4000000000,"padding":"xxxxxxxxxxxx"}'


def encoded(part: bytes) -> str:
    """Return one part of a token."""
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()


def public(key: str | PrivateKey) -> Key:
    """Return what verifies."""
    return key if isinstance(key, str) else key.public_key()


def signed(family: str, header: dict[str, object], payload: str = encoded(PAYLOAD)) -> str:
    """Return a token with a right signature, whatever its header says."""
    key, (name, *_) = FAMILIES[family]
    first = encoded(json.dumps({"alg": name, "typ": "JWT", **header}).encode())
    algorithm = ORACLE.get_algorithm_by_name(name)
    signature = algorithm.sign(f"{first}.{payload}".encode(), algorithm.prepare_key(key))
    return f"{first}.{payload}.{encoded(signature)}"


@cache
def good_tokens(family: str) -> list[str]:
    """Return one for each good header."""
    return [signed(family, header) for header in GOOD_HEADERS]


@cache
def experienced(family: str) -> Signatures:
    """Return one that knows all good headers."""
    key, algorithms = FAMILIES[family]
    signatures = Signatures(public(key), algorithms)
    for token in good_tokens(family):
        signatures.payload(token)
    return signatures


def answer(check: Callable[[str], bytes], token: str) -> bytes | None:
    """Return what was signed, None for a refusal."""
    try:
        return check(token)
    except (jwt.PyJWTError, ValueError, RecursionError):
        return None


def oracle(family: str, token: str) -> bytes | None:
    """Return what PyJWT says was signed."""
    key, algorithms = FAMILIES[family]
    try:
        payload: bytes = ORACLE.decode(token, public(key), algorithms=algorithms)
    except (jwt.PyJWTError, ValueError, RecursionError, TypeError):
        # TypeError: an algorithm that we allow and that the key is not for.
        return None
    return payload


def agreed(family: str, token: str) -> bytes | None:
    """Return what all three say: PyJWT, we at first sight, and we with experience."""
    key, algorithms = FAMILIES[family]
    expected = oracle(family, token)
    assert expected == answer(Signatures(public(key), algorithms).payload, token)
    assert expected == answer(experienced(family).payload, token)
    return expected


@pytest.mark.parametrize("family", FAMILIES)
def test_good_tokens_are_good(family: str) -> None:
    """Else nothing below would mean much."""
    for token in good_tokens(family):
        assert PAYLOAD == agreed(family, token)


@pytest.mark.parametrize("family", FAMILIES)
def test_headers_are_judged_as_pyjwt_does(family: str) -> None:
    """Forged ones with a right signature, with the payload in its place, empty and detached."""
    others: list[dict[str, object]] = [{"alg": name} for name in ALGORITHMS]
    for header in [*BAD_HEADERS, *others]:
        for payload in (encoded(PAYLOAD), "", PAYLOAD.decode()):
            token = signed(family, header, payload)
            first, last = token.partition(".")[0], token.rpartition(".")[2]
            agreed(family, token)
            agreed(family, f"{first}..{last}")
            agreed(family, f"{first}.{encoded(PAYLOAD)}.")
    refused = [agreed(family, signed(family, header)) for header in BAD_HEADERS]
    assert [None] * len(BAD_HEADERS) == refused


def test_each_character_changed_to_each_other() -> None:
    """One token, every place, all of ASCII: only the token itself is good."""
    family = "one length"
    token = good_tokens(family)[0]
    for place, letter in enumerate(token):
        for other in map(chr, range(128)):
            changed = token[:place] + other + token[place + 1 :]
            got = answer(experienced(family).payload, changed)
            assert (PAYLOAD if other == letter else None) == got
            if other in ".=+/-_\n" or place % 16 == 0:
                assert oracle(family, changed) == got


@pytest.mark.parametrize("family", FAMILIES)
def test_only_one_way_to_write_a_token(family: str) -> None:
    """Characters that decode to the same bytes are refused, and padding is PyJWT's matter."""
    token = good_tokens(family)[0]
    for place in (token.index("."), token.rindex("."), len(token)):
        spellings = [token[: place - 1] + letter + token[place:] for letter in ALPHABET]
        assert 1 == len([it for it in spellings if agreed(family, it) is not None])
        for padding in ("=", "==", "===", "====", "=A", "A", "AAAA", ".", " ", "\n", "\0", "é"):
            agreed(family, token[:place] + padding + token[place:])


def replaced(token: str, place: int, text: str, length: int) -> str:
    """Return it with so many characters at a place exchanged for others."""
    return token[:place] + text + token[place + length :]


@st.composite
def mutations(draw: st.DrawFn, family: str) -> str:
    """Make tokens that were good before somebody mixed, cut and overwrote them."""
    sources = st.sampled_from(good_tokens(family))
    token = draw(sources)
    for _ in range(draw(st.integers(0, 3))):
        parts = token.split(".")
        which = draw(st.integers(0, len(parts) - 1))
        foreign = draw(sources).split(".")
        junk = draw(st.text(st.sampled_from(ALPHABET + ".=+/ \n\0é"), max_size=3))
        token = draw(
            st.sampled_from(
                [
                    replaced(token, draw(st.integers(0, len(token))), junk, len(junk)),
                    replaced(token, draw(st.integers(0, len(token))), junk, 0),
                    token[: draw(st.integers(0, len(token)))],
                    token.translate(str.maketrans("-_", "+/")),
                    token.translate(str.maketrans("ab", "ba")),
                    ".".join([*parts[:which], *parts[which + 1 :]]),
                    ".".join([*parts[:which], parts[which] * 2, *parts[which + 1 :]]),
                    ".".join([*parts[:which], foreign[which % 3], *parts[which:]]),
                    ".".join([*parts[:which], foreign[which % 3], *parts[which + 1 :]]),
                    ".".join(part + "=" * (-len(part) % 4) for part in parts),
                    token + draw(st.sampled_from(["\n", "=", " ", "\r\n", ".", "\ud800"])),
                ]
            )
        )
    return token


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutated_tokens_are_judged_as_pyjwt_does(family: str, data: st.DataObject) -> None:
    """Mixed, cut, doubled, padded, in the other alphabet: one verdict."""
    agreed(family, data.draw(mutations(family)))


@given(
    header=st.dictionaries(
        st.sampled_from(["alg", "typ", "kid", "crit", "b64", "jwk", "x5u", "zip"]),
        st.none()
        | st.booleans()
        | st.sampled_from([*ALGORITHMS, "b64", "DEF", ""])
        | st.lists(st.sampled_from(["b64", "kid", "exp"]), max_size=2),
    ),
    payload=st.sampled_from([encoded(PAYLOAD), "", PAYLOAD.decode(), "e30="]),
)
def test_random_headers_are_judged_as_pyjwt_does(header: dict[str, object], payload: str) -> None:
    """Rightly signed by the holder of the secret, whatever they say."""
    agreed("several lengths", signed("several lengths", header, payload))
