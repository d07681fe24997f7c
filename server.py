"""`ChatServer`: what a request may do, and the turn that answers it."""

import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace
from datetime import UTC, datetime
from inspect import isawaitable
from typing import Any

from agents import RunConfig
from chatkit.actions import Action
from chatkit.errors import CustomStreamError
from chatkit.server import ChatKitServer, NonStreamingResult, StreamingResult
from chatkit.store import NotFoundError
from chatkit.types import (
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
    ThreadItemDoneEvent,
    ThreadItemReplacedEvent,
    ThreadMetadata,
    ThreadsAddClientToolOutputReq,
    ThreadsAddStructuredInputReq,
    ThreadsAddUserMessageReq,
    ThreadsCreateReq,
    ThreadsCustomActionReq,
    ThreadsDeleteReq,
    ThreadsGetByIdReq,
    ThreadsRetryAfterItemReq,
    ThreadsSyncCustomActionReq,
    ThreadStreamEvent,
    UserMessageInput,
    UserMessageItem,
    WidgetItem,
    is_streaming_req,
)

import metrics
from agentmodule import AgentModule
from attachments import Attachments
from context import RequestContext
from conversations import ConversationStore, QuotaExceeded, StoreUnavailable, ThreadBusy, aware, is_hidden
from dictation import Dictation
from failures import Refused, log_failure, words_for
from runs import AgentRuns
from sdk import encode, parse_request, with_streamed
from telemetry import note
from titles import title_by_words
from toolservers import ToolServers
from turn import Events, thread_response
from turns import Turns

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
MAX_FEEDBACK_ITEMS = 100


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
        self._runs = AgentRuns(
            store, attachments, agent, tool_servers, run_config, turns, models=models, history_items=history_items
        )
        self._models = models
        self._can_cancel = can_cancel
        self._ask_for_titles = ask_for_titles
        self._dictation = dictation

    async def process(
        self, request: str | bytes | bytearray, context: RequestContext
    ) -> StreamingResult | NonStreamingResult:
        parsed = parse_request(bytes(request, "utf-8") if isinstance(request, str) else bytes(request))
        note(operation=parsed.type, thread_id=getattr(parsed.params, "thread_id", None))
        if not is_streaming_req(parsed):
            return NonStreamingResult(await self._process_non_streaming(parsed, context))
        note(is_turn=True)
        try:
            return await self._open_turn(parsed, context)
        except (Refused, NotFoundError, ThreadBusy):
            raise
        except Exception as error:
            if isinstance(error, QuotaExceeded):
                metrics.count_quota_refusal(error.quota)
            if isinstance(error, CustomStreamError | QuotaExceeded):
                note(outcome="refused")
            else:
                note(outcome="failed")
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
            # A retry answers the last message anew: what a form says, or an action did, would be deleted, not repeated.
            may_retry = not isinstance(request, ThreadsAddStructuredInputReq | ThreadsCustomActionReq)
            return self._turns.start(thread, leased, events, self._attachments.present_event, may_retry=may_retry)

    async def _open_thread(self, message_input: UserMessageInput, context: RequestContext) -> StreamingResult:
        thread = ThreadMetadata(id=self.store.generate_thread_id(context), created_at=datetime.now(UTC))
        note(thread_id=thread.id)
        message = await self._build_user_message_item(message_input, thread, context)
        async with self._turns.opening(thread.id, context, new_thread=thread) as leased:
            created = ThreadCreatedEvent(thread=thread_response(thread))
            events = self._answer_message(thread, message, leased, created)
            return self._turns.start(thread, leased, events, self._attachments.present_event)

    async def _build_user_message_item(
        self, input: UserMessageInput, thread: ThreadMetadata, context: RequestContext
    ) -> UserMessageItem:
        once = input.model_copy(update={"attachments": [*dict.fromkeys(input.attachments)]})
        for attachment_id in once.attachments:
            attachment = await self.store.load_attachment(attachment_id, context)
            await self._attachments.require_sendable(attachment, thread.id, context)
        return await super()._build_user_message_item(once, thread, context)

    async def _prepare(self, request: OnThread, thread: ThreadMetadata, context: RequestContext) -> Events:
        """Check all that the request asks for, and return the events that answer it; nothing is written yet."""
        match request:
            case ThreadsAddUserMessageReq(params=params):
                message = await self._build_user_message_item(params.input, thread, context)
                return self._answer_message(thread, message, context)
            case ThreadsAddClientToolOutputReq():
                calls = await self._pending_calls(thread, context)
                # ChatKit 1.6.5 does not say which call an output is for; our page does.
                if request.metadata.get("item_id") not in (None, calls[0].id):
                    raise Refused("conflict", "This tool call was answered already. Reload the conversation.")
                return self._answer_tool_output(thread, calls, request.params.result, context)
            case ThreadsAddStructuredInputReq():
                questions = await self.store.load_item(thread.id, request.params.item_id, context)
                if not isinstance(questions, StructuredInputItem) or questions.status != "pending":
                    raise Refused("conflict", "These questions are already answered. Reload the conversation.")
                if request.params.input.answers.keys() - {question.id for question in questions.inputs}:
                    raise Refused("bad_params", "params.input.answers must have the ids of the questions.")
                answered = await self._apply_structured_input_submission(questions, request.params.input)
                return self._answer(thread, None, context, ThreadItemReplacedEvent(item=answered))
            case ThreadsRetryAfterItemReq():
                item = await self.store.load_item(thread.id, request.params.item_id, context)
                if not isinstance(item, UserMessageItem):
                    raise Refused("conflict", "Only a message of the user can be answered again.")
                await self._require_shown(request.metadata, item, thread, context)
                return self._streamed(thread, context, self._runs.answer(thread, item, context, anew=True))
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
        yield ThreadItemDoneEvent(item=message)
        if thread.title is None:
            self._turns.beside(self._name_thread(thread.id, message, context))
        async with aclosing(self._answer(thread, message, context)) as events:
            async for event in events:
                yield event

    async def _answer_tool_output(
        self, thread: ThreadMetadata, calls: list[ClientToolCallItem], output: Any, context: RequestContext
    ) -> Events:
        newest, *older = calls
        answered = newest.model_copy(update={"output": output, "status": "completed"})
        await self.store.save_item(thread.id, answered, context)
        for call in older:  # nobody will answer them, and no model takes a call without its output
            await self.store.delete_thread_item(thread.id, call.id, context)
        async with aclosing(self._answer(thread, None, context)) as events:
            async for event in events:
                yield event

    def _answer(
        self,
        thread: ThreadMetadata,
        message: UserMessageItem | None,
        context: RequestContext,
        *first: ThreadStreamEvent,
    ) -> Events:
        return self._streamed(thread, context, self.respond(thread, message, context), *first)

    async def _streamed(
        self, thread: ThreadMetadata, context: RequestContext, events: Events, *first: ThreadStreamEvent
    ) -> Events:
        async with aclosing(events):  # so that a turn that fails has ended its run before it gives the thread back
            yield StreamOptionsEvent(stream_options=self.get_stream_options(thread, context))
            for event in first:
                yield event
            async for event in events:
                yield event

    def get_stream_options(self, thread: ThreadMetadata, context: RequestContext) -> StreamOptions:
        return StreamOptions(allow_cancel=self._can_cancel)

    def respond(
        self, thread: ThreadMetadata, input_user_message: UserMessageItem | None, context: RequestContext
    ) -> Events:
        return self._runs.answer(thread, input_user_message, context)

    async def _name_thread(self, thread_id: str, message: UserMessageItem, context: RequestContext) -> None:
        """Give the thread a title, beside the turn, which neither waits for it nor fails with it."""
        title = title_by_words(message)
        try:
            if self._ask_for_titles:
                title = await self._runs.title(message, context)
        except Exception as error:
            log_failure(log, "no title from the model", error)
        finally:  # stopped at the end of the process, it still leaves the words
            with suppress(NotFoundError, StoreUnavailable):
                if await self.store.name_thread(thread_id, title, replace(context, lease=None)):
                    self._turns.show_title(thread_id, title)

    def _check_model(self, message_input: UserMessageInput) -> None:
        chosen = message_input.inference_options.model
        if self._models and chosen is not None and chosen not in self._models:
            raise Refused("bad_params", "This model is not offered. Choose one of: " + ", ".join(self._models))

    async def _require_shown(
        self, metadata: dict[str, Any], message: UserMessageItem, thread: ThreadMetadata, context: RequestContext
    ) -> None:
        """Raise `Refused` where the thread went on after what a client says that it shows: it would go unseen."""
        is_last, shown = metadata.get("is_last"), metadata.get("shown_item_ids")
        if not is_last and shown is None:
            return
        async for item in self._paginate_thread_items_reverse(thread.id, context):
            if item.id == message.id:
                break
            is_message = isinstance(item, UserMessageItem)
            is_unseen = isinstance(shown, list) and not is_hidden(item) and item.id not in shown
            if (is_last and is_message) or is_unseen:
                raise Refused("conflict", "This conversation went on elsewhere. Reload it.")

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
    ) -> Events:
        assert self._agent.handle_action is not None  # checked before the turn
        agent_context = self._runs.agent_context(thread, context)
        return with_streamed(agent_context, self._agent.handle_action(thread, action, sender, agent_context))

    async def sync_action(
        self,
        thread: ThreadMetadata,
        action: Action[str, Any],
        sender: WidgetItem | None,
        context: RequestContext,
    ) -> SyncCustomActionResponse:
        assert self._agent.handle_sync_action is not None  # checked before
        agent_context = self._runs.agent_context(thread, context)
        response: Any = self._agent.handle_sync_action(thread, action, sender, agent_context)
        response = await response if isawaitable(response) else response
        if response is None or response.updated_item is None:
            return SyncCustomActionResponse()
        item = response.updated_item
        item.created_at = aware(item.created_at)
        await self.store.save_item(thread.id, item, context)  # what a client was shown is kept
        if is_hidden(item):
            return SyncCustomActionResponse()
        return SyncCustomActionResponse(updated_item=self._attachments.present_item(item, context))

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
            case ThreadsGetByIdReq(params=params) if request.metadata.get("is_answering"):
                # ChatKit 1.6.5 tells nobody but the one who has begun a turn when its answer is over; our page asks.
                is_answering = await self.store.is_leased(params.thread_id, context)
                thread = json.loads(await super()._process_non_streaming(request, context))
                return json.dumps({**thread, "is_answering": is_answering}).encode()
            case ThreadsDeleteReq(params=params):
                await self.store.delete_thread(params.thread_id, context)
                self._turns.stop_thread(params.thread_id)
                return b"{}"
            case ThreadsSyncCustomActionReq(params=params):
                if self._agent.handle_sync_action is None:
                    raise Refused("not_configured", "The agent has no handle_sync_action for this action.")
                thread = await self.store.load_thread(params.thread_id, context)
                sender = await self._load_sender(params, context)
                try:
                    _require_active(thread)
                    return encode(await self.sync_action(thread, params.action, sender, context))
                except CustomStreamError as error:  # its author's words, and no stream to say them in
                    raise Refused("conflict", error.message) from error
            case AttachmentsCreateReq(params=params):  # ChatKit 1.6.5 would store the link that the answer carries
                return encode(await self._attachments.create_attachment(params, context))
            case AttachmentsDeleteReq(params=params):
                await self.store.delete_attachment(params.attachment_id, context)
                return b"{}"
            case InputTranscribeReq(params=params):
                if self._dictation is None:
                    raise Refused("not_configured", "No model is configured that could take dictation.")
                return encode(await self._dictation.transcribe(params, context.user_id))
        return await super()._process_non_streaming(request, context)

    async def _load_full_thread(self, thread_id: str, context: RequestContext) -> Thread:
        thread = await self.store.load_thread(thread_id, context)
        items = await self.store.load_thread_items(thread_id, None, PAGE_SIZE, "asc", context, hidden=False)
        items.data = [self._attachments.present_item(item, context) for item in items.data]
        return Thread(**thread.model_dump(), items=items)

    async def add_feedback(
        self, thread_id: str, item_ids: list[str], feedback: FeedbackKind, context: RequestContext
    ) -> None:
        if len(item_ids) > MAX_FEEDBACK_ITEMS:
            raise Refused("bad_params", f"params.item_ids must be {MAX_FEEDBACK_ITEMS} at most.")
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
