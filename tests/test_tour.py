"""The offline demo: a tour of what the protocol can carry, asked for in plain words."""

from collections.abc import Iterator

import pytest

from service import Client, errors_of, fold, message, service, text_of, thread_of


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    database = tmp_path_factory.mktemp("tour") / "chatkit.db"
    with service(DATABASE_URL=f"sqlite:///{database}", TURNS_PER_MINUTE="0") as client:
        yield client


def ask(offline: Client, words: str) -> list[dict]:
    """Ask, and return the events; what was shown is what is stored."""
    events = offline.create(words)
    assert not errors_of(events)
    assert offline.items(thread_of(events)) == fold(events)
    return events


def test_the_first_words_say_that_no_model_is_configured_and_how_to_configure_one(offline: Client) -> None:
    answer = text_of(fold(ask(offline, "Hello"))[1])
    assert answer.startswith("**No model is configured**")
    assert "OPENAI_API_KEY" in answer
    assert "OPENAI_BASE_URL" in answer


@pytest.mark.parametrize(
    "words", ["Some information on your network", "It belongs here", "A homepage sometimes", "What about discards?"]
)
def test_a_word_that_only_holds_a_topic_is_no_wish_for_it(offline: Client, words: str) -> None:
    assert text_of(fold(ask(offline, words))[-1]).startswith("**No model is configured**")


@pytest.mark.parametrize("words", ["Working?", "two forms", "Show me buttons!", "Draw pictures"])
def test_a_topic_may_be_asked_for_in_any_form_of_its_word(offline: Client, words: str) -> None:
    events = offline.create(words)
    assert not errors_of(events)
    assert "No model is configured" not in str(events)


def test_each_prompt_that_the_page_offers_is_played_and_only_the_first_by_the_greeting(offline: Client) -> None:
    first, *others = offline.http.get("/settings.json").json()["prompts"]
    assert "No model is configured" in str(ask(offline, first))
    for prompt in others:
        assert "No model is configured" not in str(ask(offline, prompt))


def test_reasoning_is_shown(offline: Client) -> None:
    _, workflow, _ = fold(ask(offline, "Can you think about it?"))
    assert workflow["workflow"]["type"] == "reasoning"
    assert [task["type"] for task in workflow["workflow"]["tasks"]] == ["thought", "thought"]


def test_a_workflow_is_worked_through_with_progress(offline: Client) -> None:
    events = ask(offline, "Show me some work in steps")
    assert any(event["type"] == "progress_update" for event in events)
    _, workflow, _ = fold(events)
    assert [task["status_indicator"] for task in workflow["workflow"]["tasks"]] == ["complete", "complete"]


def test_a_button_of_a_widget_changes_it(offline: Client) -> None:
    events = ask(offline, "A widget, please")
    widget = fold(events)[1]
    for pressed in (1, 2):
        button = widget["widget"]["children"][2]
        action = {"type": button["onClickAction"]["type"], "payload": button["onClickAction"]["payload"]}
        params = {"thread_id": thread_of(events), "item_id": widget["id"], "action": action}
        [widget] = fold(offline.stream("threads.custom_action", params))
        assert widget["widget"]["children"][1]["value"] == f"The button was pressed {pressed} times."


def test_a_tool_of_the_page_is_called_and_its_output_spoken_of(offline: Client) -> None:
    events = ask(offline, "Ask my page what time it is")
    assert fold(events)[-1]["name"] == "get_local_time"
    output = {"thread_id": thread_of(events), "result": {"time": "12:34"}}
    answer = offline.stream("threads.add_client_tool_output", output)
    assert "12:34" in text_of(fold(answer)[-1])


def test_a_form_is_asked_and_answered(offline: Client) -> None:
    events = ask(offline, "Ask me with a form")
    form = fold(events)[-1]
    answers = {"size": {"values": ["Large"]}, "wish": {"skipped": True}}
    params = {"thread_id": thread_of(events), "item_id": form["id"], "input": {"answers": answers}}
    answered = offline.stream("threads.add_structured_input", params)
    assert "Thank you" in text_of(fold(answered)[-1])


def test_text_has_its_sources(offline: Client) -> None:
    [annotation] = fold(ask(offline, "Cite a source"))[1]["content"][0]["annotations"]
    assert annotation["source"]["url"].startswith("https://platform.openai.com/")


def test_a_picture_is_generated_and_kept_as_an_attachment(offline: Client) -> None:
    events = offline.create("Paint a picture")
    assert not errors_of(events)
    [image] = [item for item in offline.items(thread_of(events)) if item["type"] == "generated_image"]
    response = offline.http.get(image["image"]["url"])
    assert response.headers["content-type"] == "image/png"
    assert response.content.startswith(b"\x89PNG")
    assert "base64" not in str(events)
    assert not errors_of(offline.say(thread_of(events), "Thank you"))


def test_a_notice_is_shown_and_not_stored(offline: Client) -> None:
    events = ask(offline, "Give me a notice")
    [notice] = [event for event in events if event["type"] == "notice"]
    assert notice["level"] == "warning"


def test_an_error_can_be_tried_again(offline: Client) -> None:
    events = offline.create("Show me an error")
    [error] = errors_of(events)
    assert error["allow_retry"]
    retry = {"thread_id": thread_of(events), "item_id": fold(events)[0]["id"]}
    assert not errors_of(offline.stream("threads.retry_after_item", retry))


def test_a_slow_answer_can_be_stopped(offline: Client) -> None:
    with offline.streaming("threads.create", {"input": message("Slow, please")}) as events:
        thread = thread_of([next(events)])
        for event in events:
            if "text_delta" in str(event):
                break
    said = offline.say(thread, "Go on")
    assert not errors_of(said)
    assert "This" in text_of(offline.items(thread)[1])


def test_a_second_question_is_answered_by_its_own_words(offline: Client) -> None:
    thread = thread_of(offline.create("A widget, please"))
    assert "sources" not in str(offline.say(thread, "Hello again")[0])
    assert text_of(fold(offline.say(thread, "Hello again"))[1]).startswith("**No model")


def test_an_action_that_the_demo_does_not_know_has_no_handler(offline: Client) -> None:
    thread = thread_of(ask(offline, "Hello"))
    response = offline.post("threads.custom_action", {"thread_id": thread, "action": {"type": "unknown"}})
    assert (response.status_code, response.json()["code"]) == (422, "not_configured")
