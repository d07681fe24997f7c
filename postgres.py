"""The store in PostgreSQL, for replicas on several machines: threads, their items, and the turns that run on them.

SQLite has one writer; here whoever changes a thread locks its row first, and whoever counts what a user has used locks
the user. Locks are taken in this order: user, thread, attachment. All times are the database's.
"""

import json
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, Self, TypeVar

from chatkit.store import NotFoundError
from chatkit.types import Attachment, FeedbackKind, Page, ThreadItem, ThreadMetadata

from context import RequestContext
from conversations import (
    HIDDEN_TYPES,
    LEASE_SECONDS,
    NO_QUOTA,
    AlreadySent,
    IncompatibleDatabase,
    LeaseLost,
    Quota,
    QuotaExceeded,
    ThreadBusy,
    aware,
    new_id,
    stopped_marker,
)
from pool import WORK_SECONDS, Pool, Session
from postgresschema import MIGRATIONS, NOW, RAN_OUT, TODAY
from postgresupkeep import PostgresUpkeep
from postgresuploads import PostgresUploads, require_attachment
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

log = logging.getLogger("service.store")

T = TypeVar("T")


POOL_SIZE = 10
"""Connections of one process: each piece of work holds one for a few milliseconds."""
MIGRATION_SECONDS = 600.0


async def migrate(db: Session, migrations: Sequence[str]) -> None:
    """Bring the tables to the schema of these migrations; raise `IncompatibleDatabase` where they are beyond it."""
    await db.lock("migrations")  # replicas that start together take turns
    [encoding, table] = await db.row("SELECT current_setting('server_encoding'), to_regclass('@schema_version')")
    if encoding != "UTF8":
        raise IncompatibleDatabase(f"The database's encoding is {encoding}. Create one with ENCODING 'UTF8'.")
    if table is None:
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


