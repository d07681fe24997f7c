"""The process that serves: what it listens on, what it says at its start, and how it ends."""

import asyncio
import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import uvicorn
from agents.models import get_default_model
from uvicorn.supervisors import Multiprocess
from uvicorn.supervisors.statreload import StatReload

from agentmodule import AgentModule
from app import create_app
from connections import Connection, max_connections
from local import require_loopback
from metrics import shared_folder
from settings import Settings, SettingsError, without_password
from sockets import inherited, listen, notify
from store import open_store
from telemetry import logging_config

log = logging.getLogger("service")

LEFT_RUNNING_SECONDS = 2.0
WORKER_SECONDS = 120
"""How long a worker may take to answer its parent. uvicorn 0.54 gives it 5, and kills one that is still importing."""


def serve(settings: Settings, *, reload: bool) -> None:
    """Serve until SIGTERM or SIGINT; return once every running turn is stored."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit_well)  # uvicorn raises the signal again when it is done, which would exit 143
    signal.signal(signal.SIGHUP, _on_hangup)
    listener = _listen(settings)
    is_local = listener.family == socket.AF_UNIX  # reached by this machine's programs only
    if not (is_local or settings.jwks_url or settings.allow_anonymous):
        require_loopback([listener.getsockname()[0]])
    AgentModule.load(settings.agent)
    asyncio.run(open_and_close(settings))
    _raise_descriptor_limit()
    address = _address_of(listener)
    log.info("starting %s: %s", address, _summary(settings))
    log.info("listening on %s", address)
    alone = settings.workers == 1 and not reload
    config = uvicorn.Config(
        create_app(settings) if alone else "app:create_app",  # other processes read the environment themselves
        factory=not alone,
        workers=settings.workers,
        reload=reload,
        reload_dirs=[str(folder) for folder in _folders_of_code(settings.agent)],
        http=Connection,
        ws="none",  # there are none, and what uvicorn imports for them takes 0.8 MB
        limit_concurrency=max_connections(settings.max_turns),
        lifespan="on",
        log_config=logging_config(settings.log_level, settings.log_format),
        access_log=False,
        server_header=False,
        root_path=settings.root_path,
        forwarded_allow_ips=settings.forwarded_allow_ips,
        timeout_graceful_shutdown=1 if reload else max(1, round(settings.shutdown_grace_seconds)),
        timeout_worker_healthcheck=WORKER_SECONDS,
        callback_notify=_tell_that_all_is_well,
    )
    if reload:
        _Reload(config, uvicorn.Server(config).run, [listener]).run()
    elif settings.workers > 1:
        with shared_folder():
            supervisor = _Workers(config, [listener])
            signal.signal(signal.SIGHUP, _on_hangup)  # uvicorn 0.54 would start every worker anew
            supervisor.run()
    else:
        _Server(config).run([listener])


async def open_and_close(settings: Settings) -> None:
    """Make or migrate the database before anything listens: what is wrong with it is said here, once and readably."""
    async with open_store(settings.database_url, settings.table_prefix) as store:
        await store.ping()


def _exit_well(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)


def _on_hangup(number: int, frame: FrameType | None) -> None:
    """Reload nothing; but where the terminal that it was started from is gone, end as on SIGTERM."""
    if sys.stdin is not None and sys.stdin.isatty():
        signal.raise_signal(signal.SIGTERM)


def _listen(settings: Settings) -> socket.socket:
    try:
        return inherited() or listen(settings.host, settings.port)
    except OSError as error:
        raise SettingsError(
            [f"HOST={settings.host} and PORT={settings.port} cannot be listened on: {error.strerror}."]
        ) from error


def _address_of(listener: socket.socket) -> str:
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _raise_descriptor_limit() -> None:
    """A turn needs two descriptors, and many systems give a process no more than 1024 unless it asks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _summary(settings: Settings) -> str:
    """Return what a user who started it wants to see at a glance."""
    login = f"login by {settings.jwt_issuer}" if settings.jwks_url else "no login"
    server = without_password(settings.openai_base_url) if settings.openai_base_url else "OpenAI"
    model = f"{settings.openai_default_model or get_default_model()} at {server}"
    return f"{settings.database_name}; {login}; {'the offline demo' if settings.offline else model}"


def _folders_of_code(agent: str) -> set[Path]:
    """Return where the service's modules are, and the agent's."""
    module = sys.modules[agent.partition(":")[0]].__file__
    return {Path(file).resolve().parent for file in (__file__, module) if file is not None}


class _Reload(StatReload):
    """Looks at the Python files in the folders, and not at the thousands of a virtual environment there."""

    def iter_py_files(self) -> Iterator[Path]:
        for folder in self.config.reload_dirs:
            for path, folders, files in os.walk(folder):
                folders[:] = [name for name in folders if not name.startswith(".") and name != "node_modules"]
                yield from (Path(path, name) for name in files if name.endswith(".py"))


class _Workers(Multiprocess):
    """Notices at once when a worker dies: uvicorn 0.54 waits for its answer on a pipe that it holds open itself."""

    def keep_subprocess_alive(self) -> None:
        for process in self.processes:
            process.child_conn.close()  # the worker has its own
        super().keep_subprocess_alive()


class _Server(uvicorn.Server):
    """Tells systemd when it begins to stop: from then on its event loop no longer says that all is well.

    Once all is stored and closed, a tool of the agent that still runs must not hold the process: Python waits for
    threads without end.
    """

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().serve(sockets)
        finally:
            ending = threading.Timer(LEFT_RUNNING_SECONDS, os._exit, [0])
            ending.daemon = True
            ending.start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        notify("STOPPING=1")
        super().handle_exit(sig, frame)


async def _tell_that_all_is_well() -> None:
    """Called by uvicorn once it listens, and every 30 s from its event loop."""
    notify("READY=1", "WATCHDOG=1")
