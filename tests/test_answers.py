"""What the service answers when it refuses, and that a refused request has written nothing."""

import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import probing
from service import Client, errors_of, eventually, fold, message, service, thread_of
from standin import Call, Hang, Say, StandIn

LIST = {"type": "threads.list", "params": {}}
NOWHERE = {"thread_id": "thr_none"}
ACTION = {"type": "go"}

REFUSED: dict[str, tuple[Any, int, str]] = {
    "an empty body": ("", 400, "bad_json"),
    "a body that is not JSON": ('{"type": ', 400, "bad_json"),
    "a body of bytes": (b"\xff\xfe", 400, "bad_json"),
    "a million brackets": ("[" * 1_000_000, 400, "bad_json"),
    "half a surrogate pair": ('{"type": "\\ud800"}', 400, "bad_json"),
    "JSON that is no object": ("[1]", 422, "unknown_operation"),
    "no type": ("{}", 422, "unknown_operation"),
    "an unknown type": ({"type": "threads.explode", "params": {}}, 422, "unknown_operation"),
    "a type that is a number": ({"type": 7, "params": {}}, 422, "unknown_operation"),
    "no params": ({"type": "threads.list"}, 422, "bad_params"),
    "params of a wrong type": ({"type": "threads.get_by_id", "params": {"thread_id": 7}}, 422, "bad_params"),
    "a limit of 0": ({"type": "threads.list", "params": {"limit": 0}}, 422, "bad_params"),
    "a limit of 101": ({"type": "threads.list", "params": {"limit": 101}}, 422, "bad_params"),
    "a limit below 0": ({"type": "items.list", "params": {**NOWHERE, "limit": -1}}, 422, "bad_params"),
    "verdicts on too many items": (
        {"type": "items.feedback", "params": {**NOWHERE, "item_ids": ["i"] * 101, "kind": "positive"}},
        422,
        "bad_params",
    ),
    "an order that is none": ({"type": "threads.list", "params": {"order": "up"}}, 422, "bad_params"),
    "a cursor that is none": ({"type": "threads.list", "params": {"after": "nothing"}}, 404, "not_found"),
    "getting what is not there": ({"type": "threads.get_by_id", "params": NOWHERE}, 404, "not_found"),
    "listing what is not there": ({"type": "items.list", "params": NOWHERE}, 404, "not_found"),
    "renaming what is not there": ({"type": "threads.update", "params": {**NOWHERE, "title": "T"}}, 404, "not_found"),
    "deleting what is not there": ({"type": "threads.delete", "params": NOWHERE}, 404, "not_found"),
    "a message to what is not there": (
        {"type": "threads.add_user_message", "params": {**NOWHERE, "input": message("Hi")}},
        404,
        "not_found",
    ),
    "a retry of what is not there": (
        {"type": "threads.retry_after_item", "params": {**NOWHERE, "item_id": "i"}},
        404,
        "not_found",
    ),
    "an output for what is not there": (
        {"type": "threads.add_client_tool_output", "params": {**NOWHERE, "result": 1}},
        404,
        "not_found",
    ),
    "answers for what is not there": (
        {"type": "threads.add_structured_input", "params": {**NOWHERE, "item_id": "i", "input": {}}},
        404,
        "not_found",
    ),
    "an action on what is not there": (
        {"type": "threads.custom_action", "params": {**NOWHERE, "action": ACTION}},
        404,
        "not_found",
    ),
    "a synchronous action on what is not there": (
        {"type": "threads.sync_custom_action", "params": {**NOWHERE, "action": ACTION}},
        404,
        "not_found",
    ),
    "feedback on what is not there": (
        {"type": "items.feedback", "params": {**NOWHERE, "item_ids": ["i"], "kind": "positive"}},
        404,
        "not_found",
    ),
    "a new thread with an attachment that is not there": (
        {"type": "threads.create", "params": {"input": message("Hi", attachments=["atc_none"])}},
        404,
        "not_found",
    ),
    "an attachment of a type that is not taken": (
        {"type": "attachments.create", "params": {"name": "a", "size": 1, "mime_type": "text/html"}},
        415,
        "unsupported_type",
    ),
    "an attachment that is too large": (
        {"type": "attachments.create", "params": {"name": "a", "size": 20971521, "mime_type": "text/plain"}},
        413,
        "too_large",
    ),
    "an empty attachment": (
        {"type": "attachments.create", "params": {"name": "a", "size": 0, "mime_type": "text/plain"}},
        422,
        "bad_params",
    ),
    "an attachment with a path": (
        {"type": "attachments.create", "params": {"name": "../a", "size": 1, "mime_type": "text/plain"}},
        422,
        "bad_params",
    ),
    "deleting an attachment that is not there": (
        {"type": "attachments.delete", "params": {"attachment_id": "atc_none"}},
        404,
        "not_found",
    ),
    "dictation that is no base64": (
        {"type": "input.transcribe", "params": {"audio_base64": "!!!!", "mime_type": "audio/webm"}},
        422,
        "bad_params",
    ),
    "dictation with bad padding": (
        {"type": "input.transcribe", "params": {"audio_base64": "abc", "mime_type": "audio/webm"}},
        422,
        "bad_params",
    ),
    "dictation of nothing": (
        {"type": "input.transcribe", "params": {"audio_base64": "", "mime_type": "audio/webm"}},
        422,
        "bad_params",
    ),
    "dictation of another type": (
        {"type": "input.transcribe", "params": {"audio_base64": "AAAA", "mime_type": "audio/wav"}},
        415,
        "unsupported_type",
    ),
}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("answers") / "chatkit.db"


