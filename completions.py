"""Answers of servers of the Chat Completions API, as the Agents SDK (0.24) reads those of OpenAI's."""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import httpx2
from openai import APIConnectionError, APIError, AsyncStream
from openai.types.chat import ChatCompletionChunk
from openai.types.chat.chat_completion_chunk import ChoiceDeltaToolCall

from conversations import new_id

CUT_OFF = {
    "length": "max_output_tokens",
    "model_length": "max_output_tokens",  # Mistral
    "content_filter": "content_filter",
    "insufficient_system_resource": "rate_limit_exceeded",  # DeepSeek
    "error": "server_error",  # OpenRouter, Mistral
    "abort": "server_error",  # vLLM, SGLang
}
"""Why servers end an answer in the middle, and the Responses API's word for it."""


def require_whole(answer: AsyncStream[ChatCompletionChunk]) -> None:
    """Have the answer raise, while it is read, where it ends in the middle.

    The Agents SDK takes an answer for whole whose connection was closed in it, and would run a tool whose arguments
    are not all there; of the reasons to end one it knows OpenAI's two, and says nothing of those once a word was said.
    """
    reading: Any = answer
    reading._iterator = _whole(answer, reading._iterator)


async def _whole(answer: Any, chunks: AsyncGenerator[ChatCompletionChunk, None]) -> AsyncIterator[ChatCompletionChunk]:
    request, calls, events = answer.response.request, _Calls(), answer._iter_events
    ended = begun = False

    async def noting_the_end() -> AsyncIterator[Any]:
        nonlocal ended
        async for event in events():
            ended = ended or event.data.startswith("[DONE]")
            if event.data:  # or it is none, as "retry: 1000" for itself
                yield event

    answer._iter_events = noting_the_end
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                begun = True
                for choice in chunk.choices:
                    if choice.delta is not None and choice.delta.tool_calls:
                        calls.tell_apart(choice.delta.tool_calls)
                yield chunk  # the last one may have words, too
                for choice in chunk.choices:
                    ended = ended or choice.finish_reason is not None
                    if choice.index == 0 and choice.finish_reason in CUT_OFF:
                        raise APIError("cut off", request, body={"code": CUT_OFF[choice.finish_reason]})
    except ValueError as error:  # neither JSON nor UTF-8
        raise APIError("unreadable", request, body=None) from error
    if not begun:  # a page, or an error with status 200
        raise APIError("no answer", request, body=None)
    if not ended:
        raise APIConnectionError(message="no end", request=request)


class _Calls:
    """An answer's tool calls: Ollama and Gemini give all of them one index, and some servers none of them an id."""

    def __init__(self) -> None:
        self._open: dict[int | None, tuple[int, str]] = {}
        self._count = 0

    def tell_apart(self, calls: list[ChoiceDeltaToolCall]) -> None:
        for call in calls:
            named = call.function is not None and bool(call.function.name)
            if call.index not in self._open or (named and call.id and call.id != self._open[call.index][1]):
                self._open[call.index] = self._count, call.id or new_id("tool_call")
                self._count += 1
                call.id = self._open[call.index][1]
            call.index = self._open[call.index][0]


def readable(data: Any, response: httpx2.Response) -> dict[str, Any]:
    """Return a chunk that is not OpenAI's as one that can be read; raise where it tells of an error."""
    match data:
        case {"choices": list(choices)}:
            return {**data, "choices": [_readable_choice(choice) for choice in choices if isinstance(choice, dict)]}
        case {"message": _} | {"detail": _}:  # as vLLM and FastAPI do
            raise APIError("an error", response.request, body=data)
        case dict():
            return {**data, "choices": []}
    raise APIError("unreadable", response.request, body=None)


def _readable_choice(choice: dict[str, Any]) -> dict[str, Any]:
    choice = {"index": 0, **choice}
    delta = choice.get("delta")
    if isinstance(delta, dict):
        delta = choice["delta"] = dict(delta)
        if isinstance(parts := delta.get("content"), list):  # as Mistral's models that think do
            delta["content"] = _text(parts) or None
            if thoughts := _text([each for part in parts for each in _thoughts(part)]):
                delta["reasoning_content"] = thoughts
        if isinstance(calls := delta.get("tool_calls"), list):
            delta["tool_calls"] = [_readable_call(call) for call in calls]
    return choice


def _thoughts(part: Any) -> list[Any]:
    thoughts = part.get("thinking") if isinstance(part, dict) else None
    return thoughts if isinstance(thoughts, list) else []


def _text(parts: list[Any]) -> str:
    return "".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))


def _readable_call(call: Any) -> Any:
    match call:
        case {"function": {"arguments": dict(arguments)}}:
            return {"index": None, **call, "function": {**call["function"], "arguments": json.dumps(arguments)}}
        case dict():
            return {"index": None, **call}
    return call
