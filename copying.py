"""Copying all that a store keeps into an empty one, whichever database either is. A backup is a copy into a file."""

import asyncio
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import postgresschema
import sqliteschema
from conversations import IncompatibleDatabase, StoreUnavailable
from sqlite import BUSY_SECONDS, migrate
from store import DRIVER_MISSING, is_postgres, open_store, sqlite_path

if TYPE_CHECKING:
    import psycopg

Row = tuple[Any, ...]

REPORT_SECONDS = 1.0
START_AGAIN = (
    " Now start what serves from it; if it runs already, start it again, since it signs links with another key."
)


class CopyRefused(IncompatibleDatabase):
    """Nothing was copied, and nothing changed; the message says what to do."""


# --- what is copied -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """How a column is read and written where the databases keep it differently; a row travels as numbers and text."""

    sqlite_read: str = "{}"
    sqlite_write: str = "?"
    postgres_read: str = "{}"


_UTC_TEXT = """to_char({} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')"""
SECONDS = Form(
    "strftime('%Y-%m-%dT%H:%M:%fZ', {}, 'unixepoch')", "(julianday(?) - 2440587.5) * 86400.0", postgres_read=_UTC_TEXT
)
MOMENT = Form(postgres_read=_UTC_TEXT)
DAY = Form(postgres_read="to_char({}, 'YYYY-MM-DD')")
FLAG = Form(postgres_read="{}::int")
RAN_OUT = Form("'1970-01-01T00:00:00.000Z'", SECONDS.sqlite_write, "'1970-01-01T00:00:00.000Z'")


@dataclass(frozen=True, eq=False)
class Table:
    name: str
    columns: tuple[str, ...]
    forms: Mapping[str, Form] = field(default_factory=dict)

    def form(self, column: str) -> Form:
        return self.forms.get(column, Form())


_ITEM_COLUMNS = ("seq", "thread_id", "user_id", "id", "type", "body")

TABLES = (
    Table(
        "threads",
        (
            *("id", "user_id", "created_at", "title", "status", "allowed_image_domains"),
            *("metadata", "activity", "active_at"),
        ),
        {"active_at": SECONDS},
    ),
    # A turn runs on in the service that has begun it. In the copy it is one that died: whoever loads the thread there
    # finds what it had shown as items.
    Table("leases", ("thread_id", "user_id", "lease", "expires_at"), {"expires_at": RAN_OUT}),
    Table("items", _ITEM_COLUMNS),
    Table("checkpoints", _ITEM_COLUMNS),
    Table("feedback", ("thread_id", "item_id", "user_id", "kind", "updated_at"), {"updated_at": MOMENT}),
    Table("usage", ("user_id", "day", "model", "requests", "input_tokens", "output_tokens"), {"day": DAY}),
    Table(
        "attachments",
        ("id", "user_id", "thread_id", "body", "size", "upload", "is_complete", "created_at"),
        {"is_complete": FLAG, "created_at": SECONDS},
    ),
    Table("attachment_chunks", ("attachment_id", "number", "data")),
    Table("secrets", ("name", "value")),  # signed links stay valid
)
"""What is copied, in an order in which each row finds those that it refers to.

The number that the last row was given goes along too: cursors stay valid, and no number is given twice.
"""

LEFT_OUT = {
    "sequence": "it is no table everywhere: its value is copied on its own",
    "schema_version": "each database has its own",
    "turn_starts": "they count for a minute, which is over before a copy serves",
    "jobs": "when a database was last cleaned up is its own affair",
}
"""The tables that are not copied, and why."""


class Database(Protocol):
    """One side of a copy, within one transaction."""

    newest: int
    """The schema's version in this release."""

    def version(self) -> int:
        """Return the schema's version; 0 where there is none."""

    def count(self, table: Table) -> int: ...

    def rows(self, table: Table) -> Iterator[Row]:
        """Read the rows one by one."""

    def write(self, table: Table, rows: Iterable[Row]) -> None: ...

    def last_number(self) -> int:
        """Return a sequence number that no row of this transaction's view is beyond."""

    def count_on_from(self, number: int) -> None:
        """Give only sequence numbers beyond this one."""


def schema_versions(url: str, prefix: str) -> tuple[int, int]:
    """Return the schema that the database has (0: nothing of ours is in it) and this release's; change nothing."""
    try:
        with _source(url, prefix) as source:
            return source.version(), source.newest
    except sqlite3.Error as error:
        raise StoreUnavailable(str(error)) from error


