"""Who signed it: headers that are judged once, keys of an issuer, and which key comes first."""

import base64
import gc
import json
from pathlib import Path

import attrs
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from tests.trioserver.token_table import (
    BAD,
    GOOD,
    KEYS,
    NOW,
    SECRET,
    STRANGE,
    PrivateKey,
    forged,
    pem_of,
    private_pem_of,
    strangers,
)
from trioserver.auth import Verifier
from trioserver.errors import AuthError, SettingsError
from trioserver.jwks import Keyring, Pace, key_set
from trioserver.settings import Settings
from trioserver.signatures import Signatures


def one(secret: str = SECRET, algorithms: tuple[str, ...] = ("HS256",)) -> Signatures:
    """Return the signatures of one secret."""
    return Signatures(secret, algorithms)


def of_public_key(algorithm: str) -> Signatures:
    """Return the signatures of the key pair for an algorithm."""
    key = KEYS[algorithm].public_key()
    return Signatures(key, (algorithm,))


def deaf(signatures: Signatures) -> Signatures:
    """Return them without anybody to ask about headers that they do not know."""
    signatures._jws = jwt.PyJWS(algorithms=[])
    return signatures


def user_of(payload: bytes) -> object:
    """Return whose token it was."""
    return json.loads(payload)["sub"]


@pytest.mark.parametrize("algorithms", [("HS256",), ("HS512", "HS256")])
def test_a_header_is_judged_once(algorithms: tuple[str, ...]) -> None:
    """Tokens with the header of an accepted one are verified without parsing it again."""
    signatures = one(SECRET * 2, algorithms)
    for name in algorithms:
        signatures.payload(jwt.encode(GOOD, SECRET * 2, algorithm=name))
    deaf(signatures)
    for name in algorithms:
        bob = jwt.encode({**GOOD, "sub": "bob"}, SECRET * 2, algorithm=name)
        assert "bob" == user_of(signatures.payload(bob))
        assert signatures.knows(bob.partition(".")[0])
    other = forged(GOOD, {"alg": "HS256", "kid": "x"}, SECRET * 2)
    assert not signatures.knows(other.partition(".")[0])
    with pytest.raises(jwt.PyJWTError):
        signatures.payload(other)


@pytest.mark.parametrize("algorithm", KEYS)
def test_a_header_is_judged_once_with_public_keys(algorithm: str) -> None:
    """The same for the other families."""
    pem = private_pem_of(KEYS[algorithm])
    signatures = of_public_key(algorithm)
    signatures.payload(jwt.encode(GOOD, pem, algorithm=algorithm))
    bob = jwt.encode({**GOOD, "sub": "bob"}, pem, algorithm=algorithm)
    assert "bob" == user_of(deaf(signatures).payload(bob))


def test_an_unusual_spelling_is_pyjwts_matter() -> None:
    """Knowing the header, too: bits that mean nothing are refused, padding is not."""
    signatures = one()
    token = forged(GOOD)
    signatures.payload(token)
    # 32 bytes leave two of its bits unused: the letter after it says the same.
    alike = token[:-1] + chr(ord(token[-1]) + 1)
    assert base64.urlsafe_b64decode(token[-43:] + "=") == base64.urlsafe_b64decode(
        alike[-43:] + "="
    )
    with pytest.raises(jwt.PyJWTError):
        signatures.payload(alike)
    assert "ann" == user_of(signatures.payload(token + "="))


def test_headers_of_refused_tokens_are_not_remembered() -> None:
    """Strangers leave nothing behind, so they cannot fill the memory either."""
    signatures = one()
    for number in range(50):
        with pytest.raises(jwt.InvalidSignatureError):
            signatures.payload(forged(GOOD, {"alg": "HS256", "kid": str(number)}, "x" * 32))
    assert {} == signatures._known


def test_few_headers_are_remembered_and_the_oldest_goes() -> None:
    """A back end with ever new headers costs no memory, and its tokens stay good."""
    signatures = one()
    for number in range(50):
        token = forged(GOOD, {"alg": "HS256", "kid": str(number)})
        assert "ann" == user_of(signatures.payload(token))
        assert min(number + 1, 16) == len(signatures._known)
        assert "ann" == user_of(signatures.payload(token))
    deaf(signatures)
    for number in range(34, 50):
        token = forged(GOOD, {"alg": "HS256", "kid": str(number)})
        assert "ann" == user_of(signatures.payload(token))
    with pytest.raises(jwt.PyJWTError):
        signatures.payload(forged(GOOD, {"alg": "HS256", "kid": "33"}))


# Keys of an issuer.