class PostgresStore(PostgresUploads, PostgresUpkeep):
    """A database that any number of processes on any number of machines may share; an async context manager.

    Entering it makes or migrates the tables. Raises `IncompatibleDatabase`, or `StoreUnavailable` when the server does
    not answer.
    """

    def __init__(
        self,
        connection_string: str,
        table_prefix: str = "chatkit_",
        *,
        pool_size: int = POOL_SIZE,
        work_seconds: float = WORK_SECONDS,
    ):
        self._pool = Pool(connection_string, table_prefix, pool_size, work_seconds)
        super().__init__(self._pool)

    async def __aenter__(self) -> Self:
        try:
            await self._pool.write_patiently(lambda db: migrate(db, MIGRATIONS), MIGRATION_SECONDS)
        except BaseException:
            await self._pool.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pool.close()

    async def ping(self) -> None:
        await self._read(lambda db: db.row("SELECT version FROM @schema_version"))

    async def _read_thread(
        self, thread_id: str, context: RequestContext, read: Callable[[Session, Any], Awaitable[T]]
    ) -> T:
        """Run `read` with the thread's row, after what a dead turn left on the thread has become items."""

        async def attempt(db: Session) -> tuple[T] | None:
            thread = await _require_thread(db, thread_id, context)
            return None if thread.died else (await read(db, thread),)

        async def recover(db: Session) -> None:
            if (await _lock_thread(db, thread_id, context)).died:
                await _recover(db, thread_id, context)

        while (found := await self._read(attempt)) is None:
            await self._write(recover)
        return found[0]

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
            if made_here and await _insert_thread(db, thread, context):
                return
            await _require_lease(db, thread.id, context)
            if columns:
                await db.execute(
                    f"UPDATE @threads SET {', '.join(f'{name} = %({name})s' for name in columns)}"
                    " WHERE id = %(id)s AND user_id = %(user_id)s",
                    {**columns, "id": thread.id, "user_id": context.user_id},
                )

        await self._write(write, queue=thread.id)
        remember(thread, context)

    async def name_thread(self, thread_id: str, title: str, context: RequestContext) -> bool:
        async def write(db: Session) -> bool:
            named = await db.execute(
                "UPDATE @threads SET title = %s WHERE id = %s AND user_id = %s AND title IS NULL",
                (title, thread_id, context.user_id),
            )
            return named == 1 or (await _require_thread(db, thread_id, context)).title == title

        return await self._write(write, queue=thread_id)

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

        await self._write(write, queue=thread_id)

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

        async def read(db: Session, _: Any) -> list[tuple[int, ThreadItem]]:
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
            rows = await db.rows(
                "SELECT seq, body FROM @items WHERE thread_id = %(thread_id)s AND user_id = %(user_id)s"
                f" {seek} {visible} ORDER BY seq {direction} LIMIT %(limit)s",
                values,
            )
            return [(seq, read_item(body)) for seq, body in rows]

        return page(await self._read_thread(thread_id, context, read), limit)

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
            await _require_lease(db, thread_id, context)
            await _put_item(db, thread_id, item, context)

        await self._write(write, queue=thread_id)

    async def save_item(self, thread_id: str, item: ThreadItem, context: RequestContext) -> None:
        await self.add_thread_item(thread_id, item, context)

    async def delete_thread_item(self, thread_id: str, item_id: str, context: RequestContext) -> None:
        async def write(db: Session) -> None:
            await _require_lease(db, thread_id, context)
            this, values = "thread_id = %s AND id = %s AND user_id = %s", (thread_id, item_id, context.user_id)
            await _delete_attachments_of(db, this, values, context)
            deleted = await db.execute(f"DELETE FROM @items WHERE {this}", values)
            deleted += await db.execute(f"DELETE FROM @checkpoints WHERE {this}", values)
            if deleted == 0:
                raise NotFoundError(item_id)

        await self._write(write, queue=thread_id)

    async def delete_items_after(self, thread_id: str, item_id: str, context: RequestContext) -> None:
        async def write(db: Session) -> None:
            await _require_lease(db, thread_id, context)
            seq = await _after_seq(
                db,
                item_id,
                "SELECT seq FROM @items WHERE id = %s AND thread_id = %s AND user_id = %s",
                thread_id,
                context.user_id,
            )
            later, values = "thread_id = %s AND user_id = %s AND seq > %s", (thread_id, context.user_id, seq)
            await _delete_attachments_of(db, later, values, context)
            await db.execute(f"DELETE FROM @items WHERE {later}", values)

        await self._write(write, queue=thread_id)

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

        async def write(db: Session) -> None:
            if quota != NO_QUOTA:
                await db.lock(f"turns of {context.user_id}")
            if new_thread is not None:
                await _insert_thread(db, new_thread, context)
            thread = await _lock_thread(db, thread_id, context)
            if thread.died:
                await _recover(db, thread_id, context)
            await _require_quota(db, quota, thread_id, context)
            if thread.lease is not None and not thread.died:
                raise ThreadBusy(thread_id)
            await db.execute(
                "UPDATE @threads SET lease = %s,"
                f" lease_expires_at = {NOW} + interval '{LEASE_SECONDS} seconds' WHERE id = %s AND user_id = %s",
                (lease, thread_id, context.user_id),
            )

        await self._write(write, queue=thread_id)
        if new_thread is not None:
            remember(new_thread, context)
        return lease

    async def renew_leases(self, leases: Collection[str]) -> set[str]:
        renewed = await self._write(
            lambda db: db.rows(
                f"UPDATE @threads SET lease_expires_at = {NOW} + interval '{LEASE_SECONDS} seconds'"
                " WHERE lease = ANY (%s::text[]) RETURNING lease",
                (list(leases),),
            )
        )
        return {lease for (lease,) in renewed}

    async def save_checkpoints(self, thread_id: str, items: Sequence[ThreadItem], context: RequestContext) -> None:
        async def write(db: Session) -> None:
            await _require_lease(db, thread_id, context)
            for item in items:
                await db.execute(
                    "INSERT INTO @checkpoints (seq, thread_id, user_id, id, type, body)"
                    " VALUES (nextval('@seq'), %(thread_id)s, %(user_id)s, %(id)s, %(type)s, %(body)s)"
                    " ON CONFLICT (thread_id, id) DO UPDATE SET type = excluded.type, body = excluded.body",
                    {**item_row(thread_id, item), "thread_id": thread_id, "user_id": context.user_id},
                )

        await self._write(write, queue=thread_id)

    async def end_turn(
        self, thread_id: str, items: Sequence[ThreadItem], context: RequestContext, *, began: bool = True
    ) -> None:
        async def write(db: Session) -> None:
            if not began:
                await db.lock(f"turns of {context.user_id}")
            await _require_lease(db, thread_id, context)
            for item in items:
                await _put_item(db, thread_id, item, context)
            await _forget_turn(db, thread_id, context)
            if not began:  # whichever of the user's newest: they count alike
                await db.execute(
                    "DELETE FROM @turn_starts WHERE ctid ="
                    " (SELECT ctid FROM @turn_starts WHERE user_id = %s ORDER BY started_at DESC LIMIT 1)",
                    (context.user_id,),
                )

        await self._write(write, queue=thread_id)

    # --- feedback ---------------------------------------------------------------------------------------------------

    async def save_feedback(
        self, thread_id: str, item_ids: Sequence[str], kind: FeedbackKind, context: RequestContext
    ) -> None:
        async def write(db: Session) -> None:
            await _lock_thread(db, thread_id, context)
            for item_id in item_ids:
                given = await db.execute(
                    f"INSERT INTO @feedback SELECT thread_id, id, user_id, %s, {NOW} FROM @items"
                    " WHERE thread_id = %s AND id = %s AND user_id = %s ON CONFLICT (thread_id, item_id, user_id)"
                    " DO UPDATE SET kind = excluded.kind, updated_at = excluded.updated_at",
                    (kind, thread_id, item_id, context.user_id),
                )
                if given == 0:
                    raise NotFoundError(item_id)

        await self._write(write, queue=thread_id)

    # --- attachments ----------------------------------------------------------------------------------------------

    async def save_attachment(self, attachment: Attachment, context: RequestContext) -> None:
        async def write(db: Session) -> None:
            if attachment.thread_id is not None:
                await _require_lease(db, attachment.thread_id, context)
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


