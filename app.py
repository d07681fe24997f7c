"""The service over HTTP. Read from the top: how a request travels."""

import asyncio
import logging
import logging.config
import multiprocessing
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import chatkitlogger  # noqa: F401 (before all else of ChatKit)
from collector import quiet_collector  # before the SDKs

# isort: split
from agents import set_default_openai_api, set_default_openai_client, set_trace_provider, set_tracing_disabled
from agents.tracing.provider import DefaultTraceProvider
from chatkit.server import StreamingResult
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import metrics
from agentmodule import AgentModule
from answers import EXCEPTION_HANDLERS, Unforeseen, answer
from attachments import Attachments
from auth import bearer_token
from bodies import Bodies
from check import verifier_of
from context import LOCAL_USER, RequestContext
from conversations import ConversationStore, Quota, StoreUnavailable
from dictation import Dictation
from failures import log_failure
from files import file_routes
from hosts import OneHost
from leases import RETRY_SECONDS
from local import LocalAccess, loopback_only
from page import PageSettings, page_routes
from provider import open_upstream, run_config
from server import ChatServer
from settings import Settings, SettingsError, load_settings
from sockets import held_no_longer_than_by_parent
from store import open_store
from streams import SSE_HEADERS, TurnResponse
from telemetry import Telemetry, logging_config, no_queries_in_access_log, note
from toolservers import ToolServers
from tour import PROMPTS, with_tour
from turn import Turn
from turns import Turns
from upkeep import upkeep

log = logging.getLogger("service")

MAX_THREADS = 256
"""For what blocks, an agent's tools above all: a few that hang would use up asyncio's own, which look up names too."""


def create_app(settings: Settings | None = None) -> Starlette:
    """Return the service; without settings they come from the environment and from a `.env` file beside this one."""
    settings = settings or settings_of_the_process()
    return Starlette(
        routes=[
            Route("/chatkit", chatkit, methods=["POST"]),
            Route("/api/chatkit", chatkit, methods=["POST"]),
            *file_routes(authenticate),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/metrics", show_metrics),
            *page_routes(page_settings(settings)),
        ],
        middleware=[
            Middleware(Telemetry),
            Middleware(
                CORSMiddleware,  # around all errors, so that a browser may read them; bearer tokens need no credentials
                allow_origins=settings.allowed_origins,
                allow_methods=["GET", "POST", "PUT"],
                allow_headers=["*"],
                expose_headers=["retry-after", "x-request-id"],
            ),
            Middleware(OneHost),
            Middleware(Unforeseen),
        ],
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=lifespan(settings),
    )


def settings_of_the_process() -> Settings:
    """Return the settings, and log as they say where nobody has seen to it, as under `uvicorn --factory`.

    Raises `SystemExit`, as `serve` ends, when they cannot be read.
    """
    try:
        settings = load_settings(Path(__file__).with_name(".env"))
    except SettingsError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    if not logging.getLogger().handlers:
        logging.config.dictConfig(logging_config(settings.log_level, settings.log_format))
    return settings


def page_settings(settings: Settings) -> PageSettings:
    return PageSettings(
        login=settings.jwt_user_claim if settings.jwks_url else None,
        domain_key=settings.chatkit_domain_key,
        models=settings.models,
        attachments=True,
        max_attachment_bytes=settings.max_attachment_bytes,
        attachment_types=settings.attachment_types,
        dictation=not settings.offline,
        prompts=PROMPTS if settings.offline else PageSettings.prompts,
    )


def lifespan(settings: Settings) -> Callable[[Starlette], Any]:
    """What the routes stand on, opened before the first request and closed in the opposite order."""

    @asynccontextmanager
    async def open_all(app: Starlette) -> AsyncIterator[Mapping[str, Any]]:
        agent = AgentModule.load(settings.agent)
        if settings.offline:
            agent = with_tour(agent)
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(MAX_THREADS))
        async with AsyncExitStack() as stack:
            stack.enter_context(no_queries_in_access_log())
            upstream = await stack.enter_async_context(
                open_upstream(
                    api_key=settings.openai_api_key,
                    base_url=settings.openai_base_url,
                    default_model=settings.openai_default_model,
                    api=settings.openai_api,
                    max_connections=settings.max_turns,
                    timeout_seconds=settings.turn_timeout_seconds,
                )
            )
            if not settings.agents_tracing:
                set_trace_provider(DefaultTraceProvider())  # the SDK's would open a client that is never used
            set_tracing_disabled(not settings.agents_tracing)  # these are for runs that an agent's author starts
            set_default_openai_api(settings.openai_api)
            if upstream.client:
                set_default_openai_client(upstream.client, use_for_tracing=settings.agents_tracing)
            verifier = await stack.enter_async_context(verifier_of(settings)) if settings.jwks_url else None
            local = LocalAccess(settings.allowed_origins, settings.public_url, allow_anonymous=settings.allow_anonymous)
            if not (settings.jwks_url or settings.allow_anonymous):
                await stack.enter_async_context(loopback_only())
            store = await enter_store(stack, settings)
            link_key = await store.load_link_key()
            attachments = Attachments(
                store,
                link_key,
                max_bytes=settings.max_attachment_bytes,
                types=settings.attachment_types,
                max_storage_bytes=settings.max_storage_bytes_per_user,
            )
            turns = await stack.enter_async_context(
                Turns.running(
                    store,
                    timeout_seconds=settings.turn_timeout_seconds,
                    quota=Quota(settings.turns_per_minute, settings.concurrent_turns_per_user, settings.tokens_per_day),
                    max_turns=settings.max_turns,
                )
            )
            tool_servers = await stack.enter_async_context(
                ToolServers.running(settings.mcp_server_url, forward_auth=settings.mcp_forward_auth)
            )
            server = ChatServer(
                store,
                attachments,
                turns,
                agent,
                run_config(
                    upstream,
                    api=settings.openai_api,
                    store=settings.openai_store,
                    tracing=settings.agents_tracing,
                ),
                models=settings.models,
                history_items=settings.history_items,
                can_cancel=settings.on_disconnect == "cancel",
                ask_for_titles=not settings.offline,
                tool_servers=tool_servers,
                dictation=Dictation(upstream.client, settings.transcribe_model) if upstream.client else None,
            )
            await stack.enter_async_context(upkeep(store, settings.retention_days))
            stack.enter_context(quiet_collector())
            stack.enter_context(held_no_longer_than_by_parent())
            yield {
                "settings": settings,
                "log_key": link_key,
                "verifier": verifier,
                "local": local,
                "store": store,
                "database": Database(store),
                "attachments": attachments,
                "tool_servers": tool_servers,
                "server": server,
                "bodies": Bodies(dictation=upstream.client is not None),
            }

    return open_all


