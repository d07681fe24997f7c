"""Where models come from: OpenAI, a compatible server, or the offline demo."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from copy import copy
from dataclasses import dataclass, replace
from operator import is_
from typing import Any

import httpx2
from agents import Agent, Model, ModelProvider, ModelSettings, OpenAIProvider, RunConfig, StreamEvent
from agents.models.default_models import gpt_5_reasoning_settings_required
from agents.models.openai_client_utils import is_official_openai_client
from agents.result import RunResultBase
from agents.run import CallModelData, ModelInputData
from openai import AsyncOpenAI, DefaultAsyncHttpx2Client

from considerate import ConsiderateStream, Turnstile
from conversations import Usage
from openaiclient import OpenAIClient
from sdk import mended
from telemetry import request_id

KEEPALIVE_SECONDS = 30.0


@dataclass(frozen=True)
class Upstream:
    """What answers: the models, and the client of the server that they are on; the demo has none."""

    models: ModelProvider
    client: AsyncOpenAI | None = None


@asynccontextmanager
async def open_upstream(
    *,
    api_key: str | None,
    base_url: str | None,
    default_model: str | None,
    api: str,
    max_connections: int,
    timeout_seconds: float,
) -> AsyncIterator[Upstream]:
    """Yield what answers. With neither key nor base URL it is the demo.

    Connecting and waiting for the first token may be tried twice more; a stream that broke off is not tried again.
    """
    if not (api_key or base_url):
        from demo import DemoProvider  # noqa: PLC0415 (75 ms and 4 MB that no service with a model needs)

        yield Upstream(DemoProvider())
        return
    turnstile = Turnstile()

    async def read_considerately(response: httpx2.Response) -> None:
        if isinstance(response.stream, httpx2.AsyncByteStream):
            response.stream = ConsiderateStream(response.stream, turnstile)

    http_client = DefaultAsyncHttpx2Client(
        limits=httpx2.Limits(
            max_connections=max_connections or None,
            max_keepalive_connections=max_connections or None,
            keepalive_expiry=KEEPALIVE_SECONDS,
        ),
        timeout=httpx2.Timeout(timeout_seconds, connect=10.0),
        event_hooks={"request": [_name_request], "response": [read_considerately]},
    )
    async with OpenAIClient(api_key=api_key or "none", base_url=base_url, http_client=http_client) as client:
        yield Upstream(_Provider(default_model, openai_client=client, use_responses=api == "responses"), client)


class _Provider(OpenAIProvider):
    """Knows the name of the model that agents without one of their own ask for.

    The Agents SDK (0.24) reads it in lower case, which servers of models such as `Qwen/Qwen3-8B` do not know.
    """

    def __init__(self, default_model: str | None, **options: Any):
        super().__init__(**options)
        self._default_model = default_model

    def get_model(self, model_name: str | None) -> Model:
        return super().get_model(model_name or self._default_model)


async def _name_request(request: httpx2.Request) -> None:
    """Let the model's server log the same id as we do."""
    if known := request_id():
        request.headers["x-request-id"] = known


def run_config(upstream: Upstream, *, api: str, store: bool, tracing: bool) -> RunConfig:
    """Return what is common to all runs.

    The Agents SDK (0.24) posts prompts and the provider's key to OpenAI's traces even with another base URL, and
    OpenAI keeps answers: neither happens unless asked for.
    """
    responses = api == "responses"
    sendable = _alternating if not responses else _sendable if store else _without_lost_reasoning
    takes_store = responses or (upstream.client is not None and is_official_openai_client(upstream.client))
    return RunConfig(
        model_provider=upstream.models,
        model_settings=ModelSettings(
            store=store if takes_store else None,  # other servers may refuse a word that they do not know
            include_usage=None if responses else True,
        ),
        tracing_disabled=not tracing,
        call_model_input_filter=sendable,
    )


def model_name(agent: Agent[Any], config: RunConfig) -> str:
    """Return the name of the model that a run with this config asks first."""
    model = config.model or agent.model
    if model is None or isinstance(model, str):
        model = config.model_provider.get_model(model)
    return str(getattr(model, "model", type(model).__name__))


def with_reasoning_kept(config: RunConfig, model: str) -> RunConfig:
    """Return the config that has a reasoning model hand its thoughts over, sealed, where OpenAI does not keep them.

    Without them it would think anew after each tool call. Other models refuse to be asked.
    """
    if config.call_model_input_filter is not _without_lost_reasoning or not gpt_5_reasoning_settings_required(model):
        return config
    settings = ModelSettings(response_include=["reasoning.encrypted_content"])
    changed = copy(config)  # where `replace` has the Agents SDK (0.24) look up the types of all fields, for 2 ms
    changed.model_settings = (config.model_settings or ModelSettings()).resolve(settings)
    return changed