async def _require_thread(db: Session, thread_id: str, context: RequestContext, *, lock: bool = False) -> Any:
    """Return the thread's columns, `lease`, and whether its turn `died`; raise `NotFoundError`."""
    row = await db.row(
        "SELECT id, created_at, title, status, allowed_image_domains, metadata,"
        f" lease, coalesce({RAN_OUT}, FALSE) AS died FROM @threads WHERE id = %s AND user_id = %s"
        f"{' FOR UPDATE' if lock else ''}",
        (thread_id, context.user_id),
    )
    if row is None:
        raise NotFoundError(thread_id)
    return row


async def _lock_thread(db: Session, thread_id: str, context: RequestContext) -> Any:
    """Return what `_require_thread` does, which nobody else can change until this transaction ends."""
    return await _require_thread(db, thread_id, context, lock=True)


async def _require_lease(db: Session, thread_id: str, context: RequestContext) -> None:
    """Lock the thread; raise `NotFoundError` when it is not the user's, `LeaseLost` when it is another turn's."""
    row = await _lock_thread(db, thread_id, context)
    if context.lease is not None and row.lease != context.lease:
        raise LeaseLost(thread_id)


async def _require_quota(db: Session, quota: Quota, thread_id: str, context: RequestContext) -> None:
    """Raise `QuotaExceeded`, or count one more turn of the user, who is locked."""
    user = context.user_id
    if quota.tokens_per_day:
        [used, seconds] = await db.row(
            "SELECT coalesce(sum(input_tokens + output_tokens), 0)::bigint AS used,"
            f" 86400 - floor(extract(epoch FROM {NOW}))::bigint %% 86400 AS seconds"
            f" FROM @usage WHERE user_id = %s AND day = {TODAY}",
            (user,),
        )
        if used >= quota.tokens_per_day:
            raise QuotaExceeded("tokens_per_day", seconds)
    if quota.concurrent_turns:
        [running] = await db.row(
            f"SELECT count(*) FROM @threads WHERE user_id = %s AND id <> %s AND lease IS NOT NULL AND NOT ({RAN_OUT})",
            (user, thread_id),
        )
        if running >= quota.concurrent_turns:
            raise QuotaExceeded("concurrent_turns", 5)
    if quota.turns_per_minute:
        await db.execute(
            "DELETE FROM @turn_starts WHERE user_id = %s"
            f" AND started_at NOT BETWEEN {NOW} - interval '1 minute' AND {NOW}",
            (user,),
        )
        [started, oldest_age] = await db.row(
            f"SELECT count(*) AS started, extract(epoch FROM {NOW} - min(started_at))::float8 AS oldest_age"
            " FROM @turn_starts WHERE user_id = %s",
            (user,),
        )
        if started >= quota.turns_per_minute:
            raise QuotaExceeded("turns_per_minute", max(1, round(60 - oldest_age)))
        await db.execute(f"INSERT INTO @turn_starts VALUES (%s, {NOW})", (user,))


