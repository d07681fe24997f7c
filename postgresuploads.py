"""The bytes of attachments in PostgreSQL: reserved, uploaded in chunks, read in chunks."""

from typing import Any

from chatkit.store import NotFoundError
from chatkit.types import Attachment

from context import RequestContext
from conversations import CHUNK_BYTES, MAX_UNSENT, UNSENT_HOURS, AlreadyUploaded, QuotaExceeded, new_id
from pool import OnPool, Session
from postgresschema import NOW
from postgresthreads import require_lease
from rows import attachment_body


class PostgresUploads(OnPool):
    async def reserve_attachment(
        self, attachment: Attachment, size: int, max_storage_bytes: int, context: RequestContext
    ) -> None:
        async def write(db: Session) -> None:
            if attachment.thread_id is not None:
                await require_lease(db, attachment.thread_id, context)
            await db.lock(_storage_of(context))
            await db.execute(
                "INSERT INTO @attachments (id, user_id, thread_id, body, size, is_complete, created_at)"
                f" VALUES (%s, %s, %s, %s, %s, FALSE, {NOW})",
                (attachment.id, context.user_id, attachment.thread_id, attachment_body(attachment), size),
            )
            await _require_few_unsent(db, context)
            await _require_storage(db, max_storage_bytes, context)

        await self._write(write, queue=(context.user_id, _storage_of(context)))

    async def begin_upload(self, attachment_id: str, context: RequestContext) -> str:
        upload = new_id("task")

        async def write(db: Session) -> None:
            if (await require_attachment(db, attachment_id, context, lock=True)).is_complete:
                raise AlreadyUploaded(attachment_id)
            await _drop_chunks(db, attachment_id, upload, context)

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
        async def write(db: Session) -> None:
            if max_storage_bytes:
                await db.lock(_storage_of(context))
            attachment = await _require_upload(db, attachment_id, upload, context)
            await db.execute("INSERT INTO @attachment_chunks VALUES (%s, %s, %b)", (attachment_id, number, data))
            received = number * CHUNK_BYTES + len(data)
            if received > attachment.size:
                await db.execute(
                    "UPDATE @attachments SET size = %s WHERE id = %s AND user_id = %s",
                    (received, attachment_id, context.user_id),
                )
                await _require_storage(db, max_storage_bytes, context)

        await self._write(write, queue=(context.user_id, _storage_of(context)) if max_storage_bytes else None)

    async def finish_upload(self, attachment_id: str, upload: str, context: RequestContext) -> None:
        async def write(db: Session) -> None:
            await _require_upload(db, attachment_id, upload, context)
            await db.execute(
                "UPDATE @attachments AS attachment SET is_complete = TRUE, upload = NULL, size ="
                " (SELECT coalesce(sum(length(data)), 0) FROM @attachment_chunks WHERE attachment_id = attachment.id)"
                " WHERE id = %s AND user_id = %s",
                (attachment_id, context.user_id),
            )

        await self._write(write)

    async def abandon_upload(self, attachment_id: str, upload: str, context: RequestContext) -> None:
        async def write(db: Session) -> None:
            await _require_upload(db, attachment_id, upload, context)
            await _drop_chunks(db, attachment_id, None, context)

        await self._write(write)

    async def load_attachment_size(self, attachment_id: str, context: RequestContext) -> int:
        row = await self._read(lambda db: require_attachment(db, attachment_id, context))
        if not row.is_complete:
            raise NotFoundError(attachment_id)
        return int(row.size)

    async def read_chunk(self, attachment_id: str, number: int, context: RequestContext) -> bytes:
        row = await self._read(
            lambda db: db.row(
                "SELECT coalesce(data, '') AS data FROM @attachments"
                " LEFT JOIN @attachment_chunks ON attachment_id = id AND number = %s"
                " WHERE id = %s AND user_id = %s AND is_complete",
                (number, attachment_id, context.user_id),
                binary=True,
            )
        )
        if row is None:
            raise NotFoundError(attachment_id)
        return bytes(row.data)

    async def load_attachment_owner(self, attachment_id: str) -> str:
        row = await self._read(lambda db: db.row("SELECT user_id FROM @attachments WHERE id = %s", (attachment_id,)))
        if row is None:
            raise NotFoundError(attachment_id)
        return str(row.user_id)

    async def load_link_key(self) -> bytes:
        row = await self._read(lambda db: db.row("SELECT value FROM @secrets WHERE name = 'links'"))
        return bytes(row.value)


async def require_attachment(db: Session, attachment_id: str, context: RequestContext, *, lock: bool = False) -> Any:
    """Return the attachment's row; raise `NotFoundError`."""
    row = await db.row(
        f"SELECT * FROM @attachments WHERE id = %s AND user_id = %s{' FOR UPDATE' if lock else ''}",
        (attachment_id, context.user_id),
    )
    if row is None:
        raise NotFoundError(attachment_id)
    return row


async def _require_upload(db: Session, attachment_id: str, upload: str, context: RequestContext) -> Any:
    row = await require_attachment(db, attachment_id, context, lock=True)
    if row.upload != upload:
        raise AlreadyUploaded(attachment_id)
    return row


async def _drop_chunks(db: Session, attachment_id: str, upload: str | None, context: RequestContext) -> None:
    """Delete what has come of the attachment, which is locked, and let this upload write instead."""
    await db.execute("DELETE FROM @attachment_chunks WHERE attachment_id = %s", (attachment_id,))
    await db.execute(
        "UPDATE @attachments SET upload = %s WHERE id = %s AND user_id = %s",
        (upload, attachment_id, context.user_id),
    )


def _storage_of(context: RequestContext) -> str:
    """Return what is locked while the user's bytes are counted: who waits for it here waits without a connection."""
    return f"storage of {context.user_id}"


async def _require_few_unsent(db: Session, context: RequestContext) -> None:
    [unsent] = await db.row(
        "SELECT count(*) FROM @attachments WHERE thread_id IS NULL AND user_id = %s", (context.user_id,)
    )
    if unsent > MAX_UNSENT:
        raise QuotaExceeded("unsent_files", retry_after_seconds=UNSENT_HOURS * 3600)


async def _require_storage(db: Session, most: int, context: RequestContext) -> None:
    if not most:
        return
    [used] = await db.row(
        "SELECT coalesce(sum(size), 0)::bigint FROM @attachments WHERE user_id = %s", (context.user_id,)
    )
    if used > most:
        raise QuotaExceeded("storage", retry_after_seconds=UNSENT_HOURS * 3600)
