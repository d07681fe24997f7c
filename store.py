"""`open_store`, and the store in one SQLite file: the schema first, then one method a promise."""

import logging
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from chatkit.store import NotFoundError
from chatkit.types import Attachment, FeedbackKind, Page, ThreadItem, ThreadMetadata
from pydantic import TypeAdapter

from context import RequestContext
from conversations import (
    CHUNK_BYTES,
    HIDDEN_TYPES,
    LEASE_SECONDS,
    NO_QUOTA,
    PURGE_INTERVAL_SECONDS,
    UNSENT_HOURS,
    AlreadySent,
    AlreadyUploaded,
    ConversationStore,
    IncompatibleDatabase,
    LeaseLost,
    Purged,
    Quota,
    QuotaExceeded,
    ThreadBusy,
    Usage,
    aware,
    changed_columns,
    cursor_seq,
    item_row,
    new_id,
    page,
    read_item,
    read_thread,
    remember,
    stopped_marker,
    thread_row,
)
from sqlite import SQLiteFile

log = logging.getLogger("service.store")

T = TypeVar("T")

MIGRATIONS = (
    """
    -- Order and cursors follow these numbers, never a clock, and a number is not given twice.
    CREATE TABLE sequence (value INTEGER NOT NULL);
    INSERT INTO sequence VALUES (0);

    CREATE TABLE threads (
        id TEXT PRIMARY KEY,
        user_id TEXT NOT NULL,
        created_at TEXT NOT NULL,
        title TEXT,
        status TEXT NOT NULL,
        allowed_image_domains TEXT,
        metadata TEXT NOT NULL,
        activity INTEGER NOT NULL,  -- the sequence number of the newest item
        active_at REAL NOT NULL,  -- when it came, in seconds since 1970 by SQLite's clock
        UNIQUE (id, user_id)
    );
    CREATE INDEX threads_by_activity ON threads (user_id, activity);

    CREATE TABLE items (
        seq INTEGER PRIMARY KEY,
        thread_id TEXT NOT NULL,
        user_id TEXT NOT NULL,
        id TEXT NOT NULL,
        type TEXT NOT NULL,
        body TEXT NOT NULL,
        UNIQUE (thread_id, id),
        FOREIGN KEY (thread_id, user_id) REFERENCES threads (id, user_id) ON DELETE CASCADE
    );
    CREATE INDEX items_by_thread ON items (thread_id, user_id, seq);

    -- One row while a turn runs on the thread. A row that ran out is a turn that died.
    CREATE TABLE leases (
        thread_id TEXT PRIMARY KEY,
        user_id TEXT NOT NULL,
        lease TEXT NOT NULL,
        holder TEXT NOT NULL,
        expires_at REAL NOT NULL,  -- seconds since 1970 by SQLite's clock
        FOREIGN KEY (thread_id, user_id) REFERENCES threads (id, user_id) ON DELETE CASCADE
    );
    CREATE INDEX leases_by_holder ON leases (holder);

    -- Items that a running turn has shown but not finished, as they would be stored if it ended now.
    CREATE TABLE checkpoints (
        seq INTEGER PRIMARY KEY,
        thread_id TEXT NOT NULL,
        user_id TEXT NOT NULL,
        id TEXT NOT NULL,
        type TEXT NOT NULL,
        body TEXT NOT NULL,
        UNIQUE (thread_id, id),
        FOREIGN KEY (thread_id, user_id) REFERENCES threads (id, user_id) ON DELETE CASCADE
    );

    CREATE TABLE feedback (
        thread_id TEXT NOT NULL,
        item_id TEXT NOT NULL,
        user_id TEXT NOT NULL,
        kind TEXT NOT NULL,
        updated_at TEXT NOT NULL,
        PRIMARY KEY (thread_id, item_id, user_id),
        FOREIGN KEY (thread_id, item_id) REFERENCES items (thread_id, id) ON DELETE CASCADE
    );

    CREATE TABLE usage (
        user_id TEXT NOT NULL,
        day TEXT NOT NULL,  -- YYYY-MM-DD, UTC
        model TEXT NOT NULL,
        requests INTEGER NOT NULL,
        input_tokens INTEGER NOT NULL,
        output_tokens INTEGER NOT NULL,
        PRIMARY KEY (user_id, day, model)
    );

    -- Turns of the last minute, for the quota.
    CREATE TABLE turn_starts (
        user_id TEXT NOT NULL,
        started_at REAL NOT NULL  -- seconds since 1970 by SQLite's clock
    );
    CREATE INDEX turn_starts_by_user ON turn_starts (user_id, started_at);

    CREATE TABLE attachments (
        id TEXT PRIMARY KEY,
        user_id TEXT NOT NULL,
        thread_id TEXT,  -- null until it is sent
        body TEXT NOT NULL,
        size INTEGER NOT NULL,  -- bytes, as announced or as they came
        upload TEXT,  -- the name of the upload that may write chunks
        is_complete INTEGER NOT NULL,
        created_at REAL NOT NULL,
        FOREIGN KEY (thread_id, user_id) REFERENCES threads (id, user_id) ON DELETE CASCADE
    );
    CREATE INDEX attachments_by_thread ON attachments (thread_id, user_id);
    CREATE INDEX attachments_by_user ON attachments (user_id);

    CREATE TABLE attachment_chunks (
        attachment_id TEXT NOT NULL REFERENCES attachments (id) ON DELETE CASCADE,
        number INTEGER NOT NULL,
        data BLOB NOT NULL,
        PRIMARY KEY (attachment_id, number)
    );

    CREATE TABLE secrets (name TEXT PRIMARY KEY, value BLOB NOT NULL);
    INSERT INTO secrets VALUES ('links', randomblob(32));

    CREATE TABLE jobs (name TEXT PRIMARY KEY, ran_at REAL NOT NULL);
    INSERT INTO jobs VALUES ('purge', 0);
    """,
)
"""Append only: the number of entries is the schema's version. A migration leaves the previous release working."""

