"""The app from end to end: its own server, our service with login, real Chromium. Only OpenAI's panel is a stand-in."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Route, expect

from browser.chat_page import keeping_pages, left
from frontend.app import PANEL_SCRIPT, PASSWORD, SECRET, App, Visitor, answer_once, started
from frontend.conftest import NewVisitor
from service import free_port
from settings import Settings

LIST = {"type": "threads.list", "params": {}}


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def refused_token(visitor: Visitor) -> str:
    """Return a token of the visitor's that the service does not take."""
    return visitor.token().rpartition(".")[0] + ".bm90IHNpZ25lZA"


def answer(visitor: Visitor) -> Any:
    return visitor.panel.locator("p").nth(1)


# --- signing in ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/chat", "/chat?thread=thr_1"])
def test_who_is_not_signed_in_gets_the_sign_in_page_and_no_chat(nobody: Visitor, path: str) -> None:
    nobody.go(path)
    expect(nobody.page).to_have_url(f"{nobody.app.url}/sign-in")
    expect(nobody.page.get_by_role("heading", name="Sign in")).to_be_visible()
    expect(nobody.panel).to_have_count(0)


def test_a_wrong_password_is_said_to_be_wrong(nobody: Visitor, alices_cookies: Any) -> None:
    nobody.sign_in("Alice", "another password")
    expect(nobody.alert).to_have_text("Invalid email or password")


def test_a_password_is_never_in_the_address_even_before_the_pages_scripts_run(browser: Browser, app: App) -> None:
    context = browser.new_context(java_script_enabled=False)
    visitor = Visitor(context, app)
    visitor.sign_in("Alice")
    visitor.page.wait_for_load_state()
    assert PASSWORD.split()[-1] not in visitor.page.url
    expect(visitor.page.get_by_role("heading", name="Sign in")).to_be_visible()
    context.close()


def test_signing_in_where_nothing_answers_can_be_tried_again(nobody: Visitor, alices_cookies: Any) -> None:
    nobody.page.route("**/api/auth/sign-in/**", lambda route: route.abort())
    nobody.sign_in("Alice")
    expect(nobody.alert).to_contain_text(f"The sign-in service does not answer at {nobody.app.url}.")
    nobody.page.unroute("**/api/auth/sign-in/**")
    nobody.press("Sign in")
    nobody.wait_for_panel()


def test_signing_in_at_another_name_of_the_machine_says_which_one_to_open(nobody: Visitor) -> None:
    url = nobody.app.url.replace("127.0.0.1", "localhost")
    nobody.page.goto(f"{url}/sign-in")
    nobody.page.get_by_label("E-mail").fill("alice@example.org")
    nobody.page.get_by_label("Password").fill(PASSWORD)
    nobody.press("Sign in")
    expect(nobody.alert).to_have_text(f"This page cannot reach the sign-in service: open the app at {nobody.app.url}.")


def test_signing_out_where_nothing_answers_says_that_one_is_still_signed_in(alice: Visitor) -> None:
    alice.open_chat()
    alice.page.route("**/api/auth/sign-out", lambda route: route.abort())
    alice.press("Sign out")
    expect(alice.alert).to_contain_text("You are still signed in")


# --- chatting -----------------------------------------------------------------------------------------------------


def test_a_new_user_signs_up_chats_uploads_and_finds_it_all_after_a_reload(nobody: Visitor) -> None:
    nobody.sign_up("Nora")
    nobody.wait_for_panel()
    expect(nobody.page.get_by_role("banner")).to_contain_text("Nora")
    nobody.say("Cite your sources")
    expect(answer(nobody)).to_contain_text("ChatKit is a chat panel")
    file = nobody.do("upload(...values)", "notes.txt", "text/plain", "Buy tea.")
    nobody.say("Cite once more", file)
    expect(nobody.panel).to_contain_text("Cite once more [notes.txt]")
    said = nobody.panel.locator("p").all_text_contents()
    nobody.page.reload()
    expect(nobody.panel.locator("p")).to_have_text(said)
    assert nobody.foreign == [PANEL_SCRIPT] * 3  # one for each page: sign-in, chat, chat again


def given_options(visitor: Visitor) -> Any:
    return json.loads(visitor.panel.evaluate("panel => JSON.stringify(panel.options)"))


