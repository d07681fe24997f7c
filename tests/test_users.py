"""What is stored of one user: exported, and deleted without a trace."""

import asyncio
import base64
import json
import os
import random
import sqlite3
import stat
import time
from contextlib import closing
from pathlib import Path

import pytest
from chatkit.types import HiddenContextItem

from conftest import probing
from conversations import ConversationStore, Usage
from databases import Database
from progress import progress
from service import Client, eventually, message, process, run, thread_of
from standin import Say, StandIn, Wait
from test_store import NOON, alice, bob, end, file, make_thread, upload
from users import PAGE_SIZE, exported

DATA = random.Random(1).randbytes(700_001)


async def export_of(store: ConversationStore, user_id: str) -> list[str]:
    return [part async for part in exported(store, user_id, lambda words: None)]


@pytest.mark.anyio
async def test_an_export_has_all_that_is_the_users_and_nothing_of_others(database: Database) -> None:
    async with database.open() as store:
        threads = [await make_thread(store) for _ in range(PAGE_SIZE + 1)]
        for number in range(PAGE_SIZE + 1):
            await store.add_thread_item(threads[0], end(f"item_{number}", threads[0]), alice())
        hidden = HiddenContextItem(id="hidden", thread_id=threads[0], created_at=NOON, content={"known": "ä\x00"})
        await store.add_thread_item(threads[0], hidden, alice())
        await store.save_feedback(threads[0], ["item_1"], "positive", alice())
        await upload(store, DATA, "whole")
        await store.reserve_attachment(file("never came"), 3, 0, alice())
        for context in (alice(), bob()):
            await store.add_usage(Usage("", "", f"model of {context.user_id}", 1, 2, 3), context)
        await make_thread(store, items=1, context=bob())
        parts = await export_of(store, "alice")
    found = json.loads("".join(parts))
    assert {thread["id"] for thread in found["threads"]} == set(threads)
    [thread] = [thread for thread in found["threads"] if thread["id"] == threads[0]]
    assert [item["id"] for item in thread["items"]] == [f"item_{number}" for number in range(PAGE_SIZE + 1)] + [
        "hidden"
    ]
    assert thread["items"][-1]["content"] == {"known": "ä\x00"}
    assert thread["feedback"] == {"item_1": "positive"}
    assert {each["id"]: each["data"] and base64.b64decode(each["data"]) for each in found["attachments"]} == {
        "whole": DATA,
        "never came": None,
    }
    assert [each["model"] for each in found["usage"]] == ["model of alice"]
    assert max(map(len, parts)) < len(DATA)  # whatever a user has stored, little of it is in memory


@pytest.mark.anyio
async def test_a_thread_that_becomes_active_while_it_is_exported_is_there_once(database: Database) -> None:
    async with database.open() as store:
        threads = [await make_thread(store, items=1) for _ in range(PAGE_SIZE + 1)]
        parts = []
        async for part in exported(store, "alice", lambda words: None):
            parts.append(part)
            if len(parts) == 2:
                await store.add_thread_item(threads[0], end("new", threads[0]), alice())
                await store.delete_thread(threads[1], alice())
    found = [thread["id"] for thread in json.loads("".join(parts))["threads"]]
    assert sorted(found) == sorted({*found})
    assert {*found} | {threads[1]} == {*threads}


def bytes_of(database: Path) -> bytes:
    """Return all that the database has on the disk."""
    return b"".join(path.read_bytes() for path in database.parent.glob(f"{database.name}*"))


