import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, expect

from browser.chat_page import Chat, new_chat, posted
from browser.process import Service
from browser.standin import NOW, StandIn, event, standing_in, thread
from page import PageSettings


def test_a_card_shows_its_parts(chat: Chat) -> None:
    chat.say("card")
    widget = chat.widget
    expect(widget.get_by_role("heading", name="Two cups of tea")).to_be_visible()
    expect(widget.get_by_text("On its way")).to_be_visible()
    expect(widget.locator("svg rect")).to_have_count(10)
    expect(widget.get_by_role("table", name="Chart")).to_contain_text("Black tea")
    expect(widget.get_by_role("button", name="Confirm")).to_be_visible()


@pytest.mark.parametrize(
    ("button", "said"),
    [
        ("Streamed", 'echo: {"n": 1}'),
        ("At once", 'echo: {"n": 2}'),
        ("Yes", 'echo: {"card": "confirmed"}'),
        ("No", 'echo: {"card": "cancelled"}'),
    ],
)
def test_an_action_goes_to_the_service_and_what_comes_back_replaces_the_widget(
    chat: Chat, button: str, said: str
) -> None:
    chat.say("buttons")
    chat.button(button).click()
    expect(chat.widget).to_contain_text(said)
    chat.page.reload()
    expect(chat.widget).to_contain_text(said)


def test_a_widget_that_waits_as_a_whole_is_out_of_reach_meanwhile(chat: Chat, service: Service) -> None:
    chat.say("buttons")
    chat.button("Container").click()
    assert chat.widget.evaluate("widget => widget.inert")
    service.say("go")
    expect(chat.widget).to_contain_text('wait: {"n": 3}')
    expect(chat.stop).to_be_hidden()
    assert not chat.widget.evaluate("widget => widget.inert")


def test_an_action_for_the_page_is_done_by_the_page(chat: Chat) -> None:
    chat.say("buttons")
    chat.button("Here").click()
    expect(chat.page.locator("html")).to_have_attribute("data-theme", "dark")
    chat.button("Nowhere").click()
    expect(chat.page.get_by_text("This page has no action named no_such_action.")).to_be_visible()


def test_an_action_that_fails_leaves_the_widget_and_says_why(chat: Chat) -> None:
    chat.say("buttons")
    chat.button("Unwanted").click()
    expect(chat.page.get_by_role("alert").filter(has_text="Not today.")).to_be_visible()
    expect(chat.button("Unwanted")).to_be_enabled()
    assert not chat.button("Unwanted").evaluate("button => button.inert")


def test_a_form_collects_its_fields_into_the_payload(chat: Chat) -> None:
    chat.say("form")
    form = chat.widget
    form.get_by_role("textbox", name="Your name").fill("Ada")
    form.get_by_role("textbox", name="About you").fill("counts")
    form.get_by_role("radio", name="Large").check()
    form.get_by_role("checkbox", name="With sugar").check()
    form.get_by_role("textbox", name="title").fill("Countess")
    form.get_by_role("button", name="Order").click()
    expect(form).to_contain_text("echo:")
    payload = json.loads(form.locator(".text").inner_text().partition(": ")[2])
    assert payload == {
        "id": 7,
        "fixed": "kept",  # what the action says is not overwritten by a field of that name
        "person": {"name": "Ada", "about": "counts"},
        "drink": "",
        "size": "l",
        "sugar": True,
        "when": "2030-01-02",
        "title": "Countess",
    }


def test_a_form_with_a_missing_field_is_not_sent(chat: Chat) -> None:
    chat.say("form")
    chat.button("Order").click()
    assert chat.widget.get_by_role("textbox", name="Your name").evaluate("field => field.matches(':invalid:focus')")
    expect(chat.button("Order")).to_be_visible()


def test_a_changed_field_tells_the_form_around_it(chat: Chat) -> None:
    chat.say("form")
    with chat.page.expect_request(lambda request: "sync_custom_action" in (request.post_data or "")) as sent:
        chat.widget.get_by_role("combobox", name="Choose a drink").select_option("Coffee")
    action = posted(sent.value)["action"]
    assert action["type"] == "changed"
    assert action["payload"]["drink"] == "coffee"
    assert action["payload"]["size"] == "s"


def test_a_card_as_a_form_checks_and_sends_its_fields(chat: Chat) -> None:
    chat.say("as-form")
    mail = chat.widget.get_by_role("textbox", name="Mail")
    mail.fill("no mail")
    chat.widget.get_by_role("button", name="Send").click()
    expect(mail).to_be_visible()
    mail.fill("ada@example.org")
    chat.widget.get_by_role("button", name="Send").click()
    expect(chat.widget).to_contain_text('echo: {"mail": "ada@example.org"}')


def test_a_list_shows_more_when_asked_and_its_rows_are_buttons(chat: Chat) -> None:
    chat.say("list")
    expect(chat.widget.get_by_text("Result 3")).to_be_hidden()
    chat.button("Show more").click()
    expect(chat.widget.get_by_role("button", name="Result 3")).to_be_focused()
    chat.page.keyboard.press("Enter")
    expect(chat.widget).to_contain_text('echo: {"row": 3}')


def test_text_grows_inside_a_widget_and_its_parts_are_replaced(chat: Chat, service: Service) -> None:
    chat.begin("growing")
    expect(chat.widget).to_contain_text("This text grows inside a widget.")
    service.say("go")
    expect(chat.widget).to_contain_text("Finished")


