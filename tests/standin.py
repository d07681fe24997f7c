"""A stand-in for OpenAI's API: real HTTP, streaming, scripted; it remembers what it was asked."""

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from service import serving


@dataclass(frozen=True)
class Say:
    """Stream this text, a delta for each word, `gap` seconds apart; where it `breaks`, cut the connection inside.

    `source` is the address of a page that it cites.
    """

    text: str
    gap: float = 0.0
    breaks: bool = False
    source: str | None = None


@dataclass(frozen=True)
class Echo:
    """Say what the user said last, `gap` seconds between words."""

    gap: float = 0.0


@dataclass(frozen=True)
class Begin:
    """Stream this text as the beginning of a message that has no end."""

    text: str


@dataclass(frozen=True)
class Wait:
    """Send nothing for so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Call:
    """Call a tool."""

    tool: str
    arguments: dict[str, Any] | str = field(default_factory=dict)
    """As text: as it is, JSON or not."""
    call_id: str = "call_1"

    @property
    def written(self) -> str:
        return self.arguments if isinstance(self.arguments, str) else json.dumps(self.arguments)


@dataclass(frozen=True)
class Reason:
    """Stream a summary of reasoning; without words there is none."""

    text: str


@dataclass(frozen=True)
class Refuse:
    """Refuse to answer, in these words."""

    text: str


@dataclass(frozen=True)
class Hang:
    """Send nothing more."""


@dataclass(frozen=True)
class Break:
    """Cut the connection."""


@dataclass(frozen=True)
class Garbage:
    """Send what is no event."""


@dataclass(frozen=True)
class Raw:
    """Send these bytes, and nothing behind them."""

    data: bytes


@dataclass(frozen=True)
class Fail:
    """Answer with a status and an error in OpenAI's form, before anything is streamed."""

    status: int
    code: str | None = None
    message: str = "the provider's own words"


@dataclass(frozen=True)
class FailLater:
    """Stream an error event with this code."""

    code: str


@dataclass(frozen=True)
class CutOff:
    """End the answer for this reason of the Responses API's, before it is whole, with these as the last words."""

    reason: str
    words: str


Step = Say | Echo | Begin | Wait | Call | Reason | Refuse | Hang | Break | Garbage | Raw | Fail | FailLater | CutOff


