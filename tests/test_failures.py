"""When the model fails: words for the user, a reason in the log, and nothing lost of what was shown."""

import logging
import sqlite3
import warnings
from datetime import UTC, datetime
from pathlib import Path

import pytest
from chatkit.types import AssistantMessageContent, AssistantMessageItem

from conftest import probing
from conversations import StoreUnavailable
from failures import describe
from rows import item_row
from sdk import encode
from service import Client, errors_of, fold, service, text_of, thread_of
from standin import Begin, Break, Call, CutOff, Fail, FailLater, Garbage, Reason, Refuse, Say, StandIn, Step, Wait

BEFORE_A_WORD: dict[str, tuple[Step, str, bool, str]] = {
    "a refused key": (Fail(401, "invalid_api_key"), "refuses this service's key", False, "401 invalid_api_key"),
    "a forbidden model": (Fail(403), "refuses this service's key", False, "PermissionDeniedError 403"),
    "an unknown model": (Fail(404, "model_not_found"), "does not exist", False, "404 model_not_found"),
    "a busy provider": (Fail(429, "rate_limit_exceeded"), "is busy", True, "429 rate_limit_exceeded"),
    "a used-up budget": (Fail(429, "insufficient_quota"), "budget", False, "429 insufficient_quota"),
    "a conversation too long": (Fail(400, "context_length_exceeded"), "too long", False, "context_length_exceeded"),
    "a request that is refused": (Fail(400, "invalid_value"), "could not read", False, "400 invalid_value"),
    "a conversation too long for Groq": (Fail(413), "too long", False, "413"),
    "a used-up balance": (Fail(402), "budget", False, "402"),
    "a broken provider": (Fail(503), "has a problem", True, "InternalServerError 503"),
    "a connection that breaks": (Break(), "connection to the model failed", True, ""),
    "garbage": (Garbage(), "", True, ""),
    "an error event": (FailLater("server_error"), "could not be read", True, "ModelBehaviorError"),
    "a late context error": (FailLater("context_length_exceeded"), "too long", False, "context_length_exceeded"),
    "a tool that does not exist": (Call("no_such_tool"), "could not be read", True, "ModelBehaviorError"),
    "a tool that waits for an approval": (Call("wipe"), "not set up correctly", False, "UserError"),
    "a tool that fails": (Call("explode"), "A tool of the agent failed", True, "RuntimeError"),
}


