"""Clients that no library would write: they read a stream from its socket, and leave when and how they like."""

import json
import select
import socket
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any, Self
from urllib.parse import urlsplit

from service import events_of, message

Event = dict[str, Any]


class Stream:
    """One POST, and what has come back so far: `seen` holds every whole event."""

    def __init__(self, url: str, type: str, params: Mapping[str, Any], *, receive_buffer_bytes: int | None = None):
        address = urlsplit(url)
        body = json.dumps({"type": type, "params": params}).encode()
        head = f"POST /chatkit HTTP/1.1\r\nhost: {address.netloc}\r\ncontent-type: application/json\r\n"
        self.socket = socket.socket()
        if receive_buffer_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        self.ended = False
        self._received = bytearray()
        try:
            self.socket.connect((address.hostname, address.port))
            self.socket.sendall(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        except BaseException:
            self.socket.close()
            raise

    @classmethod
    def create(cls, url: str, text: str = "Hello", **options: Any) -> Self:
        return cls(url, "threads.create", {"input": message(text)}, **options)

    @classmethod
    def say(cls, url: str, thread_id: str, text: str = "And then?", **options: Any) -> Self:
        return cls(url, "threads.add_user_message", {"thread_id": thread_id, "input": message(text)}, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.socket.close()

    # --- reading --------------------------------------------------------------------------------------------------

    def read(self, seconds: float) -> None:
        """Read whatever comes within this time, or until the other side ends."""
        deadline = time.monotonic() + seconds
        while not self.ended and (left := deadline - time.monotonic()) > 0:
            if select.select([self.socket], [], [], left)[0]:
                self._receive()

    def read_until(self, found: Callable[[list[Event]], Any], seconds: float = 10.0) -> list[Event]:
        """Read until the events seen so far are what is looked for; fail when they are not in time."""
        deadline = time.monotonic() + seconds
        while not found(self.seen):
            assert not self.ended, f"the stream ended before: {self.text}"
            assert time.monotonic() < deadline, f"it did not come within {seconds} s: {self.text}"
            self.read(0.02)
        return self.seen

    def read_to_end(self, seconds: float = 30.0) -> list[Event]:
        self.read(seconds)
        assert self.ended, f"the stream did not end within {seconds} s: {self.text}"
        return self.seen

    def _receive(self) -> None:
        try:
            received = self.socket.recv(1 << 20)
        except ConnectionError:
            received = b""
        self._received += received
        self.ended = not received

    @property
    def status(self) -> int:
        """The answer's status; 0 as long as there is none."""
        return int(self._received[9:12] or 0)

    def header(self, name: str) -> str:
        """The answer's header; empty as long as there is none."""
        head = bytes(self._received).partition(b"\r\n\r\n")[0].decode("latin-1").lower()
        return next((line.partition(":")[2].strip() for line in head.split("\r\n") if line.startswith(f"{name}:")), "")

    @property
    def is_whole(self) -> bool:
        """Whether the answer came to its proper end, rather than being broken off."""
        return self._received.endswith(b"\r\n0\r\n\r\n")

    @property
    def text(self) -> str:
        """The body so far, of a response in chunks or in one piece."""
        head, _, rest = bytes(self._received).partition(b"\r\n\r\n")
        body = _unchunked(rest) if b"transfer-encoding: chunked" in head.lower() else rest
        return body.decode(errors="ignore")

    @property
    def seen(self) -> list[Event]:
        whole, _, _ = self.text.rpartition("\n\n")
        return events_of(whole)

    # --- leaving --------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Close in an orderly way (FIN); what still comes until the other side closes too has been seen."""
        self.socket.shutdown(socket.SHUT_WR)
        self.read(5)
        self.socket.close()

    def reset(self) -> None:
        """Break off (RST), as a machine does that lost its state."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def _unchunked(body: bytes) -> bytes:
    """Return what the chunks hold, the last one perhaps in part."""
    found, rest = [], body
    while b"\r\n" in rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        found.append(rest[:length])
        rest = rest[length + 2 :]
    return b"".join(found)
