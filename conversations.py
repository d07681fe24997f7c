"""What every store promises, whatever database it stands on; and how items become rows."""

import logging
import secrets
from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TypeVar

from chatkit.store import Store, StoreItemType
from chatkit.types import (
    Attachment,
    FeedbackKind,
    HiddenContextItem,
    Page,
    SDKHiddenContextItem,
    ThreadItem,
    ThreadMetadata,
    WorkflowItem,
)

from context import RequestContext

log = logging.getLogger("service.store")

T = TypeVar("T")

LEASE_SECONDS = 10
"""A turn that has not renewed its lease for so long is dead."""
RECOVERY_SECONDS = 3.0
"""How long a reader waits for what a dead turn left to be written as items."""

HIDDEN_TYPES = ("hidden_context_item", "sdk_hidden_context")
"""Kinds of items that the model sees and no client ever does."""

STOPPED = "The answer above was stopped before its end. Do not go on with it unless the user asks."
"""What the model is told, in a hidden item, of a turn that was stopped or died."""

MARKER_TYPE: Literal["sdk_hidden_context"] = "sdk_hidden_context"

_PREFIXES: dict[StoreItemType, str] = {
    "thread": "thr",
    "message": "msg",
    "tool_call": "tc",
    "workflow": "wf",
    "task": "tsk",
    "attachment": "atc",
    "sdk_hidden_context": "shcx",
}


class StoreUnavailable(Exception):
    """The database does not answer, or takes no writes, right now. Its message has no user's data in it."""


NOTHING_OF_OURS = "there is nothing of this service in it"
"""Why a database cannot be used that may not be made."""


class ThreadBusy(Exception):
    """Another turn holds the thread's lease."""


class QuotaExceeded(Exception):
    """The user has used up `quota` (a field of `Quota`); it is free again after `retry_after_seconds`."""

    def __init__(self, quota: str, retry_after_seconds: int):
        super().__init__(quota)
        self.quota = quota
        self.retry_after_seconds = retry_after_seconds


class AlreadyUploaded(Exception):
    """The attachment's bytes are complete, or another upload has begun anew: this one must write no more."""


class AlreadySent(Exception):
    """The attachment is part of another thread."""


class LeaseLost(Exception):
    """This turn's lease ran out and somebody else took the thread: it must write no more."""


class IncompatibleDatabase(Exception):
    """The database cannot be used by this release. The message says what to do."""


@dataclass(frozen=True)
class Quota:
    """What one user may use; 0 is no limit. Counted in the store, so that all processes share it."""

    turns_per_minute: int = 0
    concurrent_turns: int = 0
    tokens_per_day: int = 0


@dataclass(frozen=True)
class Usage:
    """What one user used of one model on one day (`YYYY-MM-DD`, UTC)."""

    user_id: str
    day: str
    model: str
    requests: int
    input_tokens: int
    output_tokens: int


NO_QUOTA = Quota()


@dataclass(frozen=True)
class Purged:
    """What a removal job has removed."""

    threads: int
    attachments: int


@dataclass(frozen=True)
class DeletedUser:
    """What was stored of a user and is deleted. `running_turns` had not ended: they end when they notice."""

    threads: int
    items: int
    attachments: int
    usage_rows: int
    running_turns: int


KEPT = "urn:attachment:"
"""Begins, before an attachment's id, what stands in the store where a client sees a link to an image."""
CHUNK_BYTES = 256 * 1024
"""Attachments are kept in chunks of this size, the last one excepted."""
UNSENT_HOURS = 24
MAX_UNSENT = 100
"""Attachments of one user that are in no thread: each is a row, however few its bytes."""
"""How long an attachment is kept that is in no thread."""
PURGE_INTERVAL_SECONDS = 3600
DELETION_BATCH = 100
"""So many threads or attachments are removed in one transaction: others must not wait long for it."""


