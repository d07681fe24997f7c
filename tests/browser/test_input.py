import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from browser.chat_page import Chat, new_chat, posted
from browser.process import Service
from browser.standin import PIXEL, StandIn, standing_in
from page import PageSettings

PICTURE: dict[str, object] = {"name": "dot.png", "mimeType": "image/png", "buffer": PIXEL}


@pytest.fixture(scope="module")
def uploads() -> Iterator[StandIn]:
    settings = PageSettings(attachments=True, max_attachment_bytes=2**20, attachment_types=("image/png", "text/plain"))
    with standing_in(settings) as stand_in:
        yield stand_in


@pytest.fixture
def page(browser_context: BrowserContext, uploads: StandIn) -> Iterator[Page]:
    uploads.requests.clear()
    uploads.holds_uploads = False
    chat = new_chat(browser_context, uploads.url).open()
    yield chat.page
    assert chat.problems == []


def attach(page: Page, file: dict[str, object]) -> None:
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Attach files").click()
    chooser.value.set_files(file)


def uploaded(page: Page) -> None:
    expect(page.locator(".upload[data-state=done]")).to_have_count(1)


def hand_over(page: Page, target: str, kind: str) -> None:
    """Drop or paste a picture, as a browser would tell the page of it."""
    page.locator(target).evaluate(
        """(target, [kind, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "handed.png", { type: "image/png" }));
            const init = { bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data };
            target.dispatchEvent(kind === "paste" ? new ClipboardEvent(kind, init) : new DragEvent(kind, init));
        }""",
        [kind, list(PIXEL)],
    )


def test_a_picked_file_is_shown_uploaded_in_two_phases_and_sent(page: Page, uploads: StandIn) -> None:
    attach(page, PICTURE)
    uploaded(page)
    expect(page.locator(".upload img")).to_have_attribute("src", re.compile("^blob:"))
    created = next(each for each in uploads.requests if each["type"] == "attachments.create")
    assert created["params"] == {"name": "dot.png", "size": len(PIXEL), "mime_type": "image/png"}
    assert PIXEL in uploads.uploads.values()
    page.get_by_role("textbox").fill("look")
    page.keyboard.press("Enter")
    expect(page.locator("article.user img")).to_be_visible()
    expect(page.locator(".upload")).to_have_count(0)
    sent = next(each for each in uploads.requests if each["type"] == "threads.create")["params"]["input"]
    assert sent["attachments"] == [next(iter(uploads.uploads))]


@pytest.mark.parametrize(("target", "kind"), [("main", "drop"), ("#message", "paste")])
def test_a_file_is_attached_by_dropping_or_pasting_it(page: Page, target: str, kind: str) -> None:
    hand_over(page, target, kind)
    uploaded(page)
    expect(page.locator(".upload")).to_contain_text("handed.png")


def test_words_that_are_dropped_are_left_to_the_browser(page: Page) -> None:
    is_taken = page.locator("#message").evaluate(
        """(field) => {
            const dataTransfer = new DataTransfer();
            dataTransfer.setData("text/plain", "words");
            const drop = new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true });
            field.dispatchEvent(drop);
            return drop.defaultPrevented;
        }"""
    )
    assert not is_taken


def test_a_file_that_is_dropped_where_nothing_takes_it_does_not_replace_the_page(page: Page) -> None:
    is_kept = page.locator("#threads").evaluate(
        """(list) => {
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File(["x"], "x.html"));
            const drop = new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true });
            list.dispatchEvent(drop);
            return drop.defaultPrevented;
        }"""
    )
    assert is_kept
    expect(page.locator(".upload")).to_have_count(0)


