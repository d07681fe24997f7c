from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, expect

from browser.chat_page import Chat, keeping_pages, left, new_chat
from browser.process import Service, running
from browser.standin import StandIn, standing_in
from browser.test_panel import SCRIPT, serve_element
from issuer import Issuer
from page import PageSettings


@pytest.fixture
def guarded() -> Iterator[StandIn]:
    with standing_in(PageSettings(login="sub")) as stand_in:
        stand_in.token = "good"
        yield stand_in


@pytest.fixture
def chat(browser: Browser, guarded: StandIn) -> Iterator[Chat]:
    context = browser.new_context()
    yield Chat(context.new_page(), guarded.url)
    context.close()


def sign_in(chat: Chat, token: str) -> None:
    chat.page.get_by_role("textbox", name="Token").fill(token)
    chat.button("Continue").click()


def test_a_token_is_asked_for_first_and_then_goes_with_every_request(chat: Chat, guarded: StandIn) -> None:
    chat.page.goto(guarded.url)
    expect(chat.page.get_by_role("dialog", name="Sign in")).to_contain_text("Paste a token from your sign-in.")
    assert guarded.requests == []
    sign_in(chat, "good")
    expect(chat.page.locator(".start")).to_be_visible()
    chat.begin("hello")
    expect(chat.answer).to_contain_text("Received.")


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with Issuer() as issuer:
        yield issuer


@pytest.fixture
def real(browser: Browser, issuer: Issuer, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Chat]:
    """The page of a service with a login, and with the settings that a test has as its parameter."""
    login = {"JWKS_URL": issuer.jwks_url, "JWT_ISSUER": issuer.url, **getattr(request, "param", {})}
    with running(Service(tmp_path / "chat.db", **login)) as service:
        chat = Chat(browser.new_page(), service.url)
        chat.page.goto(service.url)
        yield chat
        chat.page.close()


def test_the_services_own_login_is_passed_with_a_token_of_its_issuer(real: Chat, issuer: Issuer) -> None:
    sign_in(real, issuer.token(claims={"exp": 1}))
    expect(real.page.get_by_role("dialog")).to_contain_text("Your token has expired.")
    sign_in(real, issuer.token())
    real.say("say signed in")
    expect(real.answer).to_contain_text("signed in")


def spoil_token(chat: Chat) -> None:
    """Have the service refuse the page's token, so that it asks for another one."""
    chat.page.evaluate("sessionStorage.setItem('token', sessionStorage.getItem('token') + 'x')")
    chat.page.evaluate("dispatchEvent(new Event('focus'))")


def test_nobody_sees_what_was_shown_to_whoever_was_signed_in_before(real: Chat, issuer: Issuer) -> None:
    sign_in(real, issuer.token(claims={"sub": "alice"}))
    real.say("say what is alice's alone")
    alices = real.thread_id
    real.message.fill("a draft of alice's")
    spoil_token(real)
    sign_in(real, issuer.token(claims={"sub": "bob"}))
    expect(real.page.locator(".start")).to_be_visible()
    expect(real.page.get_by_text("alice's")).to_have_count(0)
    expect(real.message).to_have_value("")
    real.page.goto(f"{real.url}/?thread={alices}")
    expect(real.page.get_by_text("does not exist, or is not yours")).to_be_visible()
    real.say("say what is bob's alone")
    real.button("Sign out").click()
    expect(real.page.get_by_role("dialog", name="Sign in")).to_be_visible()
    real.page.go_back()
    expect(real.page.get_by_role("dialog", name="Sign in")).to_be_visible()
    expect(real.page.get_by_text("bob's")).to_have_count(0)


@pytest.mark.parametrize("real", [{"JWT_USER_CLAIM": "usuário"}], indirect=True)
def test_users_are_who_the_services_claim_says_and_not_another(real: Chat, issuer: Issuer) -> None:
    sign_in(real, issuer.token(claims={"sub": "7", "usuário": "a/7"}))
    real.message.fill("a draft of a's")
    spoil_token(real)
    sign_in(real, issuer.token(claims={"sub": "8", "usuário": "a/7"}))
    expect(real.page.get_by_role("dialog")).to_have_count(0)
    expect(real.message).to_have_value("a draft of a's")
    spoil_token(real)
    sign_in(real, issuer.token(claims={"sub": "8", "usuário": "b/7"}))
    expect(real.message).to_have_value("")


@pytest.fixture(scope="module")
def keeping(browser: Browser) -> Iterator[Browser]:
    with keeping_pages(browser) as started:
        yield started


@pytest.fixture(params=["own", "chatkit"])
def alices(keeping: Browser, guarded: StandIn, issuer: Issuer, request: pytest.FixtureRequest) -> Iterator[Chat]:
    """A page, ours or with OpenAI's panel, on which Alice is signed in and has something of hers."""
    chat = Chat(keeping.new_page(), guarded.url)
    chat.page.route(SCRIPT, serve_element)
    guarded.token = issuer.token(claims={"sub": "alice"})
    chat.page.goto(f"{chat.url}/?panel={request.param}")
    sign_in(chat, guarded.token)
    expect(chat.page.locator(".start, openai-chatkit")).to_be_visible()
    chat.page.evaluate("document.body.append('what is hers alone')")
    yield chat
    chat.page.close()


