import re
from typing import Any

from playwright.sync_api import BrowserContext, Route, expect

from browser.chat_page import Chat, new_chat
from browser.process import Service


def titles(chat: Chat) -> Any:
    return chat.page.locator("#threads a bdi")


def test_a_message_opens_a_thread_that_the_address_carries_and_the_list_shows(chat: Chat, service: Service) -> None:
    chat.say("say hello")
    expect(chat.answer).to_contain_text("hello")
    assert [item["type"] for item in service.items(chat.thread_id)] == ["user_message", "assistant_message"]
    row = chat.page.locator("#threads li").first
    expect(row.locator("a")).to_have_attribute("aria-current", "page")
    expect(row.locator("time")).to_have_text(re.compile(r"\d\d:\d\d"))


def test_a_reload_shows_the_same_thread(chat: Chat) -> None:
    chat.say("say something to keep")
    chat.page.reload()
    expect(chat.answer).to_contain_text("something to keep")
    chat.say("say more")
    expect(chat.page.locator("article.assistant")).to_have_count(2)


def test_back_and_forward_walk_through_the_threads(chat: Chat, service: Service) -> None:
    first, second = service.say("say one"), service.say("say two")
    chat.open(first)
    chat.page.locator(f'[data-thread="{second}"] a').click()
    expect(chat.answer).to_contain_text("two")
    chat.page.go_back()
    expect(chat.answer).to_contain_text("one")
    assert chat.thread_id == first
    chat.page.go_forward()
    expect(chat.answer).to_contain_text("two")


def test_a_thread_is_renamed_from_the_list(chat: Chat, service: Service) -> None:
    chat.open(service.say("say x"))
    row = chat.page.locator(f'[data-thread="{chat.thread_id}"]')
    row.get_by_role("button").click()
    chat.button("Rename").click()
    chat.page.get_by_role("textbox", name="Title").fill("Tea & <b>cake</b>")
    chat.page.keyboard.press("Enter")
    expect(row.locator("bdi")).to_have_text("Tea & <b>cake</b>")
    expect(chat.page.get_by_role("heading", level=1)).to_have_text("Tea & <b>cake</b>")
    assert service.post("threads.get_by_id", thread_id=chat.thread_id)["title"] == "Tea & <b>cake</b>"


def test_a_thread_that_is_renamed_while_it_is_answered_keeps_its_new_title(chat: Chat, service: Service) -> None:
    chat.begin("steps held")
    expect(chat.page.locator("article.workflow")).to_have_count(1)
    chat.page.locator("#threads [aria-current] + button").click()
    chat.button("Rename").click()
    chat.page.get_by_role("textbox", name="Title").fill("Tea")
    chat.page.keyboard.press("Enter")
    expect(chat.page.get_by_role("heading", level=1)).to_have_text("Tea")
    service.say("go")
    expect(chat.stop).to_be_hidden()
    expect(chat.page.get_by_role("heading", level=1)).to_have_text("Tea")
    expect(chat.page).to_have_title("Tea · Chat")
    expect(chat.page.locator("#threads [aria-current] bdi")).to_have_text("Tea")


def test_a_click_in_the_list_is_not_lost_when_the_list_is_loaded_anew(chat: Chat, service: Service) -> None:
    first = service.say("say one")
    chat.open(service.say("say two"))
    chat.page.locator(f'[data-thread="{first}"] bdi').hover()
    chat.page.mouse.down()
    with chat.page.expect_response(lambda response: "items.list" in (response.request.post_data or "")):
        chat.page.evaluate("dispatchEvent(new Event('focus'))")  # the list comes before the items
    chat.page.mouse.up()
    expect(chat.answer).to_contain_text("one")


def test_an_open_menu_stays_open_when_the_list_changes(chat: Chat, service: Service) -> None:
    chat.open(service.say("say x"))
    chat.page.locator("#threads [aria-current] + button").click()
    expect(chat.button("Rename")).to_be_focused()
    newest = service.say("say y")
    service.say("say x again", chat.thread_id)
    chat.page.evaluate("dispatchEvent(new Event('focus'))")
    expect(chat.page.locator(f'[data-thread="{newest}"]')).to_be_visible()
    expect(chat.button("Rename")).to_be_focused()


