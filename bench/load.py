"""Both sides of a contestant in one event loop, so that their clocks are one: its clients, and the model's stand-in."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import Any, cast

_markers = count(1)

clock = time.monotonic


def marker() -> str:
    """Return a message's text that tells its turn from all others."""
    return f"turn-{next(_markers)};"


# --- the stand-in -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Script:
    """What every answer is: so many deltas of so many words, `gap_seconds` apart; one that `hangs` stays silent after
    the first.
    """

    deltas: int = 50
    words: int = 1
    gap_seconds: float = 0.0
    hangs: bool = False


@dataclass
class Upstream:
    """A stand-in for the Responses API that costs little. Every event is a write of its own, as it is from OpenAI."""

    url: str = ""
    script: Script = field(default_factory=Script)
    answers: int = 0

    def events(self) -> list[bytes]:
        """Return the next answer, an event each, and no item id twice."""
        self.answers += 1
        identity = f"{self.answers:08d}".encode()
        return [event.replace(b"00000000", identity) for event in _answer(self.script.deltas, self.script.words)]


@cache
def _answer(deltas: int, words: int) -> list[bytes]:
    return [_chunk(event) for event in _events(deltas, words)]


@cache
def words_of(deltas: int, words: int) -> list[str]:
    """Return the deltas of an answer. No word is there twice, so that none can be lost, moved or doubled unseen."""
    each = [f" {number:04x}" for number in range(deltas * words)]
    return ["".join(each[place : place + words]) for place in range(0, len(each), words)]


def _events(deltas: int, words: int) -> list[bytes]:
    numbers = count()
    text = "".join(words_of(deltas, words))
    item = {"id": "msg_00000000", "type": "message", "role": "assistant", "status": "in_progress", "content": []}
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    whole_part = {**part, "text": text}
    whole_item = {**item, "status": "completed", "content": [whole_part]}
    at = {"item_id": "msg_00000000", "output_index": 0, "content_index": 0}

    def event(type: str, **fields: Any) -> bytes:
        body = {"type": type, "sequence_number": next(numbers), **fields}
        return f"event: {type}\ndata: {json.dumps(body, separators=(',', ':'))}\n\n".encode()

    return [
        event("response.created", response=_response("in_progress")),
        event("response.in_progress", response=_response("in_progress")),
        event("response.output_item.added", output_index=0, item=item),
        event("response.content_part.added", part=part, **at),
        *[
            event("response.output_text.delta", delta=delta, logprobs=[], obfuscation="q1W2e3R4t5Z6", **at)
            for delta in words_of(deltas, words)
        ],
        event("response.output_text.done", text=text, logprobs=[], **at),
        event("response.content_part.done", part=whole_part, **at),
        event("response.output_item.done", output_index=0, item=whole_item),
        event("response.completed", response={**_response("completed"), "output": [whole_item]}),
    ]


def _response(status: str) -> dict[str, Any]:
    used = {
        "input_tokens": 70,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 50,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 120,
    }
    return {
        "id": "resp_00000000",
        "object": "response",
        "created_at": 1760000000,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": "You are a helpful assistant.",
        "max_output_tokens": None,
        "model": "stand-in",
        "output": [],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": used if status == "completed" else None,
        "user": None,
        "metadata": {},
    }


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class _Asked(asyncio.Protocol):
    """A connection to the stand-in."""

    def __init__(self, upstream: Upstream):
        self._upstream = upstream
        self._received = bytearray()
        self._answering: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._answering:
            self._answering.cancel()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = bytes(self._received).partition(b"\r\n\r\n")
        if end and len(body) >= _content_length(head):
            self._received.clear()
            if b'"stream":true' in body.replace(b" ", b""):
                self._answering = asyncio.create_task(self._stream())
            else:
                self._whole()

    def _whole(self) -> None:
        """Answer the request for a title."""
        part = {"type": "output_text", "text": "A title", "annotations": []}
        item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
        body = json.dumps({**_response("completed"), "output": [item]}).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self._transport.write(head % len(body) + body)

    async def _stream(self) -> None:
        script = self._upstream.script
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        begin, events = 4, self._upstream.events()
        self._transport.write(head + b"".join(events[:begin]))
        due = clock()
        for event in events[begin:-4]:
            self._transport.write(event)
            if script.hangs:
                await asyncio.Event().wait()
            due += script.gap_seconds
            await asyncio.sleep(max(0.0, due - clock()))
        self._transport.write(b"".join(events[-4:]) + b"0\r\n\r\n")


def _content_length(head: bytes) -> int:
    found = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
    return int(found.group(1)) if found else 0


@asynccontextmanager
async def standing_in() -> AsyncIterator[Upstream]:
    """Serve the stand-in on a free port of this loop."""
    upstream = Upstream()
    server = await asyncio.get_running_loop().create_server(
        lambda: _Asked(upstream), "127.0.0.1", 0, backlog=2048, start_serving=True
    )
    upstream.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield upstream
    finally:
        server.close()


# --- clients ------------------------------------------------------------------------------------------------------

