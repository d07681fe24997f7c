"""A process that is killed (SIGKILL) in the midst of writes to the store: what it had acknowledged is there."""

import random
import subprocess
import sys
from collections import defaultdict

from conftest import LONG
from databases import Database
from warm import ROOT

KILLS = 100 if LONG else 3

WRITER = """
import asyncio, itertools, sys
from store import open_store
from test_store import alice, end, make_thread

async def write(store):
    thread_id = await make_thread(store)
    for number in itertools.count():
        await store.add_thread_item(thread_id, end(f"item_{number}", thread_id), alice())
        print(thread_id, number, flush=True)

async def main():
    async with open_store(*sys.argv[1:]) as store:
        await asyncio.gather(*(write(store) for _ in range(4)))

asyncio.run(main())
"""


def test_a_process_killed_in_the_midst_of_writes_leaves_what_it_acknowledged_and_no_gap(
    database: Database, chance: random.Random
) -> None:
    for _ in range(KILLS):
        acknowledged = killed_writer(database, after=chance.randrange(1, 400))
        stored = items_by_thread(database)
        for thread_id, number in (line.split() for line in acknowledged):
            assert len(stored[thread_id]) > int(number), f"item {number} of {thread_id} is lost"
        for names in stored.values():
            assert names == [f"item_{number}" for number in range(len(names))]
    print(f"{KILLS} kills: {sum(map(len, stored.values()))} items in {len(stored)} threads, all whole")


def killed_writer(database: Database, after: int) -> list[str]:
    """Return what a process acknowledged that wrote on four threads at once and was killed after so many items."""
    command = [sys.executable, "-c", WRITER, database.url, database.prefix]
    environ = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = [process.stdout.readline() for _ in range(after)]
        process.kill()
        return [line for line in [*first, *process.stdout] if line.endswith("\n")]


def items_by_thread(database: Database) -> dict[str, list[str]]:
    """Return the ids of all items, in order."""
    found = defaultdict(list)
    for thread_id, name in database.query("SELECT thread_id, id FROM @items ORDER BY seq"):
        found[thread_id].append(name)
    return found
