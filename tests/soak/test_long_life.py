"""A long life: memory and open files after 20 000 turns of all kinds are what they were after 2 000."""

import os
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import count
from pathlib import Path

from clients import Stream
from conftest import LONG, probing
from service import Client, Process, errors_of, eventually, process, thread_of
from standin import Begin, Call, Echo, FailLater, Hang, StandIn
from test_faults import resident_bytes, rows, say, seen_text

EARLY, LATE = (2000, 20000) if LONG else (200, 500)
ALLOWED = 1.03 if LONG else 1.05  # what a young process still grows by is no leak
CLIENTS = 4
MOST_SOCKETS = 3 + 2 * CLIENTS
"""One is listened on, the event loop wakes itself with two; each client had a turn and a title at once."""


def test_memory_and_open_files_stay_what_they_were_whatever_becomes_of_the_turns(
    model: StandIn, tmp_path: Path
) -> None:
    model.otherwise = [Echo()]
    model.by_first_word = {
        "look_up": [Call("look_up", {"word": "life"})],
        "stop": [Begin("Half an answer"), Hang()],
        "fail": [Begin("Half an answer"), FailLater("server_error")],
    }
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
        eventually(lambda: not rows(database, "SELECT * FROM leases"), what="the end of the turns that were stopped")
        assert rows(database, "SELECT * FROM checkpoints") == []
        assert_all_kinds_were_taken(running)


def assert_all_kinds_were_taken(running: Process) -> None:
    """About a fifth of the turns, at least, had each outcome."""
    outcomes = Counter(re.findall(r"outcome=(\w+)", running.log))
    print(dict(outcomes))
    assert outcomes.keys() == {"completed", "stopped", "failed", "refused"}
    assert min(outcomes.values()) > 0.9 * LATE / len(KINDS)
    assert "Traceback" not in running.log


def take_turns(running: Process, model: StandIn, turns: "count[int]", until: int) -> None:
    """Talk until there have been so many turns: on new threads and old ones, of each kind in turn."""

    def talk(_: int) -> None:
        with closing(Client(running.url)) as client:
            thread_id = ""
            while (number := next(turns)) < until:
                model.asked.clear()  # the stand-in is not what is measured, but it is on the same machine
                model.asked_for_titles.clear()
                if number % 7 == 0 or not thread_id:
                    thread_id = thread_of(client.create(f"turn {number}"))
                KINDS[number % len(KINDS)](client, thread_id)
                if number % 10 == 0:
                    client.ask("items.list", {"thread_id": thread_id, "limit": 20})
                    client.ask("threads.list", {"limit": 20})

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(talk, range(CLIENTS)))


def plain(client: Client, thread_id: str) -> None:
    assert errors_of(client.say(thread_id, "some words")) == []


def with_a_tool(client: Client, thread_id: str) -> None:
    events = client.say(thread_id, "look_up a word")
    assert errors_of(events) == []
    assert "progress_update" in [event["type"] for event in events]


def stopped(client: Client, thread_id: str) -> None:
    with Stream.say(client.url, thread_id, "stop this") as stream:
        stream.read_until(seen_text("Half an answer"))
        stream.leave()


def failed_by_the_model(client: Client, thread_id: str) -> None:
    assert len(errors_of(client.say(thread_id, "fail to answer"))) == 1


def refused(client: Client, thread_id: str) -> None:
    assert say(client, f"{thread_id} of somebody else", "some words").status_code == 404


KINDS: list[Callable[[Client, str], None]] = [plain, with_a_tool, stopped, failed_by_the_model, refused]


def measured(running: Process) -> tuple[int, int]:
    """Return resident memory in bytes and the number of open files, connections not among them.

    Those to the model are closed when the next one is opened, so that some are left; they are counted here.
    """

    def open_files() -> list[str]:
        found = []
        for each in Path(f"/proc/{running.process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                found.append(os.readlink(each))
        return found

    def files() -> list[str]:
        return [each for each in open_files() if not each.startswith("socket:")]

    eventually(lambda: len(open_files()) - len(files()) <= MOST_SOCKETS, 60, "the end of the clients' connections")
    return resident_bytes(running), len(files())
