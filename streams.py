"""A turn's events on their way to its client, who may be slow, or gone."""

import asyncio

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from turn import Stopped, Turn

SSE_HEADERS = {
    "content-type": "text/event-stream",
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",
}
HEARTBEAT = b": keep-alive\n"
"""One newline: a blank line after it would dispatch an empty event in the panel's @microsoft/fetch-event-source."""
LAST_WORDS_SECONDS = 1.0
"""How long a client may take to read why its turn was stopped by a shutdown."""
LAST_BYTES_SECONDS = 60.0
"""How long a client may take to read what is left when its turn has ended."""


class TurnResponse(Response):
    """A turn's events as they come. When the client goes, the turn is stopped, and stored before this returns."""

    def __init__(self, turn: Turn, heartbeat_seconds: float, *, stop_when_gone: bool):
        super().__init__(headers=SSE_HEADERS)
        del self.headers["content-length"]
        self._turn = turn
        self._heartbeat_seconds = heartbeat_seconds
        turn.goes_on_alone = not stop_when_gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send_all(send), name="send")
        gone = asyncio.create_task(_disconnected(receive), name="disconnected")
        try:
            await self._until_sent_or_gone(sending, gone)
        except asyncio.CancelledError:  # uvicorn's, when the grace is over; the client still listens
            self._turn.stop(Stopped.SHUTDOWN)
            await self._turn.settled()
            await asyncio.wait({sending}, timeout=LAST_WORDS_SECONDS)
        finally:
            for task in (sending, gone):
                task.cancel()
            self._turn.stop(Stopped.CLIENT_GONE)
            await self._turn.settled()
            await asyncio.wait({sending, gone})

    async def _until_sent_or_gone(self, sending: asyncio.Task[None], gone: asyncio.Task[None]) -> None:
        await asyncio.wait({sending, gone, self._turn.task}, return_when=asyncio.FIRST_COMPLETED)
        if gone.done() and self._turn.goes_on_alone:
            self._turn.detach()
            await self._turn.settled()  # here, so that a shutdown knows of it and leaves it its grace
        elif self._turn.task.done():  # a client that reads no more is not waited for without end
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED, timeout=LAST_BYTES_SECONDS)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while (chunk := await self._turn.read(self._heartbeat_seconds)) is not None:
            await send({"type": "http.response.body", "body": chunk or HEARTBEAT, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
