"""What is SQLite's own: the file, its migrations, and how writes reach the disk."""

import asyncio
import sqlite3
import stat
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from chatkit.types import EndOfTurnItem, FileAttachment, ThreadMetadata

from context import RequestContext
from conversations import RECOVERY_SECONDS, IncompatibleDatabase, Purged, StoreUnavailable
from databases import SQLiteDatabase
from service import eventually
from sqlite import SQLiteFile
from sqliteschema import MIGRATIONS
from sqliteupkeep import DELETION_BYTES
from store import open_store
from test_store import NOON, alice, end, ids, leased, make_thread

pytestmark = pytest.mark.anyio


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "chatkit.db"


async def test_a_database_of_a_newer_release_is_refused_and_left_alone(file: Path) -> None:
    with sqlite3.connect(file) as db:
        db.execute("PRAGMA user_version = 9999")
    with pytest.raises(IncompatibleDatabase, match="schema 9999, made by a newer release"):
        async with open_store(f"sqlite:///{file}"):
            pass
    assert sqlite3.connect(file).execute("SELECT count(*) FROM sqlite_schema").fetchone() == (0,)


async def test_a_migration_that_fails_changes_nothing(file: Path) -> None:
    with pytest.raises(StoreUnavailable):
        async with SQLiteFile.open(str(file), [*MIGRATIONS, "CREATE TABLE more (a); CREATE TABLE more (a);"]):
            pass
    with sqlite3.connect(file) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (0,)
        assert db.execute("SELECT count(*) FROM sqlite_schema").fetchone() == (0,)


@pytest.mark.parametrize("content", [b"this is no database" * 100, b"SQLite format 3\0" + b"\xff" * 4096])
async def test_a_file_that_is_no_database_is_refused_by_name(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(StoreUnavailable):
        async with open_store(f"sqlite:///{file}"):
            pass
    assert file.read_bytes() == content


async def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match=r"nowhere/chatkit\.db"):
        async with open_store(f"sqlite:///{tmp_path}/nowhere/chatkit.db"):
            pass


