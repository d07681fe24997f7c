"""For everybody: by keyboard, with a screen reader, on a phone, in the dark, behind a prefix."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from browser.chat_page import Chat
from browser.process import Service
from browser.standin import standing_in
from page import PageSettings

AXE = (Path(__file__).parent / "vendor" / "axe.min.js").read_text(encoding="utf-8")


def violations(page: Page) -> list[str]:
    page.evaluate(AXE)
    found: list[Any] = page.evaluate(
        "axe.run(document, {resultTypes: ['violations']}).then((result) => result.violations)"
    )
    return [f"{each['id']}: {node['html'][:200]} {node['failureSummary']}" for each in found for node in each["nodes"]]


def test_axe_finds_nothing_on_the_start_screen(chat: Chat) -> None:
    assert violations(chat.page) == []


def test_axe_finds_nothing_in_a_chat_with_everything_light_or_dark(chat: Chat) -> None:
    for scene in ("markdown", "workflow", "sources", "card", "form", "list", "gallery", "notice", "questions"):
        chat.say(scene)
    chat.page.locator("article.workflow summary").first.click()
    # What is scrolled away is not painted, and axe cannot see its colours.
    for chunk in chat.page.locator(".chunk").all():
        chunk.evaluate("chunk => chunk.style.setProperty('content-visibility', 'visible')")
    for button in ("Dark", "Light"):
        chat.button(button).click()
        assert violations(chat.page) == []


def test_axe_finds_nothing_after_an_error_and_in_a_dialog(chat: Chat) -> None:
    chat.say("fail-once axe")
    assert violations(chat.page) == []
    chat.page.locator("#threads [aria-current] + button").click()
    chat.button("Rename").click()
    assert violations(chat.page) == []


@pytest.fixture
def phone(browser: Browser, service: Service) -> Iterator[Chat]:
    context = browser.new_context(viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    yield Chat(context.new_page(), service.url).open()
    context.close()


def test_on_a_phone_the_list_is_a_drawer(phone: Chat, service: Service) -> None:
    thread_id = service.say("say from the drawer")
    phone.page.reload()
    row = phone.page.locator(f'[data-thread="{thread_id}"] a')
    expect(row).to_be_attached()  # by then the page takes clicks
    expect(row).to_be_hidden()
    phone.button("Conversations").tap()
    expect(row).to_be_visible()
    expect(phone.button("New conversation")).to_be_focused()
    assert violations(phone.page) == []
    row.tap()
    expect(row).to_be_hidden()
    expect(phone.answer).to_contain_text("from the drawer")


def test_on_a_phone_everything_fits_and_axe_finds_nothing(phone: Chat) -> None:
    for scene in ("markdown", "card", "form"):
        phone.say(scene)
    assert phone.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert phone.page.locator(".scroller").evaluate("scroller => scroller.scrollWidth <= scroller.clientWidth")
    assert violations(phone.page) == []


def test_on_a_phone_words_in_a_table_stay_whole(phone: Chat) -> None:
    phone.say("say | Day | Cake | Tea |\n| --- | --- | --- |\n| Wednesday |" + "sweet and sour " * 20 + "| 3 |\n")
    day = phone.answer.locator("tbody td").first
    lines = "cell => { const text = new Range(); text.selectNodeContents(cell); return text.getClientRects().length; }"
    assert day.evaluate(lines) == 1


def test_escape_closes_the_drawer_and_gives_the_focus_back(phone: Chat) -> None:
    phone.button("Conversations").tap()
    phone.page.keyboard.press("Escape")
    expect(phone.button("Conversations")).to_be_focused()


def test_the_theme_follows_the_system_until_it_is_chosen(chat: Chat) -> None:
    def background() -> str:
        return str(chat.page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))

    light = background()
    chat.page.emulate_media(color_scheme="dark")
    dark = background()
    assert light != dark
    chat.button("Light").click()
    assert background() == light
    chat.page.reload()
    assert background() == light


def test_a_conversation_needs_no_mouse(chat: Chat) -> None:
    keyboard = chat.page.keyboard
    expect(chat.message).to_be_focused()
    keyboard.type("buttons")
    keyboard.press("Enter")
    expect(chat.widget).to_be_visible()
    expect(chat.stop).to_be_hidden()  # the next turn begins when this one is over
    expect(chat.message).to_be_focused()
    for _ in range(12):  # back from the message field, over the tail and the last buttons of the widget
        keyboard.press("Shift+Tab")
        if chat.button("Streamed").evaluate("button => button === document.activeElement"):
            break
    keyboard.press("Enter")
    expect(chat.widget).to_contain_text('echo: {"n": 1}')


def test_the_skip_link_leads_to_the_message_field(chat: Chat) -> None:
    chat.button("New conversation").focus()
    chat.page.keyboard.press("Shift+Tab")
    expect(chat.page.get_by_role("link", name="Skip to the message field")).to_be_in_viewport()
    chat.page.keyboard.press("Enter")
    expect(chat.message).to_be_focused()


def test_the_menu_of_a_thread_is_used_by_keyboard(chat: Chat) -> None:
    chat.say("say x")
    chat.page.locator("#threads [aria-current]").focus()
    chat.page.keyboard.press("Tab")
    chat.page.keyboard.press("Enter")
    expect(chat.button("Rename")).to_be_focused()
    chat.page.keyboard.press("Enter")
    expect(chat.page.get_by_role("dialog").get_by_role("textbox")).to_be_focused()
    chat.page.keyboard.type("By keyboard")
    chat.page.keyboard.press("Enter")
    expect(chat.page.locator("#threads [aria-current] bdi")).to_have_text("By keyboard")
    expect(chat.page.locator("#threads [aria-current]")).to_be_focused()


def test_a_screen_reader_hears_the_answer_once_when_it_is_complete(chat: Chat) -> None:
    chat.begin("say to be heard")
    expect(chat.page.get_by_role("status").filter(has_text="to be heard")).to_have_text("to be heard")
    assert chat.page.locator("[aria-live]").count() == 0  # the growing text itself would be read again and again


def test_escape_in_the_message_field_stops_the_answer(chat: Chat) -> None:
    chat.begin("slow")
    expect(chat.answer).to_contain_text("word2")
    chat.page.keyboard.press("Escape")
    expect(chat.page.get_by_text("Stopped.")).to_be_visible()


def test_the_page_works_under_a_prefix_that_a_proxy_strips(browser: Browser) -> None:
    with standing_in(PageSettings(), prefix="/chat") as service:
        chat = Chat(browser.new_page(), service.url).open()
        chat.begin("hello")
        expect(chat.answer).to_contain_text("Received.")
        assert chat.page.url == f"{service.url}/?thread=thr_1"
        assert chat.problems + chat.foreign == []
        chat.page.close()