def copy(source_url: str, target_url: str, table_prefix: str, report: Callable[[str], None]) -> None:
    """Copy all that there is at one moment, while services may go on; the target has all of it in the end or nothing.

    `report` is told how far it is. Raises `CopyRefused` where the target holds anything, `StoreUnavailable` where
    either database fails; then it may be run again.
    """
    try:
        with _source(source_url, table_prefix) as source, _target(target_url, table_prefix) as target:
            _require_this_schema(source)
            counts = {table: source.count(table) for table in TABLES}
            for table, count in counts.items():
                target.write(table, _reported(source.rows(table), table, count, report))
            target.count_on_from(source.last_number())
            for table, count in counts.items():
                if (found := target.count(table)) != count:
                    raise StoreUnavailable(f"of {count} rows of {table.name} the copy has {found}; nothing is kept")
    except sqlite3.Error as error:
        raise StoreUnavailable(str(error)) from error
    report(
        f"Complete: {_words(counts)}; each counted again in the copy.{START_AGAIN if is_postgres(target_url) else ''}"
    )


def _reported(rows: Iterable[Row], table: Table, count: int, report: Callable[[str], None]) -> Iterator[Row]:
    reported_at = time.monotonic()
    for number, row in enumerate(rows):
        if time.monotonic() > reported_at + REPORT_SECONDS:
            report(f"{table.name}: {number} of {count}")
            reported_at = time.monotonic()
        yield row
    report(f"{table.name}: {count} of {count}")


def _words(counts: Mapping[Table, int]) -> str:
    return ", ".join(f"{count} {table.name.replace('_', ' ')}" for table, count in counts.items())


def _require_this_schema(source: Database) -> None:
    version, newest = source.version(), source.newest
    if version == 0:
        raise CopyRefused(
            "The database to copy has schema 0: nothing of the service's is in it. Look at DATABASE_URL, TABLE_PREFIX."
        )
    if version > newest:
        raise CopyRefused(
            f"The database to copy has schema {version}, made by a newer release; this one copies {newest}."
            " Use the newer release."
        )
    if version < newest:
        raise CopyRefused(
            f"The database to copy has schema {version}, of an older release; this one copies {newest}."
            " Use the older release, or let `migrate` of this one bring it there first."
        )


def _source(url: str, prefix: str) -> AbstractContextManager[Database]:
    return _postgres_source(url, prefix) if is_postgres(url) else _sqlite_source(Path(sqlite_path(url)))


def _target(url: str, prefix: str) -> AbstractContextManager[Database]:
    return _postgres_target(url, prefix) if is_postgres(url) else _sqlite_target(Path(sqlite_path(url)))


# --- SQLite -------------------------------------------------------------------------------------------------------


class _SQLite:
    newest = len(sqliteschema.MIGRATIONS)

    def __init__(self, db: sqlite3.Connection):
        self._db = db

    def version(self) -> int:
        return self._number("PRAGMA user_version")

    def count(self, table: Table) -> int:
        return self._number(f"SELECT count(*) FROM {table.name}")

    def rows(self, table: Table) -> Iterator[Row]:
        columns = [table.form(column).sqlite_read.format(column) for column in table.columns]
        return iter(self._db.execute(f"SELECT {', '.join(columns)} FROM {table.name}"))

    def write(self, table: Table, rows: Iterable[Row]) -> None:
        self._db.execute(f"DELETE FROM {table.name}")  # a secret that the migrations made
        values = ", ".join(table.form(column).sqlite_write for column in table.columns)
        self._db.executemany(f"INSERT INTO {table.name} ({', '.join(table.columns)}) VALUES ({values})", rows)

    def last_number(self) -> int:
        return self._number("SELECT value FROM sequence")

    def count_on_from(self, number: int) -> None:
        self._db.execute("UPDATE sequence SET value = ?", (number,))

    def _number(self, statement: str) -> int:
        [number] = self._db.execute(statement).fetchone()
        return int(number)


@contextmanager
def _sqlite_source(path: Path) -> Iterator[Database]:
    try:
        db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None)
    except sqlite3.Error as error:
        raise StoreUnavailable(f"{path}: {error}") from error
    with closing(db):
        db.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000:.0f}")
        db.execute("PRAGMA query_only = ON")
        db.execute("BEGIN")  # all reads from here on see the same moment
        yield _SQLite(db)


