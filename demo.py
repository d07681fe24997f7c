"""The model that answers when none is configured: it needs no key, and all that comes after it is the real path.

What it says is chosen by the words of the last message; `tour.py` has the tools that it calls.
"""

import asyncio
import base64
import json
import re
import struct
import time
import zlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import count, cycle
from typing import Any

from agents import Model, ModelProvider, ModelResponse, Tool, Usage
from agents.items import TResponseInputItem, TResponseStreamEvent
from chatkit.errors import CustomStreamError
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from conversations import new_id

WORD_SECONDS = 0.02
SLOW_WORD_SECONDS = 0.25


@dataclass(frozen=True)
class Say:
    """Stream a text."""

    text: str
    word_seconds: float = WORD_SECONDS
    source: str | None = None
    """The address of a page that the text is said to stand on."""


@dataclass(frozen=True)
class Think:
    """Show a summary of reasoning."""

    text: str


@dataclass(frozen=True)
class Call:
    """Call one of the tour's tools."""

    tool: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Paint:
    """Generate an image."""


Move = Say | Think | Call | Paint

GREETING = Say("""\
**No model is configured**, so this is the offline demo. To talk to a real one, set `OPENAI_API_KEY`, or \
`OPENAI_BASE_URL` for a compatible server such as Ollama, and start the service again.

Everything between this text and your browser is the real path: it is *streamed*, stored, and there after a restart. \
Ask for any of these, in your own words:

| Say | and see |
| --- | --- |
| think | reasoning that grows |
| work | a workflow with tasks and progress |
| widget | a widget whose button changes it |
| page | a tool that your page runs |
| form | questions as a form |
| sources | text with its sources |
| picture | a generated image |
| notice | a notice |
| error | an error that can be tried again |
| slow | an answer that takes its time, to be stopped |

```python
print("Your own agent goes into agent.py")
```
""")

TOPICS: dict[str, tuple[Move, ...]] = {
    r"slow|slowly|long": (
        Say(
            "This answer takes its time. Press Stop when you have seen enough. " + "One word after another. " * 40,
            SLOW_WORD_SECONDS,
        ),
    ),
    r"think|reason": (
        Think("**Weighing the question**\n\nThe user wants to see reasoning, so some of it should be shown."),
        Think("**Deciding**\n\nA short answer will do."),
        Say("I have thought about it. What you see above is a summary of it, and it stays there."),
    ),
    r"work|workflow|task|step|progress": (Call("demo_work"), Say("Done: both tasks are complete.")),
    r"widget|button|card": (
        Call("demo_widget"),
        Say("Press the button: its action goes to the server, which answers with the changed widget."),
    ),
    r"page|client|clock|time": (Call("demo_page_tool"), Say("Your page has answered: {output}")),
    r"form|question|ask me": (Call("demo_form"), Say("Thank you. What you answered reached the model.")),
    r"source|cite|citation|annotation": (
        Say(
            "ChatKit is a chat panel that its users' servers can answer for themselves.",
            source="https://platform.openai.com/docs/guides/chatkit",
        ),
    ),
    r"picture|image|paint|draw": (Paint(), Say("It was generated, and is kept as an attachment of this conversation.")),
    r"notice|warn": (Call("demo_notice"), Say("There was a notice above.")),
}
"""What to do when the last message has a word like these, first come first served."""

ERROR = r"error|fail|failure|crash"


def _has_word(words: str, said: str) -> bool:
    """Whether one of the words is said, in any of its forms, and not as a part of another: no form in "information"."""
    return re.search(rf"\b(?:{words})(?:s|es|ed|ing)?\b", said) is not None


class DemoProvider(ModelProvider):
    """Every name is the demo's."""

    def get_model(self, model_name: str | None) -> Model:
        return DemoModel()


class DemoModel(Model):
    """Makes the first of a topic's moves, and the others after its tool has returned."""

    model = "demo"
    _failing = cycle([True, False])

    async def get_response(self, system_instructions: str | None, input: Any, *args: Any, **kwargs: Any) -> Any:
        [*_, completed] = [event async for event in self.stream_response(system_instructions, input, *args, **kwargs)]
        response: Any = completed
        return ModelResponse(output=response.response.output, usage=Usage(requests=1), response_id=None)

    async def stream_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],
        model_settings: Any,
        tools: Sequence[Tool],
        *args: Any,
        **kwargs: Any,
    ) -> AsyncIterator[TResponseStreamEvent]:
        said, output = _last(input)
        if _has_word(ERROR, said) and next(self._failing):
            raise CustomStreamError("This error was asked for. Trying again helps.", allow_retry=True)
        response = _Responding()
        yield response.event("response.created", response=response.snapshot())
        for move in _moves(said, output, {tool.name for tool in tools}):
            async for event in response.make(move):
                yield event
        yield response.event("response.completed", response=response.snapshot())


def _last(input: str | list[TResponseInputItem]) -> tuple[str, str | None]:
    """Return the last message's words, and the output of the tool that was called since, if one was."""
    items: list[Any] = [{"role": "user", "content": input}] if isinstance(input, str) else list(input)
    output = None
    for item in reversed(items):
        if item.get("type") == "function_call_output" and output is None:
            output = str(item["output"])
        content = item.get("content")
        if item.get("role") == "user" and isinstance(content, str):
            return content.lower(), output
        if item.get("role") == "user" and not _is_context(content):
            return " ".join(part.get("text", "") for part in content).lower(), output
        if item.get("role") == "user" and output is None:
            output = ""  # an answered form, in words
    return "", output


