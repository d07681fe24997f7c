"""A Starlette endpoint that sends the bytes of the template's stream, an event a chunk, and does nothing else."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from contestants import serve

EVENTS = [event + b"\n\n" for event in Path(os.environ["BENCH_STREAM"]).read_bytes().split(b"\n\n") if event]


async def chatkit(request: Request) -> Response:
    await request.body()

    async def send() -> AsyncIterator[bytes]:
        for event in EVENTS:
            yield event

    return StreamingResponse(send(), media_type="text/event-stream")


if __name__ == "__main__":
    serve(Starlette(routes=[Route("/chatkit", chatkit, methods=["POST"])]))
