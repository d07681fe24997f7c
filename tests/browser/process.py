"""The service as a process of its own, started as its operator starts it."""

import asyncio
import json
import os
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from chatkit.types import (
    AssistantMessageContent,
    AssistantMessageItem,
    InferenceOptions,
    ThreadItem,
    ThreadMetadata,
    UserMessageItem,
    UserMessageTextContent,
)

from context import LOCAL_USER, RequestContext
from service import free_port
from store import open_store
from warm import Forked

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Service:
    def __init__(self, database: Path, **settings: str):
        self.database_url = f"sqlite:///{database}"
        self.url = ""
        self._settings = settings
        self._process: Forked | None = None
        self._port = str(free_port())  # to which it comes back

    def start(self) -> None:
        environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(HERE),
            "PORT": self._port,
            "AGENT": "stage",
            "DATABASE_URL": self.database_url,
            "TURNS_PER_MINUTE": "0",
            "CONCURRENT_TURNS_PER_USER": "0",
            **self._settings,
        }
        reading, writing = os.pipe()
        with open(os.devnull, "rb") as nothing, open(writing, "wb") as stderr:
            self._process = Forked(ROOT, [], environ, (nothing.fileno(), stderr.fileno(), stderr.fileno()))
        self._said = open(reading, encoding="utf-8")  # noqa: SIM115 (`stop` closes it)
        lines = []
        for line in self._said:
            lines.append(line)
            if found := re.search(r"listening on (http://\S+:(\d+))", line):
                self.url, self._port = found.groups()
                break
        else:
            raise RuntimeError("The service did not start:\n" + "".join(lines))
        threading.Thread(target=self._said.read, daemon=True).start()  # so that it never waits for a reader
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + 15
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/readyz", timeout=5):
                    return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self._process:
            self._process.send_signal(number)
            self._process.wait(40)
            self._said.close()

    def post(self, operation: str, **params: Any) -> Any:
        body = json.dumps({"type": operation, "params": params}).encode()
        request = urllib.request.Request(f"{self.url}/chatkit", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            text = answer.read().decode()
        if text.startswith("data:"):
            return [json.loads(line[5:]) for line in text.splitlines() if line.startswith("data:")]
        return json.loads(text)

    def say(self, text: str, thread_id: str | None = None) -> str:
        """Have one turn without a browser, and return the id of its thread."""
        message = {"content": [{"type": "input_text", "text": text}], "attachments": [], "inference_options": {}}
        if thread_id is None:
            return str(self.post("threads.create", input=message)[0]["thread"]["id"])
        self.post("threads.add_user_message", thread_id=thread_id, input=message)
        return thread_id

    def items(self, thread_id: str) -> list[Any]:
        return list(self.post("items.list", thread_id=thread_id, limit=100, order="asc")["data"])

    def seed(self, *, threads: int = 1, turns: int = 1) -> list[str]:
        """Store conversations without having them; the newest is the last."""
        with ThreadPoolExecutor(1) as pool:  # Playwright has an event loop in this thread
            return pool.submit(asyncio.run, self._seed(threads, turns)).result()

    async def _seed(self, threads: int, turns: int) -> list[str]:
        context = RequestContext(LOCAL_USER)
        ids = []
        async with open_store(self.database_url) as store:
            for number in range(threads):
                created_at = datetime.now(UTC) - timedelta(days=threads - number)
                thread = ThreadMetadata(
                    id=store.generate_thread_id(context), created_at=created_at, title=f"Seeded {number}"
                )
                await store.save_thread(thread, context)
                for turn in range(turns):
                    for item in self._turn(
                        thread, turn, store.generate_item_id("message", thread, context), created_at
                    ):
                        await store.add_thread_item(thread.id, item, context)
                ids.append(thread.id)
        return ids

    @staticmethod
    def _turn(thread: ThreadMetadata, turn: int, item_id: str, created_at: datetime) -> list[ThreadItem]:
        base: dict[str, Any] = {"thread_id": thread.id, "created_at": created_at}
        question = UserMessageTextContent(text=f"Question {turn}")
        answer = AssistantMessageContent(
            text=f"Answer {turn}: *some* words\n\n- and\n- a list\n\n" + "More of it. " * 20
        )
        return [
            UserMessageItem(id=f"{item_id}q", content=[question], inference_options=InferenceOptions(), **base),
            AssistantMessageItem(id=f"{item_id}a", content=[answer], **base),
        ]


@contextmanager
def running(service: Service) -> Iterator[Service]:
    service.start()
    try:
        yield service
    finally:
        service.stop()