def test_the_panel_is_given_the_apps_settings(alice: Visitor) -> None:
    alice.open_chat()
    options = given_options(alice)
    api = {"url": f"{alice.app.service_url}/chatkit", "domainKey": "domain_pk_of_the_tests"}
    assert options["api"] == {**api, "uploadStrategy": {"type": "two_phase"}}
    assert options["history"] == {"enabled": True, "showRename": True, "showDelete": True}
    assert options["threadItemActions"] == {"feedback": True, "retry": True}
    assert options["initialThread"] is None


@pytest.mark.parametrize("path", ["/chat", "/plain.html"])
def test_what_the_pages_offer_agrees_with_the_services_defaults(alice: Visitor, path: str) -> None:
    alice.open_chat(path)
    composer, defaults = given_options(alice)["composer"], Settings()
    attachments = composer["attachments"]
    assert (attachments["enabled"], attachments["maxSize"]) == (True, defaults.max_attachment_bytes)
    assert tuple(attachments["accept"]) == defaults.attachment_types
    assert tuple(composer.get("models", ())) == defaults.models
    assert composer["dictation"]["enabled"] == bool(defaults.transcribe_model)


def test_the_page_answers_the_assistants_tools(alice: Visitor) -> None:
    alice.open_chat()
    alice.say("What time is it on my page?")
    expect(alice.panel).to_contain_text('Your page has answered: {"time":')
    result = alice.do("options.onClientTool({ name: 'set_theme', params: { theme: 'dark' } })")
    assert result == {"theme": "dark"}
    expect(alice.page.locator("html")).to_have_css("color-scheme", "dark")
    assert alice.do("options.theme.colorScheme") == "dark"
    assert "no tool" in alice.do("options.onClientTool({ name: 'toString', params: {} })")["error"]


def test_a_widgets_action_is_the_pages_or_goes_on_to_the_agent(alice: Visitor) -> None:
    alice.open_chat()
    sent = alice.panel.evaluate(
        """async (panel) => {
            const sent = [];
            panel.sendCustomAction = async (...action) => void sent.push(action);
            const { onAction } = panel.options.widgets;
            await onAction({ type: "set_theme", payload: { theme: "dark" } }, { id: "item_1" });
            await onAction({ type: "demo.press", payload: { pressed: 1 } }, { id: "item_1" });
            return sent;
        }"""
    )
    assert sent == [[{"type": "demo.press", "payload": {"pressed": 1}}, "item_1"]]
    expect(alice.page.locator("html")).to_have_css("color-scheme", "dark")


def test_nothing_that_is_said_reaches_the_console(alice: Visitor) -> None:
    alice.open_chat()
    alice.panel.evaluate(
        """(panel) => {
            const tell = (name, detail) => panel.dispatchEvent(new CustomEvent(`chatkit.${name}`, { detail }));
            tell("error", { error: new TypeError("SENTINEL") });
            tell("log", { name: "sent", data: { text: "SENTINEL" } });
        }"""
    )
    assert "ChatKit: TypeError" in alice.console
    assert "ChatKit: sent" in alice.console
    assert "SENTINEL" not in str(alice.console)


# --- whose token, and whose things --------------------------------------------------------------------------------


def test_the_token_goes_to_the_service_alone_and_holds_no_more_than_a_name(alice: Visitor) -> None:
    alice.open_chat()
    with alice.page.expect_request(f"{alice.app.service_url}/chatkit") as to_service:
        alice.do("request('threads.list')")
    sent = to_service.value.headers["authorization"]
    claims = json.loads(base64.urlsafe_b64decode(sent.split(".")[1] + "=="))
    assert claims.keys() == {"iat", "exp", "iss", "aud", "sub", "name"}
    assert (claims["exp"] - claims["iat"], claims["iss"]) == (15 * 60, alice.app.url)
    open_to_all = {"access-control-allow-origin": "*"}
    alice.page.route("https://elsewhere.example/*", lambda route: route.fulfill(body="", headers=open_to_all))
    with alice.page.expect_request("https://elsewhere.example/x") as elsewhere:
        alice.do("options.api.fetch('https://elsewhere.example/x')")
    assert "authorization" not in elsewhere.value.headers


