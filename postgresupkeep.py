"""What is counted and cleaned up in PostgreSQL: usage, feedback, a user's data, what nobody wants any more."""

from collections.abc import Sequence
from typing import Any

from chatkit.types import Attachment

from context import RequestContext
from conversations import DELETION_BATCH, PURGE_INTERVAL_SECONDS, UNSENT_HOURS, DeletedUser, Purged, Usage
from pool import LOCK_TIMEOUT, OnPool, Session
from postgresschema import NOW, RAN_OUT, TODAY
from rows import read_attachment

DELETION_SECONDS = 600.0
"""How long a batch may take: it may be gigabytes of files."""


class PostgresUpkeep(OnPool):
    async def add_usage(self, usage: Usage, context: RequestContext) -> None:
        await self._write(
            lambda db: db.execute(
                f"INSERT INTO @usage AS used VALUES (%s, {TODAY}, %s, %s, %s, %s)"
                " ON CONFLICT (user_id, day, model) DO UPDATE SET requests = used.requests + excluded.requests,"
                " input_tokens = used.input_tokens + excluded.input_tokens,"
                " output_tokens = used.output_tokens + excluded.output_tokens",
                (context.user_id, usage.model, usage.requests, usage.input_tokens, usage.output_tokens),
            )
        )

    async def load_usage(self, user_id: str | None = None) -> list[Usage]:
        one, values = ("", None) if user_id is None else ("WHERE user_id = %s", (user_id,))
        rows = await self._read(
            lambda db: db.rows(
                "SELECT user_id, to_char(day, 'YYYY-MM-DD') AS day, model, requests, input_tokens, output_tokens"
                f" FROM @usage {one} ORDER BY 2, user_id, model",
                values,
            )
        )
        return [Usage(**row._asdict()) for row in rows]

    async def load_feedback_counts(self) -> dict[str, tuple[int, int]]:
        rows = await self._read(
            lambda db: db.rows(
                "SELECT user_id, count(*) FILTER (WHERE kind = 'positive') AS positive,"
                " count(*) FILTER (WHERE kind = 'negative') AS negative FROM @feedback GROUP BY user_id"
            )
        )
        return {row.user_id: (row.positive, row.negative) for row in rows}

    async def purge(self, retention_days: int, *, now: bool = False) -> Purged | None:
        due = f"ran_at NOT BETWEEN {NOW} - interval '{PURGE_INTERVAL_SECONDS} seconds' AND {NOW}"
        claimed = await self._write(
            lambda db: db.execute(f"UPDATE @jobs SET ran_at = {NOW} WHERE name = 'purge' AND (%s OR {due})", (now,))
        )
        if claimed == 0:
            return None
        unsent = await self._delete_all(
            "attachments", f"thread_id IS NULL AND created_at < {NOW} - interval '{UNSENT_HOURS} hours'", ()
        )
        await self._write(
            lambda db: db.execute(f"DELETE FROM @turn_starts WHERE started_at < {NOW} - interval '1 minute'")
        )
        if retention_days <= 0:
            return Purged(threads=0, attachments=unsent)
        idle = await self._delete_all(
            "threads",
            f"(lease IS NULL OR {RAN_OUT}) AND active_at < {NOW} - %s * interval '24 hours'",
            (retention_days,),
        )
        return Purged(threads=idle, attachments=unsent)

    async def delete_user(self, user_id: str) -> DeletedUser:
        counted = await self._read(
            lambda db: db.row(
                "SELECT (SELECT count(*) FROM @threads AS thread JOIN @items ON thread_id = thread.id"
                " WHERE thread.user_id = %(user)s) AS items,"
                " (SELECT count(*) FROM @attachments WHERE user_id = %(user)s) AS attachments,"
                " (SELECT count(*) FROM @threads WHERE user_id = %(user)s AND lease IS NOT NULL) AS running_turns",
                {"user": user_id},
            )
        )
        threads = await self._delete_all("threads", "user_id = %s", (user_id,), wait=True)
        await self._delete_all("attachments", "user_id = %s", (user_id,), wait=True)  # that are in no thread

        async def rest(db: Session) -> int:
            await db.execute("DELETE FROM @turn_starts WHERE user_id = %s", (user_id,))
            return await db.execute("DELETE FROM @usage WHERE user_id = %s", (user_id,))

        usage_rows = await self._write(rest)
        return DeletedUser(threads, usage_rows=usage_rows, **counted._asdict())

    async def overwrite_deleted(self) -> None:
        """The server's autovacuum does that, in its own time."""

    async def load_attachments(self, after: str, limit: int, context: RequestContext) -> list[Attachment]:
        rows = await self._read(
            lambda db: db.rows(
                "SELECT body FROM @attachments WHERE user_id = %s AND id > %s ORDER BY id LIMIT %s",
                (context.user_id, after, limit),
            )
        )
        return [read_attachment(row.body) for row in rows]

    async def load_feedback(self, thread_id: str, context: RequestContext) -> dict[str, str]:
        rows = await self._read(
            lambda db: db.rows(
                "SELECT item_id, kind FROM @feedback WHERE thread_id = %s AND user_id = %s",
                (thread_id, context.user_id),
            )
        )
        return {row.item_id: row.kind for row in rows}

    async def _delete_all(self, table: str, condition: str, values: Sequence[Any], *, wait: bool = False) -> int:
        """Delete such rows, a batch in a transaction, and return how many they were.

        Those that somebody is changing just now are left alone, or waited for.
        """
        removed, batch, others = 0, DELETION_BATCH, "" if wait else "SKIP LOCKED"

        async def delete(db: Session) -> int:
            await db.execute(LOCK_TIMEOUT)
            return await db.execute(
                f"DELETE FROM @{table} WHERE id IN"
                f" (SELECT id FROM @{table} WHERE {condition} LIMIT {DELETION_BATCH} FOR UPDATE {others})",
                values,
            )

        while batch == DELETION_BATCH:
            batch = await self._pool.write_patiently(delete, DELETION_SECONDS)
            removed += batch
        return removed
