"""`ChatServer`: what a request may do, and the turn that answers it."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from datetime import UTC, datetime
from inspect import isawaitable
from typing import Any

from agents import Agent, ModelSettings, RunConfig, RunContextWrapper, Runner
from agents.exceptions import ModelRefusalError
from chatkit.actions import Action
from chatkit.agents import AgentContext, stream_agent_response
from chatkit.errors import CustomStreamError
from chatkit.server import ChatKitServer, NonStreamingResult, StreamingResult
from chatkit.store import NotFoundError
from chatkit.types import (
    AssistantMessageContent,
    AssistantMessageItem,
    AttachmentsCreateReq,
    AttachmentsDeleteReq,
    ClientToolCallItem,
    FeedbackKind,
    InputTranscribeReq,
    ItemsListReq,
    NonStreamingReq,
    StreamingReq,
    StreamOptions,
    StreamOptionsEvent,
    StructuredInputItem,
    SyncCustomActionResponse,
    Thread,
    ThreadCreatedEvent,
    ThreadCustomActionParams,
    ThreadItem,
    ThreadItemDoneEvent,
    ThreadItemReplacedEvent,
    ThreadMetadata,
    ThreadsAddClientToolOutputReq,
    ThreadsAddStructuredInputReq,
    ThreadsAddUserMessageReq,
    ThreadsCreateReq,
    ThreadsCustomActionReq,
    ThreadsDeleteReq,
    ThreadsRetryAfterItemReq,
    ThreadsSyncCustomActionReq,
    ThreadStreamEvent,
    UserMessageInput,
    UserMessageItem,
    WidgetItem,
    is_streaming_req,
)

from agentmodule import AgentModule
from attachments import Attachments, KeptImages
from context import RequestContext
from conversations import ConversationStore, QuotaExceeded, StoreUnavailable, ThreadBusy, Usage, is_hidden
from dictation import Dictation
from failures import Refused, log_failure, words_for
from history import HistoryConverter, ToolResults, load_history
from provider import letters_in, model_name, usage_of, with_reasoning_kept
from sdk import OwnIds, StreamedContext, encode, parse_request, with_streamed
from titles import title_by_model, title_by_words
from toolservers import ToolServers
from turns import Events, Turns, thread_response

log = logging.getLogger("service.server")

OnThread = (
    ThreadsAddUserMessageReq
    | ThreadsAddClientToolOutputReq
    | ThreadsAddStructuredInputReq
    | ThreadsRetryAfterItemReq
    | ThreadsCustomActionReq
)

PAGE_SIZE = 20
"""Items or threads in a page when the request names no limit, as ChatKit 1.6.5 has it."""


class ChatServer(ChatKitServer[RequestContext]):
    """ChatKit's protocol over a store of conversations, with one turn at a time on a thread.

    All that can be refused is refused before anything is written and before a stream begins: `Refused`,
    `NotFoundError` and `ThreadBusy` are answers. Any other failure of a streaming request becomes an `error` event,
    because the panel repeats a POST that failed, and would run the turn again.
    """

    store: ConversationStore

    def __init__(
        self,
        store: ConversationStore,
        attachments: Attachments,
        turns: Turns,
        agent: AgentModule,
        run_config: RunConfig,
        *,
        models: tuple[str, ...] = (),
        history_items: int = 100,
        can_cancel: bool = True,
        ask_for_titles: bool = False,
        dictation: Dictation | None = None,
        tool_servers: ToolServers | None = None,
    ):
        super().__init__(store, attachments)
        self._attachments = attachments
        self._turns = turns
        self._agent = agent
        self._run_config = run_config
        self._models = models
        self._history_items = history_items
        self._can_cancel = can_cancel
        self._ask_for_titles = ask_for_titles
        self._dictation = dictation
        self._tool_servers = tool_servers or ToolServers((), forward_auth=False)

    async def process(
        self, request: str | bytes | bytearray, context: RequestContext
    ) -> StreamingResult | NonStreamingResult:
        parsed = parse_request(bytes(request, "utf-8") if isinstance(request, str) else bytes(request))
        if not is_streaming_req(parsed):
            return NonStreamingResult(await self._process_non_streaming(parsed, context))
        try:
            return await self._open_turn(parsed, context)
        except (Refused, NotFoundError, ThreadBusy):
            raise
        except Exception as error:
            if not isinstance(error, CustomStreamError | QuotaExceeded):
                log_failure(log, f"{parsed.type} could not begin", error)
            return _error_result(error)

    # --- turns ----------------------------------------------------------------------------------------------------

    async def _open_turn(self, request: StreamingReq, context: RequestContext) -> StreamingResult:
        if isinstance(request, ThreadsCreateReq | ThreadsAddUserMessageReq):
            self._check_model(request.params.input)
        if isinstance(request, ThreadsCreateReq):
            return await self._open_thread(request.params.input, context)
        async with self._turns.opening(request.params.thread_id, context) as leased:
            thread = await self.store.load_thread(request.params.thread_id, leased)
            _require_active(thread)
            events = await self._prepare(request, thread, leased)
            return self._turns.start(thread, leased, events, self._attachments.present_event)

    async def _open_thread(self, message_input: UserMessageInput, context: RequestContext) -> StreamingResult:
        thread = ThreadMetadata(id=self.store.generate_thread_id(context), created_at=datetime.now(UTC))
        message = await self._build_user_message_item(message_input, thread, context)
        async with self._turns.opening(thread.id, context, new_thread=thread) as leased:
            created = ThreadCreatedEvent(thread=thread_response(thread))
            events = self._answer_message(thread, message, leased, created)
            return self._turns.start(thread, leased, events, self._attachments.present_event)

    async def _build_user_message_item(
        self, input: UserMessageInput, thread: ThreadMetadata, context: RequestContext
    ) -> UserMessageItem:
        for attachment_id in input.attachments:
            attachment = await self.store.load_attachment(attachment_id, context)
            await self._attachments.require_sendable(attachment, thread.id, context)
        return await super()._build_user_message_item(input, thread, context)

    async def _prepare(self, request: OnThread, thread: ThreadMetadata, context: RequestContext) -> Events:
        """Check all that the request asks for, and return the events that answer it; nothing is written yet."""
        match request:
            case ThreadsAddUserMessageReq(params=params):
                message = await self._build_user_message_item(params.input, thread, context)
                return self._answer_message(thread, message, context)
            case ThreadsAddClientToolOutputReq():
                calls = await self._pending_calls(thread, context)
                return self._answer_tool_output(thread, calls, request.params.result, context)
            case ThreadsAddStructuredInputReq():
                questions = await self.store.load_item(thread.id, request.params.item_id, context)
                if not isinstance(questions, StructuredInputItem) or questions.status != "pending":
                    raise Refused("conflict", "These questions are already answered. Reload the conversation.")
                answered = await self._apply_structured_input_submission(questions, request.params.input)
                return self._answer(thread, None, context, ThreadItemReplacedEvent(item=answered))
            case ThreadsRetryAfterItemReq():
                item = await self.store.load_item(thread.id, request.params.item_id, context)
                if not isinstance(item, UserMessageItem):
                    raise Refused("conflict", "Only a message of the user can be answered again.")
                return self._answer_again(thread, item, context)
            case ThreadsCustomActionReq():
                if self._agent.handle_action is None:
                    raise Refused("not_configured", "The agent has no handle_action for this action.")
                sender = await self._load_sender(request.params, context)
                return self._streamed(thread, context, self.action(thread, request.params.action, sender, context))

    async def _answer_message(
        self, thread: ThreadMetadata, message: UserMessageItem, context: RequestContext, *first: ThreadStreamEvent
    ) -> Events:
        for event in first:
            yield event
        for attachment in message.attachments:  # they have a thread from now on
            await self.store.save_attachment(attachment, context)
        yield ThreadItemDoneEvent(item=message)
        if thread.title is None:
            self._turns.beside(self._name_thread(thread.id, message, context))
        async for event in self._answer(thread, message, context):
            yield event

    async def _answer_tool_output(
        self, thread: ThreadMetadata, calls: list[ClientToolCallItem], output: Any, context: RequestContext
    ) -> Events:
        newest, *older = calls
        answered = newest.model_copy(update={"output": output, "status": "completed"})
        await self.store.save_item(thread.id, answered, context)
        for call in older:  # nobody will answer them, and no model takes a call without its output
            await self.store.delete_thread_item(thread.id, call.id, context)
        async for event in self._answer(thread, None, context):
            yield event

    async def _answer_again(self, thread: ThreadMetadata, message: UserMessageItem, context: RequestContext) -> Events:
        await self.store.delete_items_after(thread.id, message.id, context)
        async for event in self._answer(thread, message, context):
            yield event

    async def _answer(
        self,
        thread: ThreadMetadata,
        message: UserMessageItem | None,
        context: RequestContext,
        *first: ThreadStreamEvent,
    ) -> Events:
        async for event in self._streamed(thread, context, self.respond(thread, message, context), *first):
            yield event

    async def _streamed(
        self,
        thread: ThreadMetadata,
        context: RequestContext,
        events: AsyncIterator[ThreadStreamEvent],
        *first: ThreadStreamEvent,
    ) -> Events:
        yield StreamOptionsEvent(stream_options=self.get_stream_options(thread, context))
        for event in first:
            yield event
        async for event in events:
            yield event

    def get_stream_options(self, thread: ThreadMetadata, context: RequestContext) -> StreamOptions:
        return StreamOptions(allow_cancel=self._can_cancel)

    async def respond(
        self, thread: ThreadMetadata, input_user_message: UserMessageItem | None, context: RequestContext
    ) -> AsyncIterator[ThreadStreamEvent]:
        async with self._tool_servers.for_turn(context) as servers:
            agent = await self._make_agent(context)
            if servers:
                agent = agent.clone(mcp_servers=[*agent.mcp_servers, *servers])
            async with aclosing(self._run(agent, thread, input_user_message, context)) as events:
                async for event in events:
                    yield event

    async def _run(
        self, agent: Agent[Any], thread: ThreadMetadata, message: UserMessageItem | None, context: RequestContext
    ) -> Events:
        agent_context = self._agent_context(thread, context)
        items = await load_history(self.store, thread.id, self._history_items, context)
        config = await self._config_for(agent, agent_context, items, message)
        converter = HistoryConverter(self._attachments, context, self._agent.describe_tag)
        model_input = await converter.to_agent_input(items)
        run = Runner.run_streamed(agent, model_input, context=agent_context, run_config=config)
        letters = 0
        try:
            results: Any = ToolResults(OwnIds(run), agent_context)
            images = KeptImages(self._attachments, self.store, thread.id, context)
            async for event in stream_agent_response(agent_context, results, converter=images):
                yield agent_context.as_streamed(event)
                letters += letters_in(event)
        except ModelRefusalError as refusal:
            if not letters:  # the Agents SDK (0.24) may drop the message that it raises this for
                yield ThreadItemDoneEvent(item=self._assistant_message(thread, refusal.refusal, context))
        finally:
            run.cancel()  # without it the model would run to its end after a Stop
            if run.run_loop_task is not None:
                await asyncio.wait({run.run_loop_task})
                _ = run.run_loop_exception  # asked for, or asyncio would log it with a traceback and users' words
            await self._add_usage(usage_of(run, model_name(agent, config), letters), context)

    def _assistant_message(self, thread: ThreadMetadata, text: str, context: RequestContext) -> AssistantMessageItem:
        return AssistantMessageItem(
            id=self.store.generate_item_id("message", thread, context),
            thread_id=thread.id,
            created_at=datetime.now(UTC),
            content=[AssistantMessageContent(text=text)],
        )

    async def _add_usage(self, usage: Usage, context: RequestContext) -> None:
        try:
            await self.store.add_usage(usage, context)
        except StoreUnavailable as error:
            log_failure(log, "a turn's usage could not be stored", error)

    async def _make_agent(self, context: RequestContext) -> Agent[Any]:
        agent = self._agent.create_agent(context)
        return await agent if isawaitable(agent) else agent

    async def _config_for(
        self,
        agent: Agent[Any],
        agent_context: AgentContext[RequestContext],
        items: Sequence[ThreadItem],
        message: UserMessageItem | None,
    ) -> RunConfig:
        """Return the run's config with what the user chose: the model for the whole turn, the tool for its beginning.

        A turn that goes on after a tool's output or an answered form has the choices of the message that began it.
        """
        config = self._run_config
        asked = message or next((item for item in reversed(items) if isinstance(item, UserMessageItem)), None)
        if asked and asked.inference_options.model in self._models:
            config = replace(config, model=asked.inference_options.model)
        if message and (choice := message.inference_options.tool_choice):
            tools = await agent.get_all_tools(RunContextWrapper(agent_context))
            if choice.id not in {tool.name for tool in tools}:
                raise CustomStreamError(f"The agent has no tool “{choice.id[:100]}”. Choose another, or none.")
            chosen = ModelSettings(tool_choice=choice.id)
            config = replace(config, model_settings=(config.model_settings or ModelSettings()).resolve(chosen))
        return with_reasoning_kept(config, model_name(agent, config))

    async def _name_thread(self, thread_id: str, message: UserMessageItem, context: RequestContext) -> None:
        """Give the thread a title, beside the turn, which neither waits for it nor fails with it."""
        title = title_by_words(message)
        try:
            if self._ask_for_titles:
                agent = await self._make_agent(context)
                title = await title_by_model(message, agent.model, self._run_config)
        finally:  # stopped at the end of the process, it still leaves the words
            with suppress(NotFoundError, StoreUnavailable):
                if await self.store.name_thread(thread_id, title, replace(context, lease=None)):
                    self._turns.show_title(thread_id, title)

    def _agent_context(self, thread: ThreadMetadata, context: RequestContext) -> StreamedContext:
        return StreamedContext(thread=thread, store=self.store, request_context=context)

    def _check_model(self, message_input: UserMessageInput) -> None:
        chosen = message_input.inference_options.model
        if self._models and chosen is not None and chosen not in self._models:
            raise Refused("bad_params", "This model is not offered. Choose one of: " + ", ".join(self._models))

    async def _pending_calls(self, thread: ThreadMetadata, context: RequestContext) -> list[ClientToolCallItem]:
        """Return the calls since the last user message that wait for the client, newest first; at least one.

        (ChatKit 1.6.5 looks at the newest item alone, which may be a hidden one.)
        """
        calls = []
        async for item in self._paginate_thread_items_reverse(thread.id, context):
            if isinstance(item, UserMessageItem):
                break
            if isinstance(item, ClientToolCallItem) and item.status == "pending":
                calls.append(item)
        if not calls:
            raise Refused("conflict", "No tool call waits for an output. Reload the conversation.")
        return calls

    # --- actions --------------------------------------------------------------------------------------------------

    def action(
        self,
        thread: ThreadMetadata,
        action: Action[str, Any],
        sender: WidgetItem | None,
        context: RequestContext,
    ) -> AsyncIterator[ThreadStreamEvent]:
        assert self._agent.handle_action is not None  # checked before the turn
        agent_context = self._agent_context(thread, context)
        return with_streamed(agent_context, self._agent.handle_action(thread, action, sender, agent_context))

    async def sync_action(
        self,
        thread: ThreadMetadata,
        action: Action[str, Any],
        sender: WidgetItem | None,
        context: RequestContext,
    ) -> SyncCustomActionResponse:
        assert self._agent.handle_sync_action is not None  # checked before
        agent_context = self._agent_context(thread, context)
        response = await self._agent.handle_sync_action(thread, action, sender, agent_context)
        if item := response.updated_item:
            await self.store.save_item(thread.id, item, context)  # what a client was shown is kept
            if is_hidden(item):
                return SyncCustomActionResponse()
            return SyncCustomActionResponse(updated_item=self._attachments.present_item(item, context))
        return response

    async def _load_sender(self, params: ThreadCustomActionParams, context: RequestContext) -> WidgetItem | None:
        if params.item_id is None:
            return None
        item = await self.store.load_item(params.thread_id, params.item_id, context)
        if not isinstance(item, WidgetItem):
            raise Refused("bad_params", "params.item_id must name a widget.")
        return item

    # --- requests that do not stream ------------------------------------------------------------------------------

    async def _process_non_streaming(self, request: NonStreamingReq, context: RequestContext) -> bytes:
        match request:
            case ItemsListReq(params=params):
                items = await self.store.load_thread_items(
                    params.thread_id, params.after, params.limit or PAGE_SIZE, params.order, context, hidden=False
                )
                items.data = [self._attachments.present_item(item, context) for item in items.data]
                return encode(items)
            case ThreadsDeleteReq(params=params):
                await self.store.delete_thread(params.thread_id, context)
                self._turns.stop_thread(params.thread_id)
                return b"{}"
            case ThreadsSyncCustomActionReq(params=params):
                if self._agent.handle_sync_action is None:
                    raise Refused("not_configured", "The agent has no handle_sync_action for this action.")
                thread = await self.store.load_thread(params.thread_id, context)
                sender = await self._load_sender(params, context)
                _require_active(thread)
                return encode(await self.sync_action(thread, params.action, sender, context))
            case AttachmentsCreateReq(params=params):  # ChatKit 1.6.5 would store the link that the answer carries
                return encode(await self._attachments.create_attachment(params, context))
            case AttachmentsDeleteReq(params=params):
                await self.store.delete_attachment(params.attachment_id, context)
                return b"{}"
            case InputTranscribeReq(params=params):
                if self._dictation is None:
                    raise Refused("not_configured", "No model is configured that could take dictation.")
                return encode(await self._dictation.transcribe(params))
        return await super()._process_non_streaming(request, context)

    async def _load_full_thread(self, thread_id: str, context: RequestContext) -> Thread:
        thread = await self.store.load_thread(thread_id, context)
        items = await self.store.load_thread_items(thread_id, None, PAGE_SIZE, "asc", context, hidden=False)
        items.data = [self._attachments.present_item(item, context) for item in items.data]
        return Thread(**thread.model_dump(), items=items)

    async def add_feedback(
        self, thread_id: str, item_ids: list[str], feedback: FeedbackKind, context: RequestContext
    ) -> None:
        await self.store.save_feedback(thread_id, item_ids, feedback, context)


def _require_active(thread: ThreadMetadata) -> None:
    status = thread.status
    if status.type != "active":
        raise CustomStreamError(status.reason or f"This conversation is {status.type}.")


def _error_result(error: Exception) -> StreamingResult:
    """Return a stream of one `error` event, for a turn that did not begin: there is nothing to try again."""

    async def events() -> AsyncGenerator[bytes, None]:
        yield b"data: " + encode(words_for(error).model_copy(update={"allow_retry": False})) + b"\n\n"

    return StreamingResult(events())
