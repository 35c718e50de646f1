"""Tokens: a table of hostile ones, and the right ones of every family."""

import base64
import hashlib
import hmac
import json
from pathlib import Path

import attrs
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, x25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from trioserver.auth import MAX_TOKEN, Claims, Verifier, sign
from trioserver.errors import AuthError, SettingsError
from trioserver.settings import Settings

NOW = 1_800_000_000.0
SECRET = "0123456789abcdef0123456789abcdef"
SETTINGS = Settings(jwt_secret_key=SECRET, jwt_leeway=30.0)
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


def with_key(tmp_path: Path, algorithm: str) -> Settings:
    """Return settings with the public key of an algorithm."""
    path = tmp_path / "key.pem"
    path.write_bytes(pem_of(KEYS[algorithm]))
    return Settings(jwt_public_key_file=path, jwt_algorithms=(algorithm,))


def test_a_good_token_names_its_user_and_its_end() -> None:
    """The claims come back as they were signed."""
    claims = Verifier(SETTINGS).verify(forged(GOOD), NOW)
    assert Claims(user="ann", expires_at=NOW + 60) == claims


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
EXPIRED: dict[str, object] = {"now": NOW - 30, "0": 0, "negative": -1}


@pytest.mark.parametrize("name", BAD)
def test_bad_tokens_are_invalid(name: str) -> None:
    """Each is refused with AuthError and the same outcome, nothing else is raised."""
    with pytest.raises(AuthError) as caught:
        Verifier(SETTINGS).verify(BAD[name], NOW)
    assert "invalid" == caught.value.outcome


@pytest.mark.parametrize("when", EXPIRED)
def test_expired_tokens_are_expired(when: str) -> None:
    """The leeway is the setting's, and its end is the end."""
    with pytest.raises(AuthError) as caught:
        Verifier(SETTINGS).verify(forged({**GOOD, "exp": EXPIRED[when]}), NOW)
    assert "expired" == caught.value.outcome


@pytest.mark.parametrize("exponent", [20, 308, 309, 400, 4000])
@pytest.mark.parametrize("sign_of", [1, -1])
def test_an_integer_exp_of_any_size_raises_nothing_unexpected(exponent: int, sign_of: int) -> None:
    """JSON integers have no upper end, floats do."""
    token = forged(b'{"sub":"ann","exp":%d}' % (sign_of * 10**exponent))
    with pytest.raises(AuthError) as caught:
        Verifier(SETTINGS).verify(token, NOW)
    assert "invalid" == caught.value.outcome


@pytest.mark.parametrize(
    "claims",
    [
        {"exp": NOW - 29},
        {"exp": int(NOW) + 1},
        {"nbf": NOW + 29},
        {"nbf": -1},
        {"iat": NOW + 1000},
        {"iat": "yesterday"},
        {"aud": "somebody else's"},
        {"iss": "anybody"},
        {"sub": "x" * 128},
        {"sub": "a:b*"},
        {"sub": "Ännchen"},
    ],
)
def test_odd_claims_that_are_right(claims: dict[str, object]) -> None:
    """What is not asked for is not looked at, and the leeway holds both ways."""
    token = forged({**GOOD, **claims})
    assert claims.get("sub", "ann") == Verifier(SETTINGS).verify(token, NOW).user


@pytest.mark.parametrize(
    ("claims", "good"),
    [
        ({"aud": "us", "iss": "them"}, True),
        ({"aud": ["x", "us"], "iss": "them"}, True),
        ({"aud": ["x"], "iss": "them"}, False),
        ({"aud": [], "iss": "them"}, False),
        ({"aud": "u", "iss": "them"}, False),
        ({"aud": "uss", "iss": "them"}, False),
        ({"aud": 1, "iss": "them"}, False),
        ({"aud": [1], "iss": "them"}, False),
        ({"aud": None, "iss": "them"}, False),
        ({"iss": "them"}, False),
        ({"aud": "us"}, False),
        ({"aud": "us", "iss": "the"}, False),
        ({"aud": "us", "iss": ""}, False),
        ({"aud": "us", "iss": ["them"]}, False),
        ({"aud": "us", "iss": None}, False),
    ],
)
def test_audience_and_issuer_must_be_the_settings(claims: dict[str, object], *, good: bool) -> None:
    """Equal, not contained: a part of a name is another name."""
    verifier = Verifier(attrs.evolve(SETTINGS, jwt_audience="us", jwt_issuer="them"))
    token = forged({**GOOD, **claims})
    if good:
        assert "ann" == verifier.verify(token, NOW).user
        return
    with pytest.raises(AuthError):
        verifier.verify(token, NOW)


