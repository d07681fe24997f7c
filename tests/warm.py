"""`python app.py`, started in a tenth of the time: forked from a process that has imported everything beforehand.

Run as a program it is that process. It serves one socket: an order with three open files becomes a process, the id of
a process becomes its exit code.
"""

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

NEEDED_LATER = ["anyio._backends._asyncio", "openai.lib.streaming.responses", "openai.resources.responses"]
"""What the first requests would import."""


class Warm:
    """The process that forks. It ends with this one."""

    def __init__(self) -> None:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def ask(self, order: Any, files: Sequence[int] = ()) -> Any:
        with self._lock:
            socket.send_fds(self._orders, [json.dumps(order).encode()], list(files))
            return json.loads(self._orders.recv(1024))


_FIRST = threading.Lock()


def warm() -> Warm:
    """Return the one that all threads share: a process that another one forked cannot be waited for."""
    with _FIRST:
        return _warm()


@cache
def _warm() -> Warm:
    return Warm()


class Forked:
    """`python app.py ARGUMENTS` in a directory, with these variables: what tests need of `subprocess.Popen`."""

    def __init__(
        self, directory: Path, arguments: Sequence[str], environ: Mapping[str, str], files: tuple[int, int, int]
    ):
        self.pid: int = warm().ask([str(directory), list(arguments), dict(environ)], files)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = warm().ask(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (600 if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("app.py", timeout or 600)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork_for_each_order(orders: socket.socket) -> None:
    from commands import main

    for name in NEEDED_LATER:
        importlib.import_module(name)
    gc.freeze()  # so that no child walks, and thereby copies, what all share
    while True:
        order, files, _, _ = socket.recv_fds(orders, 1 << 20, 3)
        match json.loads(order or "null"):
            case None:  # who gave the orders is gone
                return
            case int(process_id):
                ended, status = os.waitpid(process_id, os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if ended else None
            case [directory, arguments, environ]:
                if (answer := os.fork()) == 0:
                    orders.close()
                    become(directory, environ, files)
                    sys.exit(main(arguments))
        for file in files:
            os.close(file)
        orders.send(json.dumps(answer).encode())


def become(directory: str, environ: Mapping[str, str], files: Sequence[int]) -> None:
    os.setsid()
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environ)
    sys.path[1:1] = filter(None, environ.get("PYTHONPATH", "").split(":"))
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)


if __name__ == "__main__":
    fork_for_each_order(socket.socket(fileno=int(sys.argv[1])))