class ConversationStore(Store[RequestContext]):
    """ChatKit's `Store`, and what a service needs beyond it.

    Every method answers only for `context.user_id`: what is somebody else's raises `NotFoundError`, exactly as what
    does not exist. Times are aware UTC. While `context.lease` is set, a write raises `LeaseLost` once the thread has
    gone to another turn. Any method may raise `StoreUnavailable`.
    """

    def generate_thread_id(self, context: RequestContext) -> str:
        return new_id("thread")

    def generate_item_id(self, item_type: StoreItemType, thread: ThreadMetadata, context: RequestContext) -> str:
        return new_id(item_type)

    @abstractmethod
    async def add_thread_item(self, thread_id: str, item: ThreadItem, context: RequestContext) -> None:
        """Add the item, or replace the one with its id. With a message its attachments become the thread's, at once."""

    @abstractmethod
    async def load_thread_items(
        self,
        thread_id: str,
        after: str | None,
        limit: int,
        order: str,
        context: RequestContext,
        *,
        hidden: bool = True,
    ) -> Page[ThreadItem]:
        """Return up to `limit` items beyond the cursor `after` (a `Page.after`, or an item's id), `asc` or `desc`.

        Fewer, although there are more, where they are long.
        With `hidden=False` only what a client may see. An unknown cursor raises `NotFoundError`.
        """

    @abstractmethod
    async def delete_items_after(
        self,
        thread_id: str,
        item_id: str,
        context: RequestContext,
        *,
        until: str,
        keeping: Collection[str] = (),
        once: Collection[str] | None = None,
    ) -> bool:
        """Delete at once all after the item, up to `until` (an id or a cursor), but not those in `keeping`.

        With `once`, only where one of these ids, an open one's too, stands after the item; return whether it did so.
        """

    @abstractmethod
    async def name_thread(self, thread_id: str, title: str, context: RequestContext) -> bool:
        """Give the thread a title unless it has one; return whether it has this one now."""

    @abstractmethod
    async def acquire_lease(
        self,
        thread_id: str,
        context: RequestContext,
        *,
        quota: Quota = NO_QUOTA,
        new_thread: ThreadMetadata | None = None,
    ) -> str:
        """Take the thread for one turn and return the lease, for `RequestContext.lease`.

        It ends after `LEASE_SECONDS` unless renewed. A new thread is stored with it, at once. Raises `ThreadBusy`, and
        `QuotaExceeded` when the turn would pass the user's quota.
        """

    @abstractmethod
    async def is_leased(self, thread_id: str, context: RequestContext) -> bool:
        """Return whether a turn runs on the thread, in whichever process."""

    @abstractmethod
    async def renew_leases(self, leases: Collection[str]) -> set[str]:
        """Renew these leases, and return those that nobody else has taken meanwhile.

        It waits for no thread that another transaction holds: such a lease is held as long as it is not taken.
        """

    @abstractmethod
    async def save_checkpoints(self, thread_id: str, items: Sequence[ThreadItem], context: RequestContext) -> None:
        """Keep unfinished items as they stand. The first checkpoint of an item settles its place in the thread.

        When the turn dies, whoever next loads the thread finds them as items, followed by the `STOPPED` marker.
        """

    @abstractmethod
    async def end_turn(
        self, thread_id: str, items: Sequence[ThreadItem], context: RequestContext, *, began: bool = True
    ) -> None:
        """Store what was still open, drop the checkpoints and give the lease back, at once.

        Also after the turn was taken for dead, in place of what was recovered from its checkpoints, unless somebody
        has begun another turn, or written to the thread, since.
        A turn that was refused before it `began` is not counted against the user's quota.
        """

    @abstractmethod
    async def save_feedback(
        self, thread_id: str, item_ids: Sequence[str], kind: FeedbackKind, context: RequestContext
    ) -> None:
        """Remember the user's verdict on each item, in place of an earlier one; all of them or none."""

    @abstractmethod
    async def save_attachment(self, attachment: Attachment, context: RequestContext) -> None:
        """Save the attachment's metadata. Once it has a thread it keeps it: another one raises `AlreadySent`."""

    @abstractmethod
    async def reserve_attachment(
        self, attachment: Attachment, size: int, max_storage_bytes: int, context: RequestContext
    ) -> None:
        """Save a new attachment and set `size` bytes aside for it.

        Raises `QuotaExceeded`: "storage" where all of the user's attachments would pass `max_storage_bytes` (0 is no
        limit), "unsent_files" where more than `MAX_UNSENT` of them would be in no thread.
        """

    @abstractmethod
    async def begin_upload(self, attachment_id: str, context: RequestContext) -> str:
        """Return the name of a new upload, in place of one that has not ended; or raise `AlreadyUploaded`."""

    @abstractmethod
    async def write_chunk(
        self,
        attachment_id: str,
        upload: str,
        number: int,
        data: bytes,
        max_storage_bytes: int,
        context: RequestContext,
    ) -> None:
        """Store a chunk of `CHUNK_BYTES` (the last may be shorter), numbered from 0.

        Raises `AlreadyUploaded` where another upload has begun, `QuotaExceeded` as `reserve_attachment`.
        """

    @abstractmethod
    async def finish_upload(self, attachment_id: str, upload: str, context: RequestContext) -> None:
        """Declare the bytes complete; from now on they can be read and sent, and no more be changed."""

    @abstractmethod
    async def abandon_upload(self, attachment_id: str, upload: str, context: RequestContext) -> None:
        """Delete the chunks of an upload that broke off; the attachment waits for its bytes again."""

    @abstractmethod
    async def load_attachment_size(self, attachment_id: str, context: RequestContext) -> int:
        """Return the number of bytes of an attachment whose upload has finished; otherwise it is not found."""

    @abstractmethod
    async def read_chunk(self, attachment_id: str, number: int, context: RequestContext) -> bytes:
        """Return a chunk of an attachment whose upload has finished; nothing beyond the last one."""

    @abstractmethod
    async def load_attachment_owner(self, attachment_id: str) -> str:
        """Return the user whose attachment it is, for a signed link, which carries no token; or `NotFoundError`."""

    @abstractmethod
    async def load_link_key(self) -> bytes:
        """Return the secret that links are signed with: 32 random bytes, the same for all processes."""

    @abstractmethod
    async def purge(self, retention_days: int, *, now: bool = False) -> Purged | None:
        """Remove threads that were idle for so many days (0: none), and attachments that were not sent within a day.

        Where another process has done so within the hour nothing happens, and None is returned, unless `now`.
        """

    @abstractmethod
    async def delete_user(self, user_id: str) -> DeletedUser:
        """Delete all that is stored of the user, some of it at a time. What comes meanwhile may stay."""

    @abstractmethod
    async def overwrite_deleted(self) -> None:
        """Leave nothing of what was deleted in the database's file, where that is ours to do: SQLite's.

        It takes time with the size of the file, and writes wait for it.
        """

    @abstractmethod
    async def load_attachments(self, after: str, limit: int, context: RequestContext) -> list[Attachment]:
        """Return up to `limit` of the user's attachments, by id, with ids beyond `after`."""

    @abstractmethod
    async def load_feedback(self, thread_id: str, context: RequestContext) -> dict[str, str]:
        """Return the user's verdicts on a thread's items, by item id."""

    @abstractmethod
    async def add_usage(self, usage: Usage, context: RequestContext) -> None:
        """Add to what `context.user_id` used today; the usage's own user and day are not looked at."""

    @abstractmethod
    async def load_usage(self, user_id: str | None = None) -> list[Usage]:
        """Return all that was used, by this user or by all, for the operator: by day, user and model."""

    @abstractmethod
    async def load_feedback_counts(self) -> dict[str, tuple[int, int]]:
        """Return the number of positive and of negative verdicts of each user, for the operator."""

    @abstractmethod
    async def ping(self) -> None:
        """Return once the database has taken a write, or raise `StoreUnavailable`."""


