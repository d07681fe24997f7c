"""Threads and items as rows, and cursors between them, the same for every database."""

import json
import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar

from chatkit.store import NotFoundError
from chatkit.types import (
    ActiveStatus,
    Attachment,
    ClosedStatus,
    HiddenContextItem,
    LockedStatus,
    Page,
    ThreadItem,
    ThreadMetadata,
    WidgetItem,
)
from chatkit.widgets import DynamicWidgetComponent, DynamicWidgetRoot
from pydantic import TypeAdapter, ValidationError

from context import RequestContext
from conversations import KEPT, aware

log = logging.getLogger("service.store")

T = TypeVar("T")

_item = TypeAdapter[ThreadItem](ThreadItem)
_attachment = TypeAdapter[Attachment](Attachment)
_status = TypeAdapter[ActiveStatus | LockedStatus | ClosedStatus](ActiveStatus | LockedStatus | ClosedStatus)
_json = TypeAdapter[Any](Any)

SURE_LEVELS = 100
"""Arrays and objects in one another. From 201 on pydantic (2.14) writes, up to 255, what it does not read again."""


def item_row(thread_id: str, item: ThreadItem) -> dict[str, str]:
    """Return the columns `id`, `type` and `body` of an item of this thread; raise `ValueError` if it has no JSON."""
    if item.thread_id != thread_id or item.created_at.utcoffset() != timedelta(0):
        item = item.model_copy(update={"thread_id": thread_id, "created_at": aware(item.created_at)})
    body = item.model_dump_json(by_alias=True, warnings=False)  # pydantic's warnings quote the value
    return {"id": item.id, "type": item.type, "body": _readable(body)}


def _readable(body: str) -> str:
    """Return the JSON, or raise `ValueError`: a row that nobody can read would make all beside it unreadable."""
    if body.count("{") + body.count("[") > SURE_LEVELS:
        try:
            _json.validate_json(body)
        except ValidationError:
            raise ValueError("it is nested too deep to be read again") from None
    return body


def as_stored(item: ThreadItem) -> ThreadItem:
    """Return the item as it will be read, but for a template's widget, of which ChatKit's classes know a part.

    Raises `ValueError` where it could not be written, or would not be read again as one of its kind.
    """
    return _item.validate_json(item_row(item.thread_id, item)["body"])


def read_item(body: str) -> ThreadItem:
    """Return the item of a row's `body`.

    One that this release cannot read, written by a newer one say, comes back as a hidden item in its place: it must
    not make its thread unreadable. The row stays as it is. A body that is no item at all raises `ValueError`.
    """
    try:
        item = _item.validate_json(body)
        return _with_all_of_its_widget(item, body) if isinstance(item, WidgetItem) else item
    except ValidationError:
        unread = _Unread.validate_python(json.loads(body))  # which reads what is nested too deep for pydantic
        log.warning("item %s is of a kind that this release cannot read: %.40s", unread.id, unread.type)
        return HiddenContextItem(
            id=unread.id,
            thread_id=unread.thread_id,
            created_at=unread.created_at,
            content="Something was shown here that cannot be read any more.",
        )


def _with_all_of_its_widget(item: WidgetItem, body: str) -> WidgetItem:
    """Return the item with all that was written of its widget.

    ChatKit 1.6.5 takes a template's widget for one of its own classes, which drop what they do not know.
    """
    if isinstance(item.widget, DynamicWidgetComponent):  # which keep all
        return item
    with suppress(ValueError, RecursionError):  # for what only those classes know
        written = DynamicWidgetRoot.model_validate(json.loads(body)["widget"])
        read, whole = (widget.model_dump(mode="json", exclude_none=True) for widget in (item.widget, written))
        if read != whole:
            return item.model_copy(update={"widget": written})
    return item


@dataclass
class _UnreadItem:
    id: str
    thread_id: str
    created_at: datetime
    type: str


_Unread = TypeAdapter(_UnreadItem)


