"""The environment, read once into one frozen `Settings`."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

MIB = 1024 * 1024

ATTACHMENT_TYPES = (
    "image/png",
    "image/jpeg",
    "image/gif",
    "image/webp",
    "application/pdf",
    "text/plain",
    "text/markdown",
    "text/csv",
    "application/json",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
    "application/vnd.openxmlformats-officedocument.presentationml.presentation",
)


class SettingsError(Exception):
    """Every setting that is missing or unreadable, one sentence each, in `problems`."""

    def __init__(self, problems: list[str]):
        super().__init__("The settings need attention:\n" + "\n".join(f"  - {problem}" for problem in problems))
        self.problems = problems


Reader = Callable[[str], Any]
"""Makes a value of a variable's text, or raises `ValueError` with what would be right ("must be …")."""


def _text(value: str) -> str:
    return value


def _flag(value: str) -> bool:
    match value.lower():
        case "1" | "true" | "yes" | "on":
            return True
        case "0" | "false" | "no" | "off":
            return False
    raise ValueError("must be 1 or 0")


def _items(value: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in value.split(",") if item.strip())


def _whole(least: int, most: int = 2**53) -> Reader:
    def read(value: str) -> int:
        if not re.fullmatch(r"\d{1,16}", value) or not least <= int(value) <= most:
            raise ValueError(f"must be a whole number from {least}" + ("" if most == 2**53 else f" to {most}"))
        return int(value)

    return read


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1
    if not 0 < seconds <= 86400:
        raise ValueError("must be a number of seconds above 0, at most 86400")
    return seconds


def _one_of(*choices: str) -> Reader:
    def read(value: str) -> str:
        for choice in choices:
            if value.lower() == choice.lower():
                return choice
        raise ValueError("must be one of " + ", ".join(choices))

    return read


