"""What survives when clients vanish, services die, and models hang: over real sockets and real processes."""

import json
import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import chatkit.agents
import httpx2
import pytest

from clients import Event, Stream
from conftest import probing
from databases import Database
from service import (
    Client,
    InProcess,
    Process,
    errors_of,
    eventually,
    fold,
    is_reachable,
    message,
    process,
    service,
    text_of,
    thread_of,
    types,
)
from standin import Begin, Break, Call, Echo, Fail, FailLater, Hang, Reason, Say, StandIn, Step, Wait
from turn import MAX_UNREAD_BYTES

Item = dict[str, Any]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "chatkit.db"


@pytest.fixture
def own_service(model: StandIn, database: Path) -> Iterator[InProcess]:
    """A service in this process that no other test uses, on an empty database."""
    with service(**probing(model, database)) as client:
        yield client


@pytest.fixture
def either(new_database: Callable[[], Database]) -> Database:
    """An empty database, whichever kind; the test is run for each."""
    return new_database()


@pytest.fixture
def either_service(model: StandIn, either: Database) -> Iterator[InProcess]:
    """A service in this process that no other test uses, on that database."""
    with service(**probing(model, **either.environ)) as client:
        yield client


# --- clients that vanish ------------------------------------------------------------------------------------------

LONG = "One word follows another, and the next one follows that. " * 30
SCRIPTS: list[list[Step]] = [
    [Say(LONG, gap=0.005)],
    [Say(LONG, gap=0.005)],
    [Reason("It takes some thought."), Say(LONG, gap=0.01)],
    [Say("Let me look.", gap=0.01), Call("look_up", {"word": "chance"})],
    [Call("show_widget")],
    [Call("show_half_a_widget")],
    [Say("Some words come first."), Begin("And then half"), Hang()],
]


def test_200_clients_vanish_at_random_moments_and_all_that_they_saw_is_stored(
    either_service: InProcess, model: StandIn, either: Database, chance: random.Random
) -> None:
    threads = [thread_of(either_service.create(f"The first of {number}")) for number in range(10)]
    idle, earlier = either_service.tasks(), len(model.asked)
    model.otherwise = SCRIPTS[0]
    for number in range(1000):
        *begun, last = chance.choice(SCRIPTS)
        model.will(*begun, replace(last, call_id=f"call_{number}") if isinstance(last, Call) else last)

    def vanish(thread_id: str | None, how: str, seconds: float, has_begun: bool) -> Stream:
        url = either_service.url
        with Stream.say(url, thread_id) if thread_id else Stream.create(url) as stream:
            while has_begun and not stream.seen and not stream.ended:  # however long this machine takes for it
                stream.read(0.02)
            stream.read(seconds)
            stream.leave() if how == "FIN" else stream.reset()
            return stream

    vanished = []
    with ThreadPoolExecutor(20) as pool:
        for _ in range(10):
            visits = [*threads, *[None] * 10]
            ways = ["FIN", "RST"] * 10
            begun = [True] * 14 + [False] * 6  # the others leave whether they have seen anything or not
            for each in (visits, begun):
                chance.shuffle(each)
            vanished += pool.map(vanish, visits, ways, [chance.uniform(0, 1) for _ in visits], begun)

    eventually(lambda: not model.open_requests, what="the end of all requests to the model")
    eventually(lambda: not (either_service.tasks() - idle), what="the end of all tasks")
    assert either.leases() == either.query("SELECT * FROM @checkpoints") == []
    for stream in vanished:
        assert_kept(either_service, stream.seen)
    endless = [asked for asked in model.asked[earlier:] if not isinstance(asked.steps[-1], Call)]
    assert {asked.ended for asked in endless} == {"cut"}
    assert_each_turn_is_marked_as_stopped(either, after=10)
    begun = [stream for stream in vanished if stream.seen]
    print(f"{len(vanished)} vanished, {len(begun)} had seen events, {len(model.asked) - earlier} model requests")
    assert len(begun) > 100


