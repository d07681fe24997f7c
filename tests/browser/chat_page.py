"""The page as its user sees it."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, BrowserContext, Page, Request, expect, sync_playwright

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NO_CHROMIUM = "Chromium is needed: `apt-get install -y chromium`, or let CHROMIUM name its program."

expect.set_options(timeout=10_000)


def program() -> str:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        raise FileNotFoundError(NO_CHROMIUM)
    return path


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the system's Chromium. It keeps a loop running in this thread: no asynchronous test may run inside.

    Raises `FileNotFoundError` that says what to install.
    """
    path = program()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def keeping_pages(browser: Browser) -> Iterator[Browser]:
    """Start another Chromium that keeps the pages that are left for its Back button, as every user's does."""
    forbidden = ["--disable-back-forward-cache"]  # by Playwright: what it does after a navigation waits for a load
    other = browser.browser_type.launch(executable_path=program(), args=FLAGS, ignore_default_args=forbidden)
    yield other
    other.close()


@contextmanager
def left(page: Page, url: str) -> Iterator[None]:
    """Go elsewhere, and at the end Back to the page, which the browser must have kept."""
    page.evaluate("addEventListener('pageshow', ({ persisted }) => persisted && console.debug('kept'))")
    page.goto(url)
    yield
    with page.expect_console_message(lambda message: message.text == "kept"):
        page.go_back(wait_until="commit")


class Chat:
    def __init__(self, page: Page, url: str):
        self.page = page
        self.url = url
        self.problems: list[str] = []
        self.foreign: list[str] = []
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", lambda message: self._note(message.text) if message.type == "error" else None)
        page.on("request", lambda request: self._note_request(request.url))

    def _note(self, text: str) -> None:
        if not text.startswith("Failed to load resource"):  # an answer with an error status, or none
            self.problems.append(text)

    def _note_request(self, url: str) -> None:
        if not url.startswith((self.url, "data:", "blob:")):
            self.foreign.append(url)

    @property
    def message(self) -> Any:
        return self.page.get_by_role("textbox", name="Message", exact=True)

    @property
    def answer(self) -> Any:
        return self.page.locator("article.assistant").last

    @property
    def widget(self) -> Any:
        return self.page.locator("article.widget").last

    @property
    def stop(self) -> Any:
        return self.page.get_by_role("button", name="Stop")

    @property
    def thread_id(self) -> str:
        return self.page.url.partition("thread=")[2]

    def open(self, thread_id: str | None = None) -> "Chat":
        self.page.goto(f"{self.url}/?thread={thread_id}" if thread_id else f"{self.url}/")
        expect(self.page.locator("#conversation :is(.start, .scroller)")).to_be_visible()
        return self

    def begin(self, text: str) -> None:
        self.message.fill(text)
        self.message.press("Enter")

    def say(self, text: str) -> None:
        """Have one turn, to its end."""
        self.begin(text)
        expect(self.page.locator(".pending")).to_have_count(0)  # first: a new thread's turn has no Stop before
        expect(self.stop).to_be_hidden()

    def button(self, name: str, **more: Any) -> Any:
        return self.page.get_by_role("button", name=name, exact=True, **more)


def posted(request: Request) -> Any:
    """Return the parameters of a request to the service."""
    return json.loads(request.post_data or "{}")["params"]


def new_chat(context: BrowserContext, url: str) -> Chat:
    return Chat(context.new_page(), url)
