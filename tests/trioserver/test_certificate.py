"""The certificate of the public port: which pairs are used, refused, or warned about."""

import ssl
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from tests.trioserver.certificates import Authority
from trioserver.certificate import concerns, context
from trioserver.errors import SettingsError

PEM = "-----BEGIN {0}-----\nAAAA\n-----END {0}-----\n"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Issues into the directory of the test."""
    return Authority(tmp_path)


def refused(cert: Path, key: Path) -> SettingsError:
    """Return with what a pair is refused."""
    with pytest.raises(SettingsError) as caught:
        context(cert, key)
    assert str(caught.value).isprintable()
    return caught.value


class TestContext:
    """What a worker is given, or not."""

    def test_promises(self, authority: Authority) -> None:
        """At least TLS 1.2, forward secrecy, no compression, no renegotiation, no tickets."""
        made = context(*authority.issue())

        assert ssl.TLSVersion.TLSv1_2 == made.minimum_version
        unwanted = ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
        assert unwanted == made.options & unwanted
        assert 0 == made.num_tickets
        old = [one["name"] for one in made.get_ciphers() if one["protocol"] != "TLSv1.3"]
        assert old
        assert all(name.startswith("ECDHE-") for name in old)
        assert all("GCM" in name or "CHACHA20" in name for name in old)

    @pytest.mark.parametrize("setting", ["TLS_CERT", "TLS_KEY"])
    def test_missing(self, authority: Authority, tmp_path: Path, setting: str) -> None:
        """A file that is missing is named, with its setting."""
        cert, key = authority.issue()
        no = tmp_path / "no"
        error = refused(no, key) if setting == "TLS_CERT" else refused(cert, no)

        assert setting == error.setting
        assert f'"{no}" cannot be read: No such file or directory' == error.problem

    def test_directory(self, authority: Authority, tmp_path: Path) -> None:
        """A directory is no file."""
        error = refused(tmp_path, authority.issue()[1])

        assert ("TLS_CERT", f'"{tmp_path}" cannot be read: Is a directory') == (
            error.setting,
            error.problem,
        )

    def test_swapped(self, authority: Authority) -> None:
        """Files that hold something else are told apart from files that are not there."""
        cert, key = authority.issue()

        error = refused(key, cert)
        assert f'"{key}" is not a PEM file with a certificate' == error.problem
        error = refused(cert, cert)
        assert ("TLS_KEY", f'"{cert}" is not a PEM file with a private key') == (
            error.setting,
            error.problem,
        )

    def test_others_key(self, authority: Authority) -> None:
        """A key that belongs to another certificate is refused."""
        (cert, _), (_, key) = authority.issue(), authority.issue("other")
        error = refused(cert, key)

        assert "TLS_KEY" == error.setting
        assert f'"{key}" is not the key of "{cert}"' == error.problem

    @pytest.mark.parametrize("what", ["CERTIFICATE", "PRIVATE KEY"])
    def test_rubbish(self, authority: Authority, tmp_path: Path, what: str) -> None:
        """PEM that holds nothing usable is refused in OpenSSL's words."""
        cert, key = authority.issue()
        rubbish = tmp_path / "rubbish"
        rubbish.write_text(PEM.format(what))
        error = refused(rubbish, key) if what == "CERTIFICATE" else refused(cert, rubbish)

        assert "cannot be used: " in error.problem

    def test_encrypted(self, authority: Authority) -> None:
        """An encrypted key is refused, and nobody is asked at the terminal."""
        cert, key = authority.issue()
        loaded = load_pem_private_key(key.read_bytes(), None)
        secret = BestAvailableEncryption(b"password")
        key.write_bytes(loaded.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, secret))
        error = refused(cert, key)

        assert "TLS_KEY" == error.setting
        assert f'"{key}" is encrypted; there is nobody to type the password' == error.problem


class TestConcerns:
    """What is warned about."""

    def test_nothing(self, authority: Authority) -> None:
        """A good pair is not worth a word."""
        assert [] == list(concerns(*authority.issue()))

    @pytest.mark.parametrize(
        ("begins", "ends", "problem"),
        [
            (-7200, -3600, "has expired ("),
            (-7200, 86_400, "expires soon ("),
            (3600, 30 * 86_400, "is not valid yet"),
        ],
    )
    def test_times(self, authority: Authority, begins: float, ends: float, problem: str) -> None:
        """A certificate outside its time, or nearly, is used all the same."""
        cert, key = authority.issue(begins=begins, ends=ends)
        context(cert, key)

        [line] = concerns(cert, key)
        assert line.startswith(f'TLS_CERT: "{cert}" {problem}')

    @pytest.mark.parametrize(("mode", "told"), [(0o600, 0), (0o640, 0), (0o644, 1)])
    def test_open_key(self, authority: Authority, mode: int, told: int) -> None:
        """A key that every user of the machine can read is warned about, a group's is not."""
        cert, key = authority.issue()
        key.chmod(mode)

        lines = list(concerns(cert, key))
        assert told == len(lines)
        assert all("open to every user" in line for line in lines)

    def test_strange_certificate(self, authority: Authority, tmp_path: Path) -> None:
        """What only OpenSSL understands is OpenSSL's business."""
        cert = tmp_path / "strange"
        cert.write_text(PEM.format("TRUSTED CERTIFICATE"))

        assert [] == list(concerns(cert, authority.issue()[1]))
