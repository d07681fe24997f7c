"""The agent's stand-in model when none is configured: it needs no key, and all that comes after it is the real path."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from agents import Model, ModelProvider, ModelResponse, Usage
from agents.items import TResponseInputItem, TResponseStreamEvent
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseContentPartAddedEvent,
    ResponseContentPartDoneEvent,
    ResponseCreatedEvent,
    ResponseOutputItemAddedEvent,
    ResponseOutputItemDoneEvent,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseTextDeltaEvent,
    ResponseTextDoneEvent,
    ResponseUsage,
)
from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails

from conversations import new_id

WORD_SECONDS = 0.02
SLOW_WORD_SECONDS = 0.25

GREETING = """\
**No model is configured**, so this is the offline demo. To talk to a real one, set `OPENAI_API_KEY`, or \
`OPENAI_BASE_URL` for a compatible server such as Ollama, and start the service again.

Everything between this text and your browser is the real path: it is *streamed*, stored, and there after a restart.

| Say | and see |
| --- | --- |
| `slow` | an answer that takes its time, to be stopped |

```python
print("Your own agent goes into agent.py")
```
"""
SLOW = "This answer takes its time. Press Stop when you have seen enough. " + "One word follows another. " * 40


class DemoProvider(ModelProvider):
    """Every name is the demo's."""

    def get_model(self, model_name: str | None) -> Model:
        return DemoModel()


class DemoModel(Model):
    """Answers with a text chosen by the words of the last message."""

    model = "demo"

    async def get_response(self, system_instructions: str | None, input: Any, *args: Any, **kwargs: Any) -> Any:
        answer, _ = _answer(input)
        message = _message(answer, "completed")
        return ModelResponse(output=[message], usage=Usage(requests=1), response_id=None)

    async def stream_response(
        self, system_instructions: str | None, input: str | list[TResponseInputItem], *args: Any, **kwargs: Any
    ) -> AsyncIterator[TResponseStreamEvent]:
        answer, word_seconds = _answer(input)
        numbers = iter(range(10_000_000))
        message, part = _message("", "in_progress"), ResponseOutputText(type="output_text", text="", annotations=[])
        at: dict[str, Any] = {"item_id": message.id, "output_index": 0, "content_index": 0}
        yield ResponseCreatedEvent(type="response.created", response=_response([]), sequence_number=next(numbers))
        yield ResponseOutputItemAddedEvent(
            type="response.output_item.added", item=message, output_index=0, sequence_number=next(numbers)
        )
        yield ResponseContentPartAddedEvent(
            type="response.content_part.added", part=part, sequence_number=next(numbers), **at
        )
        for word in answer.split(" "):
            await asyncio.sleep(word_seconds)
            part.text += f" {word}" if part.text else word
            delta = part.text[-len(word) - 1 :]
            yield ResponseTextDeltaEvent(
                type="response.output_text.delta", delta=delta, logprobs=[], sequence_number=next(numbers), **at
            )
        yield ResponseTextDoneEvent(
            type="response.output_text.done", text=answer, logprobs=[], sequence_number=next(numbers), **at
        )
        yield ResponseContentPartDoneEvent(
            type="response.content_part.done", part=part, sequence_number=next(numbers), **at
        )
        done = message.model_copy(update={"content": [part], "status": "completed"})
        yield ResponseOutputItemDoneEvent(
            type="response.output_item.done", item=done, output_index=0, sequence_number=next(numbers)
        )
        yield ResponseCompletedEvent(
            type="response.completed", response=_response([done]), sequence_number=next(numbers)
        )


def _answer(input: str | list[TResponseInputItem]) -> tuple[str, float]:
    """Return what to say, and the seconds to take over each word of it."""
    said = _last_words(input).lower()
    if "slow" in said:
        return SLOW, SLOW_WORD_SECONDS
    return GREETING, WORD_SECONDS


def _last_words(input: str | list[TResponseInputItem]) -> str:
    if isinstance(input, str):
        return input
    for item in reversed(input):
        if isinstance(item, dict) and item.get("role") == "user":
            content: Any = item.get("content")
            if isinstance(content, str):
                return content
            return " ".join(part.get("text", "") for part in content)
    return ""


def _message(text: str, status: Any) -> ResponseOutputMessage:
    content = [ResponseOutputText(type="output_text", text=text, annotations=[])] if text else []
    return ResponseOutputMessage(
        id=new_id("message"), type="message", role="assistant", status=status, content=list(content)
    )


def _response(output: list[Any]) -> Response:
    return Response(
        id="resp_demo",
        object="response",
        created_at=time.time(),
        model="demo",
        output=output,
        parallel_tool_calls=False,
        tool_choice="auto",
        tools=[],
        usage=ResponseUsage(
            input_tokens=0,
            output_tokens=0,
            total_tokens=0,
            input_tokens_details=InputTokensDetails.model_construct(cached_tokens=0),
            output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
        ),
    )
