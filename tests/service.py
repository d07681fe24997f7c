"""The service as its users meet it: over HTTP, in this process (quick) or as a process of its own (to be killed)."""

import asyncio
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, ClassVar, TypeVar

import httpx2
import uvicorn

from app import create_app
from settings import Settings
from warm import ROOT, Forked

T = TypeVar("T")


def eventually(found: Callable[[], T], seconds: float = 10.0, what: str = "it") -> T:
    """Return the first true value, or fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.01)
    return value


def tls_trusting(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificate)


def listening_socket() -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.bind(("127.0.0.1", 0))
    return listener


def free_port() -> int:
    """Return a port for a server that is yet to start, or to start again: nobody else is given it meanwhile.

    It stays bound here. Who asks for this very port with SO_REUSEADDR, as servers do, gets it all the same.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    port: int = holder.getsockname()[1]
    holder.detach()
    return port


@contextmanager
def serving(app: Any, listener: socket.socket | None = None, **options: Any) -> Iterator[str]:
    """Serve an ASGI app on a thread of its own and yield its address."""
    listener = listener or listening_socket()
    config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1, **{"access_log": False, **options})
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        eventually(lambda: server.started or not thread.is_alive(), what="the start of a server")
        assert server.started, "the server did not start"
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


class Client:
    """A ChatKit client: it speaks the protocol and remembers nothing."""

    opened: ClassVar[list["Client"]] = []
    """For the fixture that closes after each test what it opened."""

    def __init__(self, url: str, headers: Mapping[str, str] | None = None, tls: ssl.SSLContext | None = None):
        self.url = url
        self.tls = tls
        self.http = httpx2.Client(base_url=url, headers=headers, timeout=60, trust_env=False, verify=tls or True)

        Client.opened.append(self)

    def close(self) -> None:
        self.http.close()

    def post(self, type: str, params: Mapping[str, Any] | None = None, **more: Any) -> httpx2.Response:
        return self.http.post("/chatkit", json={"type": type, "params": params or {}, **more})

    def ask(self, type: str, params: Mapping[str, Any] | None = None) -> Any:
        """Return the JSON of an operation that must succeed."""
        response = self.post(type, params)
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, type: str, params: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return all events of an operation that must be answered by a stream."""
        response = self.post(type, params)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "text/event-stream"
        return events_of(response.text)

    @contextmanager
    def streaming(self, type: str, params: Mapping[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
        """Yield the events of an operation as they come."""
        with self.http.stream("POST", "/chatkit", json={"type": type, "params": params}) as response:
            lines = response.iter_lines()
            yield (json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: "))

    def create(self, text: str = "Hello", **input: Any) -> list[dict[str, Any]]:
        return self.stream("threads.create", {"input": message(text, **input)})

    def say(self, thread_id: str, text: str = "And then?", **input: Any) -> list[dict[str, Any]]:
        return self.stream("threads.add_user_message", {"thread_id": thread_id, "input": message(text, **input)})

    def items(self, thread_id: str) -> list[dict[str, Any]]:
        """Return all items of the thread that a client may see, oldest first, page by page."""
        items, after = [], None
        while True:
            params = {"thread_id": thread_id, "order": "asc", "limit": 100, **({"after": after} if after else {})}
            page = self.ask("items.list", params)
            items += page["data"]
            if not page["has_more"]:
                return items
            after = page["after"]

    def thread_ids(self) -> list[str]:
        return [thread["id"] for thread in self.ask("threads.list", {"limit": 100})["data"]]


def message(text: str, **input: Any) -> dict[str, Any]:
    """Return the input of a user's message."""
    content = [{"type": "input_text", "text": text}]
    return {"content": content, "attachments": [], "inference_options": {}, **input}


def events_of(body: str) -> list[dict[str, Any]]:
    """Return the events in the text of a stream, as EventSource reads it."""
    events = []
    for block in body.split("\n\n"):
        data = [line.removeprefix("data: ") for line in block.split("\n") if line.startswith("data: ")]
        if data:
            events.append(json.loads("\n".join(data)))
    return events


def types(events: list[dict[str, Any]]) -> list[str]:
    """Return the kinds of the events, with the kind of the item that they are about.

    Repetitions are left out, and the thread's new title, which may come at any time.
    """
    names: list[str] = []
    for event in events:
        if event["type"] == "thread.updated":
            continue
        item = event.get("item", {}).get("type") or event.get("update", {}).get("type")
        name = f"{event['type']}[{item}]" if item else event["type"]
        if not names or names[-1] != name:
            names.append(name)
    return names


def thread_of(events: list[dict[str, Any]]) -> str:
    """Return the id of the thread that the events are about."""
    for event in events:
        if event["type"] == "thread.created":
            return str(event["thread"]["id"])
        if "item" in event:
            return str(event["item"]["thread_id"])
    raise AssertionError("no event names a thread")


def text_of(item: Mapping[str, Any]) -> str:
    """Return the text of a message."""
    return "".join(part["text"] for part in item["content"])


def errors_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["type"] == "error"]


