"""A turn from its beginning to its end, on a real store: stopped at any moment, and while the database is away."""

import asyncio
import gc
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import pytest
from chatkit.errors import CustomStreamError
from chatkit.store import NotFoundError
from chatkit.types import (
    AssistantMessageContent,
    AssistantMessageContentPartDone,
    AssistantMessageContentPartTextDelta,
    AssistantMessageItem,
    ClientToolCallItem,
    CustomTask,
    HiddenContextItem,
    NoticeEvent,
    SDKHiddenContextItem,
    ThreadItem,
    ThreadItemAddedEvent,
    ThreadItemDoneEvent,
    ThreadItemRemovedEvent,
    ThreadItemUpdatedEvent,
    ThreadMetadata,
    Workflow,
    WorkflowItem,
    WorkflowTaskAdded,
)

from context import RequestContext
from conversations import ConversationStore, Quota, QuotaExceeded, ThreadBusy
from service import events_of
from sqliteschema import NOW
from store import open_store
from streams import TurnResponse
from turn import MAX_UNREAD_BYTES, Events, Stopped, Turn
from turns import Turns

pytestmark = pytest.mark.anyio

ALICE = RequestContext("alice")
THREAD = "thr_1"


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "chatkit.db"


@pytest.fixture
async def store(database: Path) -> AsyncIterator[ConversationStore]:
    async with open_store(f"sqlite:///{database}") as store:
        await store.save_thread(ThreadMetadata(id=THREAD, created_at=datetime.now(UTC)), RequestContext("alice"))
        yield store


@pytest.fixture
async def turns(store: ConversationStore) -> AsyncIterator[Turns]:
    async with Turns.running(store) as turns:
        yield turns


async def begin(turns: Turns, store: ConversationStore, events: Events) -> Turn:
    """Start a turn on the thread."""
    async with turns.opening(THREAD, RequestContext("alice")) as context:
        thread = await store.load_thread(THREAD, context)
        return turns.start(thread, context, events, lambda event, _: event)


def text(words: str, id: str = "msg_1") -> AssistantMessageItem:
    content = [AssistantMessageContent(text=words)] if words else []
    return AssistantMessageItem(id=id, thread_id=THREAD, created_at=datetime.now(UTC), content=content)


def more(words: str) -> ThreadItemUpdatedEvent:
    delta = AssistantMessageContentPartTextDelta(content_index=0, delta=words)
    return ThreadItemUpdatedEvent(item_id="msg_1", update=delta)


async def half_an_answer() -> Events:
    yield ThreadItemAddedEvent(item=text(""))
    yield more("Half an answer")
    await asyncio.sleep(3600)


async def half_an_answer_that_ends_late(ended: list[str], seconds: float) -> Events:
    try:
        async for event in half_an_answer():
            yield event
    finally:
        await asyncio.sleep(seconds)
        ended.append("in peace")


async def shown(turn: Turn, words: str) -> str:
    """Read until the words were shown; return all that was."""
    seen = b""
    async with asyncio.timeout(10):
        while words.encode() not in seen and (chunk := await turn.read()) is not None:
            seen += chunk
    assert words.encode() in seen
    return seen.decode()


async def rest_of(turn: Turn) -> list[dict[str, Any]]:
    """Return all events until the stream's end."""
    async with asyncio.timeout(10):
        return events_of(b"".join([chunk async for chunk in turn]).decode())


async def stored(store: ConversationStore) -> list[ThreadItem]:
    return list((await store.load_thread_items(THREAD, None, 100, "asc", RequestContext("alice"))).data)


