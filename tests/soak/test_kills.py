"""A service that is killed (SIGKILL) at random moments under load, started again, and looked through."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import httpx2

from clients import Stream
from conftest import LONG, probing
from databases import Database, SQLiteDatabase
from service import Client, fold, process, text_of, thread_of
from standin import Echo, StandIn
from test_faults import assert_items_are_stored, has_grown, is_empty, say, stored_items

Item = dict[str, Any]


class Witness:
    """Clients that load a service until it dies, and remember what it had told them, and when."""

    def __init__(self, chance: random.Random, doomed: str = ""):
        self.chance = random.Random(chance.random())
        self.doomed = doomed
        """How `x-replica` ends in the answers of the service that is killed, where a proxy stands before several."""
        self.answered: list[str] = []
        """Threads whose turn had ended, as their clients saw."""
        self.done: dict[str, Item] = {}
        """Items seen as done, by their ids."""
        self.open: dict[str, Item] = {}
        """Items as they were seen more than a second before a kill that found them open; more where all was late."""
        self.renamed: dict[str, str] = {}
        """Titles of threads whose change was acknowledged."""
        self.refused: list[str] = []
        """What a living service did not answer."""
        self.killed_at = float("inf")
        """When the kill was begun: what was seen before that, and not what is noticed later, is what it found."""
        self.answering = threading.Event()
        """Set when a kill would find an open answer of which some words must be kept."""
        self.streams: list[Stream] = []
        """All answers, in the order of their ends."""
        self._lock = threading.Lock()

    @property
    def open_texts(self) -> int:
        """How many answers a kill found in their midst."""
        with self._lock:
            return sum(not is_empty(item) for item in self.open.values())

    def load(self, url: str, killed: threading.Event, clients: int = 4) -> list[threading.Thread]:
        loading = [threading.Thread(target=self._load, args=(url, killed)) for _ in range(clients)]
        for each in loading:
            each.start()
        return loading

    def _load(self, url: str, killed: threading.Event) -> None:
        while not killed.is_set():
            with self._lock:
                chosen = self.chance.choice(self.answered) if self.answered and self.chance.random() < 0.5 else None
            try:
                self._turn(url, chosen, killed)
            except (OSError, httpx2.TransportError) as error:
                if not killed.is_set():
                    self.refused.append(repr(error))

    def _turn(self, url: str, thread_id: str | None, killed: threading.Event) -> None:
        seen_at: list[tuple[float, int]] = []
        text = "One word follows another until the end. " * (30 if self.chance.random() < 0.5 else 1)  # 0.2 or 7 s
        with Stream.say(url, thread_id, text) if thread_id else Stream.create(url, text) as stream:
            while not stream.ended:
                stream.read(0.05)
                seen_at.append((time.monotonic(), len(stream.seen)))
                known = sure(seen_at, self.killed_at)
                if known > 6 and stream.header("x-replica").endswith(self.doomed):  # 6: words among them
                    self.answering.set()
        self.streams.append(stream)
        if stream.status != 200:
            return
        events = stream.seen
        done = {event["item"]["id"]: event["item"] for event in events if event["type"] == "thread.item.done"}
        with self._lock:
            self.done |= done
            known = sure(seen_at, self.killed_at)
            self.open |= {item["id"]: item for item in fold(events[:known]) if item["id"] not in done}
        if stream.is_whole:
            self._rename(url, thread_of(events))

    def _rename(self, url: str, thread_id: str) -> None:
        with closing(Client(url)) as client:
            title = f"Seen by {self.chance.random()}"
            self.renamed.pop(thread_id, None)  # from now on either may be
            response = client.post("threads.update", {"thread_id": thread_id, "title": title})
        with self._lock:
            if response.status_code == 200:
                self.renamed[thread_id] = title
            self.answered.append(thread_id)


def sure(seen_at: list[tuple[float, int]], killed_at: float) -> int:
    """Return how many of the events must outlive a kill now, or at that time: those that are older than a second.

    On a machine that is late with words, whatever writes them down is late too: three times the longest pause.
    """
    came = [moment for (_, before), (moment, count) in pairwise(seen_at) if count > before]
    lateness = 3 * max((later - earlier for earlier, later in pairwise(came)), default=0)
    now = min(seen_at[-1][0], killed_at)
    return max([count for moment, count in seen_at if moment < now - 1 - lateness], default=0)


def test_kills_under_load_lose_nothing_that_was_acknowledged(
    model: StandIn, tmp_path: Path, chance: random.Random, new_database: Callable[[], Database]
) -> None:
    model.otherwise = [Echo(gap=0.03)]
    lanes = [(new_database(), Witness(chance), random.Random(chance.random())) for _ in range(2)]
    times = 50 if LONG else 15 if isinstance(lanes[0][0], SQLiteDatabase) else 6  # in each of two lanes
    with ThreadPoolExecutor(2) as pool:
        kept = list(pool.map(lambda lane: kill_often(model, tmp_path, *lane, times=times), lanes))
    print("; ".join(kept))


def kill_often(
    model: StandIn,
    directory: Path,
    database: Database,
    witness: Witness,
    chance: random.Random,
    *,
    times: int,
) -> str:
    directory = Path(mkdtemp(dir=directory))
    variables = probing(model, **database.environ)
    kills = 0
    while kills < times or (witness.open_texts == 0 and kills < 3 * times):
        killed = threading.Event()
        with process(directory, **variables) as running:
            assert_items_are_stored(database, witness.done)
            witness.answering.clear()
            loading = witness.load(running.url, killed)
            if chance.random() < 0.5:
                time.sleep(chance.uniform(0, 2.5))  # the moment of death is what is random here
            elif witness.answering.wait(20):
                time.sleep(chance.uniform(0, 0.5))
            killed.set()
            witness.killed_at = time.monotonic()
            running.kill()
            kills += 1
        for each in loading:
            each.join()
        witness.killed_at = float("inf")
    with process(directory, **variables) as running:
        kept = assert_all_is_kept_and_goes_on(running, database, witness)
    if isinstance(database, SQLiteDatabase):
        assert database.query("PRAGMA integrity_check") == [("ok",)]
    assert witness.refused == []
    return f"{kills} kills: {kept}"


def assert_all_is_kept_and_goes_on(client: Client, database: Database, witness: Witness) -> str:
    """Every thread can be used within 12 s, and nothing that was seen is lost; return the figures."""
    dead, began, slowest = len(database.leases()), time.monotonic(), 0.0
    threads = [thread_id for (thread_id,) in database.query("SELECT id FROM @threads")]
    for thread_id in threads:
        asked = time.monotonic()
        while (response := say(client, thread_id, f"Are you there, {thread_id}?")).status_code == 409:
            assert response.json()["code"] == "thread_busy"
            assert time.monotonic() < began + 12, "a dead turn holds its thread for more than 12 s"
        slowest = max(slowest, time.monotonic() - asked)
        assert f"Are you there, {thread_id}?" in response.text
        assert "thread.item.done" in response.text
    for thread_id in threads:
        items = client.items(thread_id)
        assert [text_of(item) for item in items[-2:]] == [f"Are you there, {thread_id}?"] * 2
    titles = dict(database.query("SELECT id, title FROM @threads"))
    assert {thread_id: titles[thread_id] for thread_id in witness.renamed} == witness.renamed
    assert_items_are_stored(database, witness.done)
    stored = stored_items(database)
    for item in witness.open.values():
        assert is_empty(item) or item["id"] in stored, f"{item} is lost"
        assert is_empty(item) or has_grown(item, stored[item["id"]]), f"{item} became {stored[item['id']]}"
    assert database.leases() == database.query("SELECT * FROM @checkpoints") == []
    assert witness.open_texts > 0, "no kill found an answer that had been going on for more than a second"
    return (
        f"{len(threads)} threads, {len(witness.done)} items acknowledged, {witness.open_texts} seen in part,"
        f" {len(witness.renamed)} titles, {dead} leases left, the slowest thread answered after {slowest:.1f} s"
    )
