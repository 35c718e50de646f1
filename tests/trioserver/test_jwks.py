"""Keys of an issuer: which are keys, when it is asked, and what is answered meanwhile."""

import base64
import json
import math
from collections.abc import Callable, Mapping

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from hypothesis import given
from hypothesis import settings as patience
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from trioserver.errors import AuthError
from trioserver.jwks import (
    MAX_ASKED,
    MAX_DOCUMENT,
    MAX_KEYS,
    Keyring,
    KeySet,
    KeySetError,
    NoKey,
    Pace,
    key_set,
)

ALL = ("RS256", "RS512", "ES256", "ES384", "ES512", "EdDSA")
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())
EC384 = ec.generate_private_key(ec.SECP384R1())
EC521 = ec.generate_private_key(ec.SECP521R1())
ED = ed25519.Ed25519PrivateKey.generate()
ED448 = ed448.Ed448PrivateKey.generate()
Jwk = dict[str, object]


def rsa_jwk(key: rsa.RSAPrivateKey | rsa.RSAPublicKey, **more: object) -> Jwk:
    """Return an RSA key as a JWK."""
    return {**jwt.algorithms.RSAAlgorithm.to_jwk(key, as_dict=True), **more}


def ec_jwk(key: ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey, **more: object) -> Jwk:
    """Return a key on a curve as a JWK."""
    return {**jwt.algorithms.ECAlgorithm.to_jwk(key, as_dict=True), **more}


def ed_jwk(key: ed25519.Ed25519PublicKey | ed448.Ed448PublicKey, **more: object) -> Jwk:
    """Return an Edwards key as a JWK."""
    return {**jwt.algorithms.OKPAlgorithm.to_jwk(key, as_dict=True), **more}


PUBLIC: Jwk = rsa_jwk(RSA.public_key(), kid="rsa")


def document(*keys: Mapping[str, object]) -> bytes:
    """Return a key set."""
    return json.dumps({"keys": keys}).encode()


def without(key: Jwk, *names: str) -> Jwk:
    """Return a key without some members."""
    return {name: value for name, value in key.items() if name not in names}