def test_a_deleted_user_leaves_no_trace_in_the_file_while_the_service_serves(tmp_path: Path, model: StandIn) -> None:
    database = tmp_path / "chatkit.db"
    with process(tmp_path, **probing(model, database)) as client:
        model.otherwise = [Say("SENTINEL answer " * 50)]
        for number in range(5):
            thread = thread_of(client.create(f"SENTINEL {number} " + "and more " * 500))
            client.say(thread, "SENTINEL again")
            client.ask("threads.update", {"thread_id": thread, "title": f"SENTINEL {number}"})
        upload_sentinel(client)
        assert b"SENTINEL" in bytes_of(database)
        client.ask("threads.delete", {"thread_id": thread})  # long ago: its bytes lie about in the file
        deleted = run(tmp_path, "delete-user", "local")
        assert deleted.returncode == 0, deleted.stderr
        assert deleted.stdout.startswith("Deleted 4 threads with 16 items, 1 attachments and 1 rows of usage.")
        assert b"SENTINEL" not in bytes_of(database)
        assert client.thread_ids() == []
        model.otherwise = [Say("Welcome back")]
        expected = thread_of(client.create("Hello again"))
        assert client.thread_ids() == [expected]
    with closing(sqlite3.connect(database)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_title_that_comes_after_its_user_was_deleted_leaves_nothing(tmp_path: Path, model: StandIn) -> None:
    database = tmp_path / "chatkit.db"
    model.title = Wait(2)
    with process(tmp_path, **probing(model, database)) as client:
        client.create("Hello")
        eventually(lambda: model.asked_for_titles)
        assert run(tmp_path, "delete-user", "local").returncode == 0
        time.sleep(3)
    with closing(sqlite3.connect(database)) as db:
        assert db.execute("SELECT count(*) FROM usage").fetchone() == (0,)


def upload_sentinel(client: Client) -> None:
    data = b"SENTINEL file" * 100_000
    response = client.http.post("/attachments", files={"file": ("SENTINEL.txt", data, "text/plain")})
    assert response.status_code == 200, response.text


def test_a_user_is_deleted_while_an_answer_is_being_written_for_them(tmp_path: Path, model: StandIn) -> None:
    database = tmp_path / "chatkit.db"
    with process(tmp_path, **probing(model, database)) as client:
        model.otherwise = [Say("SENTINEL words without an end " * 100, gap=0.05)]
        with client.streaming("threads.create", {"input": message("SENTINEL question")}) as events:
            eventually(lambda: next(events)["type"] == "thread.item.updated")
            deleted = run(tmp_path, "delete-user", "local")
            assert deleted.returncode == 0, deleted.stderr
            last = list(events)[-1]
        assert last["type"] == "error"
    assert b"SENTINEL" not in bytes_of(database)
    with closing(sqlite3.connect(database)) as db:
        assert db.execute("SELECT count(*) FROM usage").fetchone() == (0,)


# --- the commands -------------------------------------------------------------------------------------------------


def test_an_export_is_written_where_nobody_else_reads_and_over_nothing(tmp_path: Path) -> None:
    run(tmp_path, "migrate")
    exporting = run(tmp_path, "export-user", "local", "me.json")
    assert exporting.returncode == 0, exporting.stderr
    written = tmp_path / "me.json"
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    assert json.loads(written.read_text()) | {"exported_at": 0} == {
        "user_id": "local",
        "exported_at": 0,
        "threads": [],
        "attachments": [],
        "usage": [],
    }
    before = written.read_bytes()
    again = run(tmp_path, "export-user", "local", "me.json")
    assert (again.returncode, again.stderr) == (2, "me.json cannot be made: File exists.\n")
    assert written.read_bytes() == before


def test_an_export_goes_to_standard_output_and_whoever_reads_it_may_leave(tmp_path: Path) -> None:
    run(tmp_path, "migrate")
    assert json.loads(run(tmp_path, "export-user", "a user").stdout)["user_id"] == "a user"
    read, write = os.pipe()
    os.close(read)
    left = run(tmp_path, "export-user", "local", stdout=write)
    os.close(write)
    assert left.returncode == 1
    assert "Traceback" not in left.stderr


@pytest.mark.parametrize("command", ["usage", "purge", "export-user x", "delete-user x"])
def test_where_no_database_is_a_command_says_so_and_makes_none(
    database: Database, tmp_path: Path, command: str
) -> None:
    for _ in range(2):  # what the first one had made, the second one would find
        result = run(tmp_path, *command.split(), **database.environ)
        assert result.returncode == 1, result.stdout
        assert "cannot be used: " in result.stderr
        assert "Traceback" not in result.stderr


def test_an_empty_file_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "chatkit.db").touch()
    result = run(tmp_path, "usage")
    assert result.returncode == 1
    assert "there is nothing of this service in it" in result.stderr
    assert (tmp_path / "chatkit.db").read_bytes() == b""


@pytest.mark.anyio
async def test_a_command_that_takes_its_time_says_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    said = ""
    async with progress("exporting", patience_seconds=0.01) as say:
        say("7 threads")
        while "exporting: 7 threads (0 s)\n" not in said:
            await asyncio.sleep(0.01)
            said += capsys.readouterr().err
    assert capsys.readouterr().out == ""
