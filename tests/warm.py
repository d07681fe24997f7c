"""Services that start in a tenth of the time: forked from a process that has imported everything beforehand.

Run as a program it is that process: each line that it reads, a directory and variables, becomes `python app.py` there.
"""

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Self

from service import ROOT, Client, address_in, eventually, is_up

NEEDED_LATER = ["anyio._backends._asyncio", "openai.lib.streaming.responses", "openai.resources.responses"]
"""What the first requests would import."""


class Warm:
    """The process that forks; many tests' services may be its children."""

    def __init__(self, process: subprocess.Popen[str]):
        self._process = process
        self._lock = threading.Lock()

    @classmethod
    @contextmanager
    def started(cls) -> Iterator[Self]:
        environ = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        with subprocess.Popen(
            [sys.executable, __file__], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                yield cls(process)
            finally:
                process.kill()

    def fork(self, directory: Path, environ: dict[str, str]) -> int:
        """Return the id of a process that is about to serve."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            print(json.dumps([str(directory), {"PORT": "0", **environ}]), file=self._process.stdin, flush=True)
            return int(self._process.stdout.readline())


class Fork(Client):
    """A service that is there to be killed."""

    def __init__(self, process_id: int, url: str):
        super().__init__(url)
        self.process_id = process_id

    def kill(self) -> None:
        """Kill it (SIGKILL), and return when it is gone."""
        process = os.pidfd_open(self.process_id)
        signal.pidfd_send_signal(process, signal.SIGKILL)
        assert select.select([process], [], [], 10)[0], "a killed process lives on"
        os.close(process)


@contextmanager
def forked(warm: Warm, directory: Path, **environ: str) -> Iterator[Fork]:
    """Serve from a fork until it is killed, at the latest in the end."""
    log = directory / "service.log"
    begin = log.stat().st_size if log.exists() else 0
    process_id = warm.fork(directory, environ)

    def listening() -> str | None:
        assert Path(f"/proc/{process_id}").exists(), f"the service ended, see {log}"
        return address_in(log, begin) if log.exists() else None

    url = eventually(listening, 30, "the start of the service")
    with closing(Fork(process_id, url)) as running:
        try:
            eventually(lambda: is_up(running), 30, "the readiness of the service")
            yield running
        finally:
            if Path(f"/proc/{process_id}").exists():
                running.kill()


def fork_for_each_line() -> None:
    from commands import main

    for name in NEEDED_LATER:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no child stays a zombie
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            directory, environ = json.loads(line)
            os.chdir(directory)
            os.environ.clear()
            os.environ.update(environ)
            log = os.open("service.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for descriptor in (1, 2):
                os.dup2(log, descriptor)
            sys.exit(main([]))
        print(child, flush=True)


if __name__ == "__main__":
    fork_for_each_line()