def test_nothing_is_sent_before_the_upload_is_over(page: Page, uploads: StandIn) -> None:
    uploads.holds_uploads = True
    attach(page, PICTURE)
    page.get_by_role("textbox").fill("look")
    expect(page.get_by_role("progressbar", name="Uploading dot.png")).to_be_visible()
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    uploads.holds_uploads = False
    uploaded(page)
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def test_an_attachment_that_is_removed_is_deleted(page: Page, uploads: StandIn) -> None:
    attach(page, PICTURE)
    uploaded(page)
    with page.expect_response(lambda response: "attachments.delete" in (response.request.post_data or "")):
        page.get_by_role("button", name="Remove dot.png").click()
    expect(page.locator(".upload")).to_have_count(0)
    expect(page.get_by_role("textbox")).to_be_focused()
    assert uploads.deleted[-1].startswith("atc_")


def test_a_file_that_may_have_been_sent_is_never_deleted(page: Page, uploads: StandIn) -> None:
    before = len(uploads.deleted)
    attach(page, PICTURE)
    uploaded(page)
    is_new = re.compile("threads.create")
    page.route(
        "**/chatkit", lambda route: route.abort() if is_new.search(route.request.post_data or "") else route.continue_()
    )
    page.get_by_role("textbox").fill("look")
    page.get_by_role("textbox").press("Enter")
    remove = page.get_by_role("button", name="Remove dot.png")
    expect(remove).to_be_visible()  # it is here again; the service may have stored the message all the same
    remove.click()
    expect(page.locator(".upload")).to_have_count(0)
    attach(page, PICTURE)  # another, whose removal is told
    uploaded(page)
    with page.expect_response(lambda response: "attachments.delete" in (response.request.post_data or "")):
        remove.click()
    assert len(uploads.deleted) == before + 1


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ({"name": "x.exe", "mimeType": "application/x-msdownload", "buffer": b"x"}, "x.exe: files of this kind"),
        ({"name": "big.txt", "mimeType": "text/plain", "buffer": b"x" * (2**20 + 1)}, "big.txt is larger than 1 MiB"),
        ({"name": "none.txt", "mimeType": "text/plain", "buffer": b""}, "none.txt is empty"),
        ({"name": "no.txt", "mimeType": "text/plain", "buffer": b"refuse"}, "There is no room for it."),
    ],
)
def test_a_file_that_cannot_be_attached_is_refused_with_the_reason(
    page: Page, file: dict[str, object], words: str
) -> None:
    attach(page, file)
    expect(page.locator("#composer-note")).to_contain_text(words)


def test_a_file_that_was_not_uploaded_is_not_left_out_in_silence(page: Page, uploads: StandIn) -> None:
    attach(page, {"name": "no.txt", "mimeType": "text/plain", "buffer": b"refuse"})
    expect(page.locator(".upload[data-state=failed]")).to_have_count(1)
    page.get_by_role("textbox").fill("look")
    page.keyboard.press("Enter")
    expect(page.locator("#composer-note")).to_contain_text("no.txt was not uploaded. Remove it")
    page.get_by_role("button", name="Remove no.txt").click()
    page.keyboard.press("Enter")
    expect(page.locator("article.user")).to_contain_text("look")
    expect(page.locator("#composer-note")).to_be_empty()


def test_a_picture_goes_to_the_service_and_is_shown_from_there(chat: Chat, service: Service) -> None:
    attach(chat.page, PICTURE)
    uploaded(chat.page)
    chat.say("say nice")
    chat.page.reload()
    picture = chat.page.locator("article.user").get_by_role("img", name="dot.png")
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 1
    assert service.items(chat.thread_id)[0]["attachments"][0]["name"] == "dot.png"


def test_a_service_without_attachments_offers_none(browser_context: BrowserContext) -> None:
    with standing_in(PageSettings()) as service:
        chat = new_chat(browser_context, service.url).open()
        expect(chat.button("Attach files")).to_have_count(0)


def test_the_chosen_model_goes_with_the_message_and_stays_chosen(chat: Chat) -> None:
    chat.page.get_by_role("combobox", name="Model").select_option("large")
    with chat.page.expect_request(lambda request: "threads.create" in (request.post_data or "")) as sent:
        chat.say("say x")
    assert posted(sent.value)["input"]["inference_options"] == {"model": "large"}
    chat.page.reload()
    expect(chat.page.get_by_role("combobox", name="Model")).to_have_value("large")


