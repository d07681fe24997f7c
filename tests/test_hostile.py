"""Clients that are slow, many or malicious: each is bounded, and nobody else waits for them."""

import asyncio
import json
import resource
import select
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import sockets
import streams
from answers import EXCEPTION_HANDLERS
from app import Database, create_app
from bodies import MAX_BODY_BYTES, MAX_DICTATIONS, MAX_LARGE_BODIES, MAX_LARGE_BODIES_OF_USER, Bodies
from clients import Stream
from conftest import probing
from connections import Connection
from conversations import StoreUnavailable
from issuer import Issuer
from service import Client, Process, eventually, fold, process, service, serving, text_of, thread_of
from settings import Settings
from standin import Say, StandIn
from test_faults import resident_bytes, rows

MIB = 1024 * 1024
JSON = {"content-type": "application/json"}
DICTATION = b'{"type": "input.transcribe", "params": '
SPOKEN = DICTATION + b'{"audio_base64": "'


@pytest.fixture(scope="module")
def one_for_all(running_model: StandIn, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    directory = tmp_path_factory.mktemp("hostile")
    with process(directory, **probing(running_model, directory / "chatkit.db")) as running:
        yield running


@pytest.fixture
def running(one_for_all: Process, model: StandIn) -> Process:
    return one_for_all


@contextmanager
def unharmed(running: Process, *, mebibytes: int, seconds: float = 5) -> Iterator[None]:
    """Run somebody else's turns meanwhile: none takes longer, and the process grows by no more."""
    running.create()  # what is imported late is there before anything is measured
    before, ended = resident_bytes(running), threading.Event()
    turns: list[tuple[float, int]] = []

    def take_turns() -> None:
        with closing(Client(running.url)) as other:
            other.http.headers.update(running.http.headers)
            while not ended.wait(0.05):
                began = time.monotonic()
                assert text_of(fold(other.create())[-1]) == "Hello from the stand-in."
                turns.append((time.monotonic() - began, resident_bytes(running)))

    with ThreadPoolExecutor(1) as pool:
        taking = pool.submit(take_turns)
        try:
            yield
        finally:
            ended.set()
        taking.result()
    slowest, most = max(seconds for seconds, _ in turns), (max(size for _, size in turns) - before) // MIB
    print(f"{most} MiB more memory; {len(turns)} turns of somebody else, the slowest took {slowest:.2f} s")
    assert slowest < seconds
    assert most < mebibytes
    assert "Traceback" not in running.log


def connect(url: str, data: bytes = b"") -> socket.socket:
    """Return a connection that has sent this and no more."""
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname, address.port), timeout=30)
    connection.sendall(data)
    return connection


def all_from(connection: socket.socket) -> bytes:
    """Return all that comes until the other side closes; what is sent after that resets the connection."""
    received = b""
    with connection, suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            received += chunk
    return received


HEAD = b"POST /chatkit HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"

BEGUN = {
    "nothing": b"",
    "half a head": HEAD,
    "half a body": HEAD + b'content-length: 1000\r\n\r\n{"type": ',
    "half of what nobody will read": b"POST /nowhere HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 1000\r\n\r\nx",
    "half a second request": b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" + HEAD,
}

# --- slow ---------------------------------------------------------------------------------------------------------


class Impatient(Connection):
    LOOK_SECONDS = 0.3


@pytest.fixture
def impatient(model: StandIn, tmp_path: Path) -> Iterator[str]:
    """The address of a service that looks 50 times more often how fast its clients are."""
    app = create_app(Settings.from_environ(probing(model, tmp_path / "chatkit.db")))
    with serving(app, lifespan="on", http=Impatient) as url:
        yield url


@pytest.mark.parametrize("begun", BEGUN)
def test_a_request_that_comes_a_byte_at_a_time_is_given_up(impatient: str, begun: str) -> None:
    with connect(impatient, BEGUN[begun]) as connection:
        given_up = threading.Event()
        dripping = threading.Thread(target=drip, args=(connection, given_up))
        dripping.start()
        received = all_from(connection)
        given_up.set()
        dripping.join()
    if "second" in begun or "nobody" in begun:  # it has its answer, and no second one
        assert received.count(b"HTTP/1.1") == 1
        return
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 Request Timeout")
    assert json.loads(body) == {"code": "too_slow", "message": "The request did not arrive in time. Send it again."}


def drip(connection: socket.socket, given_up: threading.Event) -> None:
    while not given_up.wait(0.1):
        try:
            connection.sendall(b"x")
        except OSError:
            return


