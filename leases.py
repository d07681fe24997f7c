"""The lease that a turn has on its thread: taken before its first write, given back whatever happens."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

from chatkit.store import NotFoundError
from chatkit.types import ThreadMetadata

from context import RequestContext
from conversations import ConversationStore, LeaseLost, Quota, StoreUnavailable, ThreadBusy
from failures import log_failure

log = logging.getLogger("service.turns")

BUSY_WAIT_SECONDS = 5.0
MAX_WAITING = 8
"""Requests of a user that wait in a process for one busy thread; more are refused at once."""
RETRY_SECONDS = 1.0
PATIENCE_SECONDS = 24 * 3600.0
"""How often, and how long, the end of a turn is offered to a database that does not answer."""


class Leases:
    """Takes leases within the users' quota, but none of a thread that `is_busy` here: its turn lives, also where the
    database, after longer than a lease, takes it for dead. `giving_back` are tasks that must not outlive the store.
    """

    def __init__(self, store: ConversationStore, quota: Quota, is_busy: Callable[[str, RequestContext], bool]):
        self._store = store
        self._is_busy = is_busy
        self._quota = quota
        self._waiting: Counter[tuple[str, str]] = Counter()
        """By user too: who asks for what is another's waits beside nobody."""
        self.giving_back: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def taken(
        self, thread_id: str, context: RequestContext, new_thread: ThreadMetadata | None = None
    ) -> AsyncIterator[RequestContext]:
        """Yield the context with a lease, which is for the turn that is started inside.

        Where none is, because something raises, the lease is given back and does not count; before this raises too,
        unless the database is slow.
        """
        taking = asyncio.create_task(self._take(thread_id, context, new_thread), name="lease")
        taking.add_done_callback(lambda _: taking.cancelled() or taking.exception())  # or asyncio logs what nobody asks
        try:
            await asyncio.wait({taking})  # a store that has begun to take it does, although its caller is gone
            yield taking.result()
        except BaseException:
            giving = asyncio.create_task(self._give_back(thread_id, taking), name="give back")
            self.giving_back.add(giving)
            giving.add_done_callback(self.giving_back.discard)
            await asyncio.wait({giving}, timeout=RETRY_SECONDS)
            raise

    async def _take(self, thread_id: str, context: RequestContext, new_thread: ThreadMetadata | None) -> RequestContext:
        place = (context.user_id, thread_id)
        if self._waiting[place] >= MAX_WAITING:
            raise ThreadBusy(thread_id)
        deadline = asyncio.get_running_loop().time() + BUSY_WAIT_SECONDS
        self._waiting[place] += 1
        try:
            while True:
                try:
                    if self._is_busy(thread_id, context):
                        raise ThreadBusy(thread_id)
                    lease = await self._store.acquire_lease(
                        thread_id, context, quota=self._quota, new_thread=new_thread
                    )
                    return replace(context, lease=lease)
                except ThreadBusy:
                    if asyncio.get_running_loop().time() > deadline:
                        raise
                    await asyncio.sleep(0.1)
        finally:
            self._waiting[place] -= 1
            self._waiting += Counter()  # forgets those for whom nobody waits

    async def _give_back(self, thread_id: str, taking: asyncio.Task[RequestContext]) -> None:
        await asyncio.wait({taking})
        if taking.exception() is None:
            with suppress(LeaseLost, NotFoundError):
                await patiently(lambda: self._store.end_turn(thread_id, [], taking.result(), began=False))


async def patiently(write: Callable[[], Awaitable[Any]]) -> None:
    """Try the write again and again while the database does not answer, but not without end."""
    deadline = asyncio.get_running_loop().time() + PATIENCE_SECONDS
    while True:
        try:
            await write()
            return
        except StoreUnavailable as error:
            if asyncio.get_running_loop().time() > deadline:
                log_failure(log, "what the database did not take for too long is given up", error)
                return
            await asyncio.sleep(RETRY_SECONDS)
