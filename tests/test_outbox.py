"""What a client is told when it, or the process, is behind: the same text, in the same order, in fewer pieces."""

import json
from itertools import groupby
from typing import Any

from chatkit.types import (
    AssistantMessageContentPartTextDelta,
    ProgressUpdateEvent,
    ThoughtTask,
    ThreadItemUpdatedEvent,
    ThreadStreamEvent,
    WorkflowTaskAdded,
    WorkflowTaskUpdated,
)

from outbox import Outbox
from sdk import encode
from service import Client, events_of, fold, message, text_of, thread_of
from standin import Begin, Hang, Say, StandIn


def said(text: str, item_id: str = "msg_1", index: int = 0) -> ThreadStreamEvent:
    update = AssistantMessageContentPartTextDelta(content_index=index, delta=text)
    return ThreadItemUpdatedEvent(item_id=item_id, update=update)


EVENTS = [
    said("One "),
    said("two "),
    said("a part of its own", index=1),
    said("three", item_id="msg_2"),
    ProgressUpdateEvent(text="Searching"),
    said(" four", item_id="msg_2"),
    said(" five ü", item_id="msg_2"),
]


def told(outbox: Outbox) -> list[dict[str, Any]]:
    return events_of(outbox.take().decode())


def each_alone() -> list[dict[str, Any]]:
    return [json.loads(encode(event)) for event in EVENTS]


def place(event: dict[str, Any]) -> tuple[Any, ...]:
    return event["type"], event.get("item_id"), event.get("update", {}).get("content_index")


def test_letters_that_were_cut_in_half_are_joined_again_or_replaced() -> None:
    outbox = Outbox(encode)
    for text in ("Half \ud83d", "\ude00, and half: \ud83d"):
        outbox.put(said(text))
    [event] = told(outbox)
    assert event["update"]["delta"] == "Half 😀, and half: \ufffd"


def test_text_that_waits_is_joined_and_nothing_else_changes() -> None:
    outbox = Outbox(encode)
    for event in EVENTS:
        outbox.put(event)
    expected = []
    for _, group in groupby(each_alone(), place):
        first, *more = group
        for event in more:
            first["update"]["delta"] += event["update"]["delta"]
        expected.append(first)
    assert len(expected) == 5
    assert told(outbox) == expected


def test_text_that_is_fetched_as_it_comes_is_sent_as_it_came() -> None:
    outbox, fetched = Outbox(encode), []
    for event in EVENTS:
        outbox.put(event)
        fetched += told(outbox)
    assert fetched == each_alone()


def test_what_waits_is_counted_and_what_is_fetched_is_not() -> None:
    outbox = Outbox(encode)
    assert not outbox
    for _ in range(1000):
        outbox.put(said("word "))
    assert outbox
    assert outbox.size_bytes > 5000
    assert len(outbox.take()) > 5000
    assert not outbox
    assert outbox.size_bytes == 0
    for _ in range(1000):
        outbox.put(said("word "))
    outbox.put(ProgressUpdateEvent(text="Searching"))
    assert outbox.size_bytes == len(outbox.take()), "text that was joined is counted as it is then"


def test_text_does_not_wait_for_more_text(client: Client, model: StandIn) -> None:
    model.will(Begin("So far"), Hang())
    with client.streaming("threads.create", {"input": message("Hello")}) as events:
        told = ""
        while told != "So far":
            told += next(events).get("update", {}).get("delta", "")


def test_a_long_answer_arrives_whole_and_in_order(client: Client, model: StandIn) -> None:
    words = " ".join(f"word{number}" for number in range(2000))
    model.will(Say(words))
    events = client.create()
    assert "".join(event.get("update", {}).get("delta", "") for event in events) == words
    assert text_of(fold(events)[-1]) == words
    assert client.items(thread_of(events)) == fold(events)


def thought(content: str, index: int = 0) -> ThreadStreamEvent:
    update = WorkflowTaskUpdated(task_index=index, task=ThoughtTask(content=content))
    return ThreadItemUpdatedEvent(item_id="wf_1", update=update)


def test_a_thought_that_grows_while_nobody_reads_is_told_once_as_it_is_then() -> None:
    outbox, words = Outbox(encode), "word " * 5000
    for end in range(5, len(words) + 1, 5):
        outbox.put(thought(words[:end]))
    assert outbox.size_bytes < 2 * len(words)
    assert told(outbox) == [json.loads(encode(thought(words)))]
    assert outbox.size_bytes == 0


def test_only_what_tells_of_the_same_takes_the_place_of_what_was_not_read() -> None:
    added = WorkflowTaskAdded(task_index=1, task=ThoughtTask(content=""))
    events = [
        thought("A"),
        ThreadItemUpdatedEvent(item_id="wf_1", update=added),
        thought("B", index=1),
        thought("A again"),
        said("Words"),
        thought("A at last"),
    ]
    outbox = Outbox(encode)
    for event in events:
        outbox.put(event)
    expected = [json.loads(encode(event)) for event in events]
    assert told(outbox) == expected
    outbox.put(events[-1])
    assert told(outbox) == expected[-1:]
