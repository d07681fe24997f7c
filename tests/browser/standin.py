"""A stand-in for the service where a test needs it otherwise than it is: attachments, tokens, odd streams, a prefix."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from page import PageSettings, page_routes

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6364f8cf500f0003860180 5a347d6b0000000049454e44ae426082".replace(" ", "")
)
NOW = datetime(2030, 1, 2, 3, 4, tzinfo=UTC).isoformat()


class StandIn:
    """Speaks just enough of the protocol, and notes what it is asked."""

    def __init__(self, settings: PageSettings, prefix: str = ""):
        self.token: str | None = None
        """The token that is accepted; None when no login is needed."""
        self.refusal: tuple[int, str, str] | None = None
        """What every request is refused with."""
        self.raw_stream: bytes | None = None
        """What a message is answered with, instead of an echo."""
        self.holds_uploads = False
        """Whether the bytes of files are not answered for the time being."""
        self.requests: list[dict[str, Any]] = []
        self.uploads: dict[str, bytes] = {}
        self.deleted: list[str] = []
        self.items: list[dict[str, Any]] = []
        routes = [
            *page_routes(settings),
            Route("/chatkit", self.chatkit, methods=["POST"]),
            Route("/attachments/{id}", self.receive, methods=["PUT"]),
            Route("/attachments/{id}", self.give),
        ]
        self.app = Starlette(routes=[Mount(prefix, routes=routes)] if prefix else routes)
        self.prefix = prefix
        self.url = ""

    async def chatkit(self, request: Request) -> Response:
        if self.token and (refused := self._refused(request.headers.get("authorization", ""))):
            return refused
        if self.refusal:
            status, code, message = self.refusal
            return JSONResponse({"code": code, "message": message}, status)
        body = await request.json()
        self.requests.append(body)
        operation, params = body["type"], body["params"]
        match operation:
            case "threads.list":
                return JSONResponse({"data": [], "has_more": False})
            case "items.list":
                return JSONResponse(self._page(**params))
            case "threads.get_by_id":
                return JSONResponse(thread())
            case "attachments.create":
                return JSONResponse(self._attachment(params))
            case "attachments.delete":
                self.deleted.append(params["attachment_id"])
                return JSONResponse({})
        return StreamingResponse(self._answer(params), media_type="text/event-stream")

    def _page(self, thread_id: str, order: str, limit: int, after: str | None = None) -> dict[str, Any]:
        ids = [item["id"] for item in self.items]
        older = self.items[: ids.index(after)] if after else self.items
        data = older[::-1][:limit]
        return {"data": data, "has_more": len(older) > limit, "after": data[-1]["id"] if data else None}

    def _refused(self, authorization: str) -> Response | None:
        token = authorization.removeprefix("Bearer ")
        if token == self.token:
            return None
        code = {"": "token_missing", "old": "token_expired"}.get(token, "token_invalid")
        return JSONResponse({"code": code, "message": code}, 401, {"www-authenticate": "Bearer"})

    def _attachment(self, params: dict[str, Any]) -> dict[str, Any]:
        address = f"{self.url}/attachments/atc_{len(self.requests)}"
        headers = {"content-type": params["mime_type"]}
        base = {
            "id": address.rpartition("/")[2],
            "name": params["name"],
            "mime_type": params["mime_type"],
            "upload_descriptor": {"url": address, "method": "PUT", "headers": headers},
        }
        if params["mime_type"].startswith("image/"):
            return {**base, "type": "image", "preview_url": address}
        return {**base, "type": "file"}

    async def receive(self, request: Request) -> Response:
        body = await request.body()
        while self.holds_uploads:
            await asyncio.sleep(0.01)
        if b"refuse" in body:
            return JSONResponse({"code": "too_large", "message": "There is no room for it."}, 413)
        self.uploads[request.path_params["id"]] = body
        return Response(status_code=204)

    async def give(self, request: Request) -> Response:
        return Response(self.uploads[request.path_params["id"]], media_type="image/png")

    async def _answer(self, params: dict[str, Any]) -> AsyncIterator[bytes]:
        if self.raw_stream is not None:
            yield self.raw_stream
            return
        sent = params["input"]
        attachments = [
            {
                "id": each,
                "name": f"file {each}",
                "mime_type": "image/png",
                "type": "image",
                "preview_url": f"{self.url}/attachments/{each}",
            }
            for each in sent["attachments"]
        ]
        base = {"thread_id": "thr_1", "created_at": NOW}
        content = [{"type": "output_text", "text": "Received.", "annotations": []}]
        number = len(self.items)
        message = {"id": f"u{number}", "type": "user_message", **base, **sent, "attachments": attachments}
        answer = {"id": f"a{number}", "type": "assistant_message", **base, "content": content}
        self.items += [message, answer]
        yield event("thread.created", thread=thread())
        yield event("thread.item.done", item=message)
        yield event("thread.item.done", item=answer)


def thread() -> dict[str, Any]:
    return {"id": "thr_1", "created_at": NOW, "status": {"type": "active"}, "items": {"data": [], "has_more": False}}


def event(kind: str, **fields: Any) -> bytes:
    return b"data: " + json.dumps({"type": kind, **fields}).encode() + b"\n\n"


@contextmanager
def standing_in(settings: PageSettings, prefix: str = "") -> Iterator[StandIn]:
    """Serve a stand-in on a free port, from a thread of this process, so that a test sees into it."""
    stand_in = StandIn(settings, prefix)
    server = uvicorn.Server(uvicorn.Config(stand_in.app, port=0, log_level="error", lifespan="off"))
    serving = threading.Thread(target=server.run)
    serving.start()
    while not server.started:
        threading.Event().wait(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    stand_in.url = f"http://127.0.0.1:{port}{prefix}"
    try:
        yield stand_in
    finally:
        server.should_exit = True
        serving.join()
