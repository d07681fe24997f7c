"""The turns that run on threads in PostgreSQL: leases, checkpoints, quotas, and what a dead turn left."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

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
from pool import OnPool, Session
from postgresschema import NOW, RAN_OUT, TODAY
from postgresthreads import (
    FORBID_LATE_END,
    add_item,
    insert_thread,
    lock_thread,
    put_item,
    require_lease,
    require_thread,
    send_attachments,
)
from rows import item_row, remember

log = logging.getLogger("service.store")

T = TypeVar("T")

RENEWAL_PAUSES = (0, 0.05, 0.2, 0.5)
"""Seconds before each attempt at what is locked: by the turn's own write, which is over in a moment, or for long."""


class PostgresTurns(OnPool):
    async def _read_thread(
        self, thread_id: str, context: RequestContext, read: Callable[[Session, Any], Awaitable[T]]
    ) -> T:
        """Run `read` with the thread's row, after what a dead turn left on the thread has become items.

        While the database takes no writes, what is stored is read all the same.
        """

        async def attempt(db: Session, *, anyway: bool = False) -> tuple[T] | None:
            thread = await require_thread(db, thread_id, context)
            return None if thread.died and not anyway else (await read(db, thread),)

        async def recover(db: Session) -> None:
            thread = await lock_thread(db, thread_id, context)
            if thread.died:
                await _recover(db, thread, context)

        if (found := await self._read(attempt)) is None:
            with suppress(StoreUnavailable, TimeoutError):
                async with asyncio.timeout(RECOVERY_SECONDS):
                    await self._write(recover)
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

        async def write(db: Session) -> None:
            if quota != NO_QUOTA:
                await db.lock(_turns_of(context))
            if new_thread is not None:
                await insert_thread(db, new_thread, context)
            thread = await lock_thread(db, thread_id, context)
            if thread.died:
                await _recover(db, thread, context)
            await _require_quota(db, quota, thread_id, context)
            if thread.lease is not None and not thread.died:
                raise ThreadBusy(thread_id)
            await db.execute(
                f"WITH late_end AS ({FORBID_LATE_END}) UPDATE @threads SET lease = %(lease)s,"
                f" lease_expires_at = {NOW} + interval '{LEASE_SECONDS} seconds'"
                " WHERE id = %(thread_id)s AND user_id = %(user_id)s",
                {"lease": lease, "thread_id": thread_id, "user_id": context.user_id},
            )

        await self._write(write, queue=(context.user_id, thread_id if quota == NO_QUOTA else _turns_of(context)))
        if new_thread is not None:
            remember(new_thread, context)
        return lease

    async def is_leased(self, thread_id: str, context: RequestContext) -> bool:
        async def read(db: Session, thread: Any) -> bool:
            return thread.lease is not None

        return await self._read_thread(thread_id, context, read)

    async def renew_leases(self, leases: Collection[str]) -> set[str]:
        held: set[str] = set()
        left = list(leases)
        for pause_seconds in RENEWAL_PAUSES:
            await asyncio.sleep(pause_seconds)
            rows = await self._write(partial(_renew, leases=left))
            held |= {row.lease for row in rows}
            left = [row.lease for row in rows if not row.renewed]
            if not left:
                break
        return held

    async def save_checkpoints(self, thread_id: str, items: Sequence[ThreadItem], context: RequestContext) -> None:
        async def write(db: Session) -> None:
            await require_lease(db, thread_id, context)
            for item in items:
                with suppress(AlreadySent):
                    await send_attachments(db, thread_id, item, context)
                await db.execute(
                    "INSERT INTO @checkpoints (seq, thread_id, user_id, id, type, body)"
                    " VALUES (nextval('@seq'), %(thread_id)s, %(user_id)s, %(id)s, %(type)s, %(body)s)"
                    " ON CONFLICT (thread_id, id) DO UPDATE SET type = excluded.type, body = excluded.body",
                    {**item_row(thread_id, item), "thread_id": thread_id, "user_id": context.user_id},
                )

        await self._write(write, queue=(context.user_id, thread_id))

    async def end_turn(
        self, thread_id: str, items: Sequence[ThreadItem], context: RequestContext, *, began: bool = True
    ) -> None:
        async def write(db: Session) -> None:
            if not began:
                await db.lock(_turns_of(context))
            await _require_end(db, thread_id, context)
            for item in items:
                with suppress(AlreadySent):  # meanwhile, with another message: this one is kept without its file
                    await add_item(db, thread_id, item, context)
            await _forget_turn(db, thread_id, context)
            if not began:  # whichever of the user's newest: they count alike
                await db.execute(
                    "DELETE FROM @turn_starts WHERE ctid ="
                    " (SELECT ctid FROM @turn_starts WHERE user_id = %s ORDER BY started_at DESC LIMIT 1)",
                    (context.user_id,),
                )

        await self._write(write, queue=(context.user_id, thread_id if began else _turns_of(context)))


