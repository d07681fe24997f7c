"""An empty database of each kind, and a way past its store: to age what is in it, and to break it."""

import secrets
import sqlite3
from contextlib import AbstractAsyncContextManager, closing
from pathlib import Path
from typing import Any, Protocol, Self

from conversations import ConversationStore
from postgres_server import PostgresServer
from store import open_store


class Database(Protocol):
    url: str
    prefix: str

    @property
    def environ(self) -> dict[str, str]:
        """The variables that make a service use it."""

    def open(self) -> AbstractAsyncContextManager[ConversationStore]:
        """Open the database, as one of any number of processes would."""

    def execute(self, statement: str) -> None:
        """Run a statement, in which `@` stands before the name of each table."""

    def count(self, table: str, user_id: str) -> int:
        """Return the number of the user's rows."""

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        """Return the rows of such a statement, as another process sees them."""

    def schema(self) -> list[tuple[Any, ...]]:
        """Return the tables, and the version that they have."""

    def set_schema(self, version: int) -> None:
        """Say that the tables have this version."""

    def leases(self) -> list[str]:
        """Return the leases of all turns that run or died."""

    def expire_leases(self, seconds: float = -1) -> None:
        """Move the end of all leases to so many seconds from now."""

    def age(self, table: str, column: str, seconds: float, where: str) -> None:
        """Make rows older than they are."""


class SQLiteDatabase:
    prefix = "chatkit_"

    def __init__(self, folder: Path):
        self.url = f"sqlite:///{folder}/store.db"
        self.path = folder / "store.db"

    @property
    def environ(self) -> dict[str, str]:
        return {"DATABASE_URL": self.url}

    def open(self) -> AbstractAsyncContextManager[ConversationStore]:
        return open_store(self.url)

    def execute(self, statement: str) -> None:
        with closing(sqlite3.connect(self.path, timeout=10)) as connection, connection:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute(statement.replace("@", ""))

    def count(self, table: str, user_id: str) -> int:
        with closing(sqlite3.connect(self.path)) as connection:
            [count] = connection.execute(f"SELECT count(*) FROM {table} WHERE user_id = ?", (user_id,)).fetchone()
        return int(count)

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.path, timeout=10)) as connection:
            return connection.execute(statement.replace("@", "")).fetchall()

    def schema(self) -> list[tuple[Any, ...]]:
        return [*self.query("SELECT name, sql FROM sqlite_master ORDER BY name"), *self.query("PRAGMA user_version")]

    def set_schema(self, version: int) -> None:
        self.execute(f"PRAGMA user_version = {version}")

    def leases(self) -> list[str]:
        return [lease for (lease,) in self.query("SELECT lease FROM @leases")]

    def expire_leases(self, seconds: float = -1) -> None:
        now = "((julianday('now') - 2440587.5) * 86400.0)"
        self.execute(f"UPDATE @leases SET expires_at = {now} + {seconds}")

    def age(self, table: str, column: str, seconds: float, where: str) -> None:
        self.execute(f"UPDATE @{table} SET {column} = {column} - {seconds} WHERE {where}")


class PostgresDatabase:
    """A prefix of its own in a server that all tests share."""

    def __init__(self, server: PostgresServer, prefix: str, name: str = "postgres"):
        self.url = server.url_of(name)
        self.prefix = prefix
        self._name = name
        self._server = server

    @classmethod
    def elsewhere(cls, server: PostgresServer, prefix: str) -> Self:
        """Make a database in which any prefix is free."""
        name = f"elsewhere_{secrets.token_hex(8)}"
        server.execute(f"CREATE DATABASE {name}")
        return cls(server, prefix, name)

    @property
    def environ(self) -> dict[str, str]:
        return {"DATABASE_URL": self.url, "TABLE_PREFIX": self.prefix}

    def open(self) -> AbstractAsyncContextManager[ConversationStore]:
        return open_store(self.url, self.prefix)

    def execute(self, statement: str) -> None:
        self.query(statement)

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        return self._server.execute(statement.replace("@", self.prefix), self._name)

    def schema(self) -> list[tuple[Any, ...]]:
        names = sorted(self.names())
        return [*((name,) for name in names), *(self.query("SELECT version FROM @schema_version") if names else [])]

    def set_schema(self, version: int) -> None:
        self.execute(f"UPDATE @schema_version SET version = {version}")

    def leases(self) -> list[str]:
        return [lease for (lease,) in self.query("SELECT lease FROM @threads WHERE lease IS NOT NULL")]

    def count(self, table: str, user_id: str) -> int:
        [[count]] = self.query(f"SELECT count(*) FROM @{table} WHERE user_id = '{user_id}'")
        return int(count)

    def names(self) -> set[str]:
        """Return the names of all tables, indexes and sequences with this prefix."""
        return {name for (name,) in self.query("SELECT relname FROM pg_class WHERE starts_with(relname, '@')")}

    def expire_leases(self, seconds: float = -1) -> None:
        self.execute(
            f"UPDATE @threads SET lease_expires_at = now() + {seconds} * interval '1 second' WHERE lease IS NOT NULL"
        )

    def age(self, table: str, column: str, seconds: float, where: str) -> None:
        self.execute(f"UPDATE @{table} SET {column} = {column} - {seconds} * interval '1 second' WHERE {where}")
