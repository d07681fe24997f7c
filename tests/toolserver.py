"""A real MCP server, as a process of its own: `python tests/toolserver.py PORT [MUTE]`.

It never answers to what has the bytes MUTE in it.
"""

import asyncio
import sys
from typing import Any

import uvicorn
from mcp import MCPError
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.types import INVALID_PARAMS

server = MCPServer("tests")


@server.tool()
async def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
async def who_asks(ctx: Context[Any, Any]) -> str:
    """Say who is asking, as far as this server is told."""
    request = ctx.request_context.request
    token = request.headers.get("authorization", "no token") if request else "no request"
    return f"{dict(ctx.request_context.meta or {}).get('user_id')} with {token}"


@server.tool()
async def sleep() -> str:
    """Take for ever."""
    await asyncio.sleep(3600)
    return "never"


@server.tool()
async def nap() -> str:
    """Take a little while."""
    await asyncio.sleep(2)
    return "rested"


@server.tool()
async def decline() -> str:
    """Answer with an error of the protocol, as for a tool that is not there."""
    raise MCPError(INVALID_PARAMS, "not today")


@server.tool()
async def recite() -> str:
    """Say more than anybody wants to hear again."""
    return "x" * 150_000


def mute(app: Any, words: bytes) -> Any:
    """Return the app without an answer to requests that have these words in them."""

    async def muted(scope: Any, receive: Any, send: Any) -> None:
        async def listen() -> Any:
            message = await receive()
            if words in message.get("body", b""):
                await asyncio.sleep(3600)
            return message

        await app(scope, listen, send)

    return muted


if __name__ == "__main__":
    app = server.streamable_http_app()
    if sys.argv[2:]:
        app = mute(app, sys.argv[2].encode())
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", timeout_graceful_shutdown=1)
