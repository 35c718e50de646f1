"""Where Redis is, as the settings say it."""

from pathlib import Path

import pytest
from redis.asyncio.connection import parse_url

from tests.redis_server import make_certificates
from trioserver.endpoint import Endpoint, Tls, endpoint, tls_context
from trioserver.errors import SettingsError
from trioserver.settings import Settings

URLS = [
    "redis://127.0.0.1",
    "redis://redis.internal:7000/3",
    "redis://:s3cret@h:1/0",
    "redis://ann:s3%20cr%2Ft@h",
    "redis://h?db=4",
    "redis://h/2?db=4",
    "redis://[::1]:6379/0",
    "rediss://ann:s3cret@h:6380/1",
    "unix:///run/redis.sock",
    "unix://ann:s3cret@/run/a%20b.sock?db=5",
    "unix:///run/redis.sock?password=s3cret&username=ann",
]


def settings(**values: object) -> Settings:
    """Return settings that differ from the defaults."""
    return Settings(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("url", URLS)
def test_a_url_means_what_it_means_to_redis_py(url: str) -> None:
    """Host, port, path, database and credentials are read like the library reads them."""
    where = endpoint(settings(redis_url=url), None)

    theirs = dict(parse_url(url))
    theirs.pop("connection_class", None)
    assert theirs.pop("db", 0) == where.db
    assert {name: getattr(where, name) for name in theirs} == theirs


@pytest.mark.parametrize("url", URLS)
def test_secrets_are_not_shown(url: str) -> None:
    """Neither the repr nor the target contains a password."""
    where = endpoint(settings(redis_url=url), None)

    assert "s3" not in repr(where)
    assert "s3" not in where.target


@pytest.mark.parametrize(
    ("url", "tls"),
    [
        ("rediss://h", Tls()),
        ("rediss://h?ssl_cert_reqs=none", Tls(verify=False)),
        ("rediss://h?ssl_check_hostname=False", Tls(check_hostname=False)),
        (
            "rediss://h?ssl_ca_certs=/ca.pem&ssl_certfile=/c.pem&ssl_keyfile=/k.pem",
            Tls(ca_file="/ca.pem", cert_file="/c.pem", key_file="/k.pem"),
        ),
        ("redis://h", None),
    ],
)
def test_tls_options(url: str, tls: Tls | None) -> None:
    """Certificates are demanded unless the URL says otherwise."""
    assert tls == endpoint(settings(redis_url=url), None).tls


@pytest.mark.parametrize(
    "url",
    [
        "http://h",
        "unix://",
        "redis://h:port",
        "redis://h:99999",
        "redis://h/notanumber",
        "redis://h?db=x",
        "redis://h?socket_timeout=3",
        "redis://h?ssl_cert_reqs=none",
        "rediss://h?ssl_cert_reqs=perhaps",
        "redis://h?nonsense",
        "redis://h:0",
        "redis://:12?username=x@h",
        "redis://a..b",
        f"redis://{'x' * 64}.com",
        "redis://:123#45@h:6379/0",
        "redis://h/0#x",
        "unix:///run/a#b.sock",
    ],
)
def test_nonsense_is_refused(url: str) -> None:
    """What cannot be understood, or would do nothing, names the setting."""
    with pytest.raises(SettingsError, match=r"^REDIS_URL: ") as caught:
        endpoint(settings(redis_url=url), None)
    assert caught.value.setting == "REDIS_URL"


def test_a_password_that_is_cut_off() -> None:
    """A "#" that is not escaped would end the URL: the message says how it is written."""
    with pytest.raises(SettingsError, match='contains "#", which is written %23') as caught:
        endpoint(settings(redis_url="redis://:hunter#2@h"), None)
    assert "hunter" not in str(caught.value)
    assert endpoint(settings(redis_url="redis://:hunter%232@h"), None).password == "hunter#2"


def test_certificates(tmp_path: Path) -> None:
    """Files that are there are loaded; what is missing or no use is named in one line."""
    make_certificates(tmp_path)
    ca, certificate, key = (str(tmp_path / name) for name in ("ca.pem", "server.pem", "server.key"))
    tls_context(Tls(ca_file=ca, cert_file=certificate, key_file=key))
    missing = str(tmp_path / "missing.pem")

    for tls, problem in (
        (Tls(ca_file=missing), f'ssl_ca_certs: "{missing}" cannot be used: no such file'),
        (Tls(ca_file=key), f'ssl_ca_certs: "{key}" cannot be used: no certificate or crl found'),
        (Tls(cert_file=missing), f'ssl_certfile: "{missing}" cannot be used: no such file'),
        (Tls(cert_file=ca, key_file=key), "cannot be used: key values mismatch"),
    ):
        with pytest.raises(SettingsError) as caught:
            tls_context(tls)
        assert caught.value.setting == "REDIS_URL"
        assert problem in caught.value.problem


def test_separate_values() -> None:
    """REDIS_HOST and its companions make an endpoint too."""
    where = endpoint(
        settings(
            redis_host="::1", redis_port=7000, redis_db=2, redis_password="p", redis_use_tls=True
        ),
        Path("/ignored"),
    )

    assert Endpoint(host="::1", port=7000, db=2, password="p", tls=Tls()) == where
    assert where.target == "rediss://[::1]:7000/2"


def test_the_embedded_redis() -> None:
    """Without URL and host, the socket of the embedded Redis is meant."""
    where = endpoint(settings(), Path("/run/ts/redis.sock"))

    assert Endpoint(path="/run/ts/redis.sock") == where
    assert where.target == "unix:///run/ts/redis.sock"


def test_no_redis_at_all() -> None:
    """Where there is no embedded one, the message says what to set."""
    with pytest.raises(SettingsError, match="REDIS_URL: is not set"):
        endpoint(settings(), None)


def test_errors_of_redis_are_masked() -> None:
    """Text that quotes our command loses the password."""
    assert Endpoint(password="s3cret").masked("AUTH s3cret?") == "AUTH ***?"
    assert Endpoint().masked("AUTH s3cret?") == "AUTH s3cret?"
