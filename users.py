"""All that is stored of one user: exported as JSON, or deleted."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from chatkit.store import NotFoundError
from chatkit.types import Attachment, ThreadMetadata

from context import RequestContext
from conversations import LEASE_SECONDS, ConversationStore, DeletedUser

PAGE_SIZE = 20
"""Threads, items or attachments in memory at once: an item may have a megabyte."""

Say = Callable[[str], None]


async def exported(store: ConversationStore, user_id: str, say: Say) -> AsyncIterator[str]:
    """Yield the parts of a JSON object: the user's threads with all items, hidden ones too, attachments, usage.

    Of a conversation that goes on meanwhile it has what was stored when it was reached.
    """
    context = RequestContext(user_id)
    yield f'{{"user_id": {json.dumps(user_id)}, "exported_at": "{datetime.now(UTC).isoformat()}",\n"threads": ['
    number = 0
    async for thread in _threads(store, context):
        yield (",\n" if number else "\n") + _opened(thread.model_dump(mode="json"), "items")
        async for part in _items(store, thread.id, context):
            yield part
        yield f'],\n"feedback": {json.dumps(await store.load_feedback(thread.id, context))}}}'
        number += 1
        say(f"{number} threads")
    yield '],\n"attachments": ['
    number = 0
    async for attachment in _attachments(store, context):
        yield ",\n" if number else "\n"
        async for part in _with_bytes(store, attachment, context):
            yield part
        number += 1
        say(f"{number} attachments")
    usage = [asdict(each) for each in await store.load_usage(user_id)]
    yield f'],\n"usage": {json.dumps(usage)}}}\n'


def _opened(fields: dict[str, Any], name: str) -> str:
    """Return the JSON of an object whose last field, a list, is still to be written."""
    return f'{json.dumps(fields)[:-1]}, "{name}": ['


async def _threads(store: ConversationStore, context: RequestContext) -> AsyncIterator[ThreadMetadata]:
    """Yield each thread once, oldest activity first: one that becomes active meanwhile moves to where it is found."""
    seen, after, more = set(), None, True
    while more:
        page = await store.load_threads(PAGE_SIZE, after, "asc", context)
        for thread in page.data:
            if thread.id not in seen:
                seen.add(thread.id)
                yield thread
        after, more = page.after, page.has_more


async def _items(store: ConversationStore, thread_id: str, context: RequestContext) -> AsyncIterator[str]:
    after, more, separator = None, True, "\n"
    while more:
        try:
            page = await store.load_thread_items(thread_id, after, PAGE_SIZE, "asc", context)
        except NotFoundError:  # deleted meanwhile
            return
        for item in page.data:
            yield separator + json.dumps(item.model_dump(mode="json", by_alias=True))
            separator = ",\n"
        after, more = page.after, page.has_more


async def _attachments(store: ConversationStore, context: RequestContext) -> AsyncIterator[Attachment]:
    after = ""
    while attachments := await store.load_attachments(after, PAGE_SIZE, context):
        for attachment in attachments:
            yield attachment
        after = attachments[-1].id


async def _with_bytes(store: ConversationStore, attachment: Attachment, context: RequestContext) -> AsyncIterator[str]:
    """Yield the attachment's JSON with its bytes as `data`, in base64; null where they never came."""
    yield json.dumps(attachment.model_dump(mode="json"))[:-1]
    try:
        await store.load_attachment_size(attachment.id, context)
    except NotFoundError:
        yield ', "data": null}'
        return
    yield ', "data": "'
    number, rest = 0, b""
    with suppress(NotFoundError):  # deleted meanwhile
        while chunk := await store.read_chunk(attachment.id, number, context):
            rest += chunk
            whole = len(rest) - len(rest) % 3  # base64 of three bytes at a time can be put together
            yield base64.b64encode(rest[:whole]).decode()
            number, rest = number + 1, rest[whole:]
    yield f'{base64.b64encode(rest).decode()}"}}'


async def delete_user(store: ConversationStore, user_id: str, say: Say) -> DeletedUser:
    """Delete all that is stored of the user, and leave no trace of it in the file.

    A turn that runs meanwhile ends when it notices, and then counts what it used: that is waited for.
    """
    deleted = await store.delete_user(user_id)
    if deleted.running_turns:
        say("waiting for answers that are being written")
        await asyncio.sleep(LEASE_SECONDS)
        late = await store.delete_user(user_id)
        deleted = DeletedUser(
            deleted.threads + late.threads,
            deleted.items + late.items,
            deleted.attachments + late.attachments,
            deleted.usage_rows + late.usage_rows,
            deleted.running_turns,
        )
    say("rewriting the database's file")
    await store.overwrite_deleted()
    return deleted
