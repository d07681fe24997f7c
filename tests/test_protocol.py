"""The sixteen operations of the protocol, over HTTP: what a client is told, and what is then stored."""

from typing import get_args

import pytest
from chatkit.types import NonStreamingReq, StreamingReq

from service import Client, errors_of, fold, message, text_of, thread_of, types
from standin import Call, Reason, Refuse, Say, StandIn

ANSWER = [
    "thread.item.added[assistant_message]",
    "thread.item.updated[assistant_message.content_part.added]",
    "thread.item.updated[assistant_message.content_part.text_delta]",
    "thread.item.updated[assistant_message.content_part.done]",
    "thread.item.done[assistant_message]",
]


def kinds(items: list[dict]) -> list[str]:
    return [item["type"] for item in items]


def test_a_new_thread_is_announced_answered_and_stored(client: Client, model: StandIn) -> None:
    model.will(Say("Good morning to you."))
    events = client.create("Good morning")
    assert types(events) == ["thread.created", "thread.item.done[user_message]", "stream_options", *ANSWER]
    stored = client.items(thread_of(events))
    assert [text_of(item) for item in stored] == ["Good morning", "Good morning to you."]
    assert stored == fold(events)


def test_a_message_is_added_with_all_its_input_options(client: Client, model: StandIn) -> None:
    thread = thread_of(client.create())
    tag = {"type": "input_tag", "id": "tag1", "text": "Doc", "data": {"k": 1}, "group": "docs", "interactive": True}
    options = {"model": "gpt-x", "tool_choice": {"id": "look_up"}}
    events = client.stream(
        "threads.add_user_message",
        {
            "thread_id": thread,
            "input": {
                "content": [{"type": "input_text", "text": "see "}, tag],
                "attachments": [],
                "quoted_text": "earlier words",
                "inference_options": options,
            },
        },
    )
    [said] = [item for item in fold(events) if item["type"] == "user_message"]
    assert said["content"][1] == tag
    assert said["quoted_text"] == "earlier words"
    assert said["inference_options"] == options
    assert client.items(thread)[-2:] == fold(events)


def test_a_client_tool_is_called_and_its_output_answered(client: Client, model: StandIn) -> None:
    model.will(Call("pick_file"))
    events = client.create("Pick one")
    assert types(events)[-1] == "thread.item.done[client_tool_call]"
    thread = thread_of(events)
    assert client.items(thread) == fold(events)

    model.will(Say("It is a.txt."))
    answer = client.stream("threads.add_client_tool_output", {"thread_id": thread, "result": {"path": "/docs/a.txt"}})
    assert types(answer) == ["stream_options", *ANSWER]
    call = client.items(thread)[1]
    assert (call["status"], call["output"]) == ("completed", {"path": "/docs/a.txt"})
    outputs = [item for item in model.asked[-1].body["input"] if item.get("type") == "function_call_output"]
    assert any("/docs/a.txt" in str(item["output"]) for item in outputs)


def test_a_tool_output_is_taken_although_a_hidden_item_follows_the_call(client: Client, model: StandIn) -> None:
    model.will(Call("pick_file"), Call("whisper", call_id="call_2"))
    thread = thread_of(client.create("Pick one"))
    assert client.post("threads.add_client_tool_output", {"thread_id": thread, "result": 1}).status_code == 200


def test_a_pending_tool_call_that_the_user_talks_past_breaks_nothing(client: Client, model: StandIn) -> None:
    model.will(Call("pick_file"))
    thread = thread_of(client.create("Pick one"))
    assert not errors_of(client.say(thread, "Never mind"))
    assert client.post("threads.add_client_tool_output", {"thread_id": thread, "result": 1}).status_code == 409


def test_an_action_without_a_type_is_refused(client: Client, model: StandIn) -> None:
    model.will(Call("show_widget"))
    events = client.create()
    [widget] = [item for item in fold(events) if item["type"] == "widget"]
    params = {"thread_id": thread_of(events), "item_id": widget["id"], "action": {"payload": 1}}
    for operation in ("threads.sync_custom_action", "threads.custom_action"):
        response = client.post(operation, params)
        assert (response.status_code, response.json()["code"]) == (422, "bad_params")


