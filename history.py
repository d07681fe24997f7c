"""Thread items as what the model reads."""

import hashlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from inspect import isawaitable
from typing import Any, cast

from agents import StreamEvent, ToolOriginType
from agents.items import TResponseInputItem
from chatkit.agents import AgentContext, ClientToolCall, ThreadItemConverter
from chatkit.store import NotFoundError
from chatkit.types import (
    AssistantMessageItem,
    Attachment,
    ClientToolCallItem,
    CustomTask,
    GeneratedImageItem,
    HiddenContextItem,
    Page,
    StructuredInputItem,
    ThreadItem,
    ThreadItemDoneEvent,
    UserMessageItem,
    UserMessageTagContent,
    WorkflowItem,
)
from openai.types.responses import ResponseInputContentParam, ResponseInputTextParam

from attachments import Attachments, kept_id, shortened
from context import RequestContext
from conversations import ConversationStore, is_hidden
from failures import log_failure
from sdk import Afterwards, StreamedContext, mended

log = logging.getLogger("service.history")

TOOL = "tool"
"""The key of a hidden item's content that tells a tool's result from what an agent's author hides."""

MAX_FILE_BYTES = 50_000_000
"""Of all files together that a model reads in a turn, as OpenAI's API has it; each is in memory several times."""

DescribeTag = Callable[[UserMessageTagContent, RequestContext], str | Awaitable[str]]


async def load_history(
    store: ConversationStore,
    thread_id: str,
    most: int,
    context: RequestContext,
    *,
    until: UserMessageItem | None = None,
) -> Sequence[ThreadItem]:
    """Return the newest items in order, at most `most`, from the beginning of a turn on; none behind `until`.

    A turn that is longer than that, or leaves room for no more than the message after it, is cut, but never without the
    message that it answers. (A call and its output are one item, so that nothing comes between them.)
    """
    newest: list[ThreadItem] = [until] if until else []
    page = Page[ThreadItem](has_more=True, after=until.id if until else None)
    while page.has_more and len(newest) < most:  # a page may hold less than it may: long items fill it
        page = await store.load_thread_items(thread_id, page.after, most - len(newest), "desc", context)
        newest += page.data
    items = newest[::-1]
    if not page.has_more:
        return items
    for place, item in enumerate(items[:-1] or items):  # the newest alone would be a message without what it is about
        if isinstance(item, UserMessageItem):
            return items[place:]
    while page.has_more:
        page = await store.load_thread_items(thread_id, page.after, most, "desc", context)
        for item in page.data:
            if isinstance(item, UserMessageItem):
                return [item, *items]
    return items


def workflow_to_go_on(items: Sequence[ThreadItem]) -> WorkflowItem | None:
    """Return the workflow that the thread ends with, maybe before a call of the client's tool.

    (ChatKit 1.6.5 looks at the last two items, hidden ones too.)
    """
    shown = [item for item in items[-20:] if not is_hidden(item)]
    match shown[-2:]:
        case [*_, WorkflowItem() as workflow] | [WorkflowItem() as workflow, ClientToolCallItem()]:
            return workflow
    return None


class RecordingContext(StreamedContext):
    """An agent context whose runs leave in the thread what their tools return."""

    def recorded(self, run: Any) -> Any:
        return ToolResults(super().recorded(run), self)