@pytest.mark.parametrize("successor", [None, "bob"])
def test_back_shows_nobody_the_page_of_whoever_was_signed_in_before(
    alices: Chat, guarded: StandIn, issuer: Issuer, successor: str | None
) -> None:
    dialog = alices.page.get_by_role("dialog", name="Sign in")
    with left(alices.page, alices.url):
        alices.button("Sign out").click()
        expect(dialog).to_be_visible()
        if successor:
            guarded.token = issuer.token(claims={"sub": successor})
            sign_in(alices, guarded.token)
            expect(alices.page.locator(".start")).to_be_visible()
    expect(alices.page.get_by_text("hers alone")).to_have_count(0)
    expect(dialog).to_have_count(0 if successor else 1)


def test_back_leaves_a_page_as_it_was_for_whoever_is_still_signed_in(alices: Chat) -> None:
    with left(alices.page, f"{alices.url}/web/icon.svg"):
        pass
    shown = alices.page.evaluate("fetch('settings.json').then(() => document.body.textContent)")
    assert "hers alone" in shown


def test_a_token_lasts_for_the_tab_and_is_not_kept_beyond_it(chat: Chat, guarded: StandIn) -> None:
    chat.page.goto(guarded.url)
    sign_in(chat, "good")
    chat.page.reload()
    expect(chat.page.locator(".start")).to_be_visible()
    other_tab = chat.page.context.new_page()
    other_tab.goto(guarded.url)
    expect(other_tab.get_by_role("dialog", name="Sign in")).to_be_visible()


@pytest.mark.parametrize(
    ("token", "words"), [("old", "Your token has expired."), ("wrong", "The service does not accept this token.")]
)
def test_a_token_that_is_not_taken_is_asked_for_again_with_the_reason(
    chat: Chat, guarded: StandIn, token: str, words: str
) -> None:
    chat.page.goto(guarded.url)
    sign_in(chat, token)
    expect(chat.page.get_by_role("dialog")).to_contain_text(words)
    sign_in(chat, "good")
    expect(chat.page.locator(".start")).to_be_visible()
    expect(chat.page.get_by_role("dialog")).to_have_count(0)


def test_a_token_that_expires_does_not_cost_the_message(chat: Chat, guarded: StandIn) -> None:
    chat.page.goto(guarded.url)
    sign_in(chat, "good")
    expect(chat.page.locator(".start")).to_be_visible()
    chat.page.evaluate("sessionStorage.setItem('token', 'old')")
    chat.begin("hello")
    expect(chat.page.get_by_role("dialog")).to_contain_text("Your token has expired.")
    sign_in(chat, "good")
    expect(chat.message).to_have_value("hello")
    chat.message.press("Enter")
    expect(chat.answer).to_contain_text("Received.")


def test_a_token_that_expires_before_a_file_is_attached_is_asked_for(browser_context: BrowserContext) -> None:
    settings = PageSettings(login="sub", attachments=True, max_attachment_bytes=9, attachment_types=("text/plain",))
    with standing_in(settings) as service:
        service.token = "good"
        chat = new_chat(browser_context, service.url)
        chat.page.add_init_script("sessionStorage.setItem('token', 'good')")
        chat.open()
        service.token = "new"
        chat.page.locator("#files").set_input_files({"name": "a.txt", "mimeType": "text/plain", "buffer": b"a"})
        expect(chat.page.get_by_role("dialog", name="Sign in")).to_be_visible()


def test_a_token_that_was_copied_with_line_breaks_is_put_together_again(chat: Chat, guarded: StandIn) -> None:
    chat.page.goto(guarded.url)
    sign_in(chat, " go\n  od\n")
    expect(chat.page.locator(".start")).to_be_visible()
    chat.begin("hello")
    expect(chat.answer).to_contain_text("Received.")


def test_a_token_that_no_header_can_carry_is_refused_with_words(chat: Chat, guarded: StandIn) -> None:
    chat.page.goto(guarded.url)
    sign_in(chat, "go…od")
    field = chat.page.get_by_role("textbox", name="Token")
    expect(field).to_be_focused()
    assert "unaccented letters" in field.evaluate("field => field.validationMessage")
    sign_in(chat, "good")
    expect(chat.page.locator(".start")).to_be_visible()


def test_escape_does_not_get_around_the_question(chat: Chat, guarded: StandIn) -> None:
    chat.page.goto(guarded.url)
    for _ in range(3):
        chat.page.keyboard.press("Escape")
    expect(chat.page.get_by_role("dialog", name="Sign in")).to_be_visible()


def test_signing_out_forgets_the_token(chat: Chat, guarded: StandIn) -> None:
    chat.page.goto(guarded.url)
    sign_in(chat, "good")
    chat.button("Sign out").click()
    expect(chat.page.get_by_role("dialog", name="Sign in")).to_be_visible()
    assert chat.page.evaluate("sessionStorage.getItem('token')") is None
