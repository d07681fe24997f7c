"""What is too old goes by itself, or by a command."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from chatkit.store import NotFoundError

from conftest import probing
from databases import Database, SQLiteDatabase
from service import eventually, run, service, thread_of
from standin import StandIn
from test_store import alice, make_thread, upload
from upkeep import upkeep


async def is_gone(load: Callable[[], Awaitable[Any]]) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                await load()
            except NotFoundError:
                return
            await asyncio.sleep(0.02)


@pytest.mark.anyio
async def test_idle_threads_and_files_never_sent_are_removed_hour_by_hour(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.upkeep")
    async with database.open() as store:
        thread_id = await make_thread(store)
        await upload(store, b"abc", "atc_1")
        await store.purge(7)  # this hour's
        database.age("threads", "active_at", 8 * 86400, "TRUE")
        database.age("attachments", "created_at", 25 * 3600, "TRUE")
        async with upkeep(store, 7, look_seconds=0.02):
            await asyncio.sleep(0.1)  # it looks five times, and the hour is not over
            await store.load_thread(thread_id, alice())
            database.age("jobs", "ran_at", 3601, "TRUE")
            await is_gone(lambda: store.load_thread(thread_id, alice()))
            await is_gone(lambda: store.load_attachment("atc_1", alice()))
    assert "removed 1 idle threads and 1 unsent attachments" in caplog.text


def test_a_service_removes_what_was_idle_for_longer_than_its_retention(tmp_path: Path, model: StandIn) -> None:
    database = SQLiteDatabase(tmp_path)
    environ = probing(model, tmp_path / "store.db")
    with service(**environ) as client:
        old, new = thread_of(client.create("Old")), thread_of(client.create("New"))
    database.age("threads", "active_at", 8 * 86400, f"id = '{old}'")
    for days, left in (("0", [new, old]), ("7", [new])):
        database.age("jobs", "ran_at", 3601, "TRUE")
        with service(**environ | {"RETENTION_DAYS": days}) as client:
            eventually(lambda client=client, left=left: client.thread_ids() == left, what="the removal")


def test_purge_removes_at_once_and_says_what(tmp_path: Path, model: StandIn) -> None:
    database = SQLiteDatabase(tmp_path)
    environ = probing(model, tmp_path / "store.db")
    with service(**environ) as client:
        old, new = thread_of(client.create("Old")), thread_of(client.create("New"))
        database.age("threads", "active_at", 8 * 86400, f"id = '{old}'")
        kept = run(tmp_path, "purge", DATABASE_URL=database.url)
        assert kept.stdout.startswith("Removed 0 idle threads and 0 attachments that were never sent.\n")
        assert "RETENTION_DAYS is 0" in kept.stdout
        removed = run(tmp_path, "purge", DATABASE_URL=database.url, RETENTION_DAYS="7")
        assert removed.stdout == "Removed 1 idle threads and 0 attachments that were never sent.\n"
        assert client.thread_ids() == [new]