def _turns_of(context: RequestContext) -> str:
    """Return what is locked while the user's turns are counted: who waits for it here waits without a connection."""
    return f"turns of {context.user_id}"


async def _renew(db: Session, leases: Sequence[str]) -> list[Any]:
    """Return those of the leases that are held, each with whether it was `renewed`: its row may be locked."""
    return await db.rows(
        "WITH free AS (SELECT id FROM @threads WHERE lease = ANY (%(leases)s::text[]) FOR UPDATE SKIP LOCKED),"
        f" renewed AS (UPDATE @threads AS thread SET lease_expires_at = {NOW} + interval '{LEASE_SECONDS} seconds'"
        " FROM free WHERE thread.id = free.id RETURNING thread.id)"
        " SELECT lease, id IN (SELECT id FROM renewed) AS renewed FROM @threads"
        " WHERE lease = ANY (%(leases)s::text[])",
        {"leases": leases},
    )


async def _require_end(db: Session, thread_id: str, context: RequestContext) -> None:
    """As `require_lease`; but a turn that was recovered may still end, and then the recovery's marker is taken out."""
    try:
        await require_lease(db, thread_id, context)
    except LeaseLost:
        this = (thread_id, context.user_id, recovery_id(context.lease or ""))
        for table in ("checkpoints", "items"):
            if not await db.execute(f"DELETE FROM @{table} WHERE thread_id = %s AND user_id = %s AND id = %s", this):
                raise


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


async def _recover(db: Session, thread: Any, context: RequestContext) -> None:
    """Turn what a dead turn left behind into items; the thread is locked."""
    thread_id = thread.id
    await db.execute(
        "INSERT INTO @items (seq, thread_id, user_id, id, type, body) SELECT seq, thread_id, user_id, id, type, body"
        " FROM @checkpoints WHERE thread_id = %s AND user_id = %s"
        " ON CONFLICT (thread_id, id) DO UPDATE SET type = excluded.type, body = excluded.body",
        (thread_id, context.user_id),
    )
    marker = stopped_marker(thread_id, thread.lease)
    await put_item(db, thread_id, marker, context)
    await _forget_turn(db, thread_id, context)
    await db.execute(
        "INSERT INTO @checkpoints (seq, thread_id, user_id, id, type, body)"
        " VALUES (nextval('@seq'), %(thread_id)s, %(user_id)s, %(id)s, %(type)s, %(body)s)",
        {**item_row(thread_id, marker), "thread_id": thread_id, "user_id": context.user_id},
    )
    log.warning("a turn on thread %s died; what it had shown is stored", thread_id)


async def _forget_turn(db: Session, thread_id: str, context: RequestContext) -> None:
    await db.execute("DELETE FROM @checkpoints WHERE thread_id = %s AND user_id = %s", (thread_id, context.user_id))
    await db.execute(
        "UPDATE @threads SET lease = NULL, lease_expires_at = NULL WHERE id = %s AND user_id = %s",
        (thread_id, context.user_id),
    )
