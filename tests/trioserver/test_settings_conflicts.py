"""What is wrong or useless about settings that are good one by one."""

from pathlib import Path

import pytest

from tests.trioserver.loading import SECRET, environment, refusal

PUBLIC_PEM = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----\n"


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
