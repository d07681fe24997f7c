import re

from playwright.sync_api import expect

from browser.chat_page import Chat, posted
from browser.process import Service
from service import eventually


def test_markdown_is_drawn_while_it_streams_and_when_it_is_loaded(chat: Chat) -> None:
    chat.say("markdown")
    for _ in ("streamed", "loaded"):
        answer = chat.answer
        expect(answer.get_by_role("heading", name="A heading")).to_be_visible()
        expect(answer.locator("ol > li > ul > li")).to_have_text("nested")
        expect(answer.locator("tbody td[data-align=right]").last).to_have_text("12")
        expect(answer.locator("pre code")).to_have_text('print("hello <world>")')
        expect(answer.get_by_role("link", name="link", exact=True)).to_have_attribute(
            "href", "https://example.org/page?a=1&b=2"
        )
        expect(answer.get_by_role("link", name="the note")).to_have_attribute("href", "https://example.org/note")
        expect(answer.locator("p").first).to_contain_text("link & more")
        chat.page.reload()


def test_links_open_elsewhere_and_tell_nothing_of_this_page(chat: Chat) -> None:
    chat.say("markdown")
    link = chat.answer.get_by_role("link", name="link", exact=True)
    expect(link).to_have_attribute("rel", "noopener noreferrer nofollow")
    expect(link).to_have_attribute("target", "_blank")


def test_text_is_shown_as_it_comes(chat: Chat) -> None:
    chat.begin("slow")
    expect(chat.answer).to_contain_text("word3")
    expect(chat.answer).not_to_contain_text("word2999")
    expect(chat.answer).to_contain_text("word19")
    chat.stop.click()


def test_code_and_answers_are_copied_as_they_were_written(chat: Chat) -> None:
    chat.say("markdown")
    chat.button("Copy code").click()
    read = "navigator.clipboard.readText()"
    assert chat.page.evaluate(read) == 'print("hello <world>")'
    chat.button("Copy answer").click()
    copied = "# A heading\n\nSome **bold**"
    eventually(lambda: chat.page.evaluate(read).startswith(copied), 10, "a copy of the answer")


def test_a_browser_that_refuses_to_copy_breaks_nothing(chat: Chat) -> None:
    chat.say("say x")
    chat.page.evaluate(
        "navigator.clipboard.writeText = () => Promise.reject(new DOMException('no', 'NotAllowedError'));"
        "document.execCommand = () => false;"
        "window.setTimeout = () => 0"  # so that the sign stays: a busy machine may look late
    )
    copy = chat.button("Copy answer")
    drawn = copy.inner_html()
    copy.click()
    expect(copy.locator("svg")).to_be_visible()
    eventually(lambda: copy.inner_html() != drawn, 10, "a sign on the button")
    assert "M12 4l9 16H3z" in copy.inner_html()  # not that it was copied


def test_stop_keeps_what_was_said(chat: Chat, service: Service) -> None:
    chat.begin("slow")
    expect(chat.answer).to_contain_text("word5")
    chat.stop.click()
    expect(chat.page.get_by_role("status").filter(has_text="Stopped.")).to_be_visible()
    expect(chat.stop).to_be_hidden()
    eventually(lambda: service.items(chat.thread_id)[-1]["type"] == "assistant_message", what="the end of the turn")
    stored = service.items(chat.thread_id)[-1]["content"][0]["text"]
    assert "word5" in stored
    assert "word2999" not in stored
    expect(chat.answer.locator(".markdown")).to_have_text(stored.strip())
    chat.say("say and on it goes")
    expect(chat.answer).to_contain_text("and on it goes")


def test_an_answer_can_be_had_again(chat: Chat, service: Service) -> None:
    chat.say("say once")
    before = service.items(chat.thread_id)[-1]["id"]
    chat.button("Answer again").click()
    expect(chat.page.locator(f'[data-item="{before}"]')).to_have_count(0)
    expect(chat.answer).to_contain_text("once")
    expect(chat.stop).to_be_hidden()  # and so it is stored
    assert len(service.items(chat.thread_id)) == 2


def test_an_error_that_allows_it_is_retried_by_its_button(chat: Chat) -> None:
    chat.say("fail-once 1")
    error = chat.page.get_by_role("alert").filter(has_text="The kettle was not on.")
    expect(error).to_be_visible()
    error.get_by_role("button", name="Try again").click()
    expect(chat.answer).to_contain_text("It works now.")
    expect(error).to_have_count(0)


def test_an_error_that_does_not_allow_it_has_no_retry_button(chat: Chat) -> None:
    chat.say("fail")
    expect(chat.page.get_by_role("alert").filter(has_text="The kettle is empty.")).to_be_visible()
    expect(chat.button("Try again")).to_have_count(0)
    expect(chat.button("Answer again")).to_have_count(0)


def test_a_failure_is_told_in_the_services_words_alone(chat: Chat) -> None:
    chat.say("crash")
    error = chat.page.locator(".notice.danger")
    expect(error).to_contain_text("Something went wrong on our side.")
    expect(error).not_to_contain_text("nobody may see this")


