"""What the model sees of a conversation: the requests that the stand-in receives, compared with golden files.

`UPDATE_GOLDEN=1` writes them anew, to be read before they are committed.
"""

import gc
import json
import os
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
from agents import Agent, function_tool
from chatkit.types import (
    ClientToolCallItem,
    EndOfTurnItem,
    HiddenContextItem,
    UserMessageTagContent,
    Workflow,
    WorkflowItem,
)

from conftest import probing
from context import RequestContext
from history import HistoryConverter, workflow_to_go_on
from runs import beginning_with
from service import Client, errors_of, events_of, eventually, fold, message, service, text_of, thread_of
from standin import Begin, Call, Fail, FailLater, Hang, Reason, Refuse, Say, StandIn, Step, Wait

GOLDEN = Path(__file__).with_name("golden")
APIS = ["responses", "chat_completions"]


def asked_of(model: StandIn) -> Any:
    """Return what the model was asked last, with ids masked."""
    body = model.asked[-1].body
    request = {name: body[name] for name in ("instructions", "input", "messages") if name in body}
    found: dict[str, str] = {}

    def mask(match: re.Match[str]) -> str:
        return found.setdefault(match.group(0), f"{match.group(1) or 'call'}_{len(found) + 1}")

    return json.loads(re.sub(r"\b(?:(msg|tc|wf|thr)_[0-9a-f]{32}|[0-9a-f]{9})\b", mask, json.dumps(request)))


@pytest.mark.parametrize("api", APIS)
def test_the_model_is_asked_exactly_what_the_conversation_was(tmp_path: Path, model: StandIn, api: str) -> None:
    seen: dict[str, Any] = {}
    with service(**probing(model, tmp_path / "chatkit.db", OPENAI_API=api)) as client:
        for name in converse(client, model):
            seen[name] = asked_of(model)
    golden = GOLDEN / f"conversation-{api}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(json.dumps(seen, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert seen == json.loads(golden.read_text(encoding="utf-8"))


def converse(client: Client, model: StandIn):
    """Have one conversation of every kind of turn, and say after each what it was."""
    model.will(Say("Good morning."))
    thread = thread_of(client.create("Hello"))
    yield "1 text"

    model.will(Call("look_up", {"word": "ChatKit"}))
    model.will(Say("It means something."))
    client.say(thread, "Look ChatKit up")
    yield "2 server tool"

    tag = {"type": "input_tag", "id": "doc_1", "text": "Manual", "data": {"pages": 7}}
    words = {"type": "input_text", "text": "What of "}
    client.stream(
        "threads.add_user_message",
        {"thread_id": thread, "input": {**message(""), "content": [words, tag], "quoted_text": "It means something."}},
    )
    yield "3 quote and tag, after a tool's result"

    model.will(Call("pick_file"))
    client.say(thread, "Let me pick a file")
    yield "4 client tool"

    client.stream("threads.add_client_tool_output", {"thread_id": thread, "result": {"path": "/docs/a.txt"}})
    yield "5 its output"

    model.will(Call("show_widget"))
    events = client.say(thread, "Show a widget")
    [widget] = [item for item in fold(events) if item["type"] == "widget"]
    yield "6 widget"

    client.stream("threads.custom_action", {"thread_id": thread, "item_id": widget["id"], "action": {"type": "press"}})
    model.will(Call("ask_form"))
    form = fold(client.say(thread, "Ask me two questions"))[-1]
    yield "7 structured input, after an action"

    answers = {"q1": {"values": ["red"]}, "q2": {"skipped": True}}
    client.stream(
        "threads.add_structured_input",
        {"thread_id": thread, "item_id": form["id"], "input": {"status": "answered", "answers": answers}},
    )
    yield "8 its answers"

    model.will(Begin("One two"), Hang())
    with client.streaming("threads.add_user_message", {"thread_id": thread, "input": message("Count")}) as events:
        for event in events:
            if "two" in json.dumps(event):
                break
    eventually(lambda: not errors_of(client.say(thread, "Why did you stop?")))
    yield "9 after a stop"

    [question] = [item for item in client.items(thread) if item["type"] == "user_message"][-1:]
    model.will(Refuse("I will not say."))
    client.stream("threads.retry_after_item", {"thread_id": thread, "item_id": question["id"]})
    yield "10 a retry"

    client.say(thread, "Good bye")
    yield "11 after a refusal"