def test_structured_input_is_asked_answered_and_replaced(client: Client, model: StandIn) -> None:
    model.will(Call("ask_form"))
    events = client.create("Ask me")
    thread, form = thread_of(events), fold(events)[-1]
    assert (form["type"], form["status"]) == ("structured_input", "pending")

    answers = {"q1": {"values": ["red", "blue"]}, "q2": {"values": ["because"]}}
    answered = client.stream(
        "threads.add_structured_input",
        {"thread_id": thread, "item_id": form["id"], "input": {"status": "answered", "answers": answers}},
    )
    assert types(answered) == ["stream_options", "thread.item.replaced[structured_input]", *ANSWER]
    [stored] = [item for item in client.items(thread) if item["type"] == "structured_input"]
    assert stored == fold(answered)[0]
    assert stored["status"] == "answered"
    assert [question["answer"]["values"] for question in stored["inputs"]] == [["red"], ["because"]]


def test_a_retry_replaces_all_that_came_after_the_message(client: Client, model: StandIn) -> None:
    events = client.create("One")
    thread, first = thread_of(events), fold(events)[0]
    client.say(thread, "Two")
    model.will(Say("Once more."))
    again = client.stream("threads.retry_after_item", {"thread_id": thread, "item_id": first["id"]})
    assert types(again) == ["stream_options", *ANSWER]
    assert [text_of(item) for item in client.items(thread)] == ["One", "Once more."]


def test_an_action_changes_its_widget_and_shows_what_its_handler_streams(client: Client, model: StandIn) -> None:
    model.will(Call("show_widget"), Say("There."))
    events = client.create("Show it")
    thread = thread_of(events)
    [widget] = [item for item in fold(events) if item["type"] == "widget"]
    acted = client.stream(
        "threads.custom_action", {"thread_id": thread, "item_id": widget["id"], "action": {"type": "go", "payload": 1}}
    )
    assert types(acted) == ["stream_options", "thread.item.done[widget]", "thread.item.replaced[widget]"]
    shown = {item["id"]: item for item in client.items(thread)}
    assert all(shown[item["id"]] == item for item in fold(acted))
    assert shown[widget["id"]]["widget"]["children"][0]["value"] == "did go"


def test_a_synchronous_action_answers_with_the_widget_and_stores_it(client: Client, model: StandIn) -> None:
    model.will(Call("show_widget"), Say("There."))
    events = client.create("Show it")
    thread = thread_of(events)
    [widget] = [item for item in fold(events) if item["type"] == "widget"]
    params = {"thread_id": thread, "item_id": widget["id"], "action": {"type": "copied"}}
    answer = client.ask("threads.sync_custom_action", params)
    assert answer["updated_item"]["copy_text"] == "copied"
    assert answer["updated_item"] in client.items(thread)
    assert answer["updated_item"]["created_at"].endswith("Z")
    assert client.ask("threads.sync_custom_action", {**params, "action": {"type": "nothing"}}) == {}


def test_threads_are_listed_by_their_last_activity_and_paged(client: Client) -> None:
    first, second, third = (thread_of(client.create(text)) for text in ("One", "Two", "Three"))
    client.say(first, "One more")
    page = client.ask("threads.list", {"limit": 2})
    assert [thread["id"] for thread in page["data"]] == [first, third]
    assert page["has_more"]
    assert client.ask("threads.list", {"limit": 1, "after": page["after"]})["data"][0]["id"] == second


def test_items_are_listed_in_either_order_and_paged(client: Client) -> None:
    thread = thread_of(client.create("One"))
    client.say(thread, "Two")
    items = client.items(thread)
    page = client.ask("items.list", {"thread_id": thread, "limit": 3})
    assert page["data"] == items[:0:-1]
    rest = client.ask("items.list", {"thread_id": thread, "limit": 3, "after": page["after"]})
    assert rest == {"data": items[:1], "has_more": False}
    by_id = client.ask("items.list", {"thread_id": thread, "order": "asc", "after": items[1]["id"]})
    assert by_id["data"] == items[2:]