@dataclass
class Asked:
    """A request that arrived, and how it ended: `open`, `answered` or `cut` (by the client)."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    steps: list[Step] = field(default_factory=list)
    ended: str = "open"
    said_at: list[float] = field(default_factory=list)
    """When each word of a `Say` with a gap was sent, in `time.monotonic()`."""


class StandIn:
    """Answers with the steps given by `will`, in turn, and then by the first word, or with `otherwise`."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[Asked] = []
        self.otherwise: list[Step] = [Say("Hello from the stand-in.")]
        self.by_first_word: dict[str, list[Step]] = {}
        """What answers a message that begins so; `otherwise` answers what its tools return."""
        self.title: str | Hang | Fail | Wait = "A title"
        self.asked_for_titles: list[Asked] = []
        self.heard = b""
        self.transcript: bytes | None = None
        """What the audio API answers, in place of how much it heard."""
        self.fails: Fail | None = None
        self._scripts: deque[list[Step]] = deque()
        self._numbers = count(1)

    def will(self, *steps: Step) -> None:
        """Answer the next request with these steps."""
        self._scripts.append(list(steps))

    def reset(self) -> None:
        self.asked.clear()
        self._scripts.clear()
        self.otherwise = [Say("Hello from the stand-in.")]
        self.by_first_word = {}
        self.title = "A title"
        self.fails = self.transcript = None
        self.asked_for_titles.clear()

    @property
    def open_requests(self) -> list[Asked]:
        return [each for each in self.asked if each.ended == "open"]

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/responses", self._answer, methods=["POST"]),
                Route("/v1/chat/completions", self._answer, methods=["POST"]),
                Route("/v1/audio/transcriptions", self._transcribe, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{name}", self._model),
            ]
        )

    async def _answer(self, request: Request) -> Response:
        asked = Asked(request.url.path, await request.json(), dict(request.headers))
        if _asks_for_a_title(asked.body):
            return await self._title(asked)
        self.asked.append(asked)
        steps = asked.steps = self._steps_for(asked.body)
        wire = _Responses(next(self._numbers)) if asked.path == "/v1/responses" else _ChatCompletions(asked.body)
        if error := wire.objection(asked.body):
            asked.ended = "answered"
            return _failure(Fail(400, "invalid_value", error))
        if isinstance(steps[0], Fail):
            asked.ended = "answered"
            return _failure(steps[0])
        if not asked.body.get("stream"):
            asked.ended = "answered"
            return JSONResponse(wire.whole(steps))
        return _Answer(asked, self._stream(asked, wire, steps))

    def _steps_for(self, body: dict[str, Any]) -> list[Step]:
        if self._scripts:
            return self._scripts.popleft()
        [*_, last] = body.get("input") or body.get("messages") or [{}]
        first_word = _last_words(body).partition(" ")[0] if self.by_first_word and last.get("role") == "user" else ""
        return self.by_first_word.get(first_word, self.otherwise)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "stand-in"}, {"id": "other"}]})

    async def _model(self, request: Request) -> Response:
        """An alias is a model that no list has, as Ollama's `qwen3` for `qwen3:latest`."""
        name = request.path_params["name"]
        return JSONResponse({"id": name}) if name == "alias" else _failure(Fail(404, "model_not_found", "none"))

    async def _transcribe(self, request: Request) -> Response:
        async with request.form() as form:
            audio: Any = form["file"]
            self.heard = await audio.read()
            asked = {"model": form["model"], "name": audio.filename, "type": audio.content_type}
        self.asked.append(Asked(request.url.path, asked, dict(request.headers), "answered"))
        if self.fails:
            return _failure(self.fails)
        if self.transcript is not None:
            return Response(self.transcript, media_type="application/json")
        return JSONResponse({"text": f"I heard {len(self.heard)} bytes."})

    async def _title(self, asked: Asked) -> Response:
        self.asked_for_titles.append(asked)
        if isinstance(self.title, Hang):
            await asyncio.sleep(3600)
        if isinstance(self.title, Wait):
            await asyncio.sleep(self.title.seconds)
        if isinstance(self.title, Fail):
            return _failure(self.title)
        wire = _Responses(0) if asked.path == "/v1/responses" else _ChatCompletions(asked.body)
        return JSONResponse(wire.whole([Say("A title" if isinstance(self.title, Wait) else self.title)]))

    async def _stream(self, asked: Asked, wire: "_Wire", steps: Iterable[Step]) -> AsyncIterator[bytes]:
        for chunk in wire.begin():
            yield chunk
        for step in steps:
            match step:
                case Hang():
                    await asyncio.sleep(3600)
                case Wait(seconds=seconds):
                    await asyncio.sleep(seconds)
                case Break():
                    raise ConnectionResetError
                case Garbage():
                    yield b"data: {this is no JSON\n\n"
                    return
                case Raw(data=data):
                    yield data
                    return
                case Say() | Echo():
                    said = step if isinstance(step, Say) else Say(_last_words(asked.body))
                    for chunk in wire.step(said):
                        if said.breaks and b'"response.output_text.done"' in chunk:
                            raise ConnectionResetError
                        yield chunk
                        if step.gap:
                            asked.said_at.append(time.monotonic())
                            await asyncio.sleep(step.gap)
                case _:
                    for chunk in wire.step(step):
                        yield chunk
        for chunk in wire.end():
            yield chunk
        asked.ended = "answered"


class _Answer(StreamingResponse):
    """A stream that knows afterwards whether it was cut, even where it was before its first byte."""

    def __init__(self, asked: Asked, chunks: AsyncIterator[bytes]):
        super().__init__(chunks, media_type="text/event-stream")
        self._asked = asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._asked.ended == "open":
                self._asked.ended = "cut"


@contextmanager
def standing_in() -> Iterator[StandIn]:
    """Serve a stand-in on a port of its own."""
    stand_in = StandIn()
    with serving(stand_in.app()) as url:
        stand_in.url = f"{url}/v1"
        yield stand_in


def _asks_for_a_title(body: dict[str, Any]) -> bool:
    instructions = body.get("instructions") or (body.get("messages") or [{}])[0].get("content")
    return isinstance(instructions, str) and instructions.startswith("Write a title")


def _failure(fail: Fail) -> Response:
    body = {"error": {"message": fail.message, "type": "some_type", "code": fail.code, "param": None}}
    return JSONResponse(body, fail.status, headers={"x-should-retry": "false"})