async def enter_store(stack: AsyncExitStack, settings: Settings) -> ConversationStore:
    """Open the store. A worker tries until it can: its parent (uvicorn 0.54) would end all workers for one that fails.

    Whoever starts the service alone is told at once.
    """
    while True:
        try:
            return await stack.enter_async_context(open_store(settings.database_url, settings.table_prefix))
        except StoreUnavailable as error:
            if multiprocessing.parent_process() is None:
                raise
            log_failure(log, "the database cannot be opened yet", error)
            await asyncio.sleep(RETRY_SECONDS)


class Database:
    """Whether it takes writes, asked once for all who want to know at the same time: anybody may ask."""

    def __init__(self, store: ConversationStore):
        self._store = store
        self._asking: asyncio.Task[None] | None = None

    async def ready(self) -> None:
        """Return once it has taken a write, or raise `StoreUnavailable`."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._store.ping(), name="ping")
            # asked for, as all who wait may go away meanwhile
            self._asking.add_done_callback(lambda asked: asked.cancelled() or asked.exception())
        await asyncio.shield(self._asking)


# --- routes -------------------------------------------------------------------------------------------------------


async def chatkit(request: Request) -> Response:
    context = await authenticate(request)
    async with request.state.bodies.json(request, context.user_id) as body:
        result = await request.state.server.process(body, context)
    if isinstance(result, Turn):
        settings: Settings = request.state.settings
        return TurnResponse(result, settings.heartbeat_seconds, stop_when_gone=settings.on_disconnect == "cancel")
    if isinstance(result, StreamingResult):
        return Response(b"".join([chunk async for chunk in result]), headers=SSE_HEADERS)
    return Response(result.json, media_type="application/json")


async def healthz(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def readyz(request: Request) -> Response:
    if request.state.verifier:
        await request.state.verifier.wait_until_ready()
    await request.state.database.ready()
    if missing := request.state.tool_servers.missing:
        return JSONResponse({"status": "degraded", "tool_servers": missing})
    return JSONResponse({"status": "ok"})


def show_metrics(request: Request) -> Response:
    if not request.state.verifier:
        require_local(request)
    if not metrics.AVAILABLE:
        return answer(404, "not_found", "Figures need the extra `metrics`: pip install 'chatkit-service[metrics]'.")
    return Response(metrics.exposition(), media_type=metrics.CONTENT_TYPE)


async def authenticate(request: Request) -> RequestContext:
    """Return who is asking: the only place where a `RequestContext` is made for a request."""
    context = await _context_of(request)
    note(user_id=context.user_id)
    return context


async def _context_of(request: Request) -> RequestContext:
    headers, verifier, settings = request.headers, request.state.verifier, request.state.settings
    base_url = settings.public_url or str(request.base_url).rstrip("/")
    locale = headers.get("accept-language", "").partition(",")[0].partition(";")[0].strip()[:35] or None
    if verifier:
        token = bearer_token(headers.getlist("authorization"))
        claims = await verifier.verify(token)
        return RequestContext(claims.user_id, claims.all, locale, request.state.request_id, base_url, token)
    require_local(request)
    return RequestContext(LOCAL_USER, locale=locale, request_id=request.state.request_id, base_url=base_url)


def require_local(request: Request) -> None:
    request.state.local.require(
        host=request.headers.get("host", ""),
        origin=request.headers.get("origin"),
        scheme=request.scope["scheme"],
        server_address=(request.scope.get("server") or [None])[0],
        client_address=(request.scope.get("client") or [None])[0],
        forwarded_for=request.headers.getlist("x-forwarded-for"),
    )


if __name__ == "__main__":
    from commands import main

    sys.exit(main())
