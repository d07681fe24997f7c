"""Runs of the agent: from a conversation to the events that go on with it, and to its title."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from datetime import UTC, datetime
from inspect import isawaitable
from typing import Any

from agents import Agent, ItemHelpers, ModelSettings, RunConfig, RunContextWrapper, Runner, TResponseInputItem
from agents.exceptions import ModelRefusalError, UserError
from agents.result import RunResultBase
from chatkit.errors import CustomStreamError
from chatkit.store import NotFoundError
from chatkit.types import (
    AssistantMessageContent,
    AssistantMessageContentPartTextDelta,
    AssistantMessageItem,
    ClientEffectEvent,
    ErrorEvent,
    GeneratedImageItem,
    ThreadItem,
    ThreadItemAddedEvent,
    ThreadItemDoneEvent,
    ThreadItemReplacedEvent,
    ThreadItemUpdatedEvent,
    ThreadMetadata,
    ThreadStreamEvent,
    UserMessageItem,
)

import metrics
from agentmodule import AgentModule
from attachments import Attachments, KeptImages
from context import RequestContext
from conversations import ConversationStore, StoreUnavailable, Usage, is_hidden, is_thought
from failures import NoAnswer
from history import HistoryConverter, RecordingContext, load_history, workflow_to_go_on
from leases import RETRY_SECONDS
from provider import Counted, model_name, with_reasoning_kept
from sdk import StreamedContext, stream_agent_response
from telemetry import note_first_token
from titles import title_by_model
from toolservers import ToolServers, with_tools_of
from turn import Events
from turns import Turns


class AgentRuns:
    """Makes the author's agent for each run, with the model and the tools of that run, and counts what it used."""

    def __init__(
        self,
        store: ConversationStore,
        attachments: Attachments,
        agent: AgentModule,
        tool_servers: ToolServers | None,
        run_config: RunConfig,
        turns: Turns,
        *,
        models: tuple[str, ...],
        history_items: int,
    ):
        self._store = store
        self._attachments = attachments
        self._agent = agent
        self._tool_servers = tool_servers or ToolServers((), forward_auth=False)
        self._run_config = run_config
        self._turns = turns
        self._models = models
        self._history_items = history_items

    async def answer(
        self,
        thread: ThreadMetadata,
        message: UserMessageItem | None,
        context: RequestContext,
        *,
        anew: bool = False,
    ) -> Events:
        """Yield the agent's answer to the thread as it is stored, with the message that may just have been added.

        Anew, it takes the place of all that came after the message: that is deleted once something of it that the
        user sees is stored.
        """
        superseded = await self._newest_after(message, context) if anew and message else None
        async with self._tool_servers.for_turn(context) as servers:
            agent = await self._make_agent(context)
            if servers:
                agent = await with_tools_of(servers, agent, self.agent_context(thread, context))
            async with aclosing(self._run(agent, thread, message, context, anew=anew)) as events:
                async for event in events:
                    yield event
                    if superseded and message:
                        kept = await self._turns.keep(thread.id)
                        if kept.shown and await self._store.delete_items_after(
                            thread.id, message.id, context, until=superseded, keeping=kept.all, once=kept.shown
                        ):
                            superseded = None

    async def _newest_after(self, message: UserMessageItem, context: RequestContext) -> str | None:
        """Return the cursor of the thread's newest item; None where that is the message itself."""
        newest = await self._store.load_thread_items(message.thread_id, None, 1, "desc", context)
        return newest.after if newest.data[0].id != message.id else None

    async def title(self, message: UserMessageItem, context: RequestContext) -> str:
        """Return the title that the agent's model gives to a conversation that begins with the message."""
        title, used = await title_by_model(message, await self._make_agent(context), self._run_config)
        if used is not None:
            with suppress(NotFoundError):  # of a user who was deleted meanwhile nothing is kept
                with suppress(StoreUnavailable):
                    await self._store.load_thread(message.thread_id, replace(context, loaded_threads={}))
                await self._add_usage(used, context)
        return title

    def agent_context(self, thread: ThreadMetadata, context: RequestContext) -> StreamedContext:
        """Return what the agent's tools and handlers get."""
        return RecordingContext(thread=thread, store=self._store, request_context=context)

    async def _run(
        self,
        agent: Agent[Any],
        thread: ThreadMetadata,
        message: UserMessageItem | None,
        context: RequestContext,
        *,
        anew: bool,
    ) -> Events:
        agent_context = self.agent_context(thread, context)
        if message and (choice := message.inference_options.tool_choice):
            agent = await beginning_with(choice.id, agent, agent_context)
        model_input, config = await self._read(agent, agent_context, message, anew=anew)
        run = Runner.run_streamed(agent, model_input, context=agent_context, run_config=config)
        counted, has_said, has_shown = Counted(run), False, False
        try:
            images = KeptImages(self._attachments, self._store, thread.id, context)
            async for event in stream_agent_response(agent_context, counted, converter=images):
                yield event
                if isinstance(event, ThreadItemDoneEvent) and isinstance(event.item, GeneratedImageItem):
                    await images.delete_superseded()
                has_shown = has_shown or _is_shown(event)
                if not has_said and _is_said(event):
                    has_said = True
                    note_first_token()
            if run.interruptions:  # or the turn would end without a word
                raise UserError("a tool of the agent needs an approval, for which ChatKit has no question")
            if not has_shown and (unsaid := _unsaid_or_none(run)):
                yield ThreadItemDoneEvent(item=self._assistant_message(thread, unsaid, context))
        except ModelRefusalError as refusal:
            if not has_said:  # the Agents SDK (0.24) may drop the message that it raises this for
                yield ThreadItemDoneEvent(item=self._assistant_message(thread, refusal.refusal, context))
        finally:
            run.cancel()  # without it the model would run to its end after a Stop
            if run.run_loop_task is not None:
                await asyncio.wait({run.run_loop_task})
                _ = run.run_loop_exception  # asked for, or asyncio would log it with a traceback and users' words
            if used := counted.usage(model_name(agent, config)):
                await self._add_usage(used, context)

    async def _read(
        self, agent: Agent[Any], agent_context: StreamedContext, message: UserMessageItem | None, *, anew: bool
    ) -> tuple[list[TResponseInputItem], RunConfig]:
        """Return what the model is to read, and the run's config.

        The items that it comes from are not kept: a run would hold them in memory for as long as it lasts.
        """
        thread_id, context, until = agent_context.thread.id, agent_context.request_context, message if anew else None
        items = await load_history(self._store, thread_id, self._history_items, context, until=until)
        config = self._config_for(agent, items, message)
        agent_context.go_on_with(workflow_to_go_on(items))
        converter = HistoryConverter(self._attachments, context, self._agent.describe_tag)
        return await converter.to_agent_input(items), config

    def _assistant_message(self, thread: ThreadMetadata, text: str, context: RequestContext) -> AssistantMessageItem:
        return AssistantMessageItem(
            id=self._store.generate_item_id("message", thread, context),
            thread_id=thread.id,
            created_at=datetime.now(UTC),
            content=[AssistantMessageContent(text=text)],
        )

    async def _add_usage(self, usage: Usage, context: RequestContext) -> None:
        metrics.count_tokens(usage.model, usage.input_tokens, usage.output_tokens)
        # Where the database breaks off in the middle of the commit it may count twice, and is never lost for that.
        adding = self._turns.write_beside(lambda: self._store.add_usage(usage, context))
        await asyncio.wait({adding}, timeout=RETRY_SECONDS)  # it is to count before the user's next turn

    async def _make_agent(self, context: RequestContext) -> Agent[Any]:
        agent = self._agent.create_agent(context)
        return await agent if isawaitable(agent) else agent

    def _config_for(self, agent: Agent[Any], items: Sequence[ThreadItem], message: UserMessageItem | None) -> RunConfig:
        """Return the run's config with the model that the user chose.

        A turn that goes on after a tool's output or an answered form has the choice of the message that began it.
        """
        config = self._run_config
        asked = message or next((item for item in reversed(items) if isinstance(item, UserMessageItem)), None)
        if asked and asked.inference_options.model in self._models:
            config = replace(config, model=asked.inference_options.model)
        return with_reasoning_kept(config, model_name(agent, config))