def assert_each_turn_is_marked_as_stopped(database: Database, *, after: int) -> None:
    """Each user message but the first so many, which were answered, has one marker before the next message."""
    stored = database.query("SELECT thread_id, type FROM @items ORDER BY thread_id, seq")
    turns: list[list[str]] = []
    for _, kind in stored:
        if kind == "user_message":
            turns.append([])
        else:
            turns[-1].append(kind)
    assert sorted(turn.count("sdk_hidden_context") for turn in turns) == [0] * after + [1] * (len(turns) - after)
    stopped = [turn for turn in turns if "sdk_hidden_context" in turn]
    assert all(turn[-1] == "sdk_hidden_context" for turn in stopped), "something was stored behind the marker"


def seen_text(text: str) -> Callable[[list[Event]], bool]:
    return lambda events: any(text == text_of(item) for item in fold(events) if item["type"] == "assistant_message")


def seen_item(type: str, text: str) -> Callable[[list[Event]], bool]:
    return lambda events: any(item["type"] == type and text in json.dumps(item) for item in fold(events))


HALVES = {
    "a text": ([[Begin("Half an answer"), Hang()]], seen_text("Half an answer")),
    "a widget": ([[Call("show_half_a_widget")]], seen_item("widget", "Half a widget")),
    "a workflow": ([[Call("work")], [Hang()]], seen_item("workflow", '"Two"')),
    "a model that hangs": ([[Hang()]], lambda events: any(each["type"] == "stream_options" for each in events)),
    "a tool that runs": (
        [[Say("Let me see."), Call("rest")]],
        lambda events: any(each["type"] == "progress_update" for each in events),
    ),
}


@pytest.mark.parametrize("what", HALVES)
def test_stopping_in_the_middle_keeps_what_was_shown_and_the_thread_goes_on(
    what: str, either_service: InProcess, model: StandIn, either: Database
) -> None:
    scripts, begun = HALVES[what]
    for script in scripts:
        model.will(*script)
    idle = either_service.tasks()
    with Stream.create(either_service.url) as stream:
        thread_id = thread_of(stream.read_until(begun))
        eventually(lambda: len(model.asked) == len(scripts), what="the request to the model")
        stream.leave()
        shown = [item for item in fold(stream.seen) if not is_empty(item)]
    eventually(lambda: not model.open_requests, what="the end of the request to the model")
    eventually(lambda: not (either_service.tasks() - idle), what="the end of all tasks")
    assert either_service.items(thread_id) == [as_finished(item) for item in shown]
    assert either.query("SELECT type FROM @items ORDER BY seq")[-1] == ("sdk_hidden_context",)
    answered = either_service.say(thread_id)
    assert text_of(fold(answered)[-1]) == "Hello from the stand-in."


def as_finished(item: Item) -> Item:
    """Return a client's item as it is shown once nothing more will come."""
    text = json.dumps(item).replace('"streaming": true', '"streaming": false')
    item = json.loads(text.replace('"status_indicator": "loading"', '"status_indicator": "none"'))
    if item["type"] == "workflow":
        item["workflow"]["summary"] = {"duration": 0}
    return item


def test_a_turn_runs_on_without_its_client_where_that_is_configured(model: StandIn, database: Path) -> None:
    model.will(Say("This is said to the end.", gap=0.4))
    with service(**probing(model, database, ON_DISCONNECT="finish")) as client:
        with Stream.create(client.url) as stream:
            thread_id = thread_of(stream.read_until(lambda events: "This" in str(events)))
            stream.leave()
        options = [each["stream_options"] for each in stream.seen if each["type"] == "stream_options"]
        assert options == [{"allow_cancel": False}]
        assert "end" not in text_of(fold(stream.seen)[-1])
        eventually(lambda: len(client.items(thread_id)) == 2, what="the whole answer")
        assert text_of(client.items(thread_id)[-1]) == "This is said to the end."
        eventually(lambda: [asked.ended for asked in model.asked] == ["answered"])
    assert ("sdk_hidden_context",) not in rows(database, "SELECT type FROM items")