def test_a_thread_is_got_renamed_and_deleted(client: Client) -> None:
    events = client.create("One")
    thread = thread_of(events)
    renamed = client.ask("threads.update", {"thread_id": thread, "title": "My own name"})
    assert renamed["title"] == "My own name"
    got = client.ask("threads.get_by_id", {"thread_id": thread})
    assert got["title"] == "My own name"
    assert got["items"]["data"] == fold(events)

    assert client.ask("threads.delete", {"thread_id": thread}) == {}
    assert client.post("threads.get_by_id", {"thread_id": thread}).status_code == 404
    assert thread not in client.thread_ids()


def test_feedback_is_taken_for_items_of_the_thread(client: Client) -> None:
    events = client.create("One")
    params = {"thread_id": thread_of(events), "item_ids": [fold(events)[-1]["id"]]}
    assert client.ask("items.feedback", {**params, "kind": "positive"}) == {}
    assert client.ask("items.feedback", {**params, "kind": "negative"}) == {}


@pytest.mark.parametrize(
    ("steps", "shown"),
    [
        ([Reason("First I think."), Say("Then I speak.")], ["user_message", "workflow", "assistant_message"]),
        ([Call("show_widget"), Say("There.")], ["user_message", "widget", "assistant_message"]),
        ([Call("work"), Say("Done.")], ["user_message", "workflow", "assistant_message"]),
        ([Call("look_up", {"word": "x"}), Say("It means.")], ["user_message", "assistant_message"]),
        ([Call("whisper"), Say("Well.")], ["user_message", "assistant_message"]),
        ([Call("rename", {"title": "New title"}), Say("Renamed.")], ["user_message", "assistant_message"]),
        ([Refuse("I will not.")], ["user_message", "assistant_message"]),
        ([Say("One."), Say("Two.")], ["user_message", "assistant_message", "assistant_message"]),
    ],
)
def test_what_a_client_is_told_is_what_is_stored(client: Client, model: StandIn, steps: list, shown: list[str]) -> None:
    calls = [step for step in steps if isinstance(step, Call)]
    if calls:
        model.will(*calls)
    model.will(*[step for step in steps if not isinstance(step, Call)])
    events = client.create("Do it")
    assert not errors_of(events)
    assert kinds(fold(events)) == shown
    assert client.items(thread_of(events)) == fold(events)


def test_an_item_that_opens_first_stays_first_although_another_is_finished_before_it(
    client: Client, model: StandIn
) -> None:
    model.will(Call("show_slow_widget"), Call("show_widget", call_id="call_2"))
    events = client.create("Show both")
    assert [item["widget"]["children"][0]["value"] for item in fold(events)[1:3]] == ["Slow widget", "Hello widget"]
    assert client.items(thread_of(events)) == fold(events)


def test_hidden_items_are_never_shown(client: Client, model: StandIn) -> None:
    model.will(Call("whisper"))
    response = client.post("threads.create", {"input": message("Whisper")})
    assert "thread.item.done" in response.text
    assert "hidden" not in response.text
    model.will(Say("Well."))
    thread = client.thread_ids()[0]
    for operation in ("items.list", "threads.get_by_id"):
        assert "hidden" not in client.post(operation, {"thread_id": thread}).text
    hidden = client.post("threads.sync_custom_action", {"thread_id": thread, "action": {"type": "hide"}})
    assert (hidden.status_code, hidden.text) == (200, "{}")
    client.say(thread, "What did you hear?")
    assert "hidden words" in str(model.asked[-1].body["input"])


def test_hidden_items_do_not_shorten_a_page(client: Client, model: StandIn) -> None:
    model.will(*[Call("whisper", call_id=f"call_{number}") for number in range(5)])
    thread = thread_of(client.create("Whisper"))
    client.say(thread)
    assert len(client.ask("items.list", {"thread_id": thread, "limit": 3})["data"]) == 3


