"""The bytes of attachments in SQLite: reserved, uploaded in chunks, read in chunks."""

import sqlite3

from chatkit.store import NotFoundError
from chatkit.types import Attachment

from context import RequestContext
from conversations import CHUNK_BYTES, MAX_UNSENT, UNSENT_HOURS, AlreadyUploaded, QuotaExceeded, new_id
from rows import attachment_body
from sqlite import OnSQLite
from sqliteschema import NOW
from sqlitethreads import require_lease


class SQLiteUploads(OnSQLite):
    async def reserve_attachment(
        self, attachment: Attachment, size: int, max_storage_bytes: int, context: RequestContext
    ) -> None:
        def write(db: sqlite3.Connection) -> None:
            if attachment.thread_id is not None:
                require_lease(db, attachment.thread_id, context)
            db.execute(
                "INSERT INTO attachments (id, user_id, thread_id, body, size, is_complete, created_at)"
                f" VALUES (?, ?, ?, ?, ?, FALSE, {NOW})",
                (attachment.id, context.user_id, attachment.thread_id, attachment_body(attachment), size),
            )
            _require_few_unsent(db, context)
            _require_storage(db, max_storage_bytes, context)

        await self._write(write)

    async def begin_upload(self, attachment_id: str, context: RequestContext) -> str:
        upload = new_id("task")

        def write(db: sqlite3.Connection) -> None:
            if require_attachment(db, attachment_id, context)["is_complete"]:
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
        row = await self._read(lambda db: require_attachment(db, attachment_id, context))
        if not row["is_complete"]:
            raise NotFoundError(attachment_id)
        return int(row["size"])

    async def read_chunk(self, attachment_id: str, number: int, context: RequestContext) -> bytes:
        def read(db: sqlite3.Connection) -> bytes:
            if not require_attachment(db, attachment_id, context)["is_complete"]:
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


def require_attachment(db: sqlite3.Connection, attachment_id: str, context: RequestContext) -> sqlite3.Row:
    """Return the attachment's row; raise `NotFoundError`."""
    row: sqlite3.Row | None = db.execute(
        "SELECT * FROM attachments WHERE id = ? AND user_id = ?", (attachment_id, context.user_id)
    ).fetchone()
    if row is None:
        raise NotFoundError(attachment_id)
    return row


def _require_upload(db: sqlite3.Connection, attachment_id: str, upload: str, context: RequestContext) -> sqlite3.Row:
    row = require_attachment(db, attachment_id, context)
    if row["upload"] != upload:
        raise AlreadyUploaded(attachment_id)
    return row


def _require_few_unsent(db: sqlite3.Connection, context: RequestContext) -> None:
    [unsent] = db.execute(
        "SELECT count(*) FROM attachments WHERE thread_id IS NULL AND user_id = ?", (context.user_id,)
    ).fetchone()
    if unsent > MAX_UNSENT:
        raise QuotaExceeded("unsent_files", retry_after_seconds=UNSENT_HOURS * 3600)


def _require_storage(db: sqlite3.Connection, most: int, context: RequestContext) -> None:
    [used] = db.execute("SELECT sum(size) FROM attachments WHERE user_id = ?", (context.user_id,)).fetchone()
    if most and used > most:
        raise QuotaExceeded("storage", retry_after_seconds=UNSENT_HOURS * 3600)
