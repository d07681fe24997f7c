"""Connections to PostgreSQL: so many and no more, each held no longer than one piece of work, none trusted for long."""

import asyncio
import hashlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus
from psycopg.rows import namedtuple_row

from conversations import ConversationStore, IncompatibleDatabase, StoreUnavailable
from metrics import store_latency
from postgresstrings import STRINGS

T = TypeVar("T")
Connection = psycopg.AsyncConnection[Any]
Values = Sequence[Any] | Mapping[str, Any] | None

CONNECT_SECONDS = 10.0
"""How long connecting may take, whatever the number of hosts in the address."""
WAIT_SECONDS = 5.0
"""How long work waits for a connection while all are in use."""
WORK_SECONDS = 20.0
"""How long one piece of work may take; then its connection is given up, since its server may be gone without a word."""
CLOSING_SECONDS = 2.0
"""How long closing waits for what still runs."""
CANCEL_SECONDS = 1.0
"""How long the server may take to hear that nobody waits for a statement any more."""
CANCELS = 2
CANCEL_AGAIN_SECONDS = 0.2
"""After so long the server is told once more: a cancel that overtakes its statement is lost."""
LOCK_SECONDS = 8
"""How long a statement waits for a row that another transaction has changed."""

DEFAULTS = {
    "application_name": "chatkit",
    "client_encoding": "utf8",
    "connect_timeout": "3",  # for each host
    "keepalives_idle": "10",  # a server's machine that went away is noticed in 25 s, not in two hours
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
}
"""Parameters of libpq that an address may overrule. PgBouncer takes them all: those that are sent, it knows."""

_BEGIN = (
    "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;"
    f" SET LOCAL idle_in_transaction_session_timeout = '{LOCK_SECONDS}s';"  # a frozen replica holds its rows so long
)
LOCK_TIMEOUT = f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'"
BEGIN = f"{_BEGIN} {LOCK_TIMEOUT}; SET LOCAL statement_timeout = '{WORK_SECONDS:.0f}s'".encode()
BEGIN_PATIENTLY = f"{_BEGIN} SET LOCAL lock_timeout = 0; SET LOCAL statement_timeout = 0".encode()

PASSING = {
    "40001",  # serialization_failure
    "40P01",  # deadlock_detected
    "25006",  # read_only_sql_transaction: this was the primary until now
    "57P01",  # admin_shutdown
    "57P02",  # crash_shutdown
}
"""Errors that end a transaction through no fault of its own, so that it may be tried again."""
UNWRITABLE = {"22", "54"}
"""Classes of errors that come again whenever the same is written: what is wrong with it, or beyond a limit."""


class _Undone(StoreUnavailable):
    """It failed in a way that passes, and it is certain that nothing was committed."""


class Session:
    """A connection, for as long as one piece of work lasts. In statements, `@` stands for the tables' prefix."""

    def __init__(self, connection: Connection, prefix: str):
        self._connection = connection
        self._prefix = prefix

    async def rows(self, statement: str, values: Values = None, *, binary: bool = False) -> list[Any]:
        """Return all rows, as named tuples."""
        return await (await self._run(statement, values, binary=binary)).fetchall()

    async def row(self, statement: str, values: Values = None, *, binary: bool = False) -> Any:
        """Return the first row; None when there is none."""
        return await (await self._run(statement, values, binary=binary)).fetchone()

    async def execute(self, statement: str, values: Values = None) -> int:
        """Return the number of rows touched. Without values it may be several statements, split by semicolons."""
        return (await self._run(statement, values)).rowcount

    async def lock(self, name: str) -> None:
        """Wait until no other transaction has locked this name, and lock it until this one ends."""
        digest = hashlib.blake2b(f"{self._prefix}{name}".encode(), digest_size=8).digest()
        await self.execute("SELECT pg_advisory_xact_lock(%s)", (int.from_bytes(digest, signed=True),))

    async def _run(self, statement: str, values: Values, *, binary: bool = False) -> psycopg.AsyncCursor[Any]:
        return await self._connection.execute(statement.replace("@", self._prefix).encode(), values, binary=binary)


Work = Callable[[Session], Awaitable[T]]


