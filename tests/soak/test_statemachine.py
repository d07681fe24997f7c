"""Random operations of several users, in two processes that may die, against a plain model of a store."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from chatkit.store import NotFoundError
from chatkit.types import (
    AssistantMessageContent,
    AssistantMessageItem,
    Attachment,
    FileAttachment,
    InferenceOptions,
    SDKHiddenContextItem,
    ThreadItem,
    ThreadMetadata,
    UserMessageItem,
    UserMessageTextContent,
)
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from conftest import LONG
from context import RequestContext
from conversations import (
    AlreadySent,
    ConversationStore,
    LeaseLost,
    Quota,
    QuotaExceeded,
    ThreadBusy,
    Usage,
)
from databases import Database
from test_store import NOON

T = TypeVar("T")

EXAMPLES = 2000 if LONG else 15
USERS = ("alice", "bob", "carol")
STORAGE = 10
"""Bytes that a user may store."""


# --- the model ----------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """An item or a checkpoint: its place in the order of all, what it says, and the attachment that it carries."""

    place: int
    text: str
    attachment: str | None = None


@dataclass
class Thread:
    id: str
    user: str
    title: str | None
    activity: int
    items: dict[str, Row] = field(default_factory=dict)
    checkpoints: dict[str, Row] = field(default_factory=dict)
    lease: str | None = None
    died: bool = False
    may_end_late: str | None = None
    """The lease of a turn that died and was recovered, with nothing written since."""
    feedback: dict[str, str] = field(default_factory=dict)

    def shown(self) -> list[tuple[str, str]]:
        """Return name and text of each item; what follows a turn that died has a name that nobody knows."""
        items = sorted(self.items.items(), key=lambda each: each[1].place)
        return [("marker", "") if name.startswith("marker") else (name, row.text) for name, row in items]


@dataclass
class Sent:
    """An attachment, sent or not."""

    user: str
    data: bytes
    thread: str | None = None
    is_complete: bool = True


class World:
    """A database, and two processes that have it open; one that dies leaves it open for a while, as if it hung."""

    def __init__(self, database: Database, runner: asyncio.Runner):
        self.database = database
        self.run = runner.run
        self._opened: list[AbstractAsyncContextManager[ConversationStore]] = []
        self.stores: list[ConversationStore] = []
        self.begin()

    def begin(self) -> None:
        """Begin anew: with an empty database, and nobody who hangs."""
        self.close()
        self.stores = [self.opened() for _ in range(2)]
        for table in ("threads", "attachments", "usage", "turn_starts"):
            self.database.execute(f"DELETE FROM @{table}")

    def opened(self) -> ConversationStore:
        self._opened.append(self.database.open())
        return self.run(self._opened[-1].__aenter__())

    def close(self) -> None:
        while self._opened:
            self.run(self._opened.pop().__aexit__(None, None, None))


# --- random operations --------------------------------------------------------------------------------------------

whom = st.sampled_from(USERS)
which = st.integers(0, 5)
texts = st.one_of(
    st.sampled_from(["", "a", "\x00", "\x1a0", "🙂\u2028"]), st.text(st.characters(codec="utf-8"), max_size=4)
)
names = st.sampled_from([f"item_{letter}" for letter in "abc"])
written = st.lists(st.tuples(names, texts), max_size=3, unique_by=lambda each: each[0])
quotas = st.builds(
    Quota,
    turns_per_minute=st.sampled_from([0, 0, 3]),
    concurrent_turns=st.sampled_from([0, 0, 1]),
    tokens_per_day=st.sampled_from([0, 0, 20]),
)
has_threads = precondition(lambda self: self.threads)
has_few_threads = precondition(lambda self: len(self.threads) < 3)  # so that much happens to each


class Conversations(RuleBasedStateMachine):
    world: World

    def __init__(self) -> None:
        super().__init__()
        self.world.begin()
        self.threads: list[Thread] = []
        self.attachments: dict[str, Sent] = {}
        self.tokens = dict.fromkeys(USERS, 0)
        self.starts = dict.fromkeys(USERS, 0)
        self.lost: list[str] = []
        """Leases that are no more."""
        self.cursors: list[tuple[Thread, str, int]] = []
        self.places = itertools.count()
        self.ids = itertools.count()
        self.turn = 0
        self.unseen = False

    # --- how an operation is done -----------------------------------------------------------------------------------

    @property
    def store(self) -> ConversationStore:
        """The two processes take turns."""
        self.turn += 1
        return self.world.stores[self.turn % 2]

    def does(self, work: Coroutine[Any, Any, T], expected: type[Exception] | None = None) -> T | None:
        """Do it; where the model expects it to be refused, it must be."""
        if expected is None:
            return self.world.run(work)
        with pytest.raises(expected):
            self.world.run(work)
        return None

    def writes(self, thread: Thread, as_whom: str, number: int) -> tuple[RequestContext, type[Exception] | None]:
        """Return a context that writes to the thread, and how it is refused: a turn, a late one, a stranger."""
        if as_whom == "stranger":
            stranger = next(user for user in USERS if user != thread.user)
            return RequestContext(stranger, lease=thread.lease if number % 2 else None), NotFoundError
        if as_whom == "late turn" and self.lost:
            return RequestContext(thread.user, lease=self.lost[number % len(self.lost)]), LeaseLost
        return RequestContext(thread.user, lease=thread.lease if as_whom == "turn" else None), None

    def pick(self, number: int) -> Thread:
        return self.threads[number % len(self.threads)]

    def put(self, thread: Thread, name: str, text: str, attachment: str | None = None) -> None:
        thread.may_end_late = None
        checkpoint = thread.checkpoints.pop(name, None)
        if name in thread.items:
            thread.items[name] = Row(thread.items[name].place, text, attachment)
        else:
            place = checkpoint.place if checkpoint else next(self.places)
            thread.items[name] = Row(place, text, attachment)
            thread.activity = max(thread.activity, place)

    def recover(self, thread: Thread) -> None:
        """What the next one who loads the thread does, after its turn has died."""
        if not thread.died:
            return
        for name, row in thread.checkpoints.items():
            thread.items[name] = Row(thread.items.get(name, row).place, row.text)
        self.put(thread, f"marker {thread.lease}", "")
        thread.may_end_late = thread.lease
        self.forget_turn(thread)

    def forget_turn(self, thread: Thread) -> None:
        if thread.lease is not None:
            self.lost.append(thread.lease)
        thread.checkpoints.clear()
        thread.lease, thread.died = None, False

    def drop_attachments_of(self, gone: list[Row], thread: Thread) -> None:
        """Forget what these items had, and no item that stays."""
        kept = {row.attachment for row in thread.items.values()}
        for name in {row.attachment for row in gone} - kept:
            if name in self.attachments:
                del self.attachments[name]

    # --- threads and items ------------------------------------------------------------------------------------------

    @has_few_threads
    @rule(user=whom, title=st.none() | texts)
    def create(self, user: str, title: str | None) -> None:
        thread = self.new_thread(user, title)
        self.does(self.store.save_thread(metadata(thread), RequestContext(user)))
        self.threads.append(thread)

    def new_thread(self, user: str, title: str | None = None) -> Thread:
        return Thread(f"thr_{next(self.ids)}", user, title, next(self.places))

    @has_threads
    @rule(number=which, title=texts, stranger=st.booleans())
    def rename(self, number: int, title: str, stranger: bool) -> None:
        thread = self.pick(number)
        context = RequestContext(thread.user)
        if stranger:
            context = RequestContext(next(user for user in USERS if user != thread.user))
            self.does(self.store.save_thread(metadata(thread), context), NotFoundError)
            return
        store = self.store
        loaded = self.world.run(store.load_thread(thread.id, context))
        self.recover(thread)
        loaded.title = thread.title = title
        thread.may_end_late = None
        self.does(store.save_thread(loaded, context))

    @has_threads
    @rule(number=which, title=texts)
    def name(self, number: int, title: str) -> None:
        thread = self.pick(number)
        named = self.does(self.store.name_thread(thread.id, title, RequestContext(thread.user)))
        if thread.title is None:
            thread.title = title
        assert named == (thread.title == title)

    @has_threads
    @rule(number=which, stranger=st.booleans())
    def delete_thread(self, number: int, stranger: bool) -> None:
        thread = self.pick(number)
        context, refused = self.writes(thread, "stranger" if stranger else "nobody", number)
        self.does(self.store.delete_thread(thread.id, context), refused)
        if not refused:
            self.threads.remove(thread)
            self.forget_turn(thread)
            self.attachments = {name: each for name, each in self.attachments.items() if each.thread != thread.id}

    who = st.sampled_from(["turn", "turn", "nobody", "late turn", "stranger"])

    @has_threads
    @rule(number=which, as_whom=who, name=names, text=texts, late=st.booleans())
    def put_item(self, number: int, as_whom: str, name: str, text: str, late: bool) -> None:
        thread = self.pick(number)
        context, refused = self.writes(thread, as_whom, number)
        add = self.store.save_item if late else self.store.add_thread_item
        self.does(add(thread.id, said(thread, name, text), context), refused)
        if not refused:
            self.put(thread, name, text)

    @has_threads
    @rule(number=which, first=st.tuples(names, texts), second=st.tuples(names, texts))
    def put_two_of_which_the_first_is_cancelled(
        self, number: int, first: tuple[str, str], second: tuple[str, str]
    ) -> None:
        thread, store = self.pick(number), self.store
        context = RequestContext(thread.user)

        async def write() -> None:
            writing = asyncio.create_task(store.add_thread_item(thread.id, said(thread, *first), context))
            await asyncio.sleep(0)
            writing.cancel()
            await store.add_thread_item(thread.id, said(thread, *second), context)

        self.does(write())
        self.put(thread, *first)
        self.put(thread, *second)

    @has_threads
    @rule(number=which, as_whom=who, name=names)
    def delete_item(self, number: int, as_whom: str, name: str) -> None:
        thread = self.pick(number)
        context, refused = self.writes(thread, as_whom, number)
        if not refused and name not in thread.items | thread.checkpoints:
            self.does(self.store.delete_thread_item(thread.id, name, context), NotFoundError)
            return
        self.does(self.store.delete_thread_item(thread.id, name, context), refused)
        if not refused:
            thread.may_end_late = None
            thread.checkpoints.pop(name, None)
            thread.feedback.pop(name, None)
            if row := thread.items.pop(name, None):
                self.drop_attachments_of([row], thread)

    @has_threads
    @rule(number=which, as_whom=who, name=names, until=names)
    def delete_all_after(self, number: int, as_whom: str, name: str, until: str) -> None:
        thread = self.pick(number)
        context, refused = self.writes(thread, as_whom, number)
        if not refused and not {name, until} <= thread.items.keys():
            refused = NotFoundError
        self.does(self.store.delete_items_after(thread.id, name, context, until=until), refused)
        if not refused:
            thread.may_end_late = None
            first, last = thread.items[name].place, thread.items[until].place
            gone = {each: row for each, row in thread.items.items() if first < row.place <= last}
            thread.items = {each: row for each, row in thread.items.items() if each not in gone}
            thread.feedback = {each: kind for each, kind in thread.feedback.items() if each not in gone}
            self.drop_attachments_of([*gone.values()], thread)

    # --- turns ------------------------------------------------------------------------------------------------------

    @has_few_threads
    @rule(user=whom, quota=quotas)
    def begin_in_a_new_thread(self, user: str, quota: Quota) -> None:
        thread = self.new_thread(user)
        self.begin(thread, quota, metadata(thread))

    @has_threads
    @rule(number=which, quota=quotas)
    def begin_a_turn(self, number: int, quota: Quota) -> None:
        self.begin(self.pick(number), quota, None)

    def begin(self, thread: Thread, quota: Quota, new: ThreadMetadata | None) -> None:
        user, refused = thread.user, None
        running = sum(
            each.user == user and each.lease is not None and not each.died and each is not thread
            for each in self.threads
        )
        if (
            (quota.tokens_per_day and self.tokens[user] >= quota.tokens_per_day)
            or (quota.concurrent_turns and running >= quota.concurrent_turns)
            or (quota.turns_per_minute and self.starts[user] >= quota.turns_per_minute)
        ):
            refused = QuotaExceeded
        elif thread.lease is not None and not thread.died:
            refused = ThreadBusy
        lease = self.does(
            self.store.acquire_lease(thread.id, RequestContext(user), quota=quota, new_thread=new), refused
        )
        if refused:
            return
        self.recover(thread)
        thread.lease, thread.may_end_late = lease, None
        if new:
            self.threads.append(thread)
        if quota.turns_per_minute:
            self.starts[user] += 1

    @has_threads
    @rule(number=which, as_whom=who, items=written)
    def checkpoint(self, number: int, as_whom: str, items: list[tuple[str, str]]) -> None:
        thread = self.pick(number)
        context, refused = self.writes(thread, as_whom, number)
        self.does(self.store.save_checkpoints(thread.id, [said(thread, *each) for each in items], context), refused)
        if not refused:
            thread.may_end_late = None
        for name, text in items if not refused else []:
            known = thread.checkpoints.get(name)
            thread.checkpoints[name] = Row(known.place if known else next(self.places), text)

    @has_threads
    @rule(number=which, as_whom=who, items=written)
    def end_a_turn(self, number: int, as_whom: str, items: list[tuple[str, str]]) -> None:
        thread = self.pick(number)
        context, refused = self.writes(thread, as_whom, number)
        if refused is LeaseLost and thread.may_end_late:
            context, refused = RequestContext(thread.user, lease=thread.may_end_late), None
            del thread.items[f"marker {thread.may_end_late}"]
        self.does(self.store.end_turn(thread.id, [said(thread, *each) for each in items], context), refused)
        if not refused:
            for each in items:
                self.put(thread, *each)
            thread.may_end_late = None
            self.forget_turn(thread)

    @rule()
    def renew(self) -> None:
        held = {thread.lease for thread in self.threads if thread.lease is not None}
        assert self.does(self.store.renew_leases([*held, *self.lost])) == held
        for thread in self.threads:
            thread.died = False

    @rule()
    def all_turns_die(self) -> None:
        """Whoever does something next may find them so."""
        self.world.database.expire_leases()
        for thread in self.threads:
            thread.died = thread.lease is not None
        self.unseen = True

    @rule(number=st.integers(0, 1))
    def a_process_dies(self, number: int) -> None:
        self.world.stores[number] = self.world.opened()

    # --- feedback, attachments, usage -------------------------------------------------------------------------------

    @has_threads
    @rule(number=which, items=st.lists(names, min_size=1, max_size=3), kind=st.sampled_from(["positive", "negative"]))
    def feedback(self, number: int, items: list[str], kind: Any) -> None:
        thread = self.pick(number)
        refused = None if set(items) <= thread.items.keys() else NotFoundError
        self.does(self.store.save_feedback(thread.id, items, kind, RequestContext(thread.user)), refused)
        if not refused:
            thread.feedback |= dict.fromkeys(items, kind)

    @rule(user=whom, data=st.binary(max_size=6), is_complete=st.booleans())
    def upload(self, user: str, data: bytes, is_complete: bool) -> None:
        name, context, store = f"atc_{next(self.ids)}", RequestContext(user), self.store
        used = sum(len(each.data) for each in self.attachments.values() if each.user == user)
        if used + len(data) > STORAGE:
            self.does(store.reserve_attachment(file(name), len(data), STORAGE, context), QuotaExceeded)
            return
        self.does(store.reserve_attachment(file(name), len(data), STORAGE, context))
        upload = self.world.run(store.begin_upload(name, context))
        self.does(store.write_chunk(name, upload, 0, data, STORAGE, context))
        if is_complete:
            self.does(store.finish_upload(name, upload, context))
        self.attachments[name] = Sent(user, data, None, is_complete)

    @precondition(lambda self: self.threads and self.attachments)
    @rule(number=which, other=which, name=names)
    def send(self, number: int, other: int, name: str) -> None:
        thread = self.pick(number)
        attachment = sorted(self.attachments)[other % len(self.attachments)]
        sent, context, store = self.attachments[attachment], RequestContext(thread.user), self.store
        refused: type[Exception] | None = None
        if sent.user != thread.user:
            refused = NotFoundError
        elif sent.thread not in (None, thread.id):
            refused = AlreadySent
        self.does(store.save_attachment(file(attachment, thread.id), context), refused)
        if refused is None:
            sent.thread = thread.id
            self.does(store.add_thread_item(thread.id, said(thread, name, "", attachment), context))
            self.put(thread, name, "", attachment)

    @precondition(lambda self: self.attachments)
    @rule(number=which, user=whom)
    def delete_attachment(self, number: int, user: str) -> None:
        name = sorted(self.attachments)[number % len(self.attachments)]
        refused = None if self.attachments[name].user == user else NotFoundError
        self.does(self.store.delete_attachment(name, RequestContext(user)), refused)
        if not refused:
            del self.attachments[name]

    @rule(user=whom, tokens=st.integers(0, 12))
    def use(self, user: str, tokens: int) -> None:
        self.does(self.store.add_usage(Usage("", "", "m", 1, tokens, 0), RequestContext(user)))
        self.tokens[user] += tokens

    # --- cursors ----------------------------------------------------------------------------------------------------

    @has_threads
    @rule(number=which, limit=st.integers(1, 3))
    def keep_a_cursor(self, number: int, limit: int) -> None:
        thread = self.pick(number)
        page = self.does(self.store.load_thread_items(thread.id, None, limit, "asc", RequestContext(thread.user)))
        self.recover(thread)
        assert page is not None
        if page.after:
            place = sorted(row.place for row in thread.items.values())[limit - 1]
            self.cursors.append((thread, page.after, place))

    @precondition(lambda self: self.cursors)
    @rule(number=which, order=st.sampled_from(["asc", "desc"]))
    def go_on_from_a_cursor(self, number: int, order: str) -> None:
        thread, after, place = self.cursors[number % len(self.cursors)]
        if thread not in self.threads:
            return
        found = self.does(self.store.load_thread_items(thread.id, after, 100, order, RequestContext(thread.user)))
        self.recover(thread)
        assert found is not None
        beyond = {n for n, row in thread.items.items() if (row.place > place if order == "asc" else row.place < place)}
        assert len(found.data) == len(beyond)

    # --- what everybody sees ----------------------------------------------------------------------------------------

    @invariant()
    def everybody_sees_what_is_theirs_and_nothing_else(self) -> None:
        if self.unseen:
            self.unseen = False
            return
        for user in USERS:
            theirs = sorted((each for each in self.threads if each.user == user), key=lambda each: -each.activity)
            assert self.world.run(thread_rows(self.store, user)) == [(each.id, each.title) for each in theirs]
            for thread in theirs:
                found = self.world.run(item_rows(self.store, thread.id, user))
                self.recover(thread)
                assert found == thread.shown()
        stranger = RequestContext("mallory")
        for thread in self.threads[-1:]:
            self.does(self.store.load_thread(thread.id, stranger), NotFoundError)
            self.does(self.store.load_thread_items(thread.id, None, 9, "asc", stranger), NotFoundError)
        self.check_attachments()
        usage = {each.user_id: each.input_tokens for each in self.world.run(self.store.load_usage())}
        assert {user: usage.get(user, 0) for user in USERS} == self.tokens
        counts = self.world.run(self.store.load_feedback_counts())
        for user in USERS:
            kinds = [kind for each in self.threads if each.user == user for kind in each.feedback.values()]
            assert counts.get(user, (0, 0)) == (kinds.count("positive"), kinds.count("negative"))

    def check_attachments(self) -> None:
        stored = {name for (name,) in self.world.database.query("SELECT id FROM @attachments")}
        assert stored == self.attachments.keys()
        for name, sent in list(self.attachments.items())[-2:]:
            context = RequestContext(sent.user)
            loaded = self.does(self.store.load_attachment(name, context))
            assert loaded is not None
            assert loaded.thread_id == sent.thread
            data = self.does(self.store.read_chunk(name, 0, context), None if sent.is_complete else NotFoundError)
            assert data in (None, sent.data)
            self.does(self.store.load_attachment(name, RequestContext("mallory")), NotFoundError)


def metadata(thread: Thread) -> ThreadMetadata:
    return ThreadMetadata(id=thread.id, created_at=NOON, title=thread.title)


def file(name: str, thread_id: str | None = None) -> Attachment:
    return FileAttachment(id=name, name="a.txt", mime_type="text/plain", thread_id=thread_id)


def said(thread: Thread, name: str, text: str, attachment: str | None = None) -> ThreadItem:
    """Return an item that says this; a user's, where it brings an attachment."""
    if attachment is not None:
        return UserMessageItem(
            id=name,
            thread_id=thread.id,
            created_at=NOON,
            content=[UserMessageTextContent(text=text)],
            attachments=[file(attachment, thread.id)],
            inference_options=InferenceOptions(),
        )
    content = [AssistantMessageContent(text=text)]
    return AssistantMessageItem(id=name, thread_id=thread.id, created_at=NOON, content=content)


