"""One SQLite file: a connection that writes, a connection that reads, and its schema's version."""

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import copy_context
from functools import partial
from typing import Any, Self, TypeVar

import aiosqlite

from conversations import NOTHING_OF_OURS, ConversationStore, IncompatibleDatabase, StoreUnavailable
from metrics import store_latency

log = logging.getLogger("service.store")

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]

BUSY_SECONDS = 10.0
"""How long a statement waits for another process's transaction."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.001, 0.01
"""Between two tries: most transactions are over in a moment."""
CLOSING_SECONDS = 2.0
"""How long closing waits for what is still to be committed."""
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class SQLiteFile:
    """A database in WAL mode that any number of processes on one machine may share.

    Its readers do not wait for its writer. `read` and `write` run a function on the connection's own thread, once
    through aiosqlite's queue and in the caller's context, which has the request that log lines are about. They raise
    what it raises; `StoreUnavailable` where SQLite itself fails.
    """

    def __init__(self, path: str, writer: aiosqlite.Connection, reader: aiosqlite.Connection):
        self._path = os.path.realpath(path)  # beside which SQLite has its other files
        self._identity = _identity(self._path)
        self._damage = ""
        self._writer = writer
        self._reader = reader
        self._waiting: list[tuple[Work[Any], asyncio.Future[Any]]] = []
        self._committing: asyncio.Task[None] | None = None
        self._closing = False

    @classmethod
    @asynccontextmanager
    async def open(cls, path: str, migrations: Sequence[str], *, may_make: bool = True) -> AsyncIterator[Self]:
        """Open the file, made (where it may be) and migrated where needed, and close it in the end."""
        if sqlite3.sqlite_version_info < (3, 35):
            raise IncompatibleDatabase(f"SQLite 3.35 or newer is needed; this Python has {sqlite3.sqlite_version}.")
        if may_make:
            _make_for_its_owner(path)
        else:
            _require_file(path)
        async with _connection(path) as writer, _connection(path) as reader:
            await _on_thread(writer, lambda db: _prepare(db, migrations, may_make))
            await _on_thread(reader, lambda db: db.execute("PRAGMA query_only = ON"))
            file = cls(path, writer, reader)
            try:
                yield file
            finally:
                await file._settle()

    async def read(self, read: Work[T]) -> T:
        """Return what the function reads.

        It fetches all rows before it looks at them: where it raised between two, the traceback would keep the cursor,
        and with it this connection's view of the file, from moving on.
        """
        with store_latency("read"):
            return await self._noting_damage(self._reader, _in_this_context(read))

    def require_whole(self) -> None:
        """Raise `StoreUnavailable` once SQLite has found a part of the file damaged, whatever other parts still do."""
        if self._damage:
            raise StoreUnavailable(self._damage)

    async def write(self, write: Work[T]) -> T:
        """Run the function in a transaction and return its result once that is on the disk.

        Writes that wait together are committed together: at 64 writers 6 times the writes of a commit each where
        `fsync` takes 0.3 ms (`bench/`), and more where it takes longer. A write that has been
        queued ends even when its caller is cancelled; one that raises undoes itself alone.
        """
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((_in_this_context(write), done))
        if self._committing is None or self._committing.done():
            self._committing = asyncio.create_task(self._commit_waiting(), name="commit")
        with store_latency("write"):
            return await done

    async def rewrite(self) -> None:
        """Write the whole file anew, so that it holds what is stored and no bytes of what was deleted.

        Other processes' writes wait for it, `BUSY_SECONDS` at most.
        """
        await _on_thread(self._writer, _rewrite)

    async def _commit_waiting(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            writes = [write for write, _ in batch]
            try:
                outcomes = await self._noting_damage(self._writer, partial(self._commit, writes))
            except Exception as error:
                outcomes = [error] * len(batch)
            for (_, done), outcome in zip(batch, outcomes, strict=True):
                if done.cancelled():  # nobody waits any more
                    continue
                if isinstance(outcome, Exception):
                    done.set_exception(outcome)
                else:
                    done.set_result(outcome)

    def _commit(self, writes: Sequence[Work[Any]], db: sqlite3.Connection) -> list[Any]:
        """Return the result of each write, or the exception that undid it alone."""
        _when_free(db, "BEGIN IMMEDIATE", lambda: self._closing)
        try:
            self._require_own_files()
            outcomes = [_savepoint(db, write) for write in writes]
            db.execute("COMMIT")
            return outcomes
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def _require_own_files(self) -> None:
        """Raise `StoreUnavailable` where the files that are written are not those at their paths any more.

        SQLite goes on writing to a file that was deleted, or replaced by a backup: all of it would be lost.
        """
        if not self._identity or _identity(self._path) != self._identity:
            raise StoreUnavailable(
                "the file was moved, deleted or replaced; start the service again to use what is there"
            )

    async def _noting_damage(self, connection: aiosqlite.Connection, work: Work[T]) -> T:
        try:
            return await _on_thread(connection, work)
        except StoreUnavailable as error:
            if getattr(error.__cause__, "sqlite_errorcode", 0) & 0xFF in DAMAGED:
                self._damage = f"{error}; restore a backup, and start the service again"
            raise

    async def _settle(self) -> None:
        if self._committing is not None:
            await asyncio.wait({self._committing}, timeout=CLOSING_SECONDS)
            self._closing = True  # what waits for another process's transaction fails now
            await asyncio.wait({self._committing})


class OnSQLite(ConversationStore):
    """A store, or a part of one, that reads and writes this file."""

    def __init__(self, file: SQLiteFile):
        self._file = file
        self._read = file.read
        self._write = file.write


def _identity(path: str) -> list[tuple[int, int]]:
    """Return what tells the files of the database at this path from any others; nothing where one is missing."""
    try:
        files = [os.stat(path + suffix) for suffix in ("", "-wal", "-shm")]
    except OSError:
        return []
    return [(file.st_dev, file.st_ino) for file in files]


def _make_for_its_owner(path: str) -> None:
    """Make the file where there is none, so that nobody else on the machine can read it, nor those that SQLite adds."""
    with suppress(OSError):  # it is there, or SQLite says what is wrong
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


def _require_file(path: str) -> None:
    if not os.path.exists(path):
        raise StoreUnavailable(f"{path}: there is no such file")


@asynccontextmanager
async def _connection(path: str) -> AsyncIterator[aiosqlite.Connection]:
    connection = aiosqlite.connect(path, isolation_level=None, timeout=BUSY_SECONDS)
    try:
        await connection
    except sqlite3.Error as error:
        await asyncio.to_thread(connection._thread.join)  # aiosqlite 0.22 ends it some time, and needs the loop for it
        raise StoreUnavailable(f"{path}: {error}") from error
    try:
        await _on_thread(connection, lambda db: setattr(db, "row_factory", sqlite3.Row))
        yield connection
    finally:
        await connection.close()  # in every path: aiosqlite 0.22 hangs the exit of a process that did not


async def _on_thread(connection: aiosqlite.Connection, work: Work[T]) -> T:
    try:
        execute: Callable[[Work[T], sqlite3.Connection], Awaitable[T]] = connection._execute  # it has no public name
        return await execute(work, connection._conn)
    except sqlite3.Error as error:
        raise StoreUnavailable(str(error)) from error


def _in_this_context(work: Work[T]) -> Work[T]:
    context = copy_context()
    return lambda db: context.run(work, db)


def _savepoint(db: sqlite3.Connection, write: Work[Any]) -> Any:
    db.execute("SAVEPOINT one_write")
    try:
        outcome = write(db)
    except Exception as error:
        if type(error) in (
            sqlite3.OperationalError,
            sqlite3.DatabaseError,
        ):  # the disk or the file, not this write alone
            raise
        db.execute("ROLLBACK TO one_write")
        outcome = error
    db.execute("RELEASE one_write")
    return outcome


def _prepare(db: sqlite3.Connection, migrations: Sequence[str], may_make: bool) -> None:
    if not may_make and db.execute("PRAGMA user_version").fetchone()[0] == 0:
        raise StoreUnavailable(NOTHING_OF_OURS)
    _when_free(db, "PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = ON")
    version = migrate(db, migrations)
    db.execute("PRAGMA busy_timeout = 0")  # from here on `_when_free` waits
    if version < len(migrations):
        log.info("the database was brought from schema %d to %d", version, len(migrations))


def migrate(db: sqlite3.Connection, migrations: Sequence[str]) -> int:
    """Bring the tables to the schema of these migrations, and return the one that they had.

    Raises `IncompatibleDatabase` where they are beyond it.
    """
    db.execute("BEGIN IMMEDIATE")  # processes that start together take turns
    try:
        [version] = db.execute("PRAGMA user_version").fetchone()
        if version > len(migrations):
            raise IncompatibleDatabase(
                f"The database has schema {version}, made by a newer release; this one knows {len(migrations)}."
                " Start the newer release, or restore a backup that was made before it."
            )
        for number, script in enumerate(migrations[version:], start=version + 1):
            for statement in _statements(script):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {number}")
        db.execute("COMMIT")
        return int(version)
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _rewrite(db: sqlite3.Connection) -> None:
    _when_free(db, "VACUUM")
    deadline = time.monotonic() + BUSY_SECONDS
    while db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:  # somebody still reads what was before
        if time.monotonic() > deadline:
            raise sqlite3.OperationalError("the file is in use all the time, so that its WAL cannot be emptied")
        time.sleep(LONGEST_PAUSE_SECONDS)


def _when_free(db: sqlite3.Connection, statement: str, hurried: Callable[[], bool] = lambda: False) -> None:
    """Execute it once no other process is in its way.

    SQLite's own waiting cannot be ended early, and leaves out the switch to WAL.
    """
    deadline, pause = time.monotonic() + BUSY_SECONDS, FIRST_PAUSE_SECONDS
    while True:
        try:
            db.execute(statement)
            return
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not busy or hurried() or time.monotonic() > deadline:
                raise
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _statements(script: str) -> list[str]:
    """Split a script (`executescript` would commit the open transaction)."""
    statements, start = [], 0
    for end in (position for position, letter in enumerate(script, start=1) if letter == ";"):
        if sqlite3.complete_statement(script[start:end]):
            statements.append(script[start:end])
            start = end
    return statements
