"""Clients as slow as they can be, by the service's own clock; `test_hostile.py` has them in quick motion."""

import threading
import time
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from conftest import probing
from connections import Connection
from service import eventually, process
from sockets import UNREAD_SECONDS
from standin import StandIn
from test_hostile import BEGUN, all_from, connect, descriptors, drip, unharmed

pytestmark = pytest.mark.soak


def test_a_client_that_sends_a_byte_a_second_is_given_up_within_half_a_minute(model: StandIn, tmp_path: Path) -> None:
    with process(tmp_path, **probing(model, tmp_path / "chatkit.db")) as running, unharmed(running, mebibytes=50):
        began, given_up = time.monotonic(), threading.Event()
        connections = [connect(running.url, begun) for begun in BEGUN.values()]
        for connection in connections:
            threading.Thread(target=drip, args=(connection, given_up), daemon=True).start()
        for connection in connections:
            all_from(connection)
        given_up.set()
        assert time.monotonic() - began < 2 * Connection.LOOK_SECONDS + 10


def test_200_clients_that_read_nothing_of_a_file_are_given_up_after_a_minute(model: StandIn, tmp_path: Path) -> None:
    with process(tmp_path, **probing(model, tmp_path / "chatkit.db")) as running:
        file = ("large.png", b"\x89PNG\r\n\x1a\n" + b"x" * 16_000_000, "image/png")
        link = urlsplit(running.http.post("/attachments", files={"file": file}).json()["preview_url"])
        request = f"GET {link.path}?{link.query} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode()
        before = len(descriptors(running))
        with unharmed(running, mebibytes=400, seconds=30), ExitStack() as stack:
            for _ in range(200):
                stack.enter_context(connect(running.url, request))
            eventually(lambda: len(descriptors(running)) >= before + 200, 60, "the connections")
            began = time.monotonic()
            eventually(lambda: len(descriptors(running)) < before + 10, 2 * UNREAD_SECONDS, "the end of them")
            assert time.monotonic() - began > 10, "they were given up before their time"