def test_a_client_that_never_reads_is_stopped_and_costs_bounded_memory(
    model: StandIn, database: Path, tmp_path: Path
) -> None:
    flood = Say(" ".join(["x" * 16384] * 4096), gap=0.0001)  # 64 MiB
    with process(tmp_path, **probing(model, database)) as running:
        thread_id = thread_of(running.create())
        before = resident_bytes(running)
        model.will(flood)
        with Stream.say(running.url, thread_id, receive_buffer_bytes=65536):
            eventually(lambda: len(model.asked) == 2, what="the flood")
            most, slowest = before, 0.0
            while model.open_requests:
                began = time.monotonic()
                assert text_of(fold(running.create())[-1]) == "Hello from the stand-in."
                slowest = max(slowest, time.monotonic() - began)
                most = max(most, resident_bytes(running))
            assert model.asked[1].ended == "cut"
            eventually(lambda: not rows(database, "SELECT * FROM leases"), what="the end of the turn")
            _, answer, marker = rows(database, f"SELECT type, body FROM items WHERE thread_id = '{thread_id}'")[-3:]
        kept = len(json.loads(answer[1])["content"][0]["text"])
        print(f"{kept} letters kept, {(most - before) >> 20} MiB more memory, others waited {slowest:.2f} s at most")
        assert (answer[0], marker[0]) == ("assistant_message", "sdk_hidden_context")
        assert MAX_UNREAD_BYTES // 2 < kept < 6 * MAX_UNREAD_BYTES
        assert most - before < 20 * MAX_UNREAD_BYTES
        assert slowest < 5


# --- the stream itself --------------------------------------------------------------------------------------------


def test_a_silence_carries_heartbeats_of_one_line_between_whole_events(model: StandIn, database: Path) -> None:
    model.will(Begin("A word"), Wait(0.7), Say("and another, later"), Wait(0.5))
    with service(**probing(model, database, HEARTBEAT_SECONDS="0.2")) as client:
        with Stream.create(client.url) as stream:
            stream.read_to_end()
        assert stream.text.count(": keep-alive\n") >= 3
        assert ": keep-alive\n\n" not in stream.text
        assert stream.text.replace(": keep-alive\n", "") == "".join(
            f"data: {block}\n\n" for block in (json.dumps(event, **AS_SENT) for event in stream.seen)
        )
        assert fold(stream.seen) == client.items(thread_of(stream.seen))


AS_SENT: dict[str, Any] = {"separators": (",", ":"), "ensure_ascii": False}


def test_chunks_that_wait_together_are_sent_together(model: StandIn, database: Path) -> None:
    sends: list[int] = []

    def counting(app: Any) -> Any:
        async def counted(scope: Any, receive: Any, send: Any) -> None:
            async def count(message: Any) -> None:
                if message["type"] == "http.response.body":
                    sends.append(len(message["body"]))
                await send(message)

            await app(scope, receive, count)

        return counted

    model.will(Say("word " * 3000))
    with service(counting, **probing(model, database)) as client:
        sends.clear()
        events = client.create()
    print(f"{len(events)} events in {len(sends)} sends")
    assert text_of(fold(events)[-1]) == "word " * 3000
    assert len(sends) < 3000 / 5


def test_a_model_that_hangs_is_ended_in_words_for_the_user(model: StandIn, database: Path) -> None:
    model.will(Begin("Half an answer"), Hang())
    with service(**probing(model, database, TURN_TIMEOUT_SECONDS="1")) as client:
        began = time.monotonic()
        events = client.create()
        assert 1 <= time.monotonic() - began < 4
        [error] = errors_of(events)
        assert (error["message"], error["allow_retry"]) == ("The answer took too long and was stopped.", True)
        assert [text_of(item) for item in client.items(thread_of(events))] == ["Hello", "Half an answer"]
        eventually(lambda: [asked.ended for asked in model.asked] == ["cut"])
    assert rows(database, "SELECT type FROM items ORDER BY seq")[-1] == ("sdk_hidden_context",)


def test_letters_that_a_server_cut_in_half_do_not_end_the_answer(own_service: InProcess, model: StandIn) -> None:
    model.will(Reason("Half \ud83d"), Say("Half \ud83d and two halves \ud83d\ude00"))
    events = own_service.create()
    assert errors_of(events) == []
    *_, answer = stored = own_service.items(thread_of(events))
    assert text_of(answer) == "Half \ufffd and two halves \U0001f600"
    assert stored == fold(events)


