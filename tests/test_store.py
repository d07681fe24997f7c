"""What every store promises; each test holds for each kind of database."""

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from chatkit.store import NotFoundError
from chatkit.types import (
    AssistantMessageItem,
    ClientToolCallItem,
    EndOfTurnItem,
    FileAttachment,
    GeneratedImage,
    GeneratedImageItem,
    HiddenContextItem,
    InferenceOptions,
    SDKHiddenContextItem,
    StructuredInputItem,
    TaskItem,
    ThreadItem,
    ThreadMetadata,
    UserMessageItem,
    UserMessageTextContent,
    WidgetItem,
    WorkflowItem,
)
from chatkit.widgets import DynamicWidgetRoot
from pydantic import TypeAdapter

from context import RequestContext
from conversations import (
    CHUNK_BYTES,
    DELETION_BATCH,
    KEPT,
    MAX_UNSENT,
    STOPPED,
    AlreadySent,
    AlreadyUploaded,
    ConversationStore,
    DeletedUser,
    LeaseLost,
    Purged,
    Quota,
    QuotaExceeded,
    ThreadBusy,
    Usage,
)
from databases import Database
from rows import read_item
from sdk import encode

pytestmark = pytest.mark.anyio

ITEM = TypeAdapter[ThreadItem](ThreadItem)
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
EVERY_KIND: list[dict[str, Any]] = [
    {"type": "user_message", "content": [{"type": "input_text", "text": "Hi"}], "inference_options": {"model": "m"}},
    {"type": "assistant_message", "content": [{"type": "output_text", "text": "Hi\u2028\x00🙂", "annotations": []}]},
    {"type": "client_tool_call", "call_id": "c", "name": "pick", "arguments": {"a": None}, "output": {"b": [None]}},
    {"type": "widget", "widget": {"type": "Card", "children": [{"type": "Text", "id": "t", "value": "v"}]}},
    {"type": "generated_image", "image": {"id": "g", "url": "data:image/png;base64,AA=="}},
    {"type": "structured_input", "inputs": [{"type": "freeform", "id": "q", "question": "Why?"}]},
    {"type": "workflow", "workflow": {"type": "reasoning", "tasks": [{"type": "thought", "content": "Hm"}]}},
    {"type": "task", "task": {"type": "custom", "title": "T"}},
    {"type": "hidden_context_item", "content": {"any": ["thing", 1, None]}},
    {"type": "sdk_hidden_context", "content": "text"},
    {"type": "end_of_turn"},
]


@pytest.fixture
async def store(database: Database) -> AsyncIterator[ConversationStore]:
    async with database.open() as store:
        yield store


def alice() -> RequestContext:
    """A request by Alice, of its own each time."""
    return RequestContext("alice")


def bob() -> RequestContext:
    return RequestContext("bob")


def end(id: str, thread_id: str, created_at: datetime = NOON) -> EndOfTurnItem:
    return EndOfTurnItem(id=id, thread_id=thread_id, created_at=created_at)


async def make_thread(store: ConversationStore, items: int = 0, context: RequestContext | None = None) -> str:
    context = context or alice()
    thread = ThreadMetadata(id=store.generate_thread_id(context), created_at=NOON)
    await store.save_thread(thread, context)
    for number in range(items):
        await store.add_thread_item(thread.id, end(f"item_{number}", thread.id), context)
    return thread.id


async def ids(store: ConversationStore, thread_id: str, order: str = "asc") -> list[str]:
    page = await store.load_thread_items(thread_id, None, 100, order, alice())
    return [item.id for item in page.data]


# --- threads ------------------------------------------------------------------------------------------------------


async def test_a_thread_comes_back_as_it_was_saved(store: ConversationStore) -> None:
    thread = ThreadMetadata(
        id="thr_1", created_at=NOON, title="Title", metadata={"a": [1, None]}, allowed_image_domains=["example.org"]
    )
    await store.save_thread(thread, alice())
    assert await store.load_thread("thr_1", alice()) == thread


@pytest.mark.parametrize("text", ["\x00", "a\x00b\x1a0\x1a1\x1a", "\u2028🙂\x7f"])
async def test_text_of_any_characters_comes_back_as_it_was_and_is_nothing_else(
    store: ConversationStore, text: str
) -> None:
    context = RequestContext(f"user {text}")
    thread = ThreadMetadata(id=f"thr {text}", created_at=NOON, title=text, metadata={text: text})
    await store.save_thread(thread, context)
    await store.add_usage(Usage("", "", text, 1, 1, 1), context)
    assert (await store.load_threads(9, None, "desc", RequestContext(context.user_id))).data == [thread]
    assert [(used.user_id, used.model) for used in await store.load_usage()] == [(context.user_id, text)]
    for other in (text.replace("\x00", "\x1a0"), text.replace("\x1a", "\x00"), text.replace("\x00", ""), text + "\x00"):
        if other != text:
            assert (await store.load_threads(9, None, "desc", RequestContext(f"user {other}"))).data == []


async def test_threads_are_listed_by_last_activity_each_once_whatever_the_clock_says(store: ConversationStore) -> None:
    threads = [await make_thread(store) for _ in range(5)]
    await store.add_thread_item(threads[0], end("new", threads[0], NOON - timedelta(days=365)), alice())
    expected = [threads[0], *threads[:0:-1]]
    seen, after = [], None
    while True:
        page = await store.load_threads(2, after, "desc", alice())
        seen += [thread.id for thread in page.data]
        if not page.has_more:
            break
        after = page.after
    assert seen == expected
    ascending = await store.load_threads(10, None, "asc", alice())
    assert [thread.id for thread in ascending.data] == expected[::-1]


async def test_a_thread_may_be_named_as_the_cursor(store: ConversationStore) -> None:
    first, second = await make_thread(store), await make_thread(store)
    page = await store.load_threads(10, second, "desc", alice())
    assert [thread.id for thread in page.data] == [first]


async def test_saving_writes_only_what_this_request_changed(store: ConversationStore) -> None:
    thread_id = await make_thread(store)
    slow, quick = alice(), alice()
    held = await store.load_thread(thread_id, slow)
    renamed = await store.load_thread(thread_id, quick)
    renamed.title = "The user's title"
    await store.save_thread(renamed, quick)
    held.metadata["note"] = "kept"
    await store.save_thread(held, slow)
    thread = await store.load_thread(thread_id, alice())
    assert (thread.title, thread.metadata) == ("The user's title", {"note": "kept"})


async def test_a_request_that_saves_twice_does_not_undo_a_change_in_between(store: ConversationStore) -> None:
    thread_id, slow, quick = await make_thread(store), alice(), alice()
    held = await store.load_thread(thread_id, slow)
    held.title = "First"
    await store.save_thread(held, slow)
    renamed = await store.load_thread(thread_id, quick)
    renamed.title = "Second"
    await store.save_thread(renamed, quick)
    held.metadata["note"] = "kept"
    await store.save_thread(held, slow)
    assert (await store.load_thread(thread_id, alice())).title == "Second"


async def test_a_deleted_thread_does_not_come_back_when_it_is_saved(store: ConversationStore) -> None:
    thread_id, slow = await make_thread(store), alice()
    held = await store.load_thread(thread_id, slow)
    await store.delete_thread(thread_id, alice())
    held.title = "Back again"
    with pytest.raises(NotFoundError):
        await store.save_thread(held, slow)
    assert (await store.load_threads(10, None, "desc", alice())).data == []


