"""The Next.js app as its Containerfile builds and starts it, and somebody who visits it."""

import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

from playwright.sync_api import BrowserContext, ConsoleMessage, Request, Route, expect

from service import ROOT, eventually, free_port

FRONTEND = ROOT / "frontend"
PANEL_SCRIPT = "https://cdn.platform.openai.com/deployments/chatkit/chatkit.js"
PANEL = Path(__file__).with_name("panel.js").read_text(encoding="utf-8")
SERVED = re.compile(r"/(api/)?(chatkit|attachments(/[^/]+)?)")
"""The paths that a proxy hands to the service. A page must need nothing else of it."""
PASSWORD = "a long password"
SECRET = "a secret of the tests, of more than 32 characters"
ADDRESSES = count(1)
"""The last bytes of the visitors' addresses."""


def npm(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run npm in the app's folder, in an environment that says nothing of the app."""
    environ = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environ}
    command = ["npm", *arguments]
    return subprocess.run(command, cwd=FRONTEND, env=environ, capture_output=True, text=True, timeout=600, check=False)


@contextmanager
def alone() -> Iterator[None]:
    """Have the app's folder alone: another process of the suite may want to build or to check what is in it."""
    with (FRONTEND / "package.json").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def build(folder: Path) -> None:
    """Build the app and put together in the folder what the Containerfile puts into the image."""
    with alone():
        made = npm("run", "build", STANDALONE="1")
        assert made.returncode == 0, made.stdout + made.stderr
        containerfile = (FRONTEND / "Containerfile").read_text(encoding="utf-8")
        for source, target in re.findall(r"^COPY --from=build /app/(\S+) \./(\S*)$", containerfile, re.MULTILINE):
            shutil.copytree(FRONTEND / source, folder / target, symlinks=True, dirs_exist_ok=True)


@dataclass
class App:
    """A running app."""

    url: str
    service_url: str
    environ: dict[str, str]

    def expired_token(self, user_id: str) -> str:
        """Return a token that the app's Better Auth signed and that has run out."""
        script = Path(__file__).with_name("expired.mjs").read_bytes()
        command = ["node", "--input-type=module", "-"]
        environ = {**self.environ, "USER_ID": user_id}
        signed = subprocess.run(command, input=script, cwd=FRONTEND, env=environ, capture_output=True, check=True)
        return signed.stdout.decode().strip()


@contextmanager
def started(built: Path, folder: Path, **environ: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Start the built app's server; yield the process and its log."""
    environ = {"PATH": os.environ["PATH"], "HOSTNAME": "127.0.0.1", **environ}
    log = folder / "app.log"
    with log.open("wb") as output:
        process = subprocess.Popen(["node", "server.js"], cwd=built, env=environ, stdout=output, stderr=output)
    try:
        yield process, log
    finally:
        process.kill()
        process.wait()


@contextmanager
def running(built: Path, folder: Path, service_port: int) -> Iterator[App]:
    port = free_port()
    url, service_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{service_port}"
    environ = {
        "PATH": os.environ["PATH"],
        "PORT": str(port),
        "BETTER_AUTH_URL": url,
        "BETTER_AUTH_SECRET": SECRET,
        "AUTH_DATABASE": str(folder / "auth.db"),
        "NEXT_PUBLIC_API_URL": service_url,
        "NEXT_PUBLIC_CHATKIT_DOMAIN_KEY": "domain_pk_of_the_tests",
    }
    with started(built, folder, **environ) as (process, log):

        def is_up() -> bool:
            assert process.poll() is None, log.read_text(encoding="utf-8")
            try:
                with urlopen(f"{url}/api/auth/jwks", timeout=10):
                    return True
            except OSError:
                return False

        eventually(is_up, 60, "the start of the app")
        yield App(url, service_url, environ)


@dataclass
class Visitor:
    """Somebody with a browser of their own, at the app."""

    context: BrowserContext
    app: App
    problems: list[str] = field(default_factory=list)
    """Errors of scripts on the page, and what it asked of the service that no proxy hands on."""
    console: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    """Addresses that were asked for and are neither the app's nor the service's."""

    def __post_init__(self) -> None:
        # Better Auth takes three sign-ins and sign-ups in ten seconds from one address.
        self.context.set_extra_http_headers({"x-forwarded-for": f"192.0.2.{next(ADDRESSES)}"})
        self.context.route(f"{self.app.service_url}/**", self._hand_on)
        self.context.route(PANEL_SCRIPT, lambda route: route.fulfill(body=PANEL, content_type="text/javascript"))
        self.new_tab()

    def new_tab(self) -> None:
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self._note)
        self.page.on("request", self._note_request)

    def close(self) -> None:
        """Close the browser when its tabs have arrived: in the middle of a navigation Chromium may never answer."""
        for page in self.context.pages:
            page.wait_for_load_state("domcontentloaded")
        self.context.close()

    def _hand_on(self, route: Route) -> None:
        if SERVED.fullmatch(urlsplit(route.request.url).path):
            route.continue_()
        else:
            self.problems.append(f"{route.request.url} was asked for")
            route.fulfill(status=404)

    def _note(self, message: ConsoleMessage) -> None:
        self.console.append(message.text)

    def _note_request(self, request: Request) -> None:
        if not request.url.startswith((self.app.url, self.app.service_url, "data:", "blob:")):
            self.foreign.append(request.url)

    def go(self, path: str) -> None:
        self.page.goto(f"{self.app.url}{path}")

    def sign_up(self, name: str) -> None:
        self.go("/sign-in")
        self.press("I have no account yet")
        self.page.get_by_label("Name").fill(name)
        self._fill_in(name, PASSWORD)
        self.press("Sign up")

    def sign_in(self, name: str, password: str = PASSWORD) -> None:
        self.go("/sign-in")
        self._fill_in(name, password)
        self.press("Sign in")

    def _fill_in(self, name: str, password: str) -> None:
        self.page.get_by_label("E-mail").fill(f"{name.lower()}@example.org")
        self.page.get_by_label("Password").fill(password)

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name).click()

    @property
    def panel(self) -> Any:
        return self.page.locator("openai-chatkit")

    @property
    def alert(self) -> Any:
        return self.page.locator("[role=alert]:not(#__next-route-announcer__)")

    def open_chat(self, path: str = "/chat") -> None:
        self.go(path)
        self.wait_for_panel()

    def wait_for_panel(self) -> None:
        expect(self.panel).to_be_attached()
        expect(self.page.get_by_role("status")).to_be_hidden()

    def do(self, call: str, *values: Any) -> Any:
        """Call a method of the panel's, or read what it notes."""
        return self.panel.evaluate(f"(panel, values) => panel.{call}", values)

    def say(self, text: str, *attachments: str) -> None:
        self.do("say(...values)", text, list(attachments))

    def token(self) -> str:
        return str(self.page.request.get(f"{self.app.url}/api/auth/token").json()["token"])


def answer_once(visitor: Visitor, address: str, **answer: Any) -> list[str]:
    """Answer the first request to the address with this, and let later ones pass. Return the list of what was asked."""
    asked: list[str] = []

    def handle(route: Route) -> None:
        asked.append(route.request.url)
        if len(asked) == 1:
            route.fulfill(**answer)
        else:
            route.continue_()

    visitor.page.route(address, handle)
    return asked
