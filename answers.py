"""Errors as answers: one table from what was raised to what a client reads."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from chatkit.store import NotFoundError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import metrics
from attachments import LinkRefused
from auth import InvalidToken, KeysUnavailable, TokenMissing
from conversations import AlreadySent, AlreadyUploaded, QuotaExceeded, StoreUnavailable, ThreadBusy
from dictation import DictationFailed
from failures import Refused, log_failure, quota_words, words_for
from local import Forbidden
from telemetry import request_id

log = logging.getLogger("service")

REFUSED_STATUS = {
    "bad_json": 400,
    "too_slow": 408,
    "conflict": 409,
    "too_large": 413,
    "bad_range": 416,
    "unsupported_type": 415,
    "unknown_operation": 422,
    "bad_params": 422,
    "not_configured": 422,
}


def answer(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return an error as every client of ours reads it; the ChatKit panel shows `message`."""
    return JSONResponse({"code": code, "message": message}, status, headers)


def on_refused(request: Request, error: Any) -> Response:
    return answer(REFUSED_STATUS[error.code], error.code, error.message, error.headers)


def on_auth_error(request: Request, error: Any) -> Response:
    return answer(401, error.code, error.message, {"www-authenticate": "Bearer"})


def on_quota(request: Request, error: Any) -> Response:
    metrics.count_quota_refusal(error.quota)
    return answer(429, "quota", quota_words(error), {"retry-after": str(error.retry_after_seconds)})


def on_dictation_failed(request: Request, error: Any) -> Response:
    log_failure(log, "dictation failed", error.__cause__)
    return answer(502, "model_failed", words_for(error.__cause__).message or "", {"retry-after": "5"})


def on_http_exception(request: Request, error: Any) -> Response:
    path = request.url.path[:100]
    match error.status_code:
        case 404:
            words = f"There is nothing at {path}. The ChatKit protocol is at POST /chatkit, the chat page at /."
            return answer(404, "not_found", words)
        case 405:
            methods = _methods_at(request)
            words = f"{request.method} is not taken at {path}. Use {' or '.join(methods)}."
            return answer(405, "method_not_allowed", words, {"allow": ", ".join(methods)})
    return answer(error.status_code, "refused", f"{error.detail}.", error.headers)


def _methods_at(request: Request) -> list[str]:
    """Return what the path takes, by all its routes (Starlette 1.10 asks the first alone)."""
    found = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in found if isinstance(route, Route) for method in route.methods or ()})


def fixed(
    status: int, code: str, message: str, *, retry_after: str | None = None
) -> Callable[[Request, Exception], Response]:
    """Return a handler that gives this answer, whatever the exception says."""
    headers = {"retry-after": retry_after} if retry_after else None
    return lambda request, error: answer(status, code, message, headers)


EXCEPTION_HANDLERS: Mapping[Any, Callable[[Request, Any], Response | Awaitable[Response]]] = {
    Refused: on_refused,
    TokenMissing: on_auth_error,
    InvalidToken: on_auth_error,
    KeysUnavailable: fixed(503, KeysUnavailable.code, KeysUnavailable.message, retry_after="5"),
    LinkRefused: fixed(403, "link_refused", "This link has ended or was changed. Reload the conversation."),
    AlreadyUploaded: fixed(409, "conflict", "This file is here already. Attach it anew to change it."),
    AlreadySent: fixed(409, "conflict", "This file is part of another conversation. Attach it anew."),
    DictationFailed: on_dictation_failed,
    Forbidden: lambda request, error: answer(403, "forbidden", error.message),
    NotFoundError: fixed(404, "not_found", "It does not exist, or is not yours."),
    ThreadBusy: fixed(409, "thread_busy", "An answer is still being written here. Wait for it, or stop it."),
    StoreUnavailable: fixed(
        503, "store_unavailable", "The service cannot reach its database. Try again in a moment.", retry_after="5"
    ),
    ClientDisconnect: fixed(400, "disconnected", "The request broke off."),
    QuotaExceeded: on_quota,
    HTTPException: on_http_exception,
}


class Unforeseen:
    """Gives an answer to what nobody foresaw."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, send_watched)
        except asyncio.CancelledError:  # uvicorn's, when a shutdown's grace is over
            if started or scope["type"] != "http":
                raise
            words = "The service is being restarted. Try again in a moment."
            await answer(503, "restarting", words, {"retry-after": "5"})(scope, receive, send)
        except Exception as error:
            log_failure(log, f"request {request_id()} failed", error)
            if started or scope["type"] != "http":
                raise
            failed = answer(500, "internal", f"Something went wrong on our side. It is logged as {request_id()}.")
            await failed(scope, receive, send)
