"""OpenAI's panel, with a stand-in for its script: the page asks for it where it is wanted and gives it the settings."""

import urllib.request
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from browser.chat_page import Chat
from browser.standin import StandIn, standing_in
from page import PageSettings

SCRIPT = "https://cdn.platform.openai.com/deployments/chatkit/chatkit.js"
ELEMENT = """
customElements.define("openai-chatkit", class extends HTMLElement {
  setOptions(options) {
    window.options = options;
    this.textContent = "panel";
    setTimeout(() => this.dispatchEvent(new CustomEvent("chatkit.ready")));
  }
});
"""


@pytest.fixture(scope="module")
def keyed() -> Iterator[StandIn]:
    settings = PageSettings(
        login="sub", domain_key="domain_pk_1", models=("small",), attachments=True, max_attachment_bytes=5,
        attachment_types=("image/png",),
    )  # fmt: skip
    with standing_in(settings) as stand_in:
        stand_in.token = "good"
        yield stand_in


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context()
    context.add_init_script("sessionStorage.setItem('token', 'good')")
    yield context.new_page()
    context.close()


def serve_element(route: Route) -> None:
    route.fulfill(body=ELEMENT, content_type="text/javascript")


def test_a_real_domain_key_brings_the_panel_with_the_settings_of_the_service(page: Page, keyed: StandIn) -> None:
    page.route(SCRIPT, serve_element)
    page.goto(f"{keyed.url}/?thread=thr_1")
    expect(page.locator("openai-chatkit")).to_have_text("panel")
    options = page.evaluate("JSON.parse(JSON.stringify(options))")
    assert options["api"] == {
        "url": f"{keyed.url}/chatkit", "domainKey": "domain_pk_1", "uploadStrategy": {"type": "two_phase"},
    }  # fmt: skip
    assert options["startScreen"]["greeting"] == "What can I help with?"
    assert options["initialThread"] == "thr_1"
    assert options["theme"] in ("light", "dark")
    assert options["composer"]["attachments"] == {"enabled": True, "maxSize": 5, "accept": {"image/png": []}}
    assert options["composer"]["models"] == [{"id": "small", "label": "small"}]


def test_its_fetch_shows_the_token_to_this_service_alone(page: Page, keyed: StandIn) -> None:
    page.route(SCRIPT, serve_element)
    page.goto(f"{keyed.url}/")
    expect(page.locator("openai-chatkit")).to_have_text("panel")
    request = (
        "options.api.fetch(options.api.url, {method: 'POST', body: JSON.stringify({type: 'threads.list', params: {}})})"
    )
    assert page.evaluate(f"{request}.then((answer) => answer.status)") == 200
    headers = page.evaluate(
        """async () => {
            const sent = [];
            window.fetch = async (address, { headers }) => {
                sent.push([...headers.keys()]);
                return new Response();
            };
            await options.api.fetch("https://elsewhere.example/x", {});
            await options.api.fetch(new Request("chatkit"));
            return sent;
        }"""
    )
    assert headers == [[], ["authorization"]]


def test_a_panel_that_cannot_be_loaded_is_explained_and_the_own_page_is_offered(page: Page, keyed: StandIn) -> None:
    page.route(SCRIPT, lambda route: route.abort())
    page.goto(f"{keyed.url}/")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("It could not be loaded. It comes from cdn.platform.openai.com.")
    expect(alert).to_contain_text("CHATKIT_DOMAIN_KEY (now domain_pk_1)")
    alert.get_by_role("link", name="Use the page of this service instead").click()
    expect(page.locator(".start")).to_be_visible()


@pytest.mark.parametrize("script", [None, ELEMENT.replace("chatkit.ready", "never")])
def test_a_panel_that_says_nothing_for_ten_seconds_is_explained(page: Page, keyed: StandIn, script: str | None) -> None:
    unanswered: list[Route] = []
    page.clock.install(time=0)
    page.clock.pause_at(1_000)  # only the test moves it: a busy machine may need seconds for what comes next
    page.route(
        SCRIPT,
        lambda route: (
            route.fulfill(body=script, content_type="text/javascript") if script else unanswered.append(route)
        ),
    )
    page.goto(f"{keyed.url}/", wait_until="commit")
    expect(page.locator("openai-chatkit" if script else f'script[src="{SCRIPT}"]')).to_be_attached(timeout=30_000)
    page.clock.fast_forward(9_900)
    expect(page.get_by_role("alert")).to_have_count(0)
    page.clock.fast_forward(200)
    expect(page.get_by_role("alert")).to_contain_text("within 10 seconds")
    for route in unanswered:
        route.abort()


def test_the_panel_is_there_for_the_asking_with_the_local_key(chat: Chat) -> None:
    chat.page.route(SCRIPT, serve_element)
    chat.page.goto(f"{chat.url}/?panel=chatkit")
    expect(chat.page.locator("openai-chatkit")).to_have_text("panel")
    assert chat.page.evaluate("options.api.domainKey") == "localhost-dev"
    chat.foreign.clear()  # the panel's script


def test_only_the_panels_policy_lets_its_host_in(keyed: StandIn) -> None:
    policies = {}
    for choice in ("chatkit", "own"):
        with urllib.request.urlopen(f"{keyed.url}/?panel={choice}") as answer:
            policies[choice] = answer.headers["content-security-policy"]
    assert "script-src 'self' https://cdn.platform.openai.com;" in policies["chatkit"]
    assert "https:" not in policies["own"]