class TestKeySet:
    """A document in, keys out."""

    @pytest.mark.parametrize(
        ("key", "algorithm"),
        [
            (rsa_jwk(RSA.public_key()), "RS256"),
            (rsa_jwk(RSA.public_key(), alg="RS512"), "RS512"),
            (rsa_jwk(RSA.public_key(), use="sig", alg="RS256", x5c=["..."]), "RS256"),
            (without(rsa_jwk(RSA.public_key()), "key_ops"), "RS256"),
            (ec_jwk(EC.public_key()), "ES256"),
            (ec_jwk(EC.public_key(), alg="ES256"), "ES256"),
            (ec_jwk(EC384.public_key()), "ES384"),
            (ec_jwk(EC521.public_key()), "ES512"),
            (ed_jwk(ED.public_key()), "EdDSA"),
            (ed_jwk(ED448.public_key()), "EdDSA"),
        ],
    )
    def test_the_key_fixes_the_algorithm(self, key: Jwk, algorithm: str) -> None:
        """By name, by curve, or for RSA by the first that is configured."""
        keys = key_set(document({**key, "kid": "k"}), ALL)
        assert ["k"] == list(keys.keys)
        assert algorithm == keys.keys["k"].algorithm_name
        assert () == keys.skipped

    @pytest.mark.parametrize(
        ("key", "why"),
        [
            ({"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"}, "no public key"),
            ({"kty": "oct", "k": "c2VjcmV0", "alg": "RS256"}, "no public key"),
            ({}, "no public key"),
            ({"kty": ["RSA"]}, "no public key"),
            (rsa_jwk(RSA), "private half"),
            (ec_jwk(EC), "private half"),
            ({**PUBLIC, "use": "enc"}, "not for signatures"),
            ({**PUBLIC, "use": None}, "not for signatures"),
            ({**PUBLIC, "key_ops": ["encrypt"]}, "not for signatures"),
            ({**PUBLIC, "key_ops": "verify"}, "not for signatures"),
            ({**PUBLIC, "alg": "RS384"}, "JWT_ALGORITHMS"),
            ({**PUBLIC, "alg": "HS256"}, "JWT_ALGORITHMS"),
            ({**PUBLIC, "alg": "none"}, "JWT_ALGORITHMS"),
            ({**PUBLIC, "alg": "ES256"}, "JWT_ALGORITHMS"),
            ({**PUBLIC, "alg": ["RS256"]}, "JWT_ALGORITHMS"),
            ({**PUBLIC, "alg": 1}, "JWT_ALGORITHMS"),
            (ec_jwk(EC.public_key(), alg="ES384"), "JWT_ALGORITHMS"),
            (ec_jwk(EC.public_key(), alg="RS256"), "JWT_ALGORITHMS"),
            (ec_jwk(EC.public_key(), crv="secp256k1"), "JWT_ALGORITHMS"),
            (ec_jwk(EC.public_key(), crv=["P-256"]), "JWT_ALGORITHMS"),
            (ec_jwk(EC.public_key(), crv="P-384"), "cannot be read"),
            (ec_jwk(EC.public_key(), y="AAAA"), "cannot be read"),
            (ed_jwk(ED.public_key(), crv="X25519"), "JWT_ALGORITHMS"),
            ({**PUBLIC, "n": 5}, "cannot be read"),
            ({**PUBLIC, "n": "!"}, "cannot be read"),
            ({**PUBLIC, "e": "AA"}, "cannot be read"),
            (without(PUBLIC, "n"), "cannot be read"),
            (
                rsa_jwk(
                    rsa.generate_private_key(public_exponent=65537, key_size=1024).public_key()
                ),
                "1024 bits",
            ),
            ({**PUBLIC, "n": "_" * 4000}, "24000 bits"),
            ({**PUBLIC, "kid": 1}, "its name"),
            ({**PUBLIC, "kid": None}, "its name"),
            ({**PUBLIC, "kid": "x" * 257}, "its name"),
        ],
    )
    def test_what_is_no_key_is_skipped(self, key: Jwk, why: str) -> None:
        """The others are still good, and the log can say why this one is not."""
        good = ec_jwk(EC.public_key(), kid="good")
        keys = key_set(document({"kid": "bad", **key}, good), ALL)
        assert ["good"] == list(keys.keys)
        assert 1 == len(keys.skipped)
        assert why in keys.skipped[0]
        assert len(keys.skipped[0]) < 200
        with pytest.raises(KeySetError, match="no usable key"):
            key_set(document({"kid": "bad", **key}), ALL)

    def test_an_algorithm_that_is_not_configured_makes_no_key(self) -> None:
        """RSA has none where only curves are wanted."""
        with pytest.raises(KeySetError, match="JWT_ALGORITHMS"):
            key_set(document(PUBLIC), ("ES256",))
        with pytest.raises(KeySetError, match="JWT_ALGORITHMS"):
            key_set(document(ec_jwk(EC.public_key())), ("RS256", "ES384"))

    def test_of_two_with_one_name_the_first_is_meant(self) -> None:
        """And the second is said to be too many."""
        keys = key_set(document(PUBLIC, ec_jwk(EC.public_key(), kid="rsa")), ALL)
        assert "RS256" == keys.keys["rsa"].algorithm_name
        assert ("'rsa': another one has its name",) == keys.skipped

    def test_as_many_keys_as_are_allowed_are_read(self) -> None:
        """And not one is skipped."""
        keys = key_set(document(*[{**PUBLIC, "kid": str(n)} for n in range(MAX_KEYS)]), ALL)
        assert (MAX_KEYS, ()) == (len(keys.keys), keys.skipped)

    def test_a_key_without_a_name_is_for_tokens_without_one(self) -> None:
        """If it is the only one; among several nobody knows which is meant."""
        nameless = without(PUBLIC, "kid")
        alone = key_set(document(nameless), ALL)
        assert alone.keys[""] is alone.find("")
        assert alone.find("rsa") is None
        named = key_set(document(PUBLIC), ALL)
        assert named.keys["rsa"] is named.find("")
        several = key_set(document(nameless, ec_jwk(EC.public_key(), kid="ec")), ALL)
        assert several.find("") is None
        assert several.keys["ec"] is several.find("ec")

    @pytest.mark.parametrize(
        "text",
        [
            *(b"", b"{", b"[]", b"null", b"{}", b'{"keys":{}}', b'{"keys":[1]}', b'{"keys":[]}'),
            *(b'{"keys":null}', b"\xff", b'{"keys":[{"kty":"\xff"}]}', b"<html>", b"[" * 100_000),
            b'{"keys":[{"kty":' + b"[" * 50_000 + b"]" * 50_000 + b"}]}",
            document(PUBLIC) + b" " * MAX_DOCUMENT,
            document(*[{**PUBLIC, "kid": str(number)} for number in range(MAX_KEYS + 1)]),
        ],
    )
    def test_what_is_no_key_set_is_an_error(self, text: bytes) -> None:
        """One line for the log, nothing else."""
        with pytest.raises(KeySetError) as caught:
            key_set(text, ALL)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000

    @patience(deadline=None)
    @given(
        st.dictionaries(
            st.sampled_from(["kty", "alg", "use", "kid", "n", "e", "crv", "x", "y", "key_ops"]),
            st.sampled_from(["RSA", "EC", "OKP", "P-256", "Ed25519", "RS256", "sig", "AQAB"])
            | st.text(max_size=9)
            | st.integers()
            | st.none()
            | st.lists(st.text(max_size=3), max_size=2),
        )
    )
    def test_any_members_are_a_key_or_skipped(self, members: Jwk) -> None:
        """Two libraries at somebody else's numbers: nothing else is raised."""
        for base in (PUBLIC, ec_jwk(EC.public_key()), ed_jwk(ED.public_key()), {}):
            good = ec_jwk(EC.public_key(), kid="good")
            keys = key_set(document({**base, **members}, good), ALL)
            assert 2 == len(keys.keys) + len(keys.skipped)

    @patience(deadline=None)
    @given(st.binary(max_size=200))
    def test_any_bytes_are_a_key_set_or_an_error(self, text: bytes) -> None:
        """Whatever the issuer's server says."""
        with pytest.raises(KeySetError):
            key_set(text, ALL)


