"""Gaps of the SDKs that can only be closed inside them. Each names the version that has it, so that it can go."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime, tzinfo
from typing import Any, cast

import chatkit.agents
import chatkit.server
from agents import RawResponsesStreamEvent, StreamEvent
from chatkit.agents import AgentContext, ResponseStreamConverter
from chatkit.types import ChatKitReq, Page, ThreadItem, ThreadItemAddedEvent, ThreadStreamEvent, WorkflowItem
from openai.types.responses import ResponseReasoningSummaryTextDeltaEvent
from pydantic import BaseModel, PrivateAttr, TypeAdapter, ValidationError

from context import RequestContext
from conversations import new_id
from failures import Refused

_request = TypeAdapter[ChatKitReq](ChatKitReq)  # ChatKit 1.6.5 makes one for every request: 2.4 to 4 ms each

MAX_TITLE_CHARACTERS = 1000
"""Of a thread: a list of threads has no other bound."""


def parse_request(body: bytes) -> ChatKitReq:
    """Return the request; raise `Refused` naming what is wrong with it."""
    try:
        request = _request.validate_json(body)
    except ValidationError as error:
        raise _bad_request(error) from None
    limit = getattr(request.params, "limit", None)
    if limit is not None and not 1 <= limit <= 100:
        raise Refused("bad_params", "params.limit must be a whole number from 1 to 100.")
    title = getattr(request.params, "title", None)
    if title is not None and len(title) > MAX_TITLE_CHARACTERS:
        raise Refused("bad_params", f"params.title must be {MAX_TITLE_CHARACTERS} characters at most.")
    action = getattr(request.params, "action", None)
    if action is not None and not isinstance(action.type, str):  # ChatKit 1.6.5 puts a type variable for a missing one
        raise Refused("bad_params", "params.action.type must be there.")
    return request


def _bad_request(error: ValidationError) -> Refused:
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    match problem["type"]:
        case "json_invalid":
            return Refused("bad_json", "The body is not JSON.")
        case "union_tag_invalid" | "union_tag_not_found" | "dict_type" if not problem["loc"]:
            return Refused("unknown_operation", "The body needs a `type` that names a ChatKit operation.")
    where = ".".join(str(step) for step in problem["loc"][1:])
    return Refused("bad_params", f"{where}: {problem['msg']}."[:300])


def encode(model: BaseModel) -> bytes:
    """Return what goes out: as ChatKit 1.6.5's `_serialize`."""
    return model.model_dump_json(
        by_alias=True,
        exclude_none=True,
        context={"exclude_metadata": True},
        warnings=False,  # pydantic's quote the value
    ).encode()


