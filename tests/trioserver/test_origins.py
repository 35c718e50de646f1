"""The origin matrix: which pages may connect."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioserver.errors import SettingsError
from trioserver.origins import Origins, origin_list

YES, NO = True, False

SAME_HOST: dict[str, tuple[str | None, str, bool]] = {
    # what: Origin, Host, verdict
    "no browser": (None, "example.com", YES),
    "the same": ("https://example.com", "example.com", YES),
    "the same, without TLS": ("http://example.com", "example.com", YES),
    "the same port": ("https://example.com:8443", "example.com:8443", YES),
    "default port of https in Host": ("https://example.com", "example.com:443", YES),
    "default port of https in Origin": ("https://example.com:443", "example.com", YES),
    "default port of http in Host": ("http://example.com", "example.com:80", YES),
    "default port of http in Origin": ("http://example.com:80", "example.com", YES),
    "empty port in Host": ("https://example.com", "example.com:", YES),
    "case of Origin": ("HTTPS://Example.COM", "example.com", YES),
    "case of Host": ("https://example.com", "EXAMPLE.com", YES),
    "IPv4": ("http://192.0.2.1:8081", "192.0.2.1:8081", YES),
    "localhost": ("http://localhost:8081", "localhost:8081", YES),
    "IPv6": ("http://[::1]:8081", "[::1]:8081", YES),
    "IPv6 in another spelling": ("http://[2001:db8::1]", "[2001:0DB8:0:0::0001]", YES),
    "IPv6, default port": ("https://[2001:db8::1]:443", "[2001:db8::1]", YES),
    "IDN as browsers send it": ("https://xn--bcher-kva.example", "xn--bcher-kva.example", YES),
    "name with an underscore": ("https://my_app.example.com", "my_app.example.com", YES),
    "other host": ("https://evil.org", "example.com", NO),
    "other port": ("https://example.com:8443", "example.com", NO),
    "other port in Host": ("https://example.com", "example.com:8443", NO),
    "page of http against the port of https": ("http://example.com", "example.com:443", NO),
    "page of https against the port of http": ("https://example.com", "example.com:80", NO),
    "another port of this machine": ("http://localhost:5173", "localhost:8081", YES),
    "another name of this machine": ("http://localhost:5173", "127.0.0.1:8081", YES),
    "IPv6 of this machine": ("http://[::1]:5173", "localhost:8081", YES),
    "a name below localhost": ("https://app.localhost", "localhost:8081", YES),
    "this machine's page, another server": ("http://localhost:8081", "example.com:8081", NO),
    "another's page, this machine": ("http://example.com:8081", "localhost:8081", NO),
    "localhost as a suffix": ("http://evil-localhost:8081", "localhost:8081", NO),
    "localhost as a prefix": ("http://localhost.evil.org:8081", "localhost:8081", NO),
    "127.0.0.1 as a prefix": ("http://127.0.0.1.evil.org", "127.0.0.1:8081", NO),
    "subdomain": ("https://www.example.com", "example.com", NO),
    "parent domain": ("https://example.com", "www.example.com", NO),
    "suffix": ("https://evil-example.com", "example.com", NO),
    "suffix without a hyphen": ("https://notexample.com", "example.com", NO),
    "prefix": ("https://example.com.evil.org", "example.com", NO),
    "prefix with a hyphen": ("https://example.com-evil.org", "example.com", NO),
    "user name": ("https://example.com@evil.org", "example.com", NO),
    "user name and password": ("https://example.com:443@evil.org", "example.com", NO),
    "another's user name": ("https://evil.org@example.com", "example.com", NO),
    "the same user name in both": ("https://a@example.com", "a@example.com", NO),
    "null": ("null", "example.com", NO),
    "null as a host": ("null", "null", NO),
    "empty": ("", "example.com", NO),
    "both empty": ("", "", NO),
    "https:// alone": ("https://", "", NO),
    "without scheme": ("example.com", "example.com", NO),
    "scheme-relative": ("//example.com", "example.com", NO),
    "path": ("https://example.com/", "example.com", NO),
    "query": ("https://example.com?", "example.com", NO),
    "fragment": ("https://example.com#", "example.com", NO),
    "backslash": ("https://evil.org\\@example.com", "example.com", NO),
    "blank in front": (" https://example.com", "example.com", NO),
    "two values": ("https://example.com https://evil.org", "example.com", NO),
    "two values, ours last": ("https://evil.org https://example.com", "example.com", NO),
    "two headers joined": ("https://example.com, https://evil.org", "example.com", NO),
    "the same twice": ("https://example.com, https://example.com", "example.com", NO),
    "line end": ("https://example.com\n", "example.com", NO),
    "NUL": ("https://example.com\0.evil.org", "example.com", NO),
    "ws": ("ws://example.com", "example.com", NO),
    "wss": ("wss://example.com", "example.com", NO),
    "ftp": ("ftp://example.com", "example.com", NO),
    "file": ("file://", "example.com", NO),
    "extension": ("chrome-extension://example.com", "example.com", NO),
    "dot at the end": ("https://example.com.", "example.com", NO),
    "port beyond": ("https://example.com:65979", "example.com:443", NO),
    "port of six digits": ("https://example.com:000443", "example.com", NO),
    "port no number": ("https://example.com:https", "example.com", NO),
    "empty port in Origin": ("https://example.com:", "example.com", NO),
    "IDN in Latin-1": ("https://b\xfccher.example", "xn--bcher-kva.example", NO),
    "look-alike": ("https://xn--xample-9uf.com", "example.com", NO),
    "letter that folds to ASCII": ("https://\u212aexample.com", "kexample.com", NO),
    "Host not ASCII": ("https://example.com", "\xe9xample.com", NO),
    "Host empty": ("https://example.com", "", NO),
    "Host with a user name": ("https://example.com", "a@example.com", NO),
    "Host twice": ("https://example.com", "example.com, example.com", NO),
    "number for an address": ("http://2130706433", "127.0.0.1", NO),
    "other IPv6": ("http://[::1]:8081", "[::2]:8081", NO),
    "IPv6 against a name": ("http://[2001:db8::1]", "example.com", NO),
    "broken IPv6": ("http://[::1::]", "[::1]", NO),
    "IPv6 with a zone": ("http://[fe80::1%25eth0]", "[fe80::1%25eth0]", NO),
    "stars": ("https://*", "example.com", NO),
    "8 KiB": ("https://" + "a" * 8_000, "a" * 8_000, NO),
}


@pytest.mark.parametrize(("origin", "host", "verdict"), SAME_HOST.values(), ids=SAME_HOST)
def test_without_a_list_the_page_must_be_from_the_same_host(
    origin: str | None, host: str, *, verdict: bool
) -> None:
    """The whole matrix for WS_ALLOWED_ORIGINS unset."""
    assert verdict is Origins.parse(None).allows(origin, host)


@pytest.mark.parametrize(
    ("origin", "host", "verdict"),
    [
        ("https://example.com", "example.com", YES),
        ("https://example.com", "example.com:443", YES),
        ("https://example.com:8443", "example.com:8443", YES),
        ("http://example.com", "example.com", NO),
        ("http://example.com:443", "example.com", NO),
        ("http://example.com:8443", "example.com:8443", NO),
        (None, "example.com", YES),
    ],
)
def test_with_tls_a_page_without_it_is_another_origin(
    origin: str | None, host: str, *, verdict: bool
) -> None:
    """Anybody on the way could have written that page."""
    assert verdict is Origins.parse(None).allows(origin, host, secure=True)


LIST = (
    "https://example.com, http://localhost:3000 https://*.example.net,"
    "https://*.eu.example.net:8443,https://b\xfccher.example,http://[2001:DB8::0:1]:81,"
    "http://192.0.2.7,capacitor://localhost,file://,http://*.localhost:3000"
)
LISTED: dict[str, tuple[str | None, bool]] = {
    "no browser": (None, YES),
    "exact": ("https://example.com", YES),
    "exact, default port": ("https://example.com:443", YES),
    "exact, port with a zero": ("https://example.com:0443", YES),
    "exact, other case": ("HTTPS://EXAMPLE.com", YES),
    "exact, port": ("http://localhost:3000", YES),
    "one label": ("https://a.example.net", YES),
    "one label, other case": ("https://A.Example.NET:443", YES),
    "one label and a port": ("https://a.eu.example.net:8443", YES),
    "under localhost": ("http://app.localhost:3000", YES),
    "IDN": ("https://xn--bcher-kva.example", YES),
    "IPv6": ("http://[2001:db8::1]:81", YES),
    "IPv6 in another spelling": ("http://[2001:db8:0::1]:81", YES),
    "IPv4": ("http://192.0.2.7:80", YES),
    "an app": ("capacitor://localhost", YES),
    "an app, other case": ("Capacitor://LocalHost", YES),
    "files": ("file://", YES),
    "our own host, which is not listed": ("https://server.example", NO),
    "other scheme": ("http://example.com", NO),
    "other port": ("https://example.com:8443", NO),
    "no port": ("http://localhost", NO),
    "subdomain of an exact one": ("https://a.example.com", NO),
    "the pattern's own domain": ("https://example.net", NO),
    "two labels": ("https://a.b.example.net", NO),
    "no label": ("https://.example.net", NO),
    "pattern, other scheme": ("http://a.example.net", NO),
    "pattern, other port": ("https://a.example.net:8443", NO),
    "pattern with a port, without": ("https://a.eu.example.net", NO),
    "suffix": ("https://evil-example.com", NO),
    "suffix of a pattern": ("https://evil-example.net", NO),
    "prefix": ("https://example.com.evil.org", NO),
    "prefix of a pattern": ("https://a.example.net.evil.org", NO),
    "user name": ("https://example.com@evil.org", NO),
    "user name before a pattern": ("https://evil.org@a.example.net", NO),
    "user name with a dot": ("https://evil.org:x@a.example.net", NO),
    "the pattern itself": ("https://*.example.net", NO),
    "null": ("null", NO),
    "empty": ("", NO),
    "path": ("https://example.com/", NO),
    "two values": ("https://example.com https://a.example.net", NO),
    "two values joined": ("https://example.com,https://a.example.net", NO),
    "IDN in Latin-1": ("https://b\xfccher.example", NO),
    "IDN without the dots": ("https://bucher.example", NO),
    "other IPv6": ("http://[2001:db8::2]:81", NO),
    "broken IPv6": ("http://[2001:db8:::1]:81", NO),
    "an app, other host": ("capacitor://evil", NO),
    "another app": ("ionic://localhost", NO),
    "address with a label": ("http://a.192.0.2.7", NO),
}


@pytest.mark.parametrize(("origin", "verdict"), LISTED.values(), ids=LISTED)
def test_a_list_is_all_there_is(origin: str | None, *, verdict: bool) -> None:
    """The whole matrix for a list: exact, patterns of one label, apps; Host plays no part."""
    origins = Origins.parse(LIST)
    for secure in (False, True):
        assert verdict is origins.allows(origin, "server.example", secure=secure)


@pytest.mark.parametrize("origin", [None, "", "null", "https://evil.org", "\xff", "file://"])
def test_a_star_lets_everybody_in(origin: str | None) -> None:
    """Whoever writes it means it."""
    assert Origins.parse(" * ").allows(origin, "example.com")


def test_entries_are_kept_in_the_form_of_browsers() -> None:
    """What `trioserver config` shows is what is compared, and means the same again."""
    entries = origin_list(LIST + ",HTTPS://Example.com:443")
    assert (
        "https://example.com",
        "http://localhost:3000",
        "https://*.example.net",
        "https://*.eu.example.net:8443",
        "https://xn--bcher-kva.example",
        "http://[2001:db8::1]:81",
        "http://192.0.2.7",
        "capacitor://localhost",
        "file://",
        "http://*.localhost:3000",
    ) == entries
    assert entries == origin_list(",".join(entries))
    # As browsers do since 2023: sharp s is a letter of its own.
    assert ("https://xn--strae-oqa.example",) == origin_list("https://STRA\xdfE.example")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "names no origin"),
        (" , ", "names no origin"),
        ("*,https://example.com", "write * alone"),
        ("null", "every site"),
        ("NULL", "every site"),
        ("example.com", "scheme://host"),
        ("//example.com", "scheme://host"),
        ("https:example.com", "scheme://host"),
        ("https://example.com/", "scheme://host"),
        ("https://example.com/app", "scheme://host"),
        ("https://example.com?x", "scheme://host"),
        ("https://user@example.com", "scheme://host"),
        ("https://example.com\\", "scheme://host"),
        ("wss://example.com", "where the page comes from"),
        ("ws://example.com", "where the page comes from"),
        ("https://", "no name"),
        ("https://:443", "no name"),
        ("https://example.com:", "port"),
        ("https://example.com:0", "port"),
        ("https://example.com:65536", "port"),
        ("https://example.com:*", "port"),
        ("https://example.com:\u0663", "port"),
        ("https://*", "no name"),
        ("https://*.com", "top-level"),
        ("https://*.", "no name"),
        ("https://**.example.com", "no name"),
        ("https://*.*.example.com", "no name"),
        ("https://a*.example.com", "no name"),
        ("https://www.*.com", "no name"),
        ("https://.example.com", "no name"),
        ("https://example..com", "no name"),
        ("https://example.com.", "no name"),
        ("https://-example.com", "no name"),
        ("https://" + "a" * 64 + ".com", "no name"),
        ("https://" + "a." * 127 + "com", "no name"),
        ("https://exa mple.com", "scheme://host"),
        ("https://b\xfc..example", "no name"),
        ("https://\u2024.example", "no name"),
        ("http://2130706433", "usual form"),
        ("http://127.1", "usual form"),
        ("http://0x7f.0.0.1", "usual form"),
        ("http://127.0.0.0x1", "usual form"),
        ("http://127.0.0.01", "usual form"),
        ("http://256.0.0.1", "usual form"),
        ("http://1.2.3.4.5", "usual form"),
        ("http://*.0.0.1", "usual form"),
        ("http://[::1", "IPv6"),
        ("http://[::g]", "IPv6"),
        ("http://[1.2.3.4]", "IPv6"),
        ("http://::1", "port|name"),
        ("capacitor://*", "stars"),
        ("app://b\xfccher", "stars"),
    ],
)
def test_nonsense_ends_the_start(text: str, problem: str) -> None:
    """One line names the setting, the entry and what is wrong with it."""
    with pytest.raises(ValueError, match=problem.replace("*", r"\*")):
        origin_list(text)
    with pytest.raises(SettingsError, match=r"WS_ALLOWED_ORIGINS: .*example: https://"):
        Origins.parse(text)


def test_entries_are_checked_wherever_they_come_from() -> None:
    """A list that was never text, of a settings snapshot for instance, is checked as well."""
    with pytest.raises(SettingsError, match="every site"):
        Origins(["https://example.com", "null"])
    assert Origins(["https://example.com"]).allows("https://example.com", "")
    assert not Origins([]).allows("https://example.com", "example.com")


HOSTILE = st.text() | st.from_regex(
    re.compile(r"(https?://)?[a-z.@:/*\[\]%\\\x00-\xff-]{0,30}(:[0-9]{0,6})?"), fullmatch=True
)


@given(HOSTILE, HOSTILE)
def test_whatever_is_sent_it_is_a_verdict(origin: str, host: str) -> None:
    """Nothing raises, and only what is the same text but for case and ports is let in."""
    if Origins.parse(None).allows(origin, host) and "[" not in host:
        name = host.lower().rpartition(":")[0] if re.search(r":[0-9]*$", host) else host.lower()
        assert origin.lower().startswith((f"https://{name}", f"http://{name}"))
    assert not Origins.parse("https://example.com").allows(origin + "x", host)


@given(st.text())
def test_whatever_is_set_it_is_a_value_or_an_error(text: str) -> None:
    """Nothing else is raised, and what is kept means the same again."""
    try:
        entries = origin_list(text)
    except ValueError:
        return
    assert entries == origin_list(",".join(entries))