@contextmanager
def _sqlite_target(path: Path) -> Iterator[Database]:
    """A new file, under another name until it is whole and on the disk."""
    _require_nothing_at(path)
    try:
        descriptor, partial = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".partial", dir=path.parent)
    except OSError as error:
        raise CopyRefused(f"{path} cannot be written: {error.strerror}.") from error
    try:
        with closing(sqlite3.connect(partial, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode = OFF")  # a file that did not become whole is deleted
            db.execute("PRAGMA synchronous = OFF")
            db.execute("PRAGMA foreign_keys = ON")
            migrate(db, sqliteschema.MIGRATIONS)
            db.execute("BEGIN")
            yield _SQLite(db)
            db.execute("COMMIT")
        os.fsync(descriptor)
        _require_nothing_at(path)
        os.rename(partial, path)
        _fsync_folder(path.parent)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _require_nothing_at(path: Path) -> None:
    """SQLite would take what another database has left in such a file (`-wal`) for changes to the new one."""
    for each in (Path(f"{path}{suffix}") for suffix in ("", "-wal", "-shm", "-journal")):
        if each.exists():
            raise CopyRefused(f"{each} exists already. Move it away, or name a file that does not exist.")


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- PostgreSQL ---------------------------------------------------------------------------------------------------

_LOCK_SECONDS = 10
_NO_TIMEOUTS = "SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0"
_RELATIONS = {
    "leases": "(SELECT id AS thread_id, user_id, lease, lease_expires_at AS expires_at FROM @threads"
    " WHERE lease IS NOT NULL) AS leases"
}
"""Where rows are that have no table of their own."""


class _Postgres:
    newest = len(postgresschema.MIGRATIONS)

    def __init__(self, connection: "psycopg.Connection[Any]", prefix: str):
        self._connection = connection
        self._prefix = prefix

    def execute(self, statement: str) -> "psycopg.Cursor[Any]":
        return self._connection.execute(self._statement(statement))

    def version(self) -> int:
        if self._value("SELECT to_regclass('@schema_version')") is None:
            return 0
        return int(self._value("SELECT version FROM @schema_version"))

    def count(self, table: Table) -> int:
        return int(self._value(f"SELECT count(*) FROM {_relation(table)}"))

    def rows(self, table: Table) -> Iterator[Row]:
        columns = [table.form(column).postgres_read.format(column) for column in table.columns]
        statement = self._statement(f"SELECT {', '.join(columns)} FROM {_relation(table)}")
        with self._connection.cursor(name="rows") as cursor:  # the server keeps what has not been fetched yet
            cursor.itersize = 4 if "data" in table.columns else 100
            yield from cursor.execute(statement)

    def write(self, table: Table, rows: Iterable[Row]) -> None:
        with self._connection.cursor() as cursor:
            if table.name == "leases":
                statement = "UPDATE @threads SET lease = %s, lease_expires_at = %s WHERE id = %s"
                cursor.executemany(self._statement(statement), [(row[2], row[3], row[0]) for row in rows])
                return
            cursor.execute(self._statement(f"DELETE FROM @{table.name}"))  # a secret that the migrations made
            columns = ", ".join(table.columns)
            with cursor.copy(self._statement(f"COPY @{table.name} ({columns}) FROM STDIN")) as incoming:
                for row in rows:
                    incoming.write_row(row)

    def last_number(self) -> int:
        return int(self._value("SELECT last_value - (NOT is_called)::int FROM @seq"))

    def count_on_from(self, number: int) -> None:
        self.execute(f"SELECT setval('@seq', greatest(last_value, {number}), is_called OR {number} > 0) FROM @seq")

    def _value(self, statement: str) -> Any:
        row = self.execute(statement).fetchone()
        return row[0] if row else None

    def _statement(self, statement: str) -> bytes:
        return statement.replace("@", self._prefix).encode()


def _relation(table: Table) -> str:
    return _RELATIONS.get(table.name, f"@{table.name}")


@contextmanager
def _postgres_source(url: str, prefix: str) -> Iterator[Database]:
    with _connection(url) as connection:
        connection.execute(f"SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY; {_NO_TIMEOUTS}".encode())
        yield _Postgres(connection, prefix)


@contextmanager
def _postgres_target(url: str, prefix: str) -> Iterator[Database]:
    """The tables, made or migrated, which nobody else can write to until the copy is whole or given up."""
    asyncio.run(_made(url, prefix))
    from psycopg.errors import LockNotAvailable  # noqa: PLC0415 (its driver is an extra)

    with _connection(url) as connection:
        target = _Postgres(connection, prefix)
        target.execute(f"{_NO_TIMEOUTS}; SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'")
        tables = [f"@{table.name}" for table in TABLES if table.name not in _RELATIONS]
        try:
            target.execute(f"LOCK TABLE {', '.join(tables)} IN EXCLUSIVE MODE")
        except LockNotAvailable:
            raise CopyRefused("Somebody else is writing there. Stop the services on it, or that other copy.") from None
        held = {table: target.count(table) for table in TABLES if table.name != "secrets"}
        if any(held.values()):
            raise CopyRefused(
                f"There are conversations already: {_words(held)}. Nothing was changed. Copy into an empty database,"
                " or under a TABLE_PREFIX that is not in use."
            )
        yield target


async def _made(url: str, prefix: str) -> None:
    async with open_store(url, prefix):
        pass


def _connection(url: str) -> "AbstractContextManager[psycopg.Connection[Any]]":
    try:
        from pool import lone_connection  # noqa: PLC0415 (its driver is an extra)
    except ImportError as error:
        raise IncompatibleDatabase(DRIVER_MISSING) from error
    return lone_connection(url)