async def test_a_thread_deleted_by_another_request_does_not_come_back_from_the_one_that_made_it(
    store: ConversationStore,
) -> None:
    maker = alice()
    thread = ThreadMetadata(id="thr_1", created_at=NOON)
    await store.save_thread(thread, maker)
    await store.delete_thread("thr_1", alice())
    thread.title = "Back again"
    with pytest.raises(NotFoundError):
        await store.save_thread(thread, maker)


async def test_deleting_a_thread_deletes_all_that_is_in_it(store: ConversationStore) -> None:
    thread_id = await make_thread(store, items=2)
    attachment = FileAttachment(id="atc_1", name="a", mime_type="text/plain", thread_id=thread_id)
    await store.save_attachment(attachment, alice())
    await store.delete_thread(thread_id, alice())
    for gone in (
        store.load_thread_items(thread_id, None, 1, "asc", alice()),
        store.load_item(thread_id, "item_0", alice()),
        store.load_attachment("atc_1", alice()),
    ):
        with pytest.raises(NotFoundError):
            await gone


# --- items --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", EVERY_KIND, ids=lambda fields: fields["type"])
async def test_an_item_of_every_kind_comes_back_as_it_was_added(
    store: ConversationStore, fields: dict[str, Any]
) -> None:
    thread_id = await make_thread(store)
    item = ITEM.validate_python({"id": "i", "thread_id": thread_id, "created_at": NOON, **fields})
    await store.add_thread_item(thread_id, item, alice())
    assert await store.load_item(thread_id, "i", alice()) == item


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "Card", "novel": 1, "children": [{"type": "New", "odd": [None, {}]}]},
        {"type": "Basic", "children": [{"type": "DatePicker", "name": "d", "defaultValue": "2026-01-15"}]},
        {"type": "Card", "children": {"type": "Text", "value": "V", "novel": "N"}},
        {"type": "ListView", "children": [{"type": "ListViewItem", "children": [{"type": "Text", "value": "V"}]}]},
    ],
)
async def test_a_templates_widget_comes_back_with_what_no_class_of_the_sdk_names(
    store: ConversationStore, fields: dict[str, Any]
) -> None:
    thread_id = await make_thread(store)
    widget = DynamicWidgetRoot.model_validate(fields)
    item = WidgetItem(id="w", thread_id=thread_id, created_at=NOON, widget=widget)
    await store.add_thread_item(thread_id, item, alice())
    assert encode(await store.load_item(thread_id, "w", alice())) == encode(item)


TOO_DEEP = "nested too deep|serialization depth exceeded"
"""As we say it, and pydantic of what it does not even write."""


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


def call(levels: int) -> ClientToolCallItem:
    return ClientToolCallItem(
        id=f"call_{levels}",
        thread_id="thr_1",
        created_at=NOON,
        call_id="c",
        name="n",
        status="pending",
        arguments=nested(levels),
    )


async def test_what_is_nested_so_deep_that_nobody_could_read_it_again_is_refused_and_changes_nothing(
    store: ConversationStore,
) -> None:
    thread = ThreadMetadata(id="thr_1", created_at=NOON, metadata=nested(190))
    await store.save_thread(thread, alice())
    readable = [call(levels) for levels in range(190, 199)]
    for item in readable:
        await store.add_thread_item("thr_1", item, alice())
    for levels in (200, 230, 250, 300):
        with pytest.raises(ValueError, match=TOO_DEEP):
            await store.add_thread_item("thr_1", call(levels), alice())
    for levels in (202, 230, 300):
        with pytest.raises(ValueError, match=TOO_DEEP):
            await store.save_thread(thread.model_copy(update={"metadata": nested(levels)}), alice())
    assert (await store.load_thread_items("thr_1", None, 20, "asc", alice())).data == readable
    assert (await store.load_threads(20, None, "desc", alice())).data == [thread]


def test_an_item_that_was_nested_too_deep_for_its_reader_stands_there_as_one_that_cannot_be_read() -> None:
    body = call(3).model_dump_json().replace(json.dumps(nested(3), separators=(",", ":")), json.dumps(nested(230)))
    item = read_item(body)
    assert isinstance(item, HiddenContextItem)
    assert (item.id, item.thread_id, item.created_at) == ("call_3", "thr_1", NOON)


async def test_every_kind_of_item_of_the_installed_sdk_is_tried_above() -> None:
    kinds = [
        UserMessageItem,
        AssistantMessageItem,
        ClientToolCallItem,
        WidgetItem,
        GeneratedImageItem,
        StructuredInputItem,
        WorkflowItem,
        TaskItem,
        HiddenContextItem,
        SDKHiddenContextItem,
        EndOfTurnItem,
    ]
    assert set(ITEM.json_schema()["discriminator"]["mapping"]) == {fields["type"] for fields in EVERY_KIND}
    assert len(kinds) == len(EVERY_KIND)


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_items_added_in_the_same_instant_are_each_paged_once(store: ConversationStore, order: str) -> None:
    thread_id = await make_thread(store, items=7)
    seen, after = [], None
    while True:
        page = await store.load_thread_items(thread_id, after, 2, order, alice())
        seen += [item.id for item in page.data]
        if not page.has_more:
            break
        after = page.after
    expected = [f"item_{number}" for number in range(7)]
    assert seen == (expected if order == "asc" else expected[::-1])
    assert page.after is None


async def test_items_keep_their_order_when_the_clock_is_set_back(store: ConversationStore) -> None:
    thread_id = await make_thread(store)
    for number in range(3):
        await store.add_thread_item(thread_id, end(f"i{number}", thread_id, NOON - timedelta(hours=number)), alice())
    assert await ids(store, thread_id) == ["i0", "i1", "i2"]


async def test_a_cursor_outlives_its_item(store: ConversationStore) -> None:
    thread_id = await make_thread(store, items=4)
    page = await store.load_thread_items(thread_id, None, 2, "asc", alice())
    await store.delete_thread_item(thread_id, "item_1", alice())
    await store.add_thread_item(thread_id, end("new", thread_id), alice())
    rest = await store.load_thread_items(thread_id, page.after, 10, "asc", alice())
    assert [item.id for item in rest.data] == ["item_2", "item_3", "new"]


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_a_page_of_long_items_is_short_and_the_next_one_goes_on(store: ConversationStore, order: str) -> None:
    thread_id = await make_thread(store)
    for number, thousands in enumerate((400, 400, 400, 1500, 1, 1, 1500, 1)):
        item = HiddenContextItem(id=str(number), thread_id=thread_id, created_at=NOON, content="ä" * 1000 * thousands)
        await store.add_thread_item(thread_id, item, alice())
    pages, after, more = [], None, True
    while more:
        page = await store.load_thread_items(thread_id, after, 100, order, alice())
        pages.append([item.id for item in page.data])
        after, more = page.after, page.has_more
    forwards = [["0", "1"], ["2"], ["3"], ["4", "5"], ["6"], ["7"]]
    backwards = [["7"], ["6"], ["5", "4"], ["3"], ["2", "1"], ["0"]]
    assert pages == (forwards if order == "asc" else backwards)


async def test_an_item_may_be_named_as_the_cursor_but_only_one_of_the_thread(store: ConversationStore) -> None:
    thread_id, other = await make_thread(store, items=3), await make_thread(store)
    await store.add_thread_item(other, end("elsewhere", other), alice())
    page = await store.load_thread_items(thread_id, "item_1", 10, "asc", alice())
    assert [item.id for item in page.data] == ["item_2"]
    for unknown in ("elsewhere", "nothing", "after:", "after:-1", "after:1e3", "after:" + "9" * 50):
        with pytest.raises(NotFoundError):
            await store.load_thread_items(thread_id, unknown, 10, "asc", alice())


