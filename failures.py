"""What a failure says to the user, and what it says to the log."""

import asyncio
import logging
import os
import socket
import sqlite3
import ssl
import traceback
from collections.abc import Mapping

import httpx2
import openai
from agents.exceptions import (
    InputGuardrailTripwireTriggered,
    MaxTurnsExceeded,
    ModelBehaviorError,
    ModelRefusalError,
    ModelTimeoutError,
    OutputGuardrailTripwireTriggered,
    ToolTimeoutError,
    UserError,
)
from chatkit.errors import CustomStreamError, StreamError
from chatkit.types import ErrorEvent

from conversations import QuotaExceeded, StoreUnavailable


class Refused(Exception):
    """A request that is refused before anything is written. `code`, `message` and `headers` are for its sender."""

    def __init__(self, code: str, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(code)
        self.code = code
        self.message = message
        self.headers = headers


class NoAnswer(Exception):
    """The model has ended its answer without a word, and nothing else was shown."""


CODES = {
    "context_length_exceeded": ("This conversation has become too long for the model. Start a new one.", False),
    "exceed_context_size_error": ("This conversation has become too long for the model. Start a new one.", False),
    "insufficient_quota": ("The service's budget for the model is used up. Please tell its operator.", False),
    "rate_limit_exceeded": ("The model is busy. Try again in a moment.", True),
    "content_filter": ("The model's provider does not let it answer this.", False),
    "content_policy_violation": ("The model's provider does not let it answer this.", False),
    "max_output_tokens": ("The answer was cut off: it became longer than the model may answer.", False),
}
"""Codes of OpenAI's API errors: words for the user, and whether trying again can help."""

STATUS = {
    "402": "insufficient_quota",  # OpenRouter, DeepSeek
    "413": "context_length_exceeded",  # Groq
    "429": "rate_limit_exceeded",
}
"""The code for a status that says as much. (llama.cpp has a type for a conversation that is too long.)"""

KINDS: tuple[tuple[tuple[type[BaseException], ...], str, bool], ...] = (
    (
        (openai.AuthenticationError, openai.PermissionDeniedError),
        "The model's provider refuses this service's key. Please tell its operator.",
        False,
    ),
    ((openai.NotFoundError,), "The chosen model does not exist. Please tell the service's operator.", False),
    ((openai.RateLimitError,), "The model is busy. Try again in a moment.", True),
    (
        (openai.BadRequestError, openai.UnprocessableEntityError),
        "The model could not read this conversation. Start a new one, or tell the service's operator.",
        False,
    ),
    (
        (openai.APITimeoutError, ModelTimeoutError),
        "The model took too long to answer. Try again.",
        True,
    ),
    (
        (openai.APIConnectionError, httpx2.TransportError),
        "The connection to the model failed. Try again.",
        True,
    ),
    ((openai.InternalServerError,), "The model's provider has a problem. Try again in a moment.", True),
    (
        (InputGuardrailTripwireTriggered, OutputGuardrailTripwireTriggered),
        "This request was stopped by the service's safety rules.",
        False,
    ),
    ((NoAnswer,), "The model gave no answer. Try again.", True),
    ((ModelRefusalError,), "The model refuses to answer this.", False),
    ((MaxTurnsExceeded,), "The answer needed more steps than are allowed. Try a smaller question.", True),
    ((ToolTimeoutError,), "A tool took too long. Try again.", True),
    ((openai.OpenAIError, ModelBehaviorError), "The model's answer could not be read. Try again.", True),
    ((UserError,), "The agent is not set up correctly. Please tell the service's operator.", False),
    ((StoreUnavailable,), "The service cannot reach its database. Try again in a moment.", True),
)
"""The first kind that fits: words for the user, and whether trying again can help."""


QUOTA_WORDS = {
    "turns_per_minute": "You have sent too many messages in a minute. Try again in {seconds} seconds.",
    "concurrent_turns": "Too many answers are being written for you at once. Wait until one has ended.",
    "tokens_per_day": "You have used up what you may use in a day. Try again in {hours} hours.",
    "storage": "Your files would take more room than you may use. Delete conversations with files in them.",
    "unsent_files": "Too many of your files were not sent. Send some, remove some, or wait {hours} hours.",
    "dictations": "You are dictating already. Wait until that has become text.",
    "max_turns": "The service is busy. Try again in a moment.",
}


def quota_words(error: QuotaExceeded) -> str:
    """Return which quota is used up, and when to try again."""
    seconds = error.retry_after_seconds
    return QUOTA_WORDS[error.quota].format(seconds=seconds, hours=-(-seconds // 3600))


def raised_by_author(error: Exception) -> Exception:
    """Return ChatKit's error where a tool raised one and the Agents SDK (0.24) wrapped it; else the error itself."""
    cause = error.__cause__
    return cause if isinstance(error, UserError) and isinstance(cause, CustomStreamError | StreamError) else error


def words_for(error: Exception) -> ErrorEvent:
    """Return the event that tells a client of a turn's failure. It holds nothing of the error's own text."""
    match error:
        case CustomStreamError():
            return ErrorEvent(message=error.message, allow_retry=error.allow_retry)
        case StreamError():
            return ErrorEvent(code=error.code, allow_retry=error.allow_retry)
        case QuotaExceeded():
            return ErrorEvent(message=quota_words(error))
    message, allow_retry = _words(error)
    return ErrorEvent(message=message, allow_retry=allow_retry)


def _words(error: Exception) -> tuple[str, bool]:
    if (code := _code(error)) in CODES:
        return CODES[code]
    if isinstance(error, UserError) and error.__cause__ is not None:  # as the Agents SDK (0.24) wraps a tool's own
        return "A tool of the agent failed. Try again.", True
    for kinds, message, allow_retry in KINDS:
        if isinstance(error, kinds):
            return message, allow_retry
    return "Something went wrong on our side. Try again.", True


def _code(error: Exception) -> str:
    """Return the provider's code for the error; the Agents SDK (0.24) keeps that of a streamed one in its text only.

    Servers that are not OpenAI's mostly give none of its codes, but a status, in a stream too.
    """
    if isinstance(error, openai.APIError):
        names = [str(name) for name in (error.code, error.type, getattr(error, "status_code", None)) if name]
        known = [name for name in (STATUS.get(name, name) for name in names) if name in CODES]
        return known[0] if known else str(error.code or "")
    if isinstance(error, ModelBehaviorError):
        return next((code for code in CODES if f"code={code}" in str(error) or f"'{code}'" in str(error)), "")
    return ""


def log_failure(log: logging.Logger, what: str, error: BaseException) -> None:
    """Log a failure once, with where it happened and none of its text: that may quote what a user wrote."""
    log.error("%s: %s%s", what, describe(error), _frames(error))


def describe(error: BaseException) -> str:
    """Return the error's kind, with what is known to carry no user's words: codes, and what our own store says."""
    match error:
        case openai.APIStatusError():
            details = [str(error.status_code), error.code, error.type, error.param, error.request_id]
        case openai.APIError():
            details = [error.code, error.type]
        case ModelBehaviorError():
            details = [_code(error)]
        case StoreUnavailable():
            details = [str(error)]
        case sqlite3.Error():  # a tool may have raised it, or an error of the system, about a user's words
            details = [getattr(error, "sqlite_errorname", None)]
        case ssl.SSLError() | socket.gaierror():  # their numbers are no system's
            details = [getattr(error, "reason", None) or error.strerror]
        case OSError(errno=int() as number):
            details = [str(number), os.strerror(number)]
        case _:
            details = []
    cause = [f"from {describe(error.__cause__)}"] if error.__cause__ else []
    return " ".join([type(error).__name__, *(str(each) for each in details if each), *cause])


def _frames(error: BaseException) -> str:
    if isinstance(error, openai.APIError | StoreUnavailable | CustomStreamError | asyncio.CancelledError):
        return ""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)[-10:]
    return "".join(f"\n  {frame.filename}:{frame.lineno} in {frame.name}" for frame in frames)
