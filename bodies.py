"""A request's body: how long it may be, how long it may take, and how many that are long are read at once."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from starlette.requests import Request

from attachments import media_type_of
from conversations import QuotaExceeded
from failures import Refused
from sdk import parse_request

MAX_BODY_BYTES = 1024 * 1024
MAX_DICTATION_BYTES = 34 * 1024 * 1024
MAX_DICTATIONS = 4
"""At once in a process: each takes several times its body's length in memory."""
MAX_MARKS = 1000
"""Of JSON's structure in dictation, which is one long base64 string: each more would be an object in memory."""
LARGE_BODY_BYTES = 64 * 1024
MAX_LARGE_BODIES = 64
"""At once in a process that are read beyond `LARGE_BODY_BYTES`: clients that never send the rest cost no more."""
MAX_LARGE_BODIES_OF_USER = 8
ARRIVAL_SECONDS = 60.0
"""For the rest of a body that has one of these places, from when it took it: a few that drip would keep them all."""


class _Places:
    """So many at once in a process, and so many of them one user's; `quota` is what a user with all of his is told."""

    def __init__(self, most: int, most_of_user: int, quota: str):
        self._most = most
        self._most_of_user = most_of_user
        self._quota = quota
        self._taken: Counter[str] = Counter()

    def take(self, user_id: str, until: AsyncExitStack) -> None:
        """Hold one until the context is left. Raises `QuotaExceeded` where there is none."""
        if self._taken[user_id] >= self._most_of_user:
            raise QuotaExceeded(self._quota, retry_after_seconds=5)
        if self._taken.total() >= self._most:
            raise QuotaExceeded("max_turns", retry_after_seconds=5)
        self._taken[user_id] += 1
        until.callback(self._give_back, user_id)

    def _give_back(self, user_id: str) -> None:
        self._taken -= Counter([user_id])  # and forget whoever holds none


class Bodies:
    """Reads the bodies of a process's requests."""

    def __init__(self, *, dictation: bool, arrival_seconds: float = ARRIVAL_SECONDS):
        self._dictation = dictation
        self._arrival_seconds = arrival_seconds
        self._large = _Places(MAX_LARGE_BODIES, MAX_LARGE_BODIES_OF_USER, "max_turns")
        self._dictations = _Places(MAX_DICTATIONS, 1, "dictations")

    @asynccontextmanager
    async def json(self, request: Request, user_id: str) -> AsyncIterator[bytes]:
        """Yield the body, which no request may make longer than a message is; dictation brings its audio with it.

        Its places are kept until the context is left. Raises `Refused` and `QuotaExceeded`.
        """
        if media_type_of(request.headers.get("content-type", "")) != "application/json":
            raise Refused("unsupported_type", "The content-type must be application/json.")
        async with AsyncExitStack() as places:
            try:
                async with asyncio.timeout(None) as arriving:
                    body = await self._read(request, user_id, places, arriving)
            except TimeoutError:
                words = "The request did not arrive in time. Send it again."
                raise Refused("too_slow", words, {"retry-after": "5", "connection": "close"}) from None
            if len(body) > MAX_BODY_BYTES and parse_request(body).type != "input.transcribe":
                raise _too_large(MAX_BODY_BYTES)  # what only names dictation somewhere
            yield body

    async def _read(self, request: Request, user_id: str, places: AsyncExitStack, arriving: asyncio.Timeout) -> bytes:
        body, marks, limit = bytearray(), 0, LARGE_BODY_BYTES
        async for chunk in request.stream():
            body += chunk
            marks += sum(map(chunk.count, (b"[", b"{", b",")))
            if LARGE_BODY_BYTES == limit < len(body):
                self._large.take(user_id, places)
                self._hurry(arriving)
                limit = MAX_BODY_BYTES
            if MAX_BODY_BYTES == limit < len(body) and marks <= MAX_MARKS and self._may_be_dictation(body):
                self._dictations.take(user_id, places)
                self._hurry(arriving)
                limit = MAX_DICTATION_BYTES
            if limit == MAX_DICTATION_BYTES and marks > MAX_MARKS:
                limit = MAX_BODY_BYTES
            if len(body) > limit:
                raise _too_large(limit)
        return bytes(body)

    def _may_be_dictation(self, beginning: bytearray) -> bool:
        return self._dictation and b'"input.transcribe"' in beginning[:MAX_BODY_BYTES]

    def _hurry(self, arriving: asyncio.Timeout) -> None:
        arriving.reschedule(asyncio.get_running_loop().time() + self._arrival_seconds)


def _too_large(limit: int) -> Refused:
    return Refused("too_large", f"The body is longer than {limit} bytes.")
