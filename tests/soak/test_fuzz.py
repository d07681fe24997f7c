"""Mutated requests, and bytes that never were any: nothing fails on our side, and only the sender's rows change."""

import json
import logging
import os
import random
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import httpx2
import pytest
from chatkit.types import NonStreamingReq, StreamingReq
from mutations import Attempt, Known, attempt

from conftest import LONG, probing
from issuer import Issuer
from service import Client, errors_of, events_of, eventually, fold, service, thread_of
from standin import Call, StandIn

REQUESTS = 50_000 if LONG else 3000
SEED = int(os.environ.get("FUZZ_SEED", random.randrange(10**6)))
OTHERS = ("alice", "bob")
SENTINEL = "SENTINEL"

OPERATIONS = {get_args(each.model_fields["type"].annotation)[0] for each in get_args(StreamingReq | NonStreamingReq)}
FILES = {"upload", "announced", "download"}

MEANT_TO_FAIL = "failed: UserError from RuntimeError\n"
"""What is logged of the tool `explode`, which stands for recorded agents that raised."""


class Mallory:
    """Sends whatever comes to mind, and remembers what of it was done."""

    def __init__(self, client: Client, model: StandIn, foreign: Known, chance: random.Random):
        self.client, self.model, self.foreign, self.chance = client, model, foreign, chance
        self.known = Known()
        self.statuses: Counter[int] = Counter()
        self.done: Counter[str] = Counter()

    def try_something(self, number: int) -> tuple[Attempt, httpx2.Response]:
        tried = attempt(self.known, self.foreign, self.chance)
        self.model.reset()
        self.model.will(replace(tried.step, call_id=f"call_{number}") if isinstance(tried.step, Call) else tried.step)
        response = self.client.http.request(tried.method, tried.target, content=tried.content, headers=tried.headers)
        self.statuses[response.status_code] += 1
        if response.is_success:
            self._learn(tried, response)
        return tried, response

    def _learn(self, tried: Attempt, response: httpx2.Response) -> None:
        media_type = response.headers.get("content-type", "")
        events = events_of(response.text) if media_type == "text/event-stream" else []
        if not errors_of(events):
            self.done[tried.operation] += 1
            with suppress(ValueError):
                self.known.forget(json.loads(tried.content))
        self.known.learn(response.json() if media_type == "application/json" else events)


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with Issuer() as issuer:
        yield issuer


def test_no_request_fails_on_our_side_or_reaches_what_is_not_its_senders(
    tmp_path: Path, issuer: Issuer, model: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    database, foreign = tmp_path / "chatkit.db", Known()
    environ = probing(model, database, JWKS_URL=issuer.jwks_url, JWT_ISSUER=issuer.url)
    with service(**environ) as guarded:
        for name in OTHERS:
            settle(Client(guarded.url, bearer(issuer, name)), model, foreign)
        before = {name: rows_of(database, name) for name in OTHERS}
        mallory = Mallory(Client(guarded.url, bearer(issuer, "mallory")), model, foreign, random.Random(SEED))
        for number in range(REQUESTS):
            caplog.clear()
            tried, response = mallory.try_something(number)
            problem = problem_of(response, caplog)
            assert not problem, f"seed {SEED}, request {number}: {problem} after {tried}"
        assert {name: rows_of(database, name) for name in OTHERS} == before
    print(f"\n{REQUESTS} requests (seed {SEED}): {dict(mallory.statuses)}; done: {dict(mallory.done)}")
    assert set(mallory.done) == OPERATIONS | FILES


def problem_of(response: httpx2.Response, caplog: pytest.LogCaptureFixture) -> str:
    """Return what must not have happened: a failure on our side, a word of it in the log, or another user's words."""
    logged = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR or record.exc_info]
    failures = [line for line in logged if MEANT_TO_FAIL not in line]
    if response.status_code >= 500 or "went wrong on our side" in response.text or failures:
        return f"{response.status_code} {response.text[-300:]} {failures}"
    leak = SENTINEL.encode() in response.content or SENTINEL in caplog.text
    return f"somebody else's words, in {response.text} or {caplog.text}" if leak else ""


def settle(client: Client, model: StandIn, known: Known) -> None:
    """Have one of everything that a user can have, with a sentinel in it."""
    eventually(lambda: client.post("threads.list").status_code == 200)
    file = client.http.post("/attachments", files={"file": ("a.png", PNG + SENTINEL.encode(), "image/png")}).json()
    model.will(Call("show_widget"), Call("ask_form", call_id="c2"), Call("pick_file", call_id="c3"))
    events = client.create(SENTINEL, attachments=[file["id"]])
    items = [item["id"] for item in fold(events)]
    client.ask("items.feedback", {"thread_id": thread_of(events), "item_ids": items[:1], "kind": "positive"})
    unsent = client.http.post("/attachments", files={"file": (f"{SENTINEL}.txt", b"text", "text/plain")}).json()
    announced = client.ask("attachments.create", {"name": f"{SENTINEL}.png", "size": 12, "mime_type": "image/png"})
    known.learn([events, file, unsent, announced])
    thread = {"thread_id": thread_of(events)}
    eventually(lambda: client.ask("threads.get_by_id", thread).get("title"), what="the title, which comes beside it")


PNG = b"\x89PNG\r\n\x1a\n"


def rows_of(database: Path, user: str) -> dict[str, list[Any]]:
    """Return all rows that are the user's, or are about something of theirs."""
    about = {
        "user_id": ":user",
        "thread_id": "SELECT id FROM threads WHERE user_id = :user",
        "attachment_id": "SELECT id FROM attachments WHERE user_id = :user",
    }
    found = {}
    with closing(sqlite3.connect(database, timeout=10)) as db:
        for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            columns = {name for _, name, *_ in db.execute(f"PRAGMA table_info({table})")}
            theirs = " OR ".join(f"{column} IN ({ids})" for column, ids in about.items() if column in columns)
            if theirs:
                found[table] = db.execute(
                    f"SELECT * FROM {table} WHERE {theirs} ORDER BY rowid", {"user": user}
                ).fetchall()
    return found


def bearer(issuer: Issuer, name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {issuer.token(claims={'sub': name, 'exp': 4_000_000_000})}"}
