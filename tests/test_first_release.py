"""A database that the first release made is one for this release too: opened, read and gone on with."""

import asyncio
import sqlite3
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
from chatkit.types import LockedStatus

from conftest import probing
from context import RequestContext
from conversations import STOPPED, ConversationStore
from copying import copy
from first_release import DUMP, FILE, SCHEMA, USER
from service import errors_of, fold, service, text_of
from sqlite import SQLiteFile
from sqliteschema import MIGRATIONS
from standin import Say, StandIn
from store import open_store
from test_store import EVERY_KIND


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A database as the first release left it."""
    path = tmp_path / "chatkit.db"
    with closing(sqlite3.connect(path)) as db:
        db.executescript(DUMP.read_text(encoding="utf-8"))
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA,)
    return path


def schema_of(path: Path) -> dict[str, str]:
    with closing(sqlite3.connect(path)) as db:
        return dict(db.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL").fetchall())


@pytest.mark.anyio
async def test_the_schema_of_the_first_release_stays_as_it_was(database: Path, tmp_path: Path) -> None:
    async with SQLiteFile.open(str(tmp_path / "new.db"), MIGRATIONS[:SCHEMA]):
        pass
    assert schema_of(database) == schema_of(tmp_path / "new.db")


@pytest.mark.anyio
@pytest.mark.parametrize("restored", [False, True], ids=["as it was", "backed up and restored"])
async def test_it_is_migrated_and_all_that_is_in_it_can_be_read(database: Path, restored: bool) -> None:
    context = RequestContext(USER)
    if restored:
        async with open_store(f"sqlite:///{database}"):
            pass
        files = [
            f"sqlite:///{path}" for path in (database, database.with_name("backup.db"), database.with_name("b.db"))
        ]
        for source, target in pairwise(files):
            await asyncio.to_thread(copy, source, target, "", print)
        database = database.with_name("b.db")
    async with open_store(f"sqlite:///{database}") as store:
        threads = (await store.load_threads(10, None, "desc", context)).data
        assert {thread.id: thread.title for thread in threads} == {
            "thr_whole": "A title",
            "thr_locked": None,
            "thr_died": None,
        }
        assert (await store.load_thread("thr_locked", context)).status == LockedStatus(reason="It is over.")
        assert await kinds(store, "thr_whole") == [fields["type"] for fields in EVERY_KIND]
        died = (await store.load_thread_items("thr_died", None, 10, "asc", context)).data
        assert [died[0].id, getattr(died[1], "content", None)] == ["item_shown", STOPPED]
        assert await store.load_feedback("thr_whole", context) == {"item_1": "negative"}
        assert (await store.load_attachment("atc_sent", context)).thread_id == "thr_whole"
        chunks = [await store.read_chunk("atc_sent", number, context) for number in range(3)]
        assert b"".join(chunks) == FILE
        assert [used.output_tokens for used in await store.load_usage(USER)] == [3]
        assert len(await store.load_link_key()) == 32
    with closing(sqlite3.connect(database)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []


async def kinds(store: ConversationStore, thread_id: str) -> list[str]:
    page = await store.load_thread_items(thread_id, None, 100, "asc", RequestContext(USER))
    return [item.type for item in page.data]


def test_its_conversations_go_on(database: Path, model: StandIn) -> None:
    with service(**probing(model, database)) as client:
        before = client.items("thr_whole")
        model.will(Say("I remember."))
        events = client.say("thr_whole", "Do you remember?")
        assert not errors_of(events)
        assert text_of(fold(events)[-1]) == "I remember."
        assert client.items("thr_whole") == before + fold(events)
        assert client.thread_ids()[0] == "thr_whole"