def test_an_expired_token_is_renewed_without_the_user_seeing_it(alice: Visitor) -> None:
    alice.go("/chat")
    alice.wait_for_panel()
    user_id = json.loads(base64.urlsafe_b64decode(alice.token().split(".")[1] + "=="))["sub"]
    expired = alice.app.expired_token(user_id)
    refused = alice.page.request.post(f"{alice.app.service_url}/chatkit", data=LIST, headers=bearer(expired))
    assert refused.json()["code"] == "token_expired"
    asked = answer_once(alice, "**/api/auth/token", json={"token": expired})
    statuses: list[int] = []
    alice.page.on("response", lambda response: statuses.append(response.status) if "/chatkit" in response.url else None)
    alice.say("Cite your sources")
    expect(answer(alice)).to_contain_text("ChatKit is a chat panel")
    expect(alice.panel).not_to_contain_text("Problem")
    assert (len(asked), statuses) == (2, [401, 200, 200])  # the turn, again, and its items


def test_requests_that_are_refused_together_share_one_renewal(alice: Visitor) -> None:
    alice.open_chat()
    asked = answer_once(alice, "**/api/auth/token", json={"token": refused_token(alice)})
    answers = alice.panel.evaluate("panel => Promise.all([1, 2, 3].map(() => panel.ask('threads.list')))")
    assert len(answers) == 3
    assert len(asked) == 2


def test_after_signing_out_the_same_request_is_refused(nobody: Visitor, alices_cookies: Any) -> None:
    nobody.sign_in("Alice")
    nobody.wait_for_panel()
    nobody.say("Cite your sources")
    thread = nobody.do("thread")
    nobody.press("Sign out")
    expect(nobody.page).to_have_url(f"{nobody.app.url}/sign-in")
    assert nobody.page.request.get(f"{nobody.app.url}/api/auth/token").status == 401
    request = {"type": "items.list", "params": {"thread_id": thread}}
    refused = nobody.page.request.post(f"{nobody.app.service_url}/chatkit", data=request)
    assert (refused.status, refused.json()["code"]) == (401, "token_missing")
    nobody.go(f"/chat?thread={thread}")
    expect(nobody.page).to_have_url(f"{nobody.app.url}/sign-in")


def test_a_session_that_ends_while_the_page_is_open_is_said_to_have_ended(alice: Visitor) -> None:
    alice.open_chat()
    alice.context.clear_cookies()
    alice.say("Cite your sources")
    expect(alice.panel).to_have_text("Problem: You are signed out. Sign in and send your message again.")
    expect(alice.alert).to_contain_text("You are signed out.")
    alice.alert.get_by_role("link", name="Sign in").click()
    expect(alice.page).to_have_url(f"{alice.app.url}/sign-in")


def test_signing_out_in_one_tab_ends_the_chat_in_the_others(nobody: Visitor, alices_cookies: Any) -> None:
    nobody.sign_in("Alice")
    nobody.wait_for_panel()
    first = nobody.page
    nobody.new_tab()
    nobody.open_chat()
    nobody.press("Sign out")
    expect(first).to_have_url(f"{nobody.app.url}/sign-in")


@pytest.mark.parametrize("path", ["/chat", "/plain.html"])
def test_a_page_takes_no_token_of_another_user_who_signs_in_in_the_same_browser(alice: Visitor, path: str) -> None:
    alice.open_chat(path)
    alice.do("ask('threads.list')")
    other = {"name": "Olga", "email": f"olga{path[1:5]}@example.org", "password": PASSWORD}
    address, origin = f"{alice.app.url}/api/auth/sign-up/email", {"origin": alice.app.url}
    # From here on the cookie is Olga's, and the page has not noticed.
    assert alice.page.request.post(address, data=other, headers=origin).ok
    cors = {"access-control-allow-origin": "*"}
    answer_once(alice, f"{alice.app.service_url}/chatkit", status=401, json={}, headers=cors)
    alice.say("ALICE'S SECRET: cite")
    expect(alice.panel).to_have_text("Problem: You are signed out. Sign in and send your message again.")
    olgas = alice.page.request.post(f"{alice.app.service_url}/chatkit", data=LIST, headers=bearer(alice.token()))
    assert olgas.json()["data"] == []


@pytest.fixture(scope="module")
def keeping(browser: Browser) -> Iterator[Browser]:
    with keeping_pages(browser) as started:
        yield started


