"""Reading many streams so that none of them, and nothing new, has to wait for all the others."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator

import httpx2

PIECES_A_ROUND = 16
AT_ONCE_SECONDS = 0.001
"""What comes sooner than that was there already, read from the socket with the piece before it."""


class Turnstile:
    """Lets so many through in a round of the event loop, in the order in which they came; the others wait.

    Where fewer come than that, nobody waits.
    """

    def __init__(self, a_round: int = PIECES_A_ROUND):
        self._a_round = self._left = a_round
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def passed(self) -> None:
        """Wait until it is one's turn."""
        if self._left > 0:
            self._count()
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        await turn

    def _count(self) -> None:
        self._left -= 1
        if self._left == 0:
            asyncio.get_running_loop().call_soon(self._next_round)

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
    those that come after it, which costs less than each alone; the first of a response does not wait.
    """

    def __init__(self, stream: httpx2.AsyncByteStream, turnstile: Turnstile):
        self._stream = stream
        self._turnstile = turnstile

    async def __aiter__(self) -> AsyncIterator[bytes]:
        clock = asyncio.get_running_loop().time
        first, asked_at = True, clock()
        async for piece in self._stream:
            if not first and clock() - asked_at > AT_ONCE_SECONDS:
                await self._turnstile.passed()
            yield piece
            first, asked_at = False, clock()

    async def aclose(self) -> None:
        await self._stream.aclose()