def test_a_request_that_comes_slowly_but_steadily_is_answered(impatient: str) -> None:
    body = json.dumps({"type": "threads.list", "params": {}}).encode() + b" " * MIB
    with connect(impatient, HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body)) as connection:
        for start in range(0, len(body), 20_000):
            connection.sendall(body[start : start + 20_000])
            time.sleep(0.03)  # more than Impatient's least in each of its looks, over more than four of them
        answer = all_from(connection)
    assert b"413 " in answer.splitlines()[0]  # a byte too many: it was read to its end


def test_a_connection_that_is_kept_between_requests_is_not_taken_for_a_slow_one(impatient: str) -> None:
    with closing(Client(impatient)) as client:
        for _ in range(3):
            assert client.post("threads.list").status_code == 200
            time.sleep(0.4)


def test_a_stream_to_a_client_that_sends_nothing_more_goes_on(impatient: str, model: StandIn) -> None:
    model.will(Say("A word and another. " * 10, gap=0.05))
    with closing(Client(impatient)) as client:
        assert text_of(fold(client.create())[-1]) == "A word and another. " * 10


def test_a_client_that_reads_nothing_of_a_file_is_given_up(
    model: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "UNREAD_SECONDS", 1)
    app = Watched(create_app(Settings.from_environ(probing(model, tmp_path / "chatkit.db"))))
    with serving(app, sockets.listen("127.0.0.1", 0), lifespan="on") as url, closing(Client(url)) as client:
        file = ("large.png", b"\x89PNG\r\n\x1a\n" + b"x" * 16_000_000, "image/png")
        link = urlsplit(client.http.post("/attachments", files={"file": file}).json()["preview_url"])
        with connect(url, f"GET {link.path}?{link.query} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode()):
            began = time.monotonic()
            ended_at = eventually(lambda: app.ended_at.get("GET", 0), 15, "the end of the download")
    assert ended_at - began > 0.9, "it was given up before its time"


def test_a_client_that_does_not_read_the_rest_of_an_answer_that_has_ended_is_given_up(
    model: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "LAST_BYTES_SECONDS", 1)
    app = Watched(create_app(Settings.from_environ(probing(model, tmp_path / "chatkit.db"))))
    model.will(Say(" ".join(["x" * 16384] * 200)))  # more than buffers hold, less than a turn is stopped for
    with serving(app, lifespan="on") as url, Stream.create(url, receive_buffer_bytes=65536):
        eventually(lambda: [asked.ended for asked in model.asked] == ["answered"], what="the end of the answer")
        eventually(lambda: not rows(tmp_path / "chatkit.db", "SELECT * FROM leases"), what="the end of the turn")
        began = time.monotonic()
        ended_at = eventually(lambda: app.ended_at.get("POST", 0), 15, "the end of the request")
    assert ended_at - began > 0.5, "it was given up before its time"


class Watched:
    """An app, and when its last request of each method was over, in `time.monotonic()`."""

    def __init__(self, app: ASGIApp):
        self.app = app
        self.ended_at: dict[str, float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        finally:
            self.ended_at[scope.get("method", scope["type"])] = time.monotonic()


# --- many ---------------------------------------------------------------------------------------------------------


def test_2000_connections_cost_bounded_memory_and_nobody_elses_time(running: Process) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    with unharmed(running, mebibytes=200), ExitStack() as stack:
        for number in range(2000):
            stack.enter_context(connect(running.url, list(BEGUN.values())[number % 3]))
        eventually(lambda: running.create(), what="a turn after all have come")
    eventually(lambda: len(descriptors(running)) < 100, what="the end of all connections")


def descriptors(running: Process) -> list[Path]:
    return list(Path(f"/proc/{running.process.pid}/fd").iterdir())


def test_more_connections_than_the_process_may_open_are_refused_in_words(model: StandIn, tmp_path: Path) -> None:
    variables = probing(model, tmp_path / "chatkit.db")
    with process(tmp_path, through=["prlimit", "--nofile=200"], **variables) as running, ExitStack() as stack:
        first = [stack.enter_context(connect(running.url)) for _ in range(80)]
        [*_, last] = [stack.enter_context(connect(running.url)) for _ in range(100)]
        head, _, body = all_from(last).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 5" in head
        assert json.loads(body) == {"code": "busy", "message": "The service is busy. Try again in a moment."}
        first[0].sendall(b"GET /readyz HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
        assert b"200 OK" in all_from(first[0]).splitlines()[0]
        for each in first:
            each.close()
        eventually(lambda: len(descriptors(running)) < 150)
        assert text_of(fold(eventually(running.create))[-1]) == "Hello from the stand-in."
        assert "Traceback" not in running.log


# --- large --------------------------------------------------------------------------------------------------------


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with Issuer() as issuer:
        yield issuer


@pytest.fixture
def with_login(issuer: Issuer, model: StandIn, tmp_path: Path) -> Iterator[Process]:
    """A service whose client is a user that nobody else is."""
    login = {"JWKS_URL": issuer.jwks_url, "JWT_ISSUER": issuer.url}
    with process(tmp_path, **probing(model, tmp_path / "chatkit.db", **login)) as running:
        running.http.headers.update(bearer(issuer, "somebody else"))
        eventually(lambda: answered(running.post("threads.list"), 200))
        yield running


def bearer(issuer: Issuer, user_id: str) -> dict[str, str]:
    return {"authorization": f"Bearer {issuer.token(claims={'sub': user_id})}"}


def begin_large(running: Process, user: dict[str, str], until: ExitStack) -> None:
    head = HEAD + b"authorization: " + user["authorization"].encode() + b"\r\n"
    begun = b'{"type": "' + b"x" * (MAX_BODY_BYTES - 1000)
    until.enter_context(connect(running.url, head + b"content-length: %d\r\n\r\n" % MAX_BODY_BYTES + begun))


def post_large(running: Process, user: dict[str, str]) -> int:
    body = b'{"type": "' + b"x" * 100_000 + b'"}'
    return running.http.post("/chatkit", content=body, headers={**JSON, **user}).status_code


def test_large_bodies_that_are_never_finished_cost_bounded_memory(with_login: Process, issuer: Issuer) -> None:
    users = [bearer(issuer, f"user {number}") for number in range(MAX_LARGE_BODIES // MAX_LARGE_BODIES_OF_USER)]
    with unharmed(with_login, mebibytes=150), ExitStack() as begun:
        for user in users * MAX_LARGE_BODIES_OF_USER:
            begin_large(with_login, user, begun)
        eventually(lambda: post_large(with_login, bearer(issuer, "one more")) == 429, what="the refusal of one more")
    eventually(lambda: post_large(with_login, users[0]) == 422, 60, "room for large bodies")


def test_a_user_takes_few_of_the_places_for_large_bodies(with_login: Process, issuer: Issuer) -> None:
    user = bearer(issuer, "one user")
    with ExitStack() as begun:
        for _ in range(MAX_LARGE_BODIES_OF_USER):
            begin_large(with_login, user, begun)
        eventually(lambda: post_large(with_login, user) == 429, what="the refusal of one more")
        assert post_large(with_login, bearer(issuer, "another")) == 422
    eventually(lambda: post_large(with_login, user) == 422, what="room for the user's large bodies")


LARGE = {
    "a body of 50 MB": (b'{"type": "' + b"x" * 50_000_000, 413),
    "50 MB that begin as dictation": (SPOKEN + b"A" * 50_000_000, 413),
    "a million nested brackets": (b"[" * (MAX_BODY_BYTES - 1), 400),
    "a million nested objects": (b'{"type":' * (MAX_BODY_BYTES // 8), 400),
    "brackets where anything may be": (
        b'{"type": "threads.custom_action", "params": {"thread_id": "t", "action": {"type": "a", "payload": '
        + b"[" * 500_000
        + b"]" * 500_000
        + b"}}}",
        400,
    ),
    "30 million nested brackets in dictation": (DICTATION + b"[" * 30_000_000, 413),
    "30 MB of empty lists in dictation": (DICTATION + b'{"audio_base64": [' + b"[]," * 10_000_000, 413),
    "lists behind a mebibyte of dictation": (SPOKEN + b"A" * MIB + b'", "a": [' + b"[]," * 10_000_000, 413),
}


@pytest.mark.parametrize("what", LARGE)
def test_a_body_too_large_or_too_deep_is_refused_and_costs_bounded_memory(what: str, running: Process) -> None:
    body, status = LARGE[what]
    with unharmed(running, mebibytes=200), ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(running, body), range(16)))
    assert set(answers) <= {status, 429, 0}
    assert status in answers


def post(running: Process, body: bytes) -> int:
    """Return the status of the answer; 0 where the connection was closed before all was sent."""
    with httpx2.Client(trust_env=False, timeout=60) as http:
        try:
            return http.post(f"{running.url}/chatkit", content=body, headers=JSON).status_code
        except httpx2.TransportError:
            return 0


def long_dictation(token: str = "") -> bytes:
    """Return the head of a dictation, and less of its body than was announced."""
    authorization = f"authorization: Bearer {token}\r\n".encode() if token else b""
    return HEAD + authorization + b"connection: close\r\ncontent-length: 10000000\r\n\r\n" + SPOKEN + b"A" * 2 * MIB


def test_dictations_beyond_a_few_at_once_are_refused_for_the_moment(with_login: Process, issuer: Issuer) -> None:
    spoken = {"audio_base64": "A" * 2 * MIB, "mime_type": "audio/webm"}
    with ExitStack() as begun:
        tokens = [issuer.token(claims={"sub": f"user {number}"}) for number in range(MAX_DICTATIONS + 1)]
        all_begun = [begun.enter_context(connect(with_login.url, long_dictation(token))) for token in tokens]
        [one], _, _ = select.select(all_begun, [], [], 10)
        assert all_from(one).startswith(b"HTTP/1.1 429 ")
        refused = with_login.post("input.transcribe", spoken)
        assert (refused.status_code, refused.json()["code"]) == (429, "quota")
        assert refused.json()["message"] == "The service is busy. Try again in a moment."
        assert with_login.post("threads.list").status_code == 200
    eventually(lambda: answered(with_login.post("input.transcribe", spoken), 200))


def answered(response: httpx2.Response, status: int) -> httpx2.Response | None:
    return response if response.status_code == status else None


def test_a_user_has_one_long_dictation_at_a_time(running: Process) -> None:
    spoken = {"audio_base64": "A" * 2 * MIB, "mime_type": "audio/webm"}
    with connect(running.url, long_dictation()) as first, connect(running.url, long_dictation()) as second:
        [one], _, _ = select.select([first, second], [], [], 10)
        assert b"You are dictating already. Wait until that has become text." in all_from(one)
    eventually(lambda: answered(running.post("input.transcribe", spoken), 200))


def test_a_user_has_one_short_dictation_at_a_time_too(tmp_path: Path, model: StandIn) -> None:
    spoken = {"audio_base64": "A" * 1024, "mime_type": "audio/webm"}
    with service(**probing(model, tmp_path / "chatkit.db")) as client, ThreadPoolExecutor(8) as pool:
        answers = [*pool.map(lambda _: Client(client.url).post("input.transcribe", spoken), range(8))]
        assert {answer.status_code for answer in answers} == {200, 429}
        assert client.post("input.transcribe", spoken).status_code == 200


def test_a_threads_title_has_an_end(client: Client) -> None:
    thread_id = thread_of(client.create())
    refused = client.post("threads.update", {"thread_id": thread_id, "title": "x" * 1001})
    assert (refused.status_code, refused.json()["code"]) == (422, "bad_params")
    assert client.post("threads.update", {"thread_id": thread_id, "title": "x" * 1000}).status_code == 200


@pytest.mark.anyio
async def test_the_database_is_asked_once_for_all_who_want_to_know_whether_it_is_ready() -> None:
    class Slow:
        asked = 0

        async def ping(self) -> None:
            self.asked += 1
            await asyncio.sleep(0.05)
            raise StoreUnavailable("away")

    store: Any = Slow()
    database = Database(store)
    for turn in (1, 2):
        answers = await asyncio.gather(*[database.ready() for _ in range(50)], return_exceptions=True)
        assert {type(answer) for answer in answers} == {StoreUnavailable}
        assert store.asked == turn


@pytest.mark.parametrize(
    "begun", [HEAD + b"content-length: 100000\r\n\r\n" + b"x" * 70_000, long_dictation()], ids=["large", "dictation"]
)
def test_a_long_body_that_drips_gives_its_place_back(begun: bytes) -> None:
    bodies = Bodies(dictation=True, arrival_seconds=0.5)

    async def read(request: Request) -> Response:
        async with bodies.json(request, "alice") as body:
            return Response(str(len(body)))

    app = Starlette(routes=[Route("/chatkit", read, methods=["POST"])], exception_handlers=EXCEPTION_HANDLERS)
    with serving(app) as url:
        for _ in range(2):
            with connect(url, begun) as connection:
                given_up = threading.Event()
                dripping = threading.Thread(target=drip, args=(connection, given_up))
                dripping.start()
                head, _, body = all_from(connection).partition(b"\r\n\r\n")
                given_up.set()
                dripping.join()
            assert head.startswith(b"HTTP/1.1 408 Request Timeout")
            assert json.loads(body) == {
                "code": "too_slow",
                "message": "The request did not arrive in time. Send it again.",
            }
