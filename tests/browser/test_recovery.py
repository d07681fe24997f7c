"""Whatever breaks, the page says so and then shows what is stored. It never sends a message twice by itself."""

import re
import signal
import time
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Route, expect

from browser.chat_page import Chat, new_chat
from browser.process import Service, running
from browser.standin import NOW, standing_in
from page import PageSettings
from service import eventually


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that the tests stop and start, and that does not wait long for its turns."""
    with running(Service(tmp_path_factory.mktemp("mortal") / "chat.db", SHUTDOWN_GRACE_SECONDS="1")) as service:
        yield service


def test_a_reload_in_the_middle_of_an_answer_shows_what_was_kept(chat: Chat, service: Service) -> None:
    chat.begin("slow")
    expect(chat.answer).to_contain_text("word5")
    chat.page.reload()
    expect(chat.answer).to_contain_text("word5")
    eventually(lambda: service.items(chat.thread_id)[-1]["type"] == "assistant_message", 10, "the end of the turn")
    stored = service.items(chat.thread_id)
    expect(chat.answer.locator(".markdown")).to_have_text(stored[-1]["content"][0]["text"].strip())
    chat.button("Answer again").click()
    expect(chat.answer).to_contain_text("word2")
    chat.stop.click()
    expect(chat.stop).to_be_hidden()


def test_a_second_tab_shows_what_the_first_one_did(chat: Chat, browser_context: BrowserContext) -> None:
    chat.say("say first")
    second = new_chat(browser_context, chat.url).open(chat.thread_id)
    chat.say("say from the first tab")
    second.page.evaluate("dispatchEvent(new Event('focus'))")
    expect(second.answer).to_contain_text("from the first tab")
    second.say("say from the second tab")
    chat.page.evaluate("dispatchEvent(new Event('focus'))")
    expect(chat.answer).to_contain_text("from the second tab")
    expect(chat.page.locator("article.user")).to_have_count(3)


def test_a_second_tab_shows_what_is_stored_until_the_answer_is_over(
    chat: Chat, browser_context: BrowserContext, service: Service
) -> None:
    chat.begin("steps held")
    steps = "article.workflow"
    expect(chat.page.locator(steps)).to_have_count(1)
    second = new_chat(browser_context, chat.url).open(chat.thread_id)
    expect(second.page.locator(steps)).to_have_count(1)
    expect(second.page.get_by_text("An answer is being written.")).to_be_visible()
    expect(second.button("Answer again")).to_have_count(0)
    service.say("go")
    expect(second.page.locator(steps)).to_have_count(2)
    expect(second.button("Answer again")).to_be_visible()


def test_a_tab_that_found_the_thread_busy_shows_the_answer_when_it_is_over(
    chat: Chat, browser_context: BrowserContext, service: Service
) -> None:
    chat.say("say first")
    second = new_chat(browser_context, chat.url).open(chat.thread_id)
    expect(second.button("Answer again")).to_be_visible()  # it has loaded the thread, which is idle
    chat.begin("steps held")
    expect(chat.page.locator("article.workflow")).to_have_count(1)
    second.button("Answer again").click()
    expect(second.page.get_by_role("alert").filter(has_text="An answer is still being written here.")).to_be_visible()
    expect(second.page.locator("article.workflow")).to_have_count(1)
    service.say("go")
    expect(second.page.locator("article.workflow")).to_have_count(2)
    expect(second.page.locator(".notice")).to_have_count(0)
    expect(second.button("Answer again")).to_be_visible()


def test_a_stale_tab_deletes_nothing_that_it_never_showed(
    chat: Chat, browser_context: BrowserContext, service: Service
) -> None:
    chat.say("say first")
    second = new_chat(browser_context, chat.url).open(chat.thread_id)
    expect(second.answer).to_contain_text("first")
    chat.say("say from the first tab")
    before = service.items(chat.thread_id)
    second.button("Answer again").click()
    expect(second.page.get_by_role("alert").filter(has_text="This conversation went on elsewhere.")).to_be_visible()
    expect(second.answer).to_contain_text("from the first tab")
    assert service.items(chat.thread_id) == before


def test_an_answer_is_shown_again_when_its_retry_fails(chat: Chat, browser_context: BrowserContext) -> None:
    chat.say("say first")
    chat.page.route("**/chatkit", lambda route: refuse_retry(route))
    chat.button("Answer again").click()
    expect(chat.page.get_by_role("alert").filter(has_text="Not now.")).to_be_visible()
    expect(chat.answer).to_contain_text("first")


def refuse_retry(route: Route) -> None:
    if "threads.retry_after_item" not in (route.request.post_data or ""):
        return route.continue_()
    failed = 'data: {"type":"error","code":"custom","message":"Not now.","allow_retry":true}\n\n'
    return route.fulfill(status=200, content_type="text/event-stream", body=failed)


def test_a_tab_that_missed_more_than_a_page_shows_all_of_it(browser_context: BrowserContext) -> None:
    base = {"type": "user_message", "thread_id": "thr_1", "created_at": NOW, "attachments": []}
    items = [{"id": f"u{n}", **base, "content": [{"type": "input_text", "text": f"Word {n}"}]} for n in range(70)]
    with standing_in(PageSettings()) as service:
        service.items = items[:1]
        chat = new_chat(browser_context, service.url).open("thr_1")
        messages = chat.page.locator("article.user")
        expect(messages).to_have_count(1)
        service.items = items
        chat.page.evaluate("dispatchEvent(new Event('focus'))")
        expect(messages.last).to_contain_text("Word 69")
        chat.page.locator(".scroller").evaluate("scroller => scroller.scrollTop = 0")
        expect(messages).to_have_count(70)


def test_a_message_into_a_busy_thread_is_kept_in_the_field(chat: Chat, browser_context: BrowserContext) -> None:
    chat.say("say first")
    second = new_chat(browser_context, chat.url).open(chat.thread_id)
    chat.begin("slow")
    expect(chat.answer).to_contain_text("word3")
    second.begin("say later")
    expect(second.page.get_by_role("alert").filter(has_text="An answer is still being written here.")).to_be_visible()
    expect(second.message).to_have_value("say later")
    expect(second.page.locator("article.user")).to_have_text(["You saidsay first", "You saidslow"])
    chat.stop.click()
    expect(chat.stop).to_be_hidden()
    second.message.press("Enter")
    expect(second.answer).to_contain_text("later")


def test_a_message_to_a_service_that_is_away_waits_in_the_field(
    browser_context: BrowserContext, mortal: Service
) -> None:
    chat = new_chat(browser_context, mortal.url).open()
    chat.say("say before")
    mortal.stop()
    chat.begin("say after")
    expect(chat.page.get_by_role("alert").filter(has_text="cannot be reached")).to_be_visible()
    expect(chat.message).to_have_value("say after")
    mortal.start()
    expect(chat.page.locator("#banner")).to_be_empty()
    expect(chat.answer).to_contain_text("before")
    assert len(mortal.items(chat.thread_id)) == 2
    chat.message.press("Enter")
    expect(chat.answer).to_contain_text("after")
    expect(chat.stop).to_be_hidden()
    assert len(mortal.items(chat.thread_id)) == 4


def test_a_message_that_was_not_sent_is_not_lost_while_another_one_is_written(chat: Chat) -> None:
    held: list[Route] = []
    is_new = re.compile("threads.create")
    chat.page.route(
        "**/chatkit",
        lambda route: held.append(route) if is_new.search(route.request.post_data or "") else route.continue_(),
    )
    with chat.page.expect_request(lambda request: is_new.search(request.post_data or "") is not None):
        chat.begin("say first")
    chat.button("New conversation").click()
    chat.message.fill("say second")
    held[0].abort()
    expect(chat.message).to_have_value("say first\n\nsay second")
    expect(chat.page.get_by_role("alert").filter(has_text="was not sent")).to_be_visible()


def test_a_conversation_that_has_no_name_yet_cannot_be_stopped_and_had_twice(chat: Chat) -> None:
    held: list[Route] = []
    is_new = re.compile("threads.create")
    chat.page.route(
        "**/chatkit",
        lambda route: held.append(route) if is_new.search(route.request.post_data or "") else route.continue_(),
    )
    with chat.page.expect_request(lambda request: is_new.search(request.post_data or "") is not None):
        chat.begin("slow")
    expect(chat.button("Send")).to_be_disabled()
    expect(chat.stop).to_be_hidden()
    chat.message.press("Escape")
    held[0].continue_()
    expect(chat.answer).to_contain_text("word1")
    chat.stop.click()
    expect(chat.stop).to_be_hidden()
    expect(chat.message).to_have_value("")


def test_an_answer_that_a_restart_stopped_can_be_had_again(browser_context: BrowserContext, mortal: Service) -> None:
    chat = new_chat(browser_context, mortal.url).open()
    chat.begin("slow 60")
    expect(chat.answer).to_contain_text("word3")
    mortal.stop()
    expect(chat.stop).to_be_hidden()
    expect(chat.answer).to_contain_text("word3")
    mortal.start()
    expect(chat.page.locator("#banner")).to_be_empty()
    chat.page.get_by_role("button", name=re.compile("Try again|Answer again")).click()
    expect(chat.stop).to_be_visible()
    expect(chat.answer).to_contain_text("word3")
    chat.stop.click()


def test_an_answer_that_a_crash_broke_off_is_shown_as_it_was_kept(
    browser_context: BrowserContext, mortal: Service
) -> None:
    chat = new_chat(browser_context, mortal.url).open()
    chat.begin("slow")
    expect(chat.answer).to_contain_text("word15")
    mortal.stop(signal.SIGKILL)
    expect(chat.page.get_by_text("The connection was lost.")).to_be_visible()
    expect(chat.page.locator("#banner")).to_contain_text("cannot be reached")
    mortal.start()
    expect(chat.page.locator("#banner")).to_be_empty()
    chat.page.reload()
    expect(chat.page.locator("article.user")).to_contain_text("slow")
    expect(chat.answer).to_contain_text("word5", timeout=15_000)  # once the dead turn's lease has run out
    assert chat.problems == []


def test_a_service_that_takes_no_operations_is_tried_ever_more_seldom(chat: Chat) -> None:
    chat.say("say before")
    chat.page.route("**/chatkit", lambda route: route.abort())
    chat.page.evaluate("dispatchEvent(new Event('focus'))")
    times = []
    for _ in range(4):
        with chat.page.expect_request("**/settings.json"):
            pass
        times.append(time.monotonic())
    assert times[3] - times[0] > 3
    expect(chat.page.locator("#banner")).to_contain_text("cannot be reached")
    chat.page.unroute("**/chatkit")
    expect(chat.page.locator("#banner")).to_be_empty()


def test_a_page_that_loads_while_the_service_restarts_waits_for_it(
    browser_context: BrowserContext, service: Service
) -> None:
    chat = new_chat(browser_context, service.url)
    chat.page.route("**/settings.json", lambda route: route.fulfill(status=502, body="<html>Bad gateway"), times=1)
    chat.open()
    expect(chat.page.locator("#banner")).to_be_empty()
    assert chat.problems == []


def test_a_lost_network_is_told_and_its_return_too(chat: Chat, browser_context: BrowserContext) -> None:
    chat.say("say before")
    browser_context.set_offline(True)
    expect(chat.page.get_by_role("alert").filter(has_text="cannot be reached")).to_be_visible()
    chat.begin("say meanwhile")
    expect(chat.message).to_have_value("say meanwhile")
    browser_context.set_offline(False)
    expect(chat.page.locator("#banner")).to_be_empty()
    chat.message.press("Enter")
    expect(chat.answer).to_contain_text("meanwhile")
    expect(chat.page.locator("article.user")).to_have_count(2)


def test_a_browser_that_forbids_storage_still_chats(browser: Browser, service: Service) -> None:
    context = browser.new_context()
    forbidden = "get() { throw new DOMException('no', 'SecurityError') }"
    for name in ("sessionStorage", "localStorage"):
        context.add_init_script(f"Object.defineProperty(window, '{name}', {{ {forbidden} }})")
    chat = new_chat(context, service.url).open()
    chat.button("Dark").click()
    chat.say("say it all the same")
    expect(chat.answer).to_contain_text("it all the same")
    assert chat.problems == []
    context.close()
