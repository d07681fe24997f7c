"""Moving all that is stored into another database, and backups, which are copies into a file."""

import asyncio
import fcntl
import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from chatkit.types import Page, SDKHiddenContextItem, ThreadMetadata

from conftest import LONG
from context import RequestContext
from conversations import CHUNK_BYTES, STOPPED, ConversationStore, StoreUnavailable, Usage
from copying import LEFT_OUT, TABLES, CopyRefused, copy
from databases import Database, PostgresDatabase, SQLiteDatabase
from documents import blocks_of
from service import ROOT, run
from store import open_store
from test_store import EVERY_KIND, ITEM, NOON, alice, bob, end, file, ids, make_thread, upload

pytestmark = pytest.mark.anyio

THREADS, MEGABYTES = (1000, 50) if LONG else (100, 20)


@pytest.fixture(params=["to sqlite", "to postgres"])
def target(request: pytest.FixtureRequest, tmp_path: Path, database: Database) -> Database:
    """A database that nobody has used yet, whichever kind."""
    if request.param == "to postgres":
        return PostgresDatabase.elsewhere(request.getfixturevalue("running_postgres"), database.prefix)
    (tmp_path / "copies").mkdir()
    return SQLiteDatabase(tmp_path / "copies")


async def copied(source: Database, target: Database) -> list[str]:
    """Copy all, and return what was reported."""
    said: list[str] = []
    prefix = (source if isinstance(source, PostgresDatabase) else target).prefix
    await asyncio.to_thread(copy, source.url, target.url, prefix, said.append)
    return said


async def fill(store: ConversationStore) -> str:
    """Store something of each kind there is, of two users, and return the thread on which a turn runs."""
    thread_id = await make_thread(store)
    for number, fields in enumerate(EVERY_KIND):
        item = ITEM.validate_python({"id": f"i{number}", "thread_id": thread_id, "created_at": NOON, **fields})
        await store.add_thread_item(thread_id, item, alice())
    await store.delete_thread_item(thread_id, "i3", alice())
    await store.save_feedback(thread_id, ["i1", "i2"], "positive", alice())
    await make_thread(store, items=3, context=bob())
    titled = ThreadMetadata(
        id="thr_\x00\x1a",
        created_at=NOON,
        title="a\tb\\N\n\x00",
        metadata={"a": [1, "\\."]},
        allowed_image_domains=[""],
    )
    await store.save_thread(titled, bob())
    for context, model in ((alice(), "small"), (bob(), "la\\rge\x00"), (bob(), "small")):
        await store.add_usage(Usage("", "", model, 1, 2**40, 5), context)
    await upload(store, bytes(range(256)) * 2000, "atc_sent")
    await store.save_attachment(file("atc_sent", thread_id), alice())
    await upload(store, b"", "atc_empty")
    await store.reserve_attachment(file("atc_begun"), 3, 0, alice())
    await store.write_chunk("atc_begun", await store.begin_upload("atc_begun", alice()), 0, b"abc", 0, alice())
    running = await make_thread(store, items=1)
    turn = RequestContext("alice", lease=await store.acquire_lease(running, alice()))
    await store.save_checkpoints(running, [end("item_0", running), end("shown", running)], turn)
    return running