def test_an_item_that_no_database_takes_ends_its_turn_with_words_and_disturbs_no_other(
    own_service: InProcess, model: StandIn, database: Path
) -> None:
    model.will(Begin("Half an answer"), Hang())
    with Stream.create(own_service.url) as good:
        good.read_until(seen_text("Half an answer"))
        model.will(Call("whisper_half_a_letter"))
        events = own_service.create()
        [error] = errors_of(events)
        assert "on our side" in error["message"]
        eventually(lambda: rows(database, "SELECT * FROM checkpoints"), what="the other turn's checkpoint")
    eventually(lambda: not rows(database, "SELECT * FROM leases"), what="the end of both turns")
    assert text_of(fold(own_service.say(thread_of(events)))[-1]) == "Hello from the stand-in."


def test_what_was_shown_while_the_database_was_locked_is_stored_once_it_is_not(
    own_service: InProcess, model: StandIn, database: Path
) -> None:
    words = "These words come while nothing can be written. " * 3
    model.will(Begin("It begins."), Wait(1), Say(words, gap=0.02))
    with closing(sqlite3.connect(database, timeout=10)) as other, Stream.create(own_service.url) as stream:
        thread_id = thread_of(stream.read_until(seen_text("It begins.")))
        other.execute("BEGIN IMMEDIATE")
        stream.read_to_end(90)
        [error] = errors_of(stream.seen)
        assert "cannot reach its database" in error["message"]
        assert seen_text(words)(stream.seen)
        other.execute("ROLLBACK")
    eventually(lambda: not rows(database, "SELECT * FROM leases"), 30, "the end of the turn")
    assert_kept(own_service, stream.seen)
    assert types(own_service.say(thread_id))[-1] == "thread.item.done[assistant_message]"


# --- shutting down ------------------------------------------------------------------------------------------------


def test_a_shutdown_lets_turns_end_within_the_grace_and_stops_and_stores_the_others(
    model: StandIn, either: Database, tmp_path: Path
) -> None:
    variables = probing(model, **either.environ, SHUTDOWN_GRACE_SECONDS="3")
    with process(tmp_path, **variables) as running, ExitStack() as stack:
        streams = []
        for number in range(20):
            model.will(*([Begin("Half an answer"), Hang()] if number % 2 else [Say("word " * 20, gap=0.08)]))
            streams.append(stack.enter_context(Stream.create(running.url, f"Number {number}")))
            eventually(lambda number=number: len(model.asked) == number + 1)
        ending, hanging = streams[::2], streams[1::2]
        for stream in hanging:
            stream.read_until(seen_text("Half an answer"))
        seconds = ended_after(running, signal.SIGTERM, streams)
        print(f"exit code {running.process.returncode} after {seconds:.2f} s of a grace of 3 s")
    assert running.process.returncode == 0
    assert seconds < 3 + 5
    assert all(stream.is_whole for stream in streams)
    for stream in ending:
        assert errors_of(stream.seen) == []
        assert text_of(fold(stream.seen)[-1]) == "word " * 20
        assert_stored(either, stream.seen)
    for stream in hanging:
        assert [error["message"] for error in errors_of(stream.seen)] == [
            "The service is being restarted, which stopped this answer. Try again in a moment."
        ]
        assert stream.seen[-2]["type"] == "thread.item.done"
        assert text_of(stream.seen[-2]["item"]) == "Half an answer"
        assert_stored(either, stream.seen)
    assert either.leases() == either.query("SELECT * FROM @checkpoints") == []
    assert either.query("SELECT count(*) FROM @items WHERE type = 'sdk_hidden_context'") == [(10,)]
    eventually(lambda: not model.open_requests, what="the end of the requests to the model")
    assert "Traceback" not in running.log


def ended_after(running: Process, number: int, streams: list[Stream]) -> float:
    """Send a signal, read all streams to their ends, and return the seconds until the process's end."""
    began = time.monotonic()
    running.signal(number)
    with ThreadPoolExecutor(max(1, len(streams))) as pool:
        reading = [pool.submit(stream.read_to_end) for stream in streams]
        running.wait()
        seconds = time.monotonic() - began
        for each in reading:
            each.result()
    return seconds