def test_a_menu_that_is_opened_while_its_thread_is_loaded_keeps_the_focus(chat: Chat, service: Service) -> None:
    held: list[Route] = []

    def hold(route: Route) -> None:
        if "threads.get_by_id" in (route.request.post_data or ""):
            held.append(route)
        else:
            route.continue_()

    chat.page.route("**/chatkit", hold)
    chat.page.goto(f"{chat.url}/?thread={service.say('say x')}")
    chat.page.locator("#threads [aria-current] + button").click()
    expect(chat.button("Rename")).to_be_focused()
    for route in held:
        route.continue_()
    expect(chat.answer).to_contain_text("x")
    chat.page.evaluate("new Promise(requestAnimationFrame)")
    expect(chat.button("Rename")).to_be_focused()


def test_a_thread_is_deleted_only_when_that_is_confirmed(chat: Chat, service: Service) -> None:
    thread_id = service.say("say x")
    chat.open(thread_id)
    row = chat.page.locator(f'[data-thread="{thread_id}"]')
    row.get_by_role("button").click()
    chat.button("Delete").click()
    chat.button("Cancel").click()
    expect(row).to_be_visible()
    row.get_by_role("button").click()
    chat.button("Delete").click()
    chat.page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(row).to_have_count(0)
    expect(chat.page.locator(".start")).to_be_visible()
    assert chat.thread_id == ""


def test_a_long_list_of_threads_is_paged(browser_context: BrowserContext, own_service: Service) -> None:
    own_service.seed(threads=45)
    chat = new_chat(browser_context, own_service.url).open()
    expect(titles(chat)).to_have_count(30)
    expect(titles(chat).first).to_have_text("Seeded 44")
    chat.button("Show older").click()
    expect(titles(chat)).to_have_count(45)
    expect(chat.button("Show older")).to_be_hidden()
    assert chat.problems == []


def test_a_long_thread_opens_at_its_end_and_shows_earlier_items_when_scrolled_up(
    browser_context: BrowserContext, own_service: Service
) -> None:
    [thread_id] = own_service.seed(turns=60)
    chat = new_chat(browser_context, own_service.url).open(thread_id)
    articles = chat.page.locator("article")
    expect(chat.answer).to_be_in_viewport()
    expect(chat.answer).to_contain_text("Answer 59")
    assert articles.count() < 120
    for _ in range(10):
        if articles.count() == 120:
            break
        chat.page.locator(".scroller").evaluate("scroller => scroller.scrollTop = 0")
        chat.page.wait_for_timeout(300)
    expect(articles).to_have_count(120)
    expect(articles.first).to_contain_text("Question 0")
    expect(chat.button("Show earlier")).to_be_hidden()
    assert chat.problems == []


def test_a_thread_that_does_not_exist_is_said_to_be_missing(chat: Chat) -> None:
    chat.open("thr_nothing")
    expect(chat.page.get_by_role("alert").filter(has_text="does not exist")).to_be_visible()
    expect(chat.page.locator(".start")).to_be_visible()
    assert chat.thread_id == ""


def test_the_way_back_leads_past_a_thread_that_does_not_exist(chat: Chat, service: Service) -> None:
    chat.open(service.say("say before it"))
    chat.open("thr_nothing")
    expect(chat.page.get_by_role("alert").filter(has_text="does not exist")).to_be_visible()
    chat.page.go_back()
    expect(chat.answer).to_contain_text("before it")


def test_an_answer_goes_on_while_another_thread_is_looked_at(chat: Chat, service: Service) -> None:
    other = service.say("say other")
    chat.open()
    chat.begin("reasoning held")
    workflow = chat.page.locator("article.workflow")
    expect(workflow.locator("summary")).to_have_text("Thinking …")
    slow = chat.thread_id
    chat.page.locator(f'[data-thread="{other}"] a').click()
    expect(chat.answer).to_contain_text("other")
    expect(chat.page.locator(f'[data-thread="{slow}"]')).to_contain_text("answering")
    service.say("go")
    chat.page.locator(f'[data-thread="{slow}"] a').click()
    expect(workflow.get_by_text("Tea needs hot water.")).to_be_visible()
    service.say("go")
    expect(workflow.locator("summary")).to_contain_text("Thought for")
    expect(chat.stop).to_be_hidden()
    assert len(service.items(slow)) == 2
