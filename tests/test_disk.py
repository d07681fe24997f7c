"""A disk that is full, a file that is locked, read-only, damaged or gone: clear words, nothing lost, and recovery."""

import os
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from clients import Stream
from conftest import probing
from service import ROOT, Client, Process, errors_of, eventually, process, service, text_of, thread_of
from standin import Begin, Hang, StandIn
from test_faults import change, rows, seen_text

NO_DATABASE = "The service cannot reach its database. Try again in a moment."


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where the service runs and logs; its database is elsewhere."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def assert_takes_no_writes(running: Client, thread_id: str) -> None:
    """Whoever writes is told why not, in the form that the protocol has for it; whoever reads is served."""
    with ThreadPoolExecutor(4) as pool:
        renamed = pool.submit(running.post, "threads.update", {"thread_id": thread_id, "title": "Not stored"})
        created = pool.submit(Client(running.url).create, "Not stored")
        ready = pool.submit(Client(running.url).http.get, "/readyz")
        began = time.monotonic()
        assert Client(running.url).items(thread_id)
        assert Client(running.url).http.get("/healthz").status_code == 200
        assert time.monotonic() - began < 5, "a reader waited for a writer"
        for refused in (renamed.result(), ready.result()):
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            assert refused.json() == {"code": "store_unavailable", "message": NO_DATABASE}
        [error] = created.result()  # in a stream with status 200: the panel would repeat what is answered with 5xx
        assert (error["type"], error["message"], error["allow_retry"]) == ("error", NO_DATABASE, False)


def assert_works_again(running: Client, thread_id: str) -> None:
    eventually(lambda: running.http.get("/readyz").status_code == 200, 30, "readiness")
    assert errors_of(running.say(thread_id, "Are you there?")) == []
    assert errors_of(running.create("A new one")) == []
    assert running.post("threads.update", {"thread_id": thread_id, "title": "Stored"}).status_code == 200
    assert "Not stored" not in str(running.ask("threads.list", {"limit": 100}))


# --- full ---------------------------------------------------------------------------------------------------------


@dataclass
class Disk:
    """A disk, and how to take all its room away from a process and give it back."""

    directory: Path
    fill: Callable[[Process], None]
    free: Callable[[Process], None]