def test_enter_sends_shift_enter_does_not_and_words_stay_as_they_were_written(chat: Chat) -> None:
    chat.message.type("say one")
    chat.message.press("Shift+Enter")
    chat.message.type("  two")
    chat.message.press("Enter")
    expect(chat.page.locator("article.user .bubble")).to_have_text("say one\n  two", use_inner_text=True)
    expect(chat.message).to_be_empty()


def test_questions_are_answered(chat: Chat, service: Service) -> None:
    chat.say("questions")
    questions = chat.page.locator("article.questions")
    questions.get_by_role("radio", name="green").check()
    questions.get_by_role("checkbox", name="milk").check()
    questions.get_by_role("checkbox", name="sugar").check()
    questions.get_by_role("textbox", name="With what? Something else").fill("lemon")
    questions.get_by_role("textbox", name="Why?", exact=True).fill("because")
    questions.get_by_role("button", name="Answer").click()
    expect(questions.locator("dd")).to_have_text(["green", "milk, sugar, lemon", "because"])
    expect(chat.answer).to_be_visible()
    [item] = [each for each in service.items(chat.thread_id) if each["type"] == "structured_input"]
    assert [each["answer"]["values"] for each in item["inputs"]] == [["green"], ["milk", "sugar", "lemon"], ["because"]]


def test_an_own_answer_takes_the_place_of_a_single_choice(chat: Chat) -> None:
    chat.say("questions")
    questions = chat.page.locator("article.questions")
    questions.get_by_role("radio", name="green").check()
    questions.get_by_role("textbox", name="Which tea? Something else").fill("mint")
    expect(questions.get_by_role("radio", name="green")).not_to_be_checked()
    questions.get_by_role("button", name="Answer").click()
    expect(questions.locator("dd")).to_have_text(["mint", "Skipped", "Skipped"])


def test_questions_are_skipped(chat: Chat, service: Service) -> None:
    chat.say("questions")
    chat.button("Skip").click()
    expect(chat.page.locator("article.questions dd")).to_have_text(["Skipped"] * 3)
    expect(chat.answer).to_be_visible()
    assert service.items(chat.thread_id)[1]["status"] == "skipped"


def test_a_tool_of_the_page_gives_its_output_to_the_assistant(chat: Chat, service: Service) -> None:
    chat.say("get_local_time")
    expect(chat.answer).to_contain_text("time_zone")
    call = service.items(chat.thread_id)[1]
    assert (call["type"], call["status"]) == ("client_tool_call", "completed")
    assert set(call["output"]) == {"time", "time_zone", "locale"}


def test_a_tool_of_the_page_acts_on_the_page(chat: Chat) -> None:
    chat.say("set_theme")
    expect(chat.page.locator("html")).to_have_attribute("data-theme", "dark")
    expect(chat.answer).to_contain_text("dark")


def test_a_tool_that_the_page_does_not_have_is_answered_with_that(chat: Chat) -> None:
    chat.say("no_such_tool")
    expect(chat.answer).to_contain_text("This page has no tool named no_such_tool.")


def test_a_tool_call_that_a_reload_left_waiting_goes_on_when_asked(chat: Chat, service: Service) -> None:
    chat.open(service.say("get_local_time"))
    expect(chat.page.get_by_text("Waiting for this page: get_local_time")).to_be_visible()
    chat.button("Go on").click()
    expect(chat.answer).to_contain_text("time_zone")


def test_an_effect_is_carried_out_and_told_to_other_scripts(chat: Chat) -> None:
    chat.page.evaluate("document.addEventListener('chatkit.effect', (event) => (window.seen = event.detail))")
    chat.say("effect")
    expect(chat.page.locator("html")).to_have_attribute("data-theme", "dark")
    assert chat.page.evaluate("window.seen") == {"name": "set_theme", "data": {"theme": "dark"}}
