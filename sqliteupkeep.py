"""What is counted and cleaned up in SQLite: usage, feedback, a user's data, what nobody wants any more."""

import sqlite3
from collections.abc import Sequence

from chatkit.types import Attachment

from context import RequestContext
from conversations import DELETION_BATCH, PURGE_INTERVAL_SECONDS, UNSENT_HOURS, DeletedUser, Purged, Usage
from rows import read_attachment
from sqlite import OnSQLite
from sqliteschema import NOW, RAN_OUT

SIZE_OF = {
    "attachments": "size",
    "threads": "(SELECT coalesce(sum(size), 0) FROM attachments WHERE thread_id = threads.id)",
}
DELETION_BYTES = 64 * 1024 * 1024
"""In a transaction, but for the last thread or file in it: SQLite may write over every byte that it frees."""


class SQLiteUpkeep(OnSQLite):
    async def add_usage(self, usage: Usage, context: RequestContext) -> None:
        await self._write(
            lambda db: db.execute(
                "INSERT INTO usage VALUES (?, date('now'), ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
                " requests = requests + excluded.requests, input_tokens = input_tokens + excluded.input_tokens,"
                " output_tokens = output_tokens + excluded.output_tokens",
                (context.user_id, usage.model, usage.requests, usage.input_tokens, usage.output_tokens),
            )
        )

    async def load_usage(self, user_id: str | None = None) -> list[Usage]:
        one = "" if user_id is None else "WHERE user_id = :user_id"
        rows = await self._read(
            lambda db: db.execute(
                f"SELECT * FROM usage {one} ORDER BY day, user_id, model", {"user_id": user_id}
            ).fetchall()
        )
        return [Usage(**dict(row)) for row in rows]

    async def load_feedback_counts(self) -> dict[str, tuple[int, int]]:
        rows = await self._read(
            lambda db: db.execute(
                "SELECT user_id, sum(kind = 'positive'), sum(kind = 'negative') FROM feedback GROUP BY user_id"
            ).fetchall()
        )
        return {user_id: (positive, negative) for user_id, positive, negative in rows}

    async def purge(self, retention_days: int, *, now: bool = False) -> Purged | None:
        def claim(db: sqlite3.Connection) -> bool:
            due = f"ran_at NOT BETWEEN {NOW} - {PURGE_INTERVAL_SECONDS} AND {NOW}"
            claimed = db.execute(f"UPDATE jobs SET ran_at = {NOW} WHERE name = 'purge' AND (? OR {due})", (now,))
            if claimed.rowcount:
                db.execute(f"DELETE FROM turn_starts WHERE started_at < {NOW} - 60")
            return claimed.rowcount == 1

        if not await self._write(claim):
            return None
        unsent = await self._delete_all(
            "attachments", f"thread_id IS NULL AND created_at < {NOW} - {UNSENT_HOURS * 3600}", ()
        )
        if retention_days <= 0:
            return Purged(threads=0, attachments=unsent)
        idle = await self._delete_all(
            "threads",
            f"active_at < {NOW} - ? * 86400.0 AND id NOT IN (SELECT thread_id FROM leases WHERE NOT ({RAN_OUT}))",
            (retention_days,),
        )
        return Purged(threads=idle, attachments=unsent)

    async def delete_user(self, user_id: str) -> DeletedUser:
        counted = await self._read(
            lambda db: db.execute(
                "SELECT (SELECT count(*) FROM threads JOIN items ON thread_id = threads.id"
                " WHERE threads.user_id = :user) AS items,"
                " (SELECT count(*) FROM attachments WHERE user_id = :user) AS attachments,"
                " (SELECT count(*) FROM leases WHERE user_id = :user) AS running_turns",
                {"user": user_id},
            ).fetchone()
        )
        threads = await self._delete_all("threads", "user_id = ?", (user_id,))
        await self._delete_all("attachments", "user_id = ?", (user_id,))  # that are in no thread

        def rest(db: sqlite3.Connection) -> int:
            db.execute("DELETE FROM turn_starts WHERE user_id = ?", (user_id,))
            return db.execute("DELETE FROM usage WHERE user_id = ?", (user_id,)).rowcount

        usage_rows = await self._write(rest)
        return DeletedUser(threads, usage_rows=usage_rows, **dict(counted))

    async def load_attachments(self, after: str, limit: int, context: RequestContext) -> list[Attachment]:
        rows = await self._read(
            lambda db: db.execute(
                "SELECT body FROM attachments WHERE user_id = ? AND id > ? ORDER BY id LIMIT ?",
                (context.user_id, after, limit),
            ).fetchall()
        )
        return [read_attachment(row["body"]) for row in rows]

    async def load_feedback(self, thread_id: str, context: RequestContext) -> dict[str, str]:
        rows = await self._read(
            lambda db: db.execute(
                "SELECT item_id, kind FROM feedback WHERE thread_id = ? AND user_id = ?", (thread_id, context.user_id)
            ).fetchall()
        )
        return {row["item_id"]: row["kind"] for row in rows}

    async def _delete_all(self, table: str, condition: str, values: Sequence[str | int]) -> int:
        """Delete such rows, a batch in a transaction, and return how many they were."""
        sized = f"SELECT id, {SIZE_OF[table]} AS size FROM {table} WHERE {condition} LIMIT {DELETION_BATCH}"
        some = (
            f"SELECT id FROM (SELECT id, sum(size) OVER (ORDER BY id) - size AS before FROM ({sized}))"
            f" WHERE before < {DELETION_BYTES}"
        )
        removed = 0
        while batch := (
            await self._write(lambda db: db.execute(f"DELETE FROM {table} WHERE id IN ({some})", values))
        ).rowcount:
            removed += batch
        return removed