@pytest.mark.parametrize("api", APIS)
def test_only_the_newest_items_reach_the_model_from_the_beginning_of_a_turn(
    tmp_path: Path, model: StandIn, api: str
) -> None:
    with service(**probing(model, tmp_path / "chatkit.db", OPENAI_API=api, HISTORY_ITEMS="8")) as client:
        thread = thread_of(client.create("Message 0"))
        for number in range(1, 6):
            model.will(Call("look_up", {"word": "x"}))
            client.say(thread, f"Message {number}")
    sent = json.dumps(model.asked[-1].body)
    assert re.findall(r"Message \d", sent) == ["Message 3", "Message 4", "Message 5"]


def test_a_turn_longer_than_the_window_keeps_its_question(tmp_path: Path, model: StandIn) -> None:
    with service(**probing(model, tmp_path / "chatkit.db", HISTORY_ITEMS="3")) as client:
        for number in range(6):
            model.will(Call("look_up", {"word": f"word {number}"}, call_id=f"call_{number}"))
        model.will(Call("pick_file", call_id="call_6"))
        thread = thread_of(client.create("The question"))
        client.stream("threads.add_client_tool_output", {"thread_id": thread, "result": 1})
    sent = json.dumps(model.asked[-1].body["input"])
    assert "The question" in sent
    assert re.findall(r"word \d", sent)


@pytest.mark.parametrize("api", APIS)
def test_a_message_after_a_turn_that_fills_the_window_does_not_stand_alone(
    tmp_path: Path, model: StandIn, api: str
) -> None:
    with service(**probing(model, tmp_path / "chatkit.db", HISTORY_ITEMS="5", OPENAI_API=api)) as client:
        for number in range(6):
            model.will(Call("look_up", {"word": f"word {number}"}, call_id=f"call_{number}"))
        thread = thread_of(client.create("The question"))
        client.say(thread, "And in euros?")
    sent = json.dumps(model.asked[-1].body)
    assert re.findall(r"The question|word \d|And in euros", sent)[::2][0] == "The question"
    assert {"word 3", "word 4", "word 5"} <= {*re.findall(r"word \d", sent)}
    assert "word 2" not in sent
    assert sent.index("word 5") < sent.index("And in euros?")


def test_a_window_of_one_holds_the_new_message(tmp_path: Path, model: StandIn) -> None:
    with service(**probing(model, tmp_path / "chatkit.db", HISTORY_ITEMS="1")) as client:
        client.say(thread_of(client.create("Before")), "Now")
    assert [item["content"][0]["text"] for item in model.asked[-1].body["input"]] == ["Now"]


@pytest.mark.parametrize("tool", ["look_up", "pick_file"])
def test_earlier_calls_have_ids_that_mistral_takes(tmp_path: Path, model: StandIn, tool: str) -> None:
    with service(**probing(model, tmp_path / "chatkit.db", OPENAI_API="chat_completions")) as client:
        model.will(Call(tool, {"word": "x"} if tool == "look_up" else {}))
        thread = thread_of(client.create("Call it"))
        if tool == "pick_file":
            client.stream("threads.add_client_tool_output", {"thread_id": thread, "result": 1})
        client.say(thread, "And now?")
    messages = model.asked[-1].body["messages"]
    [call] = [call["id"] for message in messages for call in message.get("tool_calls") or []]
    assert re.fullmatch("[a-zA-Z0-9]{9}", call)
    assert [message["tool_call_id"] for message in messages if message["role"] == "tool"] == [call]


def test_500_turns_keep_the_request_bounded_and_its_making_flat(tmp_path: Path, model: StandIn) -> None:
    with service(**probing(model, tmp_path / "chatkit.db")) as client:
        thread = thread_of(client.create("Message 0"))
        took = []
        for number in range(1, 500):
            began = time.process_time()  # the model and the client are in this process too, and do the same each time
            client.say(thread, f"Message {number}")
            took.append(time.process_time() - began)
    assert len(model.asked[-1].body["input"]) == 100 - 1  # the oldest answer has lost its question to the window
    early, late = sorted(took[100:200])[50], sorted(took[-100:])[50]
    print(f"\na turn at 100 to 200 turns: {early * 1000:.1f} ms of CPU, at 400 to 500: {late * 1000:.1f} ms")
    assert late < early * 1.5