OLD = key_set(document(ec_jwk(EC.public_key(), kid="old")), ALL)
BOTH = key_set(
    document(ec_jwk(EC.public_key(), kid="old"), ed_jwk(ED.public_key(), kid="new")), ALL
)
NEW = key_set(document(ed_jwk(ED.public_key(), kid="new")), ALL)
PACE = Pace(refresh=300.0, retry=10.0, lifetime=3600.0)


def token(kid: str | None = "old") -> str:
    """Return something whose header names a key; the rest is for others to look at."""
    headers = None if kid is None else {"kid": kid}
    return jwt.encode({"sub": "ann"}, ED, algorithm="EdDSA", headers=headers)


def loaded(keys: KeySet = OLD, now: float = 0.0) -> Keyring:
    """Return a keyring that has just fetched ``keys``."""
    keyring = Keyring(ALL, PACE)
    keyring.began(now)
    keyring.succeeded(keys, now)
    return keyring


class TestKeyring:
    """When the issuer is asked, and what is answered meanwhile."""

    def test_before_the_first_fetch_everybody_is_to_come_again(self) -> None:
        """It is due at once, and nobody's token is called bad."""
        keyring = Keyring(ALL, PACE)
        assert -math.inf == keyring.due_at
        assert not keyring.usable(0.0)
        answer = keyring.key_for(token(), 0.0)
        assert isinstance(answer, NoKey)
        assert 0 < answer.retry_after <= 3

    def test_a_known_key_is_there(self) -> None:
        """Also for the second token with the same header, and for one without a name."""
        keyring = loaded()
        for _ in range(3):
            assert OLD.keys["old"] is keyring.key_for(token(), 1.0)
        assert OLD.keys["old"] is keyring.key_for(token(None), 1.0)
        assert keyring.usable(1.0)

    def test_verification_is_with_the_keys_own_algorithm(self) -> None:
        """What comes back verifies what the issuer has signed, and nothing else."""
        keyring = loaded(BOTH)
        key = keyring.key_for(token("new"), 1.0)
        assert isinstance(key, jwt.PyJWK)
        decoded = jwt.PyJWS().decode(token("new"), key, algorithms=list(ALL))
        assert {"sub": "ann"} == json.loads(decoded)
        wrong = keyring.key_for(token("old"), 1.0)
        assert isinstance(wrong, jwt.PyJWK)
        with pytest.raises(jwt.InvalidAlgorithmError):
            jwt.PyJWS().decode(token("old"), wrong, algorithms=list(ALL))

    def test_refreshing_is_regular(self) -> None:
        """After a success the next fetch is due after the refresh time."""
        assert 305.0 == loaded(now=5.0).due_at

    def test_failures_are_tried_again_less_and_less_often(self) -> None:
        """From the retry time doubling up to the refresh time; a success ends it."""
        keyring = loaded()
        waits = []
        for _ in range(8):
            now = keyring.due_at
            keyring.began(now)
            keyring.failed(now)
            waits.append(keyring.due_at - now)
        assert [10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0, 300.0] == waits
        assert 8 == keyring.failures
        keyring.began(5000.0)
        keyring.succeeded(OLD, 5000.0)
        assert (0, 5300.0) == (keyring.failures, keyring.due_at)
        for _ in range(2000):
            keyring.began(5000.0)
            keyring.failed(5000.0)
        assert 5300.0 == keyring.due_at

    def test_keys_stay_good_while_the_issuer_is_away(self) -> None:
        """For their lifetime, not a moment longer, and an hour of failures changes nothing."""
        keyring = loaded()
        for now in range(300, 3600, 300):
            keyring.began(float(now))
            keyring.failed(float(now))
            assert OLD.keys["old"] is keyring.key_for(token(), now + 299.0)
        assert not keyring.usable(3600.0)
        assert isinstance(keyring.key_for(token(), 3600.0), NoKey)
        keyring.began(3700.0)
        keyring.succeeded(OLD, 3700.0)
        assert OLD.keys["old"] is keyring.key_for(token(), 3700.0)

    def test_a_key_that_is_withdrawn_is_gone_at_once(self) -> None:
        """Also for tokens whose header was seen before."""
        keyring = loaded(BOTH)
        assert isinstance(keyring.key_for(token("old"), 1.0), jwt.PyJWK)
        keyring.began(300.0)
        keyring.succeeded(NEW, 300.0)
        assert isinstance(keyring.key_for(token("old"), 300.0), NoKey)
        assert NEW.keys["new"] is keyring.key_for(token("new"), 300.0)

    def test_in_the_overlap_of_a_rotation_nobody_is_refused(self) -> None:
        """Both keys are good while both are published."""
        keyring = loaded(OLD)
        for keys, good in ((BOTH, {"old", "new"}), (NEW, {"new"})):
            keyring.began(keyring.due_at)
            keyring.succeeded(keys, keyring.due_at)
            for kid in ("old", "new"):
                found = keyring.key_for(token(kid), keyring.due_at)
                assert (kid in good) == isinstance(found, jwt.PyJWK)

    def test_an_unknown_key_is_asked_for_before_it_is_denied(self) -> None:
        """The client is to come again, and then the key is there."""
        keyring = loaded(OLD)
        called: list[float] = []
        keyring.on_wanted = lambda: called.append(keyring.due_at)

        assert NoKey(9 + 2) == keyring.key_for(token("new"), 1.0)
        assert [10.0] == called
        keyring.began(10.0)
        assert NoKey(2) == keyring.key_for(token("new"), 10.0)
        keyring.succeeded(BOTH, 10.2)

        assert BOTH.keys["new"] is keyring.key_for(token("new"), 10.3)

    def test_a_key_that_the_issuer_does_not_have_is_denied(self) -> None:
        """For a while, then it is asked for again: it may have come."""
        keyring = loaded(OLD)
        keyring.key_for(token("new"), 1.0)
        keyring.began(10.0)
        keyring.succeeded(OLD, 10.2)

        assert NoKey(0) == keyring.key_for(token("new"), 10.3)
        assert NoKey(0) == keyring.key_for(token("new"), 19.9)
        assert 310.2 == keyring.due_at
        assert NoKey(2) == keyring.key_for(token("new"), 20.0)
        assert 20.0 == keyring.due_at

    def test_a_key_that_is_first_asked_for_during_a_fetch_waits_for_the_next(self) -> None:
        """What the issuer said may be older than the key."""
        keyring = loaded(OLD)
        keyring.began(300.0)
        assert NoKey(10 + 2) == keyring.key_for(token("new"), 300.0)
        keyring.succeeded(OLD, 300.5)
        assert NoKey(10 + 2) == keyring.key_for(token("new"), 300.5)
        assert 310.0 == keyring.due_at

    def test_a_failed_fetch_denies_nothing(self) -> None:
        """What nobody knows is asked again."""
        keyring = loaded(OLD)
        keyring.key_for(token("new"), 1.0)
        keyring.began(10.0)
        keyring.failed(10.5)
        assert NoKey(10 + 2) == keyring.key_for(token("new"), 10.5)
        keyring.began(20.0)
        keyring.succeeded(OLD, 20.5)
        assert NoKey(0) == keyring.key_for(token("new"), 20.5)

    def test_any_number_of_unknown_keys_is_one_fetch_per_retry(self) -> None:
        """One call for attention, one fetch, and bounded memory."""
        keyring = loaded(OLD)
        calls: list[int] = []
        keyring.on_wanted = lambda: calls.append(1)
        fetches = 0
        for number in range(10_000):
            now = 10.0 + number * 0.01
            answer = keyring.key_for(token(f"x{number}"), now)
            assert isinstance(answer, NoKey)
            assert OLD.keys["old"] is keyring.key_for(token(), now)
            if keyring.due_at <= now:
                keyring.began(now)
                keyring.succeeded(OLD, now)
                fetches += 1
        assert 10 <= fetches <= 11
        assert fetches <= len(calls) <= fetches + 1
        assert len(keyring._asked) <= MAX_ASKED
        assert len(keyring._absent) <= 2 * MAX_ASKED

    def test_failures_keep_bounded_what_is_asked_for(self) -> None:
        """However many there are in a row."""
        keyring = loaded(OLD)
        for number in range(2000):
            keyring.key_for(token(f"x{number}"), 1.0)
            keyring.key_for(token("x" * 256), 1.0)
            if number % 70 == 0:
                keyring.began(1.0)
                keyring.failed(1.0)
        assert len(keyring._asked) + len(keyring._asking) <= 3 * MAX_ASKED

    def test_looking_for_a_key_asks_nobody(self) -> None:
        """What is at hand is found, with and without a name; what is not has no consequences."""
        wishes = []
        keyring = Keyring(ALL, PACE)
        keyring.on_wanted = lambda: wishes.append(1)
        assert keyring.held(token("old"), 0.0) is None
        assert frozenset() == keyring.names
        keyring.began(0.0)
        keyring.succeeded(OLD, 0.0)
        assert OLD.keys["old"] is keyring.held(token("old"), 1.0)
        assert OLD.keys["old"] is keyring.held(token(None), 1.0)
        assert keyring.held(token("new"), 1.0) is None
        assert keyring.held(token("old"), PACE.lifetime) is None
        assert frozenset(OLD.keys) == keyring.names
        assert [] == wishes

    @pytest.mark.parametrize("algorithm", ["HS256", "PS256", "none", ""])
    def test_an_algorithm_that_is_not_configured_asks_nobody(self, algorithm: str) -> None:
        """Whatever key may come, it would not be for such a token."""
        header = json.dumps({"kid": "new", "alg": algorithm}).encode()
        text = base64.urlsafe_b64encode(header).decode().rstrip("=") + ".e30.c2ln"
        wishes = []
        for keyring in (loaded(OLD), Keyring(ALL, PACE)):
            keyring.on_wanted = lambda: wishes.append(1)
            assert NoKey(0) == keyring.key_for(text, 1.0)
        assert [] == wishes

    def test_headers_are_remembered_within_bounds(self) -> None:
        """Those that vary without reason, and those that are long, are read anew each time."""
        keyring = loaded(OLD)
        for number in range(200):
            headers = {"kid": "old", "x": number, "y": "y" * (2000 if number % 2 else 0)}
            text = jwt.encode({}, ED, algorithm="EdDSA", headers=headers)
            assert OLD.keys["old"] is keyring.key_for(text, 1.0)
            keyring.accepted(text, OLD.keys["old"])
            assert OLD.keys["old"] is keyring.key_for(text, 1.0)
            assert (text.partition(".")[0] in keyring._by_header) == (not number % 2)
        assert 64 == len(keyring._by_header)

    def test_whoever_only_asks_leaves_nothing_behind(self) -> None:
        """Strangers who invent headers with a known name fill no memory."""
        keyring = loaded(OLD)
        for number in range(5):
            headers = {"kid": "old", "x": number}
            text = jwt.encode({}, ED, algorithm="EdDSA", headers=headers)
            assert OLD.keys["old"] is keyring.key_for(text, 1.0)
            assert OLD.keys["old"] is keyring.held(text, 1.0)
        assert {} == keyring._by_header

    @pytest.mark.parametrize("kid", ["../../dev/null", "'; DROP TABLE", "http://evil", "\0", "*"])
    def test_a_name_is_only_ever_compared(self, kid: str) -> None:
        """Whatever it says: it is no path, no query and no address."""
        keyring = loaded(BOTH)
        assert isinstance(keyring.key_for(token(kid), 1.0), NoKey)
        keyring.began(10.0)
        keyring.succeeded(BOTH, 10.0)
        assert NoKey(0) == keyring.key_for(token(kid), 10.0)

    @pytest.mark.parametrize("kid", ["", "x" * 257, "x" * 5000])
    def test_a_name_that_no_key_can_have_is_denied_at_once(self, kid: str) -> None:
        """And nobody is asked for it."""
        keyring = loaded(BOTH)
        assert NoKey(0) == keyring.key_for(token(kid), 1.0)
        assert NoKey(0) == keyring.key_for(token(None), 1.0)
        assert 300.0 == keyring.due_at

    @pytest.mark.parametrize(
        "text",
        [
            *(
                "",
                ".",
                "a",
                "a.b.c",
                "!!!.x.y",
                "\xff.x.y",
                "\ud800",
                "e30",
                "W10.a.b",
                "bnVsbA.a.b",
            ),
            *("eyJraWQiOjF9.a.b", "eyJraWQiOlsiYSJdfQ.a.b", "eyJraWQiOnt9fQ.a.b", "[" * 8000),
        ],
    )
    def test_a_header_that_cannot_be_read_is_the_clients_error(self, text: str) -> None:
        """With keys or without; an empty one is a token without a name."""
        for keyring in (loaded(BOTH), Keyring(ALL, PACE)):
            if text == "e30":
                assert isinstance(keyring.key_for(text, 1.0), NoKey)
                continue
            with pytest.raises(AuthError):
                keyring.key_for(text, 1.0)

    @patience(deadline=None)
    @given(st.text())
    def test_any_text_is_a_key_none_or_the_clients_error(self, text: str) -> None:
        """Nothing else is raised."""
        answer: Callable[[], object] = lambda: loaded().key_for(text, 1.0)  # noqa: E731
        try:
            assert isinstance(answer(), NoKey | jwt.PyJWK)
        except AuthError:
            return