class Pool:
    """At most `size` connections, made when they are needed.

    Nothing is left on a connection between two transactions, so that a pooler may stand between. Work runs in a task
    of its own: it ends, and its connection comes back in order, even when its caller is cancelled. Each step has its
    time, so that a server which is gone costs errors, and when it is back the next work connects anew.
    """

    def __init__(self, address: str, prefix: str, size: int, work_seconds: float = WORK_SECONDS):
        self._address = _parameters(address)
        self._prefix = prefix
        self._size = size
        self._seconds = work_seconds
        self._free = asyncio.Semaphore(size)
        self._idle: list[Connection] = []
        self._clearings = 0
        self._closed = False
        self._used: set[Connection] = set()
        self._running: set[asyncio.Task[Any]] = set()
        self._newest: dict[tuple[str, str], asyncio.Task[Any]] = {}

    async def read(self, work: Work[T]) -> T:
        """Return what the work reads, each statement as a transaction of its own; it may be run twice."""
        with store_latency("read"):
            return await self._shielded(self._twice(work, None, self._seconds))

    async def write(self, work: Work[T], *, queue: tuple[str, str] | None = None) -> T:
        """Run the work in a transaction and return its result once that is committed.

        It is run a second time only where nothing of the first was committed for certain; where that cannot be known,
        `StoreUnavailable` says so. Work of one queue (a user and a thread of theirs, say) is run in the order in
        which it came, even when the caller of an earlier one was cancelled.
        """
        with store_latency("write"):
            if queue is None:
                return await self._shielded(self._twice(work, BEGIN, self._seconds))
            previous = self._newest.get(queue)
            running = self._started(self._after(previous, work))
            self._newest[queue] = running
            running.add_done_callback(lambda _: self._newest.get(queue) is running and self._newest.pop(queue))
            return await _result(running)

    async def write_patiently(self, work: Work[T], seconds: float) -> T:
        """Run the work in a transaction that may take so long, and wait for locks so long."""
        return await self._shielded(self._twice(work, BEGIN_PATIENTLY, seconds))

    async def close(self) -> None:
        """Close all connections, after what still runs, or under it where that takes long; none is made any more."""
        if running := [*self._running]:
            await asyncio.wait(running, timeout=CLOSING_SECONDS)
        self._closed = True
        while running := [*self._running]:
            await asyncio.gather(*[_give_up(connection, asyncio.Event()) for connection in self._used])
            await asyncio.wait(running, timeout=CANCEL_SECONDS)
        await self._clear()

    def _started(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        running = asyncio.create_task(work, name="database")
        self._running.add(running)
        running.add_done_callback(self._ended)
        return running

    def _ended(self, running: asyncio.Task[Any]) -> None:
        self._running.discard(running)
        if not running.cancelled():
            running.exception()  # or asyncio logs it where nobody is left to ask

    async def _shielded(self, work: Coroutine[Any, Any, T]) -> T:
        return await _result(self._started(work))

    async def _after(self, previous: asyncio.Task[Any] | None, work: Work[T]) -> T:
        if previous is not None and not previous.done():
            await asyncio.wait({previous}, timeout=self._seconds)
            if not previous.done():
                raise StoreUnavailable(f"an earlier write did not end within {self._seconds:.0f} s")
        return await self._twice(work, BEGIN, self._seconds)

    async def _twice(self, work: Work[T], begin: bytes | None, seconds: float) -> T:
        until = asyncio.get_running_loop().time() + seconds
        try:
            return await self._once(work, begin, until)
        except _Undone:
            await self._clear()  # what ended one connection has mostly ended them all
            return await self._once(work, begin, until)

    async def _once(self, work: Work[T], begin: bytes | None, until: float) -> T:
        async with self._connection() as connection, _deadline(connection, until):
            session = Session(connection, self._prefix)
            if begin is None:
                return await work(session)
            async with _transaction(connection, begin):
                return await work(session)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await self._free.acquire()
        except TimeoutError:
            raise StoreUnavailable(f"all {self._size} connections to the database are in use") from None
        try:
            if self._closed:
                raise StoreUnavailable("the store is closed")
            clearings = self._clearings
            connection = self._idle.pop() if self._idle else await self._connect()
            self._used.add(connection)
            try:
                yield connection
            finally:
                self._used.discard(connection)
                await self._put_back(connection, keep=clearings == self._clearings)
        finally:
            self._free.release()

    async def _connect(self) -> Connection:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                return await psycopg.AsyncConnection.connect(
                    self._address,
                    autocommit=True,  # transactions are begun by `_transaction`
                    prepare_threshold=None,  # PgBouncer before 1.21 loses prepared statements in transaction mode
                    context=STRINGS,
                    row_factory=namedtuple_row,
                )
        except TimeoutError:
            raise StoreUnavailable(f"the database did not let us in within {CONNECT_SECONDS:.0f} s") from None
        except psycopg.Error as error:
            raise StoreUnavailable(_one_line(str(error))) from None

    async def _put_back(self, connection: Connection, *, keep: bool) -> None:
        if keep and connection.info.transaction_status == TransactionStatus.IDLE:
            self._idle.append(connection)
        else:
            await connection.close()

    async def _clear(self) -> None:
        """Close all connections: those that are idle now, the others once they come back."""
        self._clearings += 1
        while self._idle:
            await self._idle.pop().close()


class OnPool(ConversationStore):
    """A store, or a part of one, that reads and writes through this pool."""

    def __init__(self, pool: Pool):
        self._pool = pool
        self._read = pool.read
        self._write = pool.write


async def _result(running: asyncio.Task[T]) -> T:
    """Wait for it; it goes on without whoever is cancelled here. (Python 3.14's `shield` would log its failure.)"""
    await asyncio.wait({running})
    return running.result()


def _parameters(address: str) -> str:
    try:
        return make_conninfo("", **{**DEFAULTS, **conninfo_to_dict(address)})
    except psycopg.ProgrammingError:  # its text may quote the password
        raise IncompatibleDatabase(
            "The address of a PostgreSQL database is postgresql://USER:PASSWORD@HOST/DATABASE."
        ) from None


@contextmanager
def lone_connection(address: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection for a command, in a transaction that is committed unless an exception ends it."""
    try:
        with psycopg.connect(_parameters(address), prepare_threshold=None, context=STRINGS) as connection:
            yield connection
    except psycopg.Error as error:
        raise StoreUnavailable(_words(error)) from None


@asynccontextmanager
async def _transaction(connection: Connection, begin: bytes) -> AsyncIterator[None]:
    try:
        await connection.execute(begin)
    except psycopg.Error:  # a standby, say, to which the address led when it was opened
        await connection.close()
        raise
    try:
        yield
    except BaseException:
        if not connection.broken:
            await connection.execute(b"ROLLBACK")
        raise
    try:
        await connection.execute(b"COMMIT")
    except psycopg.Error as error:
        raise StoreUnavailable(f"{_words(error)}; whether the last write was committed is not known") from None


@asynccontextmanager
async def _deadline(connection: Connection, until: float) -> AsyncIterator[None]:
    """Give the connection up at that time of the loop; raise what the database raises as `StoreUnavailable`.

    What it would never take, however often it is asked, is a `ValueError`.
    """
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    giving_up: list[asyncio.Task[None]] = []
    late = loop.call_at(until, lambda: giving_up.append(loop.create_task(_give_up(connection, over), name="give up")))
    try:
        yield
    except psycopg.Error as error:
        if loop.time() >= until:
            raise StoreUnavailable(f"the database did not answer in time: {_words(error)}") from None
        if connection.closed or error.sqlstate in PASSING:
            await connection.close()
            raise _Undone(_words(error)) from None
        if (error.sqlstate or "")[:2] in UNWRITABLE:
            raise ValueError(_words(error)) from None
        raise StoreUnavailable(_words(error)) from None
    finally:
        late.cancel()
        over.set()
        if giving_up:  # what it asks for must not reach other work; broken off it would, through PgBouncer 1.18
            await asyncio.wait(giving_up)
            await connection.close()


async def _give_up(connection: Connection, over: asyncio.Event) -> None:
    """Have the server end what it does for the connection, and hang up where that is not over then.

    (The server would go on otherwise: it hears of a closed connection when it has something to say.)
    """
    for _ in range(CANCELS):
        with suppress(psycopg.Error, OSError):
            await connection.cancel_safe(timeout=CANCEL_SECONDS)
        with suppress(TimeoutError):
            async with asyncio.timeout(CANCEL_AGAIN_SECONDS):
                await over.wait()
                return
    if not connection.closed:
        with suppress(OSError), socket.socket(fileno=os.dup(connection.pgconn.socket)) as line:
            line.shutdown(socket.SHUT_RDWR)


def _words(error: psycopg.Error) -> str:
    """Return what went wrong without what PostgreSQL may quote of a row: details, and what a value should have been."""
    if error.sqlstate is None:
        return _one_line(str(error))
    quotes_values = error.sqlstate.startswith("22")
    said = "" if quotes_values else f": {error.diag.message_primary}"
    return f"PostgreSQL answers {type(error).__name__} ({error.sqlstate}){said}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