async def thread_rows(store: ConversationStore, user: str) -> list[tuple[str, str | None]]:
    pages = await every_page(lambda after: store.load_threads(3, after, "desc", RequestContext(user)))
    return [(thread.id, thread.title) for thread in pages]


async def item_rows(store: ConversationStore, thread_id: str, user: str) -> list[tuple[str, str]]:
    context = RequestContext(user)
    pages = await every_page(lambda after: store.load_thread_items(thread_id, after, 3, "asc", context))
    return [("marker", "") if isinstance(item, SDKHiddenContextItem) else (item.id, text_of(item)) for item in pages]


def text_of(item: Any) -> str:
    return "".join(part.text for part in item.content)


async def every_page(load: Callable[[str | None], Awaitable[Any]]) -> list[Any]:
    page = await load(None)
    found = list(page.data)
    while page.has_more:
        page = await load(page.after)
        found += page.data
    return found


def test_whatever_several_users_do_everybody_sees_exactly_what_is_theirs(
    new_database: Callable[[], Database],
) -> None:
    with asyncio.Runner() as runner:
        world = World(new_database(), runner)
        try:
            machine = type("Machine", (Conversations,), {"world": world})
            run_state_machine_as_test(
                machine,
                settings=settings(
                    max_examples=EXAMPLES,
                    stateful_step_count=30,
                    deadline=None,
                    database=None,
                    print_blob=True,
                    suppress_health_check=list(HealthCheck),
                    phases=[Phase.generate, Phase.shrink],
                ),
            )
        finally:
            world.close()
