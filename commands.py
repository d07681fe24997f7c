"""The command line: `python app.py COMMAND`."""

import argparse
import asyncio
import logging
import logging.config
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

import uvicorn
from agents.models import get_default_model
from uvicorn.supervisors import Multiprocess
from uvicorn.supervisors.statreload import StatReload

from agentmodule import AgentModule
from app import create_app
from check import check, database_words
from connections import Connection, max_connections
from conversations import ConversationStore, DeletedUser, IncompatibleDatabase, Purged, StoreUnavailable, Usage
from copying import copy
from local import require_loopback
from metrics import shared_folder
from progress import progress
from settings import Settings, SettingsError, load_settings
from sockets import inherited, listen, notify
from store import open_store
from telemetry import logging_config
from users import delete_user, exported

log = logging.getLogger("service")

BAD_SETTINGS = 2
LEFT_RUNNING_SECONDS = 2.0
WORKER_SECONDS = 120
"""How long a worker may take to answer its parent. uvicorn 0.54 gives it 5, and kills one that is still importing."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the process's exit code: 2 when the settings or the arguments are wrong."""
    options = _parser().parse_args(arguments)
    settings = None
    try:
        settings = load_settings(Path(__file__).with_name(".env"))
        logging.config.dictConfig(logging_config(settings.log_level, settings.log_format))
        command: Callable[[Settings, argparse.Namespace], int] = options.run
        return command(settings, options)
    except (SettingsError, IncompatibleDatabase, ImportError) as error:
        print(error, file=sys.stderr)
        return BAD_SETTINGS
    except StoreUnavailable as error:
        assert settings is not None
        print(database_words(settings, error), file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("app.py", description="A self-hosted backend for OpenAI's ChatKit panel.")
    parser.set_defaults(run=serve, reload=False)
    commands = parser.add_subparsers(metavar="COMMAND")

    def add(name: str, run: Callable[[Settings, argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(run=run)
        return command

    served = add("serve", serve, "serve until SIGTERM (the default)")
    served.add_argument("--reload", action="store_true", help="start again when a Python file changes")
    checked = add("check", check_setup, "say what is set up right and what is not; exit with 1 if anything is not")
    checked.add_argument("--token", metavar="-", choices=["-"], help="judge the token on standard input, too")
    add("migrate", migrate, "bring the database to this release's schema, as the start of the service does too")
    add("purge", purge, "remove now what the service removes by itself: idle threads, files that were never sent")
    export = add("export-user", export_user, "write all that is stored of a user as JSON, hidden items too")
    delete = add("delete-user", delete_user_data, "delete all that is stored of a user, without asking again")
    for command in (export, delete):
        command.add_argument("user_id", metavar="ID", help="the user, as tokens name them; without login it is `local`")
    export.add_argument("file", metavar="FILE", nargs="?", type=Path, help="a new file; without it, standard output")
    copied = add("copy", copy_all, "copy all that is stored into an empty database; it may be run while others serve")
    copied.add_argument("--to", metavar="URL", required=True, help="sqlite:///FILE or postgresql://…")
    backed_up = add("backup", back_up, "copy all that is stored into a new SQLite file; `copy` brings it back")
    backed_up.add_argument("file", metavar="FILE")
    add("usage", usage, "print what each user used of each model on each day, and their feedback")
    return parser


def serve(settings: Settings, options: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; return 0 once every running turn is stored."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit_well)  # uvicorn raises the signal again when it is done, which would exit 143
    signal.signal(signal.SIGHUP, _on_hangup)
    listener = _listen(settings)
    is_local = listener.family == socket.AF_UNIX  # reached by this machine's programs only
    if not (is_local or settings.jwks_url or settings.allow_anonymous):
        require_loopback([listener.getsockname()[0]])
    AgentModule.load(settings.agent)
    asyncio.run(_open_and_close(settings))
    _raise_descriptor_limit()
    address = _address_of(listener)
    log.info("starting %s: %s", address, _summary(settings))
    log.info("listening on %s", address)
    alone = settings.workers == 1 and not options.reload
    config = uvicorn.Config(
        create_app(settings) if alone else "app:create_app",  # other processes read the environment themselves
        factory=not alone,
        workers=settings.workers,
        reload=options.reload,
        reload_dirs=[str(folder) for folder in _folders_of_code(settings.agent)],
        http=Connection,
        limit_concurrency=max_connections(settings.max_turns),
        lifespan="on",
        log_config=logging_config(settings.log_level, settings.log_format),
        access_log=False,
        server_header=False,
        root_path=settings.root_path,
        forwarded_allow_ips=settings.forwarded_allow_ips,
        timeout_graceful_shutdown=1 if options.reload else max(1, round(settings.shutdown_grace_seconds)),
        timeout_worker_healthcheck=WORKER_SECONDS,
        callback_notify=_tell_that_all_is_well,
    )
    if options.reload:
        _Reload(config, uvicorn.Server(config).run, [listener]).run()
    elif settings.workers > 1:
        with shared_folder():
            supervisor = _Workers(config, [listener])
            signal.signal(signal.SIGHUP, _on_hangup)  # uvicorn 0.54 would start every worker anew
            supervisor.run()
    else:
        _Server(config).run([listener])
    return 0


def check_setup(settings: Settings, options: argparse.Namespace) -> int:
    """Reach all that the service needs, and say how it went."""
    logging.getLogger("service").setLevel(logging.CRITICAL)  # all that it would say is said here
    if options.token and sys.stdin.isatty():
        print("Paste the token, then press Enter and Ctrl-D.", file=sys.stderr)
    piped_in = sys.stdin.buffer.read().decode(errors="replace") if options.token else None
    return 0 if asyncio.run(check(settings, piped_in, print)) else 1


def migrate(settings: Settings, options: argparse.Namespace) -> int:
    """Make or migrate the database; the log says from which schema."""

    async def open_and_close() -> None:
        async with progress("migrating"):
            await _open_and_close(settings)

    asyncio.run(open_and_close())
    print("The database has this release's schema.")
    return 0


def purge(settings: Settings, options: argparse.Namespace) -> int:
    """Remove what is too old, whenever that was done last."""

    async def remove() -> Purged | None:
        async with _existing_store(settings) as store, progress("removing"):
            return await store.purge(settings.retention_days, now=True)

    purged = asyncio.run(remove())
    assert purged is not None  # it was told to do so now
    print(f"Removed {purged.threads} idle threads and {purged.attachments} attachments that were never sent.")
    if not settings.retention_days:
        print("RETENTION_DAYS is 0: threads are kept, however long they were idle.")
    return 0


def export_user(settings: Settings, options: argparse.Namespace) -> int:
    """Write a user's data where only this account can read it; a file that is there already is left alone."""

    async def export(output: TextIO) -> None:
        async with _existing_store(settings) as store, progress("exporting") as say:
            async for part in exported(store, options.user_id, say):
                output.write(part)

    if options.file is None:
        asyncio.run(export(sys.stdout))
        sys.stdout.flush()  # here, where a reader that has gone is known to be one
        return 0
    try:
        descriptor = os.open(options.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        print(f"{options.file} cannot be made: {error.strerror}.", file=sys.stderr)
        return BAD_SETTINGS
    try:
        with open(descriptor, "w", encoding="utf-8") as output:
            asyncio.run(export(output))
    except BaseException:
        options.file.unlink()
        raise
    return 0


def delete_user_data(settings: Settings, options: argparse.Namespace) -> int:
    """Delete a user's data, while the service serves or not, and say what it was."""

    async def delete() -> DeletedUser:
        async with _existing_store(settings) as store, progress("deleting") as say:
            return await delete_user(store, options.user_id, say)

    deleted = asyncio.run(delete())
    print(
        f"Deleted {deleted.threads} threads with {deleted.items} items, {deleted.attachments} attachments and"
        f" {deleted.usage_rows} rows of usage. Backups that were made before still have them."
    )
    return 0


def copy_all(settings: Settings, options: argparse.Namespace) -> int:
    """Copy all that is stored into another database, and say how far it is."""
    return _copy(settings, options.to)


def back_up(settings: Settings, options: argparse.Namespace) -> int:
    """Copy all that is stored into a new file."""
    return _copy(settings, f"sqlite:///{options.file}")


def _copy(settings: Settings, target_url: str) -> int:
    try:
        copy(settings.database_url, target_url, settings.table_prefix, partial(print, flush=True))
    except StoreUnavailable as error:  # of either: it says of which
        target = replace(settings, database_url=target_url)
        print(
            f"{settings.database_name} could not be copied to {target.database_name}: {str(error).rstrip('.')}."
            " Nothing was copied: run it again when both answer.",
            file=sys.stderr,
        )
        return 1
    return 0


def usage(settings: Settings, options: argparse.Namespace) -> int:
    """Print tokens by day, user and model, and each user's feedback."""

    async def load() -> tuple[list[Usage], dict[str, tuple[int, int]]]:
        async with _existing_store(settings) as store:
            return await store.load_usage(), await store.load_feedback_counts()

    used, feedback = asyncio.run(load())
    row = "{:<10}  {:<36}  {:<24}  {:>8}  {:>12}  {:>12}"
    print(row.format("day", "user", "model", "requests", "input tokens", "output tokens"))
    for each in used:
        print(row.format(each.day, each.user_id, each.model, each.requests, each.input_tokens, each.output_tokens))
    print("\n{:<36}  {:>8}  {:>8}".format("user", "liked", "disliked"))
    for user_id, (liked, disliked) in sorted(feedback.items()):
        print(f"{user_id:<36}  {liked:>8}  {disliked:>8}")
    return 0


# --- what they share, and what serving is made of -----------------------------------------------------------------


def _store(settings: Settings) -> AbstractAsyncContextManager[ConversationStore]:
    return open_store(settings.database_url, settings.table_prefix)


def _existing_store(settings: Settings) -> AbstractAsyncContextManager[ConversationStore]:
    """The one that is there. At a wrong address a new one would be made, and be said to have nothing of the user."""
    return open_store(settings.database_url, settings.table_prefix, may_make=False)


async def _open_and_close(settings: Settings) -> None:
    """Make or migrate the database before anything listens: what is wrong with it is said here, once and readably."""
    async with _store(settings) as store:
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
    model = f"{settings.openai_default_model or get_default_model()} at {settings.openai_base_url or 'OpenAI'}"
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
