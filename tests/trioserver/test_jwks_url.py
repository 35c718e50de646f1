"""What a URL for keys may say."""

import pytest

from trioserver.errors import SettingsError
from trioserver.jwks_url import Target


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://a.example/k", ("a.example", 443, False, "/k", "a.example")),
        ("HTTPS://A.example:8443", ("a.example", 8443, False, "/", "A.example:8443")),
        ("http://[::1]:80/k?a=b&c", ("::1", 80, True, "/k?a=b&c", "[::1]:80")),
        ("http://a.example?x", ("a.example", 80, True, "/?x", "a.example")),
    ],
)
def test_a_url_is_a_target(url: str, expected: tuple[str, int, bool, str, str]) -> None:
    """Host, port, path and what goes into the Host header."""
    host, port, plain, path, authority = expected
    assert Target(
        host=host, port=port, is_plain=plain, path=path, authority=authority
    ) == Target.parse(url)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "keys",
            "//a.example/",
            "ftp://a.example/",
            "file:///etc/passwd",
            "https://",
            "https:/k",
        ),
        *("https://a:b@a.example/", "https://@a.example/", "https://a.example/#x", "https://:443/"),
        *(
            "https://a.example:0/",
            "https://a.example:65536/",
            "https://a.example:x/",
            "https://[::1/",
        ),
        *("https://a.example/a b", "https://a.example/\r\nX: y", "https://b\xfccher.example/"),
        *("https://a..b/", "https://.example/", f"https://{'x' * 64}.example/"),
    ],
)
def test_what_is_no_url_for_keys_ends_the_start(url: str) -> None:
    """With the name of the setting and an example."""
    with pytest.raises(SettingsError, match=r"JWT_JWKS_URL: .*example: https://"):
        Target.parse(url)