class _AwareDatetime(datetime):
    """ChatKit 1.6.5 stamps items with naive local times, which a browser elsewhere reads as its own."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]  # none of this class
        return datetime.now(tz or UTC)


class _Waiting:
    """As much of an unbounded `asyncio.Queue` as is used here, by one reader.

    That has four deques, and ChatKit 1.6.5 copies one for each turn, which keeps them to its end: 3 KB.
    """

    __slots__ = ("_items", "_news", "around", "is_over")

    def __init__(self, around: Any = None) -> None:
        self._items = deque[Any]()
        self._news: asyncio.Future[None] | None = None
        self.around = around
        """The queue that was there when this one's run began inside another run, or inside an action's handler."""
        self.is_over = False

    async def put(self, item: Any) -> None:
        self.put_nowait(item)

    def put_nowait(self, item: Any) -> None:
        self._items.append(item)
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def get(self) -> Any:
        while not self._items:
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        return self._items.popleft()

    def get_nowait(self) -> Any:
        if not self._items:
            raise asyncio.QueueEmpty
        return self._items.popleft()


async def _merge(events: AsyncIterator[Any], queue: Any) -> AsyncIterator[Any]:
    """Yield the run's events and what its tools stream, in the order in which they came.

    ChatKit 1.6.5 makes two tasks for every event, and leaves the last ones behind when it is cancelled. Here one task
    puts the run's events into the tools' queue.
    """
    waiting: _Waiting = queue.queue
    pump = asyncio.create_task(_pump(events, waiting), name="run events")
    try:
        while not isinstance(item := await waiting.get(), _RunEnded):
            if isinstance(item, _FromRun):
                if isinstance(item.event, Afterwards):
                    item.event.do()
                else:
                    yield item.event
            elif not isinstance(item, chatkit.agents._QueueCompleteSentinel):  # ChatKit may mean another run's queue
                yield chatkit.agents._EventWrapper(item)
        await pump
        waiting.put_nowait(chatkit.agents._QueueCompleteSentinel())
    finally:
        pump.cancel()
        await asyncio.wait({pump})
        _ = pump.cancelled() or pump.exception()  # asked for, or asyncio would log it with users' words


class Afterwards:
    """What a recorded run yields for something to be done when all before it has been read: it runs ahead of that."""

    def __init__(self, do: Callable[[], None]):
        self.do = do


class _FromRun:
    __slots__ = ("event",)

    def __init__(self, event: Any):
        self.event = event


class _RunEnded: ...


async def _pump(events: AsyncIterator[Any], waiting: _Waiting) -> None:
    try:
        async for event in events:
            waiting.put_nowait(_FromRun(event))
    finally:
        waiting.put_nowait(_RunEnded())


_stream_agent_response: Any = chatkit.agents.stream_agent_response


async def stream_agent_response(
    context: AgentContext[Any], result: Any, *, converter: ResponseStreamConverter | None = None
) -> AsyncGenerator[ThreadStreamEvent, None]:
    """Do as ChatKit's function of this name, for a run inside an action's handler too.

    ChatKit 1.6.5 has the handler's events and the run's read from one queue, each taking what is the other's. Several
    runs may go on at once inside another, and end in any order: what is streamed goes to the last that still runs.
    """
    store = context.store
    if isinstance(context, StreamedContext) and context.begins():
        context.store = cast(Any, _NothingBefore(context))
    else:
        context._events = cast(Any, _Waiting(context._events))
    own: Any = context._events
    options = {} if converter is None else {"converter": converter}
    recorded = context.recorded(result) if isinstance(context, StreamedContext) else OwnIds(result)
    try:
        async with aclosing(_stream_agent_response(context, recorded, **options)) as events:
            async for event in events:
                yield context.as_streamed(event) if isinstance(context, StreamedContext) else event
    finally:
        context.store = store
        if own.around is not None:
            own.is_over = True
        while getattr(context._events, "is_over", False):
            context._events = cast(Any, context._events).around


class _NothingBefore:
    """What ChatKit 1.6.5 asks for the two newest items first of all, and keeps them as long as the run lasts.

    From then on the context has its own store again.
    """

    def __init__(self, context: AgentContext[Any]):
        self._context = context
        self._store = context.store

    async def load_thread_items(self, *arguments: object) -> Page[ThreadItem]:
        self._context.store = self._store
        return Page()


def patch() -> None:
    """Put the replacements into the SDK's modules; again does no harm."""
    vars(chatkit.server).update(datetime=_AwareDatetime)
    vars(chatkit.agents).update(
        datetime=_AwareDatetime, _merge_generators=_merge, stream_agent_response=stream_agent_response
    )


patch()


async def with_streamed(
    context: "StreamedContext", events: AsyncIterator[Any]
) -> AsyncGenerator[ThreadStreamEvent, None]:
    """Yield a handler's events, and between them what it streams through the agent context."""
    queue = chatkit.agents._AsyncQueueIterator(context._events)
    async for event in _merge(events, queue):
        yield context.as_streamed(event.event) if isinstance(event, chatkit.agents._EventWrapper) else event


class StreamedContext(AgentContext[RequestContext]):
    """An agent context whose events say what they said when they were streamed.

    ChatKit 1.6.5 queues them by reference: a workflow that is announced holds by then the tasks that are told next,
    and its client would see them twice.
    """

    _events: Any = PrivateAttr(default_factory=_Waiting)
    _announced: dict[int, ThreadItem] = PrivateAttr(default_factory=dict)
    _is_prepared: bool = PrivateAttr(default=False)

    def go_on_with(self, workflow: WorkflowItem | None) -> None:
        """Have the next run add to this workflow, or to none; what the thread ends with is not looked at then."""
        self.workflow_item = workflow
        self._is_prepared = True

    def begins(self) -> bool:
        """Whether the run that asks was prepared so; others that one of its tools starts meanwhile were not."""
        was_prepared, self._is_prepared = self._is_prepared, False
        return was_prepared

    def recorded(self, run: Any) -> Any:
        """Return the run as it is to be read, with all that is to be noted on the way."""
        return OwnIds(run)

    async def stream(self, event: ThreadStreamEvent) -> None:
        if isinstance(event, ThreadItemAddedEvent):
            self._announced[id(event)] = event.item.model_copy(deep=True)
        await super().stream(event)

    def as_streamed(self, event: ThreadStreamEvent) -> ThreadStreamEvent:
        """Return the event with its item as it was then; to be asked once for each."""
        if not isinstance(event, ThreadItemAddedEvent):
            return event
        item = self._announced.pop(id(event), None)
        return event if item is None else event.model_copy(update={"item": item})