@pytest.mark.parametrize("algorithm", KEYS)
def test_public_keys_verify_their_own_family(algorithm: str, tmp_path: Path) -> None:
    """RS, ES and EdDSA tokens are accepted with the key they were signed for."""
    verifier = Verifier(with_key(tmp_path, algorithm))
    token = jwt.encode(GOOD, private_pem_of(KEYS[algorithm]), algorithm=algorithm)
    assert "ann" == verifier.verify(token, NOW).user
    with pytest.raises(AuthError):
        verifier.verify(forged(GOOD), NOW)


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_a_public_key_is_no_hmac_secret(algorithm: str, tmp_path: Path) -> None:
    """A token signed with the public key's own bytes gets nowhere."""
    verifier = Verifier(with_key(tmp_path, algorithm))
    pem = pem_of(KEYS[algorithm])
    for secret in (pem, pem.strip()):
        with pytest.raises(AuthError):
            verifier.verify(forged(GOOD, secret=secret), NOW)
        with pytest.raises(AuthError):
            verifier.verify(forged(GOOD, {"alg": algorithm}, secret), NOW)


@pytest.mark.parametrize(("algorithm", "size"), [("HS256", 32), ("HS384", 48), ("HS512", 64)])
def test_secrets_verify_their_own_algorithm(algorithm: str, size: int) -> None:
    """HS256, HS384 and HS512 each with a key of its length."""
    settings = Settings(jwt_secret_key="s" * size, jwt_algorithms=(algorithm,))
    token = sign(settings, "ann", NOW + 60)
    assert algorithm == jwt.get_unverified_header(token)["alg"]
    assert "ann" == Verifier(settings).verify(token, NOW).user


@pytest.mark.parametrize(
    "secret", ["short", '{"kty":"oct","k":"MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY"}', ""]
)
def test_a_secret_that_is_none_is_a_settings_error(secret: str) -> None:
    """One that can be guessed, or that is a key in some format, is refused before any token."""
    with pytest.raises(SettingsError, match="JWT_ALGORITHMS"):
        Verifier(attrs.evolve(SETTINGS, jwt_secret_key=secret))


def test_a_secret_verifies_only_what_it_is_long_enough_for() -> None:
    """The other algorithms of the list are refused."""
    verifier = Verifier(attrs.evolve(SETTINGS, jwt_algorithms=("HS512", "HS256")))
    assert "ann" == verifier.verify(forged(GOOD), NOW).user
    signed = f"{encoded({'alg': 'HS512'})}.{encoded(GOOD)}"
    signature = hmac.digest(SECRET.encode(), signed.encode(), hashlib.sha512)
    with pytest.raises(AuthError):
        verifier.verify(f"{signed}.{encoded(signature)}", NOW)


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_algorithms_of_other_families_are_refused_like_any_other(
    algorithm: str, tmp_path: Path
) -> None:
    """A list that is longer than what the key is for makes no token an accident."""
    families = ("RS256", "PS256", "ES256", "ES384", "EdDSA")
    verifier = Verifier(attrs.evolve(with_key(tmp_path, algorithm), jwt_algorithms=families))
    token = jwt.encode(GOOD, private_pem_of(KEYS[algorithm]), algorithm=algorithm)
    assert "ann" == verifier.verify(token, NOW).user
    for name in families:
        with pytest.raises(AuthError) as caught:
            verifier.verify(forged(GOOD, {"alg": name}), NOW)
        assert "invalid" == caught.value.outcome


def test_a_key_that_no_algorithm_is_for_is_a_settings_error(tmp_path: Path) -> None:
    """Such a server would refuse everybody."""
    settings = attrs.evolve(with_key(tmp_path, "EdDSA"), jwt_algorithms=("RS256", "ES256"))
    with pytest.raises(SettingsError, match="JWT_ALGORITHMS"):
        Verifier(settings)


def test_keys_that_cannot_be_used_are_settings_errors(tmp_path: Path) -> None:
    """A missing or broken key, or one that signs nothing, ends the start and names the setting."""
    broken = tmp_path / "broken.pem"
    broken.write_bytes(b"no key")
    other = tmp_path / "other.pem"
    agreeing = x25519.X25519PrivateKey.generate().public_key()
    other.write_bytes(agreeing.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    for path in (broken, other, tmp_path / "absent.pem", tmp_path):
        with pytest.raises(SettingsError, match="JWT_PUBLIC_KEY_FILE"):
            Verifier(Settings(jwt_public_key_file=path, jwt_algorithms=("RS256",)))
    with pytest.raises(SettingsError, match="JWT_SECRET_KEY"):
        Verifier(Settings(jwt_secret_key=None))


@given(
    st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=30)
)
def test_signed_tokens_are_accepted(user: str) -> None:
    """What gentoken makes, the server takes, with audience and issuer set or not."""
    for settings in (SETTINGS, attrs.evolve(SETTINGS, jwt_audience="us", jwt_issuer="them")):
        claims = Verifier(settings).verify(sign(settings, user, NOW + 60.9), NOW)
        assert Claims(user=user, expires_at=NOW + 60) == claims


def test_tokens_can_be_made_only_where_the_secret_is(tmp_path: Path) -> None:
    """With a public key there is nothing to sign with, and a bad user is no user."""
    with pytest.raises(SettingsError, match="secret"):
        sign(with_key(tmp_path, "RS256"), "ann", NOW)
    with pytest.raises(SettingsError, match="secret"):
        sign(Settings(jwt_secret_key=None), "ann", NOW)
    for user in ("", "a\nb", "x" * 129):
        with pytest.raises(AuthError):
            sign(SETTINGS, user, NOW)


