"""A thread's row and its items in PostgreSQL: statements that many methods share."""

from typing import Any

from chatkit.store import NotFoundError
from chatkit.types import ThreadItem, ThreadMetadata, UserMessageItem

from context import RequestContext
from conversations import MARKER_TYPE, AlreadySent, LeaseLost, aware
from pool import Session
from postgresschema import NOW, RAN_OUT
from rows import attachment_body, item_row, thread_row

FORBID_LATE_END = (
    f"DELETE FROM @checkpoints WHERE thread_id = %(thread_id)s AND user_id = %(user_id)s AND type = '{MARKER_TYPE}'"
)
"""Sees to it that no turn which was recovered writes over what is written now."""


async def require_thread(db: Session, thread_id: str, context: RequestContext, *, lock: bool = False) -> Any:
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


async def lock_thread(db: Session, thread_id: str, context: RequestContext) -> Any:
    """Return what `require_thread` does, which nobody else can change until this transaction ends."""
    return await require_thread(db, thread_id, context, lock=True)


async def lock_own_thread(db: Session, thread_id: str, context: RequestContext) -> Any:
    """Return what `lock_thread` does; raise `LeaseLost` when the thread is another turn's by now."""
    row = await lock_thread(db, thread_id, context)
    if context.lease is not None and row.lease != context.lease:
        raise LeaseLost(thread_id)
    return row


async def require_lease(db: Session, thread_id: str, context: RequestContext) -> None:
    """As `lock_own_thread`, for what writes items: a turn that was recovered must not write its end after it."""
    if (await lock_own_thread(db, thread_id, context)).lease is None:
        await db.execute(FORBID_LATE_END, {"thread_id": thread_id, "user_id": context.user_id})


async def insert_thread(db: Session, thread: ThreadMetadata, context: RequestContext) -> bool:
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


async def put_item(db: Session, thread_id: str, item: ThreadItem, context: RequestContext) -> None:
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
        f" UPDATE @threads AS thread SET activity = greatest(activity, (SELECT seq FROM added)), active_at = {NOW}"
        " WHERE thread.id = %(thread_id)s AND thread.user_id = %(user_id)s",
        row,
    )


async def add_item(db: Session, thread_id: str, item: ThreadItem, context: RequestContext) -> None:
    """Put the item, and send its attachments."""
    await put_item(db, thread_id, item, context)
    await send_attachments(db, thread_id, item, context)


async def send_attachments(db: Session, thread_id: str, item: ThreadItem, context: RequestContext) -> None:
    """Make a message's attachments, but for those deleted meanwhile, a part of the thread.

    Raises `AlreadySent` in the end where one is a part of another.
    """
    elsewhere = []
    attachments = item.attachments if isinstance(item, UserMessageItem) else []
    for attachment in sorted(attachments, key=lambda each: each.id):  # in one order, or two turns block each other
        sent = attachment.model_copy(update={"thread_id": thread_id})
        row = {"id": sent.id, "user_id": context.user_id, "thread_id": thread_id, "body": attachment_body(sent)}
        this = "id = %(id)s AND user_id = %(user_id)s"
        changed = await db.execute(
            "UPDATE @attachments SET thread_id = %(thread_id)s, body = %(body)s"
            f" WHERE {this} AND (thread_id IS NULL OR thread_id = %(thread_id)s)",
            row,
        )
        if changed == 0 and await db.row(f"SELECT 1 FROM @attachments WHERE {this}", row):
            elsewhere.append(sent.id)
    if elsewhere:
        raise AlreadySent(elsewhere[0])
