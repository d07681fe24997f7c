"""A client's connection: how slow it may be, and how many there are at once."""

import asyncio
import json
import resource
from http import HTTPStatus

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 4096
"""At once in a process, unless it is told to run more turns than this leaves room for."""


def max_connections(max_turns: int) -> int:
    """Return how many connections the process takes: each may need a second descriptor, for the model."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(descriptors // 2, max(MAX_CONNECTIONS, 2 * max_turns) if max_turns else descriptors)


class Connection(H11Protocol):
    """A connection whose client sends what it has begun, at a mebibyte in a quarter of an hour or faster.

    uvicorn 0.54 waits without end for a first request, for the rest of a head, and for a body. Twice in a row a look
    must find a client slow before it is refused, so that none is that has only just begun.

    A connection that was accepted, and whose request is on its way, is answered even when the process is to stop:
    uvicorn closes it, and its client sees neither an answer nor a refusal.
    """

    LOOK_SECONDS = 15.0
    LEAST_BYTES = 16 * 1024
    FIRST_REQUEST_SECONDS = 1.0

    _received = 0
    _was_slow = False
    _next_look: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "busy", "The service is busy. Try again in a moment.")
        else:
            self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._next_look is not None:
            self._next_look.cancel()
        super().connection_lost(exc)

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing of what anybody may ask for. (uvicorn 0.54 would say two lines each time.)"""

    def shutdown(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.loop.call_later(self.FIRST_REQUEST_SECONDS, super().shutdown)
        else:
            super().shutdown()

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        super().data_received(data)

    def _look_later(self) -> None:
        self._next_look = self.loop.call_later(self.LOOK_SECONDS, self._look)

    def _look(self) -> None:
        is_slow = self._owes_more() and self._received < self.LEAST_BYTES
        if is_slow and self._was_slow:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, "too_slow", "The request did not arrive in time. Send it again.")
            return
        self._received, self._was_slow = 0, is_slow
        self._look_later()

    def _owes_more(self) -> bool:
        """Whether the client is the one to send now: its request, or the rest of it."""
        if self.flow.read_paused:  # it is we who are slow
            return False
        if self.cycle is None:
            return True
        if self.cycle.response_complete:
            return self.timeout_keep_alive_task is None  # else uvicorn itself closes, unless another request begins
        return self.cycle.more_body

    def _refuse(self, status: HTTPStatus, code: str, message: str) -> None:
        """Answer where nothing has been answered yet, and close."""
        if self.cycle is None or not (self.cycle.response_started or self.cycle.response_complete):
            body = json.dumps({"code": code, "message": message})
            head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\nretry-after: 5\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n{body}".encode())
        self.transport.close()
