"""Real proxies before the real service: what they let through, how soon, and to whom."""

import itertools
import json
import re
import statistics
import subprocess
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from conftest import probing
from deploy.proxies import PROXIES, proxy
from nginx import nginx
from service import (
    Client,
    errors_of,
    events_of,
    eventually,
    message,
    process,
    service,
    serving,
    text_of,
    thread_of,
    types,
)
from standin import Hang, Say, StandIn, Step, Wait

GAP_SECONDS = 0.2
LIMIT = 20 * 1024 * 1024


@pytest.fixture(scope="module")
def frontend() -> Iterator[str]:
    """In the place of the front end: it answers with the path that it was asked for."""

    async def say_path(request: Request) -> Response:
        return JSONResponse({"frontend": request.url.path})

    with serving(Starlette(routes=[Route("/{path:path}", say_path, methods=["GET", "POST"])])) as url:
        yield url


@pytest.fixture(scope="module")
def behind(running_model: StandIn, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    database = tmp_path_factory.mktemp("behind") / "chatkit.db"
    with service(showing_figures, **probing(running_model, database)) as client:
        yield client


FIGURES = "figures for the operator"


def showing_figures(app: Any) -> Any:
    """Put a /metrics before the app that anybody may read who gets so far."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        found = scope["type"] == "http" and scope["path"].rstrip("/") == "/metrics"
        await (PlainTextResponse(FIGURES) if found else app)(scope, receive, send)

    return answer


@pytest.fixture(scope="module", params=PROXIES)
def public(
    request: pytest.FixtureRequest, behind: Client, frontend: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    """A client of the proxy's address, of each proxy in turn."""
    with proxy(request.param, tmp_path_factory.mktemp(request.param), behind, frontend) as client:
        yield client


def test_events_arrive_one_by_one(public: Client, model: StandIn, request: Any) -> None:
    model.will(Say("one two three four five six seven eight", gap=GAP_SECONDS))
    arrived = []
    with public.streaming("threads.create", {"input": message("Count")}) as events:
        for event in events:
            if is_text(event):
                arrived.append(time.monotonic())
    sent = model.asked[-1].said_at[2:10]  # what comes before opens the message, and what comes after closes it
    late = [there - here for here, there in zip(sent, arrived, strict=True)]
    name = request.node.callspec.id
    print(f"\n{name}: gaps sent {_gaps(sent)} ms, arrived {_gaps(arrived)} ms, late by {_ms(late)} ms")
    assert statistics.median(late) < GAP_SECONDS * 0.75, "an event waits for the next one"


def is_text(event: dict[str, Any]) -> bool:
    return bool(event.get("update", {}).get("type", "").endswith("text_delta"))


def _gaps(times: list[float]) -> list[int]:
    return _ms([later - earlier for earlier, later in itertools.pairwise(times)])


def _ms(seconds: list[float]) -> list[int]:
    return [round(each * 1000) for each in seconds]


def test_a_stop_reaches_the_model(public: Client, model: StandIn, request: Any) -> None:
    name = request.node.callspec.id
    steps: list[Step] = (
        [Say("word " * 600, gap=0.1)] if name == "apache" else [Say("word"), Hang()]
    )  # see docs/proxies.md
    model.will(*steps)
    with public.streaming("threads.create", {"input": message("Talk")}) as events:
        next(filter(is_text, events))
    stopped_at = time.monotonic()
    eventually(lambda: model.asked[-1].ended == "cut", 10, "the end of the model's request")  # before any heartbeat
    print(f"\n{name}: a Stop reaches the model after {_ms([time.monotonic() - stopped_at])[0]} ms")


def test_files_of_the_limit_pass_by_links_that_name_the_proxys_address(public: Client, model: StandIn) -> None:
    data = b"%PDF-1.7\n" + bytes(LIMIT - 9)
    direct = public.http.post("/api/attachments", files={"file": ("a.pdf", data, "application/pdf")})
    assert direct.status_code == 200, direct.text
    announced = {"name": "b.pdf", "size": LIMIT, "mime_type": "application/pdf"}
    link = public.ask("attachments.create", announced)["upload_descriptor"]
    assert link["url"].startswith(f"{public.url}/attachments/")
    put = public.http.request(link["method"], link["url"], content=data, headers=link["headers"])
    assert put.status_code < 300, put.text
    audio = {"audio_base64": b64encode(bytes(25 * 1024 * 1024)).decode(), "mime_type": "audio/webm"}
    assert "I heard" in public.ask("input.transcribe", audio)["text"]


@pytest.mark.parametrize(
    "path", ["/chatkit", "/api/chatkit", "/attachments", "/api/attachments", "/attachments/atc_1?x=1"]
)
def test_the_services_paths_reach_it(public: Client, path: str) -> None:
    answer = public.http.post(path, content=b"")
    assert "x-request-id" in answer.headers
    assert "frontend" not in answer.text


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/chat",
        "/chatkitten",
        "/chatkit/x",
        "/api/auth/jwks",
        "/api/attachments/x",
        "/attachments.html",
        "/healthz",
    ],
)
def test_all_else_reaches_the_front_end(public: Client, path: str) -> None:
    assert public.http.get(path).json() == {"frontend": path}