async def test_adding_an_item_again_replaces_it_in_its_place(store: ConversationStore) -> None:
    thread_id = await make_thread(store, items=3)
    changed = end("item_1", thread_id, NOON + timedelta(hours=1))
    for save in (store.add_thread_item, store.save_item):
        await save(thread_id, changed, alice())
        assert await ids(store, thread_id) == ["item_0", "item_1", "item_2"]
    assert await store.load_item(thread_id, "item_1", alice()) == changed


async def test_saving_an_item_in_another_thread_leaves_the_first_one_alone(store: ConversationStore) -> None:
    first, second = await make_thread(store, items=1), await make_thread(store)
    item = await store.load_item(first, "item_0", alice())
    await store.save_item(second, item, alice())
    assert (await store.load_item(first, "item_0", alice())).thread_id == first
    assert (await store.load_item(second, "item_0", alice())).thread_id == second


async def test_an_item_cannot_be_added_to_a_thread_that_is_not_there(store: ConversationStore) -> None:
    with pytest.raises(NotFoundError):
        await store.add_thread_item("thr_none", end("i", "thr_none"), alice())


async def test_all_items_after_one_are_deleted_together_and_none_of_another_thread(store: ConversationStore) -> None:
    thread_id = await make_thread(store, items=4)
    later = await make_thread(store, items=4)
    retry = await leased(store, later)
    await store.save_checkpoints(later, [end("open", later)], retry)
    for once, is_deleted in ((["item_0"], False), (["item_1", "unknown"], False), (["open"], True)):
        how = {"until": "item_3", "keeping": {"item_3"}, "once": once}
        assert await store.delete_items_after(later, "item_1", retry, **how) is is_deleted
        assert await ids(store, later) == (
            ["item_0", "item_1", "item_3"] if is_deleted else [f"item_{n}" for n in range(4)]
        )
    later = await make_thread(store, items=4)
    await store.delete_items_after(thread_id, "item_1", alice(), until="item_2")
    assert await ids(store, thread_id) == ["item_0", "item_1", "item_3"], "what came behind the last one stays"
    assert await ids(store, later) == ["item_0", "item_1", "item_2", "item_3"]
    await store.delete_items_after(later, "item_0", alice(), until="item_3", keeping={"item_1", "item_3"})
    assert await ids(store, later) == ["item_0", "item_1", "item_3"]
    for unknown in (("item_2", "item_3"), ("item_1", "item_2")):
        with pytest.raises(NotFoundError):
            await store.delete_items_after(thread_id, unknown[0], alice(), until=unknown[1])


async def test_hidden_items_are_left_out_of_a_page_that_is_for_a_client(store: ConversationStore) -> None:
    thread_id = await make_thread(store, items=1)
    for number in range(3):
        hidden = HiddenContextItem(id=f"h{number}", thread_id=thread_id, created_at=NOON, content="secret")
        await store.add_thread_item(thread_id, hidden, alice())
    await store.add_thread_item(thread_id, end("last", thread_id), alice())
    page = await store.load_thread_items(thread_id, None, 2, "desc", alice(), hidden=False)
    assert [item.id for item in page.data] == ["last", "item_0"]
    assert not page.has_more


async def test_times_come_back_as_aware_utc(store: ConversationStore) -> None:
    thread_id = await make_thread(store)
    for moment in (NOON, NOON.astimezone(timezone(timedelta(hours=5))), NOON.astimezone().replace(tzinfo=None)):
        await store.add_thread_item(thread_id, end("i", thread_id, moment), alice())
        loaded = (await store.load_item(thread_id, "i", alice())).created_at
        assert (loaded, loaded.utcoffset()) == (NOON, timedelta(0))


async def test_ids_of_every_kind_have_128_random_bits(store: ConversationStore) -> None:
    thread = ThreadMetadata(id="t", created_at=NOON)
    for kind in ("message", "tool_call", "task", "workflow", "attachment", "sdk_hidden_context"):
        made = {store.generate_item_id(kind, thread, alice()).rpartition("_")[2] for _ in range(100)}
        assert len(made) == 100
        assert all(len(bytes.fromhex(each)) == 16 for each in made)
    assert len(bytes.fromhex(store.generate_thread_id(alice()).rpartition("_")[2])) == 16


# --- whose it is --------------------------------------------------------------------------------------------------

Attempt = Callable[[ConversationStore, str], Awaitable[Any]]

ATTEMPTS: dict[str, Attempt] = {
    "load_thread": lambda store, thread: store.load_thread(thread, bob()),
    "save_thread": lambda store, thread: store.save_thread(ThreadMetadata(id=thread, created_at=NOON), bob()),
    "delete_thread": lambda store, thread: store.delete_thread(thread, bob()),
    "load_thread_items": lambda store, thread: store.load_thread_items(thread, None, 9, "asc", bob()),
    "load_item": lambda store, thread: store.load_item(thread, "item_0", bob()),
    "add_thread_item": lambda store, thread: store.add_thread_item(thread, end("item_0", thread), bob()),
    "save_item": lambda store, thread: store.save_item(thread, end("item_0", thread), bob()),
    "delete_thread_item": lambda store, thread: store.delete_thread_item(thread, "item_0", bob()),
    "delete_items_after": lambda store, thread: store.delete_items_after(thread, "item_0", bob(), until="item_0"),
    "load_attachment": lambda store, thread: store.load_attachment("atc_alice", bob()),
    "save_attachment": lambda store, thread: store.save_attachment(
        FileAttachment(id="atc_alice", name="b", mime_type="text/plain"), bob()
    ),
    "delete_attachment": lambda store, thread: store.delete_attachment("atc_alice", bob()),
    "name_thread": lambda store, thread: store.name_thread(thread, "Bob's title", bob()),
    "begin_upload": lambda store, thread: store.begin_upload("atc_alice", bob()),
    "write_chunk": lambda store, thread: store.write_chunk("atc_alice", "upload", 0, b"x", 0, bob()),
    "finish_upload": lambda store, thread: store.finish_upload("atc_alice", "upload", bob()),
    "abandon_upload": lambda store, thread: store.abandon_upload("atc_alice", "upload", bob()),
    "load_attachment_size": lambda store, thread: store.load_attachment_size("atc_alice", bob()),
    "read_chunk": lambda store, thread: store.read_chunk("atc_alice", 0, bob()),
    "is_leased": lambda store, thread: store.is_leased(thread, bob()),
    "acquire_lease": lambda store, thread: store.acquire_lease(thread, bob()),
    "save_checkpoints": lambda store, thread: store.save_checkpoints(thread, [end("item_0", thread)], bob()),
    "end_turn": lambda store, thread: store.end_turn(thread, [end("item_0", thread)], bob()),
    "save_feedback": lambda store, thread: store.save_feedback(thread, ["item_0"], "positive", bob()),
}
NOT_ABOUT_ONE_THING = {
    "generate_thread_id": "makes a number",
    "generate_item_id": "makes a number",
    "load_threads": "has a test of its own below",
    "renew_leases": "is about a process",
    "ping": "is about the database",
    "add_usage": "has a test of its own below",
    "reserve_attachment": "makes a new one",
    "load_attachment_owner": "is for a signed link",
    "load_link_key": "is for signed links",
    "purge": "is for the operator",
    "delete_user": "is for the operator, and has a test of its own below",
    "overwrite_deleted": "is about the file",
    "load_attachments": "has a test of its own below",
    "load_feedback": "has a test of its own below",
    "load_usage": "is for the operator",
    "load_feedback_counts": "is for the operator",
}


