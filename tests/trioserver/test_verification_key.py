"""Keys of the settings: read from a file, and told which algorithms they fit."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, rsa, x25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.trioserver.token_table import KEYS, SECRET, pem_of
from trioserver.errors import SettingsError
from trioserver.verification_key import fitting, read


@pytest.mark.parametrize("algorithm", KEYS)
def test_a_public_key_fits_its_own_family(algorithm: str, tmp_path: Path) -> None:
    """Each key that is read from a file is for its algorithm, and for no other family."""
    file = tmp_path / "key.pem"
    file.write_bytes(pem_of(KEYS[algorithm]))
    found = fitting(read(file), ("RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "EdDSA"))
    expected = {"RS256", "RS384", "RS512"} if algorithm.startswith("RS") else {algorithm}
    assert expected == set(found)


@pytest.mark.parametrize(
    ("algorithm", "asked", "problem"),
    [
        ("ES256", "RS256", "none of them fits K: it is EC on secp256r1, RS256 needs RSA"),
        ("ES256", "ES512", "it is EC on secp256r1, ES512 needs EC on secp521r1"),
        ("RS256", "ES256", "it is RSA, ES256 needs EC on secp256r1"),
        ("RS256", "EdDSA", "it is RSA, EdDSA needs Ed25519 or Ed448"),
        ("EdDSA", "PS256", "it is Ed25519 or Ed448, PS256 needs RSA"),
        ("EdDSA", "HS256", "HS256 needs a secret"),
    ],
)
def test_a_key_that_fits_nothing(algorithm: str, asked: str, problem: str) -> None:
    """What it is and what it should be stands in one line."""
    with pytest.raises(SettingsError, match="JWT_ALGORITHMS") as refused:
        fitting(KEYS[algorithm].public_key(), (asked,), "K")
    assert problem in str(refused.value)


def test_short_keys_fit_nothing() -> None:
    """Neither a secret nor an RSA key that could be guessed."""
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024).public_key()
    with pytest.raises(SettingsError, match="1024 bits"):
        fitting(weak, ("RS256",))
    with pytest.raises(SettingsError, match="JWT_ALGORITHMS"):
        fitting(SECRET[:31], ("HS256",))
    assert ["HS256"] == list(fitting(SECRET, ("HS256", "HS512")))


def test_what_is_no_key(tmp_path: Path) -> None:
    """A file that is missing, broken or holds a key that signs no tokens names the setting."""
    files = {name: tmp_path / f"{name}.pem" for name in ("broken", "dsa", "x25519", "absent")}
    files["broken"].write_bytes(b"no key")
    other = dsa.generate_private_key(1024).public_key()
    agreeing = x25519.X25519PrivateKey.generate().public_key()
    for name, key in (("dsa", other), ("x25519", agreeing)):
        pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        files[name].write_bytes(pem)
    for file in (*files.values(), tmp_path):
        with pytest.raises(SettingsError, match="JWT_PUBLIC_KEY_FILE") as refused:
            read(file)
        assert str(file) in str(refused.value)
        assert str(refused.value).isprintable()
