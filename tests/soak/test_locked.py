"""A database file that another process locks: for 30 seconds, or in the short form for as long as a writer waits."""

import signal
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from unittest.mock import ANY

from clients import Stream
from conftest import LONG, probing
from service import Client, errors_of, eventually, process, service, text_of, thread_of
from sqlite import BUSY_SECONDS
from standin import Begin, Hang, StandIn
from test_disk import assert_takes_no_writes, assert_works_again
from test_faults import rows, seen_text


def test_a_database_that_another_process_locks_is_said_so_and_used_again_when_it_is_free(
    model: StandIn, tmp_path: Path
) -> None:
    database = tmp_path / "chatkit.db"
    with service(**probing(model, database)) as running:
        thread_id = thread_of(running.create("Before"))
        with half_an_answer(model, running.url) as stream, ThreadPoolExecutor(1) as pool:
            with locked(database):
                began = time.monotonic()
                assert_takes_no_writes(running, thread_id)
                while LONG and time.monotonic() - began < 25:
                    assert Client(running.url).items(thread_id)
                waiting = pool.submit(Client(running.url).create, "Shortly before the end")
                time.sleep(5 if LONG else 0.5)
            assert errors_of(waiting.result()) == []  # who did not have to wait for long noticed nothing
            assert_works_again(running, thread_id)
            stream.leave()
        eventually(lambda: not rows(database, "SELECT * FROM leases"), what="the end of the turn")
        assert [text_of(item) for item in running.items(thread_of(stream.seen))] == ["Hello", "Half an answer"]


def test_a_service_that_is_ended_while_its_file_is_locked_does_not_wait_for_the_lock(
    model: StandIn, tmp_path: Path
) -> None:
    database = tmp_path / "chatkit.db"
    with process(tmp_path, **probing(model, database), SHUTDOWN_GRACE_SECONDS="1") as running:
        client = Client(running.url)
        thread_id = thread_of(client.create("Before"))
        with half_an_answer(model, running.url) as stream, ThreadPoolExecutor(1) as pool:
            with locked(database):
                began = time.monotonic()
                renaming = pool.submit(client.post, "threads.update", {"thread_id": thread_id, "title": "New"})
                time.sleep(0.5)
                running.signal(signal.SIGTERM)
                assert running.wait() == 0
                stream.read(1)
                assert time.monotonic() - began < 1.5 * BUSY_SECONDS  # it was twice that, each batch waiting anew
            assert errors_of(stream.seen) == [{"type": "error", "code": "custom", "message": ANY, "allow_retry": True}]
            assert renaming.result().json()["code"] in ("restarting", "store_unavailable")
        assert "never retrieved" not in running.log
        assert "Traceback" not in running.log


@contextmanager
def half_an_answer(model: StandIn, url: str) -> Iterator[Stream]:
    model.will(Begin("Half an answer"), Hang())
    with Stream.create(url) as stream:
        stream.read_until(seen_text("Half an answer"))
        yield stream


@contextmanager
def locked(database: Path) -> Iterator[None]:
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            other.execute("ROLLBACK")
