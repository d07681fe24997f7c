"""`open_store`, and the store in one SQLite file: threads, their items, and the turns that run on them."""

import json
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar

from chatkit.store import NotFoundError
from chatkit.types import Attachment, FeedbackKind, Page, ThreadItem, ThreadMetadata

from context import RequestContext
from conversations import (
    HIDDEN_TYPES,
    LEASE_SECONDS,
    NO_QUOTA,
    AlreadySent,
    ConversationStore,
    IncompatibleDatabase,
    LeaseLost,
    Quota,
    QuotaExceeded,
    ThreadBusy,
    aware,
    new_id,
    stopped_marker,
)
from rows import (
    attachment_body,
    changed_columns,
    cursor_seq,
    item_row,
    page,
    read_attachment,
    read_item,
    read_thread,
    remember,
    thread_row,
)
from sqlite import SQLiteFile
from sqliteschema import MIGRATIONS, NOW, NOW_TEXT, RAN_OUT
from sqliteupkeep import SQLiteUpkeep
from sqliteuploads import SQLiteUploads, require_attachment

log = logging.getLogger("service.store")

T = TypeVar("T")

DRIVER_MISSING = "PostgreSQL needs its driver: pip install 'chatkit-service[postgres]'."


@asynccontextmanager
async def open_store(url: str, table_prefix: str = "chatkit_") -> AsyncIterator[ConversationStore]:
    """Open the database, made or migrated where needed, and close it in the end.

    `url` is `sqlite:///FILE`, `sqlite:////absolute/FILE` or `postgresql://…`; `table_prefix` is PostgreSQL's. Raises
    `IncompatibleDatabase`, or `StoreUnavailable` when it cannot be opened.
    """
    if is_postgres(url):
        async with _postgres_store(url, table_prefix) as store:
            yield store
        return
    async with SQLiteFile.open(sqlite_path(url), MIGRATIONS) as file:
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


def _postgres_store(url: str, table_prefix: str) -> AbstractAsyncContextManager[ConversationStore]:
    try:
        from postgres import PostgresStore  # noqa: PLC0415 (its driver is an extra)
    except ImportError as error:
        raise IncompatibleDatabase(DRIVER_MISSING) from error
    return PostgresStore(url, table_prefix)


