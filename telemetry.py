"""What is told of each request: an id, and one line in the log at its end. Nothing in it is anybody's words."""

import hmac
import json
import logging
import re
import secrets
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

import metrics

log = logging.getLogger("service.requests")

METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}

EVENT_STREAM = (b"content-type", b"text/event-stream")


@dataclass
class RequestNotes:
    """What is known of the request that is being answered. Times are seconds of `time.monotonic`."""

    id: str = field(default_factory=lambda: secrets.token_hex(8))
    began_at: float = field(default_factory=time.monotonic)
    operation: str | None = None
    user_id: str | None = None
    """In clear: only its pseudonym is ever written."""
    thread_id: str | None = None
    is_turn: bool = False
    outcome: str | None = None
    status: int = 0
    sent_bytes: int = 0
    first_byte_at: float | None = None
    first_token_at: float | None = None
    is_stream: bool = False

    def seconds_to(self, moment: float | None) -> float | None:
        return None if moment is None else round(moment - self.began_at, 4)

    def note_sent(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.is_stream = EVENT_STREAM in message["headers"]
            if self.is_stream:
                metrics.count_open_streams(1)
        elif body := message.get("body", b""):
            self.first_byte_at = self.first_byte_at or time.monotonic()
            self.sent_bytes += len(body)

    def note_end(self) -> None:
        self.outcome = self.outcome or _outcome(self.status)
        if self.is_stream:
            metrics.count_open_streams(-1)
        if self.is_turn:
            metrics.count_turn(self.outcome, self.seconds_to(self.first_token_at))


_current: ContextVar[RequestNotes | None] = ContextVar("request", default=None)


def request_id() -> str | None:
    """Return the id of the request on whose behalf this runs, if any: in its own task and in those begun by it."""
    notes = _current.get()
    return notes.id if notes else None


def note(**fields: Any) -> None:
    """Note fields of the current request's `RequestNotes`; outside of one nothing happens."""
    if notes := _current.get():
        for name, value in fields.items():
            setattr(notes, name, value)


def note_first_token() -> None:
    note(first_token_at=time.monotonic())


def pseudonym(user_id: str, key: bytes) -> str:
    """Return what stands for the user in the log: who lacks the key cannot find it out by trying all users."""
    return hmac.digest(key, b"log " + user_id.encode(errors="surrogatepass"), "sha256").hex()[:16]


class Telemetry:
    """ASGI middleware, the outermost: each answer carries its request's id, and each request ends with a line.

    The scope's state has the key of pseudonyms as `log_key`.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        notes = RequestNotes()
        state = scope.setdefault("state", {})
        state["request_id"] = notes.id

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", notes.id.encode())]
            notes.note_sent(message)
            await send(message)

        token = _current.set(notes)
        try:
            await self._app(scope, receive, send_noted)
        finally:
            notes.note_end()
            log.info("request", extra={"fields": _line(notes, scope, state.get("log_key", b""))})
            _current.reset(token)


def _outcome(status: int) -> str:
    if not status:  # ended before an answer began
        return "stopped"
    return "completed" if status < 400 else "refused" if status < 500 else "failed"


def _line(notes: RequestNotes, scope: Scope, key: bytes) -> dict[str, Any]:
    fields = {
        "operation": notes.operation or f"{_method(scope)} {getattr(scope.get('route'), 'path', 'elsewhere')}",
        "user": None if notes.user_id is None else pseudonym(notes.user_id, key),
        "thread": notes.thread_id if re.fullmatch("thr_[0-9a-f]{32}", notes.thread_id or "") else None,
        "status": notes.status,
        "first_byte_seconds": notes.seconds_to(notes.first_byte_at),
        "first_token_seconds": notes.seconds_to(notes.first_token_at),
        "total_seconds": notes.seconds_to(time.monotonic()),
        "bytes": notes.sent_bytes,
        "outcome": notes.outcome,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _method(scope: Scope) -> str:
    """Return the request's method; one that nobody takes is its sender's own words."""
    return scope["method"] if scope["method"] in METHODS else "?"


class WithoutQueries(logging.Filter):
    """Cuts the query off the paths in uvicorn's access log: links to attachments are secrets."""

    def filter(self, record: logging.LogRecord) -> bool:
        match record.args:
            case (client, method, str(path), *rest):  # as uvicorn 0.54 logs a request
                record.args = (client, method, path.partition("?")[0], *rest)
        return True


@contextmanager
def no_queries_in_access_log() -> Iterator[None]:
    """For a server that keeps such a log, as uvicorn's own command does."""
    access, cut = logging.getLogger("uvicorn.access"), WithoutQueries()
    access.addFilter(cut)
    try:
        yield
    finally:
        access.removeFilter(cut)


# --- the log ------------------------------------------------------------------------------------------------------


def logging_config(level: str, format: str) -> dict[str, Any]:
    """Return a configuration that writes all that is logged to standard error, as `text` or as lines of `json`."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"text": {"()": TextLines}, "json": {"()": JsonLines}},
        "handlers": {"stderr": {"()": StandardError, "formatter": format}},
        "root": {"level": "WARNING", "handlers": ["stderr"]},
        "loggers": {
            "service": {"level": level},
            "chatkit": {"level": "ERROR", "handlers": []},  # it adds a handler of its own where LOG_LEVEL is set
        },
    }


class StandardError(logging.StreamHandler[Any]):
    """Takes Python's warnings too, so that they are lines like all others."""

    def __init__(self) -> None:
        super().__init__()
        logging.captureWarnings(True)


class TextLines(logging.Formatter):
    """`2026-01-01 12:00:00,000 INFO service [id] message name=value …`."""

    def format(self, record: logging.LogRecord) -> str:
        known = request_id()
        line = f"{self.formatTime(record)} {record.levelname} {record.name} {f'[{known}] ' if known else ''}"
        line += " ".join([record.getMessage(), *(f"{name}={_plain(value)}" for name, value in _fields(record).items())])
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line

    def formatException(self, ei: Any) -> str:  # noqa: N802 (logging's name)
        return _where(ei)


class JsonLines(logging.Formatter):
    """One object a line, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **({"request_id": known} if (known := request_id()) else {}),
            **_fields(record),
            **({"exception": _where(record.exc_info)} if record.exc_info else {}),
        }
        return json.dumps(line)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


def _plain(value: Any) -> str:
    text = str(value)
    return text if re.fullmatch(r"[\w./:{}-]+", text, re.ASCII) else json.dumps(text)


ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def _where(exception: ExceptionInfo) -> str:
    """Return kinds of exceptions and where they were raised, and not what they say: that may quote a user."""
    lines, error = [], exception[1]
    while error is not None:
        lines.append(type(error).__name__)
        lines += [f"  {at.filename}:{at.lineno} in {at.name}" for at in traceback.extract_tb(error.__traceback__)[-10:]]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n".join(lines)