TEXT_DELTA = re.compile(rb'text_delta"[^}]*?"delta":"([^"]*)"')


@dataclass
class Answer:
    """One response: when it was asked for, when its first delta came (0: it has none), when it ended, and its body.

    `pieces` are the deltas of a turn.
    """

    asked_at: float
    first_delta_at: float = 0.0
    ended_at: float = 0.0
    body: bytearray = field(default_factory=bytearray)
    pieces: int = 0

    def require_turn(self, script: Script) -> None:
        """Raise unless this is a whole turn: no error, all words in their order, and the whole message at its end."""
        assert b'"type":"error"' not in self.body, f"a turn failed: {self.body.decode()}"
        text = "".join(words_of(script.deltas, script.words)).encode()
        _, _, done = self.body.rpartition(b'"type":"thread.item.done"')
        said = b"".join(TEXT_DELTA.findall(self.body))
        assert said == text, f"half a turn, or not in order: {self.body.decode()}"
        assert text in done, f"half a turn, or not in order: {self.body.decode()}"


class _Response(asyncio.Protocol):
    """A connection that reads one response after the other."""

    def __init__(self) -> None:
        self.answer = Answer(0.0)
        self.done: asyncio.Future[Answer] | None = None
        self._head = bytearray()
        self._left: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self.done and not self.done.done():
            self.done.set_exception(ConnectionResetError("the contestant closed the connection"))

    def send(self, request: bytes) -> asyncio.Future[Answer]:
        self.done = asyncio.get_running_loop().create_future()
        self._head, self._left = bytearray(), None
        self.answer = Answer(clock())
        self.transport.write(request)
        return self.done

    def data_received(self, data: bytes) -> None:
        answer = self.answer
        if self._left is None:  # the head is not whole yet
            self._head += data
            head, end, data = bytes(self._head).partition(b"\r\n\r\n")
            if not end:
                return
            assert b" 200 " in head[:16], (head + data).decode()
            self._left = _content_length(head) if b"content-length" in head.lower() else -1
        answer.body += data
        if not answer.first_delta_at and b"text_delta" in answer.body:
            answer.first_delta_at = clock()
        if self._left >= 0:
            self._left -= len(data)
            ended = self._left == 0
        else:
            ended = answer.body.endswith(b"0\r\n\r\n")
        if ended and self.done and not self.done.done():
            answer.ended_at = clock()
            self.done.set_result(answer)


HEAD = b"POST /chatkit HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
IDLE_SECONDS = 3.0
"""A connection is not used again after so long: uvicorn closes it after five."""


class Connection:
    """A client's connection, kept alive between its requests as a browser keeps one."""

    def __init__(self, port: int):
        self._port = port
        self._response: _Response | None = None

    async def send(self, type: str, params: dict[str, Any]) -> Answer:
        """Send a request and return its whole answer."""
        if self._response is None or clock() - self._response.answer.ended_at > IDLE_SECONDS:
            self.close()
            loop = asyncio.get_running_loop()
            _, self._response = await loop.create_connection(_Response, "127.0.0.1", self._port)
        body = json.dumps({"type": type, "params": params}).encode()
        return await self._response.send(HEAD % len(body) + body)

    @property
    def is_answering(self) -> bool:
        """Whether an answer has begun and not ended."""
        answer = self._response and self._response.answer
        return bool(answer and answer.first_delta_at and not answer.ended_at)

    def close(self) -> None:
        if self._response:
            self._response.done = None
            self._response.transport.close()
            self._response = None


def message(text: str) -> dict[str, Any]:
    return {"content": [{"type": "input_text", "text": text}], "attachments": [], "inference_options": {}}


class Client:
    """A user with a titled thread."""

    def __init__(self, connection: Connection, thread_id: str):
        self.connection = connection
        self.thread_id = thread_id

    @classmethod
    async def open(cls, port: int, script: Script) -> "Client":
        """Return a user whose thread has one exchange."""
        connection = Connection(port)
        answer = await connection.send("threads.create", {"input": message("turn-0;")})
        answer.require_turn(script)
        found = re.search(rb'"id":"(thr[^"]+)"', answer.body)
        client = cls(connection, found.group(1).decode() if found else "")
        await client.rename("A title of the user's")
        return client

    async def rename(self, title: str) -> Answer:
        answer = await self.connection.send("threads.update", {"thread_id": self.thread_id, "title": title})
        assert title.encode() in answer.body, f"not renamed: {answer.body.decode()}"
        return answer

    async def say(self, text: str, script: Script) -> Answer:
        """Return the answer, which is the script's, or raise."""
        params = {"thread_id": self.thread_id, "input": message(text)}
        answer = await self.connection.send("threads.add_user_message", params)
        answer.require_turn(script)
        answer.pieces = answer.body.count(b"text_delta")
        return answer

    async def say_all(self, markers: Sequence[str], script: Script) -> list[Answer]:
        """Say one after the other, each when the one before is answered."""
        answers = []
        for text in markers:
            answers.append(await self.say(text, script))
            answers[-1].body.clear()  # there may be thousands
        return answers
