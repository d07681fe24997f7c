"""Each gap of the SDKs that this service closes: undo the closing, and its test here fails."""

import asyncio
import gc
import json
import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import chatkit.agents
import chatkit.server
import httpx2
import pytest
from agents import set_trace_processors
from chatkit.types import ChatKitReq
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionChunk
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

import sdk
from conftest import probing
from openaiclient import OpenAIClient
from provider import open_upstream, run_config
from service import Client, errors_of, eventually, fold, message, service, text_of, thread_of
from standin import Call, Reason, Say, StandIn


def test_a_request_is_read_with_an_adapter_that_was_made_once() -> None:
    body = b'{"type": "threads.list", "params": {}}'
    began = time.perf_counter()
    TypeAdapter[ChatKitReq](ChatKitReq)
    making = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(10):
        sdk.parse_request(body)
    assert (time.perf_counter() - began) / 10 < making / 10


@pytest.mark.anyio
async def test_a_cancelled_merge_leaves_no_task_behind() -> None:
    async def endless():
        yield "first"
        await asyncio.sleep(3600)

    async def read() -> None:
        queue = chatkit.agents._AsyncQueueIterator(sdk._Waiting())
        async for _ in chatkit.agents._merge_generators(endless(), queue):
            pass

    before = asyncio.all_tasks()
    reading = asyncio.create_task(read())
    await asyncio.sleep(0.05)
    reading.cancel()
    await asyncio.wait({reading})
    assert asyncio.all_tasks() == before


@pytest.mark.anyio
async def test_a_merge_keeps_the_order_and_raises_what_a_source_raises() -> None:
    queue = sdk._Waiting()

    async def run():
        yield 1
        queue.put_nowait("streamed by a tool")
        yield 2
        raise RuntimeError("the run failed")

    merged = chatkit.agents._merge_generators(run(), chatkit.agents._AsyncQueueIterator(queue))
    seen = [getattr(await anext(merged), "event", each) for each in (1, None, 2)]
    with pytest.raises(RuntimeError, match="the run failed"):
        await anext(merged)
    assert seen == [1, "streamed by a tool", 2]


@pytest.mark.anyio
async def test_what_a_source_raises_while_a_merge_is_closed_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def run():
        try:
            yield "first"
            await asyncio.sleep(3600)
        finally:
            raise RuntimeError("SENTINEL")

    merged = chatkit.agents._merge_generators(run(), chatkit.agents._AsyncQueueIterator(sdk._Waiting()))
    await anext(merged)
    await merged.aclose()
    del merged
    gc.collect()
    await asyncio.sleep(0)
    assert "SENTINEL" not in caplog.text
    assert "never retrieved" not in caplog.text


def test_the_sdks_own_stamps_are_aware() -> None:
    for module in (chatkit.server, chatkit.agents):
        assert module.datetime.now().utcoffset() == timedelta(0)
        assert abs(module.datetime.now() - datetime.now(UTC)) < timedelta(seconds=5)


def test_a_stored_workflow_can_be_continued(client: Client, model: StandIn) -> None:
    model.will(Call("work"), Call("pick_file", call_id="call_2"))
    events = client.create("Work, then ask")
    assert fold(events)[-1]["type"] == "client_tool_call"
    model.will(Reason("I go on."), Say("Done."))
    answer = client.stream("threads.add_client_tool_output", {"thread_id": thread_of(events), "result": 1})
    assert not errors_of(answer)


@pytest.mark.parametrize("api", ["responses", "chat_completions"])
def test_every_answer_keeps_its_own_id_although_the_model_repeats_its_ids(tmp_path, model: StandIn, api: str) -> None:
    with service(**probing(model, tmp_path / "chatkit.db", OPENAI_API=api)) as client:
        model.will(Say("First."))
        thread = thread_of(client.create("One"))
        for text in ("Second.", "Third."):
            model.will(Say(text))
            assert not errors_of(client.say(thread))
        stored = client.items(thread)
        assert [text_of(item) for item in stored[1::2]] == ["First.", "Second.", "Third."]
        assert len({item["id"] for item in stored}) == 6
        assert all(len(item["id"]) == len("msg_") + 32 for item in stored)