def document(**keys: PrivateKey) -> bytes:
    """Return a key set with the public halves, each under its name."""
    entries = []
    for kid, key in keys.items():
        algorithm = next(name for name in ("RS256", "ES256", "EdDSA") if fits(key, name))
        jwk = jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key(), as_dict=True)
        entries.append({**jwk, "kid": kid})
    return json.dumps({"keys": entries}).encode()


def fits(key: PrivateKey, algorithm: str) -> bool:
    """Tell whether a key is for this algorithm."""
    return type(key) is type(KEYS[algorithm])


def signed(key: PrivateKey, algorithm: str, kid: str | None, user: str = "ann") -> str:
    """Return a token of an issuer."""
    headers = None if kid is None else {"kid": kid}
    pem = private_pem_of(key)
    return jwt.encode({**GOOD, "sub": user}, pem, algorithm=algorithm, headers=headers)


@attrs.define(eq=False)
class Stage:
    """A verifier with the keys of an issuer, and a clock that stands still."""

    algorithm: str = "ES256"
    own: Path | None = None
    """A key in a file beside them."""
    audience: str | None = None
    now: float = 1000.0
    wishes: int = 0
    keyring: Keyring = attrs.field(init=False)
    verifier: Verifier = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        algorithms = (self.algorithm,)
        self.keyring = Keyring(algorithms, Pace(), lambda: self.now)
        self.keyring.on_wanted = self.wish
        settings = Settings(
            jwt_algorithms=algorithms,
            jwt_jwks_url="https://login.example.com/keys",
            jwt_public_key_file=self.own,
            jwt_audience=self.audience,
        )
        self.verifier = Verifier(settings, self.keyring)

    def wish(self) -> None:
        """Note that a fetch is wanted."""
        self.wishes += 1

    def fetched(self, **keys: PrivateKey) -> None:
        """Let a fetch bring these keys."""
        self.keyring.began(self.now)
        self.keyring.succeeded(key_set(document(**keys), (self.algorithm,)), self.now)

    def good(self, token: str) -> bool:
        """Tell whether a token is accepted; else it is invalid."""
        refusal: AuthError | None = None
        try:
            self.verifier.verify(token, NOW)
        except AuthError as error:
            refusal = error
        if refusal is not None:
            assert ("invalid", 0) == (refusal.outcome, refusal.retry_after)
        return refusal is None

    def pending(self, token: str) -> int:
        """Return after how many seconds a token may be good."""
        with pytest.raises(AuthError) as caught:
            self.verifier.verify(token, NOW)
        assert "unknown_key" == caught.value.outcome
        return caught.value.retry_after


@pytest.mark.parametrize("algorithm", STRANGE)
def test_an_issuers_key_verifies_its_own_tokens(algorithm: str) -> None:
    """With its name, and without one where there is no other key; and nobody else's tokens."""
    stage = Stage(algorithm)
    stage.fetched(k=KEYS[algorithm])
    for kid in ("k", None):
        for user in ("ann", "bob"):
            token = signed(KEYS[algorithm], algorithm, kid, user)
            assert user == stage.verifier.verify(token, NOW).user
        assert not stage.good(signed(STRANGE[algorithm], algorithm, kid))
    for text in (pem_of(KEYS[algorithm]), pem_of(KEYS[algorithm]).strip()):
        assert not stage.good(forged(GOOD, {"alg": "HS256", "kid": "k"}, text))
        assert not stage.good(forged(GOOD, {"alg": algorithm, "kid": "k"}, text))


def test_a_header_is_judged_once_with_an_issuers_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with any other key, until there is a newer set."""
    stage = Stage()
    stage.fetched(k=KEYS["ES256"])
    ann, bob = (signed(KEYS["ES256"], "ES256", "k", user) for user in ("ann", "bob"))
    assert stage.good(ann)
    with monkeypatch.context() as patch:
        patch.delattr(jwt.PyJWS, "decode_complete")
        assert stage.good(bob)
    stage.fetched(k=KEYS["ES256"])
    assert stage.good(bob)


def test_headers_that_nobody_of_the_issuers_has_signed_are_not_remembered() -> None:
    """However many strangers come first, the issuer's header is read only once."""
    stage = Stage()
    stage.fetched(k=KEYS["ES256"])
    for number in range(80):
        headers = {"kid": "k", "x": number}
        pem = private_pem_of(STRANGE["ES256"])
        assert not stage.good(jwt.encode(GOOD, pem, algorithm="ES256", headers=headers))
    assert {} == stage.keyring._by_header
    token = signed(KEYS["ES256"], "ES256", "k")
    assert stage.good(token)
    assert [token.partition(".")[0]] == list(stage.keyring._by_header)