@pytest.fixture(scope="module")
def answering(database: Path, running_model: StandIn) -> Iterator[Client]:
    with service(**probing(running_model, database, MODELS="small,large")) as client:
        yield client


@pytest.fixture
def client(answering: Client, model: StandIn) -> Client:
    return answering


def rows(database: Path) -> list[str]:
    """Return all that is stored, once there is nothing more to come: titles come beside the answers."""
    with sqlite3.connect(database) as db:
        untitled = "SELECT * FROM threads WHERE title IS NULL"
        eventually(lambda: not db.execute(untitled).fetchall(), what="the titles of all threads")
        return [line for line in db.iterdump() if not line.startswith('INSERT INTO "sequence"')]


def post(client: Client, body: Any, **headers: str) -> Any:
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    headers = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return client.http.post("/chatkit", content=content, headers=headers)


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_says_which_kind_and_what_to_do_and_writes_nothing(client: Client, database: Path, case: str) -> None:
    body, status, code = REFUSED[case]
    before = rows(database)
    response = post(client, body)
    answer = response.json()
    assert (response.status_code, answer["code"]) == (status, code), response.text
    assert answer.keys() == {"code", "message"}
    assert answer["message"].endswith(".")
    assert response.headers["x-request-id"]
    assert rows(database) == before


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_only_json_is_taken(client: Client, media_type: str) -> None:
    response = post(client, LIST, content_type=media_type)
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_type")


def test_a_content_type_may_have_parameters_and_any_case(client: Client) -> None:
    assert post(client, LIST, content_type="Application/JSON; charset=utf-8").status_code == 200


def test_a_body_over_a_mebibyte_is_refused_unless_it_is_dictation(client: Client) -> None:
    long = {"type": "threads.create", "params": {"input": message("x" * 1024 * 1024)}}
    response = post(client, long)
    assert (response.status_code, response.json()["code"]) == (413, "too_large")
    spoken = {"type": "input.transcribe", "params": {"audio_base64": "A" * 30_000_000, "mime_type": "audio/webm"}}
    assert post(client, spoken).json()["text"].startswith("I heard")
    spoken["params"]["audio_base64"] = "A" * 36_000_000
    assert post(client, spoken).json()["code"] == "too_large"


def test_a_long_body_that_only_names_dictation_is_refused(client: Client) -> None:
    text = 'I said "input.transcribe" ' + "x" * 2 * 1024 * 1024
    response = post(client, {"type": "threads.create", "params": {"input": message(text)}})
    assert (response.status_code, response.json()["code"]) == (413, "too_large")