@pytest.mark.parametrize("api", ["responses", "chat_completions"])
def test_client_tool_calls_keep_their_own_ids_too(tmp_path, model: StandIn, api: str) -> None:
    with service(**probing(model, tmp_path / "chatkit.db", OPENAI_API=api)) as client:
        thread, made = "", []
        for _ in range(2):
            model.will(Call("pick_file"))
            events = client.say(thread) if thread else client.create("Pick")
            thread = thread_of(events)
            made.append(fold(events)[-1])
            client.stream("threads.add_client_tool_output", {"thread_id": thread, "result": 1})
        assert made[0]["id"] != made[1]["id"]
        assert [item["status"] for item in client.items(thread) if item["type"] == "client_tool_call"] == [
            "completed",
            "completed",
        ]


@pytest.mark.anyio
@pytest.mark.parametrize("api", ["responses", "chat_completions"])
async def test_streamed_events_are_read_as_openai_reads_them(model: StandIn, api: str) -> None:
    async def events(kind: type[AsyncOpenAI]) -> list[str]:
        model.will(Reason("A thought."), Say("An answer, cited.", source="https://example.com"), Call("tool", {"a": 1}))
        async with kind(api_key="none", base_url=model.url) as client:
            if api == "responses":
                stream: Any = await client.responses.create(model="m", input="Hello", stream=True)
            else:
                messages: Any = [{"role": "user", "content": "Hello"}]
                stream = await client.chat.completions.create(model="m", messages=messages, stream=True)
            return [re.sub(r"resp_\d+", "resp", repr(event)) async for event in stream]

    sdks_own = await events(AsyncOpenAI)
    assert len(sdks_own) >= 8
    assert await events(OpenAIClient) == sdks_own


@pytest.mark.anyio
@pytest.mark.parametrize("api", ["responses", "chat_completions"])
async def test_a_conversation_is_sent_as_openai_sends_it(model: StandIn, api: str) -> None:
    items: Any = [
        {"role": "user", "content": "Hello ü"},
        {"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AA=="}]},
        {"role": "assistant", "content": "Good morning."},
    ]
    for kind in (AsyncOpenAI, OpenAIClient):
        async with kind(api_key="none", base_url=model.url) as client:
            more: Any = {"model": "m", "temperature": 0.5, "extra_body": {"top_k": 3}}
            if api == "responses":
                await client.responses.create(input=items, instructions="Be brief.", **more)
            else:
                await client.chat.completions.create(messages=items, **more)
    sdks_own, ours = model.asked
    assert ours.body == sdks_own.body
    assert ours.body["input" if api == "responses" else "messages"] == items


@pytest.mark.anyio
@pytest.mark.parametrize("api", ["responses", "chat_completions"])
async def test_a_long_conversation_is_not_examined_item_by_item(model: StandIn, api: str) -> None:
    items: Any = [{"role": "user", "content": "Hello"}] * 300

    async def seconds(kind: type[AsyncOpenAI]) -> float:
        async with kind(api_key="none", base_url=model.url) as client:
            began = time.thread_time()
            for _ in range(3):
                if api == "responses":
                    await client.responses.create(model="m", input=items)
                else:
                    await client.chat.completions.create(model="m", messages=items)
            return time.thread_time() - began

    assert await seconds(OpenAIClient) < await seconds(AsyncOpenAI) / 3


@pytest.mark.parametrize(
    ("kind", "event"),
    [
        (ResponseStreamEvent, {"type": "response.output_text.delta", "delta": None}),
        (ResponseStreamEvent, {"type": "response.of_tomorrow", "field": 1}),
        (
            ChatCompletionChunk,
            {"id": 5, "choices": [{"index": 0, "delta": {"content": "w"}, "finish_reason": "tired"}]},
        ),
    ],
)
def test_an_event_that_does_not_validate_is_read_as_openai_reads_it(kind: Any, event: dict[str, Any]) -> None:
    def read(client: AsyncOpenAI) -> str:
        return repr(client._process_response_data(data=event, cast_to=kind, response=httpx2.Response(200)))

    assert read(OpenAIClient(api_key="none")) == read(AsyncOpenAI(api_key="none"))