async def all_of(store: ConversationStore, user: str, attachments: tuple[str, ...] = ()) -> list[Any]:
    """Return all that the user can read, page by page, and what the operator can."""
    found: list[Any] = [await store.load_usage(), await store.load_feedback_counts(), await store.load_link_key()]
    for order in ("asc", "desc"):
        for thread, place in await rows_of(lambda after, o=order: store.load_threads(3, after, o, _of(user))):
            found.append((thread.id, thread, place))
            items = await rows_of(
                lambda after, o=order, t=thread.id: store.load_thread_items(t, after, 7, o, _of(user))
            )
            found += [(thread.id, item, place) for item, place in items]
    for name in attachments:
        found.append(await store.load_attachment(name, _of(user)))
        size = await store.load_attachment_size(name, _of(user))
        found += [size, *[await store.read_chunk(name, n, _of(user)) for n in range(size // CHUNK_BYTES + 1)]]
    return found


async def rows_of(load: Callable[[str | None], Awaitable[Page[Any]]]) -> list[tuple[Any, str | None]]:
    """Return each row with the cursor behind its page."""
    found, page = [], await load(None)
    while True:
        found += [(row, page.after) for row in page.data]
        if not page.has_more:
            return found
        page = await load(page.after)


def _of(user: str) -> RequestContext:
    return RequestContext(user)


# --- what goes along ----------------------------------------------------------------------------------------------


async def test_a_copy_reads_the_same_for_everybody(database: Database, target: Database) -> None:
    async with database.open() as store:
        running = await fill(store)
        said = await copied(database, target)
        before = [await all_of(store, "alice", ("atc_sent", "atc_empty")), await all_of(store, "bob")]
    async with target.open() as store:
        after = [await all_of(store, "alice", ("atc_sent", "atc_empty")), await all_of(store, "bob")]
    assert len(before[0]) > 30
    assert [without(running, found) for found in after] == [without(running, found) for found in before]
    assert "threads: 4 of 4" in said
    assert said[-1].startswith("Complete: 4 threads, 1 leases, 14 items, 2 checkpoints, 2 feedback")


def without(thread_id: str, found: list[Any]) -> list[Any]:
    return [each for each in found if not isinstance(each, tuple) or each[0] != thread_id]


async def test_what_a_running_turn_had_shown_is_items_in_the_copy_and_goes_on_in_the_original(
    database: Database, target: Database
) -> None:
    async with database.open() as store:
        running = await fill(store)
        await copied(database, target)
        turn = RequestContext("alice", lease=database.leases()[0])
        await store.end_turn(running, [end("shown", running)], turn)
        assert await ids(store, running) == ["item_0", "shown"]
    async with target.open() as store:
        items = (await store.load_thread_items(running, None, 9, "asc", alice())).data
        assert [item.id for item in items[:2]] == ["item_0", "shown"]
        assert isinstance(items[2], SDKHiddenContextItem)
        assert items[2].content == STOPPED
        await store.acquire_lease(running, alice())


async def test_cursors_stay_valid_and_what_is_new_comes_last(database: Database, target: Database) -> None:
    async with database.open() as store:
        thread_id, other = await make_thread(store, items=4), await make_thread(store)
        page = await store.load_thread_items(thread_id, None, 2, "asc", alice())
        await store.delete_thread(other, alice())  # the highest number is of something that is gone
        of_the_end = await store.load_threads(1, None, "asc", alice())
    await copied(database, target)
    async with target.open() as store:
        await store.add_thread_item(thread_id, end("new", thread_id), alice())
        rest = await store.load_thread_items(thread_id, page.after, 9, "asc", alice())
        assert [item.id for item in rest.data] == ["item_2", "item_3", "new"]
        assert of_the_end.data[0].id == thread_id
    [[number]] = target.query("SELECT max(seq) FROM @items")
    assert number == 7  # a thread, 4 items, a thread, an item


async def test_an_empty_database_may_be_copied_and_used(database: Database, target: Database) -> None:
    async with database.open():
        pass
    await copied(database, target)
    async with target.open() as store:
        assert len(await ids(store, await make_thread(store, items=2))) == 2


async def test_nothing_is_changed_on_the_way_there_and_back(
    database: Database, target: Database, tmp_path: Path
) -> None:
    async with database.open() as store:
        await fill(store)
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    first, second = SQLiteDatabase(tmp_path / "first"), SQLiteDatabase(tmp_path / "second")
    await copied(database, first)
    await copied(first, target)
    await copied(target, second)
    for table in TABLES:
        query = f"SELECT {', '.join(table.columns)} FROM {table.name} ORDER BY 1, 2"
        as_it_was = first.query(query)
        assert as_it_was
        for row, before in zip(second.query(query), as_it_was, strict=True):
            for value, other in zip(row, before, strict=True):
                assert value == (pytest.approx(other, abs=0.001) if isinstance(other, float) else other), table.name


async def test_every_table_and_column_is_copied_or_named_with_the_reason_why_not(
    postgres: PostgresDatabase, tmp_path: Path
) -> None:
    file = SQLiteDatabase(tmp_path)
    async with postgres.open(), file.open():
        pass
    columns = {(table.name, column) for table in TABLES for column in table.columns}
    made = file.query(
        "SELECT tables.name, columns.name FROM sqlite_master AS tables, pragma_table_info(tables.name) AS columns"
        " WHERE tables.type = 'table'"
    )
    assert {(table, column) for table, column in made if table not in LEFT_OUT} == columns
    made = postgres.query(
        f"SELECT substr(table_name, {len(postgres.prefix) + 1}), column_name FROM information_schema.columns"
        " WHERE starts_with(table_name, '@')"
    )
    of_threads = {("threads", "lease"), ("threads", "lease_expires_at")}
    leases = {(table, column) for table, column in columns if table == "leases"}
    assert {(table, column) for table, column in made if table not in LEFT_OUT} == columns - leases | of_threads
    assert LEFT_OUT.keys().isdisjoint(table.name for table in TABLES)


# --- while others write -------------------------------------------------------------------------------------------


async def test_a_copy_is_of_one_moment_while_others_write(database: Database, target: Database) -> None:
    async with database.open() as store:
        threads = [await make_thread(store) for _ in range(5)]
        begun = asyncio.Event()

        async def write() -> None:
            for number in range(100_000):
                for thread_id in threads:
                    await store.add_thread_item(thread_id, end(f"i{number}", thread_id), alice())
                if number == 20:
                    begun.set()

        writing = asyncio.create_task(write())
        try:
            async with asyncio.timeout(60):
                await begun.wait()
                await copied(database, target)
        finally:
            writing.cancel()
    counts = [n for (n,) in target.query("SELECT count(*) FROM @items GROUP BY thread_id ORDER BY min(seq)")]
    assert counts[0] > 20
    assert counts in [[counts[0]] * full + [counts[0] - 1] * (5 - full) for full in range(1, 6)]
    [[highest]] = target.query("SELECT max(seq) FROM @items")
    assert highest == 5 + sum(counts), "a number is missing below the highest"


# --- what is refused ----------------------------------------------------------------------------------------------


async def test_a_target_that_holds_conversations_is_refused_and_left_alone(
    database: Database, target: Database
) -> None:
    async with database.open() as store:
        await make_thread(store, items=2)
    async with target.open() as store:
        kept = await make_thread(store, items=1)
        key = await store.load_link_key()
        with pytest.raises(CopyRefused, match=r"exists already|conversations already: 1 threads, 0 leases, 1 items"):
            await copied(database, target)
        assert [thread.id for thread in (await store.load_threads(9, None, "asc", alice())).data] == [kept]
        assert await store.load_link_key() == key


async def test_a_copy_onto_itself_is_refused(database: Database) -> None:
    async with database.open() as store:
        await make_thread(store)
    with pytest.raises(CopyRefused, match="already"):
        await copied(database, database)


async def test_a_target_that_somebody_writes_to_is_refused(postgres: PostgresDatabase, tmp_path: Path) -> None:
    source = SQLiteDatabase(tmp_path)
    async with source.open(), postgres.open():
        pass
    with closing(psycopg.connect(postgres.url)) as connection:
        connection.execute(f"LOCK TABLE {postgres.prefix}threads IN EXCLUSIVE MODE".encode())
        with pytest.raises(CopyRefused, match="Somebody else is writing there"):
            await asyncio.to_thread(copy, source.url, postgres.url, postgres.prefix, print)


@pytest.mark.parametrize("left", ["store.db-wal", "store.db-journal"])
async def test_what_another_database_has_left_beside_the_new_files_name_is_refused(
    tmp_path: Path, left: str, database: Database
) -> None:
    async with database.open():
        pass
    target = SQLiteDatabase(tmp_path)
    (tmp_path / left).touch()
    with pytest.raises(CopyRefused, match=f"{left} exists already"):
        await copied(database, target)


async def test_a_source_that_is_not_there_is_named_and_not_made(tmp_path: Path, target: Database) -> None:
    (tmp_path / "none").mkdir()
    source = SQLiteDatabase(tmp_path / "none")
    with pytest.raises(StoreUnavailable, match=r"store\.db: unable to open"):
        await copied(source, target)
    assert list((tmp_path / "none").iterdir()) == []


@pytest.mark.parametrize(("version", "advice"), [(0, "DATABASE_URL"), (9999, "Use the newer release.")])
async def test_a_source_of_another_release_is_refused(
    database: Database, target: Database, version: int, advice: str
) -> None:
    async with database.open():
        pass
    if isinstance(database, SQLiteDatabase):
        database.execute(f"PRAGMA user_version = {version}")
    else:
        database.execute(f"UPDATE @schema_version SET version = {version}")
    with pytest.raises(CopyRefused, match=rf"has schema {version}\b.*{advice}"):
        await copied(database, target)


async def test_a_row_that_the_target_does_not_take_leaves_nothing_behind(database: Database, target: Database) -> None:
    async with database.open() as store:
        await make_thread(store, items=2)
    if isinstance(database, SQLiteDatabase):
        with closing(sqlite3.connect(database.path)) as db, db:  # which does not watch foreign keys
            db.execute("UPDATE items SET user_id = 'nobody'")
    else:
        database.execute("ALTER TABLE @items DROP CONSTRAINT @items_thread_id_user_id_fkey")
        database.execute("UPDATE @items SET user_id = 'nobody'")
    with pytest.raises(StoreUnavailable, match=r"(?i)foreign ?key"):
        await copied(database, target)
    if isinstance(target, SQLiteDatabase):
        assert list(target.path.parent.iterdir()) == []
    else:
        assert target.query("SELECT * FROM @threads") == []


# --- the commands -------------------------------------------------------------------------------------------------


async def test_a_backup_is_one_file_for_its_owner_only_and_copy_brings_it_back(
    database: Database, target: Database, tmp_path: Path
) -> None:
    async with database.open() as store:
        thread_id = await make_thread(store, items=3)
    backups = tmp_path / "backups"
    backups.mkdir()
    done = run(backups, "backup", "monday.db", **database.environ)
    assert (done.returncode, done.stderr) == (0, "")
    assert [file.name for file in backups.iterdir()] == ["monday.db"]
    assert stat.S_IMODE((backups / "monday.db").stat().st_mode) == 0o600
    again = run(backups, "backup", "monday.db", **database.environ)
    assert (again.returncode, again.stderr) == (
        2,
        "monday.db exists already. Move it away, or name a file that does not exist.\n",
    )
    environ = {**target.environ, "DATABASE_URL": "sqlite:///monday.db"}
    back = run(backups, "copy", "--to", target.url, **environ)
    assert back.returncode == 0
    last = back.stdout.splitlines()[-1]
    assert last.startswith("Complete: 1 threads, 0 leases, 3 items")
    assert ("start it again" in last) == isinstance(target, PostgresDatabase)
    async with target.open() as store:
        assert await ids(store, thread_id) == ["item_0", "item_1", "item_2"]


async def test_the_restore_in_the_documents_brings_a_backup_back_and_keeps_what_was_there(tmp_path: Path) -> None:
    [restore] = [
        block
        for block in blocks_of((ROOT / "docs" / "operations.md").read_text(encoding="utf-8"))
        if "replaced" in block
    ]
    folder = tmp_path / "var" / "lib" / "private" / "chatkit"
    folder.mkdir(parents=True)
    async with open_store(f"sqlite:///{folder}/chatkit.db") as store:
        kept = await make_thread(store)
        await asyncio.to_thread(copy, f"sqlite:///{folder}/chatkit.db", f"sqlite:///{folder}/backup.db", "", print)
        newer = await make_thread(store)
        left_by_a_kill = {file: file.read_bytes() for file in folder.glob("chatkit.db*")}
    for path, data in left_by_a_kill.items():
        path.write_bytes(data)
    machine = f"cd() {{ builtin cd {tmp_path}$1; }}; systemctl() {{ echo $@ >> {tmp_path}/told; }}\n"
    subprocess.run(["bash", "-euc", machine + restore], check=True)
    units = "chatkit.socket chatkit.service"
    assert (tmp_path / "told").read_text().splitlines() == [f"stop {units}", f"start {units}"]
    assert await thread_ids(folder / "chatkit.db") == [kept]
    assert await thread_ids(folder / "replaced" / "chatkit.db") == [kept, newer]


async def thread_ids(path: Path) -> list[str]:
    async with open_store(f"sqlite:///{path}") as store:
        return [thread.id for thread in (await store.load_threads(9, None, "asc", alice())).data]


async def test_a_backup_where_nothing_can_be_written_says_so(database: Database, tmp_path: Path) -> None:
    async with database.open():
        pass
    done = run(tmp_path, "backup", "nowhere/monday.db", **database.environ)
    assert done.returncode == 2
    assert done.stderr == "nowhere/monday.db cannot be written: No such file or directory.\n"


@pytest.mark.parametrize("name", [".", "", "/"])
async def test_a_backup_to_a_folder_is_refused(database: Database, tmp_path: Path, name: str) -> None:
    async with database.open():
        pass
    done = run(tmp_path, "backup", name, **database.environ)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


async def test_a_copy_that_fails_names_both_databases_and_no_password(tmp_path: Path) -> None:
    async with open_store(f"sqlite:///{tmp_path}/chatkit.db"):
        pass
    done = run(tmp_path, "copy", "--to", "postgresql://user:hidden@127.0.0.1:1/nowhere")
    assert done.returncode == 1
    assert f"SQLite in {tmp_path}/chatkit.db could not be copied to PostgreSQL at 127.0.0.1:1/nowhere: " in done.stderr
    assert "hidden" not in done.stderr


async def test_a_copy_that_was_killed_half_way_is_complete_when_it_is_run_again(
    database: Database, target: Database, tmp_path: Path
) -> None:
    async with database.open() as store:
        for _ in range(THREADS // 50):
            made = await asyncio.gather(*[make_thread(store, items=5) for _ in range(50)])
        data = os.urandom(MEGABYTES * 2**20 // 10)
        await asyncio.gather(*[upload(store, data, f"atc_{number}") for number in range(10)])
        await store.save_attachment(file("atc_0", made[0]), alice())
        names = tuple(f"atc_{number}" for number in range(10))
        before = await all_of(store, "alice", names)
    killed = Copying(tmp_path, database, target)
    killed.read_until("attachments: ")
    killed.process.send_signal(signal.SIGKILL)
    assert "Complete" not in killed.rest()
    assert killed.process.wait() == -signal.SIGKILL
    whole = Copying(tmp_path, database, target)
    print(whole.rest(), end="")
    assert whole.process.wait() == 0
    print(f"{whole.more_bytes / 2**20:.1f} MiB more memory")
    assert whole.more_bytes < 14 * 2**20
    async with target.open() as store:
        assert await all_of(store, "alice", names) == before


class Copying:
    """`python app.py copy` as a process, and what it says; it waits until that is read."""

    def __init__(self, directory: Path, source: Database, target: Database):
        environ = {"PATH": os.environ["PATH"], **source.environ, "PYTHONUNBUFFERED": "1"}
        read, write = os.pipe2(os.O_DIRECT)  # a packet a write
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)  # and room for one: nobody gets ahead of who reads
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "app.py"), "copy", "--to", target.url],
            cwd=directory,
            env=environ,
            stdout=write,
        )
        os.close(write)
        self.said = os.fdopen(read, encoding="utf-8")
        self.more_bytes = 0
        """So much more memory it took since the first line."""

    def _lines(self) -> Iterator[str]:
        first = None
        for line in self.said:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            if peak := re.search(r"VmHWM:\s+(\d+) kB", status):
                first = first or int(peak[1])
                self.more_bytes = (int(peak[1]) - first) * 1024
            yield line

    def read_until(self, words: str) -> None:
        assert any(words in line for line in self._lines())

    def rest(self) -> str:
        with self.said:
            return "".join(self._lines())
