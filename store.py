"""`open_store`, and the store in one SQLite file: threads, their items, feedback and attachments."""

import json
import sqlite3
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing

from chatkit.store import NotFoundError
from chatkit.types import Attachment, FeedbackKind, Page, ThreadItem, ThreadMetadata

from context import RequestContext
from conversations import HIDDEN_TYPES, AlreadySent, ConversationStore, IncompatibleDatabase
from rows import (
    attachment_body,
    attachment_ids,
    changed_columns,
    cursor_seq,
    item_page,
    page,
    read_attachment,
    read_item,
    read_thread,
    remember,
)
from sqlite import SQLiteFile
from sqliteschema import MIGRATIONS, NOW, NOW_TEXT
from sqlitethreads import USED, add_item, insert_thread, next_seq, require_lease, require_own_thread, require_thread
from sqliteturns import SQLiteTurns
from sqliteupkeep import SQLiteUpkeep
from sqliteuploads import SQLiteUploads, require_attachment

DRIVER_MISSING = "PostgreSQL needs its driver: pip install 'chatkit-service[postgres]'."


@asynccontextmanager
async def open_store(
    url: str, table_prefix: str = "chatkit_", *, may_make: bool = True
) -> AsyncIterator[ConversationStore]:
    """Open the database, made or migrated where needed, and close it in the end.

    Without `may_make` one in which there is nothing of ours is left as it is, and raises `StoreUnavailable`.

    `url` is `sqlite:///FILE`, `sqlite:////absolute/FILE` or `postgresql://…`; `table_prefix` is PostgreSQL's. Raises
    `IncompatibleDatabase`, or `StoreUnavailable` when it cannot be opened.
    """
    if is_postgres(url):
        async with _postgres_store(url, table_prefix, may_make) as store:
            yield store
        return
    async with SQLiteFile.open(sqlite_path(url), MIGRATIONS, may_make=may_make) as file:
        yield SQLiteStore(file)


def is_postgres(url: str) -> bool:
    return url.startswith(("postgresql://", "postgres://"))


def sqlite_path(url: str) -> str:
    """Return the file that the address names, or raise `IncompatibleDatabase`."""
    path = url.removeprefix("sqlite:///")
    if path in (url, "", ":memory:"):
        raise IncompatibleDatabase(
            "A database is sqlite:///FILE, sqlite:////absolute/FILE or postgresql://USER@HOST/DATABASE."
        )
    return path


def _postgres_store(url: str, table_prefix: str, may_make: bool) -> AbstractAsyncContextManager[ConversationStore]:
    try:
        from postgres import PostgresStore  # noqa: PLC0415 (its driver is an extra)
    except ImportError as error:
        raise IncompatibleDatabase(DRIVER_MISSING) from error
    return PostgresStore(url, table_prefix, may_make=may_make)