def test_the_focus_goes_to_the_message_field_when_the_pressed_button_is_gone(chat: Chat) -> None:
    chat.say("fail-once focus")
    for name in ("Try again", "Answer again"):
        chat.button(name).focus()
        chat.page.keyboard.press("Enter")
        expect(chat.message).to_be_focused()
        expect(chat.answer).to_contain_text("It works now.")
        expect(chat.stop).to_be_hidden()


def test_feedback_is_sent_and_shown(chat: Chat) -> None:
    chat.say("say good?")
    with chat.page.expect_request(lambda request: "items.feedback" in (request.post_data or "")) as sent:
        chat.button("Good answer").click()
    assert posted(sent.value)["kind"] == "positive"
    expect(chat.button("Good answer")).to_have_attribute("aria-pressed", "true")
    expect(chat.button("Bad answer")).to_have_attribute("aria-pressed", "false")


def test_a_workflow_is_shown_as_it_grows_and_folded_when_it_is_over(chat: Chat, service: Service) -> None:
    chat.begin("workflow held")
    workflow = chat.page.locator("article.workflow")
    expect(workflow.get_by_text("Reading the menu").last).to_be_visible()
    service.say("go")
    expect(workflow.locator("summary")).to_have_text("Looked at everything")
    expect(workflow.locator(".tasks")).to_be_hidden()
    workflow.locator("summary").click()
    expect(workflow.locator("em")).to_have_text("tea")
    expect(workflow.get_by_role("link", name="Tea site")).to_be_visible()
    expect(workflow).to_contain_text("Searching for “best tea”")
    expect(workflow).to_contain_text("menu.pdf")


def test_reasoning_is_shown_as_it_grows(chat: Chat, service: Service) -> None:
    chat.begin("reasoning held")
    workflow = chat.page.locator("article.workflow")
    expect(workflow.locator("summary")).to_have_text("Thinking …")
    service.say("go")
    expect(workflow.get_by_text("Tea needs hot water.")).to_be_visible()
    service.say("go")
    expect(workflow.locator("summary")).to_have_text(re.compile(r"Thought for (a moment|[1-9]\d* seconds?)"))


def test_progress_is_shown_until_something_comes_of_it(chat: Chat, service: Service) -> None:
    chat.begin("progress held")
    progress = chat.page.get_by_role("status").filter(has_text="Boiling water")
    expect(progress).to_be_visible()
    service.say("go")
    expect(chat.page.locator("article.workflow")).to_contain_text("Boiled water")
    expect(progress).to_be_hidden()


def test_sources_are_listed_under_the_answer_and_only_safe_ones_are_links(chat: Chat) -> None:
    chat.say("sources")
    sources = chat.answer.get_by_role("list", name="Sources")
    expect(sources.get_by_role("listitem")).to_have_count(4)
    expect(sources.get_by_role("link")).to_have_count(1)
    expect(sources).to_contain_text("report.pdf")


def test_a_generated_image_shows_its_progress_and_then_itself(chat: Chat, service: Service) -> None:
    chat.begin("image held")
    image = chat.page.locator("article.generated")
    expect(image.get_by_role("progressbar")).to_be_visible()
    service.say("go")
    expect(image.get_by_role("progressbar")).to_have_count(0)
    expect(image.get_by_role("img", name="Generated image")).to_be_visible()


def test_a_notice_says_its_title_and_markdown(chat: Chat) -> None:
    chat.say("notice")
    notice = chat.page.locator(".notice.warning")
    expect(notice.locator("strong").first).to_have_text("Careful")
    expect(notice.get_by_role("link", name="Buy more")).to_be_visible()


def test_the_title_that_the_agent_gives_is_shown_at_once(chat: Chat) -> None:
    chat.say("title All about tea")
    expect(chat.page.get_by_role("heading", level=1)).to_have_text("All about tea")
    expect(chat.page.locator("#threads [aria-current] bdi")).to_have_text("All about tea")
    expect(chat.page).to_have_title("All about tea · Chat")


def test_a_locked_thread_says_why_and_takes_no_message(chat: Chat) -> None:
    chat.say("lock")
    for _ in ("at once", "when loaded"):
        expect(chat.page.get_by_text("This conversation is under review.")).to_be_visible()
        expect(chat.message).to_be_hidden()
        expect(chat.button("Answer again")).to_have_count(0)
        chat.page.reload()
    chat.button("New conversation").click()
    expect(chat.message).to_be_visible()


def test_a_closed_thread_says_so(chat: Chat) -> None:
    chat.say("close")
    expect(chat.page.get_by_text("This conversation is closed.")).to_be_visible()
    expect(chat.message).to_be_hidden()


def test_a_prompt_of_the_start_screen_is_sent_as_a_message(chat: Chat) -> None:
    chat.page.locator(".prompt").first.click()
    expect(chat.page.locator("article.user")).to_contain_text("What can you do?")
    expect(chat.answer).to_contain_text("You said: What can you do?")