class ToolResults:
    """A run that stores what its tools return as hidden items, for `stream_agent_response`.

    ChatKit 1.6.5 stores none of it, so that the model would not know in the next turn what it read in this one. A
    call that the client is to answer is left out: it becomes an item of its own. Calls of MCP servers' tools show as
    tasks of a workflow.
    """

    def __init__(self, run: Any, context: AgentContext[RequestContext]):
        self._run = run
        self._context = context
        self._calls: dict[str, Any] = {}
        self._unanswered: dict[str, str] = {}
        self._for_client: tuple[ClientToolCall | None, str] = (None, "")
        self._tasks: dict[str, tuple[WorkflowItem, int]] = {}

    async def stream_events(self) -> AsyncIterator[StreamEvent | Afterwards]:
        async for event in self._run.stream_events():
            if event.type == "run_item_stream_event":
                await self._note(event.item)
            yield event
        yield Afterwards(self._forget_empty_workflow)

    def _forget_empty_workflow(self) -> None:
        """(ChatKit 1.6.5 would store it, which shows nothing.)"""
        if (workflow := self._context.workflow_item) and not workflow.workflow.tasks:
            self._context.workflow_item = None

    async def _note(self, item: Any) -> None:
        raw = item.raw_item
        call_id: str = _field(raw, "call_id") or ""
        if item.type == "tool_call_item":
            self._calls[call_id] = raw
            if _field(raw, "type") == "function_call":
                self._unanswered[call_id] = _field(raw, "name")
            if item.tool_origin is not None and item.tool_origin.type == ToolOriginType.MCP:
                await self._show_task(call_id, _field(raw, "name"))
            if _field(raw, "type") == "mcp_call" and _field(raw, "output") is not None:  # the provider called it
                await self._keep(raw, _field(raw, "output"))
        if item.type == "tool_call_output_item":
            await self._complete_task(call_id)
            for_client = self._is_for_client(call_id)
            self._unanswered.pop(call_id, None)
            call = self._calls.get(call_id)
            if call is not None and _field(call, "type") == "function_call" and not for_client:
                await self._keep(call, _field(raw, "output"))

    def _is_for_client(self, call_id: str) -> bool:
        """Whether this is the call in which a tool asked the client: of several at once the one with its name.

        Where none has it, all of them count as answered by their tools: nothing that they returned is lost.
        """
        asked, chosen = self._context.client_tool_call, self._for_client[1]
        if asked is not None and asked is not self._for_client[0]:
            named = [each for each, name in self._unanswered.items() if name == asked.name]
            alone = [*self._unanswered] if len(self._unanswered) == 1 else []
            chosen = (named or alone or [""])[-1]
            self._for_client = asked, chosen
        return call_id == chosen

    async def _show_task(self, call_id: str, name: str) -> None:
        await self._context.add_workflow_task(CustomTask(title=name, status_indicator="loading"))
        if workflow := self._context.workflow_item:
            self._tasks[call_id] = workflow, len(workflow.workflow.tasks) - 1

    async def _complete_task(self, call_id: str) -> None:
        workflow, index = self._tasks.pop(call_id, (None, 0))
        if workflow is not None and workflow is self._context.workflow_item:
            task = workflow.workflow.tasks[index].model_copy(update={"status_indicator": "complete"})
            await self._context.update_workflow_task(task, index)

    async def _keep(self, call: Any, output: Any) -> None:
        content = {
            TOOL: _field(call, "name"),
            "arguments": mended(_field(call, "arguments")),
            "output": shortened(mended(_as_text(output))),
        }
        item = HiddenContextItem(
            id=self._context.generate_id("message"),
            thread_id=self._context.thread.id,
            created_at=datetime.now(UTC),
            content=content,
        )
        await self._context.stream(ThreadItemDoneEvent(item=item))


def _field(raw: Any, name: str) -> Any:
    return raw.get(name) if isinstance(raw, dict) else getattr(raw, name, None)


def _as_text(output: Any) -> str:
    if isinstance(output, str):
        return output
    if isinstance(output, list):
        return "\n".join(str(_field(part, "text") or f"[{_field(part, 'type')}]") for part in output)
    return json.dumps(output, ensure_ascii=False, default=str)