def test_a_tools_result_is_forgotten_with_the_turn_that_is_retried(client: Client, model: StandIn) -> None:
    model.will(Call("look_up", {"word": "secret"}))
    events = client.create("Look it up")
    question = fold(events)[0]
    client.stream("threads.retry_after_item", {"thread_id": thread_of(events), "item_id": question["id"]})
    assert "secret" not in json.dumps(model.asked[-1].body["input"])


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("first", ["pick_file", "look_up"])
def test_of_calls_at_once_the_clients_and_the_servers_both_keep_their_outputs(
    tmp_path: Path, model: StandIn, api: str, first: str
) -> None:
    calls = [Call("pick_file", call_id="call_1"), Call("look_up", {"word": "chance"}, call_id="call_2")]
    with service(**probing(model, tmp_path / "chatkit.db", OPENAI_API=api)) as client:
        model.will(*(calls if first == "pick_file" else calls[::-1]))
        thread = thread_of(client.create("Pick one and look it up"))
        picked = {"thread_id": thread, "result": "the file that was picked"}
        assert not errors_of(client.stream("threads.add_client_tool_output", picked))
        assert not errors_of(client.say(thread, "And now?"))
    for asked in model.asked[1:]:
        sent = json.dumps(asked.body)
        assert sent.count("chance means something") == 1
        assert sent.count("the file that was picked") == 1
        assert "asked" not in sent  # what the tool said before the client answered


@pytest.mark.parametrize("arguments", ["", "x", '{"word": "half', '["word"]', '"{}"', '{"word": "a"}{"word": "b"}'])
@pytest.mark.parametrize("api", APIS)
def test_arguments_that_are_no_object_are_not_sent_again(
    tmp_path: Path, model: StandIn, api: str, arguments: str
) -> None:
    with service(**probing(model, tmp_path / "chatkit.db", OPENAI_API=api)) as client:
        model.will(Call("look_up", arguments))
        events = client.create("Look it up")
        assert not errors_of(events)
        assert not errors_of(client.say(thread_of(events), "And again"))
    assert len(model.asked) == 3


@pytest.mark.parametrize("api", APIS)
def test_half_a_letter_in_a_tools_output_breaks_nothing(tmp_path: Path, model: StandIn, api: str) -> None:
    with service(**probing(model, tmp_path / "chatkit.db", OPENAI_API=api)) as client:
        model.will(Call("say_half_a_letter"))
        events = client.create("Say it")
        assert not errors_of(events)
        assert not errors_of(client.say(thread_of(events), "And again"))
    for asked in model.asked[1:]:
        assert "half \ufffd and two halves \U0001f600" in json.dumps(asked.body, ensure_ascii=False)


