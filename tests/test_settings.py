"""The settings: read once, typed, and every problem named at once."""

from pathlib import Path

import pytest

from serving import _summary
from settings import Settings, SettingsError, load_environ, load_settings

LOGIN = {"JWKS_URL": "https://issuer.example/jwks", "JWT_ISSUER": "https://issuer.example"}


def problems(**environ: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        Settings.from_environ(environ)
    return caught.value.problems


def test_nothing_needs_to_be_set() -> None:
    settings = Settings.from_environ({})
    assert (settings.host, settings.port, settings.offline) == ("127.0.0.1", 8000, True)


def test_every_problem_is_named_in_one_message() -> None:
    found = problems(PORT="http", WORKERS="0", HEARTBEAT_SECONDS="-1", ON_DISCONNECT="stay", OPENAI_STORE="maybe")
    assert [line.split()[0] for line in found] == [
        "PORT",
        "WORKERS",
        "OPENAI_STORE",
        "HEARTBEAT_SECONDS",
        "ON_DISCONNECT",
    ]
    assert "PORT must be a whole number from 0 to 65535." in found


@pytest.mark.parametrize(
    "environ",
    [
        {"DATABASE_URL": "mysql://localhost/chat"},
        {"DATABASE_URL": "sqlite://"},
        {"DATABASE_URL": "sqlite:///:memory:"},
        {"TABLE_PREFIX": "bad-prefix; DROP TABLE"},
        {"JWKS_URL": "ftp://issuer/keys", "JWT_ISSUER": "issuer"},
        {"OPENAI_API": "assistants"},
        {"ROOT_PATH": "chat"},
        {"PORT": "9" * 5000},
        {"MCP_SERVER_URL": "https://tools.example,not an address"},
        {"LOG_FORMAT": "xml"},
        {"JWT_ISSUER": "https://issuer.example"},
        {"OPENAI_API_KEY_FILE": "/nowhere/key"},
        {"MCP_SERVER_URL": "http://tools.example/mcp", "MCP_FORWARD_AUTH": "1", **LOGIN},
        {"MCP_SERVER_URL": "https://tools.example/mcp", "MCP_FORWARD_AUTH": "1"},
        {"HOST": "two words"},
        {"JWKS_URL": "http://[keys", "JWT_ISSUER": "issuer"},
        {"PUBLIC_URL": "https://chat.example:99999"},
        {"PUBLIC_URL": "https://chat.example/?user=1"},
        {"PUBLIC_URL": "https://chat example"},
        {"DATABASE_URL": "postgresql://"},
        {"DATABASE_URL": "postgresql+asyncpg://user@host/chat"},
        {"ROOT_PATH": "/two words"},
        {"ROOT_PATH": "//host"},
        {"FORWARDED_ALLOW_IPS": "127.0.0.1, proxy"},
        {"FORWARDED_ALLOW_IPS": "10.0.0.1/8"},
        {"ALLOWED_ORIGINS": "*"},
        {"ALLOWED_ORIGINS": "https://good.example, bad.example"},
        {"ALLOWED_ORIGINS": "https://good.example/page"},
        {"ALLOWED_ORIGINS": "https://good.example:port"},
        {"ATTACHMENT_TYPES": "image/png, pdf"},
        {"AGENT": "./agent.py"},
        {"AGENT": "my_agent.py"},
        {"AGENT": ":make"},
        {"OPENAI_API_KEY": "sk-one\nsk-two"},
        {"OPENAI_DEFAULT_MODEL": "a\udcffb"},
        {"RETENTION_DAYS": "99999999999"},
        {"TURN_TIMEOUT_SECONDS": "nan"},
        {"LOG_LEVEL": "verbose"},
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(environ: dict[str, str]) -> None:
    [problem] = problems(**environ)
    assert problem.endswith(".")


def test_a_problem_names_the_entry_of_a_list_and_no_secret() -> None:
    [problem] = problems(ALLOWED_ORIGINS="https://good.example, bad.example")
    assert "bad.example" in problem
    assert "good.example" not in problem
    [problem] = problems(OPENAI_API_KEY="sk-one\nsk-two")
    assert "sk-" not in problem


def test_origins_are_taken_as_browsers_send_them() -> None:
    origins = "https://App.example/, http://localhost:3000, https://app.example:443, tauri://localhost"
    settings = Settings.from_environ({"ALLOWED_ORIGINS": origins})
    assert settings.allowed_origins == (
        "https://app.example",
        "http://localhost:3000",
        "https://app.example",
        "tauri://localhost",
    )


@pytest.mark.parametrize(
    "url", ["postgresql:///chat?host=/run/postgresql", "postgresql://a:1,b:2/chat", "postgresql://[::1]:5432/chat"]
)
def test_an_address_that_libpq_reads_is_taken(url: str) -> None:
    assert Settings.from_environ({"DATABASE_URL": url}).database_url == url


@pytest.mark.parametrize("password", ["secret", "sec?ret", "sec@ret", "sec/ret", "sec#ret", "sec%3Fret", "?", ""])
def test_a_databases_name_shows_where_it_is_and_nothing_of_its_password(password: str) -> None:
    url = f"postgresql://user:{password}@db.internal:5432/chatkit?sslmode=require"
    assert Settings.from_environ({"DATABASE_URL": url}).database_name == "PostgreSQL at db.internal:5432/chatkit"


def test_a_key_sets_address_is_kept_to_the_letter() -> None:
    environ = {"JWKS_URL": "https://issuer.example/keys/", "JWT_ISSUER": "https://issuer.example/"}
    settings = Settings.from_environ(environ)
    assert (settings.jwks_url, settings.jwt_issuer) == ("https://issuer.example/keys/", "https://issuer.example/")


def test_a_key_set_needs_an_issuer() -> None:
    [problem] = problems(JWKS_URL="https://issuer.example/jwks")
    assert problem.startswith("JWT_ISSUER must be set")


def test_better_auths_own_names_are_enough() -> None:
    settings = Settings.from_environ(
        {"BETTER_AUTH_JWKS_URL": "http://localhost:3000/api/auth/jwks", "BETTER_AUTH_ISSUER": "http://localhost:3000"}
    )
    assert settings.jwks_url == "http://localhost:3000/api/auth/jwks"
    assert settings.jwt_issuer == "http://localhost:3000"


def test_an_empty_variable_counts_as_unset() -> None:
    assert Settings.from_environ({"PORT": "", "OPENAI_API_KEY": " "}) == Settings()


def test_an_empty_variable_does_not_reach_the_openai_sdks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_DEFAULT_MODEL", "OPENAI_ORG_ID"):
        monkeypatch.setenv(name, " ")
    (tmp_path / ".env").write_text("OPENAI_PROJECT_ID=\n")
    environ = load_environ(tmp_path / ".env")
    assert not [name for name in environ if name.startswith("OPENAI_") and not environ[name].strip()]


@pytest.mark.parametrize(
    ("content", "named"),
    [(b"AGENT=m\xfcller\n", "UTF-8"), (b"A=1\x00\n", "UTF-8"), (b"# fine\nPORT 8000\n", "line 2")],
)
def test_a_file_of_settings_that_cannot_be_read_is_named(tmp_path: Path, content: bytes, named: str) -> None:
    (tmp_path / ".env").write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        load_environ(tmp_path / ".env")
    [problem] = caught.value.problems
    assert named in problem
    assert str(tmp_path / ".env") in problem


@pytest.mark.parametrize("content", [b"AGENT=m\xfcller\n", b"TRANSCRIBE_MODEL=from-the-file\nPORT 8000\n", None])
def test_what_is_wrong_with_the_file_is_named_together_with_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    dotenv = tmp_path / ".env"
    dotenv.mkdir() if content is None else dotenv.write_bytes(content)
    monkeypatch.setenv("WORKERS", "none")
    monkeypatch.setenv("LOG_LEVEL", "verbose")
    monkeypatch.setenv("TRANSCRIBE_MODEL", "mine")
    with pytest.raises(SettingsError) as caught:
        load_settings(dotenv)
    file, *others = caught.value.problems
    assert str(dotenv) in file
    assert [line.split()[0] for line in others] == ["WORKERS", "LOG_LEVEL"]


def test_a_secret_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-from-a-file\n")
    settings = Settings.from_environ({"OPENAI_API_KEY_FILE": str(tmp_path / "key")})
    assert settings.openai_api_key == "sk-from-a-file"


def test_a_secrets_file_that_is_empty_is_named(tmp_path: Path) -> None:
    (tmp_path / "key").touch()
    with pytest.raises(SettingsError, match="OPENAI_API_KEY_FILE names an empty file"):
        Settings.from_environ({"OPENAI_API_KEY_FILE": str(tmp_path / "key")})


def test_in_the_file_the_last_of_a_name_counts_and_an_empty_variable_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PORT", "")
    (tmp_path / ".env").write_text("PORT=1\nPORT=2\n")
    assert load_environ(tmp_path / ".env")["PORT"] == "2"


def test_secrets_do_not_show_when_settings_are_printed() -> None:
    environ = {
        "OPENAI_API_KEY": "sk-secret",
        "DATABASE_URL": "postgresql://user:secret@host/db",
        "OPENAI_BASE_URL": "https://user:secret@gateway.example:8443/v1",
    }
    settings = Settings.from_environ(environ)
    assert "secret" not in repr(settings)
    said = _summary(settings)  # in the log's first line
    assert "https://gateway.example:8443/v1" in said
    assert "secret" not in said


def test_the_environment_wins_over_the_file_and_the_openai_sdk_sees_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PORT", "9000")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("TOUCHED_BY_THE_FILE", "")
    (tmp_path / ".env").write_text(
        '\ufeff# a comment\n\nPORT=1\nTRANSCRIBE_MODEL="w # 1" # a comment\n'
        "export OPENAI_API_KEY = 'sk-quoted # not a comment'  \nAGENT=mine # a comment\n",
        encoding="utf-8",
    )
    environ = load_environ(tmp_path / ".env")
    try:
        settings = Settings.from_environ(environ)
        assert (settings.port, settings.agent, settings.transcribe_model) == (9000, "mine", "w # 1")
        assert environ["OPENAI_API_KEY"] == "sk-quoted # not a comment"
    finally:
        monkeypatch.delenv("OPENAI_API_KEY")
        monkeypatch.delenv("AGENT")
        monkeypatch.delenv("TRANSCRIBE_MODEL")