def new_id(kind: StoreItemType) -> str:
    """Return an id with 128 random bits (ChatKit 1.6.5's 32 bits collide with a chance of one half at 77 000)."""
    return f"{_PREFIXES[kind]}_{secrets.token_hex(16)}"


def stopped_marker(thread_id: str, lease: str | None = None) -> SDKHiddenContextItem:
    """Return the hidden item that follows what a stopped turn left behind; with its lease, a dead turn."""
    return SDKHiddenContextItem(
        id=new_id("sdk_hidden_context") if lease is None else recovery_id(lease),
        thread_id=thread_id,
        created_at=datetime.now(UTC),
        content=STOPPED,
    )


def recovery_id(lease: str) -> str:
    """Return the id of the marker behind what was recovered of the turn with this lease.

    A checkpoint with this id stays for as long as the turn, should it live on, may still end in its own way.
    """
    return f"{_PREFIXES[MARKER_TYPE]}_{lease.partition('_')[2]}"


def is_hidden(item: ThreadItem) -> bool:
    """Whether no client may see the item."""
    return isinstance(item, HiddenContextItem | SDKHiddenContextItem)


def is_thought(item: ThreadItem) -> bool:
    """Whether the item shows what the model thinks, and nothing of its answer."""
    return isinstance(item, WorkflowItem) and item.workflow.type == "reasoning"


def aware(moment: datetime) -> datetime:
    """Return the moment in UTC; one without a zone is taken for this machine's time, as Python does."""
    return moment.astimezone(UTC)
