"""MCP servers whose tools the agent gets: connected in the background, left out while they are down."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self
from urllib.parse import urlsplit

from agents import Agent, RunContextWrapper
from agents.exceptions import MCPToolCancellationError, UserError
from agents.mcp import MCPServer, MCPServerManager, MCPServerStreamableHttp, MCPServerStreamableHttpParams
from agents.mcp.util import MCPToolMetaContext
from chatkit.agents import AgentContext

from context import RequestContext

log = logging.getLogger("service.toolservers")

CONNECT_SECONDS = 5.0
"""The longest that a server which is down, or slow, holds up a turn; it does so once."""
RETRY_SECONDS = 5.0
MAX_ERROR_LENGTH = 1000
"""Characters that the model reads of what went wrong with a call."""
LEFT_OUT_SECONDS = 60.0
"""How long turns that would bring a token of their own do without a server that did not answer one of them."""


class ToolServers:
    """The configured servers, each with one session that all users share; or, where tokens are forwarded, with a
    session for each turn: a shared one must never carry several users' tokens.
    """

    def __init__(self, urls: Sequence[str], *, forward_auth: bool):
        self._urls = urls
        self._forward_auth = forward_auth
        self._shared = [] if forward_auth else [_SharedServer(url) for url in urls]
        self._left_out_until: dict[str, float] = {}

    @classmethod
    @asynccontextmanager
    async def running(cls, urls: Sequence[str], *, forward_auth: bool = False) -> AsyncIterator[Self]:
        """Keep the servers connected; leaving closes all sessions."""
        servers = cls(urls, forward_auth=forward_auth)
        keepers = [asyncio.create_task(each.keep_connected(), name="tool server") for each in servers._shared]
        try:
            yield servers
        finally:
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)

    @property
    def missing(self) -> list[str]:
        """The names of the servers that are left out at the moment."""
        urls = [*self._left_out_until, *(each.url for each in self._shared if not each.is_connected)]
        return [name_of(url) for url in urls]

    @asynccontextmanager
    async def for_turn(self, context: RequestContext) -> AsyncIterator[list[MCPServer]]:
        """Yield the servers that can be asked now."""
        if self._forward_auth and context.bearer_token:
            headers = {"authorization": f"Bearer {context.bearer_token}"}
            servers = {_server(url, headers): url for url in self._to_try()}
            async with _manager([*servers]) as manager:
                for server, url in servers.items():
                    self._note_attempt(url, manager.errors.get(server))
                yield manager.active_servers
        else:
            await asyncio.gather(*[each.first_attempt() for each in self._shared])
            yield [each.server for each in self._shared if each.is_connected]

    def _to_try(self) -> list[str]:
        """Return the servers for a turn's own sessions: one that did not answer is tried by one turn at a time."""
        now = time.monotonic()
        urls = [url for url in self._urls if self._left_out_until.get(url, now) <= now]
        for url in self._left_out_until.keys() & {*urls}:
            self._left_out_until[url] = now + LEFT_OUT_SECONDS
        return urls

    def _note_attempt(self, url: str, error: BaseException | None) -> None:
        if isinstance(error, TimeoutError):
            self._left_out_until[url] = time.monotonic() + LEFT_OUT_SECONDS
        elif isinstance(error, UserError):  # it cannot be reached, which is soon known
            self._left_out_until[url] = time.monotonic()
        else:  # also where it refuses this user's token, and maybe nobody else's
            self._left_out_until.pop(url, None)
        if error is not None:
            log.warning("the tool server %s is left out of a turn: it does not answer", name_of(url))


class _SharedServer:
    """One server and its session. Its manager's task owns the session, as the MCP library wants it."""

    def __init__(self, url: str):
        self.url = url
        self.server = _Watched(url, self._note_failure)
        self.is_connected = False
        self._broke = asyncio.Event()
        self._broke.set()
        self._tried = asyncio.Event()

    async def keep_connected(self) -> None:
        """Connect whenever there is no session, for ever; close it when cancelled."""
        manager = _manager([self.server])
        try:
            while True:
                await self._broke.wait()
                await manager.reconnect(failed_only=False)
                self._set_connected(bool(manager.active_servers))
                self._tried.set()
                if not self.is_connected:
                    await asyncio.sleep(RETRY_SECONDS)
        finally:
            await manager.cleanup_all()

    async def first_attempt(self) -> None:
        """Wait while the session is being made for the first time, or anew; not for the attempts that follow."""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._tried.wait()
        except TimeoutError:
            self._tried.set()

    def _set_connected(self, connected: bool) -> None:
        if connected:
            self._broke.clear()
        if connected != self.is_connected or not self._tried.is_set():
            log.log(
                logging.INFO if connected else logging.WARNING,
                "the tool server %s %s",
                name_of(self.url),
                "is connected" if connected else "does not answer, and is left out until it does",
            )
        self.is_connected = connected

    def _note_failure(self) -> None:
        self.is_connected = False
        self._tried.clear()
        self._broke.set()


