"""The turns of this process: started, kept up to date in the store, stopped together."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Self

import anyio
from chatkit.store import NotFoundError
from chatkit.types import ThreadMetadata

from context import RequestContext
from conversations import NO_QUOTA, ConversationStore, LeaseLost, Quota, QuotaExceeded, StoreUnavailable
from failures import log_failure
from leases import RETRY_SECONDS, Leases, patiently
from turn import Events, Kept, Present, Stopped, Turn

log = logging.getLogger("service.turns")

CHECKPOINT_SECONDS = 0.5
"""Text that a client saw a second ago has reached the disk: half of that is left for the write."""
RENEWAL_SECONDS = 3.0


class Turns:
    """The turns of this process. One runs on a thread at a time, in whichever process."""

    def __init__(self, store: ConversationStore, timeout_seconds: float, quota: Quota, max_turns: int):
        self._store = store
        self._timeout_seconds = timeout_seconds
        self._leases = Leases(store, quota, self._is_answering)
        self._max_turns = max_turns
        self._opening = 0
        self._beside: set[asyncio.Task[None]] = set()
        self._writing: set[asyncio.Task[None]] = set()
        self._live: dict[str, Turn] = {}
        self._work: dict[Turn | None, asyncio.Task[None]] = {}
        """Checkpoints that are being written; None: the renewal."""
        self._renewed_at = 0.0

    @classmethod
    @asynccontextmanager
    async def running(
        cls, store: ConversationStore, *, timeout_seconds: float = 300, quota: Quota = NO_QUOTA, max_turns: int = 0
    ) -> AsyncIterator[Self]:
        """Keep leases and checkpoints up to date; leaving stops and stores what still runs."""
        turns = cls(store, timeout_seconds, quota, max_turns)
        keeper = asyncio.create_task(turns._keep(), name="turns")
        try:
            yield turns
        finally:
            await turns.drain()
            keeper.cancel()
            await asyncio.wait({keeper})

    @asynccontextmanager
    async def opening(
        self, thread_id: str, context: RequestContext, new_thread: ThreadMetadata | None = None
    ) -> AsyncIterator[RequestContext]:
        """Yield the context with a lease on the thread, which is given back unless a turn is started inside.

        Raises `ThreadBusy` when there is none within five seconds, `QuotaExceeded` when the user, or the process, has
        enough turns already.
        """
        if new_thread is not None:  # which waits for nobody, and must not be made where there is no room for its turn
            with self._room():
                async with self._leases.taken(thread_id, context, new_thread) as leased:
                    yield leased
            return
        self._require_room()
        async with self._leases.taken(thread_id, context) as leased:
            with self._room():  # who waited for a busy thread has taken none
                yield leased

    def _is_answering(self, thread_id: str, context: RequestContext) -> bool:
        turn = self._live.get(thread_id)
        return turn is not None and turn.context.user_id == context.user_id

    @contextmanager
    def _room(self) -> Iterator[None]:
        self._require_room()
        self._opening += 1
        try:
            yield
        finally:
            self._opening -= 1

    def _require_room(self) -> None:
        if self._max_turns and len(self._live) + self._opening >= self._max_turns:
            raise QuotaExceeded("max_turns", retry_after_seconds=5)

    def start(
        self,
        thread: ThreadMetadata,
        context: RequestContext,
        events: Events,
        present: Present,
        *,
        may_retry: bool = True,
    ) -> Turn:
        """Run the events of a thread whose lease the context has; `may_retry` where a retry would repeat them."""
        turn = Turn(self._store, thread, context, events, present, self._timeout_seconds, may_retry=may_retry)
        self._live[thread.id] = turn
        turn.task.add_done_callback(lambda _: self._forget(turn))
        return turn

    def beside(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something that no turn waits for, and that may outlive the turn; where it fails it is logged."""
        task = asyncio.create_task(_quietly(work), name="beside a turn")
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    def write_beside(self, write: Callable[[], Awaitable[Any]]) -> asyncio.Task[None]:
        """Make a write as patiently as the ends of turns are stored; a shutdown waits for it as for them."""
        task = asyncio.create_task(_quietly(patiently(write)), name="write beside a turn")
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        return task

    def show_title(self, thread_id: str, title: str) -> None:
        """Show the thread's new title where a turn still streams."""
        if turn := self._live.get(thread_id):
            turn.show_title(title)

    def stop_thread(self, thread_id: str) -> None:
        """Stop the turn on a thread that was just deleted, if it runs here; elsewhere its next write does."""
        if turn := self._live.get(thread_id):
            turn.stop(Stopped.THREAD_DELETED)

    async def drain(self, timeout_seconds: float = 5.0) -> None:
        """Stop all turns and wait until they are stored. To be called before the store closes."""
        for turn in self._live.values():
            turn.stop(Stopped.SHUTDOWN)
        for task in self._beside:
            task.cancel()
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        ends = {turn.task for turn in self._live.values()} | self._leases.giving_back | self._beside
        with anyio.CancelScope(shield=True):
            while ends := {task for task in ends | self._writing if not task.done()}:  # turns that end write more
                await asyncio.wait(ends, timeout=max(0, deadline - asyncio.get_running_loop().time()))
                if asyncio.get_running_loop().time() >= deadline:
                    break
            for task in ends:  # the database did not answer, and soon nobody can ask it any more
                task.cancel()
            if ends:
                await asyncio.wait(ends, timeout=RETRY_SECONDS)

    def _forget(self, turn: Turn) -> None:
        if self._live.get(turn.thread.id) is turn:
            del self._live[turn.thread.id]

    async def _keep(self) -> None:
        """Write each turn's checkpoints one after the other, and renew all leases, whatever any of these waits for."""
        clock = asyncio.get_running_loop().time
        work = self._work
        try:
            while True:
                await asyncio.sleep(CHECKPOINT_SECONDS)
                done = [work.pop(whose) for whose, task in [*work.items()] if task.done()]
                errors = [error for task in done if (error := task.exception())]  # each, or asyncio logs it too
                if errors:
                    log_failure(log, "leases and checkpoints could not be written", errors[0])
                for turn in self._live.values():
                    if turn not in work and turn.open_items.has_unsaved:
                        work[turn] = asyncio.create_task(self._checkpoint(turn), name="checkpoint")
                if self._live and None not in work and clock() - self._renewed_at >= RENEWAL_SECONDS:
                    work[None] = asyncio.create_task(self._renew(), name="renewal")
        finally:
            for task in work.values():
                task.cancel()

    async def keep(self, thread_id: str) -> Kept:
        """Store what the thread's turn has open, now; return what is stored of it."""
        turn = self._live[thread_id]
        if not turn.has_shown:  # of a long thought each piece would be a write
            return turn.kept
        if (writing := self._work.get(turn)) is not None:
            await asyncio.wait({writing})
        await self._save_open_items(turn)
        return turn.kept

    async def _save_open_items(self, turn: Turn) -> None:
        items = turn.open_items.take_unsaved()
        try:
            if items:
                await self._store.save_checkpoints(turn.thread.id, items, turn.context)
        except StoreUnavailable:
            turn.open_items.give_back(items)
            raise

    async def _checkpoint(self, turn: Turn) -> None:
        try:
            await self._save_open_items(turn)
        except (LeaseLost, NotFoundError):
            pass  # its next write, or the next renewal, ends the turn
        except StoreUnavailable:
            raise
        except Exception as error:  # what one turn shows must not end the keeping of all
            log_failure(log, f"what is open on thread {turn.thread.id} could not be kept", error)

    async def _renew(self) -> None:
        live = list(self._live.values())
        held = await self._store.renew_leases([turn.context.lease for turn in live if turn.context.lease])
        for turn in live:
            if turn.context.lease not in held:
                turn.stop(Stopped.LEASE_LOST)
        self._renewed_at = asyncio.get_running_loop().time()


async def _quietly(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except Exception as error:
        log_failure(log, "what was done beside a turn failed", error)
