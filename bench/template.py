"""What one gets from ChatKit's documentation: a FastAPI endpoint, the default `process`, a small store.

`python template.py memory|sqlite` serves on a free port, and says which.
"""

import os
import sqlite3
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from agents import Agent, Runner, set_tracing_disabled
from chatkit.agents import AgentContext, simple_to_agent_input, stream_agent_response
from chatkit.server import ChatKitServer, StreamingResult
from chatkit.store import NotFoundError, Store
from chatkit.types import Attachment, Page, ThreadItem, ThreadMetadata, ThreadStreamEvent, UserMessageItem
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import TypeAdapter

from contestants import serve

HISTORY_ITEMS = 21

Context = dict[str, Any]


class MemoryStore(Store[Context]):
    def __init__(self) -> None:
        self.threads: dict[str, ThreadMetadata] = {}
        self.items: dict[str, dict[str, ThreadItem]] = {}

    async def load_thread(self, thread_id: str, context: Context) -> ThreadMetadata:
        if thread_id not in self.threads:
            raise NotFoundError(thread_id)
        return self.threads[thread_id].model_copy(deep=True)

    async def save_thread(self, thread: ThreadMetadata, context: Context) -> None:
        self.threads[thread.id] = thread.model_copy(deep=True)

    async def load_threads(self, limit: int, after: str | None, order: str, context: Context) -> Page[ThreadMetadata]:
        return _page(list(self.threads.values()), limit, after, order)

    async def load_thread_items(
        self, thread_id: str, after: str | None, limit: int, order: str, context: Context
    ) -> Page[ThreadItem]:
        return _page(list(self.items.get(thread_id, {}).values()), limit, after, order)

    async def add_thread_item(self, thread_id: str, item: ThreadItem, context: Context) -> None:
        self.items.setdefault(thread_id, {})[item.id] = item.model_copy(deep=True)

    async def save_item(self, thread_id: str, item: ThreadItem, context: Context) -> None:
        await self.add_thread_item(thread_id, item, context)

    async def load_item(self, thread_id: str, item_id: str, context: Context) -> ThreadItem:
        return self.items[thread_id][item_id]

    async def delete_thread(self, thread_id: str, context: Context) -> None:
        self.threads.pop(thread_id, None)
        self.items.pop(thread_id, None)

    async def delete_thread_item(self, thread_id: str, item_id: str, context: Context) -> None:
        self.items[thread_id].pop(item_id, None)

    async def save_attachment(self, attachment: Attachment, context: Context) -> None:
        raise NotImplementedError  # the benchmark sends none

    async def load_attachment(self, attachment_id: str, context: Context) -> Attachment:
        raise NotImplementedError  # the benchmark sends none

    async def delete_attachment(self, attachment_id: str, context: Context) -> None:
        raise NotImplementedError  # the benchmark sends none


def _page(rows: list[Any], limit: int, after: str | None, order: str) -> Page[Any]:
    rows = rows[::-1] if order == "desc" else rows
    start = next((place + 1 for place, row in enumerate(rows) if row.id == after), 0)
    found = rows[start : start + limit]
    has_more = len(rows) > start + limit
    return Page(data=found, has_more=has_more, after=found[-1].id if has_more else None)


class SQLiteStore(MemoryStore):
    """Plain sqlite3: a connection and a commit for each operation."""

    def __init__(self, path: str):
        self.path = path
        self.item: TypeAdapter[Any] = TypeAdapter(ThreadItem)
        with self.connection() as db:
            db.execute("CREATE TABLE threads (id TEXT PRIMARY KEY, created_at TEXT, body TEXT)")
            db.execute("CREATE TABLE items (id TEXT PRIMARY KEY, thread_id TEXT, created_at TEXT, body TEXT)")
            db.execute("CREATE INDEX by_thread ON items (thread_id, created_at)")

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self.path)
        try:
            yield db
            db.commit()
        finally:
            db.close()

    async def load_thread(self, thread_id: str, context: Context) -> ThreadMetadata:
        with self.connection() as db:
            row = db.execute("SELECT body FROM threads WHERE id = ?", (thread_id,)).fetchone()
        if row is None:
            raise NotFoundError(thread_id)
        return ThreadMetadata.model_validate_json(row[0])

    async def save_thread(self, thread: ThreadMetadata, context: Context) -> None:
        row = (thread.id, thread.created_at.isoformat(), thread.model_dump_json())
        with self.connection() as db:
            db.execute("INSERT OR REPLACE INTO threads VALUES (?, ?, ?)", row)

    async def load_threads(self, limit: int, after: str | None, order: str, context: Context) -> Page[ThreadMetadata]:
        direction = "DESC" if order == "desc" else "ASC"
        with self.connection() as db:
            rows = db.execute(
                f"SELECT body FROM threads ORDER BY created_at {direction} LIMIT ?", (limit + 1,)
            ).fetchall()
        threads = [ThreadMetadata.model_validate_json(row[0]) for row in rows]
        return Page(data=threads[:limit], has_more=len(threads) > limit, after=threads[-1].id if threads else None)

    async def load_thread_items(
        self, thread_id: str, after: str | None, limit: int, order: str, context: Context
    ) -> Page[ThreadItem]:
        direction = "DESC" if order == "desc" else "ASC"
        with self.connection() as db:
            rows = db.execute(
                f"SELECT body FROM items WHERE thread_id = ? ORDER BY created_at {direction} LIMIT ?",
                (thread_id, limit + 1),
            ).fetchall()
        items = [self.item.validate_json(row[0]) for row in rows]
        return Page(data=items[:limit], has_more=len(items) > limit, after=items[-1].id if items else None)

    async def add_thread_item(self, thread_id: str, item: ThreadItem, context: Context) -> None:
        row = (item.id, thread_id, item.created_at.isoformat(), item.model_dump_json())
        with self.connection() as db:
            db.execute("INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?)", row)


class TemplateServer(ChatKitServer[Context]):
    agent: Agent[Any] = Agent(name="Assistant", instructions="You are a helpful assistant.")

    async def respond(
        self, thread: ThreadMetadata, input_user_message: UserMessageItem | None, context: Context
    ) -> AsyncIterator[ThreadStreamEvent]:
        page = await self.store.load_thread_items(thread.id, None, HISTORY_ITEMS, "desc", context)
        model_input = await simple_to_agent_input(page.data[::-1])
        agent_context = AgentContext(thread=thread, store=self.store, request_context=context)
        run = Runner.run_streamed(self.agent, model_input, context=agent_context)
        async for event in stream_agent_response(agent_context, run):
            yield event


def create_app(store: MemoryStore) -> FastAPI:
    app, server = FastAPI(), TemplateServer(store)

    @app.post("/chatkit")
    async def chatkit(request: Request) -> Response:
        result = await server.process(await request.body(), {})
        if isinstance(result, StreamingResult):
            return StreamingResponse(result, media_type="text/event-stream")
        return Response(result.json, media_type="application/json")

    return app


if __name__ == "__main__":
    set_tracing_disabled(True)  # it would post to OpenAI meanwhile
    serve(create_app(MemoryStore() if sys.argv[1] == "memory" else SQLiteStore(os.environ["BENCH_DATABASE"])))