def test_every_method_of_a_store_is_tried_as_another_user() -> None:
    methods = {name for name, _ in inspect.getmembers(ConversationStore, callable) if not name.startswith("_")}
    assert methods == ATTEMPTS.keys() | NOT_ABOUT_ONE_THING.keys()


@pytest.mark.parametrize("method", ATTEMPTS)
async def test_what_is_not_yours_does_not_exist_and_does_not_change(store: ConversationStore, method: str) -> None:
    thread_id = await make_thread(store, items=2)
    await store.save_attachment(FileAttachment(id="atc_alice", name="a", mime_type="text/plain"), alice())
    await store.acquire_lease(thread_id, alice())

    async def all_of_alice() -> tuple[Any, ...]:
        items = await store.load_thread_items(thread_id, None, 100, "asc", alice())
        return (await store.load_thread(thread_id, alice()), items, await store.load_attachment("atc_alice", alice()))

    before = await all_of_alice()
    with pytest.raises(NotFoundError):
        await ATTEMPTS[method](store, thread_id)
    assert await all_of_alice() == before
    with pytest.raises(ThreadBusy):
        await store.acquire_lease(thread_id, alice())


async def test_a_user_lists_only_their_own_threads_and_pages_only_by_them(store: ConversationStore) -> None:
    of_alice, of_bob = await make_thread(store), await make_thread(store, context=bob())
    assert [thread.id for thread in (await store.load_threads(10, None, "desc", bob())).data] == [of_bob]
    with pytest.raises(NotFoundError):
        await store.load_threads(10, of_alice, "desc", bob())


async def test_the_same_item_id_in_threads_of_two_users_is_two_items(store: ConversationStore) -> None:
    of_alice, of_bob = await make_thread(store, items=1), await make_thread(store, items=1, context=bob())
    await store.delete_thread_item(of_bob, "item_0", bob())
    assert await ids(store, of_alice) == ["item_0"]


# --- turns --------------------------------------------------------------------------------------------------------


async def leased(store: ConversationStore, thread_id: str) -> RequestContext:
    return RequestContext("alice", lease=await store.acquire_lease(thread_id, alice()))


async def test_a_thread_is_leased_to_one_turn_at_a_time(store: ConversationStore) -> None:
    thread_id = await make_thread(store)
    turn = await leased(store, thread_id)
    with pytest.raises(ThreadBusy):
        await store.acquire_lease(thread_id, alice())
    assert await store.is_leased(thread_id, alice())
    await store.end_turn(thread_id, [], turn)
    assert not await store.is_leased(thread_id, alice())
    await leased(store, thread_id)


async def test_of_many_that_want_a_lease_at_once_one_gets_it(store: ConversationStore) -> None:
    thread_id = await make_thread(store)
    attempts = [store.acquire_lease(thread_id, alice()) for _ in range(20)]
    results = await asyncio.gather(*attempts, return_exceptions=True)
    assert sum(isinstance(result, str) for result in results) == 1
    assert sum(isinstance(result, ThreadBusy) for result in results) == 19


async def test_a_turn_that_lost_its_lease_writes_nothing_more(store: ConversationStore) -> None:
    thread_id = await make_thread(store, items=1)
    late = await leased(store, thread_id)
    await store.end_turn(thread_id, [], late)
    await leased(store, thread_id)
    writes: list[Awaitable[None]] = [
        store.add_thread_item(thread_id, end("late", thread_id), late),
        store.save_item(thread_id, end("late", thread_id), late),
        store.delete_thread_item(thread_id, "item_0", late),
        store.delete_items_after(thread_id, "item_0", late, until="item_0"),
        store.save_checkpoints(thread_id, [end("late", thread_id)], late),
        store.end_turn(thread_id, [end("late", thread_id)], late),
        store.save_thread(ThreadMetadata(id=thread_id, created_at=NOON, title="late"), late),
    ]
    for write in writes:
        with pytest.raises(LeaseLost):
            await write
    assert await ids(store, thread_id) == ["item_0"]
    assert (await store.load_thread(thread_id, alice())).title is None


async def test_only_the_leases_that_are_named_are_renewed(database: Database) -> None:
    async with database.open() as store:
        first, second = await make_thread(store), await make_thread(store)
        mine = await store.acquire_lease(first, alice())
        await store.acquire_lease(second, alice())
        database.expire_leases(seconds=1)
        assert await store.renew_leases([mine, "another"]) == {mine}
        await asyncio.sleep(1.1)
        with pytest.raises(ThreadBusy):
            await store.acquire_lease(first, alice())
        await store.acquire_lease(second, alice())


async def test_the_first_checkpoint_settles_an_items_place(store: ConversationStore) -> None:
    thread_id = await make_thread(store)
    turn = await leased(store, thread_id)
    await store.save_checkpoints(thread_id, [end("opened first", thread_id)], turn)
    await store.add_thread_item(thread_id, end("finished first", thread_id), turn)
    await store.save_checkpoints(thread_id, [end("opened first", thread_id)], turn)
    await store.add_thread_item(thread_id, end("opened first", thread_id), turn)
    await store.end_turn(thread_id, [], turn)
    assert await ids(store, thread_id) == ["opened first", "finished first"]


async def test_ending_a_turn_stores_what_was_open_and_forgets_its_checkpoints(store: ConversationStore) -> None:
    thread_id = await make_thread(store)
    turn = await leased(store, thread_id)
    await store.save_checkpoints(thread_id, [end("kept", thread_id), end("dropped", thread_id)], turn)
    await store.end_turn(thread_id, [end("kept", thread_id)], turn)
    assert await ids(store, thread_id) == ["kept"]
    await store.end_turn(thread_id, [], await leased(store, thread_id))
    assert await ids(store, thread_id) == ["kept"]


async def test_a_removed_item_does_not_come_back_from_its_checkpoint(
    store: ConversationStore, database: Database
) -> None:
    thread_id = await make_thread(store)
    turn = await leased(store, thread_id)
    await store.save_checkpoints(thread_id, [end("removed", thread_id)], turn)
    await store.delete_thread_item(thread_id, "removed", turn)
    database.expire_leases()
    assert await visible_ids(store, thread_id) == []


async def test_what_a_dead_turn_had_shown_is_there_for_whoever_loads_the_thread_next(
    store: ConversationStore, database: Database
) -> None:
    for load in (
        lambda thread: store.load_thread(thread, alice()),
        lambda thread: store.load_thread_items(thread, None, 9, "asc", alice()),
        lambda thread: store.acquire_lease(thread, alice()),
    ):
        thread_id = await make_thread(store, items=1)
        turn = await leased(store, thread_id)
        await store.save_checkpoints(thread_id, [end("shown", thread_id)], turn)
        database.expire_leases()
        await load(thread_id)
        page = await store.load_thread_items(thread_id, None, 9, "asc", alice())
        assert [item.id for item in page.data[:2]] == ["item_0", "shown"]
        assert isinstance(page.data[2], SDKHiddenContextItem)
        assert page.data[2].content == STOPPED
        with pytest.raises(LeaseLost):
            await store.add_thread_item(thread_id, end("late", thread_id), turn)


async def dead_turn_that_was_recovered(store: ConversationStore, database: Database) -> tuple[str, RequestContext]:
    """Return a thread with an item and what a dead turn had shown, and the context of the turn, which lives on."""
    thread_id = await make_thread(store, items=1)
    turn = await leased(store, thread_id)
    await store.save_checkpoints(thread_id, [end("shown", thread_id), end("shown too", thread_id)], turn)
    database.expire_leases()
    assert (await ids(store, thread_id))[:-1] == ["item_0", "shown", "shown too"]
    return thread_id, turn