class TestAudience:
    """An issuer signs for many applications; which of them is this one?"""

    @staticmethod
    def token(audience: object, key: PrivateKey, kid: str | None = "k") -> str:
        """Return a token for somebody."""
        claims = {**GOOD, "aud": audience}
        headers = None if kid is None else {"kid": kid}
        return jwt.encode(claims, private_pem_of(key), algorithm="ES256", headers=headers)

    @pytest.mark.parametrize("audience", ["shop", ["shop", "us"], "", []])
    def test_what_is_for_somebody_is_refused_where_nobody_is_named(self, audience: object) -> None:
        """Without JWT_AUDIENCE no token can be for us; what is for nobody in particular is good."""
        stage = Stage()
        stage.fetched(k=KEYS["ES256"])
        assert not stage.good(self.token(audience, KEYS["ES256"]))
        assert stage.good(signed(KEYS["ES256"], "ES256", "k"))

    def test_what_is_for_us_is_good(self) -> None:
        """With JWT_AUDIENCE the token has to name it, as everywhere."""
        stage = Stage(audience="us")
        stage.fetched(k=KEYS["ES256"])
        assert stage.good(self.token(["shop", "us"], KEYS["ES256"]))
        assert not stage.good(self.token("shop", KEYS["ES256"]))
        assert not stage.good(signed(KEYS["ES256"], "ES256", "k"))

    def test_the_files_key_is_our_own_back_ends(self, tmp_path: Path) -> None:
        """Nobody else has it, so its tokens are for us, whatever they say."""
        own = tmp_path / "own.pem"
        own.write_bytes(pem_of(STRANGE["ES256"]))
        stage = Stage(own=own)
        stage.fetched(k=KEYS["ES256"])
        for kid in ("k", "own", None):
            assert stage.good(self.token("shop", STRANGE["ES256"], kid)), kid
            assert not stage.good(self.token("shop", KEYS["ES256"], "k"))


@pytest.mark.parametrize("algorithm", STRANGE)
def test_an_issuers_key_is_checked_like_any_other(algorithm: str) -> None:
    """What is bad without an issuer is bad with one, and nobody is asked because of it."""
    stage = Stage(algorithm)
    stage.fetched(k=KEYS[algorithm])
    assert [] == [name for name, token in BAD.items() if stage.good(token)]
    assert 0 == stage.wishes
    for name, token in strangers(algorithm).items():
        with pytest.raises(AuthError) as caught:
            stage.verifier.verify(token, NOW)
        assert caught.value.outcome in {"invalid", "unknown_key"}, name


def test_a_brand_new_key_is_no_refusal() -> None:
    """Its tokens are told to come again, and then they are good; those of before stay good."""
    stage = Stage()
    old, new = KEYS["ES256"], STRANGE["ES256"]
    old_token, new_token = signed(old, "ES256", "old"), signed(new, "ES256", "new")
    assert 0 < stage.pending(old_token)
    stage.fetched(old=old)
    assert stage.good(old_token)
    assert 10 <= stage.pending(new_token) <= 12
    assert 2 == stage.wishes
    stage.now += 10
    stage.keyring.began(stage.now)
    assert 2 == stage.pending(new_token)
    stage.fetched(old=old, new=new)
    assert stage.good(new_token)
    assert stage.good(old_token)


def test_a_withdrawn_key_is_gone_at_once() -> None:
    """Its tokens are refused, although their header has been good before."""
    stage = Stage()
    old, new = KEYS["ES256"], STRANGE["ES256"]
    stage.fetched(old=old, new=new)
    token = signed(old, "ES256", "old")
    assert stage.good(token)
    stage.now += 300
    stage.fetched(new=new)
    stage.pending(token)
    stage.now += 10
    stage.fetched(new=new)
    assert not stage.good(token)


def test_another_key_under_the_same_name_replaces_the_one_before() -> None:
    """What was remembered of the old one does not count for it, nor the other way round."""
    stage = Stage()
    old, new = KEYS["ES256"], STRANGE["ES256"]
    stage.fetched(k=old)
    assert stage.good(signed(old, "ES256", "k"))
    stage.fetched(k=new)
    assert not stage.good(signed(old, "ES256", "k"))
    assert stage.good(signed(new, "ES256", "k"))


def test_keys_stay_good_while_the_issuer_is_away() -> None:
    """For a day; then their tokens are not refused but told to come again."""
    stage = Stage()
    stage.fetched(k=KEYS["ES256"])
    token = signed(KEYS["ES256"], "ES256", "k")
    for _ in range(100):
        stage.now += 860
        stage.keyring.began(stage.now)
        stage.keyring.failed(stage.now)
        assert stage.good(token)
    stage.now += 400
    assert 0 < stage.pending(token)