class Rotation(RuleBasedStateMachine):
    """An issuer that publishes and withdraws keys, and clients with every kind of token.

    The promise: a key that is published now is denied only if the fetch that said so began less
    than a retry ago; a key that is known is good; fetches are never closer than a retry.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.keyring = Keyring(ALL, PACE)
        self.published = OLD
        self.known: KeySet | None = None
        self.learned = -math.inf
        self.began: float | None = None
        self.answer: KeySet | None = None
        self.fetches: list[float] = []

    @rule(keys=st.sampled_from([OLD, BOTH, NEW]))
    def publish(self, keys: KeySet) -> None:
        """The issuer changes its keys."""
        self.published = keys

    @rule(seconds=st.sampled_from([0.1, 1.0, 9.0, 10.0, 100.0, 3600.0]))
    def wait(self, seconds: float) -> None:
        """Time passes, and what is due begins."""
        self.now += seconds
        self.begin()

    @rule()
    def begin(self) -> None:
        """The fetcher does what it is told."""
        if self.began is None and self.keyring.due_at <= self.now:
            self.keyring.began(self.now)
            self.began, self.answer = self.now, self.published
            self.fetches.append(self.now)

    @rule(good=st.booleans())
    def end(self, *, good: bool) -> None:
        """A fetch comes to its end."""
        if self.began is None:
            return
        self.began = None
        if not good:
            self.keyring.failed(self.now)
            return
        assert self.answer is not None
        self.keyring.succeeded(self.answer, self.now)
        self.known, self.learned = self.answer, self.now

    @rule(kid=st.sampled_from(["old", "new", "never"]))
    def ask(self, kid: str) -> None:
        """A client comes."""
        answer = self.keyring.key_for(token(kid), self.now)
        usable = self.known is not None and self.now < self.learned + PACE.lifetime
        expected = self.known.keys.get(kid) if usable and self.known is not None else None
        if expected is not None:
            assert expected is answer
            return
        assert isinstance(answer, NoKey)
        if answer.retry_after == 0:
            assert usable
            assert self.now < self.fetches[-1] + PACE.retry
        else:
            assert answer.retry_after <= PACE.retry + 2
            assert self.began is not None or self.keyring.due_at <= self.now + PACE.retry

    @invariant()
    def fetches_are_apart(self) -> None:
        """Whatever comes."""
        pairs = zip(self.fetches, self.fetches[1:], strict=False)
        assert all(later - earlier >= PACE.retry for earlier, later in pairs)


TestRotation = Rotation.TestCase
TestRotation.settings = patience(deadline=None)