NOW_TEXT = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')"
NOW = "((julianday('now') - 2440587.5) * 86400.0)"
RAN_OUT = f"expires_at NOT BETWEEN {NOW} AND {NOW} + {LEASE_SECONDS}"
"""A lease from further ahead than a lease can be was made before the clock was set back."""

_attachment = TypeAdapter[Attachment](Attachment)


@asynccontextmanager
async def open_store(url: str, table_prefix: str = "chatkit_") -> AsyncIterator[ConversationStore]:
    """Open the database, made or migrated where needed, and close it in the end.

    `url` is `sqlite:///FILE`, `sqlite:////absolute/FILE` or `postgresql://…`; `table_prefix` is PostgreSQL's. Raises
    `IncompatibleDatabase`, or `StoreUnavailable` when it cannot be opened.
    """
    path = url.removeprefix("sqlite:///")
    if path in (url, "", ":memory:"):
        raise IncompatibleDatabase("DATABASE_URL must be sqlite:///FILE or sqlite:////absolute/FILE.")
    async with SQLiteFile.open(path, MIGRATIONS) as file:
        yield SQLiteStore(file)


class SQLiteStore(ConversationStore):
    """One SQLite file, shared by any number of processes on one machine."""

    def __init__(self, file: SQLiteFile):
        self._read = file.read
        self._write = file.write

    async def ping(self) -> None:
        await self._read(lambda db: db.execute("SELECT value FROM sequence").fetchone())

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
        holder: str,
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
                f"INSERT INTO leases VALUES (?, ?, ?, ?, {NOW} + {LEASE_SECONDS}) ON CONFLICT DO NOTHING",
                (thread_id, context.user_id, lease, holder),
            )
            if taken.rowcount == 0:
                raise ThreadBusy(thread_id)

        await self._write(write)
        if new_thread is not None:
            remember(new_thread, context)
        return lease

    async def renew_leases(self, holder: str) -> set[str]:
        def write(db: sqlite3.Connection) -> set[str]:
            renewed = db.execute(
                f"UPDATE leases SET expires_at = {NOW} + {LEASE_SECONDS} WHERE holder = ? RETURNING lease", (holder,)
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

    async def end_turn(self, thread_id: str, items: Sequence[ThreadItem], context: RequestContext) -> None:
        def write(db: sqlite3.Connection) -> None:
            _require_lease(db, thread_id, context)
            for item in items:
                _put_item(db, thread_id, item, context)
            _forget_turn(db, thread_id)

        await self._write(write)

    # --- feedback, usage and attachments --------------------------------------------------------------------------

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

    async def add_usage(self, usage: Usage, context: RequestContext) -> None:
        await self._write(
            lambda db: db.execute(
                "INSERT INTO usage VALUES (?, date('now'), ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
                " requests = requests + excluded.requests, input_tokens = input_tokens + excluded.input_tokens,"
                " output_tokens = output_tokens + excluded.output_tokens",
                (context.user_id, usage.model, usage.requests, usage.input_tokens, usage.output_tokens),
            )
        )

    async def load_usage(self) -> list[Usage]:
        rows = await self._read(lambda db: db.execute("SELECT * FROM usage ORDER BY day, user_id, model").fetchall())
        return [Usage(**dict(row)) for row in rows]

    async def load_feedback_counts(self) -> dict[str, tuple[int, int]]:
        rows = await self._read(
            lambda db: db.execute(
                "SELECT user_id, sum(kind = 'positive'), sum(kind = 'negative') FROM feedback GROUP BY user_id"
            ).fetchall()
        )
        return {user_id: (positive, negative) for user_id, positive, negative in rows}

    async def save_attachment(self, attachment: Attachment, context: RequestContext) -> None:
        def write(db: sqlite3.Connection) -> None:
            if attachment.thread_id is not None:
                _require_lease(db, attachment.thread_id, context)
            row = {
                "id": attachment.id,
                "user_id": context.user_id,
                "thread_id": attachment.thread_id,
                "body": _attachment.dump_json(attachment).decode(),
            }
            saved = db.execute(
                "INSERT INTO attachments (id, user_id, thread_id, body, size, is_complete, created_at)"
                f" VALUES (:id, :user_id, :thread_id, :body, 0, FALSE, {NOW})"
                " ON CONFLICT DO UPDATE SET thread_id = excluded.thread_id, body = excluded.body"
                " WHERE user_id = excluded.user_id AND (thread_id IS NULL OR thread_id = excluded.thread_id)",
                row,
            )
            if saved.rowcount == 0:
                _require_attachment(db, attachment.id, context)
                raise AlreadySent(attachment.id)

        await self._write(write)

    async def reserve_attachment(
        self, attachment: Attachment, size: int, max_storage_bytes: int, context: RequestContext
    ) -> None:
        def write(db: sqlite3.Connection) -> None:
            db.execute(
                "INSERT INTO attachments (id, user_id, body, size, is_complete, created_at)"
                f" VALUES (?, ?, ?, ?, FALSE, {NOW})",
                (attachment.id, context.user_id, _attachment.dump_json(attachment).decode(), size),
            )
            _require_storage(db, max_storage_bytes, context)

        await self._write(write)

    async def begin_upload(self, attachment_id: str, context: RequestContext) -> str:
        upload = new_id("task")

        def write(db: sqlite3.Connection) -> None:
            if _require_attachment(db, attachment_id, context)["is_complete"]:
                raise AlreadyUploaded(attachment_id)
            db.execute("DELETE FROM attachment_chunks WHERE attachment_id = ?", (attachment_id,))
            db.execute("UPDATE attachments SET upload = ? WHERE id = ?", (upload, attachment_id))

        await self._write(write)
        return upload

    async def write_chunk(
        self,
        attachment_id: str,
        upload: str,
        number: int,
        data: bytes,
        max_storage_bytes: int,
        context: RequestContext,
    ) -> None:
        def write(db: sqlite3.Connection) -> None:
            attachment = _require_upload(db, attachment_id, upload, context)
            db.execute("INSERT INTO attachment_chunks VALUES (?, ?, ?)", (attachment_id, number, data))
            received = number * CHUNK_BYTES + len(data)
            if received > attachment["size"]:
                db.execute("UPDATE attachments SET size = ? WHERE id = ?", (received, attachment_id))
                _require_storage(db, max_storage_bytes, context)

        await self._write(write)

    async def finish_upload(self, attachment_id: str, upload: str, context: RequestContext) -> None:
        def write(db: sqlite3.Connection) -> None:
            _require_upload(db, attachment_id, upload, context)
            db.execute(
                "UPDATE attachments SET is_complete = TRUE, upload = NULL, size ="
                " (SELECT coalesce(sum(length(data)), 0) FROM attachment_chunks WHERE attachment_id = attachments.id)"
                " WHERE id = ?",
                (attachment_id,),
            )

        await self._write(write)

    async def abandon_upload(self, attachment_id: str, upload: str, context: RequestContext) -> None:
        def write(db: sqlite3.Connection) -> None:
            _require_upload(db, attachment_id, upload, context)
            db.execute("DELETE FROM attachment_chunks WHERE attachment_id = ?", (attachment_id,))
            db.execute("UPDATE attachments SET upload = NULL WHERE id = ?", (attachment_id,))

        await self._write(write)

    async def load_attachment_size(self, attachment_id: str, context: RequestContext) -> int:
        row = await self._read(lambda db: _require_attachment(db, attachment_id, context))
        if not row["is_complete"]:
            raise NotFoundError(attachment_id)
        return int(row["size"])

    async def read_chunk(self, attachment_id: str, number: int, context: RequestContext) -> bytes:
        def read(db: sqlite3.Connection) -> bytes:
            if not _require_attachment(db, attachment_id, context)["is_complete"]:
                raise NotFoundError(attachment_id)
            row = db.execute(
                "SELECT data FROM attachment_chunks WHERE attachment_id = ? AND number = ?", (attachment_id, number)
            ).fetchone()
            return bytes(row["data"]) if row else b""

        return await self._read(read)

    async def load_attachment_owner(self, attachment_id: str) -> str:
        row = await self._read(
            lambda db: db.execute("SELECT user_id FROM attachments WHERE id = ?", (attachment_id,)).fetchone()
        )
        if row is None:
            raise NotFoundError(attachment_id)
        return str(row["user_id"])

    async def load_link_key(self) -> bytes:
        row = await self._read(lambda db: db.execute("SELECT value FROM secrets WHERE name = 'links'").fetchone())
        return bytes(row["value"])

    async def purge(self, retention_days: int, *, now: bool = False) -> Purged | None:
        def write(db: sqlite3.Connection) -> Purged | None:
            due = f"ran_at NOT BETWEEN {NOW} - {PURGE_INTERVAL_SECONDS} AND {NOW}"
            claimed = db.execute(f"UPDATE jobs SET ran_at = {NOW} WHERE name = 'purge' AND (? OR {due})", (now,))
            if claimed.rowcount == 0:
                return None
            unsent = db.execute(
                f"DELETE FROM attachments WHERE thread_id IS NULL AND created_at < {NOW} - {UNSENT_HOURS * 3600}"
            )
            db.execute(f"DELETE FROM turn_starts WHERE started_at < {NOW} - 60")
            idle = db.execute(
                f"DELETE FROM threads WHERE ? > 0 AND active_at < {NOW} - ? * 86400.0 AND id NOT IN"
                " (SELECT thread_id FROM leases)",
                (retention_days, retention_days),
            )
            return Purged(threads=idle.rowcount, attachments=unsent.rowcount)

        return await self._write(write)

    async def load_attachment(self, attachment_id: str, context: RequestContext) -> Attachment:
        def read(db: sqlite3.Connection) -> Attachment:
            row = db.execute(
                "SELECT body FROM attachments WHERE id = ? AND user_id = ?", (attachment_id, context.user_id)
            ).fetchone()
            if row is None:
                raise NotFoundError(attachment_id)
            return _attachment.validate_json(row["body"])

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


def _require_attachment(db: sqlite3.Connection, attachment_id: str, context: RequestContext) -> sqlite3.Row:
    """Return the attachment's row; raise `NotFoundError`."""
    row: sqlite3.Row | None = db.execute(
        "SELECT * FROM attachments WHERE id = ? AND user_id = ?", (attachment_id, context.user_id)
    ).fetchone()
    if row is None:
        raise NotFoundError(attachment_id)
    return row


def _require_upload(db: sqlite3.Connection, attachment_id: str, upload: str, context: RequestContext) -> sqlite3.Row:
    row = _require_attachment(db, attachment_id, context)
    if row["upload"] != upload:
        raise AlreadyUploaded(attachment_id)
    return row


def _require_storage(db: sqlite3.Connection, most: int, context: RequestContext) -> None:
    [used] = db.execute("SELECT sum(size) FROM attachments WHERE user_id = ?", (context.user_id,)).fetchone()
    if most and used > most:
        raise QuotaExceeded("storage", retry_after_seconds=UNSENT_HOURS * 3600)


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