class HistoryConverter(ThreadItemConverter):
    """Converts items of every kind (ChatKit 1.6.5 raises for attachments, tags and hidden items that are no text)."""

    def __init__(
        self,
        attachments: Attachments,
        context: RequestContext,
        describe_tag: DescribeTag | None = None,
        *,
        max_file_bytes: int = MAX_FILE_BYTES,
    ):
        self._attachments = attachments
        self._context = context
        self._describe_tag = describe_tag
        self._room_bytes = max_file_bytes

    async def to_agent_input(self, thread_items: Sequence[ThreadItem] | ThreadItem) -> list[TResponseInputItem]:
        """Convert the newest first: where the files of a conversation are too large together, older ones give way."""
        items = _answered_after_asked(thread_items if isinstance(thread_items, Sequence) else [thread_items])
        newest_first = [await self._thread_item_to_input_item(item) for item in reversed(items)]
        return [each for converted in reversed(newest_first) for each in converted]

    async def attachment_to_message_content(self, attachment: Attachment) -> ResponseInputContentParam:
        if not await self._has_room(attachment.id):
            return _text(f"[The user attached {attachment.name}, which is too large to be read with what followed.]")
        return await self._attachments.to_model(attachment, self._context)

    async def _has_room(self, attachment_id: str) -> bool:
        size = await self._attachments.load_size(attachment_id, self._context)
        if size > self._room_bytes:
            return False
        self._room_bytes -= size
        return True

    async def tag_to_message_content(self, tag: UserMessageTagContent) -> ResponseInputContentParam:
        description: Any = json.dumps({"id": tag.id, **tag.data}, ensure_ascii=False)
        if self._describe_tag is not None:
            try:
                described = self._describe_tag(tag, self._context)
                described = await described if isawaitable(described) else described
                description = described if described is not None else description
            except Exception as error:  # the author's code; one tag must not end this turn and all later ones
                log_failure(log, "describe_tag failed", error)
        return _text(f"@{tag.text}: {description}")

    async def user_message_to_input(
        self, item: UserMessageItem, is_last_message: bool = True
    ) -> TResponseInputItem | list[TResponseInputItem] | None:
        """(ChatKit 1.6.5 forgets what the user quoted as soon as anything follows.)"""
        return await super().user_message_to_input(item, is_last_message=True)

    async def hidden_context_to_input(
        self, item: HiddenContextItem
    ) -> TResponseInputItem | list[TResponseInputItem] | None:
        content = item.content
        if _is_tool_result(item):
            call_id = _call_id(item)
            call: Any = {"type": "function_call", "call_id": call_id, "name": content[TOOL]}
            output: Any = {"type": "function_call_output", "call_id": call_id, "output": content["output"]}
            return [{**call, "arguments": content["arguments"]}, output]
        if not isinstance(content, str):
            item = item.model_copy(update={"content": json.dumps(content, ensure_ascii=False, default=str)})
        return await super().hidden_context_to_input(item)

    async def client_tool_call_to_input(
        self, item: ClientToolCallItem
    ) -> TResponseInputItem | list[TResponseInputItem] | None:
        return await super().client_tool_call_to_input(item.model_copy(update={"call_id": _call_id(item)}))

    async def generated_image_to_input(
        self, item: GeneratedImageItem
    ) -> TResponseInputItem | list[TResponseInputItem] | None:
        attachment_id = kept_id(item.image.url) if item.image else None
        if attachment_id is None:
            return await super().generated_image_to_input(item)
        if not await self._has_room(attachment_id):
            return None
        try:
            image = await self._attachments.image_to_model(attachment_id, self._context)
        except NotFoundError:
            return None
        words = _text("The following image was generated by the agent.")
        return cast(TResponseInputItem, {"type": "message", "role": "user", "content": [words, image]})

    async def assistant_message_to_input(
        self, item: AssistantMessageItem
    ) -> TResponseInputItem | list[TResponseInputItem] | None:
        """Chat Completions takes nothing but plain text here; the Responses API takes it as well."""
        text = "\n\n".join(part.text for part in item.content if part.text)
        return {"role": "assistant", "content": text} if text.strip() else None


def _call_id(item: ThreadItem) -> str:
    """Return what names the item's call: a model may give the same id twice in a thread.

    Mistral takes nine letters and digits, and nothing else.
    """
    return hashlib.sha256(item.id.encode(errors="surrogatepass")).hexdigest()[:9]


def _is_tool_result(item: ThreadItem) -> bool:
    """Whether it is what `ToolResults` has kept."""
    content = item.content if isinstance(item, HiddenContextItem) else None
    return isinstance(content, dict) and content.keys() == {TOOL, "arguments", "output"}


def _answered_after_asked(items: Sequence[ThreadItem]) -> list[ThreadItem]:
    """Put answered questions behind the results of the tools that asked them: those were stored a moment later."""
    ordered: list[ThreadItem] = []
    questions: list[ThreadItem] = []
    for item in items:
        if isinstance(item, StructuredInputItem):
            questions.append(item)
            continue
        if not _is_tool_result(item):
            ordered += questions
            questions = []
        ordered.append(item)
    return ordered + questions


def _text(text: str) -> ResponseInputTextParam:
    return {"type": "input_text", "text": text}
