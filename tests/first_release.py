"""Writes the database that every later release must migrate; it is run once, for release 0.1.0:
`PYTHONPATH=. python tests/first_release.py`.

It is kept as SQL, tests/fixtures/first-release.sql, and has no data of anybody: one conversation with an item of every
kind, a locked one, one whose turn died; a file that was sent and one that was not; feedback and usage.
"""

import asyncio
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from chatkit.types import FileAttachment, LockedStatus, ThreadMetadata

from context import RequestContext
from conversations import CHUNK_BYTES, ConversationStore, Usage
from store import open_store
from test_store import EVERY_KIND, ITEM, NOON, end

DUMP = Path(__file__).with_name("fixtures") / "first-release.sql"
USER = "local"
FILE = bytes(CHUNK_BYTES) + b"and a second chunk"
SCHEMA = 1


async def fill(store: ConversationStore) -> None:
    context = RequestContext(USER)
    whole = ThreadMetadata(id="thr_whole", created_at=NOON, title="A title", metadata={"known": [1, None]})
    locked = ThreadMetadata(id="thr_locked", created_at=NOON, status=LockedStatus(reason="It is over."))
    died = ThreadMetadata(id="thr_died", created_at=NOON)
    for thread in (whole, locked, died):
        await store.save_thread(thread, context)
    for number, fields in enumerate(EVERY_KIND):
        common = {"id": f"item_{number}", "thread_id": whole.id, "created_at": NOON}
        await store.add_thread_item(whole.id, ITEM.validate_python(common | fields), context)
    await store.save_feedback(whole.id, ["item_1"], "negative", context)
    await add_file(store, "atc_sent", FILE, context)
    await store.save_attachment(file("atc_sent", whole.id), context)
    await add_file(store, "atc_unsent", b"unsent", context)
    await store.add_usage(Usage("", "", "a model", 1, 20, 3), context)
    leased = replace(context, lease=await store.acquire_lease(died.id, context))
    await store.save_checkpoints(died.id, [end("item_shown", died.id)], leased)


def file(id: str, thread_id: str | None = None) -> FileAttachment:
    return FileAttachment(id=id, name="a.txt", mime_type="text/plain", thread_id=thread_id)


async def add_file(store: ConversationStore, id: str, data: bytes, context: RequestContext) -> None:
    await store.reserve_attachment(file(id), len(data), 0, context)
    upload = await store.begin_upload(id, context)
    for number, start in enumerate(range(0, len(data), CHUNK_BYTES)):
        await store.write_chunk(id, upload, number, data[start : start + CHUNK_BYTES], 0, context)
    await store.finish_upload(id, upload, context)


def dump(database: Path) -> Iterator[str]:
    """Yield the statements that make the database anew, with no secret in it."""
    with closing(sqlite3.connect(database)) as db:
        db.execute("UPDATE secrets SET value = zeroblob(32)")
        [version] = db.execute("PRAGMA user_version").fetchone()
        assert version == SCHEMA, f"the first release has schema {SCHEMA}; its database is not made by a later one"
        for statement in db.iterdump():
            yield statement.replace(f"X'{bytes(CHUNK_BYTES).hex()}'", f"zeroblob({CHUNK_BYTES})")
        yield f"PRAGMA user_version = {version};"


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "chatkit.db"
        async with open_store(f"sqlite:///{database}") as store:
            await fill(store)
        DUMP.write_text("\n".join(dump(database)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    asyncio.run(main())