def _words(text: str) -> list[str]:
    return [word if place == 0 else f" {word}" for place, word in enumerate(text.split(" "))]


def _is_object(arguments: str) -> bool:
    try:
        return isinstance(json.loads(arguments), dict)
    except ValueError:
        return False


def _last_words(body: dict[str, Any]) -> str:
    for item in reversed(body.get("input") or body.get("messages") or []):
        if item.get("role") == "user":
            content = item["content"]
            return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    return ""


class _Wire(Protocol):
    """How steps look in one of the two APIs."""

    def objection(self, body: dict[str, Any]) -> str | None:
        """What the real API would refuse of this request."""

    def whole(self, steps: Iterable[Step]) -> dict[str, Any]: ...

    def begin(self) -> Iterator[bytes]: ...

    def step(self, step: Step) -> Iterator[bytes]: ...

    def end(self) -> Iterator[bytes]: ...


class _Responses(_Wire):
    """The Responses API. Its item ids repeat on purpose: no client may rely on them."""

    def __init__(self, number: int):
        self._id = f"resp_{number}"
        self._numbers = count()
        self._output: list[dict[str, Any]] = []

    def objection(self, body: dict[str, Any]) -> str | None:
        calls, outputs = set(), set()
        for item in body["input"] if isinstance(body["input"], list) else []:
            if item.get("type") == "function_call":
                calls.add(item["call_id"])
                if not _is_object(item["arguments"]):
                    return "arguments must be a JSON object"
            if item.get("type") == "function_call_output":
                outputs.add(item["call_id"])
        return None if calls == outputs else f"calls and outputs do not match: {calls ^ outputs}"

    def _event(self, type: str, **fields: Any) -> bytes:
        body = {"type": type, "sequence_number": next(self._numbers), **fields}
        return f"event: {type}\ndata: {json.dumps(body)}\n\n".encode()

    def _response(self, status: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "response",
            "created_at": 0,
            "status": status,
            "model": "stand-in",
            "output": self._output,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "usage": None
            if status != "completed"
            else {
                "input_tokens": 7,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": 5,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": 12,
            },
        }

    def whole(self, steps: Iterable[Step]) -> dict[str, Any]:
        for step in steps:
            for _ in self.step(step):
                pass
        return self._response("completed")

    def begin(self) -> Iterator[bytes]:
        yield self._event("response.created", response=self._response("in_progress"))

    def end(self) -> Iterator[bytes]:
        yield self._event("response.completed", response=self._response("completed"))

    def step(self, step: Step) -> Iterator[bytes]:
        index = len(self._output)
        match step:
            case Say(text=text, source=source):
                yield from self._message(index, text, source)
            case Begin(text=text):
                yield from islice(self._message(index, text), 2 + len(_words(text)))
            case Refuse(text=text):
                content = [{"type": "refusal", "refusal": text}]
                yield from self._item(index, self._assistant(content), self._assistant([]))
            case Call(tool=tool, call_id=call_id):
                item = {
                    "type": "function_call",
                    "id": "fc_1",
                    "call_id": call_id,
                    "name": tool,
                    "arguments": step.written,
                    "status": "completed",
                }
                yield from self._item(index, item, {**item, "arguments": ""})
            case Reason(text=text):
                yield from self._reasoning(index, text)
            case CutOff(reason=reason, words=words):
                at = {"item_id": "msg_1", "output_index": index, "content_index": 0}
                delta = self._event("response.output_text.delta", delta=words, logprobs=[], **at)
                response = {**self._response("incomplete"), "incomplete_details": {"reason": reason}}
                yield delta + self._event("response.incomplete", response=response)
            case FailLater(code=code):
                yield self._event("error", code=code, message="the provider's own words", param=None)

    def _assistant(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": content}

    def _item(self, index: int, done: dict[str, Any], added: dict[str, Any]) -> Iterator[bytes]:
        yield self._event("response.output_item.added", output_index=index, item=added)
        self._output.append(done)
        yield self._event("response.output_item.done", output_index=index, item=done)

    def _message(self, index: int, text: str, source: str | None = None) -> Iterator[bytes]:
        at = {"item_id": "msg_1", "output_index": index, "content_index": 0}
        yield self._event("response.output_item.added", output_index=index, item=self._assistant([]))
        part = {"type": "output_text", "text": "", "annotations": []}
        yield self._event("response.content_part.added", part=part, **at)
        for word in _words(text):
            yield self._event("response.output_text.delta", delta=word, logprobs=[], **at)
        if source:
            citation = {"type": "url_citation", "url": source, "title": "A page", "start_index": 0, "end_index": 1}
            yield self._event("response.output_text.annotation.added", annotation=citation, annotation_index=0, **at)
            part = {**part, "annotations": [citation]}
        yield self._event("response.output_text.done", text=text, logprobs=[], **at)
        part = {**part, "text": text}
        yield self._event("response.content_part.done", part=part, **at)
        self._output.append(self._assistant([part]))
        yield self._event("response.output_item.done", output_index=index, item=self._output[-1])

    def _reasoning(self, index: int, text: str) -> Iterator[bytes]:
        item: dict[str, Any] = {"type": "reasoning", "id": "rs_1", "summary": []}
        at = {"item_id": "rs_1", "output_index": index, "summary_index": 0}
        yield self._event("response.output_item.added", output_index=index, item=item)
        part = {"type": "summary_text", "text": ""}
        if text:
            yield self._event("response.reasoning_summary_part.added", part=part, **at)
            for word in _words(text):
                yield self._event("response.reasoning_summary_text.delta", delta=word, **at)
            yield self._event("response.reasoning_summary_text.done", text=text, **at)
        self._output.append({**item, "summary": [{**part, "text": text}] if text else []})
        yield self._event("response.output_item.done", output_index=index, item=self._output[-1])


class _ChatCompletions(_Wire):
    """The Chat Completions API, as strict about an assistant's content as compatible servers are."""

    def __init__(self, body: dict[str, Any]):
        self._with_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        self._calls = count()
        self._finish = "stop"

    def objection(self, body: dict[str, Any]) -> str | None:
        calls, outputs = set(), set()
        for message in body["messages"]:
            if message["role"] == "assistant":
                if not isinstance(message.get("content"), str | None):
                    return "an assistant's content must be a string"
                if not message.get("content") and not message.get("tool_calls"):
                    return "an assistant's message must not be empty"
                calls |= {call["id"] for call in message.get("tool_calls") or []}
                if not all(_is_object(call["function"]["arguments"]) for call in message.get("tool_calls") or []):
                    return "arguments must be a JSON object"
            if message["role"] == "tool":
                outputs.add(message["tool_call_id"])
        return None if calls == outputs else f"calls and outputs do not match: {calls ^ outputs}"

    def _chunk(self, delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
        choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
        body = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "stand-in", "choices": choices}
        return f"data: {json.dumps({**body, **more})}\n\n".encode()

    def whole(self, steps: Iterable[Step]) -> dict[str, Any]:
        text = "".join(step.text for step in steps if isinstance(step, Say))
        message = {"role": "assistant", "content": text}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        return {"id": "c", "object": "chat.completion", "created": 0, "model": "stand-in", "choices": choices}

    def begin(self) -> Iterator[bytes]:
        yield self._chunk({"role": "assistant", "content": ""})

    def step(self, step: Step) -> Iterator[bytes]:
        match step:
            case Say(text=text) | Begin(text=text):
                for word in _words(text):
                    yield self._chunk({"content": word})
            case Refuse(text=text):
                yield self._chunk({"refusal": text})
            case Reason(text=text):
                for word in _words(text):
                    yield self._chunk({"reasoning_content": word})
            case Call(tool=tool, call_id=call_id):
                self._finish = "tool_calls"
                function = {"name": tool, "arguments": step.written}
                call = {"index": next(self._calls), "id": call_id, "type": "function", "function": function}
                yield self._chunk({"tool_calls": [call]})
            case CutOff(reason=reason, words=words):
                finish = "length" if reason == "max_output_tokens" else reason
                yield self._chunk({"content": words}, finish)
            case FailLater(code=code):
                yield f"data: {json.dumps({'error': {'message': 'own words', 'code': code}})}\n\n".encode()

    def end(self) -> Iterator[bytes]:
        yield self._chunk({}, self._finish)
        if self._with_usage:
            yield self._chunk({}, choices=[], usage={"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12})
        yield b"data: [DONE]\n\n"
