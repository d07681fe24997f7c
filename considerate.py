"""Reading many streams so that none of them, and nothing new, has to wait for all the others."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from datetime import timedelta

import httpx2

PIECES_A_ROUND = 4
FIRST_PIECES = 8
"""A response's own events and its first words: an event, mostly, is a piece."""
ROUNDS_TO_CLIENT = 4
"""What the loop takes to hand a piece on: to the run's queue, to the turn's, to the response, to the socket."""
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
        self._reading = aiter(stream)
        self._pieces = 0

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        clock = asyncio.get_running_loop().time
        asked_at = clock()
        piece = await anext(self._reading)
        self._pieces += 1
        if self._pieces == FIRST_PIECES:  # what came with the first words is read when they are on their way
            for _ in range(ROUNDS_TO_CLIENT):
                await asyncio.sleep(0)
        if self._pieces > FIRST_PIECES and clock() - asked_at > AT_ONCE_SECONDS:
            await self._turnstile.passed()
        return piece

    @property
    def elapsed(self) -> timedelta | None:
        """What `Response.elapsed` reads, once the stream is closed."""
        return getattr(self._stream, "elapsed", None)

    async def aclose(self) -> None:
        """Close the stream, and the generators that read it where they stopped.

        httpx2 leaves those to the garbage collector, which fails in some thread while the loop's closes them.
        """
        if isinstance(self._reading, AsyncGenerator):
            with suppress(RuntimeError):  # it is being read
                await self._reading.aclose()
        await self._stream.aclose()