class SQLiteStore(SQLiteTurns, SQLiteUploads, SQLiteUpkeep):
    """One SQLite file, shared by any number of processes on one machine."""

    async def overwrite_deleted(self) -> None:
        await self._file.rewrite()

    async def ping(self) -> None:
        self._file.require_whole()
        await self._write(next_seq)  # a number that nothing has costs nothing

    # --- threads --------------------------------------------------------------------------------------------------

    async def load_thread(self, thread_id: str, context: RequestContext) -> ThreadMetadata:
        thread = await self._read_thread(thread_id, context, lambda db, row: read_thread(*tuple(row)[:6]))
        remember(thread, context)
        return thread

    async def save_thread(self, thread: ThreadMetadata, context: RequestContext) -> None:
        columns = changed_columns(thread, context)
        made_here = thread.id not in context.loaded_threads

        def write(db: sqlite3.Connection) -> None:
            if made_here and insert_thread(db, thread, context):
                return
            require_own_thread(db, thread.id, context)
            if columns:
                db.execute(
                    f"UPDATE threads SET {', '.join(f'{name} = :{name}' for name in columns)}, active_at = {NOW}"
                    " WHERE id = :id AND user_id = :user_id",
                    {**columns, "id": thread.id, "user_id": context.user_id},
                )

        await self._write(write)
        remember(thread, context)

    async def name_thread(self, thread_id: str, title: str, context: RequestContext) -> bool:
        def write(db: sqlite3.Connection) -> bool:
            named = db.execute(
                "UPDATE threads SET title = ? WHERE id = ? AND user_id = ? AND title IS NULL",
                (title, thread_id, context.user_id),
            )
            return named.rowcount == 1 or require_thread(db, thread_id, context)["title"] == title

        return await self._write(write)

    async def load_threads(
        self, limit: int, after: str | None, order: str, context: RequestContext
    ) -> Page[ThreadMetadata]:
        beyond, direction = ("<", "DESC") if order == "desc" else (">", "ASC")

        def read(db: sqlite3.Connection) -> list[tuple[int, ThreadMetadata]]:
            seek, values = "", {"user_id": context.user_id, "limit": limit + 1}
            if after is not None:
                seek = f"AND activity {beyond} :after"
                values["after"] = _after_seq(
                    db, after, "SELECT activity FROM threads WHERE id = ? AND user_id = ?", context.user_id
                )
            rows = db.execute(
                "SELECT activity, id, created_at, title, status, allowed_image_domains, metadata FROM threads"
                f" WHERE user_id = :user_id {seek} ORDER BY activity {direction} LIMIT :limit",
                values,
            ).fetchall()
            return [(row[0], read_thread(*row[1:])) for row in rows]

        return page(await self._read(read), limit)

    async def delete_thread(self, thread_id: str, context: RequestContext) -> None:
        def write(db: sqlite3.Connection) -> None:
            deleted = db.execute("DELETE FROM threads WHERE id = ? AND user_id = ?", (thread_id, context.user_id))
            if deleted.rowcount == 0:  # not there, or not yours: the caller must not learn which
                raise NotFoundError(thread_id)

        await self._write(write)

    # --- items ----------------------------------------------------------------------------------------------------

    async def load_thread_items(
        self,
        thread_id: str,
        after: str | None,
        limit: int,
        order: str,
        context: RequestContext,
        *,
        hidden: bool = True,
    ) -> Page[ThreadItem]:
        beyond, direction = ("<", "DESC") if order == "desc" else (">", "ASC")
        visible = "" if hidden else f"AND type NOT IN {HIDDEN_TYPES}"

        def read(db: sqlite3.Connection, _: sqlite3.Row) -> Page[ThreadItem]:
            seek, values = "", {"thread_id": thread_id, "user_id": context.user_id, "limit": limit + 1}
            if after is not None:
                seek = f"AND seq {beyond} :after"
                values["after"] = _after_seq(
                    db,
                    after,
                    "SELECT seq FROM items WHERE id = ? AND thread_id = ? AND user_id = ?",
                    thread_id,
                    context.user_id,
                )
            rows = db.execute(
                f"SELECT seq, body FROM items WHERE thread_id = :thread_id AND user_id = :user_id {seek} {visible}"
                f" ORDER BY seq {direction} LIMIT :limit",
                values,
            )
            with closing(rows):
                return item_page(rows, limit)

        return await self._read_thread(thread_id, context, read)

    async def load_item(self, thread_id: str, item_id: str, context: RequestContext) -> ThreadItem:
        def read(db: sqlite3.Connection) -> ThreadItem:
            row = db.execute(
                "SELECT body FROM items WHERE thread_id = ? AND id = ? AND user_id = ?",
                (thread_id, item_id, context.user_id),
            ).fetchone()
            if row is None:
                raise NotFoundError(item_id)
            return read_item(row["body"])

        return await self._read(read)

    async def add_thread_item(self, thread_id: str, item: ThreadItem, context: RequestContext) -> None:
        def write(db: sqlite3.Connection) -> None:
            require_lease(db, thread_id, context)
            add_item(db, thread_id, item, context)

        await self._write(write)

    async def save_item(self, thread_id: str, item: ThreadItem, context: RequestContext) -> None:
        await self.add_thread_item(thread_id, item, context)

    async def delete_thread_item(self, thread_id: str, item_id: str, context: RequestContext) -> None:
        def write(db: sqlite3.Connection) -> None:
            require_lease(db, thread_id, context)
            _delete_attachments_of(db, "id = ?", (item_id,), thread_id, context)
            deleted = sum(
                db.execute(
                    f"DELETE FROM {table} WHERE thread_id = ? AND id = ? AND user_id = ?",
                    (thread_id, item_id, context.user_id),
                ).rowcount
                for table in ("items", "checkpoints")
            )
            if deleted == 0:
                raise NotFoundError(item_id)

        await self._write(write)

    async def delete_items_after(
        self,
        thread_id: str,
        item_id: str,
        context: RequestContext,
        *,
        until: str,
        keeping: Collection[str] = (),
        once: Collection[str] | None = None,
    ) -> bool:
        def write(db: sqlite3.Connection) -> bool:
            require_lease(db, thread_id, context)
            this = "SELECT seq FROM items WHERE id = ? AND thread_id = ? AND user_id = ?"
            seq, last = (_after_seq(db, each, this, thread_id, context.user_id) for each in (item_id, until))
            if once is not None and not _stand_after(db, seq, once, thread_id, context):
                return False
            these = "(seq > ? AND seq <= ? AND id NOT IN (SELECT value FROM json_each(?)))"
            which = seq, last, json.dumps([*keeping])
            _delete_attachments_of(db, these, which, thread_id, context)
            db.execute(
                f"DELETE FROM items WHERE thread_id = ? AND user_id = ? AND {these}",
                (thread_id, context.user_id, *which),
            )
            return True

        return await self._write(write)

    # --- feedback and attachments ---------------------------------------------------------------------------------

    async def save_feedback(
        self, thread_id: str, item_ids: Sequence[str], kind: FeedbackKind, context: RequestContext
    ) -> None:
        def write(db: sqlite3.Connection) -> None:
            require_thread(db, thread_id, context)
            db.execute(USED, (thread_id, context.user_id))
            for item_id in item_ids:
                given = db.execute(
                    f"INSERT INTO feedback SELECT thread_id, id, user_id, :kind, {NOW_TEXT}"
                    " FROM items WHERE thread_id = :thread_id AND id = :id AND user_id = :user_id"
                    " ON CONFLICT DO UPDATE SET kind = excluded.kind, updated_at = excluded.updated_at",
                    {"kind": kind, "thread_id": thread_id, "id": item_id, "user_id": context.user_id},
                )
                if given.rowcount == 0:
                    raise NotFoundError(item_id)

        await self._write(write)

    async def save_attachment(self, attachment: Attachment, context: RequestContext) -> None:
        def write(db: sqlite3.Connection) -> None:
            if attachment.thread_id is not None:
                require_lease(db, attachment.thread_id, context)
            row = {
                "id": attachment.id,
                "user_id": context.user_id,
                "thread_id": attachment.thread_id,
                "body": attachment_body(attachment),
            }
            saved = db.execute(
                "INSERT INTO attachments (id, user_id, thread_id, body, size, is_complete, created_at)"
                f" VALUES (:id, :user_id, :thread_id, :body, 0, FALSE, {NOW})"
                " ON CONFLICT DO UPDATE SET thread_id = excluded.thread_id, body = excluded.body"
                " WHERE user_id = excluded.user_id AND (thread_id IS NULL OR thread_id = excluded.thread_id)",
                row,
            )
            if saved.rowcount == 0:
                require_attachment(db, attachment.id, context)
                raise AlreadySent(attachment.id)

        await self._write(write)

    async def load_attachment(self, attachment_id: str, context: RequestContext) -> Attachment:
        row = await self._read(lambda db: require_attachment(db, attachment_id, context))
        return read_attachment(row["body"])

    async def delete_attachment(self, attachment_id: str, context: RequestContext) -> None:
        def write(db: sqlite3.Connection) -> None:
            deleted = db.execute(
                "DELETE FROM attachments WHERE id = ? AND user_id = ?", (attachment_id, context.user_id)
            )
            if deleted.rowcount == 0:
                raise NotFoundError(attachment_id)

        await self._write(write)


