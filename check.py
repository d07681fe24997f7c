"""`python app.py check`: what is right, and what to do about what is not, in one line each."""

from collections.abc import AsyncIterator, Callable

import openai
from openai import AsyncOpenAI

from agentmodule import AgentModule
from auth import InvalidToken, KeysUnavailable, TokenMissing, Verifier, bearer_token
from conversations import IncompatibleDatabase, StoreUnavailable
from failures import describe
from settings import Settings
from store import open_store
from toolservers import tool_names

PATIENCE_SECONDS = 10.0


class Wrong(Exception):
    """Something needs attention; the message says what to do."""


async def check(settings: Settings, unverified_token: str | None, say: Callable[[str], None]) -> bool:
    """Say a line about each part that the service needs; return whether all are right."""
    parts: dict[str, Callable[[Settings], AsyncIterator[str]]] = {
        "agent": _agent,
        "database": _database,
        "issuer": _issuer,
        "model": _model,
        "tools": _tools,
    }
    say("ok     settings: all can be read")
    results = [await _report(name, part(settings), say) for name, part in parts.items()]
    if unverified_token is not None:
        results.append(await _report("token", _token(settings, unverified_token), say))
    return all(results)


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
        raise Wrong(f"{error} Set AGENT to your module, or mend it.") from error
    yield f"{settings.agent} can be imported"


async def _database(settings: Settings) -> AsyncIterator[str]:
    try:
        async with open_store(settings.database_url, settings.table_prefix) as store:
            await store.ping()
    except IncompatibleDatabase as error:
        raise Wrong(str(error)) from error
    except StoreUnavailable as error:
        raise Wrong(f"{error}. Set DATABASE_URL to a database that can be opened and written.") from error
    yield f"{settings.database_url.partition('://')[0]} answers, and has this release's schema"


async def _issuer(settings: Settings) -> AsyncIterator[str]:
    if settings.jwks_url is None:
        yield "no JWKS_URL, so everybody is the same user; only this machine may ask"
        return
    async with verifier_of(settings) as verifier:
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
        yield await _answer_of(client)


async def _answer_of(client: AsyncOpenAI) -> str:
    try:
        await client.models.list()
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        raise Wrong(f"{client.base_url} refuses the key ({error.status_code}). Set OPENAI_API_KEY.") from error
    except openai.APIStatusError as error:  # not every compatible server has a list of models
        return f"{client.base_url} answers (with status {error.status_code} to the question which models it has)"
    except openai.OpenAIError as error:
        raise Wrong(
            f"{client.base_url} does not answer ({describe(error)}). Set OPENAI_BASE_URL, or start the server there."
        ) from error
    return f"{client.base_url} answers and takes the key"


async def _tools(settings: Settings) -> AsyncIterator[str]:
    for url in settings.mcp_server_url:
        try:
            names = await tool_names(url)
        except Exception as error:  # the MCP library's own, whatever the server did
            raise Wrong(f"{url} does not answer ({describe(error)}). Set MCP_SERVER_URL, or start it there.") from error
        yield f"{url} offers {', '.join(names) or 'nothing'}"


async def _token(settings: Settings, unverified_token: str) -> AsyncIterator[str]:
    if settings.jwks_url is None:
        raise Wrong("no token is looked at without JWKS_URL. Set JWKS_URL and JWT_ISSUER.")
    async with verifier_of(settings) as verifier:
        try:
            header = unverified_token if " " in unverified_token else f"Bearer {unverified_token}"
            claims = await verifier.verify(bearer_token([header]))
        except TokenMissing as error:
            raise Wrong("there is none. Pipe it in: python app.py check --token - < token.txt") from error
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
