"""What is wrong or useless about settings that are good one by one."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import x25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.trioserver.certificates import Authority
from tests.trioserver.loading import SECRET, environment, refusal
from tests.trioserver.token_table import KEYS, pem_of

PUBLIC_PEM = pem_of(KEYS["RS256"]).decode()


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a working directory of its own: ``trioserver.toml`` is looked for there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestConflicts:
    """What is refused."""

    def test_drain(self) -> None:
        """The first part of a drain is shorter than the whole, and shrinks with it by default."""
        assert (
            "DRAIN_PROPAGATION (environment): 5s is not shorter than DRAIN_SECONDS (5s) "
            "(example: DRAIN_PROPAGATION=0)"
            == refusal(environ={"DRAIN_SECONDS": "5s", "DRAIN_PROPAGATION": "5"})
        )
        assert 0.5 == environment(DRAIN_SECONDS="3s").settings.drain_propagation
        assert 5.0 == environment(DRAIN_SECONDS="1h").settings.drain_propagation
        assert (
            2.0
            == environment(DRAIN_SECONDS="3s", DRAIN_PROPAGATION="2s").settings.drain_propagation
        )

    def test_ports(self) -> None:
        """Both ports on one address are refused; on two addresses, or free ones, they are not."""
        assert "ADMIN_PORT (default): 9081 is also WS_PORT (example: ADMIN_PORT=9082)" == refusal(
            environ={"WS_PORT": "9081"}
        )
        assert "example: ADMIN_PORT=1)" in refusal(
            environ={"WS_PORT": "65535", "ADMIN_PORT": "65535", "WS_HOST": "127.0.0.1"}
        )
        environment(WS_PORT="9081", WS_HOST="10.0.0.1")
        environment(WS_PORT="0", ADMIN_PORT="0")

    def test_channels(self) -> None:
        """No user may own the broadcast channel; the setting that was changed is blamed."""
        line = refusal(environ={"BROADCAST_CHANNEL": "user_noti:all"})
        assert line.startswith('BROADCAST_CHANNEL (environment): BROADCAST_CHANNEL "user_noti:all"')
        line = refusal(environ={"USER_CHANNEL": "channels:{user}"})
        assert line.startswith('USER_CHANNEL (environment): BROADCAST_CHANNEL "channels:broadcast"')
        environment(USER_CHANNEL="channels:user:{user}")
        environment(USER_CHANNEL="channels:{user}:x", BROADCAST_CHANNEL="channels::x")

    def test_prefix_with_a_user(self) -> None:
        """Only USER_CHANNEL says where the user's id stands, whatever stands in front of it."""
        for prefix, user in (("{user}:", "u:{user}"), ("{user", "}{user}")):
            line = refusal(environ={"CHANNEL_PREFIX": prefix, "USER_CHANNEL": user})
            assert line.startswith(f'CHANNEL_PREFIX (environment): "{prefix}" contains {{user}}')
        environment(CHANNEL_PREFIX="{users}:")

    @pytest.mark.parametrize(
        ("url", "problem"),
        [
            ("redis://:hunter#2@h", 'contains "#"'),
            ("redis://h:0", "is not understood"),
            ("redis://a..b", "is not understood"),
            ("redis://h?socket_timeout=3", "has options that mean nothing here: socket_timeout"),
            ("rediss://h?ssl_ca_certs=/no/ca.pem", 'ssl_ca_certs: "/no/ca.pem" cannot be used: '),
        ],
    )
    def test_redis_that_no_process_could_use(self, url: str, problem: str) -> None:
        """What every process would refuse at its start is refused with the settings."""
        line = refusal(environ={"REDIS_URL": url})

        assert line.startswith(f"REDIS_URL (environment): {problem}")
        assert "hunter" not in line

    @pytest.mark.parametrize(("name", "least"), [("HS256", 32), ("HS384", 48), ("HS512", 64)])
    def test_short_secret(self, name: str, least: int) -> None:
        """A secret shorter than the hash of its algorithm is refused; bytes count."""
        line = refusal(environ={"JWT_SECRET": "é" * (least // 2 - 1), "JWT_ALGORITHMS": name})

        assert (
            f"JWT_SECRET_KEY (environment JWT_SECRET): {least - 2} bytes are too few: "
            f"{name} needs at least {least} (example: JWT_SECRET=$(openssl rand -base64 48))"
            == line
        )
        environment(JWT_SECRET="é" * (least // 2), JWT_ALGORITHMS=name)

    def test_short_previous_secret(self) -> None:
        """The secret before is as long as the present one, or it is refused."""
        both = {"JWT_SECRET_KEY": SECRET, "JWT_SECRET_KEY_PREVIOUS": "s" * 31}
        line = refusal(environ=both)

        assert line.startswith(
            "JWT_SECRET_KEY_PREVIOUS (environment): 31 bytes are too few: HS256 needs at least 32"
        )
        assert "s" * 31 not in line
        loaded = environment(JWT_SECRET_KEY_PREVIOUS="s" * 32, JWT_SECRET_KEY=SECRET)
        assert "s" * 32 == loaded.settings.jwt_secret_key_previous
        assert () == loaded.warnings

    def test_issuer(self) -> None:
        """Keys of an issuer are public keys, behind a URL; they need no file."""
        url = "https://login.example.com/keys"
        assert (
            "JWT_ALGORITHMS (default): HS256 uses a shared secret, but JWT_JWKS_URL holds public "
            "keys (example: JWT_ALGORITHMS=RS256)" == refusal(environ={"JWT_JWKS_URL": url})
        )
        loaded = environment(JWT_JWKS_URL=url, JWT_ALGORITHMS="RS256,ES256")
        assert (url, None) == (loaded.settings.jwt_jwks_url, loaded.settings.jwt_public_key_file)
        for wrong in ("login.example.com/keys", "https://jo:pw@h/keys", "https://a..b/", "ftp://h"):
            line = refusal(environ={"JWT_JWKS_URL": wrong, "JWT_ALGORITHMS": "RS256"})
            assert line.startswith("JWT_JWKS_URL (environment): ")
            assert "pw" not in line

    def test_longest_hash_decides(self) -> None:
        """With several algorithms the secret is long enough for all."""
        assert "32 bytes are too few: HS256,HS512 needs at least 64" in refusal(
            environ={"JWT_SECRET": SECRET, "JWT_ALGORITHMS": "HS256,HS512"}
        )

    def test_public_key(self, directory: Path) -> None:
        """Algorithms with a public key need a file that holds one, and nothing else."""
        rsa = {"JWT_ALGORITHMS": "RS256,ES256,EdDSA"}
        key = directory / "key.pem"
        with_key = rsa | {"JWT_PUBLIC_KEY_FILE": str(key)}

        assert refusal(environ=rsa).startswith(
            "JWT_PUBLIC_KEY_FILE (default): is not set, but JWT_ALGORITHMS=RS256,ES256,EdDSA needs"
        )
        assert f'"{key}" cannot be read: No such file or directory' in refusal(environ=with_key)
        key.write_text("hello")
        assert f'"{key}" is not a PEM file with a public key' in refusal(environ=with_key)
        key.write_text(PUBLIC_PEM.replace("PUBLIC", "PRIVATE"))
        assert f'"{key}" holds a private key' in refusal(environ=with_key)
        key.write_text(PUBLIC_PEM)
        loaded = environment(**with_key)
        assert (key, ("RS256", "ES256", "EdDSA")) == (
            loaded.settings.jwt_public_key_file,
            loaded.settings.jwt_algorithms,
        )

    def test_a_key_that_no_worker_could_start_with(self, directory: Path) -> None:
        """A key that no algorithm is for, or that is for no signatures, is refused at once."""
        file = directory / "key.pem"
        agreeing = x25519.X25519PrivateKey.generate().public_key()
        other = agreeing.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        for pem, algorithms, problem in (
            (pem_of(KEYS["ES256"]), "RS256", "it is EC on secp256r1, RS256 needs RSA"),
            (pem_of(KEYS["ES384"]), "ES256", "it is EC on secp384r1, ES256 needs EC on secp256r1"),
            (pem_of(KEYS["RS256"]), "EdDSA,RS256", ""),
            (pem_of(KEYS["RS256"]), "ES256,EdDSA", "it is RSA, EdDSA needs Ed25519 or Ed448"),
            (other, "EdDSA", "of a kind that signs no tokens"),
            (PUBLIC_PEM[:60].encode() + PUBLIC_PEM[100:].encode(), "RS256", "no usable key"),
        ):
            file.write_bytes(pem)
            environ = {"JWT_PUBLIC_KEY_FILE": str(file), "JWT_ALGORITHMS": algorithms}
            if problem:
                line = refusal(environ=environ)
                assert problem in line
                assert str(file) in line
            else:
                environment(**environ)

    def test_certificate(self, directory: Path) -> None:
        """A certificate needs its key and a key its certificate; both must be usable."""
        authority = Authority(directory)
        cert, key = map(str, authority.issue())
        _, other = map(str, authority.issue("other"))

        environment(TLS_CERT=cert, TLS_KEY=key)
        assert refusal(environ={"TLS_CERT": cert}).startswith(
            "TLS_KEY (default): is not set, but TLS_CERT is (example: "
        )
        assert refusal(environ={"TLS_KEY": key}).startswith(
            "TLS_CERT (default): is not set, but TLS_KEY is (example: "
        )
        assert refusal(environ={"TLS_CERT": cert, "TLS_KEY": other}).startswith(
            f'TLS_KEY (environment): "{other}" is not the key of "{cert}"'
        )
        assert refusal(environ={"TLS_CERT": "/no/file", "TLS_KEY": key}).startswith(
            'TLS_CERT (environment): "/no/file" cannot be read: No such file or directory'
        )

    @pytest.mark.parametrize("name", ["DATA_DIR", "LOG_DIR"])
    def test_directories(self, directory: Path, name: str) -> None:
        """A directory setting that names a file is refused; one that does not exist is not."""
        file = directory / "file"
        file.touch()

        assert f'{name} (environment): "{file}" is not a directory' in refusal(
            environ={name: str(file)}
        )
        environment(**{name: str(directory / "new")})
        environment(**{name: str(directory)})


class TestWithoutEffect:
    """What is told to be useless."""

    @pytest.mark.parametrize(
        ("environ", "expected"),
        [
            ({"REDIS_URL": "redis://h"}, []),
            ({"REDIS_HOST": "h", "REDIS_DB": "1"}, []),
            (
                {"REDIS_URL": "redis://h", "REDIS_HOST": "x", "REDIS_PASSWORD": "p"},
                [
                    "REDIS_HOST (environment): has no effect, because REDIS_URL is set",
                    "REDIS_PASSWORD (environment): has no effect, because REDIS_URL is set",
                ],
            ),
            (
                {"REDIS_DB": "1"},
                [
                    (
                        "REDIS_DB (environment): has no effect, "
                        "because neither REDIS_URL nor REDIS_HOST is set"
                    )
                ],
            ),
        ],
    )
    def test_redis_values_without_effect(
        self, environ: dict[str, str], expected: list[str]
    ) -> None:
        """What was said about Redis and is not used is told in one line each."""
        assert tuple(expected) == environment(**environ).warnings

    def test_keys_without_effect(self, directory: Path) -> None:
        """A key for the other sort of algorithms is told to be useless."""
        key = directory / "key.pem"
        key.write_text(PUBLIC_PEM)

        [idle_file] = environment(JWT_PUBLIC_KEY_FILE=str(key)).warnings
        [idle_secret] = environment(
            JWT_PUBLIC_KEY_FILE=str(key), JWT_ALGORITHMS="RS256", JWT_SECRET_KEY=SECRET
        ).warnings
        assert "JWT_ALGORITHMS uses a shared secret" in idle_file
        assert "JWT_ALGORITHMS uses a public key" in idle_secret
        assert SECRET not in idle_secret

    def test_an_issuer_without_an_audience(self) -> None:
        """Whoever shares his issuer with other applications is told in one line what is missing."""
        issuer = {
            "JWT_JWKS_URL": "https://login.example.com/keys",
            "JWT_ALGORITHMS": "RS256",
        }
        [warning] = environment(**issuer).warnings
        assert warning.startswith("JWT_AUDIENCE: is not set beside JWT_JWKS_URL: ")
        assert () == environment(**issuer, JWT_AUDIENCE="us").warnings
        assert () == environment(JWT_SECRET_KEY=SECRET).warnings

    def test_previous_secret_without_effect(self, directory: Path) -> None:
        """One that is the present one, or that stands beside a public key, is told."""
        key = directory / "key.pem"
        key.write_text(PUBLIC_PEM)

        [same] = environment(JWT_SECRET_KEY=SECRET, JWT_SECRET_KEY_PREVIOUS=SECRET).warnings
        [idle] = environment(
            JWT_PUBLIC_KEY_FILE=str(key), JWT_ALGORITHMS="RS256", JWT_SECRET_KEY_PREVIOUS=SECRET
        ).warnings
        assert same.endswith("has no effect, because it is JWT_SECRET_KEY itself")
        assert "JWT_ALGORITHMS uses a public key" in idle
        assert not any(SECRET in line for line in (same, idle))

    @pytest.mark.parametrize(
        ("announced", "kept", "idle"),
        [
            ("room.*", "lobby", ["room.*"]),
            ("room.*", "none", ["room.*"]),
            ("room.7,lobby", "room.*", ["lobby"]),
            ("room.*,*.x", "lobby.*,hall", ["room.*"]),
            ("room.*", "**", []),
            ("room.*", "room.7", []),
            ("room.7.*", "room.**", []),
            ("r*", "room.*", []),
            ("room.*", "*.x", []),
        ],
    )
    def test_announced_topics_without_effect(
        self, announced: str, kept: str, idle: list[str]
    ) -> None:
        """Who comes and goes is announced only where it is kept who is there."""
        warnings = environment(ANNOUNCED_TOPICS=announced, PRESENCE_TOPICS=kept).warnings
        assert idle == [warning.split()[1] for warning in warnings]
        assert all(warning.startswith("ANNOUNCED_TOPICS: ") for warning in warnings)

    def test_certificate_that_ends(self, directory: Path) -> None:
        """A certificate that will soon be of no use is told of; one with time left is not."""
        authority = Authority(directory)
        cert, key = map(str, authority.issue())
        short, its_key = map(str, authority.issue("short", ends=86_400))

        assert () == environment(TLS_CERT=cert, TLS_KEY=key).warnings
        [warning] = environment(TLS_CERT=short, TLS_KEY=its_key).warnings
        assert warning.startswith(f'TLS_CERT: "{short}" expires soon')