def serve_to_be_kept(route: Route) -> None:
    """Serve a page without its `no-store`: Chromium then keeps it, as Safari does in any case."""
    response = route.fetch(max_redirects=0)
    headers = {name: value for name, value in response.headers.items() if name != "cache-control"}
    route.fulfill(response=response, headers=headers)


@pytest.mark.parametrize("path", ["/chat", "/plain.html"])
def test_back_shows_nobody_the_page_of_whoever_was_signed_in_before(keeping: Browser, app: App, path: str) -> None:
    permissions = ["local-network-access"]  # what `route` serves does not count as from this machine
    dora = Visitor(keeping.new_context(permissions=permissions), app)
    dora.sign_up(f"Dora{path[1:5]}")
    dora.wait_for_panel()
    dora.page.route(re.compile(rf"{re.escape(path)}(\?|$)"), serve_to_be_kept)
    dora.open_chat(path)
    dora.say("DORA'S SECRET: cite")
    expect(dora.panel).to_contain_text("SECRET")
    with left(dora.page, f"{app.url}/sign-in"):
        assert dora.page.request.post(f"{app.url}/api/auth/sign-out", data={}, headers={"origin": app.url}).ok
        dora.page.route("**/api/auth/get-session", lambda route: route.abort())  # what it would say comes too late
    expect(dora.page.get_by_text("SECRET")).to_have_count(0)
    expect(dora.page.get_by_text("Sign in").first).to_be_visible()
    dora.close()


def test_a_second_user_sees_nothing_of_the_first_ones(alice: Visitor, new_visitor: NewVisitor) -> None:
    alice.open_chat()
    alice.say("ALICE'S SECRET: cite")
    file = alice.do("upload(...values)", "secret.txt", "text/plain", "ALICE'S SECRET")
    thread = alice.do("thread")
    bob = new_visitor(None)
    bob.sign_up("Bob")
    bob.wait_for_panel()
    assert bob.do("ask('threads.list', { limit: 100 })")["data"] == []
    bob.open_chat(f"/chat?thread={thread}")
    expect(bob.panel).to_contain_text("Problem: ")
    bob.open_chat()
    bob.say("Cite", file)
    expect(bob.panel).to_contain_text("Problem: ")
    assert "SECRET" not in bob.page.content()
    assert thread in str(alice.do("ask('threads.list', { limit: 100 })"))


# --- what is not there --------------------------------------------------------------------------------------------


def test_a_panel_that_cannot_be_loaded_is_explained(alice: Visitor) -> None:
    alice.page.route(PANEL_SCRIPT, lambda route: route.abort())
    alice.go("/chat")
    expect(alice.alert).to_contain_text("It comes from cdn.platform.openai.com and did not start.")
    expect(alice.alert).to_contain_text("NEXT_PUBLIC_CHATKIT_DOMAIN_KEY (now domain_pk_of_the_tests)")
    alice.page.unroute(PANEL_SCRIPT)
    alice.press("Try again")
    alice.wait_for_panel()
    expect(alice.alert).to_have_count(0)


def test_a_panel_that_says_nothing_for_ten_seconds_is_explained(alice: Visitor) -> None:
    alice.page.clock.install(time=0)
    alice.page.route(PANEL_SCRIPT, lambda route: None)
    before = alice.page.evaluate("Date.now()")
    alice.page.goto(f"{alice.app.url}/chat", wait_until="commit")
    expect(alice.page.get_by_role("status")).to_have_text("Loading the chat …")
    waits_since = alice.page.evaluate("Date.now()")  # at the latest
    alice.page.clock.pause_at((before + 9_900) / 1000)
    expect(alice.alert).to_have_count(0)
    alice.page.clock.fast_forward(waits_since - before + 200)
    expect(alice.alert).to_contain_text("The chat panel is not there")


@pytest.mark.parametrize("path", ["/chat", "/plain.html"])
def test_a_service_that_does_not_answer_is_explained_until_it_does(alice: Visitor, path: str) -> None:
    everything = f"{alice.app.service_url}/**"
    alice.page.route(everything, lambda route: route.abort())
    alice.open_chat(path)
    alice.say("Cite your sources")
    notice = alice.alert if path == "/chat" else alice.page.get_by_role("status")
    for place in (alice.panel, notice):
        expect(place).to_contain_text(f"The chat service does not answer this page at {alice.app.service_url}.")
        expect(place).to_contain_text(f"does its ALLOWED_ORIGINS name {alice.app.url}?")
    alice.page.unroute(everything)
    alice.say("Cite your sources")
    expect(answer(alice)).to_contain_text("ChatKit is a chat panel")
    expect(notice).to_be_hidden()


