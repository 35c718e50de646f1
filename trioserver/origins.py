"""Origins: the pages of which web sites may connect. Pure.

A browser lets every page open a WebSocket to every server; all it does is to say in ``Origin``
whose page it was, and a page cannot forge that. So the check protects the users of browsers from
other people's pages. It is no check of programs: those write what they like, or send no
``Origin`` and are let in, for it is the token that says who somebody is.

``WS_ALLOWED_ORIGINS``
    *unset*: the page must be from the very host and port the client connected to. Its host is
    compared with the ``Host`` header as browsers compare: in any case, IPv6 in any spelling, with
    the default ports 80 and 443 filled in. What ``Host`` leaves out is filled in by the page's own
    scheme, because a proxy in front may have taken off the TLS; where TLS is known
    (`Origins.allows`, ``secure``), a page that came without it is another origin. A page from this
    very machine may connect to this very machine from any port: development servers have their own
    (``http://localhost:5173``), and no site on the Internet can be such an origin.

    *a list*: these and no others, not even one's own host. An entry is an origin as browsers
    write it (``https://example.com``, ``http://localhost:3000``, ``capacitor://localhost``), or a
    pattern ``https://*.example.com``. The star stands for exactly one label, as in a certificate:
    neither ``https://example.com`` nor ``https://a.b.example.com`` fits. A pattern that matches
    less than somebody hoped shows at once; one that matches more never shows.

    ``*`` alone: everybody, and it must be written.

``null``, which sandboxed frames and ``data:`` pages of any site send, is nobody's origin and
cannot be listed. Names with other letters than ASCII are kept in the form that browsers send
(``xn--``), so a look-alike is another name.

This is how far it goes: a name whose DNS entry is changed to this server's address while its page
is open ("DNS rebinding") is its own host to the first rule. It gains nothing without a token, and
a list does not have this gap.
"""

import re
from collections.abc import Iterable
from typing import Final

from trioserver.errors import SettingsError

SETTING: Final = "WS_ALLOWED_ORIGINS"
EXAMPLE: Final = "https://example.com,https://*.example.com"

_DEFAULT_PORTS: Final = {"http": "80", "https": "443"}
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
_MAX_HOST: Final = 253
_MAX_PORT: Final = 65_535

# A host as browsers write it: a name, an IPv4 address or an IPv6 address in brackets.
_HOST: Final = r"([a-z0-9._-]{1,253}|\[[0-9a-f:.]{2,45}\])"
_WEB_ORIGIN: Final = re.compile(rf"(https?)://{_HOST}(?::([0-9]{{1,5}}))?")
_HOST_HEADER: Final = re.compile(rf"{_HOST}(?::([0-9]{{0,5}}))?")
_ENTRY: Final = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?#@\\]*)")
_LABEL: Final = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")


def origin_list(text: str) -> tuple[str, ...]:
    """Return the entries of ``WS_ALLOWED_ORIGINS``, each in the one form that browsers send.

    Args:
        text: Separated by commas or white space.

    Raises:
        ValueError: With the end of the sentence '"abc" ...'.
    """
    entries = tuple(dict.fromkeys(_entry(word) for word in re.split(r"[,\s]+", text) if word))
    if not entries:
        raise ValueError("names no origin")
    if "*" in entries and len(entries) > 1:
        raise ValueError("has * beside others, which means everybody anyway: write * alone")
    return entries


class Origins:
    """Decides about the ``Origin`` of a handshake.

    Args:
        allowed: Entries of ``WS_ALLOWED_ORIGINS``; None for the rule of the same host.

    Raises:
        SettingsError: An entry is none.
    """

    def __init__(self, allowed: Iterable[str] | None) -> None:
        self._same_host = allowed is None
        try:
            entries = [] if allowed is None else [_entry(word) for word in allowed]
        except ValueError as error:
            raise SettingsError(SETTING, str(error), EXAMPLE) from None
        self._everybody = "*" in entries
        self._patterns = frozenset(entry for entry in entries if "://*." in entry)
        self._exact = frozenset(entries) - self._patterns

    @classmethod
    def parse(cls, text: str | None) -> "Origins":
        """Return what the setting's text means; None if it is not set.

        Raises:
            SettingsError: It is nonsense.
        """
        try:
            return cls(None if text is None else origin_list(text))
        except ValueError as error:
            raise SettingsError(SETTING, f"{text!r} {error}", EXAMPLE) from None

    def allows(self, origin: str | None, host: str, *, secure: bool = False) -> bool:
        """Tell whether a page of this origin may connect. Never raises.

        Args:
            origin: The header ``Origin``; None if there was none. Several in one value, which
                no browser sends, are none of those that are allowed.
            host: The header ``Host``.
            secure: Whether the client is known to speak TLS: with us, or with a proxy that is
                trusted to say so.
        """
        if origin is None or self._everybody or origin in self._exact:
            return True
        if not origin.isascii():
            return False
        origin = origin.lower()
        if self._same_host:
            return _is_same(origin, host, secure=secure)
        return self._is_listed(origin)

    def _is_listed(self, origin: str) -> bool:
        parsed = _canonical(origin)
        if parsed is None:
            return origin in self._exact
        if parsed in self._exact:
            return True
        scheme, _, rest = parsed.partition("://")
        label, _, parent = rest.partition(".")
        return bool(label) and f"{scheme}://*.{parent}" in self._patterns


