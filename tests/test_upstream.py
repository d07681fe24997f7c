"""A server of models that breaks, hangs, drips or talks nonsense: what is tried again, and for how long."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from conftest import probing
from service import Client, errors_of, eventually, fold, service, text_of
from standin import Break, Hang, Say, StandIn
from test_faults import seen_text

Misdeed = Callable[[socket.socket], None]
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"


def hang_up(connection: socket.socket) -> None:
    """Close as soon as a request has come."""
    connection.recv(65536)


def talk_nonsense(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"\x00\xff this is no HTTP\r\n\r\n" * 100)


def drip(connection: socket.socket) -> None:
    """Answer, and then send a comment now and again and never an event, until the client has had enough."""
    connection.recv(65536)
    connection.sendall(STREAM + b"connection: close\r\n\r\n")
    with suppress(OSError):
        while True:
            connection.sendall(b": wait\n\n")
            time.sleep(0.05)


class Wire:
    """Stands before the stand-in: does something bad to the first so many connections, and forwards the others."""

    def __init__(self, model: StandIn, misdeed: Misdeed, times: int):
        address = urlsplit(model.url)
        self._model = (address.hostname, address.port)
        self._misdeed = misdeed
        self._times = times
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"

    def serve(self) -> None:
        with suppress(OSError):  # closed, in the end
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                bad = self.connections <= self._times
                threading.Thread(target=self._treat, args=(connection, bad), daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _treat(self, connection: socket.socket, bad: bool) -> None:
        with connection, suppress(OSError):
            if bad:
                self._misdeed(connection)
                return
            with socket.create_connection(self._model) as model:
                back = threading.Thread(target=_pump, args=(model, connection), daemon=True)
                back.start()
                _pump(connection, model)
                back.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@contextmanager
def behind(model: StandIn, misdeed: Misdeed, times: int, tmp_path: Path, **more: str) -> Iterator[tuple[Client, Wire]]:
    """Run a service whose model is at the other end of a bad wire."""
    wire = Wire(model, misdeed, times)
    serving = threading.Thread(target=wire.serve)
    serving.start()
    try:
        with service(**{**probing(model, tmp_path / "chatkit.db", **more), "OPENAI_BASE_URL": wire.url}) as client:
            yield client, wire
    finally:
        wire.close()
        serving.join()


@pytest.mark.parametrize("misdeed", [hang_up, talk_nonsense])
def test_a_connection_that_fails_before_the_first_token_is_tried_again(
    misdeed: Misdeed, model: StandIn, tmp_path: Path
) -> None:
    with behind(model, misdeed, 2, tmp_path) as (client, _):
        events = client.create()
    assert errors_of(events) == []
    assert text_of(fold(events)[-1]) == "Hello from the stand-in."


@pytest.mark.parametrize("misdeed", [hang_up, talk_nonsense])
def test_a_connection_that_goes_on_failing_is_given_up_with_words(
    misdeed: Misdeed, model: StandIn, tmp_path: Path
) -> None:
    with behind(model, misdeed, 1000, tmp_path) as (client, wire):
        [error] = errors_of(client.create())
        eventually(lambda: wire.connections == 6, what="the end of the title's tries")  # three, as the answer's own
    assert (error["message"], error["allow_retry"]) == ("The connection to the model failed. Try again.", True)
    assert wire.connections == 6


@pytest.mark.parametrize("steps", [[Say("A word, and then", breaks=True)], [Say("A word."), Break()]])
def test_an_answer_that_has_begun_is_not_asked_for_again(
    steps: list[Say | Break], model: StandIn, tmp_path: Path
) -> None:
    with behind(model, hang_up, 0, tmp_path) as (client, _):
        model.will(*steps)
        events = client.create()
    assert len(errors_of(events)) == 1
    assert len(model.asked) == 1
    assert text_of(fold(events)[-1]).startswith("A word")


def test_a_server_that_sends_something_now_and_again_but_no_answer_is_ended_by_the_turns_time(
    model: StandIn, tmp_path: Path
) -> None:
    with behind(model, drip, 1000, tmp_path, TURN_TIMEOUT_SECONDS="1") as (client, _):
        [error] = errors_of(client.create())
    assert (error["message"], error["allow_retry"]) == ("The answer took too long and was stopped.", True)


def test_an_answer_that_comes_slowly_and_for_ever_is_ended_by_the_turns_time(model: StandIn, tmp_path: Path) -> None:
    with behind(model, drip, 0, tmp_path, TURN_TIMEOUT_SECONDS="2") as (client, _):
        model.will(Say("word " * 1000, gap=0.1), Hang())
        events = client.create()
        [error] = errors_of(events)
        assert error["message"] == "The answer took too long and was stopped."
        [_, answer] = client.items(events[0]["thread"]["id"])
    assert seen_text(text_of(answer))(events)