def test_a_tool_that_nobody_can_stop_does_not_hold_the_process(model: StandIn, database: Path, tmp_path: Path) -> None:
    model.will(Call("block", {"seconds": 3600}))
    variables = probing(model, database, TURN_TIMEOUT_SECONDS="1", SHUTDOWN_GRACE_SECONDS="1")
    with process(tmp_path, **variables) as running:
        [error] = errors_of(running.create())
        assert error["message"] == "The answer took too long and was stopped."
        seconds = ended_after(running, signal.SIGTERM, [])
        assert running.process.returncode == 0
        assert seconds < 1 + 5
    assert rows(database, "SELECT * FROM leases") == []


def test_tools_that_nobody_can_stop_leave_room_for_others(model: StandIn, database: Path, tmp_path: Path) -> None:
    hanging = (os.cpu_count() or 1) + 4  # as many threads as asyncio has by itself
    with process(tmp_path, **probing(model, database, TURN_TIMEOUT_SECONDS="2")) as running:
        with ThreadPoolExecutor(hanging) as pool:
            for _ in range(hanging):
                model.will(Call("block", {"seconds": 3600}))
            list(pool.map(lambda _: Client(running.url).create(), range(hanging)))
        model.will(Call("block", {"seconds": 0}))
        assert errors_of(running.create()) == []
        assert "done at last" in str(model.asked[-1].body["input"])
        running.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_service_ends_at_once_and_well(number: int, model: StandIn, database: Path, tmp_path: Path) -> None:
    with process(tmp_path, **probing(model, database)) as running:
        running.create()
        seconds = ended_after(running, number, [])
    assert (running.process.returncode, seconds < 3) == (0, True), f"{seconds:.2f} s\n{running.log}"


def test_several_workers_end_together_and_leave_no_process_behind(
    model: StandIn, either: Database, tmp_path: Path
) -> None:
    variables = probing(model, **either.environ, WORKERS="2", SHUTDOWN_GRACE_SECONDS="1")
    with process(tmp_path, **variables) as running, ExitStack() as stack:
        model.otherwise = [Begin("Half an answer"), Hang()]
        streams = [stack.enter_context(Stream.create(running.url)) for _ in range(6)]
        for stream in streams:
            stream.read_until(seen_text("Half an answer"))
        children = children_of(running.process.pid)
        assert len(children) >= 2
        seconds = ended_after(running, signal.SIGTERM, streams)
        print(f"exit code {running.process.returncode} after {seconds:.2f} s of a grace of 1 s")
        assert running.process.returncode == 0
        assert seconds < 1 + 5 + 10  # the workers end one after the other, and others may use the machine
        eventually(lambda: not [child for child in children if Path(f"/proc/{child}").exists()], 2, "their end")
    for stream in streams:
        assert len(errors_of(stream.seen)) == 1
        assert_stored(either, stream.seen)
    assert either.leases() == []


def test_workers_whose_supervisor_is_killed_end_well_and_let_the_port_go(
    model: StandIn, database: Path, tmp_path: Path
) -> None:
    variables = probing(model, database, WORKERS="2", SHUTDOWN_GRACE_SECONDS="1")
    with process(tmp_path, **variables) as running:
        model.otherwise = [Begin("Half an answer"), Hang()]
        with Stream.create(running.url) as stream:
            stream.read_until(seen_text("Half an answer"))
            running.signal(signal.SIGKILL)
            stream.read_to_end()
        assert "restarted" in errors_of(stream.seen)[0]["message"]
        eventually(lambda: not is_reachable(running), 15, "the end of the workers")
    assert_stored(database, stream.seen)
    assert rows(database, "SELECT * FROM leases") == []


