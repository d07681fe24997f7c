"""The command line: `python app.py COMMAND`."""

import argparse
import asyncio
import logging
import logging.config
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import uvicorn
from uvicorn.supervisors import ChangeReload, Multiprocess

from agentmodule import AgentModule
from app import NO_LOGIN, create_app
from check import check
from conversations import IncompatibleDatabase, StoreUnavailable, Usage
from settings import Settings, SettingsError, is_loopback, load_environ
from sockets import inherited, listen
from store import open_store

log = logging.getLogger("service")

BAD_SETTINGS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the process's exit code: 2 when the settings or the arguments are wrong."""
    options = _parser().parse_args(arguments)
    try:
        settings = Settings.from_environ(load_environ(Path(__file__).with_name(".env")))
        logging.config.dictConfig(logging_config(settings))
        command: Callable[[Settings, argparse.Namespace], int] = options.run
        return command(settings, options)
    except (SettingsError, IncompatibleDatabase, ImportError) as error:
        print(error, file=sys.stderr)
        return BAD_SETTINGS
    except StoreUnavailable as error:
        print(f"The database cannot be used: {error}", file=sys.stderr)
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
    add("usage", usage, "print what each user used of each model on each day, and their feedback")
    return parser


def serve(settings: Settings, options: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; return 0 once every running turn is stored."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit_well)  # uvicorn raises the signal again when it is done, which would exit 143
    listener = _listen(settings)
    host, port = listener.getsockname()[:2]
    _require_login_beyond_loopback(settings, host)
    AgentModule.load(settings.agent)
    asyncio.run(_open_and_close(settings))
    _raise_descriptor_limit()
    log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    alone = settings.workers == 1 and not options.reload
    config = uvicorn.Config(
        create_app(settings) if alone else "app:create_app",  # other processes read the environment themselves
        factory=not alone,
        workers=settings.workers,
        reload=options.reload,
        lifespan="on",
        log_config=logging_config(settings),
        access_log=False,
        server_header=False,
        root_path=settings.root_path,
        forwarded_allow_ips=settings.forwarded_allow_ips,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_grace_seconds)),
    )
    if options.reload:
        ChangeReload(config, uvicorn.Server(config).run, [listener]).run()
    elif settings.workers > 1:
        Multiprocess(config, [listener]).run()
    else:
        uvicorn.Server(config).run([listener])
    return 0


def check_setup(settings: Settings, options: argparse.Namespace) -> int:
    """Reach all that the service needs, and say how it went."""
    unverified_token = sys.stdin.read().strip() if options.token else None
    return 0 if asyncio.run(check(settings, unverified_token, print)) else 1


def usage(settings: Settings, options: argparse.Namespace) -> int:
    """Print tokens by day, user and model, and each user's feedback."""

    async def load() -> tuple[list[Usage], dict[str, tuple[int, int]]]:
        async with open_store(settings.database_url, settings.table_prefix) as store:
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


async def _open_and_close(settings: Settings) -> None:
    """Make or migrate the database before anything listens: what is wrong with it is said here, once and readably."""
    async with open_store(settings.database_url, settings.table_prefix):
        pass


def _exit_well(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)


def _require_login_beyond_loopback(settings: Settings, host: str) -> None:
    if not settings.jwks_url and not settings.allow_anonymous and not is_loopback(host):
        raise SettingsError([NO_LOGIN.format(host=host)])


def _listen(settings: Settings) -> socket.socket:
    try:
        return inherited() or listen(settings.host, settings.port)
    except OSError as error:
        raise SettingsError(
            [f"HOST={settings.host} and PORT={settings.port} cannot be listened on: {error.strerror}."]
        ) from error


def _raise_descriptor_limit() -> None:
    """A turn needs two descriptors, and many systems give a process no more than 1024 unless it asks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def logging_config(settings: Settings) -> dict[str, Any]:
    """Return a configuration that writes one line an event to standard error, and nothing of anybody's messages."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"text": {"format": "%(asctime)s %(levelname)s %(name)s %(message)s"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "text"}},
        "root": {"level": "WARNING", "handlers": ["stderr"]},
        "loggers": {
            "service": {"level": settings.log_level},
            "chatkit": {"level": "ERROR", "handlers": []},  # it adds a handler of its own where LOG_LEVEL is set
        },
    }
