"""Requests as a malicious user would make them: recorded ones with ids that fit, changed here and there, and noise."""

import json
import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from standin import Call, Say, Step

RECORDED: dict[str, list[dict[str, Any]]] = {}
"""For each operation, requests of all kinds to ChatKit 1.6.5, each with what the agent was made to do then."""

for line in (Path(__file__).parents[1] / "fixtures/protocol.jsonl").read_text("utf-8").splitlines():
    exchange = json.loads(line)
    RECORDED.setdefault(exchange["request"]["type"], []).append(exchange)

PAGE = {"limit": 2, "order": "asc", "after": "message_0001"}
"""How a page is asked for, which nobody recorded."""

STEPS: dict[str, Step] = {
    "text": Say("Well."),
    "title": Call("rename", {"title": "Named"}),
    "progress": Call("look_up", {"word": "chance"}),
    "boom": Call("explode"),
    "custom_error": Call("refuse"),
    "tool": Call("pick_file"),
    "structured": Call("ask_form"),
    "widget": Call("show_widget"),
}
"""What the model does where the recorded agent did this."""

FITTING = {
    "threads.retry_after_item": "user_message",
    "threads.add_client_tool_output": "client_tool_call pending",
    "threads.add_structured_input": "structured_input pending",
    "threads.custom_action": "widget",
    "threads.sync_custom_action": "widget",
}
"""The kind of item that an operation is about; any, where none is named."""

FILES = {"text/plain": b"twelve bytes", "application/pdf": b"%PDF-1234567", "image/png": b"\x89PNG\r\n\x1a\n1234"}
"""A file of each type, as long as the recorded ones were announced to be."""

ODD: list[Any] = [
    None, True, False, 0, -1, 2**63, 10**400, 1e308, 0.5, "", " ", "x" * 5000, "\x00", "\u202e", "\ud83d\ude00",
    "after:0", "after:99999999999999999999", "../..", "'; DROP TABLE threads; --", [], {},
    [[[[[[]]]]]], {"": {"": {"": ""}}},
]  # fmt: skip

MOST_THREADS = 20


@dataclass
class Known:
    """What a user has been told of: threads, with the kind of each item; attachments, with type and links of each."""

    threads: dict[str, dict[str, str]] = field(default_factory=dict)
    attachments: dict[str, dict[str, str]] = field(default_factory=dict)

    def learn(self, told: Any) -> None:
        """Take in what an answer names, however deep inside."""
        match told:
            case {"id": str(name), "mime_type": str(media_type)}:
                upload = (told.get("upload_descriptor") or {}).get("url")
                links = {"upload": upload, "view": told.get("preview_url")}
                self.attachments[name] = {"type": media_type, **{use: link for use, link in links.items() if link}}
            case {"id": str(name), "thread_id": str(thread_id), "type": str(kind)}:
                if kind == "user_message":
                    self._forget_calls(thread_id)
                self._thread(thread_id)[name] = f"{kind} {told.get('status', '')}"
            case {"id": str(name), "created_at": _}:
                self._thread(name)
        for each in told.values() if isinstance(told, dict) else told if isinstance(told, list) else ():
            self.learn(each)

    def _thread(self, thread_id: str) -> dict[str, str]:
        """Return the thread's items; the thread that was heard of first is forgotten for one too many."""
        items = self.threads.setdefault(thread_id, {})
        if len(self.threads) > MOST_THREADS:
            del self.threads[next(iter(self.threads))]
        return items

    def _forget_calls(self, thread_id: str) -> None:
        """Take in that no client tool call of the thread waits any more."""
        items = self._thread(thread_id)
        for name in [name for name, kind in items.items() if kind == "client_tool_call pending"]:
            del items[name]

    def forget(self, request: Any) -> None:
        """Take in that a request was done."""
        match request:
            case {"type": "threads.add_client_tool_output", "params": {"thread_id": thread_id}}:
                self._forget_calls(thread_id)
            case {"type": "threads.delete", "params": {"thread_id": thread_id}}:
                self.threads.pop(thread_id, None)
            case {"type": "attachments.delete", "params": {"attachment_id": name}}:
                self.attachments.pop(name, None)
            case {"type": "threads.retry_after_item", "params": {"thread_id": thread_id, "item_id": name}}:
                items = self.threads.get(thread_id, {})
                for later in list(items)[list(items).index(name) + 1 :] if name in items else ():
                    del items[later]

    @property
    def ids(self) -> list[str]:
        return [*self.threads, *(name for items in self.threads.values() for name in items), *self.attachments]

    def fitting(self, kind: str, chance: random.Random) -> tuple[str, str]:
        """Return a thread and an item of it, of this kind where there is one."""
        places = [(thread_id, name) for thread_id, items in self.threads.items() for name in items]
        fitting = [(thread_id, name) for thread_id, name in places if self.threads[thread_id][name].startswith(kind)]
        return chance.choice(fitting or places or [("thr_0001", "message_0001")])

    def attachment(self, chance: random.Random, use: str = "") -> str:
        """Return a young attachment, with a link for this use where there is one."""
        fitting = [name for name, links in self.attachments.items() if use in links]
        return chance.choice((fitting or list(self.attachments))[-5:] or ["atc_0001"])


