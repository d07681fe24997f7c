"""What is told of each request: its id everywhere, one line of the log, and nothing of anybody's words."""

import io
import json
import logging
import re
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from app import create_app
from conftest import probing
from issuer import Issuer
from service import Client, eventually, message, process, service, serving, thread_of
from settings import Settings
from standin import Call, Fail, Say, StandIn
from telemetry import JsonLines, TextLines, pseudonym

SECRET = "SENTINEL"


class Log:
    """All that is logged in this process, as a service with LOG_FORMAT=json would write it."""

    def __init__(self, text: io.StringIO):
        self._text = text

    @property
    def text(self) -> str:
        return self._text.getvalue()

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]

    def request(self, id: str) -> dict[str, Any]:
        """Return the line of a request, once it has come; it comes once."""

        def found() -> list[dict[str, Any]]:
            return [line for line in self.lines if line["message"] == "request" and line["request_id"] == id]

        [line] = eventually(found, what=f"the line of request {id}")
        return line


@contextmanager
def logging_to(formatter: logging.Formatter) -> Iterator[io.StringIO]:
    text, root = io.StringIO(), logging.getLogger()
    handler = logging.StreamHandler(text)
    handler.setFormatter(formatter)
    logger = logging.getLogger("service")
    root.addHandler(handler)
    level = logger.level
    logger.setLevel("DEBUG")
    try:
        yield text
    finally:
        logger.setLevel(level)
        root.removeHandler(handler)


@pytest.fixture
def log() -> Iterator[Log]:
    with logging_to(JsonLines()) as text:
        yield Log(text)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("telemetry") / "chatkit.db"


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    with Issuer() as issuer:
        yield issuer


@pytest.fixture(scope="module")
def guarded(issuer: Issuer, running_model: StandIn, database: Path) -> Iterator[Client]:
    """A service with login."""
    environ = probing(running_model, database, TOKENS_PER_DAY="0")
    with service(**environ, JWKS_URL=issuer.jwks_url, JWT_ISSUER=issuer.url) as client:
        eventually(lambda: client.http.get("/readyz").status_code == 200)
        yield client


def signed_in(guarded: Client, issuer: Issuer, user_id: str) -> Client:
    return Client(guarded.url, {"authorization": f"Bearer {issuer.token(claims={'sub': user_id})}"})


# --- the id -------------------------------------------------------------------------------------------------------


def test_every_answer_has_an_id_of_its_own_refusals_and_preflights_too(client: Client) -> None:
    preflight = {"origin": "http://localhost:3000", "access-control-request-method": "POST"}
    answers = [
        client.http.get("/healthz"),
        client.http.get("/nowhere"),
        client.http.options("/chatkit", headers=preflight),
        client.http.options("/chatkit", headers=preflight | {"origin": "http://evil.example"}),
        client.http.get("/healthz", headers={"x-request-id": "mine"}),
        client.post("no.such.operation"),
        client.post("threads.list"),
        client.post("threads.create", {"input": message("Hello")}),
    ]
    assert [answer.status_code for answer in answers] == [200, 404, 200, 400, 200, 422, 200, 200]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len({*ids}) == len(answers)
    assert all(re.fullmatch("[0-9a-f]{16}", each) for each in ids)


def test_the_id_goes_along_to_the_model(client: Client, model: StandIn) -> None:
    model.will(Call("look_up", {"word": "x"}))
    answer = client.post("threads.create", {"input": message("Hello")})
    known = answer.headers["x-request-id"]
    assert [asked.headers["x-request-id"] for asked in model.asked] == [known] * 2
    eventually(lambda: known in [asked.headers["x-request-id"] for asked in model.asked_for_titles], what="its title")


def test_every_line_that_a_request_causes_carries_its_id(tmp_path: Path, model: StandIn, log: Log) -> None:
    with service(**probing(model, tmp_path / "chatkit.db")) as client:
        thread_id = thread_of(client.create("Hello"))
        with closing(sqlite3.connect(tmp_path / "chatkit.db")) as db, db:
            db.execute("""UPDATE items SET body = json_set(body, '$.type', 'of tomorrow')""")
        listed = client.post("items.list", {"thread_id": thread_id})  # on the thread of a connection
        model.will(Fail(401))
        failed = client.post("threads.create", {"input": message("Hello")})  # in the task of a turn
    for answer, words in ((listed, "cannot read: of tomorrow"), (failed, "AuthenticationError 401")):
        caused = [line for line in log.lines if words in line["message"]]
        assert {line.get("request_id") for line in caused} == {answer.headers["x-request-id"]}


# --- the line -----------------------------------------------------------------------------------------------------