def thread_row(thread: ThreadMetadata) -> dict[str, str | None]:
    """Return the columns of a thread that `save_thread` may change; raise `ValueError` if its metadata has no JSON."""
    domains = thread.allowed_image_domains
    return {
        "title": thread.title,
        "status": _status.dump_json(thread.status, warnings=False).decode(),
        "allowed_image_domains": None if domains is None else _json.dump_json(domains).decode(),
        "metadata": _readable(_json.dump_json(thread.metadata).decode()),
    }


def changed_columns(thread: ThreadMetadata, context: RequestContext) -> dict[str, str | None]:
    """Return the columns in which the thread differs from what this request loaded; all, when it loaded none.

    Written alone, they leave what another request has changed meanwhile (ChatKit 1.6.5 saves the whole thread at the
    end of a stream, and so undoes a rename).
    """
    row = thread_row(thread)
    before = context.loaded_threads.get(thread.id)
    return row if before is None else {name: value for name, value in row.items() if value != before[name]}


def read_thread(
    id: str, created_at: str, title: str | None, status: str, allowed_image_domains: str | None, metadata: str
) -> ThreadMetadata:
    """Return the thread of a row."""
    return ThreadMetadata(
        id=id,
        created_at=datetime.fromisoformat(created_at),
        title=title,
        status=_status.validate_json(status),
        allowed_image_domains=None if allowed_image_domains is None else _json.validate_json(allowed_image_domains),
        metadata=_json.validate_json(metadata),
    )


def remember(thread: ThreadMetadata, context: RequestContext) -> None:
    """Note the thread as this request now knows it, for `changed_columns`."""
    context.loaded_threads[thread.id] = thread_row(thread)


def attachment_body(attachment: Attachment) -> str:
    """Return the column `body` of an attachment."""
    return _readable(_attachment.dump_json(attachment, warnings=False).decode())


def attachment_ids(bodies: Iterable[str]) -> set[str]:
    """Return the attachments that these items hold. (PostgreSQL cannot look into JSON that has U+0000 anywhere.)"""
    items = [json.loads(body) for body in bodies]
    sent = {attachment["id"] for item in items for attachment in item.get("attachments", [])}
    return sent | {item["image"]["url"].removeprefix(KEPT) for item in items if item.get("image")}


def read_attachment(body: str) -> Attachment:
    """Return the attachment of a row's `body`."""
    return _attachment.validate_json(body)


# --- cursors ------------------------------------------------------------------------------------------------------

_CURSOR = "after:"


def cursor(seq: int) -> str:
    """Return the cursor behind the row with this sequence number; it outlives the row."""
    return f"{_CURSOR}{seq}"


def cursor_seq(after: str) -> int | None:
    """Return the sequence number in a cursor of ours; None when it must be an item's or a thread's id."""
    digits = after.removeprefix(_CURSOR)
    if digits == after:
        return None
    if not (digits.isascii() and digits.isdigit() and len(digits) < 19):
        raise NotFoundError(after)
    return int(digits)


MAX_PAGE_CHARACTERS = 1024 * 1024
"""Of all items in a page together, unless the first is longer: a page is in memory several times."""


def item_page(rows: Iterable[tuple[int, str]], limit: int) -> Page[ThreadItem]:
    """Return the page of the first of these (sequence number, `body`): `limit` at most, and as many as fit into one.

    At least one row more than that says that there is more; none beyond it is asked for.
    """
    items: list[ThreadItem] = []
    size, last = 0, 0
    for seq, body in rows:
        size += len(body)
        if items and (len(items) == limit or size > MAX_PAGE_CHARACTERS):
            return Page(data=items, has_more=True, after=cursor(last))
        items.append(read_item(body))
        last = seq
    return Page(data=items)


def page(found: list[tuple[int, T]], limit: int) -> Page[T]:
    """Return the page of the first `limit` of (sequence number, row), where one row more says that there is more."""
    return Page(
        data=[row for _, row in found[:limit]],
        has_more=len(found) > limit,
        after=cursor(found[limit - 1][0]) if len(found) > limit else None,
    )