def _is_same(origin: str, host: str, *, secure: bool) -> bool:
    """Tell whether a page from ``origin``, in lower case, is from the host it connects to."""
    page = _WEB_ORIGIN.fullmatch(origin)
    if page is None or (secure and page[1] != "https"):
        return False
    if origin.endswith(host) and len(origin) == len(page[1]) + len("://") + len(host):
        return True  # As browsers write both; the rest is for the few who write otherwise.
    server = _HOST_HEADER.fullmatch(host.lower()) if host.isascii() else None
    if server is None:
        return False
    if _is_local(page[2]) and _is_local(server[1]):
        return True
    default = _DEFAULT_PORTS[page[1]]
    if int(page[3] or default) != int(server[2] or default):
        return False
    return page[2] == server[1] or _same_ipv6(page[2], server[1])


def _is_local(host: str) -> bool:
    """Tell whether a host, in lower case, means the machine it is asked on, whatever DNS says.

    Browsers resolve ``localhost`` and names below it themselves (RFC 6761, 6.3).
    """
    return host in _LOOPBACK or host.endswith(".localhost")


def _same_ipv6(one: str, other: str) -> bool:
    """Tell whether two hosts that are not the same text are the same IPv6 address."""
    if one[0] != "[" or other[0] != "[":
        return False
    try:
        return _ipv6(one) == _ipv6(other)
    except ValueError:
        return False


def _canonical(origin: str) -> str | None:
    """Return an origin of the web, in lower case, as a browser writes it; None if it is none."""
    match = _WEB_ORIGIN.fullmatch(origin)
    if match is None:
        return None
    scheme, host, port = match.groups()
    if host[0] == "[":
        try:
            host = _ipv6(host)
        except ValueError:
            return None
    return f"{scheme}://{host}{_port(scheme, port)}"


def _port(scheme: str, port: str | None) -> str:
    return "" if port is None or int(port) == int(_DEFAULT_PORTS[scheme]) else f":{int(port)}"


def _ipv6(host: str) -> str:
    import ipaddress  # noqa: PLC0415 - few origins name IPv6 addresses

    return f"[{ipaddress.IPv6Address(host[1:-1]).compressed}]"


# The setting.


def _entry(word: str) -> str:
    """Return one entry of the setting as browsers would write it, ``*`` included."""
    if word == "*":
        return word
    if word.lower() == "null":
        raise ValueError("has null, which pages of every site can be made to send")
    match = _ENTRY.fullmatch(word.lower())
    if match is None:
        raise ValueError(f"has {word!r}, which is no origin: scheme://host or scheme://host:port")
    scheme, authority = match.groups()
    if scheme in {"ws", "wss"}:
        raise ValueError(f"has {word!r}: what counts is where the page comes from, http or https")
    if scheme not in _DEFAULT_PORTS:
        # Of apps: capacitor://localhost, chrome-extension://..., file://. Compared as text.
        if not authority.isascii() or "*" in authority:
            raise ValueError(f"has {word!r}: stars are for http and https only")
        return f"{scheme}://{authority}"
    host, colon, port = authority.rpartition(":")
    if not colon or port.endswith("]"):
        host, port = authority, ""
    elif not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) <= _MAX_PORT:
        raise ValueError(f"has {word!r}: its port is no number from 1 to {_MAX_PORT}")
    try:
        host = _host(host)
    except ValueError as error:
        raise ValueError(f"has {word!r}: {error}") from None
    return f"{scheme}://{host}{_port(scheme, port or None)}"


def _host(host: str) -> str:
    """Return the host of an entry as a browser writes it."""
    if host.startswith("["):
        try:
            return _ipv6(host)
        except ValueError:
            raise ValueError("that is no IPv6 address") from None
    pattern, name = ("*.", host[2:]) if host.startswith("*.") else ("", host)
    if not name.isascii():
        import idna  # noqa: PLC0415 - few settings have such names

        try:
            name = idna.encode(name, uts46=True).decode("ascii")
        except idna.IDNAError as error:
            raise ValueError(f"its host is no name ({error})") from None
    labels = name.split(".")
    if len(name) > _MAX_HOST or not all(map(_LABEL.fullmatch, labels)):
        raise ValueError("its host is no name; a star stands only for a whole first label")
    if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", labels[-1]):
        # Browsers take every such host for an IPv4 address, and send it in its usual form.
        if pattern or not _is_ipv4(labels):
            raise ValueError("its host is no name and no IPv4 address in its usual form")
    elif pattern and len(labels) == 1 and name != "localhost":
        raise ValueError("the star would stand for everything under a top-level domain")
    return pattern + name


def _is_ipv4(labels: list[str]) -> bool:
    return len(labels) == 4 and all(  # noqa: PLR2004 - dotted quad
        re.fullmatch(r"0|[1-9][0-9]{0,2}", label) and int(label) < 256  # noqa: PLR2004 - a byte
        for label in labels
    )