def test_a_turn_is_one_line_with_all_that_is_known_of_it(client: Client, model: StandIn, log: Log) -> None:
    model.will(Say("two words", gap=0.05))
    answer = client.post("threads.create", {"input": message("Hello")})
    line = log.request(answer.headers["x-request-id"])
    first_byte, first_token, total = (line.pop(f"{name}_seconds") for name in ("first_byte", "first_token", "total"))
    assert 0 < first_byte < first_token < total < 60
    assert first_token + 0.05 <= total
    assert re.fullmatch("[0-9a-f]{16}", line.pop("user"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("time"))
    assert line == {
        "level": "INFO",
        "logger": "service.requests",
        "message": "request",
        "request_id": answer.headers["x-request-id"],
        "operation": "threads.create",
        "thread": re.findall("thr_[0-9a-f]+", answer.text)[0],
        "status": 200,
        "bytes": len(answer.content),
        "outcome": "completed",
    }


OUTCOMES: dict[str, tuple[str, dict[str, Any], str]] = {
    "an answer": ("threads.list", {}, "completed"),
    "a failure of the model": ("threads.create", {"input": message("fail")}, "failed"),
    "a guarded turn": ("threads.create", {"input": message("forbidden")}, "failed"),
    "what is not there": ("threads.get_by_id", {"thread_id": "thr_0"}, "refused"),
    "a turn that cannot begin": ("threads.add_user_message", {"thread_id": "x", "input": message("")}, "refused"),
    "no parameters": ("threads.create", {}, "refused"),
}


@pytest.mark.parametrize("case", OUTCOMES)
def test_the_line_says_how_it_went(client: Client, model: StandIn, log: Log, case: str) -> None:
    operation, params, outcome = OUTCOMES[case]
    model.otherwise = [Fail(500)]
    answer = client.post(operation, params)
    assert log.request(answer.headers["x-request-id"])["outcome"] == outcome


def test_what_a_client_calls_a_thread_is_logged_only_where_it_could_be_one(client: Client, log: Log) -> None:
    for name in ("alice.smith-bought-a-ring", "thr_" + "0" * 33, "thr_" + "0" * 32):
        answer = client.post("threads.get_by_id", {"thread_id": name})
        assert log.request(answer.headers["x-request-id"]).get("thread") == (name if len(name) == 36 else None)


def test_a_turn_whose_client_went_was_stopped(client: Client, model: StandIn, log: Log) -> None:
    model.will(Say("an answer without an end " * 100, gap=0.05))
    with client.streaming("threads.create", {"input": message("Hello")}) as events:
        thread_id = next(events)["thread"]["id"]
        eventually(lambda: next(events)["type"] == "thread.item.updated")
    lines = eventually(lambda: [line for line in log.lines if line.get("thread") == thread_id])
    assert [line["outcome"] for line in lines] == ["stopped"]


def test_a_turn_over_quota_or_on_a_locked_thread_was_refused(tmp_path: Path, model: StandIn, log: Log) -> None:
    with service(**probing(model, tmp_path / "chatkit.db") | {"TURNS_PER_MINUTE": "1"}) as client:
        model.will(Call("lock", {"kind": "locked"}))
        thread_id = thread_of(client.create("Lock it"))
        over_quota = client.post("threads.create", {"input": message("Again")})
    with service(**probing(model, tmp_path / "chatkit.db")) as client:
        locked = client.post("threads.add_user_message", {"thread_id": thread_id, "input": message("Hello?")})
    for answer in (over_quota, locked):
        line = log.request(answer.headers["x-request-id"])
        assert (line["status"], line["outcome"]) == (200, "refused")


def test_what_is_no_operation_is_named_by_its_route(client: Client, log: Log) -> None:
    operations = {
        "/healthz": "GET /healthz",
        "/attachments/atc_1?expires=1&signature=a": "GET /attachments/{id}",
        f"/{SECRET}%0Aline": "GET elsewhere",
    }
    for path, operation in operations.items():
        line = log.request(client.http.get(path).headers["x-request-id"])
        assert (line["operation"], line.get("thread")) == (operation, None)


# --- what is in no line -------------------------------------------------------------------------------------------


def test_a_user_has_the_same_pseudonym_each_time_and_no_other_database_knows_it(
    guarded: Client, issuer: Issuer, log: Log
) -> None:
    def logged(user_id: str) -> str:
        answer = signed_in(guarded, issuer, user_id).post("threads.list")
        return str(log.request(answer.headers["x-request-id"])["user"])

    assert logged("alice") == logged("alice") != logged("bob")
    assert pseudonym("alice", b"one key") != pseudonym("alice", b"another")


def test_nothing_that_a_user_wrote_or_is_called_is_logged(guarded: Client, issuer: Issuer, model: StandIn) -> None:
    formatters = (JsonLines(), TextLines())
    with logging_to(formatters[0]) as in_json, logging_to(formatters[1]) as in_text:
        client = signed_in(guarded, issuer, f"user {SECRET}")
        model.otherwise = [Say(f"{SECRET} answer")]
        thread_id = thread_of(client.create(f"{SECRET} question"))
        uploaded = client.http.post("/attachments", files={"file": (f"{SECRET}.txt", SECRET.encode(), "text/plain")})
        for step in (Call("explode"), Fail(500, message=SECRET), Fail(400, message=SECRET), Call(SECRET)):
            model.otherwise = [step]
            client.say(thread_id, f"{SECRET} again")
        client.post("threads.get_by_id", {"thread_id": f"{SECRET} is no id"})
        client.post(f"{SECRET}.operation")
        client.http.post("/chatkit", content=f'{{"{SECRET}', headers={"content-type": "application/json"})
        client.http.get(f"/attachments/{uploaded.json()['id']}?expires=1&signature={SECRET}")
        client.http.get(f"/{SECRET}?{SECRET}={SECRET}")
        last = client.post("threads.list").headers["x-request-id"]
        eventually(lambda: last in in_json.getvalue() and last in in_text.getvalue())
    for text in (in_json, in_text):
        assert SECRET not in text.getvalue()


@pytest.mark.parametrize("formatter", [TextLines(), JsonLines()])
def test_an_exception_is_logged_by_its_kind_and_place_and_not_in_its_words(formatter: logging.Formatter) -> None:
    with logging_to(formatter) as text:
        try:
            try:
                raise ValueError(SECRET)
            except ValueError as error:
                raise RuntimeError(SECRET) from error
        except RuntimeError:
            logging.getLogger("some.library").exception("it failed")
    line = text.getvalue()
    assert SECRET not in line
    assert all(known in line for known in ("it failed", "RuntimeError", "ValueError", f"{Path(__file__).name}:"))


# --- the format ---------------------------------------------------------------------------------------------------


def test_a_method_that_nobody_takes_is_not_written_down(client: Client, log: Log) -> None:
    assert client.http.request("SOMEBODYS-WORDS", "/healthz").status_code == 405
    eventually(lambda: "? /healthz" in log.text)
    assert "SOMEBODYS" not in log.text


def test_lines_of_text_are_for_people(client: Client) -> None:
    with logging_to(TextLines()) as text:
        known = client.http.get("/healthz").headers["x-request-id"]
        [line] = eventually(lambda: [line for line in text.getvalue().splitlines() if known in line])
    at = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
    assert re.fullmatch(
        rf'{at} INFO service\.requests \[{known}\] request operation="GET /healthz" status=200'
        r" first_byte_seconds=[\d.e-]+ total_seconds=[\d.e-]+ bytes=15 outcome=completed",
        line,
    )


WARNING_AGENT = """
import warnings
from agents import Agent

warnings.warn("a warning of Python's")


def create_agent(context):
    return Agent(name="A", instructions="")
"""


def test_with_log_format_json_every_line_is_an_object(tmp_path: Path) -> None:
    (tmp_path / "warning_agent.py").write_text(WARNING_AGENT)
    environ = {"LOG_FORMAT": "json", "AGENT": "warning_agent", "PYTHONPATH": str(tmp_path)}
    with process(tmp_path, **environ) as client:
        client.create("Hello")
        address = urlsplit(client.url)
        with socket.create_connection((address.hostname, address.port)) as garbage:
            garbage.sendall(b"this is not HTTP\r\n\r\n")
            assert garbage.recv(100).startswith(b"HTTP/1.1 400")
        client.signal(15)
        assert client.wait() == 0
        lines = [json.loads(line) for line in client.log.splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert {"service", "service.requests", "uvicorn.error", "py.warnings"} <= {line["logger"] for line in lines}


def test_uvicorns_own_access_log_has_no_links_in_it(
    model: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "uvicorn.access")
    app = create_app(Settings.from_environ(probing(model, tmp_path / "chatkit.db")))
    with serving(app, lifespan="on", access_log=True) as url, closing(Client(url)) as client:
        announced = {"name": "a.txt", "size": 2, "mime_type": "text/plain"}
        link = client.ask("attachments.create", announced)["upload_descriptor"]
        assert client.http.put(link["url"], content=b"ok", headers=link["headers"]).status_code == 200
    assert re.search(r'"PUT /attachments/atc_[0-9a-f]+ HTTP/1.1" 200', caplog.text)
    assert "signature" not in caplog.text