def test_a_process_killed_while_it_answers_again_leaves_one_of_both_answers(
    model: StandIn, either: Database, tmp_path: Path
) -> None:
    with process(tmp_path, **probing(model, **either.environ)) as running:
        thread_id = thread_of(running.create())
        params = {"thread_id": thread_id, "item_id": running.items(thread_id)[0]["id"]}
        model.otherwise = [Begin("Another"), Hang()]
        with Stream(running.url, "threads.retry_after_item", params) as stream:
            stream.read_until(seen_text("Another"))
            running.kill()
    left = str(either.query("SELECT body FROM @items") + either.query("SELECT body FROM @checkpoints"))
    assert "Hello from the stand-in." in left or "Another" in left


# --- two turns for one thread -------------------------------------------------------------------------------------


def say(client: Client, thread_id: str, text: str) -> httpx2.Response:
    return client.post("threads.add_user_message", {"thread_id": thread_id, "input": message(text)})


def test_turns_of_two_processes_on_one_thread_never_interleave(
    model: StandIn, either: Database, tmp_path: Path
) -> None:
    model.otherwise = [Echo(gap=0.005)]
    with two_processes(model, either, tmp_path) as (one, other), ThreadPoolExecutor(3) as pool:
        thread_id = thread_of(one.create("The first words"))
        said = ["The first words"]
        for number in range(20):
            words = [f"round {number} client {letter}" for letter in "abc"]
            answers = list(pool.map(say, [one, other, other], [thread_id] * 3, words))
            for text, response in zip(words, answers, strict=True):
                if response.status_code == 200:
                    said.append(text)
                else:
                    assert (response.status_code, response.json()["code"]) == (409, "thread_busy")
        texts = [text_of(item) for item in one.items(thread_id)]
        assert texts[::2] == texts[1::2], "an answer is not where its question is"
        assert sorted(texts[::2]) == sorted(said)
        print(f"{len(said) - 1} of 60 answered, the others refused")
        assert len(said) > 40


def test_a_message_for_a_busy_thread_is_refused_after_five_seconds_and_not_stored(
    model: StandIn, either: Database, tmp_path: Path
) -> None:
    with two_processes(model, either, tmp_path) as (one, other), ThreadPoolExecutor(2) as pool:
        model.will(Begin("This takes long"), Hang())
        with Stream.create(one.url) as stream:
            thread_id = thread_of(stream.read_until(seen_text("This takes long")))
            began = time.monotonic()
            answers = list(pool.map(say, [one, other], [thread_id] * 2, ["In between"] * 2))
            assert 5 <= time.monotonic() - began < 8
            assert [(answer.status_code, answer.json()["code"]) for answer in answers] == [(409, "thread_busy")] * 2
            stream.leave()
        eventually(lambda: not either.leases(), what="the end of the turn")
        assert [text_of(item) for item in one.items(thread_id)] == ["Hello", "This takes long"]
        assert text_of(fold(other.say(thread_id))[-1]) == "Hello from the stand-in."


@contextmanager
def two_processes(model: StandIn, database: Database, directory: Path) -> Iterator[tuple[Process, Process]]:
    """Run the service twice on one database, started at the same time."""
    variables = probing(model, **database.environ)
    directories = [directory / "one", directory / "other"]
    for each in directories:
        each.mkdir()
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        started = pool.map(lambda each: stack.enter_context(process(each, **variables)), directories)
        one, other = started
        yield one, other


@pytest.mark.parametrize("finishing", [True, False], ids=["when an item is done", "in a silence"])
def test_a_turn_whose_thread_was_taken_over_writes_nothing_more_and_says_so(
    finishing: bool, own_service: InProcess, model: StandIn, database: Path
) -> None:
    model.will(Begin("Half an answer"), Wait(0.5), *([Say("And this is whole.")] if finishing else []), Hang())
    idle = own_service.tasks()
    with Stream.create(own_service.url) as stream:
        thread_id = thread_of(stream.read_until(seen_text("Half an answer")))
        eventually(lambda: rows(database, "SELECT * FROM checkpoints"), what="the checkpoint")
        change(database, f"UPDATE leases SET lease = 'taken' WHERE thread_id = '{thread_id}'")
        kept = rows(database, "SELECT body FROM items UNION ALL SELECT body FROM checkpoints")
        stream.read_to_end(10)
    [error] = errors_of(stream.seen)
    assert "interrupted" in error["message"]
    eventually(lambda: not (own_service.tasks() - idle), what="the end of all tasks")
    assert rows(database, "SELECT body FROM items UNION ALL SELECT body FROM checkpoints") == kept
    assert rows(database, "SELECT lease FROM leases") == [("taken",)]
    assert [asked.ended for asked in model.asked] == ["cut"]