async def test_a_turn_that_was_taken_for_dead_still_ends_with_all_that_it_had_shown(
    store: ConversationStore, database: Database
) -> None:
    thread_id, turn = await dead_turn_that_was_recovered(store, database)
    longer = end("shown", thread_id, NOON + timedelta(hours=1))
    await store.end_turn(thread_id, [longer, end("shown too", thread_id), end("never kept", thread_id)], turn)
    assert await ids(store, thread_id) == ["item_0", "shown", "shown too", "never kept"]
    assert await store.load_item(thread_id, "shown", alice()) == longer
    with pytest.raises(LeaseLost):
        await store.end_turn(thread_id, [end("again", thread_id)], turn)
    await leased(store, thread_id)


@pytest.mark.parametrize(
    "meanwhile",
    [
        lambda store, thread: store.save_thread(thread, alice()),
        lambda store, thread: store.name_thread(thread.id, "Named", alice()),
        lambda store, thread: store.save_feedback(thread.id, ["item_0"], "positive", alice()),
    ],
    ids=["a rename", "a title", "feedback"],
)
async def test_what_writes_no_items_does_not_keep_a_turn_that_was_taken_for_dead_from_its_end(
    store: ConversationStore, database: Database, meanwhile: Callable[..., Awaitable[Any]]
) -> None:
    thread_id, turn = await dead_turn_that_was_recovered(store, database)
    thread = await store.load_thread(thread_id, alice())
    thread.title = "Renamed"
    await meanwhile(store, thread)
    await store.end_turn(thread_id, [end("never kept", thread_id)], turn)
    assert await ids(store, thread_id) == ["item_0", "shown", "shown too", "never kept"]


async def another_turn(store: ConversationStore, thread_id: str) -> None:
    await store.end_turn(thread_id, [], await leased(store, thread_id))


async def another_dead_turn(store: ConversationStore, thread_id: str, database: Database) -> None:
    await leased(store, thread_id)
    database.expire_leases()
    await ids(store, thread_id)


@pytest.mark.parametrize(
    "meanwhile",
    [
        lambda store, thread, _: another_turn(store, thread),
        another_dead_turn,
        lambda store, thread, _: leased(store, thread),
        lambda store, thread, _: store.save_item(thread, end("shown", thread, NOON + timedelta(hours=2)), alice()),
        lambda store, thread, _: store.delete_thread_item(thread, "shown", alice()),
        lambda store, thread, _: store.delete_items_after(thread, "item_0", alice(), until="shown"),
    ],
    ids=["a turn", "a dead turn", "a running turn", "a change", "a deletion", "a retry"],
)
async def test_a_turn_that_was_taken_for_dead_never_writes_over_what_came_after_it(
    store: ConversationStore, database: Database, meanwhile: Callable[..., Awaitable[Any]]
) -> None:
    thread_id, turn = await dead_turn_that_was_recovered(store, database)
    await meanwhile(store, thread_id, database)
    before = await store.load_thread_items(thread_id, None, 100, "asc", alice())
    late = [end("shown", thread_id, NOON + timedelta(hours=1)), end("never kept", thread_id)]
    with pytest.raises(LeaseLost):
        await store.end_turn(thread_id, late, turn)
    assert await store.load_thread_items(thread_id, None, 100, "asc", alice()) == before


async def test_a_turn_that_was_taken_for_dead_does_not_bring_a_deleted_thread_back(
    store: ConversationStore, database: Database
) -> None:
    thread_id, turn = await dead_turn_that_was_recovered(store, database)
    await store.delete_thread(thread_id, alice())
    with pytest.raises(NotFoundError):
        await store.end_turn(thread_id, [end("shown", thread_id)], turn)
    assert (await store.load_threads(9, None, "asc", alice())).data == []


async def test_what_a_dead_turn_had_changed_of_an_earlier_item_is_kept(
    store: ConversationStore, database: Database
) -> None:
    thread_id = await make_thread(store, items=2)
    changed = end("item_0", thread_id, NOON + timedelta(hours=1))
    await store.save_checkpoints(thread_id, [changed], await leased(store, thread_id))
    database.expire_leases()
    assert (await ids(store, thread_id))[:2] == ["item_0", "item_1"]
    assert await store.load_item(thread_id, "item_0", alice()) == changed


async def test_an_item_that_was_saved_does_not_fall_back_to_its_checkpoint(
    store: ConversationStore, database: Database
) -> None:
    thread_id = await make_thread(store, items=1)
    turn = await leased(store, thread_id)
    await store.save_checkpoints(thread_id, [end("item_0", thread_id, NOON + timedelta(hours=1))], turn)
    newest = end("item_0", thread_id, NOON + timedelta(hours=2))
    await store.save_item(thread_id, newest, turn)
    database.expire_leases()
    await ids(store, thread_id)
    assert await store.load_item(thread_id, "item_0", alice()) == newest


async def test_a_lease_from_before_the_clock_was_set_back_does_not_block_a_thread(
    store: ConversationStore, database: Database
) -> None:
    thread_id = await make_thread(store)
    await leased(store, thread_id)
    database.expire_leases(seconds=3600)
    await leased(store, thread_id)


async def visible_ids(store: ConversationStore, thread_id: str) -> list[str]:
    page = await store.load_thread_items(thread_id, None, 100, "asc", alice(), hidden=False)
    return [item.id for item in page.data]


# --- feedback and attachments -------------------------------------------------------------------------------------


async def test_feedback_is_for_items_of_the_thread_all_or_none(store: ConversationStore) -> None:
    thread_id = await make_thread(store, items=2)
    await store.save_feedback(thread_id, ["item_0", "item_1", "item_0"], "positive", alice())
    await store.save_feedback(thread_id, ["item_0"], "negative", alice())
    with pytest.raises(NotFoundError):
        await store.save_feedback(thread_id, ["item_1", "nothing"], "negative", alice())


async def test_an_attachment_comes_back_as_it_was_saved(store: ConversationStore) -> None:
    attachment = FileAttachment(id="atc_1", name="ä.txt", mime_type="text/plain", metadata={"a": 1})
    await store.save_attachment(attachment, alice())
    assert await store.load_attachment("atc_1", alice()) == attachment
    await store.delete_attachment("atc_1", alice())
    with pytest.raises(NotFoundError):
        await store.load_attachment("atc_1", alice())


def file(id: str = "atc_1", thread_id: str | None = None) -> FileAttachment:
    return FileAttachment(id=id, name="a.txt", mime_type="text/plain", thread_id=thread_id)


async def upload(store: ConversationStore, data: bytes, id: str = "atc_1") -> None:
    """Make a whole attachment of Alice's."""
    await store.reserve_attachment(file(id), len(data), 0, alice())
    name = await store.begin_upload(id, alice())
    for number, start in enumerate(range(0, len(data), CHUNK_BYTES)):
        await store.write_chunk(id, name, number, data[start : start + CHUNK_BYTES], 0, alice())
    await store.finish_upload(id, name, alice())


async def test_an_attachments_bytes_come_back_once_they_are_complete(store: ConversationStore) -> None:
    data = bytes(range(256)) * 1025
    await upload(store, data)
    assert await store.load_attachment_size("atc_1", alice()) == len(data)
    chunks = [await store.read_chunk("atc_1", number, alice()) for number in range(3)]
    assert b"".join(chunks) == data
    assert chunks[2] == b""
    assert await store.load_attachment_owner("atc_1") == "alice"


