"""A turn (a user's message and all that answers it) as a task of its own: run, recorded, streamed, stopped."""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from enum import Enum, auto
from typing import Any, Self

import anyio
from chatkit.server import StreamingResult, agents_sdk_user_agent_override
from chatkit.store import NotFoundError
from chatkit.types import (
    ErrorEvent,
    Page,
    StreamOptionsEvent,
    Thread,
    ThreadItem,
    ThreadItemAddedEvent,
    ThreadItemDoneEvent,
    ThreadItemRemovedEvent,
    ThreadItemReplacedEvent,
    ThreadItemUpdatedEvent,
    ThreadMetadata,
    ThreadStreamEvent,
    ThreadUpdatedEvent,
)

from context import RequestContext
from conversations import (
    NO_QUOTA,
    ConversationStore,
    LeaseLost,
    Quota,
    QuotaExceeded,
    StoreUnavailable,
    ThreadBusy,
    aware,
    is_hidden,
    stopped_marker,
)
from failures import log_failure, words_for
from openitems import OpenItems
from sdk import encode

log = logging.getLogger("service.turns")

BUSY_WAIT_SECONDS = 5.0
CHECKPOINT_SECONDS = 0.5
"""Text that a client saw a second ago has reached the disk: half of that is left for the write."""
RENEWAL_SECONDS = 3.0
MAX_UNREAD_BYTES = 8 * 1024 * 1024

Events = AsyncGenerator[ThreadStreamEvent, None]
Present = Callable[[ThreadStreamEvent, RequestContext], ThreadStreamEvent]
"""Makes of an event what its client is to see, with links for instance; what is stored is the event itself."""


class Stopped(Enum):
    """Why a turn was stopped before its end."""

    CLIENT_GONE = auto()
    CLIENT_TOO_SLOW = auto()
    THREAD_DELETED = auto()
    LEASE_LOST = auto()
    TIMEOUT = auto()
    SHUTDOWN = auto()


STOPPED_WORDS = {
    Stopped.LEASE_LOST: "This answer was interrupted. Reload the page to see what was kept of it.",
    Stopped.TIMEOUT: "The answer took too long and was stopped.",
    Stopped.SHUTDOWN: "The service is being restarted, which stopped this answer. Try again in a moment.",
}
"""What the client is told, where it still listens."""