def _web_address(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be an http:// or https:// address")
    return value.rstrip("/")


def _web_addresses(value: str) -> tuple[str, ...]:
    return tuple(_web_address(item) for item in _items(value))


def _database_url(value: str) -> str:
    path = value.removeprefix("sqlite:///")
    if path != value and path not in ("", ":memory:"):
        return value
    if value.startswith(("postgresql://", "postgres://")) and urlsplit(value).hostname:
        return value
    raise ValueError("must be sqlite:///FILE, sqlite:////absolute/FILE or postgresql://USER@HOST/DATABASE")


def _sql_prefix(value: str) -> str:
    if not re.fullmatch(r"[a-z_][a-z0-9_]{0,29}", value):
        raise ValueError("must be at most 30 lower-case letters, digits and underscores, and begin with no digit")
    return value


def _path_prefix(value: str) -> str:
    if not value.startswith("/"):
        raise ValueError("must begin with a slash, such as /chat")
    return value.rstrip("/")


def _setting(read: Reader, default: Any = None, *, secret: bool = False) -> Any:
    return field(default=default, repr=not secret, metadata={"read": read})


@dataclass(frozen=True)
class Settings:
    """Each field is the environment variable of the same name in capitals; the README's table explains them."""

    host: str = _setting(_text, "127.0.0.1")
    port: int = _setting(_whole(0, 65535), 8000)
    workers: int = _setting(_whole(1, 64), 1)
    database_url: str = _setting(_database_url, "sqlite:///chatkit.db", secret=True)
    table_prefix: str = _setting(_sql_prefix, "chatkit_")
    jwks_url: str | None = _setting(_web_address)
    jwt_issuer: str | None = _setting(_text)
    jwt_audience: str | None = _setting(_text)
    jwt_user_claim: str = _setting(_text, "sub")
    allow_anonymous: bool = _setting(_flag, False)
    openai_api_key: str | None = _setting(_text, secret=True)
    openai_base_url: str | None = _setting(_web_address)
    openai_default_model: str | None = _setting(_text)
    openai_api: str = _setting(_one_of("responses", "chat_completions"), "responses")
    openai_store: bool = _setting(_flag, False)
    agents_tracing: bool = _setting(_flag, False)
    models: tuple[str, ...] = _setting(_items, ())
    transcribe_model: str = _setting(_text, "gpt-4o-transcribe")
    mcp_server_url: tuple[str, ...] = _setting(_web_addresses, ())
    mcp_forward_auth: bool = _setting(_flag, False)
    agent: str = _setting(_text, "agent")
    allowed_origins: tuple[str, ...] = _setting(_items, ("http://localhost:3000",))
    public_url: str | None = _setting(_web_address)
    root_path: str = _setting(_path_prefix, "")
    forwarded_allow_ips: str = _setting(_text, "127.0.0.1")
    chatkit_domain_key: str = _setting(_text, "localhost-dev")
    max_attachment_bytes: int = _setting(_whole(1), 20 * MIB)
    attachment_types: tuple[str, ...] = _setting(_items, ATTACHMENT_TYPES)
    max_storage_bytes_per_user: int = _setting(_whole(0), 1024 * MIB)
    turn_timeout_seconds: float = _setting(_seconds, 300)
    shutdown_grace_seconds: float = _setting(_seconds, 20)
    heartbeat_seconds: float = _setting(_seconds, 15)
    turns_per_minute: int = _setting(_whole(0), 30)
    concurrent_turns_per_user: int = _setting(_whole(0), 4)
    tokens_per_day: int = _setting(_whole(0), 0)
    max_turns: int = _setting(_whole(0), 500)
    history_items: int = _setting(_whole(1, 10_000), 100)
    on_disconnect: str = _setting(_one_of("cancel", "finish"), "cancel")
    retention_days: int = _setting(_whole(0), 0)
    log_level: str = _setting(_one_of("DEBUG", "INFO", "WARNING", "ERROR"), "INFO")
    log_format: str = _setting(_one_of("text", "json"), "text")

    @property
    def offline(self) -> bool:
        """Whether the demo agent answers, because no model is configured."""
        return not (self.openai_api_key or self.openai_base_url)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Self:
        """Raise `SettingsError` naming every variable that is missing or unreadable. An empty one counts as unset."""
        given = {name: value.strip() for name, value in environ.items() if value.strip()}
        problems: list[str] = []
        _take_aliases(given)
        _take_secret_files(given, problems)
        values: dict[str, Any] = {}
        for each in fields(cls):
            name = each.name.upper()
            if name in given:
                try:
                    values[each.name] = each.metadata["read"](given[name])
                except ValueError as error:
                    problems.append(f"{name} {error}.")
        problems += _contradictions(given, values)
        if problems:
            raise SettingsError(problems)
        return cls(**values)


def _take_aliases(given: dict[str, str]) -> None:
    for name, alias in (("JWKS_URL", "BETTER_AUTH_JWKS_URL"), ("JWT_ISSUER", "BETTER_AUTH_ISSUER")):
        if alias in given:
            given.setdefault(name, given[alias])


def _take_secret_files(given: dict[str, str], problems: list[str]) -> None:
    for name in ("OPENAI_API_KEY", "DATABASE_URL"):
        if name not in given and (path := given.get(f"{name}_FILE")):
            try:
                given[name] = Path(path).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError):
                problems.append(f"{name}_FILE must name a readable text file: {path}.")


def _contradictions(given: Mapping[str, str], values: Mapping[str, Any]) -> list[str]:
    problems = []
    if "JWKS_URL" in given and "JWT_ISSUER" not in given:
        problems.append("JWT_ISSUER must be set with JWKS_URL: the `iss` that tokens carry.")
    if "JWT_ISSUER" in given and "JWKS_URL" not in given:
        problems.append("JWKS_URL must be set with JWT_ISSUER: without it no token would be checked.")
    if values.get("mcp_forward_auth"):
        for url in values.get("mcp_server_url", ()):
            if not url.startswith("https://") and not is_loopback(urlsplit(url).hostname or ""):
                problems.append(f"MCP_FORWARD_AUTH would send users' tokens in clear to {url}: use https.")
    return problems


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only be this machine."""
    return host in ("localhost", "::1") or host.endswith(".localhost") or bool(re.fullmatch(r"127(\.\d{1,3}){3}", host))


def load_environ(dotenv: Path) -> Mapping[str, str]:
    """Return the process environment, completed by the `.env` file where it has one; the environment wins.

    What the file adds is put into `os.environ` too, so that the OpenAI SDK and the agent's own code see it.
    """
    if dotenv.is_file():
        for name, value in _parse_dotenv(dotenv.read_text(encoding="utf-8")):
            os.environ.setdefault(name, value)
    return os.environ


def _parse_dotenv(text: str) -> list[tuple[str, str]]:
    pairs = []
    for line in text.splitlines():
        match = re.fullmatch(r"\s*(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(.*?)\s*", line)
        if match:
            name, value = match.groups()
            if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
                value = value[1:-1]
            else:
                value = re.sub(r"\s+#.*$", "", value)
            pairs.append((name, value))
    return pairs
