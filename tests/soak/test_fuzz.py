"""Mutated requests, and bytes that never were any: no 5xx, no traceback, and nobody's rows but the sender's change."""

import json
import os
import random
import sqlite3
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import httpx2
import pytest

from conftest import LONG, probing
from issuer import Issuer
from service import Client, eventually, fold, message, service, thread_of
from standin import Call, Say, StandIn

REQUESTS = 50000 if LONG else 3000
SEED = int(os.environ.get("FUZZ_SEED", random.randrange(10**6)))

SEEDS: list[dict[str, Any]] = [
    {"type": "threads.create", "params": {"input": message("Hello")}},
    {
        "type": "threads.add_user_message",
        "params": {"thread_id": "THREAD", "input": message("More")},
        "metadata": {"a": 1},
    },
    {
        "type": "threads.add_user_message",
        "params": {
            "thread_id": "THREAD",
            "input": {
                "content": [{"type": "input_tag", "id": "t", "text": "Doc", "data": {"k": 1}, "interactive": True}],
                "attachments": ["ATTACHMENT"],
                "quoted_text": "earlier",
                "inference_options": {"tool_choice": {"id": "look_up"}, "model": "m"},
            },
        },
    },
    {"type": "threads.add_client_tool_output", "params": {"thread_id": "THREAD", "result": {"path": "/a"}}},
    {
        "type": "threads.add_structured_input",
        "params": {
            "thread_id": "THREAD",
            "item_id": "ITEM",
            "input": {"status": "answered", "answers": {"q1": {"values": ["red"]}, "q2": {"skipped": True}}},
        },
    },
    {"type": "threads.retry_after_item", "params": {"thread_id": "THREAD", "item_id": "ITEM"}},
    {
        "type": "threads.custom_action",
        "params": {"thread_id": "THREAD", "item_id": "ITEM", "action": {"type": "go", "payload": [1]}},
    },
    {
        "type": "threads.sync_custom_action",
        "params": {"thread_id": "THREAD", "item_id": "ITEM", "action": {"type": "go"}},
    },
    {"type": "threads.get_by_id", "params": {"thread_id": "THREAD"}},
    {"type": "threads.list", "params": {"limit": 2, "order": "asc", "after": "THREAD"}},
    {"type": "items.list", "params": {"thread_id": "THREAD", "limit": 2, "order": "desc", "after": "ITEM"}},
    {"type": "items.feedback", "params": {"thread_id": "THREAD", "item_ids": ["ITEM"], "kind": "positive"}},
    {"type": "threads.update", "params": {"thread_id": "THREAD", "title": "Renamed"}},
    {"type": "threads.delete", "params": {"thread_id": "THREAD"}},
    {"type": "attachments.create", "params": {"name": "a.txt", "size": 3, "mime_type": "text/plain"}},
    {"type": "attachments.delete", "params": {"attachment_id": "ATTACHMENT"}},
    {"type": "input.transcribe", "params": {"audio_base64": "AAAA", "mime_type": "audio/webm"}},
]
ODD: list[Any] = [
    None, True, False, 0, -1, 2**63, 10**400, 1e308, 0.5, "", " ", "x" * 5000, "\x00", "\u202e", "\ud83d\ude00",
    "after:0", "after:99999999999999999999", "../..", "'; DROP TABLE threads; --", [], {},
    [[[[[[]]]]]], {"": {"": {"": ""}}},
]  # fmt: skip


def mutated(request: Any, chance: random.Random, ids: list[str]) -> bytes:
    """Return the request with some of its parts changed, or bytes that are no request at all."""
    if chance.random() < 0.05:
        return chance.randbytes(chance.randrange(200))
    body = json.loads(json.dumps(request))
    for _ in range(chance.randrange(4)):
        _mutate(body, chance)
    text = json.dumps(body)
    for placeholder in ("THREAD", "ITEM", "ATTACHMENT"):
        text = text.replace(placeholder, chance.choice(ids))
    data = text.encode()
    if chance.random() < 0.1:
        place = chance.randrange(len(data))
        data = data[:place] + chance.randbytes(chance.randrange(4)) + data[place + chance.randrange(4) :]
    return data


def _mutate(node: Any, chance: random.Random) -> None:
    """Change one part, somewhere inside."""
    while isinstance(node, dict | list) and node:
        key = chance.choice(list(node)) if isinstance(node, dict) else chance.randrange(len(node))
        if not isinstance(node[key], dict | list) or not node[key] or chance.random() < 0.3:
            if chance.random() < 0.2:
                del node[key]
            else:
                node[key] = deepcopy(chance.choice(ODD))  # which a later change may change
            return
        node = node[key]


def rows_of(database: Path, user: str) -> list[Any]:
    """Return all that is stored of a user."""
    tables = ("threads", "items", "feedback", "attachments", "usage")
    with sqlite3.connect(database) as db:
        return [
            db.execute(f"SELECT * FROM {table} WHERE user_id = ? ORDER BY rowid", (user,)).fetchall()
            for table in tables
        ]


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with Issuer() as issuer:
        yield issuer


def test_no_request_fails_on_our_side_or_reaches_what_is_not_its_senders(
    tmp_path: Path, issuer: Issuer, model: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(SEED)
    database = tmp_path / "chatkit.db"
    model.otherwise = [Say("Well.")]
    environ = probing(model, database, JWKS_URL=issuer.jwks_url, JWT_ISSUER=issuer.url)
    with service(**environ) as guarded:
        users = {name: Client(guarded.url, bearer(issuer, name)) for name in ("alice", "bob", "mallory")}
        eventually(lambda: users["alice"].post("threads.list").status_code == 200)
        ids = []
        for name, client in users.items():
            model.will(Call("show_widget"), Call("ask_form", call_id="c2"), Call("pick_file", call_id="c3"))
            events = client.create(f"SENTINEL of {name}")
            attachment = client.http.post("/attachments", files={"file": ("a.txt", b"abc", "text/plain")}).json()
            ids += [thread_of(events), attachment["id"], *[item["id"] for item in fold(events)]]
        before = {name: rows_of(database, name) for name in ("alice", "bob")}
        mallory = users["mallory"]
        for number in range(REQUESTS):
            body = mutated(chance.choice(SEEDS), chance, ids)
            try:
                response = mallory.http.post("/chatkit", content=body, headers={"content-type": "application/json"})
            except httpx2.TransportError as error:
                pytest.fail(f"seed {SEED}, request {number}: {error!r} for {body[:300]!r}")
            assert response.status_code < 500, f"seed {SEED}, request {number}: {response.text} for {body[:300]!r}"
            assert "SENTINEL of alice" not in response.text
            assert "SENTINEL of bob" not in response.text
            if "went wrong on our side" in response.text:
                pytest.fail(f"seed {SEED}, request {number}: {response.text[-300:]} for {body[:300]!r}")
        after = {name: rows_of(database, name) for name in ("alice", "bob")}
    assert after == before
    assert "Traceback" not in caplog.text
    assert "SENTINEL" not in caplog.text
    print(f"\n{REQUESTS} mutated requests (seed {SEED}): no failure on our side, nobody else's rows changed")


def bearer(issuer: Issuer, name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {issuer.token(claims={'sub': name, 'exp': 4_000_000_000})}"}