def _without_lost_reasoning(data: CallModelData[Any]) -> ModelInputData:
    """Leave out reasoning that names what OpenAI does not keep: it would refuse the whole request."""
    sent = _sendable(data)
    sent.input = [item for item in sent.input if item.get("type") != "reasoning" or item.get("encrypted_content")]
    return sent


def _sendable(data: CallModelData[Any]) -> ModelInputData:
    """Mend texts, of tools' outputs say, that no request can carry, and calls that no server can read."""
    sent = [_with_an_object(item) for item in _mended(data.model_data.input)]
    return ModelInputData(input=sent, instructions=data.model_data.instructions)


def _alternating(data: CallModelData[Any]) -> ModelInputData:
    """Join what the user said in several messages: one that was not answered, say, and the next.

    The chat templates of Gemma's and Mistral's models refuse a conversation in which the roles do not alternate.
    """
    sent, joined = _sendable(data), list[Any]()
    item: Any
    for item in sent.input:
        before = joined[-1] if joined else {}
        if item.get("role") == "user" and before.get("role") == "user":
            joined[-1] = {**before, "content": [*_parts(before["content"]), *_parts(item["content"])]}
        else:
            joined.append(item)
    sent.input = joined
    return sent


def _parts(content: Any) -> list[Any]:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


def _with_an_object(item: Any) -> Any:
    """Put an empty object for arguments that are none, as small models write them: their error is the call's output.

    vLLM, llama.cpp and Ollama refuse a whole conversation for them, at once and in each later turn.
    """
    if item.get("type") != "function_call":
        return item
    with suppress(ValueError):
        if isinstance(json.loads(item["arguments"]), dict):
            return item
    return {**item, "arguments": "{}"}


def _mended(value: Any) -> Any:
    """Return the value with its texts mended; itself where there is nothing to mend, as a run holds it to its end."""
    match value:
        case str():
            return mended(value)
        case list():
            items = [_mended(each) for each in value]
            return value if all(map(is_, items, value)) else items
        case dict():
            fields = {name: _mended(each) for name, each in value.items()}
            return value if all(map(is_, fields.values(), value.values())) else fields
    return value


class Counted:
    """A run whose use can be told although its server does not count it, or not what was cut off.

    For `stream_agent_response`, which wants its events.
    """

    def __init__(self, run: Any):
        self._run = run
        self._letters = 0
        self._open_letters: int | None = None
        """Of the response that has begun and is not complete."""
        self._responses = 0

    async def stream_events(self) -> AsyncIterator[StreamEvent]:
        async for event in self._run.stream_events():
            if event.type == "raw_response_event":
                self._note(event.data)
            yield event

    def _note(self, data: Any) -> None:
        if self._open_letters is None:
            self._open_letters = 0
            self._responses += 1
        if data.type == "response.output_text.delta":
            self._letters += len(data.delta)
            self._open_letters += len(data.delta)
        elif data.type in ("response.completed", "response.incomplete"):
            self._open_letters = None

    def usage(self, model: str) -> Usage | None:
        """Return what the server counted, and estimates of the rest; None where no answer ever began."""
        counted = usage_of(self._run, model)
        if counted is None and self._responses:
            return estimated_usage(model, _letters(self._run.input), self._letters, requests=self._responses)
        if counted is None or self._open_letters is None:
            return counted
        more = estimated_usage(model, _letters(self._run.input), self._open_letters)
        return replace(
            counted,
            requests=counted.requests + more.requests,
            input_tokens=counted.input_tokens + more.input_tokens,
            output_tokens=counted.output_tokens + more.output_tokens,
        )


def usage_of(run: RunResultBase, model: str) -> Usage | None:
    """Return what the run used as the model's server counted it; None where it did not."""
    used = run.context_wrapper.usage
    asked, answered = max(0, used.input_tokens), max(0, used.output_tokens)  # -1 is how some say that they do not know
    return Usage("", "", model, used.requests, asked, answered) if asked + answered else None


def _letters(value: Any) -> int:
    """Return how much text there is in a run's input; what stands for files is none."""
    match value:
        case str():
            return 0 if value.startswith("data:") else len(value)
        case list():
            return sum(map(_letters, value))
        case dict():
            return sum(map(_letters, value.values()))
    return 0


def estimated_usage(model: str, asked: int, answered: int, *, requests: int = 1) -> Usage:
    """Return what so many letters use, at four letters a token. User and day are the store's to know."""
    return Usage("", "", model, requests, asked // 4, answered // 4)