@pytest.mark.parametrize("path", ["/metrics", "/metrics/", "/attachments/../metrics", "//metrics", "/%6detrics"])
def test_the_figures_reach_nobody(public: Client, path: str) -> None:
    answer = curl(f"{public.url}{path}", "--path-as-is")
    assert FIGURES not in answer
    if path == "/metrics":
        assert "frontend" not in answer


def test_http_2_streams_too(public: Client, model: StandIn) -> None:
    body = json.dumps({"type": "threads.create", "params": {"input": message("Hello")}})
    answer = curl(f"{public.url}/chatkit", "--http2", "-i", "-H", "content-type: application/json", "-d", body)
    assert answer.startswith("HTTP/2 200")
    assert types(events_of(answer.partition("\n\n")[2]))[-1] == "thread.item.done[assistant_message]"


def curl(url: str, *options: str) -> str:
    """Return what curl shows; the client that the other tests use speaks no HTTP/2, and tidies paths."""
    command = ["curl", "--silent", "--insecure", "--noproxy", "*", *options, url]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_one_address_does_not_get_all_of_the_service(
    behind: Client, frontend: str, model: StandIn, tmp_path: Path
) -> None:
    with proxy("nginx", tmp_path, behind, frontend) as site:
        answers = [site.post("threads.list") for _ in range(120)]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused
        assert refused[0].json()["code"] == "quota"
        assert int(refused[0].headers["retry-after"]) > 0
        assert all(answer.status_code in (200, 429) for answer in answers)


@pytest.mark.parametrize(("silent_seconds", "timeout_seconds"), [(6, 3), pytest.param(90, 60, marks=pytest.mark.soak)])
def test_a_silent_tool_call_outlasts_the_proxys_timeout_by_heartbeats(
    frontend: str, model: StandIn, tmp_path: Path, silent_seconds: int, timeout_seconds: int
) -> None:
    model.otherwise = [Wait(silent_seconds), Say("Here I am.")]
    environ = probing(model, tmp_path / "chatkit.db", HEARTBEAT_SECONDS=str(timeout_seconds / 4))
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        behind, clients = stack.enter_context(service(**environ)), []
        for name in PROXIES:
            (tmp_path / name).mkdir()
            started = proxy(name, tmp_path / name, behind, frontend, timeout_seconds=timeout_seconds)
            clients.append(stack.enter_context(started))
        for events in pool.map(lambda client: client.create("Take your time"), clients):
            assert not errors_of(events)
            assert "Here I am." in str(events)


