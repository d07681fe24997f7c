"""Fixtures that several files of tests share."""

import os
import random
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest

from databases import Database, PostgresDatabase, SQLiteDatabase
from postgres_server import PostgresServer, postgres_server
from service import Client, service
from standin import StandIn, standing_in

LONG = os.environ.get("SOAK") == "1"
"""Whether the tests under `soak` are to run in full, for an hour, and not in the shortened form of the suite."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what has no shortened form."""
    if not LONG and (left_out := [item for item in items if item.get_closest_marker("soak")]):
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


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


@pytest.fixture(scope="session")
def running_postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.fixture
def postgres(running_postgres: PostgresServer) -> PostgresDatabase:
    """An empty database: no other test uses its prefix."""
    return PostgresDatabase(running_postgres, f"t{secrets.token_hex(8)}_")


@pytest.fixture(params=["sqlite", "postgres"])
def new_database(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Database]:
    """Make an empty database each time; the test is run for each kind."""
    if request.param == "postgres":
        server = request.getfixturevalue("running_postgres")
        return lambda: PostgresDatabase(server, f"t{secrets.token_hex(8)}_")
    return lambda: SQLiteDatabase(Path(mkdtemp(prefix="database", dir=tmp_path)))


@pytest.fixture
def database(new_database: Callable[[], Database]) -> Database:
    """An empty database, whichever kind."""
    return new_database()


def probing(model: StandIn, database: Path | None = None, **more: str) -> dict[str, str]:
    """Return the variables of a service with the probe agent and the stand-in's model, and without quotas."""
    return {
        **({"DATABASE_URL": f"sqlite:///{database}"} if database else {}),
        "OPENAI_BASE_URL": model.url,
        "OPENAI_API_KEY": "test-key",
        "AGENT": "probe_agent",
        "TURNS_PER_MINUTE": "0",
        "CONCURRENT_TURNS_PER_USER": "0",
        **more,
    }


@pytest.fixture
def chance() -> random.Random:
    """Random numbers; their seed is printed, and taken again from FAULTS_SEED."""
    seed = os.environ.get("FAULTS_SEED") or str(random.randrange(2**32))
    print(f"FAULTS_SEED={seed}")
    return random.Random(seed)