async def until(found: Callable[[], Awaitable[bool]], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not await found():
            await asyncio.sleep(0.02)


async def is_free(store: ConversationStore) -> bool:
    """Whether another turn could begin on the thread; none is begun."""
    try:
        lease = await store.acquire_lease(THREAD, ALICE)
    except ThreadBusy:
        return False
    await store.end_turn(THREAD, [], RequestContext("alice", lease=lease))
    return True


def rows(database: Path, sql: str) -> list[tuple[Any, ...]]:
    """Run a statement as another process would."""
    with closing(sqlite3.connect(database, timeout=10)) as db, db:
        return db.execute(sql).fetchall()


@asynccontextmanager
async def away(database: Path) -> AsyncIterator[None]:
    """The database answers nothing that concerns a thread, inside."""
    await asyncio.to_thread(rows, database, "ALTER TABLE leases RENAME TO away")
    try:
        yield
    finally:
        await asyncio.to_thread(rows, database, "ALTER TABLE away RENAME TO leases")


# --- the end, when the database does not answer -------------------------------------------------------------------


async def test_a_turn_whose_end_cannot_be_stored_says_so_and_stores_it_once_the_database_answers(
    turns: Turns, store: ConversationStore, database: Path
) -> None:
    turn = await begin(turns, store, half_an_answer())
    await shown(turn, "Half an answer")
    async with away(database):
        turn.stop(Stopped.TIMEOUT)
        [error] = await rest_of(turn)
        assert error["message"] == "The answer took too long and was stopped."
        await turn.settled()
        assert not turn.task.done()
    await until(lambda: is_free(store))
    answer, marker = await stored(store)
    assert isinstance(answer, AssistantMessageItem)
    assert answer.content[0].text == "Half an answer"
    assert isinstance(marker, SDKHiddenContextItem)
    await asyncio.wait({turn.task}, timeout=5)
    assert turn.task.done()


async def test_an_end_that_another_process_was_faster_than_is_stored_in_full(
    turns: Turns, store: ConversationStore, database: Path
) -> None:
    go_on = asyncio.Event()

    async def answer() -> Events:
        yield ThreadItemAddedEvent(item=text(""))
        yield more("Half an answer")
        await go_on.wait()
        yield more(", and the other half")

    turn = await begin(turns, store, answer())
    await shown(turn, "Half an answer")
    await until(lambda: checkpointed(database))
    async with open_store(f"sqlite:///{database}") as other:
        async with away(database):
            go_on.set()
            assert "other half" in str(await rest_of(turn))
            await asyncio.to_thread(rows, database, "UPDATE away SET expires_at = 0")
        seen_by_other = await stored(other)
    assert [item.id for item in seen_by_other[:1]] == ["msg_1"]
    await asyncio.wait({turn.task}, timeout=5)
    [item] = await stored(store)
    assert isinstance(item, AssistantMessageItem)
    assert item.content[0].text == "Half an answer, and the other half"


async def test_a_turn_that_lives_is_not_taken_for_dead_in_its_own_process(
    turns: Turns, store: ConversationStore, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leases.BUSY_WAIT_SECONDS", 0.3)
    monkeypatch.setattr("turns.RENEWAL_SECONDS", 60)
    turn = await begin(turns, store, half_an_answer())
    await shown(turn, "Half an answer")
    await asyncio.to_thread(rows, database, "UPDATE leases SET expires_at = 0")
    with pytest.raises(ThreadBusy):
        async with turns.opening(THREAD, RequestContext("alice")):
            pass
    with pytest.raises(NotFoundError):  # and nobody else learns that there is a turn
        async with turns.opening(THREAD, RequestContext("mallory")):
            pass
    assert not turn.task.done()
    assert turn.context.lease in str(await asyncio.to_thread(rows, database, "SELECT lease FROM leases"))


@pytest.mark.parametrize("is_finished", [False, True])
async def test_what_was_taken_back_while_the_database_was_away_is_not_stored(
    turns: Turns, store: ConversationStore, database: Path, is_finished: bool
) -> None:
    go_on = asyncio.Event()

    async def answer() -> Events:
        yield ThreadItemAddedEvent(item=text("", "msg_2"))
        yield ThreadItemDoneEvent(item=text("Said before it", "msg_2"))
        yield ThreadItemAddedEvent(item=text(""))
        yield more("Forbidden")
        if is_finished:
            yield ThreadItemDoneEvent(item=text("Forbidden"))
        await go_on.wait()
        yield ThreadItemRemovedEvent(item_id="msg_1")

    turn = await begin(turns, store, answer())
    await shown(turn, "Forbidden")
    await until(lambda: checkpointed(database) if not is_finished else has_items(store, 2))
    async with away(database):
        go_on.set()
        await rest_of(turn)
    await until(lambda: is_free(store))
    await asyncio.wait({turn.task}, timeout=5)
    assert [item.id for item in await stored(store)] == ["msg_2"]
    assert rows(database, "SELECT id FROM checkpoints") == []


async def has_items(store: ConversationStore, number: int) -> bool:
    return len(await stored(store)) == number


async def checkpointed(database: Path) -> bool:
    return bool(await asyncio.to_thread(rows, database, "SELECT * FROM checkpoints"))


async def test_its_client_going_or_the_time_running_out_does_not_end_the_attempts(
    turns: Turns, store: ConversationStore, database: Path
) -> None:
    is_away = asyncio.Event()

    async def answered() -> Events:
        yield ThreadItemAddedEvent(item=text("A whole answer, not yet finished"))
        await is_away.wait()

    turn = await begin(turns, store, answered())
    async with away(database):
        is_away.set()
        [*_, error] = await rest_of(turn)
        assert "cannot reach its database" in error["message"]
        for reason in (Stopped.CLIENT_GONE, Stopped.TIMEOUT):
            turn.stop(reason)
    await until(lambda: is_free(store))
    assert [item.id for item in await stored(store)] == ["msg_1"]


async def test_a_shutdown_waits_for_an_end_that_is_not_stored_yet(store: ConversationStore, database: Path) -> None:
    async with Turns.running(store) as turns:
        turn = await begin(turns, store, half_an_answer())
        await shown(turn, "Half an answer")
        async with away(database):
            turn.stop(Stopped.CLIENT_GONE)
            await turn.settled()
        assert not turn.task.done()
    assert turn.task.done()
    assert len(await stored(store)) == 2


async def test_a_database_that_stays_away_does_not_hold_up_a_shutdown(store: ConversationStore, database: Path) -> None:
    turns = Turns(store, 300, Quota(), 0)
    turn = await begin(turns, store, half_an_answer())
    await shown(turn, "Half an answer")
    async with away(database):
        async with asyncio.timeout(5):
            await turns.drain(timeout_seconds=0.2)
        assert turn.task.done()


async def test_a_lease_is_given_back_whatever_the_database_does_meanwhile(
    store: ConversationStore, database: Path
) -> None:
    async with Turns.running(store, quota=Quota(turns_per_minute=1)) as turns:
        async with AsyncExitStack() as stack:

            async def refused() -> None:
                async with turns.opening(THREAD, ALICE):
                    await stack.enter_async_context(away(database))
                    raise RuntimeError("refused")

            with pytest.raises(RuntimeError, match="refused"):
                await refused()
        await until(lambda: is_free(store), seconds=8)  # before it runs out
        assert await stored(store) == []
        async with turns.opening(THREAD, ALICE):  # what never began does not count
            pass
        with pytest.raises(QuotaExceeded):
            await turns.opening(THREAD, ALICE).__aenter__()


async def test_a_request_that_is_cancelled_while_it_takes_the_lease_leaves_none_behind(
    turns: Turns, store: ConversationStore
) -> None:
    async def opening() -> None:
        async with turns.opening(THREAD, ALICE):
            await asyncio.sleep(3600)

    for ticks in range(5):
        task = asyncio.create_task(opening())
        for _ in range(ticks):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        await until(lambda: is_free(store), seconds=5)
        assert await stored(store) == []


# --- being stopped ------------------------------------------------------------------------------------------------


async def test_a_turn_that_is_stopped_before_its_first_step_stores_nothing_and_gives_the_thread_back(
    store: ConversationStore,
) -> None:
    closed = []

    async def events() -> Events:
        try:
            yield NoticeEvent(level="info", message="begun")
        finally:
            closed.append("begun")

    async with Turns.running(store, quota=Quota(turns_per_minute=1)) as turns:
        for _ in range(3):  # and does not count
            never = events()
            turn = await begin(turns, store, never)
            turn.stop(Stopped.CLIENT_GONE)
            await turn.settled()
            assert await stored(store) == []
            with pytest.raises(StopAsyncIteration):
                await anext(never)
    assert closed == []
    assert await is_free(store)


async def test_a_turn_is_stopped_once_so_that_it_may_end_in_peace(turns: Turns, store: ConversationStore) -> None:
    ended: list[str] = []
    turn = await begin(turns, store, half_an_answer_that_ends_late(ended, 0.1))
    await shown(turn, "Half an answer")
    for reason in (Stopped.CLIENT_GONE, Stopped.SHUTDOWN, Stopped.TIMEOUT):
        turn.stop(reason)
        await asyncio.sleep(0.02)
    await turn.settled()
    assert ended == ["in peace"]
    assert [item.type for item in await stored(store)] == ["assistant_message", "sdk_hidden_context"]
    assert turn.stopped is Stopped.CLIENT_GONE


async def test_a_turn_that_stops_itself_with_its_last_event_gives_the_thread_back(
    turns: Turns, store: ConversationStore
) -> None:
    async def flood() -> Events:
        yield NoticeEvent(level="info", message="x" * (MAX_UNREAD_BYTES + 1))

    turn = await begin(turns, store, flood())
    await asyncio.wait({turn.task})
    assert not turn.task.cancelled()
    assert await is_free(store)


async def test_a_turn_that_is_to_finish_goes_on_when_its_client_reads_too_slowly(
    turns: Turns, store: ConversationStore
) -> None:
    async def flood() -> Events:
        yield NoticeEvent(level="info", message="x" * (MAX_UNREAD_BYTES + 1))
        await asyncio.sleep(0.05)
        yield ThreadItemDoneEvent(item=text("The whole answer"))

    turn = await begin(turns, store, flood())
    TurnResponse(turn, 1.0, stop_when_gone=False)
    await asyncio.wait({turn.task})
    assert await rest_of(turn) == []
    assert turn.stopped is None
    [kept] = await stored(store)
    assert kept.id == "msg_1"


async def test_whoever_waits_for_a_stopped_turn_waits_until_it_has_ended(
    turns: Turns, store: ConversationStore
) -> None:
    ended: list[str] = []
    turn = await begin(turns, store, half_an_answer_that_ends_late(ended, 0.2))
    await shown(turn, "Half an answer")
    with anyio.CancelScope() as request:
        request.cancel()  # as a web server does whose client has gone
        turn.stop(Stopped.CLIENT_GONE)
        await turn.settled()
    assert ended == ["in peace"]
    assert len(await stored(store)) == 2


async def test_a_client_may_read_the_last_words_of_a_turn_that_a_shutdown_stops(
    turns: Turns, store: ConversationStore
) -> None:
    turn = await begin(turns, store, half_an_answer())
    sent: list[bytes] = []

    async def slowly(message: Any) -> None:
        await asyncio.sleep(0.05)  # as over a network that has to be waited for
        sent.append(message.get("body", b""))

    async def connected() -> Any:
        await asyncio.sleep(3600)

    async def half_is_sent() -> bool:
        return b"Half an answer" in b"".join(sent)

    response = TurnResponse(turn, 15, stop_when_gone=True)
    request = asyncio.create_task(response({"type": "http"}, connected, slowly))
    await until(half_is_sent)
    request.cancel()
    await asyncio.wait({request})
    assert "being restarted" in b"".join(sent).decode()


# --- what goes on beside the turns --------------------------------------------------------------------------------


async def test_nothing_that_one_turn_shows_keeps_the_leases_of_others_from_being_renewed(
    turns: Turns, store: ConversationStore, database: Path
) -> None:
    turn = await begin(turns, store, half_an_answer())
    await shown(turn, "Half an answer")
    turn.open_items._items["msg_1"] = AssistantMessageItem.model_construct(id="msg_1", content=None)
    turn.open_items._unsaved.add("msg_1")

    async def is_renewed() -> bool:
        [[seconds]] = await asyncio.to_thread(rows, database, f"SELECT expires_at - {NOW} FROM leases")
        return float(seconds) > 9

    await until(is_renewed)  # taken just now
    for _ in range(2):
        await asyncio.to_thread(rows, database, f"UPDATE leases SET expires_at = {NOW} + 8")
        await until(is_renewed)
    turn.stop(Stopped.CLIENT_GONE)
    await turn.settled()
    assert await is_free(store)


async def test_what_fails_beside_a_turn_is_logged_without_its_words_and_disturbs_nothing(
    turns: Turns, store: ConversationStore, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        raise ValueError("SENTINEL")

    turns.beside(fail())
    await until(lambda: _logged(caplog, "ValueError"))
    await turns.drain()
    gc.collect()
    await asyncio.sleep(0)
    assert "SENTINEL" not in caplog.text


async def test_an_authors_own_way_to_end_a_turn_is_no_failure(
    turns: Turns, store: ConversationStore, caplog: pytest.LogCaptureFixture
) -> None:
    async def events() -> Events:
        yield NoticeEvent(level="info", message="begun")
        raise CustomStreamError("Not today.", allow_retry=False)

    *_, error = await rest_of(await begin(turns, store, events()))
    assert error["message"] == "Not today."
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def _logged(caplog: pytest.LogCaptureFixture, words: str) -> bool:
    return words in caplog.text


# --- the thread ---------------------------------------------------------------------------------------------------


async def test_a_rename_by_the_user_is_shown_when_the_agent_changes_something_else(
    turns: Turns, store: ConversationStore
) -> None:
    thread: ThreadMetadata | None = None

    async def events() -> Events:
        assert thread is not None
        user = RequestContext("alice")
        renamed = await store.load_thread(THREAD, user)
        renamed.title = "The user's own"
        await store.save_thread(renamed, user)
        thread.metadata["noted"] = True
        yield NoticeEvent(level="info", message="noted")
        assert thread.title == "The user's own"

    async with turns.opening(THREAD, RequestContext("alice")) as context:
        thread = await store.load_thread(THREAD, context)
        turn = turns.start(thread, context, events(), lambda event, _: event)
    titles = [event["thread"]["title"] for event in await rest_of(turn) if event["type"] == "thread.updated"]
    assert titles == ["The user's own"]
    kept = await store.load_thread(THREAD, RequestContext("alice"))
    assert (kept.title, kept.metadata) == ("The user's own", {"noted": True})


async def test_what_an_agent_changes_while_its_last_change_is_stored_is_stored_too(
    turns: Turns, store: ConversationStore
) -> None:
    thread: ThreadMetadata | None = None

    async def events() -> Events:
        assert thread is not None
        notes = thread.metadata
        notes["first"] = True
        asyncio.get_running_loop().call_soon(notes.update, {"second": True})
        yield NoticeEvent(level="info", message="noted")
        notes["third"] = True

    async with turns.opening(THREAD, RequestContext("alice")) as context:
        thread = await store.load_thread(THREAD, context)
        turn = turns.start(thread, context, events(), lambda event, _: event)
    await rest_of(turn)
    kept = await store.load_thread(THREAD, RequestContext("alice"))
    assert kept.metadata == {"first": True, "second": True, "third": True}


async def test_what_is_removed_is_not_written_again_by_a_checkpoint(
    turns: Turns, store: ConversationStore, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete = store.delete_thread_item

    async def delete_and_keep(*arguments: Any) -> None:
        await delete(*arguments)
        await turns._checkpoint(turn)
        assert rows(database, "SELECT id FROM checkpoints") == []

    async def removing() -> Events:
        yield ThreadItemAddedEvent(item=text(""))
        yield more("Withdrawn")
        await turns._checkpoint(turn)
        assert rows(database, "SELECT id FROM checkpoints") == [("msg_1",)]
        yield more(" again")
        yield ThreadItemRemovedEvent(item_id="msg_1")

    monkeypatch.setattr(store, "delete_thread_item", delete_and_keep)
    turn = await begin(turns, store, removing())
    assert (await rest_of(turn))[-1]["type"] == "thread.item.removed"
    assert await stored(store) == []


async def test_that_a_hidden_item_is_removed_is_not_shown_either(turns: Turns, store: ConversationStore) -> None:
    def hidden(id: str) -> SDKHiddenContextItem:
        return SDKHiddenContextItem(id=id, thread_id=THREAD, created_at=datetime.now(UTC), content="hidden words")

    await store.add_thread_item(THREAD, hidden("of_before"), RequestContext("alice"))

    async def events() -> Events:
        yield ThreadItemAddedEvent(item=hidden("added"))
        yield ThreadItemDoneEvent(item=hidden("done"))
        yield ThreadItemDoneEvent(item=text("A word", "msg_2"))
        for item_id in ("of_before", "added", "done", "msg_2"):
            yield ThreadItemRemovedEvent(item_id=item_id)

    seen = await rest_of(await begin(turns, store, events()))
    assert [event["type"] for event in seen] == ["thread.item.done", "thread.item.removed"]
    assert seen[1]["item_id"] == "msg_2"
    assert await stored(store) == []


async def test_an_open_item_that_no_database_takes_costs_the_others_nothing(
    turns: Turns, store: ConversationStore
) -> None:
    arguments: dict[str, Any] = {}
    for _ in range(230):
        arguments = {"a": arguments}

    async def both() -> Events:
        yield ThreadItemAddedEvent(item=text(""))
        yield more("Half an answer")
        yield ThreadItemDoneEvent(
            item=ClientToolCallItem(
                id="call", thread_id=THREAD, created_at=datetime.now(UTC), call_id="c", name="n", arguments=arguments
            )
        )

    events = await rest_of(await begin(turns, store, both()))
    assert [event["item"]["id"] for event in events if event["type"] == "thread.item.done"] == ["msg_1"]
    assert events[-1]["type"] == "error"
    assert [item.id for item in await stored(store)] == ["msg_1"]
    assert await is_free(store)


async def test_an_update_that_no_database_takes_leaves_what_was_shown_before_it(
    turns: Turns, store: ConversationStore
) -> None:
    workflow = Workflow(type="custom", tasks=[CustomTask(title="One")])
    item = WorkflowItem(id="wfl_1", thread_id=THREAD, created_at=datetime.now(UTC), workflow=workflow)

    async def working() -> Events:
        yield ThreadItemAddedEvent(item=item)
        for place, title in enumerate(["Two", "Half a letter \ud83d"], start=1):
            update = WorkflowTaskAdded(task_index=place, task=CustomTask(title=title))
            yield ThreadItemUpdatedEvent(item_id="wfl_1", update=update)

    *_, done, error = await rest_of(await begin(turns, store, working()))
    assert (done["type"], error["type"]) == ("thread.item.done", "error")
    [kept] = await stored(store)
    assert isinstance(kept, WorkflowItem)
    assert [task.title for task in kept.workflow.tasks if isinstance(task, CustomTask)] == ["One", "Two"]
    assert await is_free(store)


async def test_a_letter_that_an_author_streamed_in_two_halves_is_stored_as_it_was_shown(
    turns: Turns, store: ConversationStore, database: Path
) -> None:
    async def streaming() -> Events:
        yield ThreadItemAddedEvent(item=text(""))
        for piece in ("Two halves ", "\ud83d", "\ude00", " and one \ud83d"):
            yield more(piece)
        await asyncio.sleep(3600)

    turn = await begin(turns, store, streaming())
    seen = await shown(turn, " and one \ufffd")
    assert "Two halves \U0001f600 and one" in seen
    await until(lambda: asyncio.to_thread(lambda: bool(rows(database, "SELECT * FROM checkpoints"))))
    turn.stop(Stopped.CLIENT_GONE)
    await turn.settled()
    message, _ = await stored(store)
    assert isinstance(message, AssistantMessageItem)
    assert message.content[0].text == "Two halves \U0001f600 and one \ufffd"


async def test_a_hidden_item_stays_hidden_when_a_visible_one_with_its_id_cannot_be_stored(
    turns: Turns, store: ConversationStore
) -> None:
    at = {"thread_id": THREAD, "created_at": datetime.now(UTC)}

    async def odd() -> Events:
        yield ThreadItemAddedEvent(item=HiddenContextItem(id="msg_1", content="a secret", **at))
        yield ThreadItemDoneEvent(item=text("Half a letter \ud83d"))

    turn = await begin(turns, store, odd())
    events = await rest_of(turn)
    assert [event["type"] for event in events] == ["error"]
    assert [type(item) for item in await stored(store)] == [HiddenContextItem]


async def test_an_earlier_item_of_which_an_update_leaves_nothing_stays_as_it_was(
    turns: Turns, store: ConversationStore
) -> None:
    await store.add_thread_item(THREAD, text("Some words"), RequestContext("alice"))

    async def emptying() -> Events:
        update = AssistantMessageContentPartDone(content_index=0, content=AssistantMessageContent(text=" "))
        yield ThreadItemUpdatedEvent(item_id="msg_1", update=update)

    *_, done = await rest_of(await begin(turns, store, emptying()))
    assert (done["type"], done["item"]["content"][0]["text"]) == ("thread.item.done", "Some words")
    [kept] = await stored(store)
    assert isinstance(kept, AssistantMessageItem)
    assert kept.content[0].text == "Some words"


async def test_an_update_leaves_an_item_alone_that_cannot_be_read(
    turns: Turns, store: ConversationStore, database: Path
) -> None:
    await store.add_thread_item(THREAD, text("Some words"), RequestContext("alice"))
    with closing(sqlite3.connect(database)) as db, db:
        db.execute("UPDATE items SET body = replace(body, 'assistant_message', 'of_a_newer_release')")
    before = rows(database, "SELECT body FROM items")

    async def updating() -> Events:
        yield more("More")

    await rest_of(await begin(turns, store, updating()))
    assert rows(database, "SELECT body FROM items") == before


@pytest.mark.parametrize("index", [-1, 1_000_000])
async def test_a_part_whose_number_is_beyond_reason_ends_the_turn_with_words(
    turns: Turns, store: ConversationStore, index: int
) -> None:
    async def nonsense() -> Events:
        yield ThreadItemAddedEvent(item=text("Half an answer"))
        delta = AssistantMessageContentPartTextDelta(content_index=index, delta="more")
        yield ThreadItemUpdatedEvent(item_id="msg_1", update=delta)

    events = await rest_of(await begin(turns, store, nonsense()))
    assert events[-1]["message"] == "The model's answer could not be read. Try again."
    [answer] = await stored(store)
    assert answer == text("Half an answer").model_copy(update={"created_at": answer.created_at})