@pytest.mark.parametrize("case", BEFORE_A_WORD)
def test_a_failure_tells_the_user_what_to_do_and_the_log_why(
    client: Client, model: StandIn, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    step, words, allow_retry, reason = BEFORE_A_WORD[case]
    model.will(step)
    model.otherwise = [step]
    events = client.create("SENTINEL question")
    [error] = errors_of(events)
    assert words in error["message"]
    assert error["allow_retry"] is allow_retry
    assert "provider's own words" not in str(events)
    records = [record for record in caplog.records if record.name == "service.turns"]
    assert len(records) == 1
    assert reason in records[0].getMessage()
    assert "SENTINEL" not in caplog.text
    assert client.items(thread_of(events)) == fold(events)


def test_a_tool_ends_the_turn_in_its_authors_words(
    client: Client, model: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    model.will(Call("refuse"))
    [error] = errors_of(client.create())
    assert (error["message"], error["allow_retry"]) == ("It is sold out.", False)
    assert not [record for record in caplog.records if record.name == "service.turns"]


@pytest.mark.parametrize("step", [Break(), Garbage(), FailLater("server_error"), Call("explode")])
def test_what_was_said_before_a_failure_is_kept(client: Client, model: StandIn, step: Step) -> None:
    model.will(Say("What you have read already"), Wait(0.5), step)  # what comes at once with a failure is never shown
    events = client.create("Begin")
    assert len(errors_of(events)) == 1
    stored = client.items(thread_of(events))
    assert text_of(stored[1]) == "What you have read already"
    assert stored == fold(events)


def test_an_answer_that_breaks_off_in_the_middle_of_a_text_is_finished_as_far_as_it_came(
    client: Client, model: StandIn
) -> None:
    model.will(Say("Half an answer", breaks=True))
    events = client.create("Begin")
    stored = client.items(thread_of(events))
    assert text_of(stored[1]).startswith("Half an")
    assert stored == fold(events)
    model.will(Say("A whole answer."))
    assert not errors_of(client.say(thread_of(events), "Go on"))


def test_a_retry_after_a_failure_answers(client: Client, model: StandIn) -> None:
    model.will(Fail(500))
    events = client.create("Hello")
    [error], said = errors_of(events), fold(events)[0]
    assert error["allow_retry"]
    again = client.stream("threads.retry_after_item", {"thread_id": thread_of(events), "item_id": said["id"]})
    assert not errors_of(again)


def test_a_refusal_of_the_model_is_an_answer_and_no_error(client: Client, model: StandIn) -> None:
    model.will(Refuse("I had rather not."))
    events = client.create("Do something bad")
    assert not errors_of(events)
    assert text_of(client.items(thread_of(events))[1]) == "I had rather not."


def test_too_many_rounds_are_stopped_with_words(client: Client, model: StandIn) -> None:
    model.otherwise = [Call("look_up", {"word": "again"})]
    [error] = errors_of(client.create("Go round in circles"))
    assert "more steps" in error["message"]


def test_a_server_that_does_not_listen_is_said_to_be_unreachable(tmp_path: Path) -> None:
    environ = {"DATABASE_URL": f"sqlite:///{tmp_path}/db", "OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}
    with service(**environ) as client:
        [error] = errors_of(client.create("Is anybody there?"))
    assert "connection to the model failed" in error["message"]
    assert error["allow_retry"]


@pytest.mark.parametrize("api", ["responses", "chat_completions"])
def test_both_apis_fail_in_the_same_words(tmp_path: Path, model: StandIn, api: str) -> None:
    with service(**probing(model, tmp_path / "chatkit.db", OPENAI_API=api)) as client:
        model.will(Fail(401, "invalid_api_key"))
        [error] = errors_of(client.create("Hello"))
        assert "refuses this service's key" in error["message"]
        model.will(Refuse("I had rather not."))
        events = client.create("Do something bad")
        assert "I had rather not." in text_of(client.items(thread_of(events))[1])


@pytest.mark.parametrize("api", ["responses", "chat_completions"])
def test_an_answer_that_the_provider_cuts_off_is_kept_and_said_to_be_cut_off(
    tmp_path: Path, model: StandIn, api: str
) -> None:
    with service(**probing(model, tmp_path / "chatkit.db", OPENAI_API=api)) as client:
        for reason, words in {"max_output_tokens": "cut off", "content_filter": "does not let it"}.items():
            model.will(Begin("Half an"), CutOff(reason, words=" answer"))
            events = client.create("Tell me everything")
            [error] = errors_of(events)
            assert words in error["message"]
            assert not error["allow_retry"]
            stored = client.items(thread_of(events))
            assert text_of(stored[1]) == "Half an answer"
            assert stored == fold(events)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("SENTINEL words"), "OSError"),
        (FileNotFoundError(2, "SENTINEL words", "SENTINEL.txt"), "FileNotFoundError 2 No such file or directory"),
        (sqlite3.OperationalError("no such column: SENTINEL"), "OperationalError"),
        (StoreUnavailable("database is locked"), "StoreUnavailable database is locked"),
    ],
)
def test_the_log_has_no_words_of_what_a_tool_may_raise(error: Exception, said: str) -> None:
    assert describe(error) == said
    wrapped = RuntimeError("SENTINEL")
    wrapped.__cause__ = error
    assert describe(wrapped) == f"RuntimeError from {said}"


def test_what_does_not_fit_its_field_is_sent_and_stored_without_a_warning_that_quotes_it() -> None:
    part = AssistantMessageContent.model_construct(text=["SENTINEL"], annotations=[])
    item = AssistantMessageItem(id="i", thread_id="t", created_at=datetime.now(UTC), content=[])
    item.content = [part]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert b"SENTINEL" in encode(item)
        assert "SENTINEL" in item_row("t", item)["body"]


def test_the_debug_log_too_holds_nobodys_words(
    tmp_path: Path, model: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "service")
    with service(**probing(model, tmp_path / "chatkit.db", LOG_LEVEL="DEBUG")) as client:
        model.will(Call("look_up", {"word": "SENTINEL"}))
        client.create("SENTINEL question")
    assert "SENTINEL" not in "".join(record.getMessage() for record in caplog.records if record.name != "aiosqlite")


@pytest.mark.parametrize("api", ["responses", "chat_completions"])
@pytest.mark.parametrize("steps", [[Say("")], [Say(" ")], [Reason("Hm.")], []])
def test_an_answer_without_a_word_is_said_to_be_none(
    tmp_path: Path, model: StandIn, api: str, steps: list[Step]
) -> None:
    with service(**probing(model, tmp_path / "chatkit.db", OPENAI_API=api)) as client:
        model.will(Call("look_up", {"word": "a"}))
        model.will(*steps, Wait(0))
        events = client.create("Look it up")
        [error] = errors_of(events)
        assert (error["message"], error["allow_retry"]) == ("The model gave no answer. Try again.", True)
        assert client.items(thread_of(events)) == fold(events)
        assert not errors_of(client.say(thread_of(events), "And now?"))


@pytest.mark.parametrize("tool", ["show_widget", "work"])
def test_a_tool_that_shows_something_is_answer_enough(client: Client, model: StandIn, tool: str) -> None:
    model.will(Call(tool))
    model.will(Wait(0))
    assert not errors_of(client.create("Show it"))