class Turn(StreamingResult):
    """One running turn, and the bytes that its client has not fetched yet.

    Its task is the only driver of the events' generator (a second one would break the SDKs' context variables). It
    is never suspended by its client, and it is cancelled at most once, so that what it does about a cancellation is
    not cancelled again: a cancelled response scope would do that at every await.
    """

    def __init__(
        self,
        store: ConversationStore,
        thread: ThreadMetadata,
        context: RequestContext,
        events: Events,
        present: Present,
        timeout_seconds: float,
    ):
        self.context = context
        self.thread = thread
        self.open_items = OpenItems()
        self.stopped: Stopped | None = None
        self._store = store
        self._present = present
        self._saved_thread = thread.model_copy(deep=True)
        self._answering = False
        self._listening = True
        self._unread: list[bytes] = []
        self._unread_bytes = 0
        self._news = asyncio.Event()
        self.task = asyncio.create_task(self._run(events), name=f"turn {thread.id}")
        deadline = asyncio.get_running_loop().call_later(timeout_seconds, self.stop, Stopped.TIMEOUT)
        self.task.add_done_callback(lambda _: deadline.cancel())
        self.task.add_done_callback(lambda _: self._news.set())
        super().__init__(self._chunks())

    # --- the outside ----------------------------------------------------------------------------------------------

    def stop(self, reason: Stopped) -> None:
        """Cancel the turn; it stores what it has shown. Only the first call does anything."""
        if self.stopped is None and not self.task.done():
            self.stopped = reason
            self.task.cancel()

    def show_title(self, title: str) -> None:
        """Show the title that the thread was given meanwhile, unless its agent has given it another."""
        if self.thread.title is None and not self.task.done():
            self.thread.title = self._saved_thread.title = title
            self.context.loaded_threads[self.thread.id].title = title  # and no more: the agent may have changed others
            self._send(ThreadUpdatedEvent(thread=thread_response(self.thread)))

    def detach(self) -> None:
        """Let the turn run on with nobody listening."""
        self._listening = False
        self._unread.clear()

    async def settled(self) -> None:
        """Wait for the turn's end, whatever happens to the waiting request."""
        with anyio.CancelScope(shield=True):
            await asyncio.wait({self.task})

    async def read(self, timeout_seconds: float | None = None) -> bytes | None:
        """Return all that waits, joined; nothing after a silence of `timeout_seconds`; None at the end."""
        if not self._unread and not self.task.done():
            self._news.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_seconds):
                    await self._news.wait()
        chunk = b"".join(self._unread)
        self._unread.clear()
        self._unread_bytes = 0
        return chunk if chunk or not self.task.done() else None

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        while (chunk := await self.read()) is not None:
            yield chunk

    # --- the task -------------------------------------------------------------------------------------------------

    async def _run(self, events: Events) -> None:
        try:
            async with aclosing(events):
                with agents_sdk_user_agent_override():
                    async for event in events:
                        await self._record(event)
                        self._send(event)
                        await self._save_thread()
            await self._save_thread()
        except asyncio.CancelledError:
            await self._end([stopped_marker(self.thread.id)], self._words_for_stop())
        except (LeaseLost, NotFoundError) as error:  # another turn has the thread, or it is deleted: write no more
            log.warning("turn on thread %s ended: %s", self.thread.id, type(error).__name__)
            await self._end([], ErrorEvent(message=STOPPED_WORDS[Stopped.LEASE_LOST]))
        except Exception as error:
            words = words_for(error)
            log_failure(log, f"turn on thread {self.thread.id} failed", error)
            await self._end([], words.model_copy(update={"allow_retry": words.allow_retry and self._answering}))
        else:
            await self._end([], None)

    async def _record(self, event: ThreadStreamEvent) -> None:
        """Store what the event says before the client hears it."""
        match event:
            case ThreadItemAddedEvent(item=item):
                self._put(item)
            case ThreadItemUpdatedEvent(item_id=item_id, update=update):
                if item_id not in self.open_items:  # an item of before: it is shown changed, so it is kept changed
                    self._put(await self._store.load_item(self.thread.id, item_id, self.context))
                self.open_items.update(item_id, update)
            case ThreadItemDoneEvent(item=item) | ThreadItemReplacedEvent(item=item):
                await self._store_item(item)
            case ThreadItemRemovedEvent(item_id=item_id):
                with suppress(NotFoundError):  # ChatKit 1.6.5 removes what it never showed, after a guardrail
                    await self._store.delete_thread_item(self.thread.id, item_id, self.context)
                self.open_items.discard(item_id)
            case StreamOptionsEvent():
                self._answering = True

    def _put(self, item: ThreadItem) -> None:
        item.created_at = aware(item.created_at)
        self.open_items.put(item)

    async def _store_item(self, item: ThreadItem) -> None:
        if earlier := self.open_items.take_unplaced_before(item.id):
            await self._store.save_checkpoints(self.thread.id, earlier, self.context)
        self._put(item)  # until it is stored: a cancellation now must find it whole
        await self._store.add_thread_item(self.thread.id, item, self.context)
        self.open_items.discard(item.id)

    async def _save_thread(self) -> None:
        """Store and show what the agent changed on the thread object, as ChatKit promises its authors."""
        if self.thread != self._saved_thread:
            self._saved_thread = self.thread.model_copy(deep=True)
            await self._store.save_thread(self.thread, self.context)
            self._send(ThreadUpdatedEvent(thread=thread_response(self.thread)))

    async def _end(self, more: list[ThreadItem], error: ErrorEvent | None) -> None:
        """Store what is still open, show it as finished, and give the thread back."""
        items, empty = self.open_items.close()
        try:
            await self._store.end_turn(self.thread.id, [*items, *more], self.context)
        except (LeaseLost, NotFoundError):  # what is open now is not this turn's to store any more
            if self.stopped is not Stopped.THREAD_DELETED:
                error = error or ErrorEvent(message=STOPPED_WORDS[Stopped.LEASE_LOST])
        except StoreUnavailable as unavailable:  # the lease will run out, and the checkpoints become items then
            log_failure(log, f"the end of a turn on thread {self.thread.id} could not be stored", unavailable)
            error = error or words_for(unavailable)
        except Exception as unwritable:  # an open item that no database takes must not keep the thread for ever
            log_failure(log, f"what a turn on thread {self.thread.id} had open could not be stored", unwritable)
            error = error or words_for(unwritable)
            with suppress(LeaseLost, NotFoundError, StoreUnavailable):
                await self._store.end_turn(self.thread.id, more, self.context)
        else:
            for item in items:
                self._send(ThreadItemDoneEvent(item=item))
            for item_id in empty:
                self._send(ThreadItemRemovedEvent(item_id=item_id))
        if error is not None:
            self._send(error)

    def _words_for_stop(self) -> ErrorEvent | None:
        words = STOPPED_WORDS.get(self.stopped) if self.stopped else None
        return ErrorEvent(message=words, allow_retry=self._answering) if words else None

    def _send(self, event: ThreadStreamEvent) -> None:
        if not self._listening or ((item := getattr(event, "item", None)) is not None and is_hidden(item)):
            return
        chunk = b"data: " + encode(self._present(event, self.context)) + b"\n\n"
        self._unread.append(chunk)
        self._unread_bytes += len(chunk)
        self._news.set()
        if self._unread_bytes > MAX_UNREAD_BYTES:
            self.stop(Stopped.CLIENT_TOO_SLOW)


