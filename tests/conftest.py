"""Fixtures that several files of tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from service import Client, service
from standin import StandIn, standing_in


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def close_clients() -> Iterator[None]:
    """Close the clients that a test opens; those of wider fixtures are older than this one."""
    older = len(Client.opened)
    yield
    while len(Client.opened) > older:
        Client.opened.pop().close()


@pytest.fixture(scope="session")
def running_model() -> Iterator[StandIn]:
    with standing_in() as stand_in:
        yield stand_in


@pytest.fixture
def model(running_model: StandIn) -> StandIn:
    """The stand-in for OpenAI's API, with nothing scripted and nothing asked yet."""
    running_model.reset()
    return running_model


@pytest.fixture(scope="session")
def running_service(running_model: StandIn, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    database = tmp_path_factory.mktemp("service") / "chatkit.db"
    with service(**probing(running_model, database)) as client:
        yield client


@pytest.fixture
def client(running_service: Client, model: StandIn) -> Client:
    """A client of one service that all tests share, so that none may count on an empty database."""
    return running_service


def probing(model: StandIn, database: Path, **more: str) -> dict[str, str]:
    """Return the variables of a service with the probe agent and the stand-in's model, and without quotas."""
    return {
        "DATABASE_URL": f"sqlite:///{database}",
        "OPENAI_BASE_URL": model.url,
        "OPENAI_API_KEY": "test-key",
        "AGENT": "probe_agent",
        "TURNS_PER_MINUTE": "0",
        "CONCURRENT_TURNS_PER_USER": "0",
        **more,
    }