def test_every_component_is_drawn_and_loads_nothing_from_elsewhere(chat: Chat) -> None:
    chat.say("gallery")
    widget = chat.widget
    expect(widget.get_by_role("img", name="A dot")).to_be_visible()
    expect(widget.get_by_text("Image: Far away (https://evil.example/x.png)")).to_be_visible()
    expect(widget.get_by_text("In transition")).to_be_visible()
    expect(widget.get_by_text("In a cell")).to_be_visible()
    expect(widget.locator("polyline")).to_have_count(2)
    expect(widget.locator("strong")).to_have_text("Markdown")
    assert (
        widget.get_by_text("Struck out").evaluate("text => getComputedStyle(text).textDecorationLine") == "line-through"
    )


@contextmanager
def shown(context: BrowserContext, **card: Any) -> Iterator[tuple[Chat, StandIn]]:
    """A conversation with a card, answered by a stand-in that notes what it is asked."""
    base = {"thread_id": "thr_1", "created_at": NOW}
    words = {"content": [{"type": "input_text", "text": "show it"}], "attachments": []}
    items = [
        {"id": "u", "type": "user_message", **base, **words},
        {"id": "w", "type": "widget", **base, "widget": {"type": "Card", **card}},
    ]
    with standing_in(PageSettings()) as service:
        service.raw_stream = b"".join(
            [event("thread.created", thread=thread()), *(event("thread.item.done", item=item) for item in items)]
        )
        chat = new_chat(context, service.url).open()
        chat.say("show it")
        yield chat, service
        assert chat.problems + chat.foreign == []


@pytest.mark.parametrize("payload", [{"a": "text"}, {"a": None}, {"a": {"b": [1]}}])
def test_a_field_whose_name_leads_into_no_object_leaves_the_payload_alone(
    browser_context: BrowserContext, payload: Any
) -> None:
    fields = [{"type": "Input", "name": "a.b.c", "defaultValue": "x"}]
    confirm = {"label": "Send", "action": {"type": "go", "payload": payload}}
    with shown(browser_context, asForm=True, children=fields, confirm=confirm) as (chat, service):
        with chat.page.expect_response(lambda response: "custom_action" in (response.request.post_data or "")):
            chat.widget.get_by_role("button", name="Send").click()
        [sent] = [each["params"] for each in service.requests if each["type"] == "threads.custom_action"]
        assert sent["action"]["payload"] == payload


def test_a_list_with_a_limit_below_one_shows_all(browser_context: BrowserContext) -> None:
    rows = [{"type": "ListViewItem", "children": [{"type": "Text", "value": f"Row {number}"}]} for number in range(3)]
    with shown(browser_context, children=[{"type": "ListView", "limit": -1, "children": rows}]) as (chat, _):
        expect(chat.widget.get_by_text("Row 2")).to_be_visible()
        expect(chat.button("Show more")).to_have_count(0)


@pytest.mark.parametrize("name", ["constructor", "__proto__"])
def test_an_icon_named_like_a_part_of_the_language_is_a_dot(browser_context: BrowserContext, name: str) -> None:
    with shown(browser_context, children=[{"type": "Icon", "name": name}]) as (chat, _):
        expect(chat.widget.locator("path")).to_have_attribute("d", re.compile("^M12 10.5"))


def test_a_widget_never_covers_what_is_around_it(browser_context: BrowserContext) -> None:
    cover = {"type": "Box", "width": 5000, "height": 5000, "margin": -500, "background": "red"}
    with shown(browser_context, children=[{**cover, "children": []}]) as (chat, _):
        words = chat.page.locator("article.user .bubble")
        words.scroll_into_view_if_needed()
        words.click(timeout=5000)  # which what covers it would take


def test_a_colour_of_a_chart_names_no_address(browser_context: BrowserContext) -> None:
    series = [{"type": "bar", "dataKey": "v", "color": "url(https://evil.example/a.svg#x)"}]
    chart = {"type": "Chart", "data": [{"d": "Mon", "v": 1}], "series": series, "xAxis": "d"}
    with shown(browser_context, children=[chart]) as (chat, _):
        expect(chat.widget.locator("rect")).to_have_attribute("fill", re.compile("^oklch"))


def test_a_chart_of_gains_and_losses_has_a_line_at_zero(browser_context: BrowserContext) -> None:
    data = [{"d": "Mon", "v": 8}, {"d": "Tue", "v": -3}]
    chart = {
        "type": "Chart",
        "data": data,
        "series": [{"type": "bar", "dataKey": "v"}],
        "xAxis": "d",
        "showYAxis": True,
    }
    with shown(browser_context, children=[chart]) as (chat, _):
        expect(chat.widget.locator("text[text-anchor=end]")).to_have_text(["-5", "0", "10"])


def test_a_card_without_padding_has_none(browser_context: BrowserContext) -> None:
    with shown(browser_context, padding=0, children=[{"type": "Text", "value": "At the edge"}]) as (chat, _):
        assert chat.widget.locator(".card").evaluate("card => getComputedStyle(card).padding") == "0px"


def test_odd_components_are_shown_as_what_they_say_and_break_nothing(chat: Chat, service: Service) -> None:
    chat.say("odd")
    for text in ("A hologram", "inside it", "Still here"):
        expect(chat.widget.get_by_text(text)).to_be_visible()
    chat.say("say fine")
    expect(chat.answer).to_contain_text("fine")