def thread_response(thread: ThreadMetadata) -> Thread:
    """Return the thread as clients see it: without its metadata."""
    return Thread(**thread.model_dump(exclude={"metadata"}), items=Page())


class Turns:
    """The turns of this process. One runs on a thread at a time, in whichever process."""

    def __init__(self, store: ConversationStore, timeout_seconds: float, quota: Quota, max_turns: int):
        self._store = store
        self._timeout_seconds = timeout_seconds
        self._quota = quota
        self._max_turns = max_turns
        self._opening = 0
        self._beside: set[asyncio.Task[None]] = set()
        self._holder = secrets.token_hex(8)
        self._live: dict[str, Turn] = {}

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
        if self._max_turns and len(self._live) + self._opening >= self._max_turns:
            raise QuotaExceeded("max_turns", retry_after_seconds=5)
        self._opening += 1
        try:
            context = await self._lease(thread_id, context, new_thread)
            try:
                yield context
            except BaseException:
                with suppress(LeaseLost, NotFoundError, StoreUnavailable), anyio.CancelScope(shield=True):
                    await self._store.end_turn(thread_id, [], context)
                raise
        finally:
            self._opening -= 1

    async def _lease(
        self, thread_id: str, context: RequestContext, new_thread: ThreadMetadata | None
    ) -> RequestContext:
        deadline = asyncio.get_running_loop().time() + BUSY_WAIT_SECONDS
        while True:
            try:
                lease = await self._store.acquire_lease(
                    thread_id, self._holder, context, quota=self._quota, new_thread=new_thread
                )
                return replace(context, lease=lease)
            except ThreadBusy:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.1)

    def start(self, thread: ThreadMetadata, context: RequestContext, events: Events, present: Present) -> Turn:
        """Run the events of a thread whose lease the context has."""
        turn = Turn(self._store, thread, context, events, present, self._timeout_seconds)
        self._live[thread.id] = turn
        turn.task.add_done_callback(lambda _: self._forget(turn))
        return turn

    def beside(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something that no turn waits for, and that may outlive the turn; it must not raise."""
        task = asyncio.create_task(work, name="beside a turn")
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

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
        live = list(self._live.values())
        for turn in live:
            turn.stop(Stopped.SHUTDOWN)
        with anyio.CancelScope(shield=True), anyio.move_on_after(timeout_seconds):
            for turn in live:
                await turn.settled()
            for task in self._beside:
                task.cancel()
            while self._beside:
                await asyncio.wait(self._beside)

    def _forget(self, turn: Turn) -> None:
        if self._live.get(turn.thread.id) is turn:
            del self._live[turn.thread.id]

    async def _keep(self) -> None:
        clock = asyncio.get_running_loop().time
        renewed_at = clock()
        while True:
            await asyncio.sleep(CHECKPOINT_SECONDS)
            try:
                await asyncio.gather(*[self._checkpoint(turn) for turn in self._live.values()])
                if self._live and clock() - renewed_at >= RENEWAL_SECONDS:
                    renewed_at = clock()
                    await self._renew()
            except StoreUnavailable as error:
                log_failure(log, "leases and checkpoints could not be written", error)

    async def _checkpoint(self, turn: Turn) -> None:
        if items := turn.open_items.take_unsaved():
            try:
                await self._store.save_checkpoints(turn.thread.id, items, turn.context)
            except (LeaseLost, NotFoundError):
                pass  # its next write, or the next renewal, ends the turn
            except StoreUnavailable:
                turn.open_items.give_back(items)
                raise
            except Exception as error:  # what one turn shows must not end the keeping of all
                log_failure(log, f"what is open on thread {turn.thread.id} could not be kept", error)

    async def _renew(self) -> None:
        live = list(self._live.values())
        held = await self._store.renew_leases(self._holder)
        for turn in live:
            if turn.context.lease not in held:
                turn.stop(Stopped.LEASE_LOST)