def test_a_long_body_that_begins_with_dictations_name_is_refused_too(client: Client, database: Path) -> None:
    before = rows(database)
    text = "x" * 2 * 1024 * 1024
    create = {"type": "threads.create", "params": {"input": message(text)}}
    for body in ({"note": "input.transcribe", **create}, {"metadata": {"a": "input.transcribe"}, **create}):
        response = post(client, body)
        assert (response.status_code, response.json()["code"]) == (413, "too_large")
    twice = '{"type": "input.transcribe", ' + json.dumps(create)[1:]
    assert post(client, twice).status_code == 413
    assert rows(database) == before


def test_a_host_that_is_none_is_refused_on_every_route(client: Client) -> None:
    unreadable = ("[", "[::1", "::1]", "[zz]", "[::1]x", "a b", "a:port", "127.0.0.1:99999", "a@b", "a/b", "a,b", "<a>")
    for host in (*unreadable, "256.1.1.1", "%", "%2f", "09", "xn--a"):  # the grammar allows these, and no link has them
        for method, path in (("POST", "/chatkit"), ("GET", "/"), ("GET", "/chatkit/"), ("GET", "/healthz")):
            response = client.http.request(method, path, json=LIST, headers={"host": host})
            assert (response.status_code, response.json()["code"]) == (400, "bad_host"), (host, path)
            assert response.headers["x-request-id"]


def test_an_item_that_was_answered_or_is_no_question_is_a_conflict(client: Client, model: StandIn) -> None:
    model.will(Call("ask_form"))
    events = client.create("Ask me")
    thread, form = thread_of(events), fold(events)[-1]["id"]
    answered = {"thread_id": thread, "item_id": form, "input": {"status": "skipped"}}
    client.stream("threads.add_structured_input", answered)
    for params in (answered, {**answered, "item_id": fold(events)[0]["id"]}):
        assert client.post("threads.add_structured_input", params).json()["code"] == "conflict"
    assert client.post("threads.add_structured_input", {**answered, "item_id": "none"}).json()["code"] == "not_found"


def test_answers_to_questions_that_were_not_asked_are_refused(client: Client, model: StandIn) -> None:
    model.will(Call("ask_form"))
    events = client.create("Ask me")
    thread, form = thread_of(events), fold(events)[-1]["id"]
    before = client.items(thread)
    answers = {"q1": {"values": ["red"]}, "q9": {"values": ["SENTINEL"]}}
    params = {"thread_id": thread, "item_id": form, "input": {"status": "answered", "answers": answers}}
    response = client.post("threads.add_structured_input", params)
    assert (response.status_code, response.json()["code"]) == (422, "bad_params")
    assert client.items(thread) == before
    # what the user writes instead of choosing an option is an answer: options are suggestions (ChatKit 1.6.5 types.py)
    params["input"]["answers"] = {"q1": {"values": ["mauve"]}}
    client.stream("threads.add_structured_input", params)
    [answered] = [item for item in client.items(thread) if item["id"] == form]
    assert answered["inputs"][0]["answer"]["values"] == ["mauve"]


def test_a_synchronous_action_that_its_handler_refuses_is_a_conflict_in_its_words(client: Client) -> None:
    thread = thread_of(client.create("Hi"))
    response = client.post("threads.sync_custom_action", {"thread_id": thread, "action": {"type": "refuse"}})
    assert (response.status_code, response.json()) == (409, {"code": "conflict", "message": "It is sold out."})


def test_what_is_refused_does_not_use_up_the_turns_of_a_minute(tmp_path: Path, model: StandIn) -> None:
    with service(**probing(model, tmp_path / "chatkit.db", TURNS_PER_MINUTE="2")) as client:
        events = client.create("Hi")
        thread, answer = thread_of(events), fold(events)[-1]["id"]
        for _ in range(3):
            retry = client.post("threads.retry_after_item", {"thread_id": thread, "item_id": answer})
            assert retry.json()["code"] == "conflict"
        assert not errors_of(client.say(thread))
        assert errors_of(client.say(thread))


def test_only_a_user_message_can_be_retried(client: Client) -> None:
    events = client.create("Hi")
    thread, answer = thread_of(events), fold(events)[-1]["id"]
    before = client.items(thread)
    assert (
        client.post("threads.retry_after_item", {"thread_id": thread, "item_id": answer}).json()["code"] == "conflict"
    )
    assert (
        client.post("threads.retry_after_item", {"thread_id": thread, "item_id": "none"}).json()["code"] == "not_found"
    )
    assert client.items(thread) == before


