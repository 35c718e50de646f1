"""Tokens: a table of hostile ones, and the right ones of every family."""

import hashlib
import hmac
from collections.abc import Callable
from pathlib import Path

import attrs
import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import x25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import settings as patience
from hypothesis import strategies as st

from tests.trioserver.token_table import (
    BAD,
    GOOD,
    KEYS,
    NOW,
    SECRET,
    SETTINGS,
    encoded,
    forged,
    pem_of,
    private_pem_of,
    strangers,
)
from trioserver.auth import MAX_TOKEN, Claims, Verifier, sign
from trioserver.errors import AuthError, SettingsError
from trioserver.grant import NO_GRANT, of_claim
from trioserver.settings import Settings


def with_key(tmp_path: Path, algorithm: str) -> Settings:
    """Return settings with the public key of an algorithm."""
    path = tmp_path / "key.pem"
    path.write_bytes(pem_of(KEYS[algorithm]))
    return Settings(jwt_public_key_file=path, jwt_algorithms=(algorithm,))


def test_a_good_token_names_its_user_and_its_end() -> None:
    """The claims come back as they were signed."""
    claims = Verifier(SETTINGS).verify(forged(GOOD), NOW)
    assert Claims(user="ann", expires_at=NOW + 60, jti="", issued_at=0.0) == claims


@pytest.mark.parametrize("jti", ["7", "a b", "x" * 256, "ä" * 128])
@pytest.mark.parametrize("issued_at", [-1.0, 0.5, NOW - 60, NOW + 30])
def test_a_token_may_have_a_name_and_an_age(jti: str, issued_at: float) -> None:
    """Both come back as they were signed; the issuer's clock may be ahead by the leeway."""
    claims = Verifier(SETTINGS).verify(forged({**GOOD, "jti": jti, "iat": issued_at}), NOW)
    assert (jti, issued_at) == (claims.jti, claims.issued_at)


@pytest.mark.parametrize("claim", [["news.**"], {"publish": ["room.*"], "join": ["status"]}])
def test_a_token_may_grant_topics(claim: object) -> None:
    """What it says about topics comes back as a grant; without a word it grants none."""
    verifier = Verifier(SETTINGS)
    claims = verifier.verify(forged({**GOOD, "topics": claim}), NOW)
    assert of_claim(msgspec.Raw(msgspec.json.encode(claim))) == claims.topics
    assert NO_GRANT is verifier.verify(forged(GOOD), NOW).topics


@pytest.mark.parametrize("claim", [7, "news.**", ["a b"], {"id": 7, "join": 7}, ["x"] * 65])
def test_a_claim_on_topics_that_is_none_locks_nobody_out(claim: object) -> None:
    """The token is good, grants no topics, and knows what is wrong."""
    claims = Verifier(SETTINGS).verify(forged({**GOOD, "topics": claim}), NOW)
    assert "ann" == claims.user
    assert claims.topics.problem
    assert attrs.evolve(NO_GRANT, problem=claims.topics.problem) == claims.topics


def test_a_token_with_topics_can_be_made() -> None:
    """What `sign` is given is what `Verifier` finds; what is no claim is not signed."""
    token = sign(SETTINGS, "ann", NOW + 60, topics={"subscribe": ["a.*"], "join": ("b",)})
    grant = Verifier(SETTINGS).verify(token, NOW).topics
    assert (("a.*",), (), ("b",)) == (grant.subscribe.texts, grant.publish.texts, grant.join)
    with pytest.raises(AuthError):
        sign(SETTINGS, "ann", NOW + 60, topics=["a b"])


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
        {"iat": NOW + 30},
        {"iat": 0},
        {"jti": ""},
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


@pytest.mark.parametrize("name", strangers("HS256"))
def test_strangers_with_a_secret_of_their_own_are_refused(name: str) -> None:
    """Whatever their header says about where the key is: nobody looks there."""
    verifier = Verifier(SETTINGS)
    for _ in range(2):
        with pytest.raises(AuthError) as caught:
            verifier.verify(strangers("HS256")[name], NOW)
        assert "invalid" == caught.value.outcome
        verifier.verify(forged(GOOD), NOW)


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_strangers_with_a_key_pair_of_their_own_are_refused(algorithm: str, tmp_path: Path) -> None:
    """Also when they send the public half along."""
    verifier = Verifier(with_key(tmp_path, algorithm))
    for name, token in strangers(algorithm).items():
        with pytest.raises(AuthError) as caught:
            verifier.verify(token, NOW)
        assert "invalid" == caught.value.outcome, name