async def test_only_its_owner_can_read_a_new_file_and_the_mode_of_one_that_is_there_stays(file: Path) -> None:
    async with open_store(f"sqlite:///{file}") as store:
        await make_thread(store)
        made = {each.name: stat.S_IMODE(each.stat().st_mode) for each in file.parent.iterdir()}
    assert made == dict.fromkeys(["chatkit.db", "chatkit.db-wal", "chatkit.db-shm"], 0o600)
    file.chmod(0o640)
    async with open_store(f"sqlite:///{file}"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o640


async def test_every_commit_reaches_the_disk(file: Path) -> None:
    async with SQLiteFile.open(str(file), MIGRATIONS) as opened:
        pragmas = [
            await opened.write(lambda db, name=name: db.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    assert pragmas == ["wal", 2, 1]


async def test_writes_that_wait_together_are_committed_together(file: Path) -> None:
    commits = 0

    def count_commits() -> None:
        nonlocal commits
        commits += 1

    async with open_store(f"sqlite:///{file}") as store:
        thread_id = await make_thread(store)
        await store._write(lambda db: db.set_trace_callback(lambda sql: sql == "COMMIT" and count_commits()))
        items = [EndOfTurnItem(id=f"i{number}", thread_id=thread_id, created_at=NOON) for number in range(200)]
        await asyncio.gather(*[store.add_thread_item(thread_id, item, alice()) for item in items])
    assert 1 <= commits <= 5


async def test_a_reader_does_not_wait_for_a_writer_of_another_process(file: Path) -> None:
    async with open_store(f"sqlite:///{file}") as store:
        thread_id = await make_thread(store)
        other = sqlite3.connect(file, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        async with asyncio.timeout(2):
            await store.load_thread(thread_id, alice())
        other.execute("ROLLBACK")
        other.close()


async def test_a_writer_waits_for_another_process_and_then_writes(file: Path) -> None:
    async with open_store(f"sqlite:///{file}") as store:
        other = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        threading.Timer(0.5, lambda: other.execute("ROLLBACK")).start()
        await store.save_thread(ThreadMetadata(id="thr_1", created_at=NOON), RequestContext("alice"))
        other.close()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///", "mysql://localhost/x", "sqlite:///:memory:"])
async def test_an_address_that_is_no_file_is_refused(url: str) -> None:
    with pytest.raises((IncompatibleDatabase, StoreUnavailable)):
        async with open_store(url):
            pass


async def test_no_thread_of_the_database_outlives_the_store(file: Path) -> None:
    def of_the_database() -> int:
        return sum("_connection_worker_thread" in thread.name for thread in threading.enumerate())

    before = of_the_database()
    async with open_store(f"sqlite:///{file}"):
        assert of_the_database() > before
    with pytest.raises(RuntimeError, match="inside"):
        async with open_store(f"sqlite:///{file}"):
            raise RuntimeError("inside")
    eventually(lambda: of_the_database() <= before)


async def test_a_file_that_was_rewritten_has_no_bytes_of_what_was_deleted(file: Path) -> None:
    def on_the_disk() -> bytes:
        return b"".join(path.read_bytes() for path in file.parent.glob(f"{file.name}*"))

    async with (
        SQLiteFile.open(str(file), ["CREATE TABLE notes (words TEXT);"]) as notes,
        SQLiteFile.open(str(file), ["CREATE TABLE notes (words TEXT);"]) as other_process,
    ):
        await notes.write(lambda db: db.execute("PRAGMA secure_delete = OFF"))  # which Debian's SQLite has on
        for number in range(100):
            await notes.write(lambda db, n=number: db.execute("INSERT INTO notes VALUES (?)", (f"{n} SENTINEL " * 99,)))
        await notes.write(lambda db: db.execute("INSERT INTO notes VALUES ('kept')"))
        await notes.write(lambda db: db.execute("DELETE FROM notes WHERE words <> 'kept'"))
        await other_process.read(lambda db: db.execute("SELECT * FROM notes").fetchall())
        assert b"SENTINEL" in on_the_disk()
        await notes.rewrite()
        assert b"SENTINEL" not in on_the_disk()
        kept = await other_process.read(lambda db: db.execute("SELECT words FROM notes").fetchall())
        assert [tuple(row) for row in kept] == [("kept",)]


async def test_a_thread_whose_turn_died_is_read_while_nothing_can_be_written(tmp_path: Path) -> None:
    database = SQLiteDatabase(tmp_path)
    async with database.open() as store:
        thread_id = await make_thread(store, items=1)
        turn = await leased(store, thread_id)
        await store.save_checkpoints(thread_id, [end("shown", thread_id)], turn)
        database.expire_leases()
        with closing(sqlite3.connect(database.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            async with asyncio.timeout(RECOVERY_SECONDS + 5):
                assert await ids(store, thread_id) == ["item_0"]
            other.execute("ROLLBACK")
        assert (await ids(store, thread_id))[:2] == ["item_0", "shown"]


async def test_a_file_that_is_replaced_while_a_write_waits_for_another_process_takes_none(file: Path) -> None:
    async with open_store(f"sqlite:///{file}") as store:
        with closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            writing = asyncio.create_task(make_thread(store))
            await asyncio.sleep(0.2)
            file.rename(file.with_name("moved.db"))
            other.execute("ROLLBACK")
        with pytest.raises(StoreUnavailable, match="start the service again"):
            await writing


async def test_a_file_behind_a_link_that_is_moved_takes_no_writes_either(tmp_path: Path) -> None:
    disk, link = tmp_path / "disk", tmp_path / "chatkit.db"
    disk.mkdir()
    link.symlink_to(disk / "real.db")
    async with open_store(f"sqlite:///{link}") as store:
        await make_thread(store)
        disk.rename(tmp_path / "moved")
        with pytest.raises(StoreUnavailable, match="start the service again"):
            await make_thread(store)


@pytest.mark.parametrize("sent", [False, True])
async def test_a_purge_frees_few_bytes_in_each_transaction(
    file: Path, sent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(f"sqlite:///{file}") as store:
        for number in range(5):
            thread_id = await make_thread(store) if sent else None
            attachment = FileAttachment(id=f"a{number}", name="a", mime_type="text/plain", thread_id=thread_id)
            await store.reserve_attachment(attachment, DELETION_BYTES * 2 // 3, 0, alice())
        with closing(sqlite3.connect(file)) as db, db:
            db.execute("UPDATE attachments SET created_at = 0")
            db.execute("UPDATE threads SET active_at = 0")
        freed, write = [], store._write

        async def write_noting(work: Any) -> Any:
            outcome = await write(work)
            if isinstance(outcome, sqlite3.Cursor):
                freed.append(outcome.rowcount)
            return outcome

        monkeypatch.setattr(store, "_write", write_noting)
        purged = await store.purge(1, now=True)
    assert purged == (Purged(threads=5, attachments=0) if sent else Purged(threads=0, attachments=5))
    assert [count for count in freed if count] == [2, 2, 1]