SHOWN_BY_ID = ("message", "image_generation_call")
"""What ChatKit 1.6.5 names items after. Others may have the index of an open message: the Agents SDK (0.24) gives a
thought of Chat Completions the first one, whatever came before it."""


class OwnIds:
    """A run whose items have ids of ours, for `stream_agent_response`.

    ChatKit 1.6.5 keeps the model's: Chat Completions names every item `__fake_id__`, so that each answer would
    overwrite the last, and a server may repeat an id at any time. Only the raw events are seen here, so that what an
    agent's tools stream keeps its ids.
    """

    def __init__(self, run: Any):
        self._run = run
        self._open: dict[int, str] = {}

    async def stream_events(self) -> AsyncIterator[StreamEvent]:
        async for event in self._run.stream_events():
            if event.type == "raw_response_event":
                yield self._renamed(event)
            elif event.type == "run_item_stream_event" and event.item.type == "tool_call_item":
                item: Any = _ToolCall(event.item)
                yield replace(event, item=item)
            else:
                yield event

    def _renamed(self, event: RawResponsesStreamEvent) -> RawResponsesStreamEvent:
        data: Any = event.data
        _mend(data, "delta", "text")
        if data.type == "response.reasoning_text.delta":
            return replace(event, data=_as_summary(data))
        match data.type:
            case "response.output_item.added" | "response.output_item.done" if data.item.type in SHOWN_BY_ID:
                item = data.item.model_copy(update={"id": self._id(data)}, deep=True)
                for part in getattr(item, "content", None) or []:
                    _mend(part, "text")
                return replace(event, data=data.model_copy(update={"item": item}))
            case (
                "response.content_part.added"
                | "response.output_text.delta"
                | "response.output_text.done"
                | "response.output_text.annotation.added"
                | "response.image_generation_call.partial_image"
            ):
                data.item_id = self._id(data)
                if isinstance(annotation := _field_or_none(data, "annotation"), BaseModel):
                    # openai 3.54 has classes of its own for this event, which ChatKit 1.6.5 refuses to read
                    data.annotation = annotation.model_dump()
        return event

    def _id(self, data: Any) -> str:
        """Return our id for the output item that the event is about; its index tells items of a response apart."""
        index: int = data.output_index
        if data.type == "response.output_item.added" or index not in self._open:
            self._open[index] = new_id("message")
        return self._open.pop(index) if data.type == "response.output_item.done" else self._open[index]


def _as_summary(thought: Any) -> ResponseReasoningSummaryTextDeltaEvent:
    """Return a piece of thinking as what is shown of it: Ollama, vLLM and OpenRouter do not sum up."""
    return ResponseReasoningSummaryTextDeltaEvent(
        type="response.reasoning_summary_text.delta",
        delta=thought.delta,
        item_id=thought.item_id,
        output_index=thought.output_index,
        summary_index=thought.content_index,
        sequence_number=thought.sequence_number,
    )


def _field_or_none(model: Any, name: str) -> Any:
    """Return the field if the model has it, without the 2 µs that pydantic takes to say that it has not."""
    return getattr(model, "__dict__", {}).get(name)


def _mend(part: Any, *names: str) -> None:
    for name in names:
        text = _field_or_none(part, name)
        if isinstance(text, str) and not text.isascii():
            setattr(part, name, mended(text))


def mended(text: str) -> str:
    """Join or replace the halves of surrogate pairs in a text, as a server that cuts between them sends them.

    (JSON carries them, UTF-8 does not: such a text can be neither sent nor stored.)
    """
    if text.isascii():  # a file, say, which encoding would copy
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class _ToolCall:
    """What is read of a tool call, with an id of ours."""

    type = "tool_call_item"

    def __init__(self, item: Any):
        self.raw_item = item.raw_item
        self.tool_origin = item.tool_origin
        if isinstance(self.raw_item, BaseModel) and hasattr(self.raw_item, "call_id"):
            self.raw_item = self.raw_item.model_copy(update={"id": new_id("tool_call")})
