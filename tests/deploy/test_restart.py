"""A new version is put in place while people talk: the socket stays, the process behind it goes and comes."""

import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from conftest import probing
from connections import Connection
from deploy.talk import talk
from deploy.units import socket_unit
from service import eventually
from sockets import notify
from standin import Say, StandIn


@pytest.mark.parametrize(("restarts", "workers"), [(1, "1"), pytest.param(5, "2", marks=pytest.mark.soak)])
def test_no_turn_is_refused_or_lost_while_the_service_is_restarted_behind_its_socket(
    tmp_path: Path, model: StandIn, restarts: int, workers: str
) -> None:
    model.otherwise = [Say("one two three four five", gap=0.02)]
    over, waited = threading.Event(), list[float]()
    environ = probing(model, tmp_path / "chatkit.db", WORKERS=workers)
    with socket_unit(tmp_path, **environ) as unit, ThreadPoolExecutor(8) as pool:
        unit.start()
        talking = [pool.submit(talk, unit.url, over, waited) for _ in range(8)]
        try:
            for _ in range(restarts):
                enough = len(waited) + 20
                eventually(lambda enough=enough: len(waited) > enough, 300, "the next turns")
                assert unit.stop() == 0
                unit.start()
        finally:
            over.set()
        wrong = [each for each_talk in talking for each in each_talk.result()]
    assert not wrong
    print(f"\n{len(waited)} turns over {restarts} restarts, the longest took {max(waited):.1f} s")


def test_a_request_that_arrives_on_an_open_connection_while_the_process_stops_is_answered(tmp_path: Path) -> None:
    with socket_unit(tmp_path) as unit:
        for _ in range(5):
            unit.start()
            address = unit.listener.getsockname()
            with socket.create_connection(address) as early, socket.create_connection(address) as idle:
                idle.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
                assert idle.recv(4096).startswith(b"HTTP/1.1 200")  # and so the connection before it is accepted too
                stopped_at = time.monotonic()
                unit.signal(signal.SIGTERM)
                unit.hear("STOPPING=1")
                while idle.recv(4096):  # closed where connections without a request are
                    pass
                answered = healthz(early)
            took = time.monotonic() - stopped_at
            assert unit.wait() == 0
            if answered:
                return
            assert took > Connection.FIRST_REQUEST_SECONDS  # the request came too late: the machine is busy
    pytest.fail("no request came in time")


def healthz(connection: socket.socket) -> bool:
    with suppress(ConnectionError):
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        return connection.recv(4096).startswith(b"HTTP/1.1 200")
    return False


@pytest.mark.soak
def test_workers_that_take_long_to_start_are_waited_for(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(7)")
    with socket_unit(tmp_path, WORKERS="2", PYTHONPATH=str(tmp_path)) as unit:
        unit.start()
        assert unit.stop() == 0


def test_systemd_is_told_that_the_event_loop_turns_and_that_the_process_stops(tmp_path: Path) -> None:
    with socket_unit(tmp_path) as unit:
        unit.start()
        assert unit.stop() == 0
        unit.hear("STOPPING=1")
        assert unit.told == ["READY=1", "WATCHDOG=1", "STOPPING=1"]


def test_a_process_that_nobody_listens_to_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for address in ("", str(tmp_path / "gone"), "@gone"):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        notify("READY=1")


def test_an_abstract_address_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind("")  # Linux finds a free abstract name
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + ear.getsockname()[1:].decode())
        notify("READY=1", "WATCHDOG=1")
        assert ear.recv(100) == b"READY=1\nWATCHDOG=1"
