"""Reading many streams so that none of them, and nothing new, has to wait for all the others."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import timedelta
from typing import Any

import httpx2

PIECES_A_ROUND = 8
FIRST_PIECES = 8
"""A response's own events and its first words: an event, mostly, is a piece."""
AT_ONCE_SECONDS = 0.001
"""What comes sooner than that was there already, read from the socket with the piece before it."""


class Turnstile:
    """Lets so many through in a round of the event loop, in the order in which they came; the others wait.

    Where few come, one in so many waits for a round. It is for the loop in which it is made; in others nobody waits.
    """

    def __init__(self, a_round: int = PIECES_A_ROUND):
        self._loop = asyncio.get_running_loop()
        self._a_round = self._left = a_round
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def passed(self) -> None:
        """Wait until it is one's turn."""
        if asyncio.get_running_loop() is not self._loop:
            return
        if self._left > 0:
            self._count()
            return
        turn = self._loop.create_future()
        self._waiting.append(turn)
        await turn

    def _count(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._loop.call_soon(self._next_round)

    def _next_round(self) -> None:
        self._left = self._a_round
        while self._waiting and self._left > 0:
            turn = self._waiting.popleft()
            if not turn.done():  # its stream was closed meanwhile
                turn.set_result(None)
                self._count()


class ConsiderateStream(httpx2.AsyncByteStream):
    """A response's bytes, handed on a piece at a time through the turnstile.

    A busy process has pieces of all open streams to handle in each round of its loop, and a new request needs some
    forty rounds for its first words: it would wait for every stream forty times. A piece that waits here is joined by
    those that come after it, which costs less than each alone; the first ones of a response do not wait.
    """

    def __init__(self, stream: httpx2.AsyncByteStream, turnstile: Turnstile):
        self._stream = stream
        self._turnstile = turnstile

    async def __aiter__(self) -> AsyncIterator[bytes]:
        clock = asyncio.get_running_loop().time
        pieces, asked_at = 0, clock()
        reading: Any = aiter(self._stream)  # a generator, to be closed with this one
        async with aclosing(reading) as stream:
            async for piece in stream:
                pieces += 1
                if pieces > FIRST_PIECES and clock() - asked_at > AT_ONCE_SECONDS:
                    await self._turnstile.passed()
                yield piece
                asked_at = clock()

    @property
    def elapsed(self) -> timedelta | None:
        """What `Response.elapsed` reads, once the stream is closed."""
        return getattr(self._stream, "elapsed", None)

    async def aclose(self) -> None:
        await self._stream.aclose()