class SQLiteStore(SQLiteUploads, SQLiteUpkeep):
    """One SQLite file, shared by any number of processes on one machine."""

    def __init__(self, file: SQLiteFile):
        super().__init__(file)
        self._file = file

    async def overwrite_deleted(self) -> None:
        await self._file.rewrite()

    async def ping(self) -> None:
        self._file.require_whole()
        await self._write(_next_seq)  # a number that nothing has costs nothing

    async def _read_thread(
        self, thread_id: str, context: RequestContext, read: Callable[[sqlite3.Connection, sqlite3.Row], T]
    ) -> T:
        """Run `read` with the thread's row, after what a dead turn left on the thread has become items."""

        def attempt(db: sqlite3.Connection) -> tuple[T] | None:
            thread = _require_thread(db, thread_id, context)
            return None if thread["died"] else (read(db, thread),)

        while (found := await self._read(attempt)) is None:
            await self._write(lambda db: _recover(db, thread_id))
        return found[0]

    # --- threads --------------------------------------------------------------------------------------------------

    async def load_thread(self, thread_id: str, context: RequestContext) -> ThreadMetadata:
        thread = await self._read_thread(thread_id, context, lambda db, row: read_thread(*tuple(row)[:6]))
        remember(thread, context)
        return thread

    async def save_thread(self, thread: ThreadMetadata, context: RequestContext) -> None:
        columns = changed_columns(thread, context)
        made_here = thread.id not in context.loaded_threads

        def write(db: sqlite3.Connection) -> None:
            if made_here and _insert_thread(db, thread, context):
                return
            _require_lease(db, thread.id, context)
            if columns:
                db.execute(
                    f"UPDATE threads SET {', '.join(f'{name} = :{name}' for name in columns)}"
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
            return named.rowcount == 1 or _require_thread(db, thread_id, context)["title"] == title

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

        def read(db: sqlite3.Connection, _: sqlite3.Row) -> list[tuple[int, ThreadItem]]:
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
            ).fetchall()
            return [(seq, read_item(body)) for seq, body in rows]

        return page(await self._read_thread(thread_id, context, read), limit)

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
            _require_lease(db, thread_id, context)
            _put_item(db, thread_id, item, context)

        await self._write(write)

    async def save_item(self, thread_id: str, item: ThreadItem, context: RequestContext) -> None:
        await self.add_thread_item(thread_id, item, context)

    async def delete_thread_item(self, thread_id: str, item_id: str, context: RequestContext) -> None:
        def write(db: sqlite3.Connection) -> None:
            _require_lease(db, thread_id, context)
            _delete_attachments_of(
                db,
                "items.thread_id = ? AND items.id = ? AND items.user_id = ?",
                (thread_id, item_id, context.user_id),
            )
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

    async def delete_items_after(self, thread_id: str, item_id: str, context: RequestContext) -> None:
        def write(db: sqlite3.Connection) -> None:
            _require_lease(db, thread_id, context)
            seq = _after_seq(
                db,
                item_id,
                "SELECT seq FROM items WHERE id = ? AND thread_id = ? AND user_id = ?",
                thread_id,
                context.user_id,
            )
            later = "items.thread_id = ? AND items.user_id = ? AND items.seq > ?"
            _delete_attachments_of(db, later, (thread_id, context.user_id, seq))
            db.execute(f"DELETE FROM items WHERE {later}", (thread_id, context.user_id, seq))

        await self._write(write)

    # --- turns ----------------------------------------------------------------------------------------------------

    async def acquire_lease(
        self,
        thread_id: str,
        context: RequestContext,
        *,
        quota: Quota = NO_QUOTA,
        new_thread: ThreadMetadata | None = None,
    ) -> str:
        lease = new_id("task")

        def write(db: sqlite3.Connection) -> None:
            if new_thread is not None:
                _insert_thread(db, new_thread, context)
            if _require_thread(db, thread_id, context)["died"]:
                _recover(db, thread_id)
            _require_quota(db, quota, thread_id, context)
            taken = db.execute(
                f"INSERT INTO leases VALUES (?, ?, ?, {NOW} + {LEASE_SECONDS}) ON CONFLICT DO NOTHING",
                (thread_id, context.user_id, lease),
            )
            if taken.rowcount == 0:
                raise ThreadBusy(thread_id)

        await self._write(write)
        if new_thread is not None:
            remember(new_thread, context)
        return lease

    async def renew_leases(self, leases: Collection[str]) -> set[str]:
        def write(db: sqlite3.Connection) -> set[str]:
            renewed = db.execute(
                f"UPDATE leases SET expires_at = {NOW} + {LEASE_SECONDS}"
                " WHERE lease IN (SELECT value FROM json_each(?)) RETURNING lease",
                (json.dumps(list(leases)),),
            )
            return {lease for (lease,) in renewed.fetchall()}

        return await self._write(write)

    async def save_checkpoints(self, thread_id: str, items: Sequence[ThreadItem], context: RequestContext) -> None:
        def write(db: sqlite3.Connection) -> None:
            _require_lease(db, thread_id, context)
            for item in items:
                row = {**item_row(thread_id, item), "thread_id": thread_id, "user_id": context.user_id}
                changed = db.execute(
                    "UPDATE checkpoints SET type = :type, body = :body"
                    " WHERE thread_id = :thread_id AND user_id = :user_id AND id = :id",
                    row,
                )
                if changed.rowcount == 0:
                    db.execute(
                        "INSERT INTO checkpoints (seq, thread_id, user_id, id, type, body)"
                        " VALUES (:seq, :thread_id, :user_id, :id, :type, :body)",
                        {**row, "seq": _next_seq(db)},
                    )

        await self._write(write)

    async def end_turn(
        self, thread_id: str, items: Sequence[ThreadItem], context: RequestContext, *, began: bool = True
    ) -> None:
        def write(db: sqlite3.Connection) -> None:
            _require_lease(db, thread_id, context)
            for item in items:
                _put_item(db, thread_id, item, context)
            _forget_turn(db, thread_id)
            if not began:  # whichever of the user's newest: they count alike
                db.execute(
                    "DELETE FROM turn_starts WHERE rowid ="
                    " (SELECT rowid FROM turn_starts WHERE user_id = ? ORDER BY started_at DESC LIMIT 1)",
                    (context.user_id,),
                )

        await self._write(write)

    # --- feedback and attachments ---------------------------------------------------------------------------------

    async def save_feedback(
        self, thread_id: str, item_ids: Sequence[str], kind: FeedbackKind, context: RequestContext
    ) -> None:
        def write(db: sqlite3.Connection) -> None:
            _require_thread(db, thread_id, context)
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
                _require_lease(db, attachment.thread_id, context)
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
        def read(db: sqlite3.Connection) -> Attachment:
            row = db.execute(
                "SELECT body FROM attachments WHERE id = ? AND user_id = ?", (attachment_id, context.user_id)
            ).fetchone()
            if row is None:
                raise NotFoundError(attachment_id)
            return read_attachment(row["body"])

        return await self._read(read)

    async def delete_attachment(self, attachment_id: str, context: RequestContext) -> None:
        def write(db: sqlite3.Connection) -> None:
            deleted = db.execute(
                "DELETE FROM attachments WHERE id = ? AND user_id = ?", (attachment_id, context.user_id)
            )
            if deleted.rowcount == 0:
                raise NotFoundError(attachment_id)

        await self._write(write)