async def test_an_upload_that_has_not_ended_cannot_be_read(store: ConversationStore) -> None:
    await store.reserve_attachment(file(), 3, 0, alice())
    name = await store.begin_upload("atc_1", alice())
    await store.write_chunk("atc_1", name, 0, b"abc", 0, alice())
    for read in (store.read_chunk("atc_1", 0, alice()), store.load_attachment_size("atc_1", alice())):
        with pytest.raises(NotFoundError):
            await read


async def test_complete_bytes_do_not_change_and_the_newest_upload_wins(store: ConversationStore) -> None:
    await store.reserve_attachment(file(), 3, 0, alice())
    old = await store.begin_upload("atc_1", alice())
    await store.write_chunk("atc_1", old, 0, b"old", 0, alice())
    new = await store.begin_upload("atc_1", alice())
    for late in (
        store.write_chunk("atc_1", old, 1, b"old", 0, alice()),
        store.finish_upload("atc_1", old, alice()),
        store.abandon_upload("atc_1", old, alice()),
    ):
        with pytest.raises(AlreadyUploaded):
            await late
    await store.write_chunk("atc_1", new, 0, b"new", 0, alice())
    await store.finish_upload("atc_1", new, alice())
    with pytest.raises(AlreadyUploaded):
        await store.begin_upload("atc_1", alice())
    assert await store.read_chunk("atc_1", 0, alice()) == b"new"


async def test_an_upload_that_was_abandoned_leaves_no_bytes_and_can_be_made_again(store: ConversationStore) -> None:
    await store.reserve_attachment(file(), 3, 0, alice())
    name = await store.begin_upload("atc_1", alice())
    await store.write_chunk("atc_1", name, 0, b"abc", 0, alice())
    await store.abandon_upload("atc_1", name, alice())
    name = await store.begin_upload("atc_1", alice())
    await store.finish_upload("atc_1", name, alice())
    assert await store.load_attachment_size("atc_1", alice()) == 0


async def test_a_users_attachments_together_stay_within_their_storage(store: ConversationStore) -> None:
    await store.reserve_attachment(file("a"), 60, 100, alice())
    await store.reserve_attachment(file("b"), 60, 100, bob())
    with pytest.raises(QuotaExceeded):
        await store.reserve_attachment(file("c"), 41, 100, alice())
    await store.reserve_attachment(file("d"), 30, 100, alice())
    name = await store.begin_upload("d", alice())
    with pytest.raises(QuotaExceeded):
        await store.write_chunk("d", name, 0, b"x" * 41, 100, alice())
    await store.write_chunk("d", name, 0, b"x" * 40, 100, alice())


async def test_a_user_has_a_hundred_attachments_at_most_that_were_not_sent(store: ConversationStore) -> None:
    thread = await make_thread(store)
    for number in range(MAX_UNSENT):
        await store.reserve_attachment(file(f"a{number}"), 1, 0, alice())
    with pytest.raises(QuotaExceeded) as refused:
        await store.reserve_attachment(file("one more"), 1, 0, alice())
    assert refused.value.quota == "unsent_files"
    with pytest.raises(NotFoundError):
        await store.load_attachment("one more", alice())
    await store.reserve_attachment(file("b"), 1, 0, bob())
    await store.save_attachment(file("a0", thread_id=thread), alice())
    await store.reserve_attachment(file("one more"), 1, 0, alice())


async def test_an_attachment_that_was_sent_stays_in_its_thread(store: ConversationStore) -> None:
    here, there = await make_thread(store), await make_thread(store)
    await upload(store, b"abc")
    await store.save_attachment(file(thread_id=here), alice())
    await store.save_attachment(file(thread_id=here), alice())
    with pytest.raises(AlreadySent):
        await store.save_attachment(file(thread_id=there), alice())
    await store.delete_thread(here, alice())
    with pytest.raises(NotFoundError):
        await store.read_chunk("atc_1", 0, alice())


def sending_files(thread_id: str, *ids: str, id: str = "said") -> UserMessageItem:
    files = [file(each, thread_id) for each in ids]
    return sending_a_file(thread_id, id).model_copy(update={"attachments": files})


def sending_a_file(thread_id: str, id: str = "said") -> UserMessageItem:
    return UserMessageItem(
        id=id,
        thread_id=thread_id,
        created_at=NOON,
        content=[UserMessageTextContent(text="a\x00b")],
        attachments=[file(thread_id=thread_id)],
        inference_options=InferenceOptions(),
    )


async def test_a_message_that_the_end_of_its_turn_stores_takes_its_attachments_too(store: ConversationStore) -> None:
    here, there = await make_thread(store), await make_thread(store)
    for name in ("a", "b", "c"):
        await upload(store, b"abc", name)
    for thread, sent in ((here, ["a"]), (there, ["a", "b", "c"])):
        lease = await store.acquire_lease(thread, alice())
        message = sending_files(thread, *sent)
        await store.end_turn(thread, [message], RequestContext("alice", lease=lease))
        assert await ids(store, thread) == ["said"]
    threads = [(await store.load_attachment(name, alice())).thread_id for name in ("a", "b", "c")]
    assert threads == [here, there, there]
    await store.delete_thread_item(there, "said", alice())
    assert (await store.load_attachment("a", alice())).thread_id == here
    for name in ("b", "c"):
        with pytest.raises(NotFoundError):
            await store.load_attachment(name, alice())


async def test_deleting_what_is_only_a_checkpoint_deletes_its_attachments(store: ConversationStore) -> None:
    thread = await make_thread(store)
    await upload(store, b"abc", "a")
    context = RequestContext("alice", lease=await store.acquire_lease(thread, alice()))
    await store.save_checkpoints(thread, [sending_files(thread, "a")], context)
    await store.delete_thread_item(thread, "said", context)
    with pytest.raises(NotFoundError):
        await store.load_attachment("a", alice())


async def test_an_image_that_two_items_show_is_deleted_with_the_last(store: ConversationStore) -> None:
    thread = await make_thread(store)
    await upload(store, b"abc", "a")
    await store.save_attachment(file("a", thread), alice())
    for item_id in ("one", "other", "empty"):
        image = None if item_id == "empty" else GeneratedImage(id="g", url=f"{KEPT}a")
        item = GeneratedImageItem(id=item_id, thread_id=thread, created_at=NOON, image=image)
        await store.add_thread_item(thread, item, alice())
    await store.delete_thread_item(thread, "one", alice())
    assert (await store.load_attachment("a", alice())).thread_id == thread
    await store.delete_thread_item(thread, "other", alice())
    with pytest.raises(NotFoundError):
        await store.load_attachment("a", alice())


async def test_a_message_that_is_kept_by_a_checkpoint_takes_its_attachments_too(store: ConversationStore) -> None:
    thread = await make_thread(store)
    await upload(store, b"abc", "a")
    lease = await store.acquire_lease(thread, alice())
    await store.save_checkpoints(thread, [sending_files(thread, "a")], RequestContext("alice", lease=lease))
    assert (await store.load_attachment("a", alice())).thread_id == thread


async def test_a_message_takes_its_attachments_into_its_thread_or_is_not_stored(store: ConversationStore) -> None:
    here, there = await make_thread(store), await make_thread(store)
    await upload(store, b"abc")
    await store.add_thread_item(here, sending_a_file(here), alice())
    assert (await store.load_attachment("atc_1", alice())).thread_id == here
    with pytest.raises(AlreadySent):
        await store.add_thread_item(there, sending_a_file(there, "again"), alice())
    assert await ids(store, there) == []
    await store.delete_attachment("atc_1", alice())
    await store.add_thread_item(here, sending_a_file(here), alice())  # changed, say; the file does not come back
    with pytest.raises(NotFoundError):
        await store.load_attachment("atc_1", alice())


