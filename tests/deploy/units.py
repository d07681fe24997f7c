"""What systemd does for the service: a socket that outlives it, and an ear for what it tells of itself (sd_notify)."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from service import ROOT, listening_socket

HAND_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, sys.argv[2]])
"""


class SocketUnit:
    """Holds a port, and starts and stops the service behind it. `told` is all that it has told of itself."""

    def __init__(self, directory: Path, environ: dict[str, str]):
        self.listener = listening_socket()
        self.listener.listen(2048)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.told: list[str] = []
        self._directory = directory
        self._environ = environ
        self._ear = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._ear.bind(str(directory / "notify"))
        self.process: subprocess.Popen[Any] | None = None

    def start(self) -> None:
        """Start the service, and return once it says that it is ready."""
        command = [sys.executable, "-c", HAND_OVER, str(self.listener.fileno()), str(ROOT / "app.py")]
        environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT / "tests"),
            "LISTEN_FDS": "1",
            "NOTIFY_SOCKET": str(self._directory / "notify"),
            **self._environ,
        }
        with (self._directory / "service.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self._directory, env=environ, pass_fds=[self.listener.fileno()], stdout=log, stderr=log
            )
        self.hear("READY=1")

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(120)

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    def hear(self, state: str, seconds: float = 180.0) -> None:
        """Listen until the service says this; fail when it ends or says nothing of the kind in time."""
        deadline = time.monotonic() + seconds
        while True:
            left = deadline - time.monotonic()
            assert left > 0, f"no {state} within {seconds} s; it said {self.told}\n{self.log}"
            self._ear.settimeout(left)
            try:
                said = self._ear.recv(4096).decode().splitlines()
            except TimeoutError:
                continue
            self.told += said
            if state in said:
                return

    @property
    def log(self) -> str:
        return (self._directory / "service.log").read_text(encoding="utf-8")

    def close(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.listener.close()
        self._ear.close()


@contextmanager
def socket_unit(directory: Path, **environ: str) -> Iterator[SocketUnit]:
    unit = SocketUnit(directory, environ)
    try:
        yield unit
    finally:
        unit.close()