async def _insert_thread(db: Session, thread: ThreadMetadata, context: RequestContext) -> bool:
    row = thread_row(thread) | {
        "id": thread.id,
        "user_id": context.user_id,
        "created_at": aware(thread.created_at).isoformat(),
    }
    inserted = await db.execute(
        f"INSERT INTO @threads ({', '.join(row)}, activity, active_at)"
        f" VALUES ({', '.join(f'%({name})s' for name in row)}, nextval('@seq'), {NOW}) ON CONFLICT DO NOTHING",
        row,
    )
    return inserted == 1


async def _put_item(db: Session, thread_id: str, item: ThreadItem, context: RequestContext) -> None:
    """Insert the item where its checkpoint is or else at the thread's end; or replace the one with its id.

    The thread is locked, so that nobody else adds this item meanwhile.
    """
    row = {**item_row(thread_id, item), "thread_id": thread_id, "user_id": context.user_id}
    this = "thread_id = %(thread_id)s AND user_id = %(user_id)s AND id = %(id)s"
    await db.execute(
        "WITH"
        f" replaced AS (UPDATE @items SET type = %(type)s, body = %(body)s WHERE {this} RETURNING seq),"
        f" settled AS (DELETE FROM @checkpoints WHERE {this} RETURNING seq),"
        " added AS (INSERT INTO @items (seq, thread_id, user_id, id, type, body)"
        " SELECT coalesce((SELECT seq FROM settled), nextval('@seq')),"
        " %(thread_id)s, %(user_id)s, %(id)s, %(type)s, %(body)s"
        " WHERE NOT EXISTS (SELECT FROM replaced) RETURNING seq)"
        f" UPDATE @threads AS thread SET activity = greatest(activity, added.seq), active_at = {NOW} FROM added"
        " WHERE thread.id = %(thread_id)s AND thread.user_id = %(user_id)s",
        row,
    )


async def _recover(db: Session, thread_id: str, context: RequestContext) -> None:
    """Turn what a dead turn left behind into items; the thread is locked."""
    await db.execute(
        "INSERT INTO @items (seq, thread_id, user_id, id, type, body) SELECT seq, thread_id, user_id, id, type, body"
        " FROM @checkpoints WHERE thread_id = %s AND user_id = %s"
        " ON CONFLICT (thread_id, id) DO UPDATE SET type = excluded.type, body = excluded.body",
        (thread_id, context.user_id),
    )
    await _put_item(db, thread_id, stopped_marker(thread_id), context)
    await _forget_turn(db, thread_id, context)
    log.warning("a turn on thread %s died; what it had shown is stored", thread_id)


async def _forget_turn(db: Session, thread_id: str, context: RequestContext) -> None:
    await db.execute("DELETE FROM @checkpoints WHERE thread_id = %s AND user_id = %s", (thread_id, context.user_id))
    await db.execute(
        "UPDATE @threads SET lease = NULL, lease_expires_at = NULL WHERE id = %s AND user_id = %s",
        (thread_id, context.user_id),
    )


async def _delete_attachments_of(
    db: Session, condition: str, values: Sequence[str | int], context: RequestContext
) -> None:
    """Delete the attachments of the messages that are about to be deleted.

    Their ids are read here: PostgreSQL cannot look into JSON that holds U+0000 anywhere.
    """
    rows = await db.rows(f"SELECT body FROM @items WHERE type = 'user_message' AND {condition}", values)
    ids = [attachment["id"] for row in rows for attachment in json.loads(row.body).get("attachments", [])]
    if ids:
        await db.execute(
            "DELETE FROM @attachments WHERE id = ANY (%s::text[]) AND user_id = %s", (ids, context.user_id)
        )


async def _after_seq(db: Session, after: str, lookup: str, *owner: str) -> int:
    """Return the sequence number that a cursor stands for, where `after` may be the id of a row too."""
    seq = cursor_seq(after)
    if seq is None:
        row = await db.row(lookup, (after, *owner))
        if row is None:
            raise NotFoundError(after)
        seq = int(row[0])
    return seq