@pytest.mark.parametrize("algorithms", [("HS256",), ("HS512", "HS256")])
def test_a_change_of_the_secret_locks_nobody_out(algorithms: tuple[str, ...]) -> None:
    """Tokens of both secrets are good in the overlap, in any order; afterwards one is not."""
    old, new = "o" * 64, "n" * 64
    before = Settings(jwt_secret_key=old, jwt_algorithms=algorithms)
    overlap = attrs.evolve(before, jwt_secret_key=new, jwt_secret_key_previous=old)
    after = attrs.evolve(before, jwt_secret_key=new)
    verifier = Verifier(overlap)
    tokens = [sign(settings, "ann", NOW + 60) for settings in (before, overlap, before, after)]
    assert ["ann"] * 40 == [verifier.verify(token, NOW).user for token in tokens * 10]
    with pytest.raises(AuthError):
        verifier.verify(forged(GOOD, secret="x" * 64), NOW)
    with pytest.raises(AuthError):
        Verifier(after).verify(tokens[0], NOW)


@pytest.mark.parametrize("name", BAD)
def test_bad_tokens_are_invalid_with_two_secrets(name: str) -> None:
    """The second chance is for another signature, for nothing else."""
    for first, second in ((SECRET, "o" * 32), ("o" * 32, SECRET)):
        settings = attrs.evolve(SETTINGS, jwt_secret_key=first, jwt_secret_key_previous=second)
        with pytest.raises(AuthError) as caught:
            Verifier(settings).verify(BAD[name], NOW)
        assert "invalid" == caught.value.outcome


def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a function that tells how many signatures have been checked with a secret."""
    checks = []
    verify = jwt.algorithms.HMACAlgorithm.verify

    def count(self: jwt.algorithms.HMACAlgorithm, msg: bytes, key: bytes, sig: bytes) -> bool:
        checks.append(key)
        return verify(self, msg, key, sig)

    monkeypatch.setattr(jwt.algorithms.HMACAlgorithm, "verify", count)
    return lambda: len(checks)


def test_a_wrong_signature_costs_one_check_per_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a header that is known or not; a good one costs no more than its own needs."""
    count = counted(monkeypatch)
    wrong = forged(GOOD, secret="x" * 32)
    for previous, most in ((None, 1), (SECRET, 1), ("o" * 32, 2)):
        verifier = Verifier(attrs.evolve(SETTINGS, jwt_secret_key_previous=previous))
        for token, expected in ((wrong, most), (forged(GOOD), 1), (wrong, most)):
            before = count()
            try:
                verifier.verify(token, NOW)
            except AuthError:
                assert wrong is token
            assert expected == count() - before
    before = count()
    with pytest.raises(AuthError):
        verifier.verify(forged(GOOD, {"alg": "none"}), NOW)
    assert before == count()


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
    with pytest.raises(SettingsError, match="JWT_SECRET_KEY_PREVIOUS"):
        Verifier(attrs.evolve(SETTINGS, jwt_secret_key_previous=secret))


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


@patience(deadline=None)
@given(
    st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=30)
)
def test_signed_tokens_are_accepted(user: str) -> None:
    """What gentoken makes, the server takes, with audience and issuer set or not."""
    for settings in (SETTINGS, attrs.evolve(SETTINGS, jwt_audience="us", jwt_issuer="them")):
        claims = Verifier(settings).verify(sign(settings, user, NOW + 60.9), NOW)
        assert Claims(user=user, expires_at=NOW + 60) == claims
        named = sign(settings, user, NOW + 60, jti="j", issued_at=NOW - 0.25)
        claims = Verifier(settings).verify(named, NOW)
        assert ("j", NOW - 0.25) == (claims.jti, claims.issued_at)


def test_tokens_can_be_made_only_where_the_secret_is(tmp_path: Path) -> None:
    """With a public key there is nothing to sign with, and a bad user is no user."""
    with pytest.raises(SettingsError, match="secret"):
        sign(with_key(tmp_path, "RS256"), "ann", NOW)
    with pytest.raises(SettingsError, match="secret"):
        sign(Settings(jwt_secret_key=None), "ann", NOW)
    for user in ("", "a\nb", "x" * 129):
        with pytest.raises(AuthError):
            sign(SETTINGS, user, NOW)
    with pytest.raises(AuthError):
        sign(SETTINGS, "ann", NOW, jti="x" * 257)


@patience(deadline=None)
@given(st.text() | st.binary(max_size=MAX_TOKEN).map(lambda data: data.decode("latin-1")))
def test_random_tokens_raise_nothing_but_an_auth_error(token: str) -> None:
    """Whatever the characters."""
    with pytest.raises(AuthError):
        Verifier(SETTINGS).verify(token, NOW)


@patience(deadline=None)
@given(st.binary(max_size=200), st.binary(max_size=200))
def test_random_parts_with_a_right_signature_raise_nothing_but_an_auth_error(
    header: bytes, claims: bytes
) -> None:
    """Even the holder of the key cannot make the verifier stumble."""
    for token in (forged(claims), forged(GOOD, header)):
        with pytest.raises(AuthError):
            Verifier(SETTINGS).verify(token, NOW)


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
