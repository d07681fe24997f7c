"""A long life: memory and open files after 20 000 turns are what they were after 2 000."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count
from pathlib import Path

from conftest import LONG, probing
from service import Client, Process, errors_of, eventually, process
from standin import Echo, StandIn
from test_faults import resident_bytes, rows

EARLY, LATE = (2000, 20000) if LONG else (200, 500)
ALLOWED = 1.03 if LONG else 1.10  # what a young process still grows by is no leak
CLIENTS = 4
MOST_SOCKETS = 3 + 2 * CLIENTS
"""One is listened on, the event loop wakes itself with two; each client had a turn and a title at once."""


def test_memory_and_open_files_stay_what_they_were(model: StandIn, tmp_path: Path) -> None:
    model.otherwise = [Echo()]
    database, turns = tmp_path / "chatkit.db", count()
    with process(tmp_path, **probing(model, database)) as running:
        take_turns(running, model, turns, EARLY)
        early = measured(running)
        take_turns(running, model, turns, LATE)
        late = measured(running)
        print(f"after {EARLY} turns {early[0] / 1e6:.1f} MB and {early[1]} open files;", end=" ")
        print(f"after {LATE} turns {late[0] / 1e6:.1f} MB and {late[1]} ({late[0] / early[0] - 1:+.1%})")
        assert late[0] < early[0] * ALLOWED
        assert late[1] <= early[1]
        assert "Traceback" not in running.log
    assert rows(database, "SELECT * FROM leases") == []


def take_turns(running: Process, model: StandIn, turns: "count[int]", until: int) -> None:
    """Talk until there have been so many turns: on new threads and old ones, with tools and broken off."""

    def talk(_: int) -> None:
        thread_id = None
        with closing(Client(running.url)) as client:
            while (number := next(turns)) < until:
                model.asked.clear()  # the stand-in is not what is measured, but it is on the same machine
                model.asked_for_titles.clear()
                if number % 7 == 0:
                    thread_id = None
                if thread_id is None:
                    events = client.create(f"Turn {number}")
                    thread_id = events[0]["thread"]["id"]
                else:
                    events = client.say(thread_id, f"Turn {number}")
                assert errors_of(events) == []
                if number % 10 == 0:
                    client.ask("items.list", {"thread_id": thread_id, "limit": 20})
                    client.ask("threads.list", {"limit": 20})

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(talk, range(CLIENTS)))


def measured(running: Process) -> tuple[int, int]:
    """Return resident memory in bytes and the number of open files, connections not among them.

    Those to the model are closed when the next one is opened, so that some are left; they are counted here.
    """
    directory = Path(f"/proc/{running.process.pid}/fd")

    def connections() -> int:
        return sum(os.readlink(each).startswith("socket:") for each in directory.iterdir())

    eventually(lambda: connections() <= MOST_SOCKETS, 60, "the end of the clients' connections")
    return resident_bytes(running), len(list(directory.iterdir())) - connections()