def test_an_output_that_nobody_asked_for_is_a_conflict(client: Client) -> None:
    thread = thread_of(client.create("Hi"))
    response = client.post("threads.add_client_tool_output", {"thread_id": thread, "result": 1})
    assert (response.status_code, response.json()["code"]) == (409, "conflict")


def test_what_a_handler_does_not_find_is_no_lost_thread(client: Client) -> None:
    thread = thread_of(client.create())
    [*_, error] = client.stream("threads.custom_action", {"thread_id": thread, "action": {"type": "look"}})
    assert error["message"] == "Something went wrong on our side. Try again."


@pytest.mark.parametrize("operation", ["threads.custom_action", "threads.sync_custom_action"])
def test_only_a_widget_sends_actions(client: Client, operation: str) -> None:
    events = client.create("Hi")
    params = {"thread_id": thread_of(events), "item_id": fold(events)[0]["id"], "action": ACTION}
    assert client.post(operation, params).json()["code"] == "bad_params"
    assert client.post(operation, {**params, "item_id": "none"}).json()["code"] == "not_found"


def test_feedback_on_an_item_of_another_thread_is_refused(client: Client) -> None:
    here, elsewhere = client.create("Hi"), client.create("Ho")
    params = {"thread_id": thread_of(here), "item_ids": [fold(elsewhere)[-1]["id"]], "kind": "positive"}
    assert client.post("items.feedback", params).status_code == 404


def test_a_model_that_is_not_offered_is_refused(client: Client, database: Path) -> None:
    before = rows(database)
    chosen = message("Hi", inference_options={"model": "huge"})
    response = client.post("threads.create", {"input": chosen})
    assert (response.status_code, response.json()["code"]) == (422, "bad_params")
    assert "small, large" in response.json()["message"]
    assert rows(database) == before


@pytest.mark.parametrize("operation", ["threads.custom_action", "threads.sync_custom_action"])
def test_an_action_without_a_handler_is_not_configured(tmp_path: Path, model: StandIn, operation: str) -> None:
    with service(**probing(model, tmp_path / "chatkit.db", AGENT="agent")) as client:
        thread = thread_of(client.create("Hi"))
        response = client.post(operation, {"thread_id": thread, "action": ACTION})
        assert (response.status_code, response.json()["code"]) == (422, "not_configured")


def test_a_thread_on_which_a_turn_runs_is_busy_after_five_seconds(
    client: Client, model: StandIn, database: Path
) -> None:
    thread = thread_of(client.create("Hi"))
    model.will(Hang())
    with client.streaming("threads.add_user_message", {"thread_id": thread, "input": message("Hang")}) as events:
        next(events)
        before, began = client.items(thread), time.monotonic()
        response = client.post("threads.add_user_message", {"thread_id": thread, "input": message("More")})
        assert (response.status_code, response.json()["code"]) == (409, "thread_busy")
        assert 4 < time.monotonic() - began < 15
        assert client.items(thread) == before


def test_a_thread_says_to_who_asks_whether_it_is_being_answered(client: Client, model: StandIn) -> None:
    thread = thread_of(client.create("Hi"))

    def watched() -> dict[str, Any]:
        response = client.post("threads.get_by_id", {"thread_id": thread}, metadata={"is_answering": True})
        return dict(response.json())

    eventually(lambda: "title" in watched(), what="its title")
    assert watched() == {**client.ask("threads.get_by_id", {"thread_id": thread}), "is_answering": False}
    model.will(Hang())
    with client.streaming("threads.add_user_message", {"thread_id": thread, "input": message("Hang")}) as events:
        next(events)
        assert watched()["is_answering"] is True
        assert "is_answering" not in client.ask("threads.get_by_id", {"thread_id": thread})
    eventually(lambda: not watched()["is_answering"], what="its end")


