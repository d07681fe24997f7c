"""The turns that run on threads in SQLite: leases, checkpoints, quotas, and what a dead turn left."""

import asyncio
import json
import logging
import sqlite3
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

from chatkit.types import ThreadItem, ThreadMetadata

from context import RequestContext
from conversations import (
    LEASE_SECONDS,
    NO_QUOTA,
    RECOVERY_SECONDS,
    AlreadySent,
    LeaseLost,
    Quota,
    QuotaExceeded,
    StoreUnavailable,
    ThreadBusy,
    new_id,
    recovery_id,
    stopped_marker,
)
from rows import item_row, remember
from sqlite import OnSQLite
from sqliteschema import NOW, RAN_OUT
from sqlitethreads import (
    add_item,
    forbid_late_end,
    insert_thread,
    next_seq,
    put_item,
    require_lease,
    require_thread,
    send_attachments,
)

log = logging.getLogger("service.store")

T = TypeVar("T")


class SQLiteTurns(OnSQLite):
    async def _read_thread(
        self, thread_id: str, context: RequestContext, read: Callable[[sqlite3.Connection, sqlite3.Row], T]
    ) -> T:
        """Run `read` with the thread's row, after what a dead turn left on the thread has become items.

        While the database takes no writes, what is stored is read all the same.
        """

        def attempt(db: sqlite3.Connection, *, anyway: bool = False) -> tuple[T] | None:
            thread = require_thread(db, thread_id, context)
            return None if thread["died"] and not anyway else (read(db, thread),)

        if (found := await self._read(attempt)) is None:
            with suppress(StoreUnavailable, TimeoutError):
                async with asyncio.timeout(RECOVERY_SECONDS):
                    await self._write(lambda db: _recover(db, thread_id))
            found = await self._read(partial(attempt, anyway=True))
            assert found is not None
        return found[0]

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
                insert_thread(db, new_thread, context)
            if require_thread(db, thread_id, context)["died"]:
                _recover(db, thread_id)
            _require_quota(db, quota, thread_id, context)
            taken = db.execute(
                f"INSERT INTO leases VALUES (?, ?, ?, {NOW} + {LEASE_SECONDS}) ON CONFLICT DO NOTHING",
                (thread_id, context.user_id, lease),
            )
            if taken.rowcount == 0:
                raise ThreadBusy(thread_id)
            forbid_late_end(db, thread_id)

        await self._write(write)
        if new_thread is not None:
            remember(new_thread, context)
        return lease

    async def is_leased(self, thread_id: str, context: RequestContext) -> bool:
        return await self._read_thread(thread_id, context, lambda db, thread: thread["lease"] is not None)

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
            require_lease(db, thread_id, context)
            for item in items:
                with suppress(AlreadySent):
                    send_attachments(db, thread_id, item, context)
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
                        {**row, "seq": next_seq(db)},
                    )

        await self._write(write)

    async def end_turn(
        self, thread_id: str, items: Sequence[ThreadItem], context: RequestContext, *, began: bool = True
    ) -> None:
        def write(db: sqlite3.Connection) -> None:
            _require_end(db, thread_id, context)
            for item in items:
                with suppress(AlreadySent):  # meanwhile, with another message: this one is kept without its file
                    add_item(db, thread_id, item, context)
            _forget_turn(db, thread_id)
            if not began:  # whichever of the user's newest: they count alike
                db.execute(
                    "DELETE FROM turn_starts WHERE rowid ="
                    " (SELECT rowid FROM turn_starts WHERE user_id = ? ORDER BY started_at DESC LIMIT 1)",
                    (context.user_id,),
                )

        await self._write(write)


def _require_end(db: sqlite3.Connection, thread_id: str, context: RequestContext) -> None:
    """As `require_lease`; but a turn that was recovered may still end, and then the recovery's marker is taken out."""
    try:
        require_lease(db, thread_id, context)
    except LeaseLost:
        this = (thread_id, context.user_id, recovery_id(context.lease or ""))
        for table in ("checkpoints", "items"):
            if db.execute(f"DELETE FROM {table} WHERE thread_id = ? AND user_id = ? AND id = ?", this).rowcount == 0:
                raise


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


def _recover(db: sqlite3.Connection, thread_id: str) -> None:
    """Turn what a dead turn left behind into items, unless another process was faster."""
    died = db.execute(f"SELECT user_id, lease FROM leases WHERE thread_id = ? AND {RAN_OUT}", (thread_id,)).fetchone()
    if died is None:
        return
    db.execute(
        "INSERT INTO items (seq, thread_id, user_id, id, type, body)"
        " SELECT seq, thread_id, user_id, id, type, body FROM checkpoints WHERE thread_id = ?"
        " ON CONFLICT (thread_id, id) DO UPDATE SET type = excluded.type, body = excluded.body",
        (thread_id,),
    )
    marker = stopped_marker(thread_id, died["lease"])
    put_item(db, thread_id, marker, RequestContext(died["user_id"]))
    _forget_turn(db, thread_id)
    db.execute(
        "INSERT INTO checkpoints (seq, thread_id, user_id, id, type, body) VALUES (?, ?, ?, ?, ?, ?)",
        (next_seq(db), thread_id, died["user_id"], *item_row(thread_id, marker).values()),
    )
    log.warning("a turn on thread %s died; what it had shown is stored", thread_id)


def _forget_turn(db: sqlite3.Connection, thread_id: str) -> None:
    db.execute("DELETE FROM checkpoints WHERE thread_id = ?", (thread_id,))
    db.execute("DELETE FROM leases WHERE thread_id = ?", (thread_id,))