async def test_deleting_a_message_deletes_its_attachments(store: ConversationStore) -> None:
    thread_id = await make_thread(store, items=1)
    for delete in ("one", "later"):
        await upload(store, b"abc")
        await store.save_attachment(file(thread_id=thread_id), alice())
        await store.add_thread_item(thread_id, sending_a_file(thread_id), alice())
        if delete == "one":
            await store.delete_thread_item(thread_id, "said", alice())
        else:
            await store.delete_items_after(thread_id, "item_0", alice(), until="said")
        with pytest.raises(NotFoundError):
            await store.load_attachment("atc_1", alice())


async def test_deleting_a_generated_image_deletes_its_bytes(store: ConversationStore) -> None:
    thread_id = await make_thread(store, items=1)
    await upload(store, b"abc")
    image = GeneratedImage(id="i", url=f"{KEPT}atc_1")
    await store.add_thread_item(
        thread_id, GeneratedImageItem(id="drawn", thread_id=thread_id, created_at=NOON, image=image), alice()
    )
    await store.delete_items_after(thread_id, "item_0", alice(), until="drawn")
    with pytest.raises(NotFoundError):
        await store.load_attachment("atc_1", alice())


async def test_deleting_a_message_keeps_the_attachments_that_another_has_too(store: ConversationStore) -> None:
    thread_id = await make_thread(store)
    await upload(store, b"abc")
    await store.save_attachment(file(thread_id=thread_id), alice())
    for name in ("first", "again", "once more"):
        await store.add_thread_item(thread_id, sending_a_file(thread_id, name), alice())
    await store.delete_thread_item(thread_id, "again", alice())
    await store.delete_items_after(thread_id, "first", alice(), until="once more")
    assert await store.read_chunk("atc_1", 0, alice()) == b"abc"
    await store.delete_thread_item(thread_id, "first", alice())
    with pytest.raises(NotFoundError):
        await store.load_attachment("atc_1", alice())


async def test_links_are_signed_with_one_secret_for_all_processes(database: Database) -> None:
    async with database.open() as here, database.open() as there:
        assert await here.load_link_key() == await there.load_link_key()
        assert len(await here.load_link_key()) == 32


async def test_what_was_uploaded_and_not_sent_within_a_day_is_removed(
    store: ConversationStore, database: Database
) -> None:
    thread_id = await make_thread(store)
    for name in ("sent", "unsent", "new"):
        await upload(store, b"abc", name)
    await store.save_attachment(file("sent", thread_id), alice())
    database.age("attachments", "created_at", 24.5 * 3600, "id <> 'new'")
    assert await store.purge(0, now=True) == Purged(threads=0, attachments=1)
    for name in ("sent", "new"):
        await store.load_attachment(name, alice())
    with pytest.raises(NotFoundError):
        await store.load_attachment("unsent", alice())


async def test_threads_that_were_idle_for_longer_than_the_retention_are_removed(
    store: ConversationStore, database: Database
) -> None:
    old, new, forgotten = [await make_thread(store, items=1) for _ in range(3)]
    database.age("threads", "active_at", 8 * 86400, f"id <> '{new}'")
    await store.add_thread_item(old, end("new", old), alice())
    assert await store.purge(0, now=True) == Purged(threads=0, attachments=0)
    assert await store.purge(7, now=True) == Purged(threads=1, attachments=0)
    assert {thread.id for thread in (await store.load_threads(10, None, "desc", alice())).data} == {old, new}
    with pytest.raises(NotFoundError):
        await store.load_thread(forgotten, alice())


@pytest.mark.parametrize(
    "use",
    [
        lambda store, thread: store.save_item(thread.id, end("item_0", thread.id, NOON + timedelta(hours=1)), alice()),
        lambda store, thread: store.save_thread(thread.model_copy(update={"title": "Renamed"}), alice()),
        lambda store, thread: store.save_feedback(thread.id, ["item_0"], "positive", alice()),
    ],
    ids=["a changed item", "a rename", "feedback"],
)
async def test_a_thread_that_is_used_without_a_new_item_is_not_idle_and_keeps_its_place(
    store: ConversationStore, database: Database, use: Callable[..., Awaitable[Any]]
) -> None:
    used, newer = [await make_thread(store, items=1) for _ in range(2)]
    database.age("threads", "active_at", 8 * 86400, f"id = '{used}'")
    thread = await store.load_thread(used, alice())
    await use(store, thread)
    assert await store.purge(7, now=True) == Purged(threads=0, attachments=0)
    assert [each.id for each in (await store.load_threads(9, None, "desc", alice())).data] == [newer, used]


async def test_a_thread_whose_turn_died_is_removed_and_one_whose_turn_runs_is_not(
    store: ConversationStore, database: Database
) -> None:
    died, runs = [await make_thread(store) for _ in range(2)]
    await store.acquire_lease(died, alice())
    database.expire_leases()
    await store.acquire_lease(runs, alice())
    database.age("threads", "active_at", 8 * 86400, "TRUE")
    assert await store.purge(7, now=True) == Purged(threads=1, attachments=0)
    await store.load_thread(runs, alice())


async def test_as_many_as_there_are_are_removed(store: ConversationStore, database: Database) -> None:
    count = 2 * DELETION_BATCH + 1
    await asyncio.gather(*[make_thread(store) for _ in range(count)])
    database.age("threads", "active_at", 8 * 86400, "TRUE")
    assert await store.purge(7, now=True) == Purged(threads=count, attachments=0)


async def test_deleting_a_user_deletes_all_that_is_theirs_and_nothing_of_others(
    store: ConversationStore, database: Database
) -> None:
    for context in (alice(), bob()):
        thread_id = await make_thread(store, items=2, context=context)
        await store.save_feedback(thread_id, ["item_0"], "positive", context)
        for name, thread in (("sent", thread_id), ("unsent", None)):
            attachment = file(f"{name} by {context.user_id}", thread)
            await store.reserve_attachment(attachment, 1, 0, context)
            await store.save_attachment(attachment, context)
        await store.add_usage(Usage("", "", "small", 1, 1, 1), context)
        leased = replace(context, lease=await store.acquire_lease(thread_id, context, quota=Quota(turns_per_minute=9)))
        await store.save_checkpoints(thread_id, [end("open", thread_id)], leased)
    before = {table: database.count(table, "bob") for table in TABLES_OF_A_USER}
    assert await store.delete_user("alice") == DeletedUser(
        threads=1, items=2, attachments=2, usage_rows=1, running_turns=1
    )
    assert {table: database.count(table, "alice") for table in TABLES_OF_A_USER} == dict.fromkeys(TABLES_OF_A_USER, 0)
    assert {table: database.count(table, "bob") for table in TABLES_OF_A_USER} == before
    assert await store.delete_user("alice") == DeletedUser(0, 0, 0, 0, 0)


TABLES_OF_A_USER = ["threads", "items", "checkpoints", "feedback", "attachments", "usage", "turn_starts"]


async def test_what_is_listed_of_a_user_is_theirs(store: ConversationStore) -> None:
    thread_id = await make_thread(store, items=3)
    await store.save_feedback(thread_id, ["item_0", "item_2"], "negative", alice())
    for name in ("c", "a", "b"):
        await store.save_attachment(file(name), alice())
    for context in (alice(), bob()):
        await store.add_usage(Usage("", "", "small", 1, 1, 1), context)
    assert await store.load_feedback(thread_id, alice()) == {"item_0": "negative", "item_2": "negative"}
    assert await store.load_feedback(thread_id, bob()) == {}
    assert [each.id for each in await store.load_attachments("", 2, alice())] == ["a", "b"]
    assert [each.id for each in await store.load_attachments("b", 2, alice())] == ["c"]
    assert await store.load_attachments("", 2, bob()) == []
    assert [used.user_id for used in await store.load_usage("bob")] == ["bob"]