# --- statements that several methods share; each runs on a connection's own thread --------------------------------


def _require_thread(db: sqlite3.Connection, thread_id: str, context: RequestContext) -> sqlite3.Row:
    """Return the thread's columns, `lease`, and whether its turn `died`; raise `NotFoundError`."""
    row: sqlite3.Row | None = db.execute(
        "SELECT id, created_at, title, status, allowed_image_domains, metadata,"
        f" lease, coalesce({RAN_OUT}, FALSE) AS died FROM threads LEFT JOIN leases ON thread_id = id"
        " WHERE id = ? AND threads.user_id = ?",
        (thread_id, context.user_id),
    ).fetchone()
    if row is None:
        raise NotFoundError(thread_id)
    return row


def _require_lease(db: sqlite3.Connection, thread_id: str, context: RequestContext) -> None:
    """Raise `NotFoundError` when the thread is not the user's, `LeaseLost` when it is another turn's by now."""
    row = _require_thread(db, thread_id, context)
    if context.lease is not None and row["lease"] != context.lease:
        raise LeaseLost(thread_id)


def _require_quota(db: sqlite3.Connection, quota: Quota, thread_id: str, context: RequestContext) -> None:
    """Raise `QuotaExceeded`, or count one more turn of the user."""
    user = context.user_id
    if quota.tokens_per_day:
        [used, seconds] = db.execute(
            "SELECT coalesce(sum(input_tokens + output_tokens), 0), 86400 - strftime('%s', 'now') % 86400"
            " FROM usage WHERE user_id = ? AND day = date('now')",
            (user,),
        ).fetchone()
        if used >= quota.tokens_per_day:
            raise QuotaExceeded("tokens_per_day", seconds)
    if quota.concurrent_turns:
        [running] = db.execute(
            f"SELECT count(*) FROM leases WHERE user_id = ? AND thread_id <> ? AND NOT ({RAN_OUT})", (user, thread_id)
        ).fetchone()
        if running >= quota.concurrent_turns:
            raise QuotaExceeded("concurrent_turns", 5)
    if quota.turns_per_minute:
        db.execute(
            f"DELETE FROM turn_starts WHERE user_id = ? AND started_at NOT BETWEEN {NOW} - 60 AND {NOW}", (user,)
        )
        [started, oldest_age] = db.execute(
            f"SELECT count(*), {NOW} - min(started_at) FROM turn_starts WHERE user_id = ?", (user,)
        ).fetchone()
        if started >= quota.turns_per_minute:
            raise QuotaExceeded("turns_per_minute", max(1, round(60 - oldest_age)))
        db.execute(f"INSERT INTO turn_starts VALUES (?, {NOW})", (user,))