@pytest.mark.anyio
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_tag_that_its_author_cannot_describe_is_described_as_usual(
    asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(tag: Any, context: Any) -> str:
        raise KeyError(tag.text)

    async def fail_later(tag: Any, context: Any) -> str:
        raise KeyError(tag.text)

    tag = UserMessageTagContent(id="doc_1", text="SENTINEL", data={"pages": 7})
    attachments: Any = None  # is not asked
    usual = HistoryConverter(attachments, RequestContext("alice"))
    failing = HistoryConverter(attachments, RequestContext("alice"), fail_later if asynchronous else fail)
    assert await failing.tag_to_message_content(tag) == await usual.tag_to_message_content(tag)
    assert "describe_tag" in caplog.text
    assert "SENTINEL" not in caplog.text


def hidden(content: Any) -> HiddenContextItem:
    return HiddenContextItem(id="msg_1", thread_id="thr_1", created_at=datetime.now(UTC), content=content)


@pytest.mark.anyio
async def test_what_an_author_hides_is_never_taken_for_a_tools_result() -> None:
    attachments: Any = None  # is not asked
    converter = HistoryConverter(attachments, RequestContext("alice"))
    [told] = await converter.to_agent_input([hidden({"tool": "hammer", "size": 3})])
    assert "hammer" in json.dumps(told)


def test_a_workflow_goes_on_behind_a_call_of_the_clients_tool_whatever_is_hidden_between() -> None:
    base: dict[str, Any] = {"thread_id": "thr_1", "created_at": datetime.now(UTC)}
    workflow = WorkflowItem(id="wf_1", workflow=Workflow(type="custom", tasks=[]), **base)
    call = ClientToolCallItem(id="tc_1", call_id="c", name="pick", arguments={}, **base)
    secret, later = hidden("a result"), EndOfTurnItem(id="end", **base)
    assert workflow_to_go_on([workflow, secret, call, secret]) is workflow
    assert workflow_to_go_on([call, secret, workflow, secret]) is workflow
    assert workflow_to_go_on([workflow, later]) is None
    assert workflow_to_go_on([]) is None


def test_parallel_calls_lose_no_result_when_one_asks_the_client_by_another_name(client: Client, model: StandIn) -> None:
    model.will(Call("choose_file", call_id="call_1"), Call("look_up", {"word": "x"}, call_id="call_2"))
    thread = thread_of(client.create("Both"))
    client.stream("threads.add_client_tool_output", {"thread_id": thread, "result": "a.txt"})
    sent = json.dumps(model.asked[-1].body["input"])
    assert "x means something" in sent
    assert "a.txt" in sent


def test_reasoning_that_nobody_keeps_is_not_sent_back(client: Client, model: StandIn) -> None:
    model.will(Reason("I think."), Call("look_up", {"word": "x"}))
    assert not errors_of(client.create("Think, then look it up"))
    assert "reasoning" not in json.dumps(model.asked[-1].body["input"])


# --- the user's choices -------------------------------------------------------------------------------------------


def test_the_chosen_model_answers_the_whole_turn(tmp_path: Path, model: StandIn) -> None:
    with service(**probing(model, tmp_path / "chatkit.db", MODELS="small,large")) as client:
        model.will(Call("pick_file"))
        thread = thread_of(client.create("Pick", inference_options={"model": "large"}))
        client.stream("threads.add_client_tool_output", {"thread_id": thread, "result": 1})
        client.say(thread, "And now as usual")
    assert [asked.body["model"] for asked in model.asked] == ["large", "large", "stand-in"]


def test_the_default_model_is_asked_for_by_its_name_to_the_letter(tmp_path: Path, model: StandIn) -> None:
    with service(
        **probing(model, tmp_path / "chatkit.db", AGENT="agent", OPENAI_DEFAULT_MODEL="Qwen/Qwen3-8B")
    ) as client:
        client.create("Hello Qwen")
        titles = eventually(lambda: [asked for asked in model.asked_for_titles if "Hello Qwen" in str(asked.body)])
    assert {asked.body["model"] for asked in (*model.asked, *titles)} == {"Qwen/Qwen3-8B"}


def test_a_choice_of_model_is_ignored_where_none_is_offered(client: Client, model: StandIn) -> None:
    client.create("Hello", inference_options={"model": "large"})
    assert model.asked[-1].body["model"] == "stand-in"


def test_the_chosen_tool_is_called_first(client: Client, model: StandIn) -> None:
    model.will(Call("look_up", {"word": "x"}))
    client.create("Look it up", inference_options={"tool_choice": {"id": "look_up"}})
    first, second = model.asked
    assert first.body["tool_choice"] == {"type": "function", "name": "look_up"}
    assert second.body.get("tool_choice") in (None, "auto")


@pytest.mark.anyio
async def test_the_chosen_tool_is_the_choice_of_the_first_agent_alone() -> None:
    agent: Agent[Any] = Agent(name="First", tools=[function_tool(lambda: "", name_override="look_up")])
    begun = await beginning_with("look_up", agent, None)
    assert begun.model_settings.tool_choice == "look_up"
    assert agent.model_settings.tool_choice is None


def test_a_tool_that_the_agent_does_not_have_is_named(client: Client, model: StandIn) -> None:
    [error] = errors_of(client.create("Go", inference_options={"tool_choice": {"id": "teleport"}}))
    assert "teleport" in error["message"]
    assert model.asked == []


def test_a_message_that_cannot_be_answered_again_keeps_the_answer_that_it_has(client: Client, model: StandIn) -> None:
    events = client.create("Go", inference_options={"tool_choice": {"id": "teleport"}})
    client.say(thread_of(events), "Go by bus")
    [first, *_] = before = client.items(thread_of(events))
    retry = {"thread_id": thread_of(events), "item_id": first["id"]}
    assert "teleport" in errors_of(client.stream("threads.retry_after_item", retry))[0]["message"]
    assert client.items(thread_of(events)) == before


def test_a_tool_may_run_an_agent_with_the_context_of_its_own_run(tmp_path: Path, model: StandIn) -> None:
    model.will(Call("consult"))
    model.will(Say("Sound advice."))
    model.will(Say("I was advised."))
    with service(**probing(model, tmp_path / "chatkit.db")) as client:  # started last, its model is the SDK's default
        events = client.create("Ask for advice")
    assert not errors_of(events)
    assert [text_of(item) for item in fold(events)] == ["Ask for advice", "I was advised."]
    assert "events of advice" in json.dumps(model.asked[-1].body["input"])


@pytest.mark.parametrize("waits", [(0, 0.5), (0.5, 0)])
def test_tools_may_run_agents_at_the_same_time_which_end_in_any_order(
    tmp_path: Path, model: StandIn, waits: tuple[float, float]
) -> None:
    model.will(Call("consult"), Call("consult", call_id="call_2"))
    for seconds in waits:
        model.will(Wait(seconds), Say("Sound advice."))
    model.will(Call("show_widget", call_id="call_3"))
    model.will(Say("I was advised."))
    with service(**probing(model, tmp_path / "chatkit.db", TURN_TIMEOUT_SECONDS="20")) as client:
        events = client.create("Ask for advice twice")
    assert not errors_of(events)
    assert [item["type"] for item in fold(events)] == ["user_message", "widget", "assistant_message"]


def test_a_users_title_is_kept_when_the_models_comes_in_the_midst_of_the_turn(client: Client, model: StandIn) -> None:
    model.title = Wait(1)
    model.will(Wait(2), Call("lock", {"kind": "locked"}))
    with client.streaming("threads.create", {"input": message("Hello")}) as stream:
        thread_id = eventually(lambda: next(stream).get("thread", {}).get("id"))
        client.ask("threads.update", {"thread_id": thread_id, "title": "Mine"})
        list(stream)
    assert client.ask("threads.get_by_id", {"thread_id": thread_id})["title"] == "Mine"


def retry(client: Client, thread_id: str, item_id: str, **metadata: Any) -> httpx2.Response:
    return client.post("threads.retry_after_item", {"thread_id": thread_id, "item_id": item_id}, metadata=metadata)


@pytest.mark.parametrize("step", [Fail(503), FailLater("server_error"), Call("explode")])
def test_an_answer_is_kept_until_there_is_something_of_the_next_one(client: Client, model: StandIn, step: Step) -> None:
    events = client.create("Hello")
    before = client.items(thread_of(events))
    model.otherwise = [step]
    failed = retry(client, thread_of(events), before[0]["id"])
    assert errors_of(events_of(failed.text))
    assert client.items(thread_of(events)) == before
    assert "Hello from the stand-in." not in json.dumps(model.asked[-1].body["input"])
    model.otherwise = [Say("Another one.")]
    assert not errors_of(events_of(retry(client, thread_of(events), before[0]["id"]).text))
    assert [text_of(item) for item in client.items(thread_of(events))] == ["Hello", "Another one."]


def test_an_answer_is_kept_when_its_retry_only_calls_a_tool_and_fails(client: Client, model: StandIn) -> None:
    events = client.create("Hello")
    before = client.items(thread_of(events))
    model.will(Call("who_am_i"))
    model.otherwise = [Fail(503)]
    assert errors_of(events_of(retry(client, thread_of(events), before[0]["id"]).text))
    assert client.items(thread_of(events)) == before


def test_an_answer_is_kept_when_its_retry_only_thinks_and_fails(client: Client, model: StandIn) -> None:
    events = client.create("Hello")
    before = client.items(thread_of(events))
    model.otherwise = [Reason("Once more."), FailLater("server_error")]
    assert errors_of(events_of(retry(client, thread_of(events), before[0]["id"]).text))
    assert client.items(thread_of(events))[:2] == before


def test_of_a_retry_that_was_stopped_while_it_thought_the_model_reads_nothing(client: Client, model: StandIn) -> None:
    events = client.create("Hello")
    before = client.items(thread_of(events))
    model.otherwise = [Reason("Once more."), Hang()]
    params = {"thread_id": thread_of(events), "item_id": before[0]["id"]}
    with client.streaming("threads.retry_after_item", params) as stream:
        eventually(lambda: "Once more." in str(next(stream)))
    model.otherwise = [Say("Later.")]
    client.say(thread_of(events))
    assert client.items(thread_of(events))[:2] == before
    assert "stopped before its end" not in json.dumps(model.asked[-1].body["input"]), "the old answer is whole"


def test_an_answer_is_kept_when_its_retry_changes_only_what_came_before_its_message(
    client: Client, model: StandIn
) -> None:
    model.will(Call("show_notes", {"text": "old"}))
    thread_id = thread_of(client.create("Note it"))
    client.say(thread_id, "And now?")
    *_, asked, answered = client.items(thread_id)
    model.will(Call("show_notes", {"text": "new"}))
    model.otherwise = [Fail(503)]
    assert errors_of(events_of(retry(client, thread_id, asked["id"]).text))
    assert client.items(thread_id)[-2:] == [asked, answered]
    assert '"new"' in json.dumps(client.items(thread_id))


def test_a_retry_may_remove_the_newest_item_of_the_answer_that_it_takes_the_place_of(
    client: Client, model: StandIn
) -> None:
    thread_id = thread_of(client.create("Hello"))
    before = client.items(thread_id)
    model.will(Call("remove_newest"))
    model.otherwise = [Say("Another one.")]
    assert not errors_of(events_of(retry(client, thread_id, before[0]["id"]).text))
    assert [text_of(item) for item in client.items(thread_id)] == ["Hello", "Another one."]


@pytest.mark.parametrize("operation", ["threads.add_structured_input", "threads.custom_action"])
def test_no_retry_is_offered_where_it_would_delete_what_the_user_did(
    client: Client, model: StandIn, operation: str
) -> None:
    is_form = operation == "threads.add_structured_input"
    model.will(Call("ask_form" if is_form else "show_widget"))
    events = client.create("Hello")
    [item] = [item for item in fold(events) if item["type"] in ("structured_input", "widget")]
    model.otherwise = [Fail(503)]
    what = {"input": {"answers": {"q2": {"values": ["Because"]}}}} if is_form else {"action": {"type": "ask"}}
    params = {"thread_id": thread_of(events), "item_id": item["id"], **what}
    [error] = errors_of(client.stream(operation, params))
    assert not error["allow_retry"]


def test_a_retry_may_show_an_item_of_the_answer_that_it_takes_the_place_of(client: Client, model: StandIn) -> None:
    model.will(Call("show_notes", {"text": "old"}))
    events = client.create("Hello")
    before = client.items(thread_of(events))
    model.will(Call("show_notes", {"text": "new"}))
    model.otherwise = [Say("Noted anew.")]
    shown = retry(client, thread_of(events), before[0]["id"]).text
    assert not errors_of(events_of(shown))
    after = client.items(thread_of(events))
    assert [item["type"] for item in after] == ["user_message", "widget", "assistant_message"]
    assert '"new"' in json.dumps(after[1])
    assert text_of(after[2]) == "Noted anew."


def test_an_answer_is_kept_when_its_retry_is_stopped_before_a_word(client: Client, model: StandIn) -> None:
    events = client.create("Hello")
    before = client.items(thread_of(events))
    model.otherwise = [Hang()]
    params = {"thread_id": thread_of(events), "item_id": before[0]["id"]}
    with client.streaming("threads.retry_after_item", params) as stream:
        assert next(stream)["type"] == "stream_options"
        eventually(lambda: len(model.asked) == 2)
    model.otherwise = [Say("Later.")]
    client.say(thread_of(events))
    assert client.items(thread_of(events))[:2] == before
    assert "stopped before its end" not in json.dumps(model.asked[-1].body["input"]), "the old answer is whole"


@pytest.mark.parametrize("step", [Reason(""), Begin("")])
def test_an_answer_is_kept_when_its_retry_is_stopped_while_it_shows_nothing(
    client: Client, model: StandIn, step: Step
) -> None:
    events = client.create("Hello")
    before = client.items(thread_of(events))
    model.otherwise = [step, Hang()]
    params = {"thread_id": thread_of(events), "item_id": before[0]["id"]}
    with client.streaming("threads.retry_after_item", params) as stream:
        eventually(lambda: next(stream)["type"] == "thread.item.added")
    model.otherwise = [Say("Later.")]
    client.say(thread_of(events))
    assert client.items(thread_of(events))[:2] == before
    assert "stopped before its end" not in json.dumps(model.asked[-1].body["input"])


def test_a_retry_goes_on_with_nothing_of_the_answer_that_it_takes_the_place_of(client: Client, model: StandIn) -> None:
    model.will(Reason("An old thought."), Hang())
    with client.streaming("threads.create", {"input": message("Hello")}) as stream:
        thread_id = eventually(lambda: next(stream).get("thread", {}).get("id"))
        eventually(lambda: "An old thought." in str(next(stream)))
    before = eventually(lambda: len(client.items(thread_id)) == 2 and client.items(thread_id))
    assert before[-1]["type"] == "workflow"
    model.will(Reason("A new thought."), Say("Another one."))
    answered = retry(client, thread_id, before[0]["id"])
    assert answered.status_code == 200
    after = client.items(thread_id)
    assert [item["type"] for item in after] == ["user_message", "workflow", "assistant_message"]
    assert after[1]["id"] != before[1]["id"]
    assert "An old thought." not in json.dumps(after)


def test_a_retry_of_what_was_last_elsewhere_is_refused(client: Client) -> None:
    events = client.create("Hello")
    thread_id, first = thread_of(events), fold(events)[0]["id"]
    assert retry(client, thread_id, first, is_last=True).status_code == 200
    client.say(thread_id, "From another tab")
    before = client.items(thread_id)
    refused = retry(client, thread_id, first, is_last=True)
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    assert client.items(thread_id) == before


def test_a_retry_where_the_answer_went_on_elsewhere_is_refused(client: Client, model: StandIn) -> None:
    model.will(Call("ask_form"))
    thread_id = thread_of(client.create("Hello"))
    asked, form = client.items(thread_id)
    params = {"thread_id": thread_id, "item_id": form["id"], "input": {"answers": {"q2": {"values": ["Because"]}}}}
    assert not errors_of(client.stream("threads.add_structured_input", params))
    before = client.items(thread_id)
    refused = retry(client, thread_id, asked["id"], is_last=True, shown_item_ids=[asked["id"], form["id"]])
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    assert client.items(thread_id) == before
    shown = [item["id"] for item in before]
    assert retry(client, thread_id, asked["id"], is_last=True, shown_item_ids=shown[::-1]).status_code == 200


def test_the_output_of_one_call_is_never_taken_for_anothers(client: Client, model: StandIn) -> None:
    model.will(Call("pick_file"))
    thread_id = thread_of(client.create("Pick one"))

    def answer(item_id: str, result: str) -> httpx2.Response:
        params = {"thread_id": thread_id, "result": result}
        return client.post("threads.add_client_tool_output", params, metadata={"item_id": item_id})

    first = client.items(thread_id)[-1]
    model.will(Call("pick_file"))
    assert answer(first["id"], "the first").status_code == 200
    late = answer(first["id"], "the first, from another tab")
    assert (late.status_code, late.json()["code"]) == (409, "conflict")
    second = client.items(thread_id)[-1]
    assert (second["status"], second["type"]) == ("pending", "client_tool_call")
    assert answer(second["id"], "the second").status_code == 200
    outputs = [item["output"] for item in client.items(thread_id) if item["type"] == "client_tool_call"]
    assert outputs == ["the first", "the second"]


def test_long_items_reach_the_model_although_no_page_holds_them(client: Client, model: StandIn) -> None:
    thread_id = thread_of(client.create("First: " + "x" * 900_000))
    client.say(thread_id, "Second: " + "y" * 900_000)
    client.say(thread_id, "Third")
    assert [word in str(model.asked[-1].body["input"]) for word in ("First", "Second", "Third")] == [True] * 3


# --- titles -------------------------------------------------------------------------------------------------------


def title(client: Client, thread: str) -> str | None:
    return client.ask("threads.get_by_id", {"thread_id": thread}).get("title")


def test_the_model_names_a_new_thread_while_it_answers(client: Client, model: StandIn) -> None:
    model.title = '"Weather in Rome."'
    model.will(Say("It is sunny there today", gap=0.1))
    events = client.create("What is the weather in Rome?")
    assert [event["thread"]["title"] for event in events if event["type"] == "thread.updated"] == ["Weather in Rome"]
    assert title(client, thread_of(events)) == "Weather in Rome"
    client.say(thread_of(events))
    assert sum("Rome" in str(asked.body) for asked in model.asked_for_titles) == 1


@pytest.mark.parametrize("answer", [Fail(500), Fail(404), "", "\n\n", "x" * 300, "Line one\nLine two", "***"])
def test_a_title_call_that_fails_or_answers_nonsense_leaves_the_messages_words(
    client: Client, model: StandIn, answer: Any
) -> None:
    model.title = answer
    events = client.create("Tell me about the history of the city of Rome, from its beginning to this very day")
    assert not errors_of(events)
    named = eventually(lambda: title(client, thread_of(events)))
    assert named == "Tell me about the history of the city of Rome, from its…"


@pytest.mark.parametrize("locale", ["x-none", "x-broken"])
def test_an_agent_that_cannot_be_made_leaves_the_messages_words(
    client: Client, locale: str, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Client(client.url, {"accept-language": locale})
    events = broken.create("Hello there")
    assert len(errors_of(events)) == 1
    assert eventually(lambda: title(client, thread_of(events))) == "Hello there"
    gc.collect()
    assert "SENTINEL" not in caplog.text
    assert "never retrieved" not in caplog.text


def test_a_title_call_that_hangs_delays_nothing_and_leaves_the_words_in_the_end(tmp_path: Path, model: StandIn) -> None:
    model.title = Hang()
    environ = probing(model, tmp_path / "chatkit.db")
    with service(**environ) as client:
        began = time.monotonic()
        thread = thread_of(client.create("Hello there"))
        assert time.monotonic() - began < 5
        assert title(client, thread) is None
    with service(**environ) as client:
        assert title(client, thread) == "Hello there"


def test_a_title_never_replaces_a_name_that_the_user_gave(client: Client, model: StandIn) -> None:
    model.will(Say("This takes a while to say", gap=0.1))
    model.title = Fail(500)
    with client.streaming("threads.create", {"input": message("Hello")}) as events:
        thread = thread_of([next(events)])
        client.ask("threads.update", {"thread_id": thread, "title": "The user's own"})
        list(events)
    client.say(thread)
    assert title(client, thread) == "The user's own"


def test_without_a_model_the_messages_words_are_the_title(tmp_path: Path) -> None:
    with service(DATABASE_URL=f"sqlite:///{tmp_path}/chatkit.db") as client:
        thread = thread_of(client.create("Hello demo"))
        assert eventually(lambda: title(client, thread)) == "Hello demo"


def test_an_answer_in_two_messages_is_two_items(client: Client, model: StandIn) -> None:
    model.will(Say("One."), Say("Two."))
    events = client.create("Say two things")
    assert [text_of(item) for item in client.items(thread_of(events))[1:]] == ["One.", "Two."]


def test_a_thought_without_words_leaves_nothing_behind(client: Client, model: StandIn) -> None:
    model.will(Reason(""), Call("pick_file"))
    events = client.create("Pick")
    assert [item["type"] for item in fold(events)] == ["user_message", "client_tool_call"]
    assert client.items(thread_of(events)) == fold(events)
