"""What is measured without HTTP, in a process of its own: `python direct.py FIGURE`, which prints one JSON object."""

import asyncio
import json
import os
import random
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

BENCH = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCH.parent), str(BENCH.parent / "tests")]

WRITERS = 64
PAGES, PAGES_IN_TURN = 1000, 20


async def disk(path: str) -> dict[str, float]:
    """How long a write of 4 KB takes until it is on the disk, in milliseconds."""
    with Path(path).open("wb", buffering=0) as file:
        took = []
        for _ in range(200):
            begin = time.monotonic()
            file.write(bytes(4096))
            os.fsync(file.fileno())
            took.append(time.monotonic() - begin)
    return {"milliseconds": median(took) * 1000}


async def writes(path: str, writes_each: int) -> dict[str, float]:
    """Durable item writes a second of 64 writers: committed together, and with BEGIN and COMMIT for each."""
    from chatkit.types import AssistantMessageContent, AssistantMessageItem, ThreadMetadata

    import sqlite
    import store as stores
    from context import RequestContext

    class CommitEach(sqlite.SQLiteFile):
        """The same statements by the same connection, each write in a transaction of its own."""

        async def write(self, write: Any) -> Any:
            if not hasattr(self, "lock"):
                self.lock = asyncio.Lock()
            async with self.lock:
                [outcome] = await sqlite._on_thread(self._writer, partial(self._commit, [write]))
                return outcome

    async def one(kind: type[sqlite.SQLiteFile]) -> tuple[float, float]:
        file = f"{path}-{kind.__name__}"
        async with kind.open(file, stores.MIGRATIONS) as opened:
            store, context, took = stores.SQLiteStore(opened), RequestContext("user"), []

            async def writer(number: int) -> None:
                thread = f"thr_{number}"
                await store.save_thread(ThreadMetadata(id=thread, created_at=datetime.now(UTC)), context)
                for place in range(writes_each):
                    item = AssistantMessageItem(
                        id=f"msg_{number}_{place}",
                        thread_id=thread,
                        created_at=datetime.now(UTC),
                        content=[AssistantMessageContent(text="word " * 50)],
                    )
                    begin = time.monotonic()
                    await store.add_thread_item(thread, item, context)
                    took.append(time.monotonic() - begin)

            begin = time.monotonic()
            await asyncio.gather(*[writer(number) for number in range(WRITERS)])
            seconds = time.monotonic() - begin
        for name in (file, f"{file}-wal", f"{file}-shm"):
            Path(name).unlink(missing_ok=True)
        return len(took) / seconds, sorted(took)[int(len(took) * 0.99)] * 1000

    together, together_p99 = await one(sqlite.SQLiteFile)
    each, each_p99 = await one(CommitEach)
    return {"together": together, "together_p99": together_p99, "each": each, "each_p99": each_p99}


async def build(path: str, items: int) -> None:
    """Make a store with one thread of so many items."""
    from chatkit.types import AssistantMessageContent, AssistantMessageItem, ThreadMetadata

    from context import RequestContext
    from store import open_store

    now = datetime.now(UTC)
    content = [AssistantMessageContent(text="word " * 20)]
    item = AssistantMessageItem(id="msg_@", thread_id="thr_1", created_at=now, content=content)
    body = item.model_dump_json(by_alias=True)
    async with open_store(f"sqlite:///{path}") as store:
        await store.save_thread(ThreadMetadata(id="thr_1", created_at=now), RequestContext("user"))
    with sqlite3.connect(path) as db:
        rows = ((n, f"msg_{n}", body.replace("@", str(n))) for n in range(1, items + 1))
        db.executemany("INSERT INTO items VALUES (?, 'thr_1', 'user', ?, 'assistant_message', ?)", rows)
        db.execute("UPDATE sequence SET value = ?", (items + 1,))
    db.close()


async def page(directory: str, *sizes: int) -> dict[str, float]:
    """CPU of a page of 20 items behind a cursor anywhere, in microseconds, by the items that the store has.

    A few pages are read from each in turn, and the system has the files in memory: it may have put them out meanwhile.
    """
    from context import RequestContext
    from store import open_store

    context, chosen = RequestContext("user"), random.Random()
    seconds = dict.fromkeys(map(str, sizes), 0.0)
    async with AsyncExitStack() as stack:
        stores = {}
        for items in sizes:
            path = Path(directory, f"{items}.db")
            with path.open("rb") as file:
                while file.read(1 << 20):
                    pass
            stores[items] = await stack.enter_async_context(open_store(f"sqlite:///{path}"))
        for read in range(0, 2 * PAGES, PAGES_IN_TURN):
            for items, store in stores.items():
                begin = time.process_time()
                for _ in range(PAGES_IN_TURN):
                    await store.load_thread_items("thr_1", f"msg_{chosen.randint(30, items)}", 20, "desc", context)
                if read >= PAGES:  # those before have warmed up
                    seconds[str(items)] += time.process_time() - begin
    return {items: spent / PAGES * 1e6 for items, spent in seconds.items()}


async def tokens() -> dict[str, float]:
    """CPU of verifying a token, in microseconds: by the verifier, and by python-jose with the key set as it came."""
    from jose import jwt

    from auth import Verifier
    from issuer import Issuer

    async def cost(verify: Callable[[], Awaitable[Any]]) -> float:
        costs = []
        for _ in range(5):
            begin = time.process_time()
            for _ in range(200):
                await verify()
            costs.append((time.process_time() - begin) / 200 * 1e6)
        return median(costs)

    async def decode(token: str, key: Any, algorithm: str) -> None:
        jwt.decode(token, key, algorithms=[algorithm], audience=issuer.url, issuer=issuer.url)

    found = {}
    with Issuer() as issuer:
        async with Verifier(issuer.jwks_url, issuer.url) as verifier:
            await verifier.wait_until_ready()
            for algorithm in ("EdDSA", "ES256", "RS256"):
                token = issuer.token(algorithm)
                found[algorithm] = await cost(partial(verifier.verify, token))
                if algorithm == "EdDSA":
                    continue  # python-jose has none
                key = issuer.keys[algorithm].jwk
                found[f"{algorithm} jose"] = await cost(partial(decode, token, key, algorithm))
    return found


if __name__ == "__main__":
    figure, arguments = sys.argv[1], [int(each) if each.isdigit() else each for each in sys.argv[2:]]
    print(json.dumps(asyncio.run(globals()[figure](*arguments))))
