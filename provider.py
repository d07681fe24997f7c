"""Where models come from: OpenAI, a compatible server, or the offline demo."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import httpx2
from agents import Agent, Model, ModelProvider, ModelSettings, OpenAIProvider, RunConfig, StreamEvent
from agents.models.default_models import gpt_5_reasoning_settings_required
from agents.result import RunResultBase
from agents.run import CallModelData, ModelInputData
from chatkit.types import (
    AssistantMessageContentPartTextDelta,
    AssistantMessageItem,
    ThreadItemDoneEvent,
    ThreadItemUpdatedEvent,
    ThreadStreamEvent,
)
from openai import AsyncOpenAI, DefaultAsyncHttpx2Client

from conversations import Usage
from sdk import OpenAIClient, mended
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
    http_client = DefaultAsyncHttpx2Client(
        limits=httpx2.Limits(
            max_connections=max_connections or None,
            max_keepalive_connections=max_connections or None,
            keepalive_expiry=KEEPALIVE_SECONDS,
        ),
        timeout=httpx2.Timeout(timeout_seconds, connect=10.0),
        event_hooks={"request": [_name_request]},
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


def run_config(provider: ModelProvider, *, api: str, store: bool, tracing: bool) -> RunConfig:
    """Return what is common to all runs.

    The Agents SDK (0.24) posts prompts and the provider's key to OpenAI's traces even with another base URL, and
    OpenAI keeps answers: neither happens unless asked for.
    """
    responses = api == "responses"
    return RunConfig(
        model_provider=provider,
        model_settings=ModelSettings(store=store) if responses else ModelSettings(include_usage=True),
        tracing_disabled=not tracing,
        call_model_input_filter=_without_lost_reasoning if responses and not store else _sendable,
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
    """Mend texts, of tools' outputs say, that no request can carry."""
    return ModelInputData(input=_mended(data.model_data.input), instructions=data.model_data.instructions)


def _mended(value: Any) -> Any:
    match value:
        case str():
            return mended(value)
        case list():
            return [_mended(each) for each in value]
        case dict():
            return {name: _mended(each) for name, each in value.items()}
    return value


def usage_of(run: RunResultBase, model: str, letters: int, cut_off: int = 0) -> Usage:
    """Return what the run used as the model's server counted it; estimated where it did not.

    A response that was cut off, after so many of the letters, is not counted by anybody.
    """
    used = run.context_wrapper.usage
    if not used.total_tokens:
        return estimated_usage(model, len(str(run.input)), letters, requests=max(1, used.requests))
    counted = Usage("", "", model, used.requests, used.input_tokens, used.output_tokens)
    if not cut_off:
        return counted
    more = estimated_usage(model, len(str(run.input)), cut_off)
    return replace(
        counted,
        requests=counted.requests + 1,
        input_tokens=counted.input_tokens + more.input_tokens,
        output_tokens=counted.output_tokens + more.output_tokens,
    )


class Uncounted:
    """A run that knows the `letters` of the response which is not complete, for `stream_agent_response`."""

    def __init__(self, run: Any):
        self._run = run
        self.letters = 0

    async def stream_events(self) -> AsyncIterator[StreamEvent]:
        async for event in self._run.stream_events():
            if event.type == "raw_response_event":
                if event.data.type == "response.output_text.delta":
                    self.letters += len(event.data.delta)
                elif event.data.type in ("response.completed", "response.incomplete"):
                    self.letters = 0
            yield event


def estimated_usage(model: str, asked: int, answered: int, *, requests: int = 1) -> Usage:
    """Return what so many letters use, at four letters a token. User and day are the store's to know."""
    return Usage("", "", model, requests, asked // 4, answered // 4)


def letters_in(event: ThreadStreamEvent) -> int:
    """Return the length of what the event adds to an answer's text."""
    match event:
        case ThreadItemUpdatedEvent(update=AssistantMessageContentPartTextDelta(delta=delta)):
            return len(delta)
        case ThreadItemDoneEvent(item=AssistantMessageItem(content=content)):
            return 1 if any(part.text for part in content) else 0
    return 0