def test_a_title_that_the_agent_gives_is_shown_and_stored(client: Client, model: StandIn) -> None:
    model.will(Call("rename", {"title": "The agent's title"}))
    events = client.create("Rename it")
    updated = [event["thread"]["title"] for event in events if event["type"] == "thread.updated"]
    assert updated[-1] == "The agent's title"
    assert client.ask("threads.get_by_id", {"thread_id": thread_of(events)})["title"] == "The agent's title"


@pytest.mark.parametrize(("kind", "reason"), [("locked", "Locked by the test."), ("closed", "Closed by it.")])
def test_a_locked_or_closed_thread_says_why_and_takes_nothing(
    client: Client, model: StandIn, kind: str, reason: str
) -> None:
    model.will(Call("show_widget"), Call("lock", {"kind": kind}, call_id="call_2"))
    events = client.create("Lock it")
    thread, items = thread_of(events), client.items(thread_of(events))
    [widget] = [item for item in items if item["type"] == "widget"]
    on_thread = {"thread_id": thread}
    for operation, params in [
        ("threads.add_user_message", {"input": message("More")}),
        ("threads.retry_after_item", {"item_id": items[0]["id"]}),
        ("threads.add_client_tool_output", {"result": 1}),
        ("threads.add_structured_input", {"item_id": items[0]["id"], "input": {}}),
        ("threads.custom_action", {"item_id": widget["id"], "action": {"type": "go"}}),
    ]:
        events = client.stream(operation, on_thread | params)
        assert events == [{"type": "error", "code": "custom", "message": reason, "allow_retry": False}], operation
    action = on_thread | {"item_id": widget["id"], "action": {"type": "go"}}
    response = client.post("threads.sync_custom_action", action)
    assert (response.status_code, response.json()) == (409, {"code": "conflict", "message": reason})
    assert client.items(thread) == items
    assert client.ask("threads.get_by_id", on_thread)["status"] == {"type": kind, "reason": reason}


def test_what_the_agent_changes_is_stored_although_a_title_comes_in_the_same_moment(
    client: Client, model: StandIn
) -> None:
    for _ in range(10):
        model.will(Call("lock", {"kind": "locked"}))
        thread = thread_of(client.create("Lock it"))
        assert client.ask("threads.get_by_id", {"thread_id": thread})["status"]["type"] == "locked"


def test_a_rename_during_a_stream_is_kept(client: Client, model: StandIn) -> None:
    model.will(Say("This takes a little while to be said", gap=0.05))
    with client.streaming("threads.create", {"input": message("Slowly, please")}) as events:
        thread = thread_of([next(events)])
        client.ask("threads.update", {"thread_id": thread, "title": "The user's title"})
        assert not errors_of(list(events))
    assert client.ask("threads.get_by_id", {"thread_id": thread})["title"] == "The user's title"


def test_a_thread_deleted_during_a_stream_stays_deleted(client: Client, model: StandIn) -> None:
    model.will(Say("This takes a little while to be said", gap=0.05))
    with client.streaming("threads.create", {"input": message("Slowly, please")}) as events:
        thread = thread_of([next(events)])
        client.ask("threads.delete", {"thread_id": thread})
        list(events)
    assert thread not in client.thread_ids()


def test_times_on_the_wire_are_utc(client: Client) -> None:
    events = client.create("What time is it?")
    stamps = [event["item"]["created_at"] for event in events if "item" in event]
    assert stamps
    assert all(stamp.endswith("Z") for stamp in stamps)


def test_every_operation_of_the_installed_protocol_is_driven_in_this_file() -> None:
    with open(__file__, encoding="utf-8") as file:
        source = file.read() + "def create threads.create threads.add_user_message items.list threads.list"
    for request in (*get_args(StreamingReq), *get_args(NonStreamingReq)):
        operation = request.model_fields["type"].default
        if operation.startswith(("attachments.", "input.")):
            continue  # refused as not configured: test_answers.py
        assert operation in source, f"{operation} is not driven"
