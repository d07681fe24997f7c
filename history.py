"""Thread items as what the model reads."""

import json
from collections.abc import Awaitable, Callable, Sequence
from inspect import isawaitable
from typing import Any

from agents.items import TResponseInputItem
from chatkit.agents import ThreadItemConverter
from chatkit.types import (
    AssistantMessageItem,
    Attachment,
    GeneratedImageItem,
    HiddenContextItem,
    ThreadItem,
    UserMessageItem,
    UserMessageTagContent,
)
from openai.types.responses import ResponseInputContentParam, ResponseInputTextParam

from context import RequestContext
from conversations import ConversationStore

DescribeTag = Callable[[UserMessageTagContent, RequestContext], str | Awaitable[str]]


async def load_history(
    store: ConversationStore, thread_id: str, most: int, context: RequestContext
) -> Sequence[ThreadItem]:
    """Return the newest items in order, at most `most`, beginning with a user's message where there is one."""
    page = await store.load_thread_items(thread_id, None, most, "desc", context)
    items = page.data[::-1]
    if page.has_more:
        starts = [place for place, item in enumerate(items) if isinstance(item, UserMessageItem)]
        items = items[starts[0] :] if starts else items
    return items


class HistoryConverter(ThreadItemConverter):
    """Converts items of every kind (ChatKit 1.6.5 raises for attachments, tags and hidden items that are no text)."""

    def __init__(self, context: RequestContext, describe_tag: DescribeTag | None = None):
        self._context = context
        self._describe_tag = describe_tag

    async def attachment_to_message_content(self, attachment: Attachment) -> ResponseInputContentParam:
        return _text(f"[The user attached a file that you cannot read: {attachment.name} ({attachment.mime_type})]")

    async def tag_to_message_content(self, tag: UserMessageTagContent) -> ResponseInputContentParam:
        if self._describe_tag is None:
            return _text(f"@{tag.text}: {json.dumps({'id': tag.id, **tag.data}, ensure_ascii=False)}")
        description = self._describe_tag(tag, self._context)
        return _text(f"@{tag.text}: {await description if isawaitable(description) else description}")

    async def hidden_context_to_input(
        self, item: HiddenContextItem
    ) -> TResponseInputItem | list[TResponseInputItem] | None:
        if not isinstance(item.content, str):
            item = item.model_copy(update={"content": json.dumps(item.content, ensure_ascii=False, default=str)})
        return await super().hidden_context_to_input(item)

    async def generated_image_to_input(
        self, item: GeneratedImageItem
    ) -> TResponseInputItem | list[TResponseInputItem] | None:
        return _user_message("You generated an image here, which the user sees.") if item.image else None

    async def assistant_message_to_input(
        self, item: AssistantMessageItem
    ) -> TResponseInputItem | list[TResponseInputItem] | None:
        """Chat Completions takes nothing but plain text here; the Responses API takes it as well."""
        text = "\n\n".join(part.text for part in item.content if part.text)
        return {"role": "assistant", "content": text} if text else None


def _text(text: str) -> ResponseInputTextParam:
    return {"type": "input_text", "text": text}


def _user_message(text: str) -> Any:
    return {"type": "message", "role": "user", "content": [_text(text)]}