def test_the_service_stands_under_a_prefix_that_the_proxy_strips(frontend: str, model: StandIn, tmp_path: Path) -> None:
    environ = probing(model, tmp_path / "chatkit.db", ROOT_PATH="/chat")
    with (
        process(tmp_path, **environ) as running,
        proxy("nginx", tmp_path, running, frontend, under_prefix=True) as site,
    ):
        under = Client(f"{site.url}/chat", tls=site.tls)
        thread_id = thread_of(under.create("Hello"))
        assert text_of(under.items(thread_id)[-1]) == "Hello from the stand-in."
        link = under.ask("attachments.create", {"name": "a.txt", "size": 2, "mime_type": "text/plain"})
        upload = link["upload_descriptor"]
        assert upload["url"].startswith(f"{site.url}/chat/attachments/")
        put = under.http.request(upload["method"], upload["url"], content=b"ok", headers=upload["headers"])
        assert put.status_code < 300
        page = under.http.get("/").text
        for path in re.findall(r'(?:src|href)="([^"#:]+)"', page):
            assert under.http.get(f"/{path}").headers.get("x-request-id"), path
        assert under.http.get("/metrics").status_code == 404


def test_the_readmes_nginx_before_replicas_keeps_the_port_lets_files_through_and_hides_the_figures(
    behind: Client, tmp_path: Path
) -> None:
    port = int(behind.url.rpartition(":")[2])
    with nginx(tmp_path, [port, port]) as url:
        site = Client(url)
        link = site.ask("attachments.create", {"name": "a.pdf", "size": LIMIT, "mime_type": "application/pdf"})
        upload = link["upload_descriptor"]
        assert upload["url"].startswith(f"{url}/attachments/")
        data = b"%PDF-1.7\n" + bytes(LIMIT - 9)
        put = site.http.request(upload["method"], upload["url"], content=data, headers=upload["headers"])
        assert put.status_code < 300, put.text
        assert FIGURES not in site.http.get("/metrics").text


@pytest.mark.parametrize(
    ("name", "prefix"), [("nginx", ""), ("nginx", "/chat"), ("caddy", ""), ("haproxy", ""), ("apache", "")]
)
def test_a_proxy_writes_no_link_into_its_logs(
    frontend: str, model: StandIn, tmp_path: Path, name: str, prefix: str
) -> None:
    environ = probing(model, tmp_path / "chatkit.db", ROOT_PATH=prefix)
    with (
        process(tmp_path, **environ) as running,
        proxy(name, tmp_path, running, frontend, under_prefix=bool(prefix)) as site,
    ):
        under = Client(f"{site.url}{prefix}", tls=site.tls)
        link = under.ask("attachments.create", {"name": "a.png", "size": 9, "mime_type": "image/png"})["preview_url"]

        def follow(_: int = 0) -> int:
            return under.http.get(link, headers={"referer": link}).status_code

        with ThreadPoolExecutor(8) as pool:
            statuses = set(pool.map(follow, range(100)))
        assert name != "nginx" or prefix or 429 in statuses
        running.kill()
        eventually(lambda: follow() in (502, 503), what="an error of the proxy's own")
    logs = [log.read_text() for log in (tmp_path / "access.log", tmp_path / "log") if log.exists()]
    assert f"{prefix}/attachments/atc_" in "".join(logs)
    assert "signature" not in "".join(logs)


def test_what_a_stranger_says_of_where_it_comes_from_is_not_believed(model: StandIn, tmp_path: Path) -> None:
    announced = {"name": "a.txt", "size": 2, "mime_type": "text/plain"}
    with process(tmp_path, **probing(model, tmp_path / "chatkit.db", FORWARDED_ALLOW_IPS="10.9.9.9")) as running:
        forged = Client(running.url, {"x-forwarded-proto": "https"})
        assert forged.ask("attachments.create", announced)["upload_descriptor"]["url"].startswith("http://")