def fold(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the items as a client shows them after these events."""
    items: dict[str, dict[str, Any]] = {}
    for event in events:
        match event["type"]:
            case "thread.item.added" | "thread.item.done" | "thread.item.replaced":
                items[event["item"]["id"]] = json.loads(json.dumps(event["item"]))
            case "thread.item.removed":
                items.pop(event["item_id"], None)
            case "thread.item.updated":
                _fold_update(items[event["item_id"]], event["update"])
    return list(items.values())


def _fold_update(item: dict[str, Any], update: dict[str, Any]) -> None:
    match update["type"]:
        case "assistant_message.content_part.added" | "assistant_message.content_part.done":
            index = update["content_index"]
            item["content"][index : index + 1] = [update["content"]]
        case "assistant_message.content_part.text_delta":
            item["content"][update["content_index"]]["text"] += update["delta"]
        case "assistant_message.content_part.annotation_added":
            annotations = item["content"][update["content_index"]]["annotations"]
            annotations.insert(update["annotation_index"], update["annotation"])
        case "workflow.task.added":
            item["workflow"]["tasks"].insert(update["task_index"], update["task"])
        case "workflow.task.updated":
            item["workflow"]["tasks"][update["task_index"]] = update["task"]
        case "widget.root.updated":
            item["widget"] = update["widget"]
        case "widget.streaming_text.value_delta":
            for component in _components(item["widget"]):
                if component.get("id") == update["component_id"]:
                    component["value"] += update["delta"]
        case "generated_image.updated":
            item["image"] = update["image"]
        case other:
            raise AssertionError(f"an update that no client knows: {other}")


def _components(component: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield component
    for child in component.get("children", []):
        yield from _components(child)


class InProcess(Client):
    """The service on a thread of this process: its tasks can be seen."""

    loop: asyncio.AbstractEventLoop

    def tasks(self) -> set[asyncio.Task[Any]]:
        """Return what lives on the service's event loop now."""
        return asyncio.all_tasks(self.loop)


@contextmanager
def service(wrap: Callable[[Any], Any] = lambda app: app, **environ: str) -> Iterator[InProcess]:
    """Serve in this process, with these variables and nothing of the real environment; `wrap` goes around the app."""
    app, loops = wrap(create_app(Settings.from_environ(environ))), []

    async def noting_its_loop(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            loops.append(asyncio.get_running_loop())
        await app(scope, receive, send)

    with serving(noting_its_loop, lifespan="on") as url, closing(InProcess(url)) as client:
        [client.loop] = loops
        yield client


class Process(Client):
    """The service as a process of its own; `log` is what it has written so far."""

    def __init__(self, process: subprocess.Popen[bytes] | Forked, log: Path, url: str):
        super().__init__(url)
        self.process = process
        self.log_file = log

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = 30.0) -> int:
        return self.process.wait(seconds)

    def kill(self) -> None:
        """Kill it (SIGKILL), and return when it is gone."""
        self.signal(signal.SIGKILL)
        self.wait()


@contextmanager
def process(
    directory: Path, *arguments: str, through: Sequence[str] = (), stdin: int = subprocess.DEVNULL, **environ: str
) -> Iterator[Process]:
    """Run `python app.py` in the directory until it listens; kill it in the end if it still runs.

    `through` is a command that runs another, in other circumstances: `["prlimit", "--nofile=100"]`.
    """
    log = directory / "service.log"
    with log.open("ab") as stderr:
        begin = stderr.tell()
        started = _start(directory, arguments, through, stdin, stderr.fileno(), environ)
    try:
        url = eventually(lambda: address(started, log, begin), 90, "the start of the service")
        with closing(Process(started, log, url)) as running:
            eventually(lambda: is_up(running), 90, "the readiness of the service")
            yield running
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)  # with its workers
        started.wait()


NOT_FORKED = {"WORKERS", "PYTHONPATH", "LD_PRELOAD"}


def _start(
    directory: Path, arguments: Sequence[str], through: Sequence[str], stdin: int, stderr: int, environ: dict[str, str]
) -> subprocess.Popen[bytes] | Forked:
    """Fork it where nothing stands against it: other circumstances, modules or libraries, processes of its own."""
    environ = {"PATH": os.environ["PATH"], "PORT": "0", **environ}
    if not (through or arguments or stdin != subprocess.DEVNULL or environ.keys() & NOT_FORKED):
        with open(os.devnull, "rb") as nothing:
            return Forked(directory, arguments, environ, (nothing.fileno(), stderr, stderr))
    return subprocess.Popen(
        [*through, sys.executable, str(ROOT / "app.py"), *arguments],
        cwd=directory,
        env={"PYTHONPATH": str(ROOT / "tests"), **environ},
        stdin=stdin,
        stdout=stderr,
        stderr=stderr,
        start_new_session=True,
    )


def run(
    directory: Path, *arguments: str, input: str = "", stdout: int | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run `python app.py` with these arguments to its end, and return what it said (not what went to `stdout`)."""
    with TemporaryFile("w+") as stdin, TemporaryFile("w+") as said, TemporaryFile("w+") as stderr:
        stdin.write(input)
        stdin.seek(0)
        files = stdin.fileno(), said.fileno() if stdout is None else stdout, stderr.fileno()
        started = Forked(directory, arguments, {"PATH": os.environ["PATH"], **environ}, files)
        try:
            code = started.wait(60)
        finally:
            started.kill()
        said.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(list(arguments), code, said.read(), stderr.read())


def address(process: subprocess.Popen[bytes] | Forked, log: Path, begin: int) -> str | None:
    """Return where the service listens, as it says in its log behind this byte."""
    assert process.poll() is None, f"the service ended:\n{log.read_bytes()[begin:].decode()}"
    found = re.search(r"listening on (http://[\w.:\[\]]+)", log.read_bytes()[begin:].decode())
    return found.group(1) if found else None


def is_reachable(client: Client) -> bool:
    """Whether anything answers there, whatever it says."""
    try:
        return bool(client.http.get("/").status_code)
    except httpx2.TransportError:
        return False


def is_up(client: Client) -> bool:
    try:
        return client.http.get("/readyz").status_code == 200
    except httpx2.TransportError:
        return False