async def test_one_process_an_hour_removes(store: ConversationStore) -> None:
    assert await store.purge(0) == Purged(threads=0, attachments=0)
    assert await store.purge(0) is None


async def test_usage_adds_up_by_user_and_model(store: ConversationStore) -> None:
    for context, model in ((alice(), "small"), (alice(), "small"), (alice(), "large"), (bob(), "small")):
        await store.add_usage(Usage("", "", model, 1, 10, 5), context)
    used = [
        (each.user_id, each.model, each.requests, each.input_tokens, each.output_tokens)
        for each in await store.load_usage()
    ]
    assert used == [("alice", "large", 1, 10, 5), ("alice", "small", 2, 20, 10), ("bob", "small", 1, 10, 5)]


async def test_a_title_is_given_once_and_never_over_another(store: ConversationStore) -> None:
    thread_id = await make_thread(store)
    assert await store.name_thread(thread_id, "First", alice())
    assert not await store.name_thread(thread_id, "Second", alice())
    assert (await store.load_thread(thread_id, alice())).title == "First"


# --- quotas -------------------------------------------------------------------------------------------------------


async def test_turns_in_a_minute_are_counted_for_each_user(store: ConversationStore) -> None:
    quota = Quota(turns_per_minute=2)
    threads = [await make_thread(store) for _ in range(3)]
    for thread_id in threads[:2]:
        await store.acquire_lease(thread_id, alice(), quota=quota)
    with pytest.raises(QuotaExceeded) as caught:
        await store.acquire_lease(threads[2], alice(), quota=quota)
    assert (caught.value.quota, 0 < caught.value.retry_after_seconds <= 60) == ("turns_per_minute", True)
    of_bob = await make_thread(store, context=bob())
    await store.acquire_lease(of_bob, bob(), quota=quota)


async def test_a_turn_that_never_began_is_not_counted(store: ConversationStore) -> None:
    quota, thread_id = Quota(turns_per_minute=2), await make_thread(store)
    for began in (True, False, False, True):
        lease = await store.acquire_lease(thread_id, alice(), quota=quota)
        await store.end_turn(thread_id, [], RequestContext("alice", lease=lease), began=began)
    with pytest.raises(QuotaExceeded):
        await store.acquire_lease(thread_id, alice(), quota=quota)
    of_bob = await make_thread(store, context=bob())
    await store.acquire_lease(of_bob, bob(), quota=quota)
    await store.end_turn(of_bob, [], bob(), began=False)
    with pytest.raises(QuotaExceeded):
        await store.acquire_lease(thread_id, alice(), quota=quota)


async def test_turns_at_once_are_counted_until_they_end(store: ConversationStore) -> None:
    quota = Quota(concurrent_turns=1)
    first, second = await make_thread(store), await make_thread(store)
    lease = await store.acquire_lease(first, alice(), quota=quota)
    with pytest.raises(QuotaExceeded):
        await store.acquire_lease(second, alice(), quota=quota)
    await store.end_turn(first, [], RequestContext("alice", lease=lease))
    await store.acquire_lease(second, alice(), quota=quota)


async def test_tokens_of_the_day_are_counted(store: ConversationStore) -> None:
    quota, thread_id = Quota(tokens_per_day=15), await make_thread(store)
    await store.add_usage(Usage("", "", "m", 1, 10, 4), alice())
    lease = await store.acquire_lease(thread_id, alice(), quota=quota)
    await store.end_turn(thread_id, [], RequestContext("alice", lease=lease))
    await store.add_usage(Usage("", "", "m", 1, 0, 1), alice())
    with pytest.raises(QuotaExceeded) as caught:
        await store.acquire_lease(thread_id, alice(), quota=quota)
    assert 0 < caught.value.retry_after_seconds <= 86400


async def test_a_new_thread_over_quota_is_not_stored(store: ConversationStore) -> None:
    quota, thread = Quota(concurrent_turns=1), ThreadMetadata(id="thr_new", created_at=NOON)
    await store.acquire_lease(await make_thread(store), alice(), quota=quota)
    with pytest.raises(QuotaExceeded):
        await store.acquire_lease("thr_new", alice(), quota=quota, new_thread=thread)
    with pytest.raises(NotFoundError):
        await store.load_thread("thr_new", alice())


# --- writes -------------------------------------------------------------------------------------------------------


async def test_a_write_that_was_begun_ends_although_its_caller_was_cancelled(store: ConversationStore) -> None:
    thread_id = await make_thread(store)
    writing = asyncio.create_task(store.add_thread_item(thread_id, end("i", thread_id), alice()))
    await asyncio.sleep(0)
    writing.cancel()
    await asyncio.wait({writing})
    assert writing.cancelled()
    await store.add_thread_item(thread_id, end("j", thread_id), alice())
    assert await ids(store, thread_id) == ["i", "j"]


async def test_writes_to_a_thread_are_kept_in_the_order_in_which_they_were_begun(store: ConversationStore) -> None:
    thread_id = await make_thread(store)
    expected = [f"i{number}" for number in range(20)]
    await asyncio.gather(*[store.add_thread_item(thread_id, end(item_id, thread_id), alice()) for item_id in expected])
    assert await ids(store, thread_id) == expected


async def test_a_write_that_is_refused_undoes_none_of_those_around_it(store: ConversationStore) -> None:
    thread_id = await make_thread(store)
    writes = [
        store.add_thread_item(thread_id if number % 2 else "thr_none", end(f"i{number}", thread_id), alice())
        for number in range(10)
    ]
    results = await asyncio.gather(*writes, return_exceptions=True)
    assert [type(result) for result in results] == [NotFoundError, type(None)] * 5
    assert await ids(store, thread_id) == ["i1", "i3", "i5", "i7", "i9"]


async def test_what_was_written_is_there_after_the_store_was_opened_again(database: Database) -> None:
    async with database.open() as store:
        thread_id = await make_thread(store, items=2)
    async with database.open() as store:
        assert await ids(store, thread_id) == ["item_0", "item_1"]


async def test_stores_that_open_one_new_database_at_once_take_turns(database: Database) -> None:
    async def use() -> str:
        async with database.open() as store:
            return await make_thread(store)

    made = await asyncio.gather(*[use() for _ in range(8)])
    async with database.open() as store:
        assert len((await store.load_threads(100, None, "desc", alice())).data) == len(made)


async def test_an_item_that_this_release_cannot_read_hides_itself_and_nothing_else(
    store: ConversationStore, database: Database
) -> None:
    thread_id = await make_thread(store, items=3)
    body = f'{{"id": "item_1", "thread_id": "{thread_id}", "created_at": "2030-01-01T00:00:00Z", "type": "hologram"}}'
    database.execute(f"UPDATE @items SET body = '{body}' WHERE id = 'item_1'")
    page = await store.load_thread_items(thread_id, None, 9, "asc", alice())
    assert [type(item) for item in page.data] == [EndOfTurnItem, HiddenContextItem, EndOfTurnItem]


async def test_a_row_that_cannot_be_read_does_not_hold_up_what_others_read(
    store: ConversationStore, database: Database
) -> None:
    broken, caught = await make_thread(store, items=3), []
    database.execute("UPDATE @items SET body = '[]'")
    try:
        await store.load_thread_items(broken, None, 9, "asc", alice())
    except ValueError as error:
        caught.append(error)  # as a logger does that keeps the traceback
    assert caught
    await store.load_thread(await make_thread(store), alice())
