"""The environment, read once into one frozen `Settings`."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import SplitResult, urlsplit

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
    if not value.isprintable():
        raise ValueError("must be one line of printable characters")
    return value


def _name(value: str) -> str:
    if not re.fullmatch(r"[!-~]+", value):
        raise ValueError("must be a name without spaces")
    return value


def _flag(value: str) -> bool:
    match value.lower():
        case "1" | "true" | "yes" | "on":
            return True
        case "0" | "false" | "no" | "off":
            return False
    raise ValueError("must be 1 or 0")


def _each(read: Reader) -> Reader:
    """Read a comma-separated list; a problem names the item that has it."""

    def read_all(value: str) -> tuple[Any, ...]:
        values = []
        for item in filter(None, map(str.strip, _text(value).split(","))):
            try:
                values.append(read(item))
            except ValueError as error:
                raise ValueError(f"{error}, and {item[:100]!r} is not") from None
        return tuple(values)

    return read_all


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


def _split(address: str) -> SplitResult | None:
    """Return the parts of an address that has a host, and a port that could be one; None of any other."""
    try:
        parts = urlsplit(address)
        _ = parts.port
    except ValueError:
        return None
    return parts if parts.hostname and re.fullmatch(r"[!-~]+", address) else None


def _web_address(value: str) -> str:
    parts = _split(value)
    if parts is None or parts.scheme not in ("http", "https"):
        raise ValueError("must be an http:// or https:// address")
    return value


def _base_address(value: str) -> str:
    if "?" in value or "#" in value:
        raise ValueError("must be an address without ? and #")
    return _web_address(value).rstrip("/")


def _origin(value: str) -> str:
    """Read an origin; it becomes what browsers write: in lower case, without the port that its scheme has anyway."""
    parts = _split(value.lower())
    if parts is None or parts.username is not None or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError("must be origins, such as https://app.example or http://localhost:3000")
    return origin_of(value)


def _database_url(value: str) -> str:
    path = value.removeprefix("sqlite:///")
    if path != value and path not in ("", ":memory:") and path.isprintable():
        return value
    if re.fullmatch(r"postgres(ql)?://\S+", value):  # the driver knows what else may stand there
        return value
    raise ValueError("must be sqlite:///FILE, sqlite:////absolute/FILE or postgresql://USER:PASSWORD@HOST/DATABASE")


def _sql_prefix(value: str) -> str:
    if not re.fullmatch(r"[a-z_][a-z0-9_]{0,29}", value):
        raise ValueError("must be at most 30 lower-case letters, digits and underscores, and begin with no digit")
    return value


def _path_prefix(value: str) -> str:
    if not re.fullmatch(r"/|(/[\w.~%-]+)+/?", value, re.ASCII):
        raise ValueError("must be a path that begins with a slash, such as /chat")
    return value.rstrip("/")


def _proxies(value: str) -> str:
    try:
        for item in value.split(","):
            if item.strip() not in ("", "*"):
                ip_network(item.strip())
    except ValueError:
        raise ValueError("must be IP addresses or networks, such as 127.0.0.1, 10.0.0.0/8, or * for all") from None
    return value


def _media_type(value: str) -> str:
    if not re.fullmatch(r"[\w.+-]+/[\w.+-]+", value, re.ASCII):
        raise ValueError("must be media types, such as image/png")
    return value.lower()


def _agent(value: str) -> str:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*(:[^\W\d]\w*)?", value) or value.endswith(".py"):
        raise ValueError("must be a module, or module:function, as Python imports it: my_agent for a file my_agent.py")
    return value


def _setting(read: Reader, default: Any = None, *, secret: bool = False) -> Any:
    return field(default=default, repr=not secret, metadata={"read": read})


@dataclass(frozen=True)
class Settings:
    """Each field is the environment variable of the same name in capitals; the README's table explains them."""

    host: str = _setting(_name, "127.0.0.1")
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
    openai_base_url: str | None = _setting(_base_address, secret=True)
    openai_default_model: str | None = _setting(_text)
    openai_api: Literal["responses", "chat_completions"] = _setting(
        _one_of("responses", "chat_completions"), "responses"
    )
    openai_store: bool = _setting(_flag, False)
    agents_tracing: bool = _setting(_flag, False)
    models: tuple[str, ...] = _setting(_each(_text), ())
    transcribe_model: str = _setting(_text, "gpt-4o-transcribe")
    mcp_server_url: tuple[str, ...] = _setting(_each(_web_address), ())
    mcp_forward_auth: bool = _setting(_flag, False)
    agent: str = _setting(_agent, "agent")
    allowed_origins: tuple[str, ...] = _setting(_each(_origin), ("http://localhost:3000",))
    public_url: str | None = _setting(_base_address)
    root_path: str = _setting(_path_prefix, "")
    forwarded_allow_ips: str = _setting(_proxies, "127.0.0.1")
    chatkit_domain_key: str = _setting(_text, "localhost-dev")
    max_attachment_bytes: int = _setting(_whole(1), 20 * MIB)
    attachment_types: tuple[str, ...] = _setting(_each(_media_type), ATTACHMENT_TYPES)
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
    retention_days: int = _setting(_whole(0, 36_500), 0)
    log_level: str = _setting(_one_of("DEBUG", "INFO", "WARNING", "ERROR"), "INFO")
    log_format: str = _setting(_one_of("text", "json"), "text")

    @property
    def offline(self) -> bool:
        """Whether the demo agent answers, because no model is configured."""
        return not (self.openai_api_key or self.openai_base_url)

    @property
    def database_name(self) -> str:
        """The database's kind and place, without its password: fit for the log."""
        if self.database_url.startswith("sqlite:///"):
            return f"SQLite in {Path(self.database_url.removeprefix('sqlite:///')).absolute()}"
        address = self.database_url.partition("://")[2]
        place = re.sub(r"^[^/@]*@", "", address).partition("?")[0]  # as libpq reads it: a password may have a ?
        return f"PostgreSQL at {place.rpartition('@')[2] or 'this machine'}"

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
                continue
            if not given[name]:
                problems.append(f"{name}_FILE names an empty file: {path}.")


