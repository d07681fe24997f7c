"""The programs that are measured: started, pinned to a core, and read from outside."""

import asyncio
import json
import os
import re
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")
CORES = sorted(os.sched_getaffinity(0))
MEASURED, LOAD = CORES[0], CORES[-1]
"""What is measured has a core of its own; the load and the model's stand-in share the other."""
ENDING_SECONDS = 20.0


def serve(app: Any) -> None:
    """Serve an app of the bench on a free port, as the service is served, and say where."""
    import uvicorn

    listener = socket.socket()
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.bind(("127.0.0.1", 0))
    listener.listen(2048)
    print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, backlog=2048)).run([listener])


class Contestant:
    """A running program; `port` is 0 for one that does not listen."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, port: int = 0):
        self.name = name
        self.process = process
        self.port = port
        self._reading = asyncio.Lock()

    def _processes(self) -> list[Path]:
        """Return the program's own directory in /proc, and those of its workers."""
        found, waiting = [], [self.process.pid]
        while waiting:
            directory = Path("/proc", str(waiting.pop()))
            found.append(directory)
            waiting += map(int, (directory / "task" / directory.name / "children").read_text().split())
        return found

    def cpu_seconds(self) -> float:
        """Return what all threads have used so far, in user and kernel."""
        stats = [(directory / "stat").read_text().rpartition(")")[2].split() for directory in self._processes()]
        return sum(int(fields[11]) + int(fields[12]) for fields in stats) / TICKS

    def memory_bytes(self) -> int:
        """Return what is resident and the program's own: what it only maps from files is shared."""
        statm = [(directory / "statm").read_text().split() for directory in self._processes()]
        return sum(int(fields[1]) - int(fields[2]) for fields in statm) * PAGE_BYTES

    def resident_bytes(self) -> int:
        """Return all that is resident, with what is mapped from files."""
        return sum(int((each / "statm").read_text().split()[1]) for each in self._processes()) * PAGE_BYTES

    async def ask(self, request: Mapping[str, Any]) -> None:
        """Have a program without a port do something, and wait until it has."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        async with self._reading:
            assert await self.process.stdout.readline(), f"{self.name} ended"


@asynccontextmanager
async def running(
    name: str, arguments: Sequence[str], environ: Mapping[str, str], *, cores: Sequence[int] = (MEASURED,)
) -> AsyncIterator[Contestant]:
    """Run `python ARGUMENTS` until it listens (or has written a line, where it has no port), and end it after."""
    log = Path(environ["BENCH_DIRECTORY"], f"{name.replace(' ', '-')}-{time.monotonic_ns()}.log")
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            cwd=environ["BENCH_DIRECTORY"],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(BENCH), **environ},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
            process_group=0,  # ^C is for the bench, which ends the others
        )
    try:
        if arguments[0].endswith("bare.py"):
            assert process.stdout
            await process.stdout.readline()
            yield Contestant(name, process)
        else:
            yield Contestant(name, process, await _port(process, log))
    finally:
        await end(process)


async def end(process: asyncio.subprocess.Process) -> None:
    """End the program, also one that waits for streams which nobody ends."""
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(ENDING_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


async def _port(process: asyncio.subprocess.Process, log: Path) -> int:
    deadline = time.monotonic() + 60
    while True:
        text = log.read_text()
        if found := re.search(r"listening on http://127.0.0.1:(\d+)", text):
            return int(found.group(1))
        assert process.returncode is None, text
        assert time.monotonic() < deadline, text
        await asyncio.sleep(0.005)