# --- statements that several methods share ------------------------------------------------------------------------


def _delete_attachments_of(
    db: sqlite3.Connection, condition: str, which: Sequence[str | int], thread_id: str, context: RequestContext
) -> None:
    """Delete the thread's files of the items that are about to be deleted, unless an item that stays has them too."""
    columns = "thread_id, user_id, seq, id, type, body"
    here = (
        f"SELECT body FROM (SELECT {columns} FROM items UNION ALL SELECT {columns} FROM checkpoints)"
        " WHERE type IN ('user_message', 'generated_image') AND thread_id = ? AND user_id = ? AND"
    )
    values = thread_id, context.user_id, *which
    if ids := attachment_ids(body for (body,) in db.execute(f"{here} {condition}", values)):
        ids -= attachment_ids(body for (body,) in db.execute(f"{here} NOT {condition}", values))
        db.execute(
            "DELETE FROM attachments WHERE id IN (SELECT value FROM json_each(?)) AND user_id = ?"
            " AND (thread_id IS NULL OR thread_id = ?)",
            (json.dumps([*ids]), context.user_id, thread_id),
        )


def _stand_after(
    db: sqlite3.Connection, seq: int, ids: Collection[str], thread_id: str, context: RequestContext
) -> bool:
    """Whether one of these ids is an item's, or an open one's, after this place."""
    found = [
        db.execute(
            f"SELECT 1 FROM {table} WHERE thread_id = ? AND user_id = ? AND seq > ?"
            " AND id IN (SELECT value FROM json_each(?)) LIMIT 1",
            (thread_id, context.user_id, seq, json.dumps([*ids])),
        ).fetchall()
        for table in ("items", "checkpoints")
    ]
    return any(found)


def _after_seq(db: sqlite3.Connection, after: str, lookup: str, *owner: str) -> int:
    """Return the sequence number that a cursor stands for, where `after` may be the id of a row too."""
    seq = cursor_seq(after)
    if seq is None:
        row = db.execute(lookup, (after, *owner)).fetchone()
        if row is None:
            raise NotFoundError(after)
        seq = int(row[0])
    return seq
