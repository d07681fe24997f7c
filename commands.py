"""The command line: `python app.py COMMAND`."""

import argparse
import asyncio
import logging
import logging.config
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TextIO

from check import check, database_words
from conversations import ConversationStore, DeletedUser, IncompatibleDatabase, Purged, StoreUnavailable, Usage
from copying import copy
from progress import progress
from serving import open_and_close, serve
from settings import Settings, SettingsError, load_settings
from store import open_store
from telemetry import logging_config
from users import delete_user, exported

BAD_SETTINGS = 2


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
    parser.set_defaults(run=serve_requests, reload=False)
    commands = parser.add_subparsers(metavar="COMMAND")

    def add(name: str, run: Callable[[Settings, argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(run=run)
        return command

    served = add("serve", serve_requests, "serve until SIGTERM (the default)")
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


def serve_requests(settings: Settings, options: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; return 0 once every running turn is stored."""
    serve(settings, reload=options.reload)
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

    async def bring() -> None:
        async with progress("migrating"):
            await open_and_close(settings)

    asyncio.run(bring())
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


def _existing_store(settings: Settings) -> AbstractAsyncContextManager[ConversationStore]:
    """The one that is there. At a wrong address a new one would be made, and be said to have nothing of the user."""
    return open_store(settings.database_url, settings.table_prefix, may_make=False)