def test_an_events_kind_is_not_searched_for() -> None:
    event = {"type": "response.output_text.done", "content_index": 0, "item_id": "msg", "logprobs": [], "text": "word"}
    event |= {"output_index": 0, "sequence_number": 1}
    kind: Any = ResponseStreamEvent

    def seconds(client: AsyncOpenAI) -> float:
        began = time.thread_time()
        for _ in range(30):
            client._process_response_data(data=event, cast_to=kind, response=httpx2.Response(200))
        return time.thread_time() - began

    ours, sdks_own = OpenAIClient(api_key="none"), AsyncOpenAI(api_key="none")
    rounds = [(seconds(ours), seconds(sdks_own)) for _ in range(20)]
    fastest, sdks_fastest = map(min, zip(*rounds, strict=True))  # whatever else the machine does only adds to it
    assert fastest < sdks_fastest / 4


def test_openai_keeps_no_answers_and_gets_no_traces_unless_asked(client: Client, model: StandIn) -> None:
    traces: list = []

    class Recorder:
        def on_trace_start(self, trace) -> None:
            traces.append(trace)

        on_trace_end = on_span_start = on_span_end = lambda self, span: None
        shutdown = force_flush = lambda self: None

    set_trace_processors([Recorder()])
    client.create("Keep this to yourself")
    assert model.asked[-1].body["store"] is False
    assert traces == []


def test_a_cited_page_is_an_annotation_of_the_answer(client: Client, model: StandIn) -> None:
    model.will(Say("As it is written.", source="https://example.org/page"))
    events = client.create("Where is it written?")
    assert not errors_of(events)
    stored = client.items(thread_of(events))
    assert stored[1]["content"][0]["annotations"][0]["source"]["url"] == "https://example.org/page"
    assert stored == fold(events)


def test_a_workflow_is_announced_with_the_tasks_that_it_had_then(client: Client, model: StandIn) -> None:
    model.will(Call("work"))
    events = client.create("Work")
    [announced] = [e["item"] for e in events if e["type"] == "thread.item.added" and e["item"]["type"] == "workflow"]
    assert [task["title"] for task in announced["workflow"]["tasks"]] == ["One"]
    unfinished = [event for event in events if event["type"] != "thread.item.done"]
    shown = [item for item in fold(unfinished) if item["type"] == "workflow"]
    assert [task["title"] for task in shown[0]["workflow"]["tasks"]] == ["One", "Two"]


def test_a_stopped_run_is_cut_off_at_the_model(client: Client, model: StandIn) -> None:
    model.will(Say("word " * 1000, gap=0.02))
    with client.streaming("threads.create", {"input": message("Talk")}) as events:
        for event in events:
            if event["type"] == "thread.item.updated":
                break
    eventually(lambda: model.asked[-1].ended == "cut")


def test_an_answer_that_is_guarded_away_is_removed_and_stays_removed(client: Client, model: StandIn) -> None:
    events = client.create("Something forbidden")
    [error] = errors_of(events)
    assert error["allow_retry"] is False
    assert "safety" in error["message"]
    assert [item["type"] for item in client.items(thread_of(events))] == ["user_message"]
    assert client.items(thread_of(events)) == fold(events)


@pytest.mark.parametrize("api", ["responses", "chat_completions"])
def test_a_handler_may_answer_an_action_by_a_run_of_its_own(tmp_path: Path, model: StandIn, api: str) -> None:
    with service(**probing(model, tmp_path / "chatkit.db", OPENAI_API=api)) as client:
        thread = thread_of(client.create())
        for word in ("first", "second"):
            model.will(Call("look_up", {"word": word}))
            model.will(Say(f"Pressed the {word} time."))
            events = client.stream("threads.custom_action", {"thread_id": thread, "action": {"type": "ask"}})
            assert errors_of(events) == []
        texts = [text_of(item) for item in client.items(thread) if item["type"] == "assistant_message"]
        assert texts[1:] == ["Pressed the first time.", "Pressed the second time."]
        client.say(thread, "What did you look up?")
        sent = json.dumps(model.asked[-1].body)
        assert all(word in sent for word in ("first", "second"))


def test_openai_keeps_no_answer_by_either_of_its_apis_and_other_servers_are_not_asked_to() -> None:
    async def settings_for(base_url: str | None, api: str) -> bool | None:
        options = {"default_model": "m", "max_connections": 1, "timeout_seconds": 1}
        async with open_upstream(api_key="none", base_url=base_url, api=api, **options) as upstream:
            return run_config(upstream, api=api, store=False, tracing=False).model_settings.store

    assert asyncio.run(settings_for(None, "responses")) is False
    assert asyncio.run(settings_for(None, "chat_completions")) is False
    assert asyncio.run(settings_for("http://127.0.0.1:1/v1", "chat_completions")) is None
