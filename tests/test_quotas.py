"""What a user, and a process, may use at once: refused before anything is stored, counted over all processes."""

import asyncio
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest
from chatkit.store import NotFoundError
from chatkit.types import ThreadMetadata

from clients import Stream
from conftest import probing
from context import RequestContext
from conversations import QuotaExceeded, ThreadBusy
from leases import MAX_WAITING
from service import Client, errors_of, eventually, service, thread_of
from standin import Begin, Hang, Say, StandIn
from store import open_store
from test_faults import seen_text
from turns import Turns


def refusal(client: Client) -> str:
    """Return what a message is answered that must be refused; nothing of it may be stored."""
    before = client.thread_ids()
    [error] = client.create("Refused")
    assert (error["type"], error["allow_retry"]) == ("error", False)
    assert client.thread_ids() == before
    return str(error["message"])


def test_turns_in_a_minute_are_counted_over_all_processes(model: StandIn, tmp_path: Path) -> None:
    variables = probing(model, tmp_path / "chatkit.db", TURNS_PER_MINUTE="3")
    with service(**variables) as one, service(**variables) as other:
        for client in (one, other, one):
            assert errors_of(client.create()) == []
        for client in (one, other):
            assert refusal(client).startswith("You have sent too many messages in a minute. Try again in ")


def test_turns_at_once_are_counted_over_all_processes_and_free_when_they_end(model: StandIn, tmp_path: Path) -> None:
    variables = probing(model, tmp_path / "chatkit.db", CONCURRENT_TURNS_PER_USER="2")
    model.will(Begin("One"), Hang())
    with service(**variables) as one, service(**variables) as other, Stream.create(one.url) as stream:
        stream.read_until(seen_text("One"))
        model.will(Begin("Two"), Hang())
        with Stream.create(other.url) as second:
            second.read_until(seen_text("Two"))
            for client in (one, other):
                assert refusal(client).startswith("Too many answers are being written for you at once.")
            second.leave()
        eventually(lambda: errors_of(one.create()) == [], what="room for another turn")
        stream.leave()


def test_tokens_of_a_day_are_counted_over_all_processes(model: StandIn, tmp_path: Path) -> None:
    variables = probing(model, tmp_path / "chatkit.db", TOKENS_PER_DAY="25")  # a turn takes 12, and so does a title
    with service(**variables) as one, service(**variables) as other:
        assert errors_of(one.create()) == []
        assert errors_of(other.create()) == []
        eventually(lambda: errors_of(one.create()), what="the count of the titles")
        for client in (one, other):
            assert refusal(client).startswith("You have used up what you may use in a day.")


def test_a_process_runs_no_more_turns_than_it_may_and_lets_none_wait(model: StandIn, tmp_path: Path) -> None:
    model.otherwise = [Begin("Half an answer"), Hang()]
    with service(**probing(model, tmp_path / "chatkit.db", MAX_TURNS="5")) as client, ExitStack() as stack:
        streams = [stack.enter_context(Stream.create(client.url)) for _ in range(5)]
        for stream in streams:
            stream.read_until(seen_text("Half an answer"))
        assert refusal(client) == "The service is busy. Try again in a moment."
        assert len(model.asked) == 5
        streams[0].leave()
        model.otherwise = [Say("There is room again.")]
        eventually(lambda: errors_of(client.create()) == [], what="room for another turn")
        for stream in streams[1:]:
            stream.leave()


@pytest.mark.anyio
async def test_what_there_is_no_room_for_leaves_no_thread_behind(tmp_path: Path) -> None:
    alice = RequestContext("alice")

    async def open_one(turns: Turns, number: int) -> None:
        thread = ThreadMetadata(id=f"thr_{number}", created_at=datetime.now(UTC))
        async with turns.opening(thread.id, alice, new_thread=thread):
            await asyncio.sleep(0.1)

    async with open_store(f"sqlite:///{tmp_path}/db") as store, Turns.running(store, max_turns=3) as turns:
        answers = await asyncio.gather(*[open_one(turns, number) for number in range(20)], return_exceptions=True)
        assert sum(isinstance(answer, QuotaExceeded) for answer in answers) == 17
        assert len((await store.load_threads(100, None, "desc", alice)).data) == 3


def test_who_waits_for_a_busy_thread_takes_no_turn_from_others(model: StandIn, tmp_path: Path) -> None:
    model.will(Begin("Half an answer"), Hang())
    with service(**probing(model, tmp_path / "chatkit.db", MAX_TURNS="3")) as client, ExitStack() as stack:
        busy = stack.enter_context(Stream.create(client.url))
        thread_id = thread_of(busy.read_until(seen_text("Half an answer")))
        waiting = [stack.enter_context(Stream.say(client.url, thread_id)) for _ in range(20)]
        refused = [each for each in waiting if not each.read(0.2) and each.ended]
        assert len(refused) == 20 - MAX_WAITING
        assert all("thread_busy" in each.text for each in refused)
        assert errors_of(client.create()) == []
        busy.leave()


@pytest.mark.anyio
async def test_nobody_who_knows_a_threads_id_keeps_its_user_from_it(tmp_path: Path) -> None:
    alice, mallory = RequestContext("alice"), RequestContext("mallory")
    thread = ThreadMetadata(id="thr_1", created_at=datetime.now(UTC))

    async def open_it(turns: Turns, context: RequestContext) -> str:
        async with turns.opening(thread.id, context):
            return context.user_id

    async with open_store(f"sqlite:///{tmp_path}/db") as store, Turns.running(store) as turns:
        await store.save_thread(thread, alice)
        crowd = [open_it(turns, mallory) for _ in range(3 * MAX_WAITING)]
        *refused, opened = await asyncio.gather(*crowd, open_it(turns, alice), return_exceptions=True)
    assert opened == "alice"
    assert all(isinstance(each, NotFoundError | ThreadBusy) for each in refused)
