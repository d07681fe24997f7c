"""`python app.py check`: what is right, and what to do about what is not, in one line each."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path

import openai
from agents.models import get_default_model
from openai import AsyncOpenAI

from agentmodule import AgentModule
from auth import InvalidToken, KeysUnavailable, Verifier
from conversations import IncompatibleDatabase, StoreUnavailable
from copying import schema_versions
from failures import describe
from settings import Settings, without_password
from store import open_store
from toolservers import name_of, tool_names

PATIENCE_SECONDS = 10.0


class Wrong(Exception):
    """Something needs attention; the message says what to do."""


async def check(settings: Settings, piped_in: str | None, say: Callable[[str], None]) -> bool:
    """Say a line about each part that the service needs, and about the token that was piped in, if one was.

    Return whether all are right. Nothing is made that is not there yet.
    """
    say("ok     settings: all can be read")
    async with AsyncExitStack() as stack:
        verifier = await stack.enter_async_context(verifier_of(settings)) if settings.jwks_url else None
        parts = {
            "agent": _agent(settings),
            "database": _database(settings),
            "issuer": _issuer(settings, verifier),
            "model": _model(settings),
            "tools": _tools(settings),
        }
        if piped_in is not None:
            parts["token"] = _token(verifier, piped_in)
        return all([await _report(name, lines, say) for name, lines in parts.items()])


async def _report(name: str, lines: AsyncIterator[str], say: Callable[[str], None]) -> bool:
    try:
        async for line in lines:
            say(f"ok     {name}: {line}")
    except Wrong as wrong:
        say(f"wrong  {name}: {wrong}")
        return False
    return True


async def _agent(settings: Settings) -> AsyncIterator[str]:
    try:
        AgentModule.load(settings.agent)
    except ImportError as error:
        raise Wrong(f"{error} Set AGENT to your module, or mend it.") from None
    yield f"{settings.agent} can be imported"


async def _database(settings: Settings) -> AsyncIterator[str]:
    if missing := _missing_file(settings.database_url):
        yield f"{missing} is not there yet: the service makes it when it starts"
        return
    try:
        there, ours = await asyncio.to_thread(schema_versions, settings.database_url, settings.table_prefix)
        if there < ours:
            now = f"has schema {there}, of an older release," if there else "has nothing of the service's yet,"
            yield f"{settings.database_name} answers; it {now} and is brought to schema {ours} at the next start"
            return
        async with open_store(settings.database_url, settings.table_prefix) as store:
            await store.ping()
    except IncompatibleDatabase as error:
        raise Wrong(str(error)) from error
    except StoreUnavailable as error:
        raise Wrong(database_words(settings, error)) from error
    yield f"{settings.database_name} answers, and has this release's schema"


def _missing_file(database_url: str) -> Path | None:
    """Return the SQLite file that the service would have to make; raise `Wrong` where it could not."""
    file = Path(database_url.removeprefix("sqlite:///")).absolute()
    if not database_url.startswith("sqlite:///") or file.exists():
        return None
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise Wrong(f"nothing can be written in {file.parent}. Set DATABASE_URL to a place that exists.")
    return file


def database_words(settings: Settings, error: StoreUnavailable) -> str:
    """Return which database failed, how, and what to do."""
    return (
        f"{settings.database_name} cannot be used: {str(error).rstrip('.?')}."
        " Set DATABASE_URL to a database that can be opened and written."
    )


async def _issuer(settings: Settings, verifier: Verifier | None) -> AsyncIterator[str]:
    if verifier is None:
        yield "no JWKS_URL, so everybody is the same user; only this machine may ask"
        return
    try:
        await verifier.wait_until_ready()
    except KeysUnavailable as error:
        raise Wrong(f"{settings.jwks_url} gives no keys: {error.reason}. Set JWKS_URL to the issuer's.") from error
    for summary in verifier.key_summaries():
        yield f"key {summary}"


async def _model(settings: Settings) -> AsyncIterator[str]:
    if settings.offline:
        yield "none configured, so the offline demo answers"
        return
    key = settings.openai_api_key or "none"
    async with AsyncOpenAI(
        api_key=key, base_url=settings.openai_base_url, timeout=PATIENCE_SECONDS, max_retries=0
    ) as client:
        listed = await _models_of(client)
        if listed is None:
            yield f"{_address(client)} answers, and does not say which models it has"
            return
        wanted = dict.fromkeys([settings.openai_default_model or get_default_model(), *settings.models])
        for name in wanted:
            if name not in listed and not await _has(client, name):
                raise Wrong(
                    f"{_address(client)} has no model {name}: it has {_listed(listed[:10]) or 'none'}."
                    " Set OPENAI_DEFAULT_MODEL or MODELS to what it has."
                )
        yield f"{_address(client)} answers, takes the key, and has {', '.join(wanted)}"


def _address(client: AsyncOpenAI) -> str:
    return without_password(str(client.base_url))


async def _models_of(client: AsyncOpenAI) -> list[str] | None:
    """Return the models that the server lists; None where it lists none to anybody."""
    try:
        return [each.id for each in (await client.models.list()).data]
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        raise Wrong(f"{_address(client)} refuses the key ({error.status_code}). Set OPENAI_API_KEY.") from error
    except openai.APIStatusError:  # not every compatible server has a list of models
        return None
    except openai.OpenAIError as error:
        raise Wrong(
            f"{_address(client)} does not answer ({describe(error)}). Set OPENAI_BASE_URL, or start the server there."
        ) from error
    except (AttributeError, TypeError, ValueError) as error:  # openai 3.54, of an answer that it cannot make sense of
        raise Wrong(
            f"{_address(client)} answers, but not as OpenAI's API does. Set OPENAI_BASE_URL, which mostly ends in /v1."
        ) from error


async def _has(client: AsyncOpenAI, name: str) -> bool:
    """Whether the server knows the model by a name that it does not list, as Ollama does."""
    try:
        await client.models.retrieve(name)
    except openai.OpenAIError:
        return False
    return True


async def _tools(settings: Settings) -> AsyncIterator[str]:
    offered: dict[str, str] = {}
    for url in settings.mcp_server_url:
        server = name_of(url)
        try:
            names = await tool_names(url)
        except Exception as error:  # the MCP library's own, whatever the server did
            raise Wrong(
                f"{server} does not answer ({describe(error)}). Set MCP_SERVER_URL, or start it there."
            ) from error
        yield f"{server} offers {_listed(names) or 'nothing'}"
        if twice := [name for name in names if name in offered]:
            yield f"{offered[twice[0]]} has {_listed(twice)} too: all tools are offered as mcp_SERVER__TOOL"
        offered |= dict.fromkeys(names, server)


def _listed(names: Iterable[str]) -> str:
    """Return what others named, in printable ASCII: it cannot pretend to be lines, nor steer a terminal."""
    return ", ".join(ascii(name)[1:-1][:100] for name in names)


async def _token(verifier: Verifier | None, piped_in: str) -> AsyncIterator[str]:
    if verifier is None:
        raise Wrong("no token is looked at without JWKS_URL. Set JWKS_URL and JWT_ISSUER.")
    words = piped_in.split()
    while words and words[0].lower() in ("authorization:", "bearer"):
        words.pop(0)
    if not words:
        raise Wrong("there is none on standard input. Pipe it in: python app.py check --token - < token.txt")
    if len(words) > 1:
        raise Wrong("it has spaces or line breaks inside. Copy it again, as one line.")
    try:
        claims = await verifier.verify(words[0])
    except KeysUnavailable as error:
        raise Wrong(f"cannot be judged: {error.reason}.") from error
    except InvalidToken as error:
        raise Wrong(f"refused: {error.reason}.") from error
    yield f"taken; the user is {claims.user_id}"


def verifier_of(settings: Settings) -> Verifier:
    """Return the verifier of the configured issuer's tokens."""
    assert settings.jwks_url is not None
    assert settings.jwt_issuer is not None
    return Verifier(settings.jwks_url, settings.jwt_issuer, settings.jwt_audience, settings.jwt_user_claim)
