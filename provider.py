"""Where models come from: OpenAI, a compatible server, or the offline demo."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2
from agents import ModelProvider, ModelSettings, OpenAIProvider, RunConfig
from openai import AsyncOpenAI, DefaultAsyncHttpx2Client

from demo import DemoProvider

KEEPALIVE_SECONDS = 30.0


@asynccontextmanager
async def open_provider(
    *, api_key: str | None, base_url: str | None, api: str, max_connections: int, timeout_seconds: float
) -> AsyncIterator[ModelProvider]:
    """Yield the provider of all models. With neither key nor base URL it is the demo's.

    Connecting and waiting for the first token may be tried twice more; a stream that broke off is not tried again.
    """
    if not (api_key or base_url):
        yield DemoProvider()
        return
    http_client = DefaultAsyncHttpx2Client(
        limits=httpx2.Limits(
            max_connections=max_connections or None,
            max_keepalive_connections=max_connections or None,
            keepalive_expiry=KEEPALIVE_SECONDS,
        ),
        timeout=httpx2.Timeout(timeout_seconds, connect=10.0),
    )
    async with AsyncOpenAI(api_key=api_key or "none", base_url=base_url, http_client=http_client) as client:
        yield OpenAIProvider(openai_client=client, use_responses=api == "responses")


def run_config(provider: ModelProvider, *, api: str, store: bool, tracing: bool) -> RunConfig:
    """Return what is common to all runs.

    The Agents SDK (0.24) posts prompts and the provider's key to OpenAI's traces even with another base URL, and
    OpenAI keeps answers: neither happens unless asked for.
    """
    return RunConfig(
        model_provider=provider,
        model_settings=ModelSettings(store=store) if api == "responses" else ModelSettings(include_usage=True),
        tracing_disabled=not tracing,
    )
