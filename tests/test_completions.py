"""Servers of the Chat Completions API that are not OpenAI's: what they stream otherwise, and where they leave off."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import probing
from service import Client, errors_of, fold, service, text_of, thread_of
from standin import Begin, Fail, Raw, StandIn, Wait

DONE = b"data: [DONE]\n\n"
BEGUN = (Begin("Half an answer"), Wait(0.3))


def data(body: Any) -> bytes:
    return f"data: {json.dumps(body)}\n\n".encode()


def chunk(delta: Any, finish: str | None = None) -> bytes:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return data({"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": choices})


def called(*calls: dict[str, Any]) -> bytes:
    return b"".join(chunk({"tool_calls": [call]}) for call in calls) + chunk({}, "tool_calls") + DONE


def call(index: int | None, id: str | None, word: str) -> dict[str, Any]:
    function = {"name": "look_up", "arguments": json.dumps({"word": word})}
    return {"index": index, "id": id, "type": "function", "function": function}


@pytest.fixture(scope="module")
def running(running_model: StandIn, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    database: Path = tmp_path_factory.mktemp("completions") / "chatkit.db"
    with service(**probing(running_model, database, OPENAI_API="chat_completions")) as client:
        yield client


@pytest.fixture
def client(running: Client, model: StandIn) -> Client:
    return running


BROKEN_OFF: dict[str, tuple[bytes, str]] = {
    "a connection that is closed": (b"", "connection to the model failed"),
    "an event that is cut": (chunk({"content": " and"})[:-9], "connection to the model failed"),
    "an error of OpenRouter's": (chunk({"content": ""}, "error") + DONE, "could not be read"),
    "an abort of vLLM's": (chunk({}, "abort") + DONE, "could not be read"),
    "a full context of Mistral's": (chunk({}, "model_length") + DONE, "cut off"),
    "a lack of room of DeepSeek's": (chunk({}, "insufficient_system_resource") + DONE, "busy"),
    "an error of vLLM's": (data({"object": "error", "message": "SENTINEL", "code": 500}) + DONE, "could not be read"),
    "an error of FastAPI's": (data({"detail": "SENTINEL"}) + DONE, "could not be read"),
    "a status in OpenAI's form": (data({"error": {"message": "SENTINEL", "code": 429}}), "busy"),
    "what is no JSON": (b"data: SENTINEL\n\n" + DONE, "could not be read"),
    "what is no object": (b"data: null\n\n" + DONE, "could not be read"),
    "what is no UTF-8": (b'data: {"choices": "\xff"}\n\n' + DONE, "could not be read"),
}


@pytest.mark.parametrize("case", BROKEN_OFF)
def test_an_answer_without_an_end_is_kept_and_said_to_have_none(
    client: Client, model: StandIn, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    end, words = BROKEN_OFF[case]
    model.will(*BEGUN, Raw(end))
    events = client.create("Tell me everything")
    [error] = errors_of(events)
    assert words in error["message"]
    stored = client.items(thread_of(events))
    assert text_of(stored[1]) == "Half an answer"
    assert stored == fold(events)
    assert "SENTINEL" not in caplog.text
    assert not errors_of(client.say(thread_of(events), "Go on"))


def test_a_tool_whose_call_broke_off_is_not_run(client: Client, model: StandIn) -> None:
    model.will(Raw(chunk({"tool_calls": [call(0, "c", "SENTINEL")]})))
    [error] = errors_of(client.create("Look it up"))
    assert "connection to the model failed" in error["message"]
    assert len(model.asked) == 1


OTHERWISE: dict[str, bytes] = {
    "no reason to end": chunk({"content": " and all."}) + DONE,
    "no [DONE]": chunk({"content": " and all."}, "stop"),
    "a chunk without choices": chunk({"content": " and all."}, "stop") + data({"choices": None, "usage": None}) + DONE,
    "a ping": data({"type": "ping"}) + chunk({"content": " and all."}, "stop") + DONE,
    "an event without data": b"event: ping\n\nretry: 5\n\n" + chunk({"content": " and all."}, "stop") + DONE,
    "content in parts": chunk({"content": [{"type": "text", "text": " and all."}]}, "stop") + DONE,
    "another choice": data({"choices": [{"index": 1, "delta": {"content": "x"}, "finish_reason": "length"}]})
    + chunk({"content": " and all."}, "stop")
    + DONE,
    "a choice without a number": data({"choices": [{"delta": {"content": " and all."}, "finish_reason": "stop"}]})
    + DONE,
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_an_answer_that_is_streamed_otherwise_is_read(client: Client, model: StandIn, case: str) -> None:
    model.will(*BEGUN, Raw(OTHERWISE[case]))
    events = client.create("Tell me everything")
    assert not errors_of(events)
    assert text_of(client.items(thread_of(events))[1]) == "Half an answer and all."


CALLS: dict[str, list[dict[str, Any]]] = {
    "one index for all": [call(0, "a", "one"), call(0, "b", "two")],
    "no index": [call(None, "a", "one"), call(None, "b", "two")],
    "no ids": [call(0, None, "one"), call(1, "", "two")],
    "pieces": [
        {"index": 0, "id": "a", "type": "function", "function": {"name": "look_up", "arguments": '{"word"'}},
        {"index": 0, "id": "", "function": {"name": "", "arguments": ': "one"}'}},
        call(1, "b", "two"),
    ],
    "arguments that are no text": [
        {"index": 0, "id": "a", "type": "function", "function": {"name": "look_up", "arguments": {"word": "one"}}},
        call(1, "b", "two"),
    ],
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_are_told_apart(client: Client, model: StandIn, case: str) -> None:
    model.will(Raw(called(*CALLS[case])))
    assert not errors_of(client.create("Look them up"))
    sent = json.dumps(model.asked[1].body)
    assert "one means something" in sent
    assert "two means something" in sent


def test_thoughts_among_parts_are_shown(client: Client, model: StandIn) -> None:
    thinking = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}]
    model.will(Raw(chunk({"content": thinking}) + chunk({"content": "So."}) + chunk({}, "stop") + DONE))
    _, thought, said = client.items(thread_of(client.create("Think")))
    assert thought["workflow"]["tasks"][0]["content"] == "Hm."
    assert text_of(said) == "So."


def test_thoughts_that_are_not_summed_up_are_shown(client: Client, model: StandIn) -> None:
    model.will(
        Raw(chunk({"reasoning": "Hm "}) + chunk({"reasoning": "hm."}) + chunk({"content": "So."}, "stop") + DONE)
    )
    events = client.create("Think")
    _, thought, said = client.items(thread_of(events))
    assert thought["workflow"]["tasks"][0]["content"] == "Hm hm."
    assert text_of(said) == "So."
    assert client.items(thread_of(events)) == fold(events)


@pytest.mark.parametrize("more", ["So.", ""])
def test_a_thought_in_the_midst_of_an_answer_does_not_break_it_in_two(
    client: Client, model: StandIn, more: str
) -> None:
    model.will(
        Raw(
            chunk({"content": "Well. "})
            + chunk({"reasoning_content": "Hm."})
            + (chunk({"content": more}) if more else b"")
            + chunk({}, "stop")
            + DONE
        )
    )
    events = client.create("Think")
    assert not errors_of(events)
    items = client.items(thread_of(events))
    said = [text_of(item) for item in items if item["type"] == "assistant_message"]
    assert said == [f"Well. {more}"]
    assert items == fold(events)


def test_use_that_is_not_known_fails_nothing(client: Client, model: StandIn) -> None:
    unknown = {"prompt_tokens": -1, "completion_tokens": -1, "total_tokens": -2}
    model.will(*BEGUN, Raw(chunk({}, "stop") + data({"choices": [], "usage": unknown}) + DONE))
    assert not errors_of(client.create("Count"))


def test_a_message_that_was_not_answered_is_sent_with_the_next(client: Client, model: StandIn) -> None:
    model.will(Fail(400))
    thread = thread_of(client.create("One"))
    assert not errors_of(client.say(thread, "Two"))
    [*_, last] = model.asked[-1].body["messages"]
    assert [part["text"] for part in last["content"]] == ["One", "Two"]
