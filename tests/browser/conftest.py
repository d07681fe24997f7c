"""Real Chromium against the real service."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext

from browser.chat_page import Chat, chromium, new_chat
from browser.process import Service, running


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all tests that do not stop or configure it."""
    with running(Service(tmp_path_factory.mktemp("service") / "chat.db", MODELS="small,large")) as shared:
        yield shared


@pytest.fixture(scope="module")
def own_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service for the tests of one module, which count what is there."""
    with running(Service(tmp_path_factory.mktemp("own") / "chat.db")) as own:
        yield own


@pytest.fixture(scope="package")
def shared_context(browser: Browser) -> Iterator[BrowserContext]:
    """One profile for all tests: its cache is warm. Each test has a page of its own, and leaves no storage behind."""
    context = browser.new_context(viewport={"width": 1100, "height": 800}, reduced_motion="reduce")
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    yield context
    context.close()


@pytest.fixture
def browser_context(shared_context: BrowserContext) -> Iterator[BrowserContext]:
    yield shared_context
    for page in shared_context.pages:
        if page.url.startswith("http"):
            page.evaluate("localStorage.clear()")
        page.close()


@pytest.fixture
def chat(browser_context: BrowserContext, service: Service) -> Iterator[Chat]:
    """The start screen. A script error, a breach of the page's policy or a request to elsewhere fails the test."""
    opened = new_chat(browser_context, service.url).open()
    yield opened
    assert opened.problems == []
    assert opened.foreign == []