@given(st.text() | st.binary(max_size=MAX_TOKEN).map(lambda data: data.decode("latin-1")))
def test_random_tokens_raise_nothing_but_an_auth_error(token: str) -> None:
    """Whatever the characters."""
    with pytest.raises(AuthError):
        Verifier(SETTINGS).verify(token, NOW)


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_random_parts_with_a_right_signature_raise_nothing_but_an_auth_error(
    header: bytes, claims: bytes
) -> None:
    """Even the holder of the key cannot make the verifier stumble."""
    for token in (forged(claims), forged(GOOD, header)):
        with pytest.raises(AuthError):
            Verifier(SETTINGS).verify(token, NOW)


def deaf(verifier: Verifier) -> Verifier:
    """Return it without anybody to ask about headers that it does not know."""
    verifier._signatures._jws = jwt.PyJWS(algorithms=[])
    return verifier


@pytest.mark.parametrize("algorithms", [("HS256",), ("HS512", "HS256")])
def test_a_header_is_judged_once(algorithms: tuple[str, ...]) -> None:
    """Tokens with the header of an accepted one are verified without parsing it again."""
    settings = Settings(jwt_secret_key=SECRET * 2, jwt_algorithms=algorithms)
    verifier = Verifier(settings)
    for name in algorithms:
        verifier.verify(jwt.encode(GOOD, SECRET * 2, algorithm=name), NOW)
    deaf(verifier)
    for name in algorithms:
        bob = jwt.encode({**GOOD, "sub": "bob"}, SECRET * 2, algorithm=name)
        assert "bob" == verifier.verify(bob, NOW).user
    with pytest.raises(AuthError):
        verifier.verify(forged(GOOD, {"alg": "HS256", "kid": "x"}, SECRET * 2), NOW)


@pytest.mark.parametrize("algorithm", KEYS)
def test_a_header_is_judged_once_with_public_keys(algorithm: str, tmp_path: Path) -> None:
    """The same for the other families."""
    pem = private_pem_of(KEYS[algorithm])
    verifier = Verifier(with_key(tmp_path, algorithm))
    verifier.verify(jwt.encode(GOOD, pem, algorithm=algorithm), NOW)
    bob = jwt.encode({**GOOD, "sub": "bob"}, pem, algorithm=algorithm)
    assert "bob" == deaf(verifier).verify(bob, NOW).user


def test_an_unusual_spelling_is_pyjwts_matter() -> None:
    """Knowing the header, too: bits that mean nothing are refused, padding is not."""
    verifier = Verifier(SETTINGS)
    token = forged(GOOD)
    verifier.verify(token, NOW)
    # 32 bytes leave two of its bits unused: the letter after it says the same.
    alike = token[:-1] + chr(ord(token[-1]) + 1)
    assert base64.urlsafe_b64decode(token[-43:] + "=") == base64.urlsafe_b64decode(
        alike[-43:] + "="
    )
    with pytest.raises(AuthError):
        verifier.verify(alike, NOW)
    assert "ann" == verifier.verify(token + "=", NOW).user


def test_headers_of_refused_tokens_are_not_remembered() -> None:
    """Strangers leave nothing behind, so they cannot fill the memory either."""
    verifier = Verifier(SETTINGS)
    for number in range(50):
        with pytest.raises(AuthError):
            verifier.verify(forged(GOOD, {"alg": "HS256", "kid": str(number)}, "x" * 32), NOW)
    assert {} == verifier._signatures._known


def test_few_headers_are_remembered_and_the_oldest_goes() -> None:
    """A back end with ever new headers costs no memory, and its tokens stay good."""
    verifier = Verifier(SETTINGS)
    for number in range(50):
        token = forged(GOOD, {"alg": "HS256", "kid": str(number)})
        assert "ann" == verifier.verify(token, NOW).user
        assert min(number + 1, 16) == len(verifier._signatures._known)
        assert "ann" == verifier.verify(token, NOW).user
    deaf(verifier)
    for number in range(34, 50):
        token = forged(GOOD, {"alg": "HS256", "kid": str(number)})
        assert "ann" == verifier.verify(token, NOW).user
    with pytest.raises(AuthError):
        verifier.verify(forged(GOOD, {"alg": "HS256", "kid": "33"}), NOW)


@pytest.mark.parametrize("name", BAD)
def test_bad_tokens_are_invalid_after_a_good_one(name: str) -> None:
    """Knowing the header makes nothing good."""
    verifier = Verifier(SETTINGS)
    verifier.verify(forged(GOOD), NOW)
    with pytest.raises(AuthError) as caught:
        verifier.verify(BAD[name], NOW)
    assert "invalid" == caught.value.outcome


@pytest.mark.parametrize("when", EXPIRED)
def test_expired_tokens_are_expired_after_a_good_one(when: str) -> None:
    """Also with a header that is known."""
    verifier = Verifier(SETTINGS)
    verifier.verify(forged(GOOD), NOW)
    with pytest.raises(AuthError) as caught:
        verifier.verify(forged({**GOOD, "exp": EXPIRED[when]}), NOW)
    assert "expired" == caught.value.outcome