def _is_context(content: list[dict[str, Any]]) -> bool:
    """Whether ChatKit put the message between the user's, to tell the model what the user saw or did."""
    beginnings = ("A structured input", "Hidden context", "The following", "A message was", "# User-provided")
    return any(part.get("text", "").startswith(beginnings) for part in content)


def _moves(said: str, output: str | None, tools: set[str]) -> list[Move]:
    for words, moves in TOPICS.items():
        if _has_word(words, said):
            call = next((move for move in moves if isinstance(move, Call)), None)
            if call is None:
                return list(moves)
            if output is None and call.tool in tools:
                return [call]
            last = moves[-1]
            assert isinstance(last, Say)
            return [Say(last.text.format(output=output))]
    return [Say("It worked this time.")] if _has_word(ERROR, said) else [GREETING]


_event = TypeAdapter[ResponseStreamEvent](ResponseStreamEvent)


class _Responding:
    """One response of the Responses API, in the making."""

    def __init__(self) -> None:
        self._numbers = count()
        self._output: list[dict[str, Any]] = []

    def event(self, type: str, **fields: Any) -> TResponseStreamEvent:
        return _event.validate_python({"type": type, "sequence_number": next(self._numbers), **fields})

    def snapshot(self) -> dict[str, Any]:
        response = Response.model_construct(
            id="resp_demo",
            object="response",
            created_at=time.time(),
            model="demo",
            output=self._output,
            parallel_tool_calls=False,
            tool_choice="auto",
            tools=[],
        )
        return response.model_dump(warnings=False)

    async def make(self, move: Move) -> AsyncIterator[TResponseStreamEvent]:
        match move:
            case Say():
                made = self._say(move)
            case Think():
                made = self._think(move)
            case Call():
                made = self._call(move)
            case Paint():
                made = self._paint()
        async for event in made:
            yield event

    def _begin(self, item: dict[str, Any]) -> TResponseStreamEvent:
        return self.event("response.output_item.added", output_index=len(self._output), item=item)

    def _end(self, item: dict[str, Any]) -> TResponseStreamEvent:
        self._output.append(item)
        return self.event("response.output_item.done", output_index=len(self._output) - 1, item=item)

    async def _say(self, say: Say) -> AsyncIterator[TResponseStreamEvent]:
        item = {"type": "message", "id": new_id("message"), "role": "assistant", "status": "completed", "content": []}
        part = {"type": "output_text", "text": "", "annotations": []}
        at = {"item_id": item["id"], "output_index": len(self._output), "content_index": 0}
        yield self._begin(item)
        yield self.event("response.content_part.added", part=part, **at)
        for place, word in enumerate(say.text.split(" ")):
            await asyncio.sleep(say.word_seconds)
            delta = word if place == 0 else f" {word}"
            yield self.event("response.output_text.delta", delta=delta, logprobs=[], **at)
        annotations = [_citation(say)] if say.source else []
        yield self.event("response.output_text.done", text=say.text, logprobs=[], **at)
        for number, annotation in enumerate(annotations):
            yield self.event(
                "response.output_text.annotation.added", annotation=annotation, annotation_index=number, **at
            )
        yield self._end({**item, "content": [{**part, "text": say.text, "annotations": annotations}]})

    async def _think(self, think: Think) -> AsyncIterator[TResponseStreamEvent]:
        item: dict[str, Any] = {"type": "reasoning", "id": new_id("task"), "summary": []}
        at = {"item_id": item["id"], "output_index": len(self._output), "summary_index": 0}
        yield self._begin(item)
        for word in re.findall(r"\S+\s*", think.text):
            await asyncio.sleep(2 * WORD_SECONDS)
            yield self.event("response.reasoning_summary_text.delta", delta=word, **at)
        yield self.event("response.reasoning_summary_text.done", text=think.text, **at)
        yield self._end({**item, "summary": [{"type": "summary_text", "text": think.text}]})

    async def _call(self, call: Call) -> AsyncIterator[TResponseStreamEvent]:
        item = {
            "type": "function_call",
            "id": new_id("tool_call"),
            "call_id": new_id("tool_call"),
            "name": call.tool,
            "arguments": json.dumps(call.arguments),
            "status": "completed",
        }
        yield self._begin({**item, "arguments": ""})
        yield self._end(item)

    async def _paint(self) -> AsyncIterator[TResponseStreamEvent]:
        item = {"type": "image_generation_call", "id": new_id("task"), "status": "generating", "result": None}
        at = {"item_id": item["id"], "output_index": len(self._output)}
        yield self._begin(item)
        for number, lines in enumerate((40, 80)):
            await asyncio.sleep(0.4)
            yield self.event(
                "response.image_generation_call.partial_image",
                partial_image_b64=base64.b64encode(_sunset(lines)).decode(),
                partial_image_index=number,
                **at,
            )
        await asyncio.sleep(0.4)
        yield self._end({**item, "status": "completed", "result": base64.b64encode(_sunset(120)).decode()})


def _citation(say: Say) -> dict[str, Any]:
    title = "ChatKit's documentation"
    return {"type": "url_citation", "url": say.source, "title": title, "start_index": 0, "end_index": len(say.text)}


def _sunset(lines: int, width: int = 200, height: int = 120) -> bytes:
    """Return a PNG of which so many lines are painted (PNG specification, §5 and §11.2)."""

    def pixel(x: int, y: int) -> tuple[int, int, int]:
        if y >= lines:
            return 32, 32, 48
        if (x - width // 2) ** 2 + (y - 70) ** 2 < 30**2 and y < 85:
            return 255, 220, 120
        return (40 + y, 40 + y // 2, 110 - y // 3) if y < 85 else (20, 30 + (120 - y), 70 + x % 7)

    rows = b"".join(b"\0" + bytes(part for x in range(width) for part in pixel(x, y)) for y in range(height))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