def _delete_attachments_of(db: sqlite3.Connection, condition: str, values: Sequence[str | int]) -> None:
    """Delete the attachments of the messages that are about to be deleted."""
    db.execute(
        "DELETE FROM attachments WHERE id IN (SELECT json_extract(attachment.value, '$.id') FROM items,"
        f" json_each(items.body, '$.attachments') AS attachment WHERE items.type = 'user_message' AND {condition})",
        values,
    )


def _insert_thread(db: sqlite3.Connection, thread: ThreadMetadata, context: RequestContext) -> bool:
    row = thread_row(thread) | {
        "id": thread.id,
        "user_id": context.user_id,
        "created_at": aware(thread.created_at).isoformat(),
        "activity": _next_seq(db),
    }
    inserted = db.execute(
        f"INSERT INTO threads ({', '.join(row)}, active_at) VALUES ({', '.join(f':{name}' for name in row)}, {NOW})"
        " ON CONFLICT DO NOTHING",
        row,
    )
    return inserted.rowcount == 1


def _put_item(db: sqlite3.Connection, thread_id: str, item: ThreadItem, context: RequestContext) -> None:
    """Insert the item where its checkpoint is or else at the thread's end; or replace the one with its id."""
    row: dict[str, Any] = {**item_row(thread_id, item), "thread_id": thread_id, "user_id": context.user_id}
    settled = db.execute(
        "DELETE FROM checkpoints WHERE thread_id = :thread_id AND user_id = :user_id AND id = :id RETURNING seq", row
    ).fetchall()
    replaced = db.execute(
        "UPDATE items SET type = :type, body = :body WHERE thread_id = :thread_id AND user_id = :user_id AND id = :id",
        row,
    )
    if replaced.rowcount == 0:
        row["seq"] = settled[0]["seq"] if settled else _next_seq(db)
        db.execute(
            "INSERT INTO items (seq, thread_id, user_id, id, type, body)"
            " VALUES (:seq, :thread_id, :user_id, :id, :type, :body)",
            row,
        )
        db.execute(
            f"UPDATE threads SET activity = max(activity, :seq), active_at = {NOW}"
            " WHERE id = :thread_id AND user_id = :user_id",
            row,
        )


def _recover(db: sqlite3.Connection, thread_id: str) -> None:
    """Turn what a dead turn left behind into items, unless another process was faster."""
    died = db.execute(f"SELECT user_id FROM leases WHERE thread_id = ? AND {RAN_OUT}", (thread_id,)).fetchone()
    if died is None:
        return
    db.execute(
        "INSERT INTO items (seq, thread_id, user_id, id, type, body)"
        " SELECT seq, thread_id, user_id, id, type, body FROM checkpoints WHERE thread_id = ?"
        " ON CONFLICT (thread_id, id) DO UPDATE SET type = excluded.type, body = excluded.body",
        (thread_id,),
    )
    _put_item(db, thread_id, stopped_marker(thread_id), RequestContext(died["user_id"]))
    _forget_turn(db, thread_id)
    log.warning("a turn on thread %s died; what it had shown is stored", thread_id)


def _forget_turn(db: sqlite3.Connection, thread_id: str) -> None:
    db.execute("DELETE FROM checkpoints WHERE thread_id = ?", (thread_id,))
    db.execute("DELETE FROM leases WHERE thread_id = ?", (thread_id,))


def _next_seq(db: sqlite3.Connection) -> int:
    [row] = db.execute("UPDATE sequence SET value = value + 1 RETURNING value").fetchall()
    return int(row[0])


def _after_seq(db: sqlite3.Connection, after: str, lookup: str, *owner: str) -> int:
    """Return the sequence number that a cursor stands for, where `after` may be the id of a row too."""
    seq = cursor_seq(after)
    if seq is None:
        row = db.execute(lookup, (after, *owner)).fetchone()
        if row is None:
            raise NotFoundError(after)
        seq = int(row[0])
    return seq