def _contradictions(given: Mapping[str, str], values: Mapping[str, Any]) -> list[str]:
    problems = []
    if "JWKS_URL" in given and "JWT_ISSUER" not in given:
        problems.append("JWT_ISSUER must be set with JWKS_URL: the `iss` that tokens carry.")
    if "JWT_ISSUER" in given and "JWKS_URL" not in given:
        problems.append("JWKS_URL must be set with JWT_ISSUER: without it no token would be checked.")
    if values.get("mcp_forward_auth"):
        if "JWKS_URL" not in given:
            problems.append("MCP_FORWARD_AUTH needs JWKS_URL and JWT_ISSUER: without login no user has a token.")
        for url in values.get("mcp_server_url", ()):
            if not url.startswith("https://") and not is_loopback(urlsplit(url).hostname or ""):
                shown = without_password(url)
                problems.append(f"MCP_FORWARD_AUTH would send users' tokens in clear to {shown}: use https.")
    return problems


def origin_of(address: str) -> str:
    """Return the address's origin as browsers write it."""
    parts = urlsplit(address.lower())
    usual_port = {"http": ":80", "https": ":443"}.get(parts.scheme, "/")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2].removesuffix(usual_port)}"


def without_password(address: str) -> str:
    """Return the address as it may be shown, without the user and the password that it may have."""
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only be this machine."""
    return host in ("localhost", "::1") or host.endswith(".localhost") or bool(re.fullmatch(r"127(\.\d{1,3}){3}", host))


def load_settings(dotenv: Path) -> Settings:
    """Return the settings of this process; raise `SettingsError` naming what is wrong in the file and in all else."""
    problems: list[str] = []
    try:
        load_environ(dotenv)
    except SettingsError as error:
        problems = error.problems
    try:
        settings = Settings.from_environ(os.environ)
    except SettingsError as error:
        problems += error.problems
    if problems:
        raise SettingsError(problems)
    return settings


def load_environ(dotenv: Path) -> Mapping[str, str]:
    """Return the process environment, completed by the `.env` file where it has one; the environment wins.

    What the file adds is put into `os.environ` too, so that the OpenAI SDKs and the agent's own code see it. Empty
    variables of theirs are taken out, since they would not count them as unset. Raises `SettingsError`.
    """
    problems: list[str] = []
    if dotenv.exists():
        for name, value in dict(_parse_dotenv(dotenv, problems)).items():  # of a name that stands twice, the last
            if not os.environ.get(name, "").strip():
                os.environ[name] = value
    for name in [name for name, value in os.environ.items() if name.startswith("OPENAI_") and not value.strip()]:
        del os.environ[name]
    if problems:
        raise SettingsError(problems)
    return os.environ


def _parse_dotenv(file: Path, problems: list[str]) -> list[tuple[str, str]]:
    text, pairs = "", []
    try:
        text = file.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise ValueError
    except OSError as error:
        problems.append(f"{file} cannot be read: {error.strerror}.")
    except ValueError:
        problems.append(f"{file} is not text in UTF-8: save it as such.")
        text = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if match := re.fullmatch(r"\s*(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(.*?)\s*", line):
            pairs.append((match[1], _unquoted(match[2])))
        elif line.strip() and not line.lstrip().startswith("#"):
            problems.append(f"{file}, line {number}, must be NAME=value, or begin with # for a comment.")
    return pairs


def _unquoted(value: str) -> str:
    quoted = re.fullmatch(r"""(["'])(.*?)\1(\s*#.*)?""", value)
    return quoted[2] if quoted else re.sub(r"(^|\s+)#.*$", "", value)