@pytest.fixture(params=["no space left", "the file may not grow"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    directory = tmp_path / "disk"
    directory.mkdir()
    if request.param == "the file may not grow":
        yield Disk(directory, lambda running: limit_files(running, 0), lambda running: limit_files(running, -1))
        return
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", directory], capture_output=True)
    if mounted.returncode:
        pytest.skip("no small disk can be mounted here")
    ballast = directory / "ballast"
    try:
        yield Disk(directory, lambda running: fill_up(ballast), lambda running: ballast.unlink())
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def limit_files(running: Process, limit: int) -> None:
    hard = resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (limit, hard))


def fill_up(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(512))
        except OSError:
            return


def test_a_full_disk_is_said_so_loses_nothing_and_needs_no_restart(disk: Disk, model: StandIn, directory: Path) -> None:
    database = disk.directory / "chatkit.db"
    with process(directory, **probing(model, database)) as running:
        thread_id = thread_of(running.create("Before"))
        model.will(Begin("Half an answer"), Hang())
        with Stream.create(running.url) as stream:
            stream.read_until(seen_text("Half an answer"))
            eventually(lambda: rows(database, "SELECT * FROM checkpoints"), what="the checkpoint")
            disk.fill(running)
            assert_takes_no_writes(running, thread_id)
            disk.free(running)
            assert_works_again(running, thread_id)
            stream.leave()
        eventually(lambda: not rows(database, "SELECT * FROM leases"), what="the end of the turn")
        assert [text_of(item) for item in running.items(thread_of(stream.seen))] == ["Hello", "Half an answer"]
        assert rows(database, "PRAGMA integrity_check") == [("ok",)]
        assert running.process.poll() is None
        assert "Traceback" not in running.log


# --- read-only, damaged, gone -------------------------------------------------------------------------------------


def start(directory: Path, database: Path, *through: str) -> subprocess.CompletedProcess[str]:
    """Start a service that must not come up."""
    environ = {"PATH": os.environ["PATH"], "PORT": "0", "DATABASE_URL": f"sqlite:///{database}"}
    command = [*through, sys.executable, str(ROOT / "app.py")]
    return subprocess.run(command, cwd=directory, env=environ, capture_output=True, text=True, timeout=60)


AS_ANYBODY = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
"""Runs a command for which, as for anybody but root, files are what their modes say."""


@pytest.mark.parametrize("state", ["read-only", "damaged", "without room"])
def test_a_service_whose_database_takes_no_writes_does_not_start_and_says_why(
    state: str, model: StandIn, directory: Path, tmp_path: Path
) -> None:
    database = tmp_path / "chatkit.db"
    through = list(AS_ANYBODY)
    with service(**probing(model, database)) as running:
        running.create()
    match state:
        case "read-only":
            database.chmod(0o444)
        case "damaged":
            damage(database)
        case "without room":
            through += ["prlimit", "--fsize=100"]
    ended = start(directory, database, *through)
    print(ended.stderr)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(f"SQLite in {database} cannot be used: ")
    assert "Traceback" not in ended.stderr


def damage(database: Path, page: int | None = None) -> None:
    """Overwrite a page of the file, or all but the first."""
    begin, end = (page * 4096 - 4096, page * 4096) if page else (4096, database.stat().st_size)
    with database.open("r+b") as file:
        file.seek(begin)
        file.write(b"\xff" * (end - begin))


def test_a_file_damaged_while_it_is_used_is_said_so_and_its_backup_takes_over(model: StandIn, tmp_path: Path) -> None:
    database, backup = tmp_path / "chatkit.db", tmp_path / "backup.db"
    with service(**probing(model, database)) as running:
        thread_id = thread_of(running.create("Before"))
        copy(database, backup)
        change(database, "PRAGMA wal_checkpoint(TRUNCATE)")
        damage(database)
        change(database, "PRAGMA user_version = 1")  # so that nothing is read from a page cache
        refused = running.post("items.list", {"thread_id": thread_id})
        assert (refused.status_code, refused.json()["code"]) == (503, "store_unavailable")
        [error] = running.create("Not stored")
        assert error["message"] == NO_DATABASE
        assert running.http.get("/readyz").status_code == 503
        assert running.http.get("/healthz").status_code == 200
    for file in tmp_path.glob("chatkit.db*"):
        file.unlink()
    backup.rename(database)
    with service(**probing(model, database)) as running:
        assert_works_again(running, thread_id)


def copy(database: Path, backup: Path) -> None:
    with closing(sqlite3.connect(database)) as db, closing(sqlite3.connect(backup)) as target:
        db.backup(target)


def test_a_damage_that_was_found_is_remembered_although_other_parts_still_work(
    model: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = tmp_path / "chatkit.db"
    with service(**probing(model, database)) as running:
        thread_id = thread_of(running.create("Before"))
        change(database, "PRAGMA wal_checkpoint(TRUNCATE)")
        [(page,)] = rows(database, "SELECT rootpage FROM sqlite_schema WHERE name = 'feedback'")
        damage(database, page)
        change(database, "PRAGMA user_version = 1")
        item_id = running.items(thread_id)[-1]["id"]
        assert running.http.get("/readyz").status_code == 200
        feedback = {"thread_id": thread_id, "item_ids": [item_id], "kind": "positive"}
        assert running.post("items.feedback", feedback).status_code == 503
        assert errors_of(running.say(thread_id)) == []
        assert running.http.get("/readyz").status_code == 503
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("how", ["deleted", "replaced by a backup", "without its log"])
def test_nothing_is_acknowledged_that_would_go_to_a_file_that_is_not_there_any_more(
    how: str, model: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database, backup = tmp_path / "chatkit.db", tmp_path / "backup.db"
    with service(**probing(model, database)) as running:
        thread_id = thread_of(running.create("Before"))
        copy(database, backup)
        match how:
            case "deleted":
                database.unlink()
            case "replaced by a backup":
                backup.rename(database)
            case "without its log":
                database.with_name("chatkit.db-wal").unlink()
        assert_takes_no_writes(running, thread_id)
    assert "start the service again" in caplog.text
