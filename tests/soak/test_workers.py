"""Four processes on one SQLite file under load: nothing is lost, and no client hears of a lock."""

import os
import random
import signal
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from conftest import LONG, probing
from service import Client, Process, errors_of, eventually, fold, process, text_of, thread_of
from standin import Echo, StandIn
from test_faults import assert_items_are_stored, children_of, rows

SECONDS = 300 if LONG else 8
CLIENTS = 12


class Visitor:
    """A client that talks on threads of its own, and remembers what it was told."""

    def __init__(self, url: str, number: int):
        self.url, self.number = url, number
        self.seen: dict[str, dict] = {}
        self.said: dict[str, list[str]] = {}
        self.slowest = 0.0

    def talk(self, ended: threading.Event) -> None:
        chance = random.Random(self.number)
        while not ended.is_set():
            with closing(Client(self.url)) as client:  # a connection of its own, so that any worker may take it
                thread_id = chance.choice(list(self.said)) if self.said and chance.random() < 0.8 else None
                text, began = f"visitor {self.number} says {chance.random()}", time.monotonic()
                events = client.say(thread_id, text) if thread_id else client.create(text)
                self.slowest = max(self.slowest, time.monotonic() - began)
                assert errors_of(events) == [], events
                assert text_of(fold(events)[-1]) == text
                self.said.setdefault(thread_of(events), []).append(text)
                self.seen |= {item["id"]: item for item in fold(events)}
                if chance.random() < 0.2:
                    thread_id = thread_of(events)
                    client.ask("threads.update", {"thread_id": thread_id, "title": text})
                    assert client.ask("threads.get_by_id", {"thread_id": thread_id})["title"] == text


def test_four_workers_on_one_file_lose_nothing_and_nobody_hears_of_a_lock(model: StandIn, tmp_path: Path) -> None:
    model.otherwise = [Echo()]
    database, ended = tmp_path / "chatkit.db", threading.Event()
    with process(tmp_path, **probing(model, database, WORKERS="4")) as running:
        visitors = [Visitor(running.url, number) for number in range(CLIENTS)]
        with ThreadPoolExecutor(CLIENTS) as pool:
            talking = [pool.submit(visitor.talk, ended) for visitor in visitors]
            time.sleep(SECONDS)  # how long the load lasts is what is chosen here
            ended.set()
        for each in talking:
            each.result()
        with closing(Client(running.url)) as client:
            for visitor in visitors:
                for thread_id, said in visitor.said.items():
                    texts = [text_of(item) for item in client.items(thread_id)]
                    assert texts == [text for text in said for _ in range(2)]
        assert_all_took_part(running)
    for visitor in visitors:
        assert_items_are_stored(database, visitor.seen)
    assert rows(database, "PRAGMA integrity_check") == [("ok",)]
    assert rows(database, "SELECT * FROM leases") == rows(database, "SELECT * FROM checkpoints") == []
    assert "locked" not in running.log
    assert "Traceback" not in running.log
    turns = sum(len(said) for visitor in visitors for said in visitor.said.values())
    slowest = max(visitor.slowest for visitor in visitors)
    print(f"4 workers, {CLIENTS} clients: {turns} turns in {SECONDS} s, the slowest took {slowest:.2f} s")


def test_a_worker_that_dies_while_the_file_is_locked_is_replaced_once_it_is_not(model: StandIn, tmp_path: Path) -> None:
    database = tmp_path / "chatkit.db"
    with process(tmp_path, **probing(model, database, WORKERS="2")) as running:
        with closing(sqlite3.connect(database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            dead, *_ = workers_of(running)
            os.kill(dead, signal.SIGKILL)
            eventually(lambda: "cannot be opened yet" in running.log, 60, "a new worker that finds the file locked")
            other.execute("ROLLBACK")
        eventually(lambda: len({*workers_of(running)} - {dead}) == 2, 30, "two workers")
        eventually(lambda: running.create(), 30, "an answer")
        running.signal(signal.SIGTERM)
        assert running.wait() == 0
        assert "Traceback" not in running.log


def assert_all_took_part(running: Process) -> None:
    workers = workers_of(running)
    assert len(workers) == 4
    assert all(processor_ticks(pid) > 0 for pid in workers)


def workers_of(running: Process) -> list[int]:
    return [pid for pid in children_of(running.process.pid) if "spawn_main" in command_of(pid)]


def command_of(process_id: int) -> str:
    return Path(f"/proc/{process_id}/cmdline").read_text().replace("\0", " ")


def processor_ticks(process_id: int) -> int:
    return int(Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[11])