def test_keys_of_sets_that_are_gone_are_let_go() -> None:
    """A thousand refreshes leave no more behind than one."""
    stage = Stage()
    source = stage.verifier._signed
    for _ in range(20):
        stage.fetched(a=KEYS["ES256"], b=STRANGE["ES256"])
        assert stage.good(signed(KEYS["ES256"], "ES256", "a"))
        assert stage.good(signed(STRANGE["ES256"], "ES256", "b"))
    gc.collect()
    assert 2 == len(source._by_key)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("algorithm", "kid"), [("HS256", "x"), ("RS256", "x"), ("none", "x"), ("", "x"), ("ES384", "k")]
)
def test_tokens_that_no_key_could_be_for_ask_nobody(algorithm: str, kid: str) -> None:
    """The algorithm is not among the configured ones: refused, with keys or without."""
    stage = Stage()
    token = forged(GOOD, {"alg": algorithm, "kid": kid})
    assert not stage.good(token)
    stage.fetched(k=KEYS["ES256"])
    assert not stage.good(token)
    assert 0 == stage.wishes


class TestBesideAFile:
    """An issuer's keys and a key from a file."""

    @pytest.fixture
    def stage(self, tmp_path: Path) -> Stage:
        """Both; the file has the key that is no issuer's."""
        path = tmp_path / "own.pem"
        path.write_bytes(pem_of(KEYS["ES256"]))
        return Stage(own=path)

    @pytest.mark.parametrize("kid", [None, "own", "k"])
    def test_the_files_key_is_good_whatever_its_name(self, stage: Stage, kid: str | None) -> None:
        """Before the first fetch, and with the name of another: and nobody is asked for it."""
        token = signed(KEYS["ES256"], "ES256", kid)
        assert stage.good(token)
        stage.fetched(k=STRANGE["ES256"])
        for _ in range(3):
            assert stage.good(token)
            assert stage.good(signed(STRANGE["ES256"], "ES256", kid if kid != "own" else "k"))
        assert 0 == stage.wishes

    def test_both_are_good_and_nobody_else(self, stage: Stage) -> None:
        """A third key with a name that is taken is refused, with another it has to wait."""
        stage.fetched(k=STRANGE["ES256"])
        third = private_key()
        for kid in ("k", None):
            assert stage.good(signed(STRANGE["ES256"], "ES256", kid))
            assert not stage.good(signed(third, "ES256", kid))
        assert 0 == stage.wishes
        assert 0 < stage.pending(signed(third, "ES256", "third"))
        assert 1 == stage.wishes
        stage.fetched(k=STRANGE["ES256"], third=third)
        assert stage.good(signed(third, "ES256", "third"))

    def test_a_known_header_costs_one_check(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whichever of the two keys a token is signed with, if its name tells them apart."""
        checks = []
        verify = jwt.algorithms.ECAlgorithm.verify

        def count(
            self: jwt.algorithms.ECAlgorithm, msg: bytes, key: EllipticCurvePublicKey, sig: bytes
        ) -> bool:
            checks.append(key)
            return verify(self, msg, key, sig)

        stage.fetched(k=STRANGE["ES256"])
        tokens = [
            signed(KEYS["ES256"], "ES256", "own"),
            signed(KEYS["ES256"], "ES256", None),
            signed(STRANGE["ES256"], "ES256", "k"),
        ]
        assert all(map(stage.good, tokens))
        monkeypatch.setattr(jwt.algorithms.ECAlgorithm, "verify", count)
        assert all(map(stage.good, tokens))
        assert 3 == len(checks)

    def test_the_issuers_tokens_wait_for_the_first_fetch(self, stage: Stage) -> None:
        """They are not refused because the key in the file is another."""
        assert 0 < stage.pending(signed(STRANGE["ES256"], "ES256", "k"))

    def test_bad_tokens_are_bad(self, stage: Stage) -> None:
        """With two sources there are no more ways in, and nobody is asked."""
        stage.fetched(k=STRANGE["ES256"])
        assert [] == [name for name, token in BAD.items() if stage.good(token)]
        assert 0 == stage.wishes


def private_key() -> PrivateKey:
    """Return a new key on P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def test_an_issuer_without_a_keyring_is_a_settings_error(tmp_path: Path) -> None:
    """Nobody would ever be let in; where a key is in a file, that one is good."""
    settings = Settings(jwt_algorithms=("ES256",), jwt_jwks_url="https://login.example.com/keys")
    with pytest.raises(SettingsError, match="JWT_JWKS_URL"):
        Verifier(settings)
    path = tmp_path / "own.pem"
    path.write_bytes(pem_of(KEYS["ES256"]))
    verifier = Verifier(attrs.evolve(settings, jwt_public_key_file=path))
    assert "ann" == verifier.verify(signed(KEYS["ES256"], "ES256", None), NOW).user