@pytest.mark.parametrize("path", ["/chat", "/plain.html"])
def test_a_sign_in_service_that_does_not_answer_is_explained(alice: Visitor, path: str) -> None:
    alice.open_chat(path)
    notice = alice.alert if path == "/chat" else alice.page.get_by_role("status")
    alice.page.route("**/api/auth/token", lambda route: route.abort())
    alice.say("Cite your sources")
    expect(alice.panel).to_have_text("Problem: The sign-in service does not answer. Try again in a moment.")
    expect(notice).to_have_text("The sign-in service does not answer. Try again in a moment.")


def test_a_request_that_the_user_stops_is_no_problem(alice: Visitor) -> None:
    alice.open_chat()
    alice.do("ask('threads.list')")
    alice.page.route(f"{alice.app.service_url}/**", lambda route: None)
    with alice.page.expect_request(f"{alice.app.service_url}/chatkit"):
        alice.panel.evaluate(
            """(panel) => {
                panel.stopping = new AbortController();
                const { url, fetch } = panel.options.api;
                const stopped = fetch(url, { method: "POST", signal: panel.stopping.signal });
                panel.stopped = stopped.catch((error) => error.name);
            }"""
        )
    assert alice.panel.evaluate("async (panel) => (panel.stopping.abort(), panel.stopped)") == "AbortError"
    expect(alice.alert).to_have_count(0)


def test_the_panels_script_is_asked_for_by_the_page_itself(nobody: Visitor) -> None:
    html = nobody.page.request.get(f"{nobody.app.url}/sign-in").text()
    head = html.partition("</head>")[0]
    assert re.search(rf'<script src="{re.escape(PANEL_SCRIPT)}" async=""></script>', head)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("BETTER_AUTH_SECRET", SECRET[:31], "BETTER_AUTH_SECRET must be set"),
        ("NEXT_PUBLIC_API_URL", "localhost:8000", "NEXT_PUBLIC_API_URL must be an address that begins with http://"),
    ],
)
def test_a_server_that_cannot_read_a_setting_says_what_to_set(
    built: Path, tmp_path: Path, name: str, value: str, said: str
) -> None:
    environ = {"BETTER_AUTH_SECRET": SECRET, "AUTH_DATABASE": str(tmp_path / "auth.db"), name: value}
    with started(built, tmp_path, PORT=str(free_port()), **environ) as (process, log):
        assert process.wait(60) == 1
        assert said in log.read_text(encoding="utf-8")


# --- without React ------------------------------------------------------------------------------------------------


def test_the_page_without_react_chats_and_renews_its_token(alice: Visitor) -> None:
    asked = answer_once(alice, "**/api/auth/token", json={"token": refused_token(alice)})
    alice.open_chat("/plain.html")
    alice.say("What time is it on my page?")
    expect(alice.panel).to_contain_text('Your page has answered: {"time":')
    alice.page.reload()
    expect(alice.panel).to_contain_text("Your page has answered")
    assert len(asked) == 3


def test_the_page_without_react_leads_who_is_signed_out_to_the_sign_in(alice: Visitor) -> None:
    alice.open_chat("/plain.html")
    answer_once(alice, "**/api/auth/token", status=401)
    alice.say("Hello")
    notice = alice.page.get_by_role("status")
    expect(notice).to_have_text("You are signed out. Sign in and send your message again. Sign in")
    expect(notice.get_by_role("link", name="Sign in")).to_have_attribute("href", "/sign-in")


def test_the_page_without_react_says_that_the_panel_is_not_there(alice: Visitor) -> None:
    alice.page.clock.install()
    alice.page.route(PANEL_SCRIPT, lambda route: route.abort())
    alice.go("/plain.html")
    alice.page.clock.fast_forward(10_500)
    expect(alice.page.get_by_role("status")).to_contain_text("Is cdn.platform.openai.com reachable")