class _SessionFailed(UserError):
    """The call failed because its session did; its cause says how. (A `UserError`: the Agents SDK wraps all else.)"""


class _Watched(MCPServerStreamableHttp):
    """A server that says when its session fails."""

    def __init__(self, url: str, on_failure: Any, headers: dict[str, str] | None = None):
        params: MCPServerStreamableHttpParams = {"url": url, "headers": headers or {}, "timeout": 2 * CONNECT_SECONDS}
        super().__init__(
            params,
            cache_tools_list=True,
            name=name_of(url),
            client_session_timeout_seconds=None,  # a tool may take as long as its turn may
            failure_error_function=_words_for_model,
            tool_meta_resolver=_meta,
        )
        self._on_failure = on_failure
        self._serialize_session_requests = False  # the Agents SDK (0.24): or a slow tool of one user holds up everybody

    async def connect(self) -> None:
        """Connect and list the tools: a server that cannot say what it has is one that is down, for every turn."""
        await super().connect()  # type: ignore[no-untyped-call]  # the Agents SDK (0.24) gives it no types
        self.invalidate_tools_cache()  # type: ignore[no-untyped-call]
        await super().list_tools()

    async def list_tools(self, *args: Any, **kwargs: Any) -> Any:
        return await self._watched(super().list_tools(*args, **kwargs), CONNECT_SECONDS)

    async def call_tool(self, *args: Any, **kwargs: Any) -> Any:
        return await self._watched(super().call_tool(*args, **kwargs), None)

    async def _watched(self, call: Any, seconds: float | None) -> Any:
        try:
            async with asyncio.timeout(seconds):
                return await call
        except Exception as error:
            if isinstance(error, TimeoutError) or not await self._answers():
                self._on_failure()
                raise _SessionFailed("the session failed") from error
            raise

    async def _answers(self) -> bool:
        """Whether the session is alive: a call may fail on its own account, while others' calls run.

        (A server of the newest protocol need not know `ping`.)
        """
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                return self.session is not None and bool(await self.session.list_tools())
        except Exception:  # the MCP library's own, whatever the server did
            return False


def _words_for_model(context: RunContextWrapper[Any], error: Exception) -> str:
    """Return what the model reads of a call that failed, an argument left out, say; raise where the session did."""
    if isinstance(error, MCPToolCancellationError | _SessionFailed):
        raise error
    return f"The call failed: {error}"[:MAX_ERROR_LENGTH]


async def with_tools_of(
    servers: Sequence[MCPServer], agent: Agent[Any], context: AgentContext[RequestContext]
) -> Agent[Any]:
    """Return the agent with these servers' tools, too.

    Where a name is there twice the Agents SDK (0.24) would refuse to run: then each tool of a server is offered under
    a name that has its server's in it.
    """
    servers = [*agent.mcp_servers, *servers]
    names = [tool.name for tool in agent.tools]
    for server in servers:
        names += [tool.name for tool in await server.list_tools(RunContextWrapper(context), agent)]
    config = agent.mcp_config.copy()
    if len(names) > len({*names}):
        config["include_server_in_tool_names"] = True
    return agent.clone(mcp_servers=servers, mcp_config=config)


async def tool_names(url: str) -> list[str]:
    """Connect once and return the names of the server's tools; raise what is wrong with it."""
    async with _manager([server := _server(url, {})]) as manager:
        if error := manager.errors.get(server):
            raise error
        return [tool.name for tool in await server.list_tools()]


def name_of(url: str) -> str:
    """Return host and port: what else an address has may be a secret, and the name is shown to everybody."""
    return urlsplit(url).netloc.rpartition("@")[2]


def _server(url: str, headers: dict[str, str]) -> MCPServer:
    return _Watched(url, lambda: None, headers)


def _manager(servers: Sequence[MCPServer]) -> MCPServerManager:
    return MCPServerManager(
        servers,
        connect_timeout_seconds=CONNECT_SECONDS,
        cleanup_timeout_seconds=CONNECT_SECONDS,
        connect_in_parallel=True,
    )


def _meta(call: MCPToolMetaContext) -> dict[str, Any]:
    """Tell the server who is asking, beside the arguments, which are the model's."""
    run: RunContextWrapper[AgentContext[RequestContext]] = call.run_context
    return {"user_id": run.context.request_context.user_id}