def test_a_turn_that_fails_hangs_up_on_its_model_at_once_and_not_when_memory_is_freed(
    own_service: InProcess, model: StandIn, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge, kept = chatkit.agents._merge_generators, []

    def keeping(*sources: Any) -> Any:
        kept.append(merge(*sources))
        return kept[-1]

    monkeypatch.setattr(chatkit.agents, "_merge_generators", keeping)
    model.will(Begin("Half an answer"), Wait(0.5), Say("And this is whole."), Hang())
    with Stream.create(own_service.url) as stream:
        stream.read_until(seen_text("Half an answer"))
        change(database, "UPDATE leases SET lease = 'taken'")
        stream.read_to_end(10)
    eventually(lambda: [asked.ended for asked in model.asked] == ["cut"], what="the end of the model's request")
    assert len(kept) == 1


def test_deleting_a_thread_ends_its_turn_and_it_stays_deleted(
    either_service: InProcess, model: StandIn, either: Database
) -> None:
    idle = either_service.tasks()
    model.will(Begin("Half an answer"), Hang())
    with Stream.create(either_service.url) as stream:
        thread_id = thread_of(stream.read_until(seen_text("Half an answer")))
        either_service.ask("threads.delete", {"thread_id": thread_id})
        stream.read_to_end(3)
    eventually(lambda: [asked.ended for asked in model.asked] == ["cut"], what="the end of the request to the model")
    eventually(lambda: not (either_service.tasks() - idle), what="the end of all tasks")
    assert either_service.post("threads.get_by_id", {"thread_id": thread_id}).status_code == 404
    assert errors_of(stream.seen) == []  # who deletes a thread need not be told
    assert_nothing_is_stored(either)


@pytest.mark.parametrize("silent", [True, False], ids=["that hangs", "that goes on"])
def test_a_turn_whose_thread_another_process_deleted_ends_and_the_thread_stays_deleted(
    silent: bool, either_service: InProcess, model: StandIn, either: Database
) -> None:
    model.will(Begin("Half an answer"), *([Hang()] if silent else [Say(LONG, gap=0.01), Hang()]))
    with service(**probing(model, **either.environ)) as other, Stream.create(either_service.url) as stream:
        thread_id = thread_of(stream.read_until(seen_text("Half an answer")))
        other.ask("threads.delete", {"thread_id": thread_id})
        stream.read_to_end(6)
        eventually(lambda: [asked.ended for asked in model.asked] == ["cut"], what="the end of the model's request")
        assert either_service.post("threads.get_by_id", {"thread_id": thread_id}).status_code == 404
        assert len(errors_of(stream.seen)) == 1
    assert_nothing_is_stored(either)


def assert_nothing_is_stored(database: Database) -> None:
    for table in ("threads", "items", "checkpoints"):
        assert database.query(f"SELECT * FROM @{table}") == [], table
    assert database.leases() == []


# --- the log ------------------------------------------------------------------------------------------------------


def test_no_word_of_a_user_a_tool_or_a_model_is_in_the_log(model: StandIn, database: Path, tmp_path: Path) -> None:
    word = "SENTINEL"
    failures: list[list[Step]] = [
        [Call("explode")],
        [Call("look_up", {"word": word})],
        [Call("look_up", {word: word})],
        [Call(word, {"word": word})],
        [Fail(400, "invalid_value", word)],
        [Fail(401, None, word)],
        [Fail(429, "rate_limit_exceeded", word)],
        [Fail(500, None, word)],
        [FailLater("server_error")],
        [Begin(word), Break()],
        [Begin(word), Hang()],
        [Say(word), Break()],
        [Say("\ud83d")],
    ]
    variables = probing(model, database, LOG_LEVEL="DEBUG", TURN_TIMEOUT_SECONDS="3")
    with process(tmp_path, **variables) as running:
        running.create(f"{word} is what I say")
        for script in failures:
            model.will(*script)
            events = running.create(f"{word} is what I say")
            assert_thread_goes_on(running, model, thread_of(events))
        running.create("forbidden SENTINEL")
        running.post("threads.create", {"input": word})
        running.http.post("/chatkit", content=f'{{"type": "{word}"', headers={"content-type": "application/json"})
        running.http.post(f"/{word}?{word}", content=word)
        with Stream.create(running.url, word) as stream:
            stream.reset()
        model.will(Begin(word), Hang())
        with Stream.create(running.url, word) as stream:
            stream.read_until(seen_text(word))
            running.signal(signal.SIGTERM)
            stream.read_to_end()
        running.wait()
    assert word not in running.log
    assert "failed" in running.log


def assert_thread_goes_on(running: Client, model: StandIn, thread_id: str) -> None:
    """The next message is answered: what the last one left in the history can be read by the model."""
    model.will(Say("It goes on."))
    assert text_of(fold(running.say(thread_id))[-1]) == "It goes on."


# --- what was seen, and what is stored ----------------------------------------------------------------------------


def assert_kept(client: Client, events: list[Event]) -> None:
    """What a client had seen is stored: done items as they were, open ones as shown or further on."""
    if not any("item" in event for event in events):
        return
    stored = {item["id"]: item for item in client.items(thread_of(events))}
    done = {event["item"]["id"] for event in events if event["type"] in ("thread.item.done", "thread.item.replaced")}
    for item in fold(events):
        if item["id"] in done:
            assert stored.get(item["id"]) == item
        elif not is_empty(item):
            assert item["id"] in stored, f"{item} is lost"
            assert has_grown(item, stored[item["id"]]), f"{item} became {stored[item['id']]}"


def is_empty(item: Item) -> bool:
    """Whether an open item shows nothing yet, so that it need not be kept."""
    match item["type"]:
        case "assistant_message":
            return not text_of(item).strip()
        case "workflow":
            return not item["workflow"]["tasks"]
    return False


def has_grown(seen: Any, stored: Any) -> bool:
    """Whether all that was seen is in what is stored: texts and lists begin as they did.

    Signs of work aside, and the time, which ChatKit 1.6.5 gives a message anew when it is done.
    """
    match seen, stored:
        case dict(), dict():
            passing = ("streaming", "status_indicator", "created_at")
            return all(key in passing or (key in stored and has_grown(seen[key], stored[key])) for key in seen)
        case list(), list():
            return len(seen) <= len(stored) and all(map(has_grown, seen, stored))
        case str(), str():
            return stored.startswith(seen)
    return bool(seen == stored)


def assert_stored(database: Path | Database, events: list[Event]) -> None:
    """The items that the events leave are stored as they were shown last."""
    assert_items_are_stored(database, {item["id"]: item for item in fold(events)})


def assert_items_are_stored(database: Path | Database, items: dict[str, Item]) -> None:
    stored = stored_items(database)
    for item_id, item in items.items():
        assert item_id in stored, f"{item} is lost"
        assert {key: stored[item_id][key] for key in item} == item


def stored_items(database: Path | Database) -> dict[str, Item]:
    return {item_id: _as_sent(json.loads(body)) for item_id, body in rows(database, "SELECT id, body FROM @items")}


def _as_sent(value: Any) -> Any:
    """Return a row's body as the protocol shows it: without nulls."""
    match value:
        case dict():
            return {key: _as_sent(each) for key, each in value.items() if each is not None}
        case list():
            return [_as_sent(each) for each in value]
    return value


def rows(database: Path | Database, sql: str) -> list[tuple[Any, ...]]:
    """Return what another reader of the database sees."""
    if not isinstance(database, Path):
        return database.query(sql)
    with closing(sqlite3.connect(database, timeout=10)) as db:
        return db.execute(sql.replace("@", "")).fetchall()


def change(database: Path, sql: str) -> None:
    with closing(sqlite3.connect(database, timeout=10)) as db, db:
        db.execute(sql)


def children_of(process_id: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()]


def resident_bytes(running: Process) -> int:
    pages = Path(f"/proc/{running.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
