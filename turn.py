"""A turn (a user's message and all that answers it) as a task of its own: run, recorded, streamed, stopped."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Set
from contextlib import aclosing, suppress
from copy import deepcopy
from enum import Enum, auto
from math import inf
from typing import NamedTuple

import anyio
from chatkit.errors import CustomStreamError
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
from conversations import ConversationStore, LeaseLost, StoreUnavailable, aware, is_hidden, is_thought, stopped_marker
from failures import log_failure, raised_by_author, words_for
from leases import patiently
from openitems import OpenItems
from outbox import Outbox
from sdk import encode
from telemetry import note

log = logging.getLogger("service.turns")

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

STOPPED_OUTCOMES = {
    Stopped.CLIENT_TOO_SLOW: "client_too_slow",
    Stopped.LEASE_LOST: "lease_lost",
    Stopped.TIMEOUT: "timeout",
    Stopped.SHUTDOWN: "shutdown",
}
"""What the log and the figures say of such a turn, where it was not its own user who stopped it."""


class Kept(NamedTuple):
    """The ids of a turn's items that are stored: all, and those that a user sees as a part of its answer."""

    all: Set[str]
    shown: Set[str]


class Turn(StreamingResult):
    """One running turn, and the bytes that its client has not fetched yet.

    Its task is the only driver of the events' generator (a second one would break the SDKs' context variables). It
    is never suspended by its client, and it is cancelled at most once and never while it ends, so that what it does
    about a cancellation is not cancelled again: a cancelled response scope would do that at every await.

    The stream is over when the client has been told all; the task lives on while the end is not stored.
    """

    def __init__(
        self,
        store: ConversationStore,
        thread: ThreadMetadata,
        context: RequestContext,
        events: Events,
        present: Present,
        timeout_seconds: float,
        *,
        may_retry: bool,
    ):
        self.context = context
        self.thread = thread
        self.open_items = OpenItems()
        self.stopped: Stopped | None = None
        self.goes_on_alone = False
        """Whether it runs to its end although its client is gone, or reads too slowly."""
        self._store = store
        self._saved_thread = thread.model_copy(deep=True)
        self._hidden: set[str] = set()
        self._thoughts: set[str] = set()
        self._stored: set[str] = set()
        self._may_retry = may_retry
        self._can_retry = False
        self._listening = True
        self._began = self._ending = False
        self._over = asyncio.get_running_loop().create_future()  # an event takes five times as much memory
        self._unread = Outbox(lambda event: encode(present(event, context)))
        self._news: asyncio.Future[None] | None = None
        self.task = asyncio.create_task(self._run(events), name=f"turn {thread.id}")
        deadline = asyncio.get_running_loop().call_later(timeout_seconds, self.stop, Stopped.TIMEOUT)
        self.task.add_done_callback(lambda _: deadline.cancel())
        self.task.add_done_callback(lambda _: self._close())
        super().__init__(self._chunks())

    # --- the outside ----------------------------------------------------------------------------------------------

    @property
    def kept(self) -> Kept:
        """Its items that are stored, whatever becomes of it."""
        kept = self._stored | self.open_items.placed
        return Kept(kept, self._seen(kept))

    @property
    def has_shown(self) -> bool:
        """Whether it has anything of an answer: more than thoughts, and what is hidden."""
        return bool(self._seen(self._stored | self.open_items.ids))

    def _seen(self, ids: Set[str]) -> Set[str]:
        return ids - self._hidden - self._thoughts

    def stop(self, reason: Stopped) -> None:
        """Cancel the turn; it stores what it has shown. Only the first call does anything, and none at its end."""
        if self.stopped is None and not self._ending:
            self.stopped = reason
            if self._began:  # a task that is cancelled before its first step would not even end
                self.task.cancel()

    def show_title(self, title: str) -> None:
        """Show the title that the thread was given meanwhile, unless its agent has given it another."""
        if self.thread.title is None and not self._over.done():
            self.thread.title = self._saved_thread.title = title
            self.context.loaded_threads[self.thread.id]["title"] = title  # alone: the agent may have changed others
            self._send(ThreadUpdatedEvent(thread=thread_response(self.thread)))

    def detach(self) -> None:
        """Let the turn run on with nobody listening."""
        self._listening = False
        self._unread.clear()

    async def settled(self) -> None:
        """Wait for the end of the stream, whatever happens to the waiting request.

        The turn is stored then, unless the database does not answer.
        """
        with anyio.CancelScope(shield=True):
            await asyncio.wait({self._over})

    async def read(self, timeout_seconds: float = inf) -> bytes | None:
        """Return all that waits, joined; nothing after a silence of `timeout_seconds`; None at the end."""
        if not self._unread and not self._over.done():
            loop = asyncio.get_running_loop()
            self._news = loop.create_future()
            silence = loop.call_later(timeout_seconds, self._tell_reader)
            try:
                await self._news  # `asyncio.wait` would take a kilobyte more of each stream that says nothing
            finally:
                silence.cancel()
        chunk = self._unread.take()
        return chunk if chunk or not self._over.done() else None

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        while (chunk := await self.read()) is not None:
            yield chunk

    # --- the task -------------------------------------------------------------------------------------------------

    async def _run(self, events: Events) -> None:
        note(outcome="failed")  # unless it ends otherwise
        self._began = self.stopped is None
        if not self._began:
            note(outcome="stopped")
            await events.aclose()
            await self._end([], self._words_for_stop())
            return
        try:
            async with aclosing(events):
                with agents_sdk_user_agent_override():
                    async for event in events:
                        await self._record(event)
                        self._send(event)
                        await self._save_thread()
            await self._save_thread()
        except asyncio.CancelledError:
            note(outcome=STOPPED_OUTCOMES.get(self.stopped or Stopped.CLIENT_GONE, "stopped"))
            await self._end([stopped_marker(self.thread.id)], self._words_for_stop())
        except LeaseLost:  # another turn has the thread: write no more
            log.warning("turn on thread %s ended: its lease is another's", self.thread.id)
            note(outcome="lease_lost")
            await self._end([stopped_marker(self.thread.id)], ErrorEvent(message=STOPPED_WORDS[Stopped.LEASE_LOST]))
        except Exception as failure:
            if isinstance(failure, NotFoundError) and await self._is_deleted():
                note(outcome="stopped")
                await self._end([], ErrorEvent(message=STOPPED_WORDS[Stopped.LEASE_LOST]))
                return
            raised = raised_by_author(failure)
            words = words_for(raised)
            if not isinstance(raised, CustomStreamError):  # its author's own way to end a turn
                log_failure(log, f"turn on thread {self.thread.id} failed", failure)
            await self._end([], words.model_copy(update={"allow_retry": words.allow_retry and self._can_retry}))
        else:
            note(outcome="completed")
            await self._end([], None)

    async def _is_deleted(self) -> bool:
        with suppress(StoreUnavailable):
            try:
                await self._store.load_thread(self.thread.id, self.context)
            except NotFoundError:
                return True
        return False

    async def _record(self, event: ThreadStreamEvent) -> None:
        """Store what the event says before the client hears it."""
        match event:
            case ThreadItemAddedEvent(item=item):
                self._put(item)
            case ThreadItemUpdatedEvent(item_id=item_id, update=update):
                if item_id not in self.open_items:  # an item of before: it is shown changed, so it is kept changed
                    earlier = await self._store.load_item(self.thread.id, item_id, self.context)
                    if is_hidden(earlier):  # which nothing changes; it may stand for one that cannot be read
                        self._note(earlier)
                        return
                    self._put(earlier, stored=True)
                self.open_items.update(item_id, update)
            case ThreadItemDoneEvent(item=item) | ThreadItemReplacedEvent(item=item):
                await self._store_item(item)
            case ThreadItemRemovedEvent(item_id=item_id):
                self.open_items.withhold(item_id)
                with suppress(NotFoundError):  # ChatKit 1.6.5 removes what it never showed, after a guardrail
                    if item_id not in self.open_items:
                        self._note(await self._store.load_item(self.thread.id, item_id, self.context))
                    await self._store.delete_thread_item(self.thread.id, item_id, self.context)
                self._stored.discard(item_id)
                self.open_items.discard(item_id)
            case StreamOptionsEvent():
                self._can_retry = self._may_retry

    def _put(self, item: ThreadItem, *, stored: bool = False) -> None:
        item.created_at = aware(item.created_at)
        self.open_items.put(item, stored=stored)
        self._note(item)

    def _note(self, item: ThreadItem) -> None:
        for ids, is_one in ((self._hidden, is_hidden(item)), (self._thoughts, is_thought(item))):
            (ids.add if is_one else ids.discard)(item.id)

    async def _store_item(self, item: ThreadItem) -> None:
        if earlier := self.open_items.take_unplaced_before(item.id):
            await self._store.save_checkpoints(self.thread.id, earlier, self.context)
        self._put(item)  # until it is stored: a cancellation now must find it whole
        await self._store.add_thread_item(self.thread.id, item, self.context)
        self._stored.add(item.id)
        self.open_items.discard(item.id)

    async def _save_thread(self) -> None:
        """Store and show what the agent changed on the thread object, as ChatKit promises its authors.

        What others changed meanwhile, a name that the user gave say, is put into the object and shown with it.
        """
        if self.thread != self._saved_thread:
            saved = self.thread.model_copy(deep=True)  # the agent may go on while this is written
            await self._store.save_thread(saved, self.context)
            self._saved_thread = await self._store.load_thread(self.thread.id, self.context)
            for name in ThreadMetadata.model_fields:
                ours, now = getattr(self.thread, name), getattr(self._saved_thread, name)
                if ours == getattr(saved, name) and ours != now:  # no other: the agent may hold on to what it has
                    setattr(self.thread, name, deepcopy(now))
            self._send(ThreadUpdatedEvent(thread=thread_response(self.thread)))

    async def _end(self, more: list[ThreadItem], error: ErrorEvent | None) -> None:
        """Store what is still open, show it as finished, and give the thread back.

        Where the database does not answer the client is told so, and the turn, whose lease is renewed as long as it
        lives, goes on trying.
        """
        self._ending = True
        try:
            shown, problem = await self._store_end(more)
        except asyncio.CancelledError:  # a shutdown whose patience is over
            self._close(error or words_for(StoreUnavailable("the process ends")))
            raise
        except StoreUnavailable as unavailable:
            note(outcome="failed")
            log_failure(log, f"the end of a turn on thread {self.thread.id} could not be stored yet", unavailable)
            self._close(error or words_for(unavailable))
            await patiently(lambda: self._store_end(more))
        else:
            for event in shown:
                self._send(event)
            self._close(error or problem)

    async def _store_end(self, more: list[ThreadItem]) -> tuple[list[ThreadStreamEvent], ErrorEvent | None]:
        """Return what is to be shown of the end, and what to say of it."""
        try:
            for item_id in self.open_items.withheld:  # which a guardrail took back, while the database was away say
                with suppress(NotFoundError, LeaseLost):
                    await self._store.delete_thread_item(self.thread.id, item_id, self.context)
                self._stored.discard(item_id)
            items, unstored = self.open_items.close()
            if not self._seen({item.id for item in items} | self._stored):
                more = []  # it would be said of an answer from before
            await self._end_turn([*items, *more])
        except (LeaseLost, NotFoundError):  # what is open now is not this turn's to store any more
            deleted = self.stopped is Stopped.THREAD_DELETED
            return [], None if deleted else ErrorEvent(message=STOPPED_WORDS[Stopped.LEASE_LOST])
        except StoreUnavailable:
            raise
        except Exception as unwritable:  # an open item that no database takes must not keep the thread for ever
            log_failure(log, f"what a turn on thread {self.thread.id} had open could not be stored", unwritable)
            note(outcome="failed")
            with suppress(LeaseLost, NotFoundError):
                await self._end_turn(more)
            return [], words_for(unwritable)
        done = [ThreadItemDoneEvent(item=item) for item in items]
        return [*done, *(ThreadItemRemovedEvent(item_id=item_id) for item_id in unstored)], None

    async def _end_turn(self, items: list[ThreadItem]) -> None:
        await self._store.end_turn(self.thread.id, items, self.context, began=self._began)

    def _close(self, error: ErrorEvent | None = None) -> None:
        """End the stream, with this error where there is one."""
        if error is not None:
            self._send(error)
        if not self._over.done():
            self._over.set_result(None)
        self._tell_reader()

    def _words_for_stop(self) -> ErrorEvent | None:
        words = STOPPED_WORDS.get(self.stopped) if self.stopped else None
        return ErrorEvent(message=words, allow_retry=self._can_retry) if words else None

    def _send(self, event: ThreadStreamEvent) -> None:
        item_id = getattr(event, "item_id", None) or getattr(getattr(event, "item", None), "id", None)
        if not self._listening or item_id in self._hidden:
            return
        self._unread.put(event)
        self._tell_reader()
        if self._unread.size_bytes > MAX_UNREAD_BYTES:
            # not at once: a task that cancels itself may be at its end by then
            asyncio.get_running_loop().call_soon(self._give_client_up)

    def _tell_reader(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def _give_client_up(self) -> None:
        if self.goes_on_alone:
            self.detach()
        else:
            self.stop(Stopped.CLIENT_TOO_SLOW)


def thread_response(thread: ThreadMetadata) -> Thread:
    """Return the thread as clients see it: without its metadata."""
    return Thread(**thread.model_dump(exclude={"metadata"}), items=Page())
