"""The agent of the tests: the model stand-in calls its tools, and each shows one thing that the protocol can carry."""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from agents import (
    Agent,
    GuardrailFunctionOutput,
    RunContextWrapper,
    Runner,
    StopAtTools,
    function_tool,
    input_guardrail,
)
from chatkit.agents import AgentContext, ClientToolCall, stream_agent_response
from chatkit.errors import CustomStreamError
from chatkit.types import (
    ClosedStatus,
    CustomTask,
    HiddenContextItem,
    LockedStatus,
    NoticeEvent,
    ProgressUpdateEvent,
    StructuredInputFreeform,
    StructuredInputItem,
    StructuredInputMultipleChoice,
    SyncCustomActionResponse,
    ThreadItemAddedEvent,
    ThreadItemDoneEvent,
    ThreadItemRemovedEvent,
    ThreadItemReplacedEvent,
    ThreadStreamEvent,
    WidgetItem,
    Workflow,
)
from chatkit.widgets import Card, Markdown, Text

from context import RequestContext

Context = RunContextWrapper[AgentContext[RequestContext]]


@function_tool
async def look_up(wrapper: Context, word: str) -> str:
    """Look a word up, with progress."""
    await wrapper.context.stream(ProgressUpdateEvent(text="Looking it up"))
    await wrapper.context.stream(NoticeEvent(level="info", message="Looked up"))
    return f"{word} means something"


@function_tool
async def consult(wrapper: Context) -> str:
    """Ask another agent with the context of this run, and show nothing of it."""
    run = Runner.run_streamed(Agent(name="Other", model="stand-in"), "Advise me", context=wrapper.context)
    events = [event async for event in stream_agent_response(wrapper.context, run)]
    return f"{len(events)} events of advice"


@function_tool
async def say_half_a_letter() -> str:
    """Return what JSON can carry and UTF-8 cannot."""
    return "half \ud83d and two halves \ud83d\ude00"


@function_tool
async def show_widget(wrapper: Context) -> str:
    """Show a widget whose text grows."""

    async def states() -> AsyncIterator[Card]:
        for text in ("", "Hello", "Hello widget"):
            yield Card(children=[Text(id="t", value=text, streaming=text != "Hello widget")])

    await wrapper.context.stream_widget(states())
    return "shown"


@function_tool
async def show_slow_widget(wrapper: Context) -> str:
    """Show a widget that becomes complete after whatever else is shown."""

    async def states() -> AsyncIterator[Card]:
        yield Card(children=[Text(id="t", value="Slow", streaming=True)])
        await asyncio.sleep(0.2)
        yield Card(children=[Text(id="t", value="Slow widget")])

    await wrapper.context.stream_widget(states())
    return "shown"


@function_tool
async def show_half_a_widget(wrapper: Context) -> str:
    """Show a widget that never becomes complete."""

    async def states() -> AsyncIterator[Card]:
        yield Card(children=[Markdown(id="m", value="Half", streaming=True)])
        yield Card(children=[Markdown(id="m", value="Half a widget", streaming=True)])
        await asyncio.sleep(3600)

    await wrapper.context.stream_widget(states())
    return "never"


@function_tool
async def rest(wrapper: Context) -> str:
    """Never come back."""
    await wrapper.context.stream(ProgressUpdateEvent(text="Resting"))
    await asyncio.sleep(3600)
    return "never"


@function_tool
def block(seconds: float) -> str:
    """Do something that takes so long, on a thread that nobody can stop."""
    time.sleep(seconds)
    return "done at last"


@function_tool(failure_error_function=None)
async def refuse() -> str:
    """End the turn in the words of the tool's author."""
    raise CustomStreamError("It is sold out.", allow_retry=False)


@function_tool
async def whisper_half_a_letter(wrapper: Context) -> str:
    """Open a hidden item that can be neither sent nor stored, and never close it."""
    context = wrapper.context
    item = HiddenContextItem(
        id=context.generate_id("message"), thread_id=context.thread.id, created_at=datetime.now(UTC), content="\ud83d"
    )
    await context.stream(ThreadItemAddedEvent(item=item))
    await asyncio.sleep(3600)
    return "never"


@function_tool
async def show_notes(wrapper: Context, text: str) -> str:
    """Show a widget that is one and the same in all of the thread."""
    thread_id = wrapper.context.thread.id
    item = WidgetItem(
        id=f"notes_of_{thread_id}",
        thread_id=thread_id,
        created_at=datetime.now(UTC),
        widget=Card(children=[Text(value=text)]),
    )
    await wrapper.context.stream(ThreadItemDoneEvent(item=item))
    return "shown"


@function_tool
async def remove_newest(wrapper: Context) -> str:
    """Take the thread's newest item away."""
    context = wrapper.context
    newest = await context.store.load_thread_items(context.thread.id, None, 1, "desc", context.request_context)
    await context.stream(ThreadItemRemovedEvent(item_id=newest.data[0].id))
    return "removed"


@function_tool
async def work(wrapper: Context) -> str:
    """Work through a workflow of two tasks."""
    context = wrapper.context
    await context.start_workflow(Workflow(type="custom", tasks=[]))
    await context.add_workflow_task(CustomTask(title="One", status_indicator="loading"))
    await context.update_workflow_task(CustomTask(title="One", status_indicator="complete"), 0)
    await context.add_workflow_task(CustomTask(title="Two", status_indicator="loading"))
    return "worked"