def test_a_message_that_follows_a_turn_within_five_seconds_waits_for_it(client: Client, model: StandIn) -> None:
    thread = thread_of(client.create("Hi"))
    model.will(Say("One two three four five six", gap=0.1))
    with client.streaming("threads.add_user_message", {"thread_id": thread, "input": message("First")}) as events:
        next(events)
        assert not errors_of(client.say(thread, "Second"))
        list(events)
    said = [item["type"] for item in client.items(thread)]
    assert said == ["user_message", "assistant_message"] * 3


def test_an_unknown_route_or_method_is_answered_in_json(client: Client) -> None:
    for response, status, code in [
        (client.http.get("/nowhere"), 404, "not_found"),
        (client.http.get("/chatkit"), 405, "method_not_allowed"),
    ]:
        assert (response.status_code, response.json()["code"]) == (status, code)
    assert client.http.get("/nowhere").json()["message"] == (
        "There is nothing at /nowhere. The ChatKit protocol is at POST /chatkit, the chat page at /."
    )
    assert client.http.get("/chatkit").json()["message"] == "GET is not taken at /chatkit. Use POST."
    assert client.http.get("/chatkit").headers["allow"] == "POST"
    assert client.http.delete("/attachments/atc_none").json()["message"].endswith("Use GET or HEAD or POST or PUT.")


def test_a_browser_of_an_allowed_origin_may_read_answers_and_errors_alike(client: Client) -> None:
    origin = {"origin": "http://localhost:3000"}
    preflight = client.http.options(
        "/chatkit",
        headers={
            **origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type,x-anything",
        },
    )
    assert preflight.status_code == 200
    assert "x-anything" in preflight.headers["access-control-allow-headers"]
    for body in (LIST, "no JSON"):
        response = post(client, body, **origin)
        assert response.headers["access-control-allow-origin"] == "http://localhost:3000"
        assert response.headers["access-control-expose-headers"] == "retry-after, x-request-id"
        assert "access-control-allow-credentials" not in response.headers
    assert "access-control-allow-origin" not in post(client, LIST, origin="http://evil.example").headers


def test_an_error_that_nobody_foresaw_is_readable_in_a_browser_too(client: Client, database: Path) -> None:
    thread = thread_of(client.create("Hi"))
    with sqlite3.connect(database) as db:
        db.execute("UPDATE items SET body = '[]' WHERE thread_id = ?", (thread,))
    params = {"thread_id": thread}
    response = post(client, {"type": "items.list", "params": params}, origin="http://localhost:3000")
    assert (response.status_code, response.json()["code"]) == (500, "internal")
    assert response.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert response.headers["x-request-id"] in response.json()["message"]


def test_a_failure_on_our_side_is_an_event_where_the_panel_would_repeat_the_request(
    client: Client, database: Path
) -> None:
    thread = thread_of(client.create("Hi"))
    with sqlite3.connect(database) as db:
        db.execute("UPDATE threads SET metadata = 'broken' WHERE id = ?", (thread,))
    [event] = client.say(thread)
    assert (event["type"], event["allow_retry"]) == ("error", False)
    with sqlite3.connect(database) as db:
        db.execute("DELETE FROM threads WHERE id = ?", (thread,))


def test_what_the_agent_keeps_in_a_threads_metadata_is_not_shown(client: Client, database: Path) -> None:
    thread = thread_of(client.create("Hi"))
    with sqlite3.connect(database) as db:
        db.execute("""UPDATE threads SET metadata = '{"note": "for nobody else"}' WHERE id = ?""", (thread,))
    for operation, params in [
        ("threads.list", {}),
        ("threads.get_by_id", {"thread_id": thread}),
        ("threads.update", {"thread_id": thread, "title": "T"}),
        ("threads.add_user_message", {"thread_id": thread, "input": message("More")}),
    ]:
        answer = client.post(operation, params).text
        assert thread in answer, operation
        assert "for nobody else" not in answer, operation


def test_the_second_path_is_the_same_service(client: Client) -> None:
    assert client.http.post("/api/chatkit", json=LIST).status_code == 200


def test_the_process_says_that_it_is_up_and_ready(client: Client) -> None:
    assert client.http.get("/healthz").json() == {"status": "ok"}
    assert client.http.get("/readyz").json() == {"status": "ok"}
