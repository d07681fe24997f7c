"""The built app, our service with login, and users in Chromium."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from browser.chat_page import chromium
from browser.process import Service
from browser.process import running as service_running
from frontend.app import App, Visitor, build, running
from service import free_port


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="package")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds all of the app's server."""
    folder = tmp_path_factory.mktemp("built")
    build(folder)
    return folder


@pytest.fixture(scope="package")
def app(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """The app and our service, which answers with the offline demo and asks for the app's tokens."""
    folder, port = tmp_path_factory.mktemp("app"), free_port()
    put_in(built / "public" / "plain.html", "http://127.0.0.1:8000", f"http://127.0.0.1:{port}")
    with running(built, folder, port) as app:
        service = Service(
            folder / "chat.db",
            AGENT="agent",
            PORT=str(port),
            BETTER_AUTH_JWKS_URL=f"{app.url}/api/auth/jwks",
            BETTER_AUTH_ISSUER=app.url,
            ALLOWED_ORIGINS=app.url,
        )
        with service_running(service):
            yield app


def put_in(file: Path, default: str, value: str) -> None:
    """Change a file as the one who takes it over does."""
    text = file.read_text(encoding="utf-8")
    assert text.count(default) == 1
    file.write_text(text.replace(default, value), encoding="utf-8")


NewVisitor = Callable[[dict[str, Any] | None], Visitor]


@pytest.fixture
def new_visitor(browser: Browser, app: App) -> Iterator[NewVisitor]:
    """Make visitors, with the cookies that are given. A problem that they note fails the test."""
    visitors: list[Visitor] = []

    def make(state: Any = None) -> Visitor:
        visitors.append(Visitor(browser.new_context(storage_state=state), app))
        return visitors[-1]

    yield make
    for visitor in visitors:
        visitor.close()
    assert [visitor.problems for visitor in visitors if visitor.problems] == []


def signed_up(browser: Browser, app: App, name: str) -> Any:
    """Sign a new user up and return their cookies."""
    visitor = Visitor(browser.new_context(), app)
    visitor.sign_up(name)
    visitor.wait_for_panel()
    state = visitor.context.storage_state()
    visitor.close()
    return state


@pytest.fixture(scope="package")
def alices_cookies(browser: Browser, app: App) -> Any:
    return signed_up(browser, app, "Alice")


@pytest.fixture
def alice(new_visitor: NewVisitor, alices_cookies: Any) -> Visitor:
    return new_visitor(alices_cookies)


@pytest.fixture
def nobody(new_visitor: NewVisitor) -> Visitor:
    """A visitor who is not signed in."""
    return new_visitor(None)