@function_tool
async def pick_file(wrapper: Context) -> str:
    """Ask the client for a file."""
    wrapper.context.client_tool_call = ClientToolCall(name="pick_file", arguments={"folder": "/docs"})
    return "asked"


@function_tool
async def choose_file(wrapper: Context) -> str:
    """Ask the client for a file, by a tool of another name."""
    wrapper.context.client_tool_call = ClientToolCall(name="open_dialog", arguments={})
    return "asked by another name"


@function_tool
async def ask_form(wrapper: Context) -> str:
    """Ask the user two questions."""
    context = wrapper.context
    questions = StructuredInputItem(
        id=context.generate_id("message"),
        thread_id=context.thread.id,
        created_at=datetime.now(UTC),
        inputs=[
            StructuredInputMultipleChoice(id="q1", question="Colour?", options=[{"value": "red"}, {"value": "blue"}]),
            StructuredInputFreeform(id="q2", question="Why?"),
        ],
    )
    await context.stream(ThreadItemDoneEvent(item=questions))
    return "asked"


@function_tool
async def whisper(wrapper: Context) -> str:
    """Put hidden items on the stream in every way there is."""
    context = wrapper.context
    item = HiddenContextItem(
        id=context.generate_id("message"),
        thread_id=context.thread.id,
        created_at=datetime.now(),
        content={"secret": "hidden words"},
    )
    for event in (ThreadItemAddedEvent, ThreadItemDoneEvent, ThreadItemReplacedEvent):
        await context.stream(event(item=item))
    return "whispered"


@function_tool
async def rename(wrapper: Context, title: str) -> str:
    """Give the thread a title."""
    wrapper.context.thread.title = title
    return "renamed"


@function_tool
async def lock(wrapper: Context, kind: str) -> str:
    """Lock or close the thread."""
    status = LockedStatus(reason="Locked by the test.") if kind == "locked" else ClosedStatus(reason="Closed by it.")
    wrapper.context.thread.status = status
    return "done"


@function_tool(failure_error_function=None)
async def explode() -> str:
    """Fail with a user's words in the exception."""
    raise RuntimeError("a tool's exception with SENTINEL words")


@function_tool(needs_approval=True)
async def wipe() -> str:
    """Do what somebody should have agreed to."""
    raise AssertionError("nobody has agreed")


@input_guardrail
async def no_swearing(context: Any, agent: Any, input: Any) -> GuardrailFunctionOutput:
    return GuardrailFunctionOutput(None, tripwire_triggered="forbidden" in str(input))


@function_tool
async def who_am_i(wrapper: Context) -> str:
    """Say what is known of the user."""
    context = wrapper.context.request_context
    return f"{context.user_id} {context.locale} {dict(context.claims)}"


TOOLS = [
    choose_file,
    block,
    who_am_i,
    look_up,
    consult,
    say_half_a_letter,
    show_widget,
    show_slow_widget,
    show_half_a_widget,
    show_notes,
    remove_newest,
    rest,
    whisper_half_a_letter,
    work,
    pick_file,
    ask_form,
    whisper,
    rename,
    lock,
    explode,
    wipe,
    refuse,
]


def create_agent(context: RequestContext) -> Agent[AgentContext[RequestContext]] | None:
    if context.locale == "x-none":
        return None
    if context.locale == "x-broken":
        raise RuntimeError("SENTINEL")
    return Agent(
        name="Probe",
        instructions="Test.",
        model="stand-in",
        tools=TOOLS,
        tool_use_behavior=StopAtTools(stop_at_tool_names=["pick_file", "ask_form"]),
        input_guardrails=[no_swearing],
    )


async def handle_action(
    thread: Any, action: Any, sender: WidgetItem | None, agent_context: AgentContext[RequestContext]
) -> AsyncIterator[ThreadStreamEvent]:
    if action.type == "ask":  # as ChatKit's documentation has it
        run = Runner.run_streamed(create_agent(agent_context.request_context), "pressed", context=agent_context)
        async for event in stream_agent_response(agent_context, run):
            yield event
        return
    if action.type == "look":
        await agent_context.store.load_item(thread.id, "msg_missing", agent_context.request_context)
    await agent_context.stream_widget(Card(children=[Text(value=f"new: {action.type}")]))
    if sender is not None:
        changed = sender.model_copy(update={"widget": Card(children=[Text(value=f"did {action.type}")])})
        yield ThreadItemReplacedEvent(item=changed)


async def handle_sync_action(
    thread: Any, action: Any, sender: WidgetItem | None, agent_context: AgentContext[RequestContext]
) -> SyncCustomActionResponse | None:
    if action.type == "nothing":
        return None
    if action.type == "refuse":
        raise CustomStreamError("It is sold out.")
    if action.type == "hide":
        hidden = HiddenContextItem(
            id="hidden", thread_id=thread.id, created_at=datetime.now(UTC), content="hidden words"
        )
        return SyncCustomActionResponse(updated_item=hidden)
    if sender is None:
        return None
    now = datetime.now()  # as an author may write it
    changed = sender.model_copy(update={"copy_text": action.type, "created_at": now})
    return SyncCustomActionResponse(updated_item=changed)
