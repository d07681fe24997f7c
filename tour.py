"""The offline demo's tools: each shows something that the protocol can carry."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from inspect import isawaitable
from typing import Any

from agents import Agent, RunContextWrapper, StopAtTools, Tool, function_tool
from chatkit.actions import Action, ActionConfig
from chatkit.agents import AgentContext, ClientToolCall
from chatkit.types import (
    CustomTask,
    NoticeEvent,
    ProgressUpdateEvent,
    StructuredInputFreeform,
    StructuredInputItem,
    StructuredInputMultipleChoice,
    StructuredInputMultipleChoiceOption,
    ThreadItemDoneEvent,
    ThreadItemReplacedEvent,
    ThreadMetadata,
    ThreadStreamEvent,
    WidgetItem,
    Workflow,
)
from chatkit.widgets import DynamicWidgetRoot

from agentmodule import AgentModule
from context import RequestContext
from failures import Refused

Chat = RunContextWrapper[AgentContext[RequestContext]]

PROMPTS = ("What can you do?", "Show me a widget", "Think about it first", "Work through two tasks")
"""What the page offers to begin with: the demo answers the first with its greeting, the others by its topics."""

PRESS = "demo.press"


@function_tool
async def demo_work(wrapper: Chat) -> str:
    """Work through two tasks."""
    chat = wrapper.context
    await chat.stream(ProgressUpdateEvent(text="Getting to work"))
    await chat.start_workflow(Workflow(type="custom", tasks=[]))
    for place, title in enumerate(("Look at the first thing", "Look at the second thing")):
        await chat.add_workflow_task(CustomTask(title=title, status_indicator="loading"))
        await asyncio.sleep(0.8)
        await chat.update_workflow_task(CustomTask(title=title, status_indicator="complete"), place)
    await chat.end_workflow()
    return "both are done"


@function_tool
async def demo_widget(wrapper: Chat) -> str:
    """Show a widget with a button."""
    await wrapper.context.stream_widget(_counter(0))
    return "shown"


@function_tool
async def demo_page_tool(wrapper: Chat) -> str:
    """Ask the page for its time."""
    wrapper.context.client_tool_call = ClientToolCall(name="get_local_time", arguments={})
    return "asked"


@function_tool
async def demo_form(wrapper: Chat) -> str:
    """Ask the user two questions."""
    chat = wrapper.context
    sizes = [StructuredInputMultipleChoiceOption(value=size) for size in ("Small", "Medium", "Large")]
    form = StructuredInputItem(
        id=chat.generate_id("message"),
        thread_id=chat.thread.id,
        created_at=datetime.now(UTC),
        inputs=[
            StructuredInputMultipleChoice(id="size", question="Which size?", options=sizes),
            StructuredInputFreeform(id="wish", question="Anything else?"),
        ],
    )
    await chat.stream(ThreadItemDoneEvent(item=form))
    return "asked"


@function_tool
async def demo_notice(wrapper: Chat) -> str:
    """Show a notice."""
    notice = NoticeEvent(level="warning", title="A notice", message="It is shown, and **not** stored.")
    await wrapper.context.stream(notice)
    return "shown"


WAITING = ["demo_page_tool", "demo_form"]
TOOLS: list[Tool] = [demo_work, demo_widget, demo_page_tool, demo_form, demo_notice]


def with_tour(module: AgentModule) -> AgentModule:
    """Return the module whose agent has the demo's tools too, and which answers the demo's own actions."""

    async def create_agent(context: RequestContext) -> Agent[Any]:
        made = module.create_agent(context)
        agent: Agent[Any] = await made if isawaitable(made) else made
        stop = _stopping_too(agent.tool_use_behavior)
        return agent.clone(tools=[*agent.tools, *TOOLS], tool_use_behavior=stop)

    def handle_action(
        thread: ThreadMetadata, action: Action[str, Any], sender: WidgetItem | None, agent_context: AgentContext[Any]
    ) -> AsyncIterator[ThreadStreamEvent]:
        if action.type == PRESS and sender is not None:
            return _pressed(action, sender)
        if module.handle_action is None:
            raise Refused("not_configured", "The agent has no handle_action for this action.")
        return module.handle_action(thread, action, sender, agent_context)

    return replace(module, create_agent=create_agent, handle_action=handle_action)


def _stopping_too(behavior: Any) -> Any:
    """Return the agent's own behavior, which ends the turn too where the demo waits for the page or the user."""
    if behavior == "run_llm_again":
        return StopAtTools(stop_at_tool_names=WAITING)
    if isinstance(behavior, dict):
        return StopAtTools(stop_at_tool_names=[*behavior.get("stop_at_tool_names", ()), *WAITING])
    return behavior


async def _pressed(action: Action[str, Any], sender: WidgetItem) -> AsyncIterator[ThreadStreamEvent]:
    pressed = _counter(int((action.payload or {}).get("pressed", 0)) + 1)
    yield ThreadItemReplacedEvent(item=sender.model_copy(update={"widget": pressed}))


def _counter(pressed: int) -> DynamicWidgetRoot:
    action = ActionConfig(type=PRESS, payload={"pressed": pressed})
    return DynamicWidgetRoot.model_validate(
        {
            "type": "Card",
            "children": [
                {"type": "Title", "value": "A widget"},
                {"type": "Text", "value": f"The button was pressed {pressed} times."},
                {"type": "Button", "label": "Press", "onClickAction": action.model_dump()},
            ],
        }
    )
