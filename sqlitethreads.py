"""A thread's row and its items in SQLite: statements that many methods share, each on a connection's own thread."""

import sqlite3
from typing import Any

from chatkit.store import NotFoundError
from chatkit.types import ThreadItem, ThreadMetadata, UserMessageItem

from context import RequestContext
from conversations import MARKER_TYPE, AlreadySent, LeaseLost, aware
from rows import attachment_body, item_row, thread_row
from sqliteschema import NOW, RAN_OUT


def require_thread(db: sqlite3.Connection, thread_id: str, context: RequestContext) -> sqlite3.Row:
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


def require_own_thread(db: sqlite3.Connection, thread_id: str, context: RequestContext) -> sqlite3.Row:
    """Return what `require_thread` does; raise `LeaseLost` when the thread is another turn's by now."""
    row = require_thread(db, thread_id, context)
    if context.lease is not None and row["lease"] != context.lease:
        raise LeaseLost(thread_id)
    return row


def require_lease(db: sqlite3.Connection, thread_id: str, context: RequestContext) -> None:
    """As `require_own_thread`, for what writes items: a turn that was recovered must not write its end after it."""
    if require_own_thread(db, thread_id, context)["lease"] is None:
        forbid_late_end(db, thread_id)


def forbid_late_end(db: sqlite3.Connection, thread_id: str) -> None:
    """See to it that no turn which was recovered writes over what is written now."""
    db.execute("DELETE FROM checkpoints WHERE thread_id = ? AND type = ?", (thread_id, MARKER_TYPE))


USED = f"UPDATE threads SET active_at = {NOW} WHERE id = ? AND user_id = ?"
"""Without a new place in the list: it is not idle, where idle threads are deleted."""


def insert_thread(db: sqlite3.Connection, thread: ThreadMetadata, context: RequestContext) -> bool:
    row = thread_row(thread) | {
        "id": thread.id,
        "user_id": context.user_id,
        "created_at": aware(thread.created_at).isoformat(),
        "activity": next_seq(db),
    }
    inserted = db.execute(
        f"INSERT INTO threads ({', '.join(row)}, active_at) VALUES ({', '.join(f':{name}' for name in row)}, {NOW})"
        " ON CONFLICT DO NOTHING",
        row,
    )
    return inserted.rowcount == 1


def put_item(db: sqlite3.Connection, thread_id: str, item: ThreadItem, context: RequestContext) -> None:
    """Insert the item where its checkpoint is or else at the thread's end; or replace the one with its id."""
    row: dict[str, Any] = {**item_row(thread_id, item), "thread_id": thread_id, "user_id": context.user_id}
    settled = db.execute(
        "DELETE FROM checkpoints WHERE thread_id = :thread_id AND user_id = :user_id AND id = :id RETURNING seq", row
    ).fetchall()
    replaced = db.execute(
        "UPDATE items SET type = :type, body = :body WHERE thread_id = :thread_id AND user_id = :user_id AND id = :id",
        row,
    )
    if replaced.rowcount:
        db.execute(USED, (thread_id, context.user_id))
    else:
        row["seq"] = settled[0]["seq"] if settled else next_seq(db)
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


def add_item(db: sqlite3.Connection, thread_id: str, item: ThreadItem, context: RequestContext) -> None:
    """Put the item, and send its attachments."""
    put_item(db, thread_id, item, context)
    send_attachments(db, thread_id, item, context)


def send_attachments(db: sqlite3.Connection, thread_id: str, item: ThreadItem, context: RequestContext) -> None:
    """Make a message's attachments, but for those deleted meanwhile, a part of the thread.

    Raises `AlreadySent` in the end where one is a part of another.
    """
    elsewhere = []
    for attachment in item.attachments if isinstance(item, UserMessageItem) else ():
        sent = attachment.model_copy(update={"thread_id": thread_id})
        row = {"id": sent.id, "user_id": context.user_id, "thread_id": thread_id, "body": attachment_body(sent)}
        this = "id = :id AND user_id = :user_id"
        changed = db.execute(
            "UPDATE attachments SET thread_id = :thread_id, body = :body"
            f" WHERE {this} AND (thread_id IS NULL OR thread_id = :thread_id)",
            row,
        )
        if changed.rowcount == 0 and db.execute(f"SELECT 1 FROM attachments WHERE {this}", row).fetchall():
            elsewhere.append(sent.id)
    if elsewhere:
        raise AlreadySent(elsewhere[0])


def next_seq(db: sqlite3.Connection) -> int:
    [row] = db.execute("UPDATE sequence SET value = value + 1 RETURNING value").fetchall()
    return int(row[0])