@dataclass
class Attempt:
    """A request, and what it is meant to be; `operation` counts as tried where its answer is 2xx."""

    operation: str
    method: str
    target: str
    content: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    step: Step = STEPS["text"]


def attempt(own: Known, foreign: Known, chance: random.Random) -> Attempt:
    """Return a request about what is the user's own, mostly, and as it should be, sometimes."""
    if chance.random() < 0.8:
        return operation(own, foreign, chance)
    return chance.choice([upload, announced, download])(own, foreign, chance)


def operation(own: Known, foreign: Known, chance: random.Random) -> Attempt:
    kind = chance.choice([*RECORDED, "threads.add_user_message", "threads.add_user_message"])
    recorded = chance.choice(RECORDED[kind])
    request = addressed(recorded["request"], own, foreign, chance)
    for _ in range(chance.choice([0, 0, 1, 2])):
        change(request, chance)
    headers = {"content-type": chance.choice(["application/json"] * 20 + ["text/plain", ""])}
    content = damaged(json.dumps(request).encode(), chance)
    step = STEPS[chance.choice([recorded["script"], *STEPS, *["tool", "structured"] * 2])]
    return Attempt(kind, "POST", "/chatkit", content, headers, step)


def addressed(recorded: Any, own: Known, foreign: Known, chance: random.Random) -> Any:
    """Return the request with ids that fit it; now and then one that is another user's, or of another kind."""
    request = deepcopy(recorded)
    if request["type"].endswith(".list") and chance.random() < 0.5:
        request["params"] |= PAGE
    thread_id, item_id = own.fitting(FITTING.get(request["type"], ""), chance)

    their_thread_id, their_item_id = foreign.fitting(FITTING.get(request["type"], ""), chance)

    def or_other(name: str, theirs: str) -> str:
        return chance.choice([theirs, theirs, *own.ids[-1:]]) if chance.random() < 0.2 else name

    def thread(_: Any = None) -> str:
        return or_other(thread_id, their_thread_id)

    def item(_: Any = None) -> str:
        return or_other(item_id, their_item_id)

    def attachment(_: Any = None) -> str:
        return or_other(own.attachment(chance), foreign.attachment(chance))

    fitting: dict[str, Callable[[Any], Any]] = {
        "thread_id": thread,
        "item_id": item,
        "item_ids": lambda names: [item() for _ in names],
        "after": item if "thread_id" in request["params"] else thread,
        "attachment_id": attachment,
        "attachments": lambda names: [attachment() for _ in names],
    }
    for params in (request["params"], request["params"].get("input", {})):
        params.update({name: fitting[name](value) for name, value in params.items() if name in fitting})
    return request


def upload(own: Known, foreign: Known, chance: random.Random) -> Attempt:
    media_type, data = chance.choice(list(FILES.items()))
    head = f'--b\r\ncontent-disposition: form-data; name="file"; filename="a.txt"\r\ncontent-type: {media_type}\r\n\r\n'
    content = damaged(head.encode() + data + b"\r\n--b--\r\n", chance)
    return Attempt("upload", "POST", "/attachments", content, {"content-type": "multipart/form-data; boundary=b"})


def announced(own: Known, foreign: Known, chance: random.Random) -> Attempt:
    name, link = _link(own, foreign, chance, "upload")
    media_type = own.attachments.get(name, {}).get("type", "image/png")
    content = damaged(FILES.get(media_type, b""), chance)
    return Attempt("announced", chance.choice(["PUT", "POST"]), link, content, {"content-type": media_type})


def download(own: Known, foreign: Known, chance: random.Random) -> Attempt:
    name, link = _link(own, foreign, chance, "view")
    asked = {"range": f"bytes={chance.randrange(-3, 20)}-{chance.choice(['', 3, 99, -1])}"}
    by_token = f"/attachments/{name}"
    return Attempt("download", "GET", chance.choice([link, by_token]), b"", chance.choice([{}, asked]))


def _link(own: Known, foreign: Known, chance: random.Random, use: str) -> tuple[str, str]:
    """Return an attachment and a link of its, perhaps for another use, or with another's id in it."""
    name = own.attachment(chance, chance.choice([use, use, "type"]))
    links = own.attachments.get(name, {})
    link = links.get(use) or links.get("upload") or f"/attachments/{name}?expires=1&signature=x"
    target = link[link.index("/attachments") :]
    if chance.random() < 0.2:
        target = target.replace(name, chance.choice(list(foreign.attachments)))
    if chance.random() < 0.2:
        path, _, query = target.partition("?")
        target = f"{path}?{quote(damaged(query.encode(), chance, 1), safe='=&')}"
    return name, target


def change(node: Any, chance: random.Random) -> None:
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


def damaged(data: bytes, chance: random.Random, often: float = 0.1) -> bytes:
    """Return the bytes, now and then with some cut out or put in, or others altogether."""
    if chance.random() < often / 2:
        return chance.randbytes(chance.randrange(200))
    if chance.random() < often and data:
        place = chance.randrange(len(data))
        return data[:place] + chance.randbytes(chance.randrange(4)) + data[place + chance.randrange(4) :]
    return data
