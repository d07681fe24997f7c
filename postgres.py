"""The store in PostgreSQL, for replicas on several machines: threads, their items, feedback and attachments.

SQLite has one writer; here whoever changes a thread locks its row first, and whoever counts what a user has used locks
the user. Locks are taken in this order: user, thread, attachment. All times are the database's.
"""

import logging
import re
from collections.abc import Collection, Sequence
from typing import Any, Self

from chatkit.store import NotFoundError
from chatkit.types import Attachment, FeedbackKind, Page, ThreadItem, ThreadMetadata

from context import RequestContext
from conversations import HIDDEN_TYPES, NOTHING_OF_OURS, AlreadySent, IncompatibleDatabase, StoreUnavailable
from pool import WORK_SECONDS, Pool, Session
from postgresschema import MIGRATIONS, NOW
from postgresthreads import add_item, insert_thread, lock_own_thread, lock_thread, require_lease, require_thread
from postgresturns import PostgresTurns
from postgresupkeep import PostgresUpkeep
from postgresuploads import PostgresUploads, require_attachment
from rows import (
    MAX_PAGE_CHARACTERS,
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

log = logging.getLogger("service.store")

POOL_SIZE = 10
"""Connections of one process: each piece of work holds one for a few milliseconds."""
MIGRATION_SECONDS = 600.0


async def migrate(db: Session, migrations: Sequence[str], *, may_make: bool = True) -> None:
    """Bring the tables to the schema of these migrations; raise `IncompatibleDatabase` where they are beyond it."""
    await db.lock("migrations")  # replicas that start together take turns
    [encoding, table] = await db.row("SELECT current_setting('server_encoding'), to_regclass('@schema_version')")
    if encoding != "UTF8":
        raise IncompatibleDatabase(f"The database's encoding is {encoding}. Create one with ENCODING 'UTF8'.")
    if table is None:
        if not may_make:
            raise StoreUnavailable(NOTHING_OF_OURS)
        await db.execute("CREATE TABLE @schema_version AS SELECT 0 AS version")
    [version] = await db.row("SELECT version FROM @schema_version")
    if version > len(migrations):
        raise IncompatibleDatabase(
            f"The database has schema {version}, made by a newer release; this one knows {len(migrations)}."
            " Start the newer release, or restore a backup that was made before it."
        )
    for script in migrations[version:]:
        await db.execute(script)
    if version < len(migrations):
        await db.execute("UPDATE @schema_version SET version = %s", (len(migrations),))
        log.info("the database was brought from schema %d to %d", version, len(migrations))


class PostgresStore(PostgresTurns, PostgresUploads, PostgresUpkeep):
    """A database that any number of processes on any number of machines may share; an async context manager.

    Entering it makes (where it may) or migrates the tables. Raises `IncompatibleDatabase`, or `StoreUnavailable` when
    the server does not answer.
    """

    def __init__(
        self,
        connection_string: str,
        table_prefix: str = "chatkit_",
        *,
        pool_size: int = POOL_SIZE,
        work_seconds: float = WORK_SECONDS,
        may_make: bool = True,
    ):
        if not re.fullmatch(r"[a-z_][a-z0-9_]{0,29}", table_prefix):
            raise IncompatibleDatabase(
                "A table prefix is at most 30 lower-case letters, digits and underscores, and begins with no digit."
            )
        super().__init__(Pool(connection_string, table_prefix, pool_size, work_seconds))
        self._may_make = may_make

    async def __aenter__(self) -> Self:
        try:
            await self._pool.write_patiently(
                lambda db: migrate(db, MIGRATIONS, may_make=self._may_make), MIGRATION_SECONDS
            )
        except BaseException:
            await self._pool.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pool.close()

    async def ping(self) -> None:
        # A lock on a row is written to the log and flushed, which no standby does, and leaves no dead row behind; this
        # one is shared, so that no process waits for another's.
        await self._write(lambda db: db.row("SELECT version FROM @schema_version FOR SHARE"))

    # --- threads --------------------------------------------------------------------------------------------------

    async def load_thread(self, thread_id: str, context: RequestContext) -> ThreadMetadata:
        async def read(db: Session, row: Any) -> ThreadMetadata:
            return read_thread(*row[:6])

        thread = await self._read_thread(thread_id, context, read)
        remember(thread, context)
        return thread

    async def save_thread(self, thread: ThreadMetadata, context: RequestContext) -> None:
        columns = changed_columns(thread, context)
        made_here = thread.id not in context.loaded_threads

        async def write(db: Session) -> None:
            if made_here and await insert_thread(db, thread, context):
                return
            await lock_own_thread(db, thread.id, context)
            if columns:
                await db.execute(
                    f"UPDATE @threads SET {', '.join(f'{name} = %({name})s' for name in columns)}, active_at = {NOW}"
                    " WHERE id = %(id)s AND user_id = %(user_id)s",
                    {**columns, "id": thread.id, "user_id": context.user_id},
                )

        await self._write(write, queue=(context.user_id, thread.id))
        remember(thread, context)

    async def name_thread(self, thread_id: str, title: str, context: RequestContext) -> bool:
        async def write(db: Session) -> bool:
            named = await db.execute(
                "UPDATE @threads SET title = %s WHERE id = %s AND user_id = %s AND title IS NULL",
                (title, thread_id, context.user_id),
            )
            return named == 1 or (await require_thread(db, thread_id, context)).title == title

        return await self._write(write, queue=(context.user_id, thread_id))

    async def load_threads(
        self, limit: int, after: str | None, order: str, context: RequestContext
    ) -> Page[ThreadMetadata]:
        beyond, direction = ("<", "DESC") if order == "desc" else (">", "ASC")

        async def read(db: Session) -> list[tuple[int, ThreadMetadata]]:
            seek, values = "", {"user_id": context.user_id, "limit": limit + 1}
            if after is not None:
                seek = f"AND activity {beyond} %(after)s"
                values["after"] = await _after_seq(
                    db, after, "SELECT activity FROM @threads WHERE id = %s AND user_id = %s", context.user_id
                )
            rows = await db.rows(
                "SELECT activity, id, created_at, title, status, allowed_image_domains, metadata FROM @threads"
                f" WHERE user_id = %(user_id)s {seek} ORDER BY activity {direction} LIMIT %(limit)s",
                values,
            )
            return [(row[0], read_thread(*row[1:])) for row in rows]

        return page(await self._read(read), limit)

    async def delete_thread(self, thread_id: str, context: RequestContext) -> None:
        async def write(db: Session) -> None:
            deleted = await db.execute(
                "DELETE FROM @threads WHERE id = %s AND user_id = %s", (thread_id, context.user_id)
            )
            if deleted == 0:  # not there, or not yours: the caller must not learn which
                raise NotFoundError(thread_id)

        await self._write(write, queue=(context.user_id, thread_id))

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

        async def read(db: Session, _: Any) -> Page[ThreadItem]:
            seek, values = "", {"thread_id": thread_id, "user_id": context.user_id, "limit": limit + 1}
            if after is not None:
                seek = f"AND seq {beyond} %(after)s"
                values["after"] = await _after_seq(
                    db,
                    after,
                    "SELECT seq FROM @items WHERE id = %s AND thread_id = %s AND user_id = %s",
                    thread_id,
                    context.user_id,
                )
            rows = await db.rows(  # what is beyond a page would be in memory before anybody could stop
                "SELECT seq, body FROM (SELECT seq, body, sum(octet_length(body)) OVER newest AS size,"
                " row_number() OVER newest AS place FROM"
                " (SELECT seq, body FROM @items WHERE thread_id = %(thread_id)s AND user_id = %(user_id)s"
                f" {seek} {visible} ORDER BY seq {direction} LIMIT %(limit)s) AS found"
                f" WINDOW newest AS (ORDER BY seq {direction})) AS sized"
                f" WHERE place <= 2 OR size - octet_length(body) <= {4 * MAX_PAGE_CHARACTERS} ORDER BY place",
                values,
            )
            return item_page(rows, limit)

        return await self._read_thread(thread_id, context, read)

    async def load_item(self, thread_id: str, item_id: str, context: RequestContext) -> ThreadItem:
        row = await self._read(
            lambda db: db.row(
                "SELECT body FROM @items WHERE thread_id = %s AND id = %s AND user_id = %s",
                (thread_id, item_id, context.user_id),
            )
        )
        if row is None:
            raise NotFoundError(item_id)
        return read_item(row.body)

    async def add_thread_item(self, thread_id: str, item: ThreadItem, context: RequestContext) -> None:
        async def write(db: Session) -> None:
            await require_lease(db, thread_id, context)
            await add_item(db, thread_id, item, context)

        await self._write(write, queue=(context.user_id, thread_id))

    async def save_item(self, thread_id: str, item: ThreadItem, context: RequestContext) -> None:
        await self.add_thread_item(thread_id, item, context)

    async def delete_thread_item(self, thread_id: str, item_id: str, context: RequestContext) -> None:
        async def write(db: Session) -> None:
            await require_lease(db, thread_id, context)
            this, values = "thread_id = %s AND id = %s AND user_id = %s", (thread_id, item_id, context.user_id)
            await _delete_attachments_of(db, "id = %s", (item_id,), thread_id, context)
            deleted = await db.execute(f"DELETE FROM @items WHERE {this}", values)
            deleted += await db.execute(f"DELETE FROM @checkpoints WHERE {this}", values)
            if deleted == 0:
                raise NotFoundError(item_id)

        await self._write(write, queue=(context.user_id, thread_id))

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
        async def write(db: Session) -> bool:
            await require_lease(db, thread_id, context)
            this = "SELECT seq FROM @items WHERE id = %s AND thread_id = %s AND user_id = %s"
            seq, last = [await _after_seq(db, each, this, thread_id, context.user_id) for each in (item_id, until)]
            if once is not None and not await _stand_after(db, seq, once, thread_id, context):
                return False
            these, which = "(seq > %s AND seq <= %s AND id <> ALL (%s::text[]))", (seq, last, [*keeping])
            await _delete_attachments_of(db, these, which, thread_id, context)
            await db.execute(
                f"DELETE FROM @items WHERE thread_id = %s AND user_id = %s AND {these}",
                (thread_id, context.user_id, *which),
            )
            return True

        return await self._write(write, queue=(context.user_id, thread_id))

    # --- feedback ---------------------------------------------------------------------------------------------------

    async def save_feedback(
        self, thread_id: str, item_ids: Sequence[str], kind: FeedbackKind, context: RequestContext
    ) -> None:
        async def write(db: Session) -> None:
            await lock_thread(db, thread_id, context)
            await db.execute(
                f"UPDATE @threads SET active_at = {NOW} WHERE id = %s AND user_id = %s", (thread_id, context.user_id)
            )
            for item_id in item_ids:
                given = await db.execute(
                    f"INSERT INTO @feedback SELECT thread_id, id, user_id, %s, {NOW} FROM @items"
                    " WHERE thread_id = %s AND id = %s AND user_id = %s ON CONFLICT (thread_id, item_id, user_id)"
                    " DO UPDATE SET kind = excluded.kind, updated_at = excluded.updated_at",
                    (kind, thread_id, item_id, context.user_id),
                )
                if given == 0:
                    raise NotFoundError(item_id)

        await self._write(write, queue=(context.user_id, thread_id))

    # --- attachments ----------------------------------------------------------------------------------------------

    async def save_attachment(self, attachment: Attachment, context: RequestContext) -> None:
        async def write(db: Session) -> None:
            if attachment.thread_id is not None:
                await require_lease(db, attachment.thread_id, context)
            saved = await db.execute(
                "INSERT INTO @attachments AS old (id, user_id, thread_id, body, size, is_complete, created_at)"
                f" VALUES (%s, %s, %s, %s, 0, FALSE, {NOW})"
                " ON CONFLICT (id) DO UPDATE SET thread_id = excluded.thread_id, body = excluded.body"
                " WHERE old.user_id = excluded.user_id"
                " AND (old.thread_id IS NULL OR old.thread_id = excluded.thread_id)",
                (attachment.id, context.user_id, attachment.thread_id, attachment_body(attachment)),
            )
            if saved == 0:
                await require_attachment(db, attachment.id, context)
                raise AlreadySent(attachment.id)

        await self._write(write)

    async def load_attachment(self, attachment_id: str, context: RequestContext) -> Attachment:
        row = await self._read(lambda db: require_attachment(db, attachment_id, context))
        return read_attachment(row.body)

    async def delete_attachment(self, attachment_id: str, context: RequestContext) -> None:
        async def write(db: Session) -> None:
            deleted = await db.execute(
                "DELETE FROM @attachments WHERE id = %s AND user_id = %s", (attachment_id, context.user_id)
            )
            if deleted == 0:
                raise NotFoundError(attachment_id)

        await self._write(write)


# --- statements that several methods share ------------------------------------------------------------------------


async def _delete_attachments_of(
    db: Session, condition: str, which: Sequence[Any], thread_id: str, context: RequestContext
) -> None:
    """Delete the thread's files of the items that are about to be deleted, unless an item that stays has them too."""
    columns = "thread_id, user_id, seq, id, type, body"
    here = (
        f"SELECT body FROM (SELECT {columns} FROM @items UNION ALL SELECT {columns} FROM @checkpoints) AS held"
        " WHERE type IN ('user_message', 'generated_image') AND thread_id = %s AND user_id = %s AND"
    )
    values = thread_id, context.user_id, *which
    if ids := attachment_ids(row.body for row in await db.rows(f"{here} {condition}", values)):
        ids -= attachment_ids(row.body for row in await db.rows(f"{here} NOT {condition}", values))
        await db.execute(
            "DELETE FROM @attachments WHERE id = ANY (%s::text[]) AND user_id = %s"
            " AND (thread_id IS NULL OR thread_id = %s)",
            ([*ids], context.user_id, thread_id),
        )


async def _stand_after(db: Session, seq: int, ids: Collection[str], thread_id: str, context: RequestContext) -> bool:
    """Whether one of these ids is an item's, or an open one's, after this place."""
    these = "thread_id = %(thread_id)s AND user_id = %(user_id)s AND seq > %(seq)s AND id = ANY (%(ids)s::text[])"
    found = await db.row(
        f"SELECT 1 FROM @items WHERE {these} UNION ALL SELECT 1 FROM @checkpoints WHERE {these} LIMIT 1",
        {"thread_id": thread_id, "user_id": context.user_id, "seq": seq, "ids": [*ids]},
    )
    return found is not None


async def _after_seq(db: Session, after: str, lookup: str, *owner: str) -> int:
    """Return the sequence number that a cursor stands for, where `after` may be the id of a row too."""
    seq = cursor_seq(after)
    if seq is None:
        row = await db.row(lookup, (after, *owner))
        if row is None:
            raise NotFoundError(after)
        seq = int(row[0])
    return seq