async def beginning_with(tool: str, agent: Agent[Any], agent_context: StreamedContext | None) -> Agent[Any]:
    """Return the agent as one that begins with this tool. (In a `RunConfig` the choice would be other agents' too.)

    Raises ChatKit's `CustomStreamError` when it has no such tool.
    """
    tools = await agent.get_all_tools(RunContextWrapper(agent_context))
    if tool not in {each.name for each in tools}:
        raise CustomStreamError(f"The agent has no tool “{tool[:100]}”. Choose another, or none.")
    return agent.clone(model_settings=agent.model_settings.resolve(ModelSettings(tool_choice=tool)))


def _unsaid_or_none(run: RunResultBase) -> str | None:
    """Return the text of a run that showed nothing, of a server that streams no more than the end.

    None where its last response did something else, called a tool say; raises `NoAnswer` where it did nothing at all.
    """
    output = run.raw_responses[-1].output if run.raw_responses else []
    if any(item.type not in ("message", "reasoning") for item in output):
        return None
    text = "".join(ItemHelpers.extract_text(item) or "" for item in output if item.type == "message")
    if not text.strip():
        raise NoAnswer
    return text


def _is_shown(event: ThreadStreamEvent) -> bool:
    """Whether the event shows anything but that the model thinks, and what is gone afterwards."""
    match event:
        case ClientEffectEvent() | ErrorEvent():
            return True
        case ThreadItemAddedEvent(item=item) | ThreadItemDoneEvent(item=item) | ThreadItemReplacedEvent(item=item):
            if not isinstance(item, AssistantMessageItem):
                return not (is_hidden(item) or is_thought(item))
    return _is_said(event)


def _is_said(event: ThreadStreamEvent) -> bool:
    """Whether the event shows text of an answer."""
    match event:
        case ThreadItemUpdatedEvent(update=AssistantMessageContentPartTextDelta(delta=delta)):
            return bool(delta.strip())
        case ThreadItemDoneEvent(item=AssistantMessageItem(content=content)):
            return any(part.text.strip() for part in content)
    return False
