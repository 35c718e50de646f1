"""The certificate of the public port and its key: files that are checked before they are used.

The supervisor asks with every reload, so that a pair that does not fit leaves the workers that
run with the old one in place. A worker reads the files once, at its start: the next generation
gets the new ones.
"""

import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trioserver.errors import SettingsError
from trioserver.setting_kinds import quoted

if TYPE_CHECKING:
    import ssl

CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""Of TLS 1.2: a key of its own for each connection, and authenticated encryption. TLS 1.3 has
nothing else."""

SOON_SECONDS: Final = 7 * 86_400
"""A certificate that ends within this time is worth a warning: renewal should have happened."""

_EXAMPLE_CERT: Final = "TLS_CERT=/etc/trioserver/tls.crt"
_EXAMPLE_KEY: Final = "TLS_KEY=/etc/trioserver/tls.key"


def context(cert: Path, key: Path) -> "ssl.SSLContext":
    """Return what all TLS connections of a worker share; reads the files, so it blocks.

    TLS 1.2 and 1.3 without compression and renegotiation; ``http/1.1`` is what we speak inside.

    No session tickets in TLS 1.3: each worker has keys of its own, so a client that comes back
    could use its ticket only if it met the same worker, and never after a restart, when all come
    back. What would be saved is a signature; the price is that those keys live as long as the
    worker does, and with them the chance to read what was recorded.

    Raises:
        SettingsError: TLS_CERT or TLS_KEY is missing, unreadable, of no use, or they do not
            belong together.
    """
    import ssl  # noqa: PLC0415 - 10 ms that a server without TLS does not cost

    _look_into("TLS_CERT", cert, b"CERTIFICATE-----", "a certificate")
    _look_into("TLS_KEY", key, b"PRIVATE KEY-----", "a private key")
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    made.num_tickets = 0
    made.set_ciphers(CIPHERS)
    made.set_alpn_protocols(["http/1.1"])
    asked: list[None] = []

    def password() -> str:
        # Without an answer OpenSSL would ask at the terminal.
        asked.append(None)
        return ""

    try:
        made.load_cert_chain(cert, key, password)
    except (OSError, ValueError) as error:
        if asked:
            problem = f"{quoted(str(key))} is encrypted; there is nobody to type the password"
            raise SettingsError("TLS_KEY", problem, _EXAMPLE_KEY) from None
        raise _useless(cert, key, error) from None
    return made


def _look_into(setting: str, path: Path, mark: bytes, what: str) -> None:
    example = _EXAMPLE_CERT if setting == "TLS_CERT" else _EXAMPLE_KEY
    try:
        content = path.read_bytes()
    except OSError as error:
        problem = f"{quoted(str(path))} cannot be read: {error.strerror}"
        raise SettingsError(setting, problem, example) from None
    if mark not in content:
        problem = f"{quoted(str(path))} is not a PEM file with {what}"
        raise SettingsError(setting, problem, example)


def _useless(cert: Path, key: Path, error: Exception) -> SettingsError:
    reason = str(getattr(error, "reason", None) or error)
    if reason in {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"}:
        problem = f"{quoted(str(key))} is not the key of {quoted(str(cert))}"
        return SettingsError("TLS_KEY", problem, _EXAMPLE_KEY)
    reason = reason.replace("_", " ").lower()  # OpenSSL: EE_KEY_TOO_SMALL
    problem = f"{quoted(str(cert))} and its key cannot be used: {reason}"
    return SettingsError("TLS_CERT", problem, _EXAMPLE_CERT)


def concerns(cert: Path, key: Path) -> Iterator[str]:
    """Find what is worth a warning about a pair that `context` accepts: one line each."""
    from cryptography import x509  # noqa: PLC0415 - 30 ms, as above

    if stat.S_IMODE(key.stat().st_mode) & (stat.S_IROTH | stat.S_IWOTH):
        yield f"TLS_KEY: {quoted(str(key))} is open to every user of this machine; chmod o= it"
    try:
        ours = x509.load_pem_x509_certificates(cert.read_bytes())[0]
    except ValueError:
        # OpenSSL takes more than this parser does, and OpenSSL is who has to.
        return
    left = ours.not_valid_after_utc.timestamp() - time.time()
    until = f"{ours.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    if left <= 0:
        yield f"TLS_CERT: {quoted(str(cert))} has expired ({until})"
    elif left < SOON_SECONDS:
        yield f"TLS_CERT: {quoted(str(cert))} expires soon ({until})"
    if ours.not_valid_before_utc.timestamp() > time.time():
        yield f"TLS_CERT: {quoted(str(cert))} is not valid yet"


def own_server(cert: Path) -> "ssl.SSLContext":
    """Return how to speak to the server on this machine that has this very certificate.

    It is trusted as it is, whatever names are in it: it is reached as 127.0.0.1.

    Raises:
        SettingsError: The file is of no use.
    """
    import ssl  # noqa: PLC0415 - as above

    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        made.load_verify_locations(cert)
    except (OSError, ValueError) as error:
        problem = f"{quoted(str(cert))} cannot be used: {error.__class__.__name__}"
        raise SettingsError("TLS_CERT", problem, _EXAMPLE_CERT) from None
    return made
