"""What is PostgreSQL's own: replicas, a server that goes and comes back, poolers, and how connections are used."""

import asyncio
import gc
import secrets
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, closing, contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from chatkit.types import ThreadItemAddedEvent, ThreadMetadata

import pool
import postgresupkeep
from conftest import probing
from context import RequestContext
from conversations import (
    ConversationStore,
    IncompatibleDatabase,
    Purged,
    Quota,
    QuotaExceeded,
    StoreUnavailable,
    ThreadBusy,
    Usage,
)
from databases import PostgresDatabase
from pool import Pool, Session
from postgres import PostgresStore, migrate
from postgres_server import PostgresServer, pgbouncer, postgres_server
from postgresschema import MIGRATIONS
from service import errors_of, service, thread_of
from standin import Say, StandIn
from store import open_store
from test_store import NOON, alice, bob, end, file, ids, make_thread
from turn import Events
from turns import Turns

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def replicas(database: PostgresDatabase) -> AsyncIterator[list[ConversationStore]]:
    """Two stores on one database, as two machines have them."""
    async with database.open() as here, database.open() as there:
        yield [here, there]


@contextmanager
def held(database: PostgresDatabase, statement: str) -> Any:
    """Hold what the statement locks, as a transaction of another process that does not end."""
    with closing(psycopg.connect(database.url)) as connection:
        connection.execute(statement.replace("@", database.prefix).encode())
        yield
        connection.rollback()


def outcomes(results: list[Any]) -> Counter[type]:
    return Counter(type(result) for result in results)


# --- schema -------------------------------------------------------------------------------------------------------


async def test_replicas_that_start_together_make_the_tables_once(postgres: PostgresDatabase) -> None:
    async with AsyncExitStack() as stack:
        stores = await asyncio.gather(*[stack.enter_async_context(postgres.open()) for _ in range(8)])
        assert len({await store.load_link_key() for store in stores}) == 1
    assert postgres.query("SELECT version FROM @schema_version") == [(len(MIGRATIONS),)]


async def test_a_database_of_a_newer_release_is_refused_and_left_alone(postgres: PostgresDatabase) -> None:
    postgres.execute("CREATE TABLE @schema_version AS SELECT 9999 AS version")
    with pytest.raises(IncompatibleDatabase, match="schema 9999, made by a newer release"):
        async with postgres.open():
            pass
    assert postgres.names() == {f"{postgres.prefix}schema_version"}


async def test_a_migration_that_fails_changes_nothing(postgres: PostgresDatabase) -> None:
    connections = Pool(postgres.url, postgres.prefix, 1)
    newer = [*MIGRATIONS, "CREATE TABLE @a (); CREATE TABLE @a ();"]
    with pytest.raises(StoreUnavailable):
        await connections.write_patiently(lambda db: migrate(db, newer), 60)
    await connections.close()
    assert postgres.names() == set()


async def test_a_newer_release_runs_only_the_migrations_that_are_new(postgres: PostgresDatabase) -> None:
    async with postgres.open() as store:
        thread_id = await make_thread(store)
        connections = Pool(postgres.url, postgres.prefix, 1)
        newer = [*MIGRATIONS, "CREATE TABLE @more (a text)"]
        await connections.write_patiently(lambda db: migrate(db, newer), 60)
        await connections.close()
        await store.load_thread(thread_id, alice())
    assert f"{postgres.prefix}more" in postgres.names()


async def test_everything_in_the_database_has_the_prefix(postgres: PostgresDatabase) -> None:
    everything = (
        "SELECT relname FROM pg_class UNION SELECT typname FROM pg_type UNION SELECT conname FROM pg_constraint"
    )
    before = set(postgres.query(everything))
    async with postgres.open():
        made = {name.removeprefix("_") for (name,) in set(postgres.query(everything)) - before}  # _: types of arrays
    ours = {name for name in made if not name.startswith("pg_toast")}
    assert len(ours) > 20
    assert {name for name in ours if not name.startswith(postgres.prefix)} == set()


async def test_two_prefixes_are_two_stores(postgres: PostgresDatabase) -> None:
    async with postgres.open() as store, open_store(postgres.url, f"{postgres.prefix}b_") as other:
        await make_thread(store)
        assert (await other.load_threads(9, None, "desc", alice())).data == []


@pytest.mark.parametrize("prefix", ["", "Mixed_", "with space", 'quo"te', "9_", "x" * 31])
async def test_a_prefix_that_is_none_is_refused(postgres: PostgresDatabase, prefix: str) -> None:
    with pytest.raises(IncompatibleDatabase, match="table prefix"):
        PostgresStore(postgres.url, prefix)


async def test_a_database_that_cannot_hold_every_character_is_refused(
    postgres: PostgresDatabase, running_postgres: PostgresServer
) -> None:
    name = f"{postgres.prefix}ascii"
    running_postgres.execute(f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(IncompatibleDatabase, match="SQL_ASCII"):
        async with open_store(f"{postgres.url.removesuffix('postgres')}{name}"):
            pass


async def test_without_its_driver_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("postgres", "pool"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(IncompatibleDatabase, match=r"pip install 'chatkit-service\[postgres\]'"):
        async with open_store("postgresql://127.0.0.1/x"):
            pass


# --- replicas -----------------------------------------------------------------------------------------------------


async def test_of_twenty_turns_in_two_replicas_one_gets_the_thread(postgres: PostgresDatabase) -> None:
    async with replicas(postgres) as stores:
        thread_id = await make_thread(stores[0])
        for _ in range(5):
            wanted = [stores[number % 2].acquire_lease(thread_id, alice()) for number in range(20)]
            results = await asyncio.gather(*wanted, return_exceptions=True)
            assert outcomes(results) == {str: 1, ThreadBusy: 19}
            [lease] = [result for result in results if isinstance(result, str)]
            await stores[1].end_turn(thread_id, [], RequestContext("alice", lease=lease))


async def test_of_twenty_that_find_a_dead_turn_one_stores_what_it_had_shown(postgres: PostgresDatabase) -> None:
    async with replicas(postgres) as stores:
        thread_id = await make_thread(stores[0])
        turn = RequestContext("alice", lease=await stores[0].acquire_lease(thread_id, alice()))
        await stores[0].save_checkpoints(thread_id, [end("shown", thread_id)], turn)
        postgres.expire_leases()
        await asyncio.gather(*[stores[number % 2].load_thread(thread_id, alice()) for number in range(20)])
        assert len(await ids(stores[0], thread_id)) == 2  # and the marker


@pytest.mark.parametrize("quota", [Quota(concurrent_turns=3), Quota(turns_per_minute=3)])
async def test_quotas_of_turns_hold_exactly_across_replicas(postgres: PostgresDatabase, quota: Quota) -> None:
    async with replicas(postgres) as stores:
        threads = [await make_thread(stores[0]) for _ in range(16)]
        wanted = [
            stores[number % 2].acquire_lease(thread_id, alice(), quota=quota)
            for number, thread_id in enumerate(threads)
        ]
        assert outcomes(await asyncio.gather(*wanted, return_exceptions=True)) == {str: 3, QuotaExceeded: 13}


async def test_the_quota_of_storage_holds_exactly_across_replicas(postgres: PostgresDatabase) -> None:
    async with replicas(postgres) as stores:
        wanted = [stores[number % 2].reserve_attachment(file(f"a{number}"), 30, 100, alice()) for number in range(16)]
        assert outcomes(await asyncio.gather(*wanted, return_exceptions=True)) == {type(None): 3, QuotaExceeded: 13}
        reserved = [name for (name,) in postgres.query("SELECT id FROM @attachments")]
        wanted = [
            stores[number % 2].write_chunk(
                name, await stores[0].begin_upload(name, alice()), 0, b"x" * 36, 100, alice()
            )
            for number, name in enumerate(reserved)
        ]
        assert outcomes(await asyncio.gather(*wanted, return_exceptions=True)) == {type(None): 1, QuotaExceeded: 2}


async def test_whoever_reads_on_from_a_cursor_misses_nothing_of_what_two_replicas_write(
    postgres: PostgresDatabase,
) -> None:
    async with replicas(postgres) as stores:
        thread_id = await make_thread(stores[0])
        writing = asyncio.gather(
            *[
                stores[number % 2].add_thread_item(thread_id, end(f"i{number}", thread_id), alice())
                for number in range(60)
            ]
        )
        seen: list[str] = []
        while len(seen) < 60:
            done = writing.done()
            page = await stores[0].load_thread_items(thread_id, seen[-1] if seen else None, 100, "asc", alice())
            seen += [item.id for item in page.data]
            assert not done or page.data, "items were passed over"
        assert len(set(seen)) == 60
        await writing


async def test_one_item_added_by_two_replicas_at_once_is_one_item(postgres: PostgresDatabase) -> None:
    async with replicas(postgres) as stores:
        thread_id = await make_thread(stores[0])
        for number in range(10):
            await asyncio.gather(
                *[store.add_thread_item(thread_id, end(f"i{number}", thread_id), alice()) for store in stores * 2]
            )
        assert await ids(stores[0], thread_id) == [f"i{number}" for number in range(10)]


async def test_a_thread_that_is_deleted_while_another_replica_writes_to_it_stays_deleted(
    postgres: PostgresDatabase,
) -> None:
    async with replicas(postgres) as stores:
        for _ in range(5):
            thread_id = await make_thread(stores[0])
            adding = [
                stores[0].add_thread_item(thread_id, end(f"i{number}", thread_id), alice()) for number in range(4)
            ]
            await asyncio.gather(stores[1].delete_thread(thread_id, alice()), *adding, return_exceptions=True)
            assert postgres.query(f"SELECT id FROM @items WHERE thread_id = '{thread_id}'") == []


async def test_a_thread_that_somebody_holds_does_not_keep_other_leases_from_being_renewed(
    postgres: PostgresDatabase,
) -> None:
    async with postgres.open() as store:
        threads = [await make_thread(store) for _ in range(2)]
        leases = [await store.acquire_lease(thread_id, alice()) for thread_id in threads]
        postgres.expire_leases(5)
        with held(postgres, f"SELECT FROM @threads WHERE id = '{threads[0]}' FOR UPDATE"):
            async with asyncio.timeout(4):
                assert await store.renew_leases(leases) == set(leases)
            assert seconds_left(postgres, threads[1]) > 8
        assert seconds_left(postgres, threads[0]) < 5
        postgres.execute(f"UPDATE @threads SET lease = 'taken' WHERE id = '{threads[0]}'")
        assert await store.renew_leases(leases) == {leases[1]}


async def test_a_lease_whose_thread_is_written_to_just_then_is_renewed_too(postgres: PostgresDatabase) -> None:
    async with postgres.open() as store:
        thread_id = await make_thread(store)
        lease = await store.acquire_lease(thread_id, alice())
        postgres.expire_leases(5)
        with held(postgres, f"SELECT FROM @threads WHERE id = '{thread_id}' FOR UPDATE"):
            renewing = asyncio.create_task(store.renew_leases([lease]))
            await asyncio.sleep(0.2)
        assert await renewing == {lease}
        assert seconds_left(postgres, thread_id) > 8


async def test_a_turn_whose_thread_somebody_holds_costs_no_other_turn_its_lease(
    postgres: PostgresDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turns.RENEWAL_SECONDS", 0.5)

    async def talking(thread_id: str) -> Events:
        while True:
            yield ThreadItemAddedEvent(item=end("answer", thread_id))
            await asyncio.sleep(0.1)

    async with postgres.open() as store, Turns.running(store) as turns:
        threads = [await make_thread(store) for _ in range(2)]
        for thread_id in threads:
            async with turns.opening(thread_id, alice()) as context:
                thread = await store.load_thread(thread_id, context)
                turns.start(thread, context, talking(thread_id), lambda event, _: event)
        with held(postgres, f"SELECT FROM @threads WHERE id = '{threads[0]}' FOR UPDATE"):
            await asyncio.sleep(1)  # until its checkpoint waits
            for _ in range(2):
                postgres.age("threads", "lease_expires_at", 5, f"id = '{threads[1]}'")
                async with asyncio.timeout(4):
                    while seconds_left(postgres, threads[1]) < 7:
                        await asyncio.sleep(0.05)


def seconds_left(database: PostgresDatabase, thread_id: str) -> float:
    """Return how long the thread's lease still lasts."""
    left = "extract(epoch FROM lease_expires_at - clock_timestamp())::float8"
    [[seconds]] = database.query(f"SELECT {left} FROM @threads WHERE id = '{thread_id}'")
    return float(seconds)


def test_two_services_on_one_database_go_on_with_each_others_conversations(postgres: PostgresDatabase) -> None:
    environ = {"DATABASE_URL": postgres.url, "TABLE_PREFIX": postgres.prefix}
    with service(**environ) as here, service(**environ) as there:
        thread_id = thread_of(here.create("Hello"))
        there.say(thread_id, "And then?")
        assert errors_of(here.say(thread_id, "And in the end?")) == []
        assert here.items(thread_id) == there.items(thread_id)
        assert [item["type"] for item in here.items(thread_id)] == ["user_message", "assistant_message"] * 3


# --- a server that goes and comes back ----------------------------------------------------------------------------


@pytest.fixture
def server(running_postgres: PostgresServer) -> Any:
    """The server, which this test may stop."""
    yield running_postgres
    if not running_postgres.is_running:
        running_postgres.start()


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_server_that_is_stopped_and_started_costs_errors_meanwhile_and_none_afterwards(
    postgres: PostgresDatabase, server: PostgresServer, mode: str
) -> None:
    async with postgres.open() as store:
        threads = [await make_thread(store) for _ in range(8)]
        stored: list[tuple[str, str]] = []
        failed_at: list[float] = []
        over = asyncio.Event()

        async def write(thread_id: str) -> None:
            for number in range(10_000):
                if over.is_set():
                    return
                try:
                    await store.add_thread_item(thread_id, end(f"i{number}", thread_id), alice())
                    stored.append((thread_id, f"i{number}"))
                except StoreUnavailable:
                    failed_at.append(time.monotonic())
                await asyncio.sleep(0.02)

        writing = asyncio.gather(*[write(thread_id) for thread_id in threads])
        await asyncio.sleep(0.5)
        await asyncio.to_thread(server.stop, mode)
        with pytest.raises(StoreUnavailable):
            async with asyncio.timeout(5):
                await store.ping()
        await asyncio.to_thread(server.start)
        started_at = time.monotonic()
        await asyncio.sleep(1.5)
        over.set()
        await writing
        assert failed_at
        assert not [moment for moment in failed_at if moment > started_at + 0.5]
        for thread_id in threads:
            kept = set(await all_ids(store, thread_id))
            assert {item_id for thread, item_id in stored if thread == thread_id} <= kept


async def all_ids(store: ConversationStore, thread_id: str) -> list[str]:
    found, after = [], None
    while True:
        page = await store.load_thread_items(thread_id, after, 100, "asc", alice())
        found += [item.id for item in page.data]
        if not page.has_more:
            return found
        after = page.after


def test_what_a_turn_used_is_counted_once_the_database_takes_it_and_holds_up_nothing(
    postgres: PostgresDatabase, model: StandIn
) -> None:
    with service(**probing(model, **postgres.environ)) as client:
        postgres.execute("ALTER TABLE @usage RENAME TO @away")
        model.will(Say("Hello"))
        assert not errors_of(client.create())
        postgres.execute("ALTER TABLE @away RENAME TO @usage")
    [(requests, tokens)] = postgres.query("SELECT requests, output_tokens FROM @usage WHERE model = 'stand-in'")
    assert requests >= 1
    assert tokens >= 5


async def test_connections_that_the_server_has_ended_cost_nobody_an_error(postgres: PostgresDatabase) -> None:
    async with postgres.open() as store:
        thread_id = await make_thread(store)
        await asyncio.gather(*[store.load_thread(thread_id, alice()) for _ in range(5)])
        for number in range(3):
            postgres.query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'chatkit'")
            await store.add_thread_item(thread_id, end(f"i{number}", thread_id), alice())
            postgres.query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'chatkit'")
            await asyncio.gather(*[store.load_thread(thread_id, alice()) for _ in range(5)])
        assert await ids(store, thread_id) == ["i0", "i1", "i2"]


async def test_a_server_that_does_not_answer_is_given_up_in_time_and_taken_back(postgres: PostgresDatabase) -> None:
    name = f"{postgres.prefix}away"
    url = f"{postgres.url}?application_name={name}"
    async with PostgresStore(url, postgres.prefix, pool_size=2, work_seconds=0.5) as store:
        thread_id = await make_thread(store)
        with held(postgres, "LOCK TABLE @threads"):
            began = time.monotonic()
            asked = [store.load_thread(thread_id, alice()) for _ in range(4)]
            asked.append(store.save_thread(ThreadMetadata(id="thr_1", created_at=NOON), alice()))
            async with asyncio.timeout(10):
                results = await asyncio.gather(*asked, return_exceptions=True)
            assert outcomes(results) == {StoreUnavailable: 5}
            assert "did not answer in time" in str(results[0])
            assert time.monotonic() - began < 4
            await until_none(postgres, f"SELECT 1 FROM pg_stat_activity WHERE application_name = '{name}'")
        await asyncio.gather(*[store.load_thread(thread_id, alice()) for _ in range(4)])


async def test_a_cancel_is_never_broken_off_and_its_connection_is_not_used_again(
    postgres: PostgresDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled = []

    async def cancel_slowly(connection: Any, *, timeout: float) -> None:
        await asyncio.sleep(0.3)
        cancelled.append(connection)

    monkeypatch.setattr(psycopg.AsyncConnection, "cancel_safe", cancel_slowly)
    async with PostgresStore(postgres.url, postgres.prefix, work_seconds=0.2) as store:
        await store._pool.read(lambda db: db.row("SELECT pg_sleep(0.3)"))  # ends while it is being cancelled
        [connection] = cancelled
        assert connection.closed


async def until_none(database: PostgresDatabase, statement: str) -> None:
    async with asyncio.timeout(5):
        while database.query(statement):
            await asyncio.sleep(0.02)


async def test_a_server_that_takes_no_writes_is_not_ready(postgres: PostgresDatabase, server: PostgresServer) -> None:
    async with postgres.open() as store:
        with server.as_replica():
            await store.load_threads(9, None, "asc", alice())
            with pytest.raises(StoreUnavailable, match="recovery"):
                await store.ping()
        await store.ping()


async def test_asking_whether_it_is_ready_is_a_write_that_leaves_nothing_behind(postgres: PostgresDatabase) -> None:
    async with postgres.open() as store:
        [[before, row]] = postgres.query("SELECT pg_current_wal_lsn(), ctid::text FROM @schema_version")
        await asyncio.gather(*[store.ping() for _ in range(20)])
        [[flushed, same_row]] = postgres.query(
            f"SELECT pg_current_wal_flush_lsn() - '{before}', ctid::text FROM @schema_version"
        )
        assert flushed > 0
        assert same_row == row


async def test_replicas_that_are_asked_whether_they_are_ready_do_not_wait_for_each_other(
    postgres: PostgresDatabase,
) -> None:
    async with postgres.open() as store:
        with held(postgres, "SELECT FROM @schema_version FOR SHARE"):
            async with asyncio.timeout(4):
                await store.ping()


async def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(StoreUnavailable, match="port 1 failed"):
        async with open_store("postgresql://user:hidden@127.0.0.1:1/x"):
            pass


async def test_an_address_that_cannot_be_read_is_refused_and_not_repeated() -> None:
    with pytest.raises(IncompatibleDatabase) as caught:
        async with open_store("postgresql://user:hidden@127.0.0.1/x?surprise=1"):
            pass
    assert "hidden" not in str(caught.value)


class Line:
    """A way to the server `to`, that breaks once, as soon as the client has said `breaks_at`."""

    def __init__(self, to: str):
        self.to = to
        self.breaks_at: bytes | None = None
        self.is_frozen = False
        self._lines = 0

    @asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        async with await asyncio.start_server(self._connect, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            yield urlsplit(self.to)._replace(netloc=f"postgres@127.0.0.1:{port}").geturl()
            while self._lines:
                await asyncio.sleep(0.01)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._lines += 1
        there = urlsplit(self.to)
        answers, asks = await asyncio.open_connection(there.hostname, there.port)
        answering = asyncio.create_task(self._carry(answers, writer))
        with suppress(OSError):
            while data := await reader.read(65536):
                if self.is_frozen:
                    continue
                asks.write(data)
                if self.breaks_at is not None and self.breaks_at in data:
                    self.breaks_at = None
                    answering.cancel()
                    break
        for way in (asks, writer):
            way.close()
            with suppress(OSError):
                await way.wait_closed()
        await asyncio.wait({answering})
        self._lines -= 1

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()


async def test_a_write_whose_line_broke_before_its_commit_is_made_again_and_once(postgres: PostgresDatabase) -> None:
    line = Line(postgres.url)
    async with line.open() as url, open_store(url, postgres.prefix) as store:
        line.breaks_at = f"INTO {postgres.prefix}usage".encode()
        await store.add_usage(Usage("", "", "m", 1, 1, 1), alice())
        assert line.breaks_at is None
        assert [used.requests for used in await store.load_usage()] == [1]


async def test_a_write_whose_line_broke_at_its_commit_is_not_made_twice(postgres: PostgresDatabase) -> None:
    line = Line(postgres.url)
    async with line.open() as url, open_store(url, postgres.prefix) as store:
        line.breaks_at = b"COMMIT\0"  # BEGIN says COMMITTED
        with pytest.raises(StoreUnavailable, match="whether the last write was committed is not known"):
            await store.add_usage(Usage("", "", "m", 1, 1, 1), alice())
        assert sum(used.requests for used in await store.load_usage()) <= 1


async def test_a_standby_that_was_taken_for_the_primary_is_let_go(postgres: PostgresDatabase) -> None:
    line = Line(postgres.url)
    with postgres_server() as standby, standby.as_replica():
        async with line.open() as url, open_store(url, postgres.prefix) as store:
            thread_id = await make_thread(store)
            line.to = standby.url  # as an address that moves in a fail-over may do for a moment
            postgres.query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'chatkit'")
            with pytest.raises(StoreUnavailable, match="recovery"):
                await store.ping()
            reads = [store.load_thread(thread_id, alice()) for _ in range(4)]
            assert outcomes(await asyncio.gather(*reads, return_exceptions=True)) == {StoreUnavailable: 4}
            line.to = postgres.url
            await store.ping()
            await asyncio.gather(*[store.load_thread(thread_id, alice()) for _ in range(4)])


async def test_a_standby_that_is_read_from_meanwhile_is_let_go_too(postgres: PostgresDatabase) -> None:
    line = Line(postgres.url)
    reading, read_on = asyncio.Event(), asyncio.Event()

    async def read(db: Session) -> bool:
        [is_standby] = await db.row("SELECT pg_is_in_recovery()")
        reading.set()
        await read_on.wait()
        return bool(is_standby)

    with postgres_server() as standby, standby.as_replica():
        line.to = standby.url
        async with line.open() as url:
            connections = Pool(url, postgres.prefix, 2)
            first = asyncio.create_task(connections.read(read))
            await reading.wait()
            with pytest.raises(StoreUnavailable, match="recovery"):
                await connections.write(read)
            line.to = postgres.url
            read_on.set()
            assert await first
            assert not await connections.read(read)
            await connections.close()


async def test_what_the_database_says_of_an_error_carries_nothing_that_a_user_wrote(postgres: PostgresDatabase) -> None:
    async with postgres.open() as store:
        postgres.execute("ALTER TABLE @threads ADD CONSTRAINT @no CHECK (title <> 'my secret')")
        with pytest.raises(StoreUnavailable, match=r"CheckViolation \(23514\)") as caught:
            await store.save_thread(ThreadMetadata(id="t", created_at=NOON, title="my secret"), alice())
        postgres.execute("ALTER TABLE @threads ADD CONSTRAINT @nor CHECK (title::int > 0)")
        with pytest.raises(ValueError, match=r"\(22P02\)") as caught_too:
            await store.save_thread(ThreadMetadata(id="t", created_at=NOON, title="my other secret"), alice())
    for error in (caught.value, caught_too.value):
        assert "secret" not in str(error)
        assert error.__cause__ is None
        assert error.__suppress_context__


# --- what holds others up -----------------------------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give transactions half a second in place of eight for locks and pauses, and one in place of 20 for statements."""
    begin = pool.BEGIN.replace(f"'{pool.LOCK_SECONDS}s'".encode(), b"'500ms'")
    monkeypatch.setattr(pool, "BEGIN", begin.replace(f"'{pool.WORK_SECONDS:.0f}s'".encode(), b"'1s'"))
    monkeypatch.setattr(postgresupkeep, "LOCK_TIMEOUT", pool.LOCK_TIMEOUT.replace(f"{pool.LOCK_SECONDS}s", "500ms"))


@pytest.mark.usefixtures("hasty")
async def test_a_row_that_somebody_holds_is_not_waited_for_without_end(postgres: PostgresDatabase) -> None:
    async with postgres.open() as store:
        thread_id = await make_thread(store)
        with held(postgres, f"SELECT FROM @threads WHERE id = '{thread_id}' FOR UPDATE"):
            for work in (store.delete_thread(thread_id, alice()), store.delete_user("alice")):
                with pytest.raises(StoreUnavailable, match="55P03"):
                    async with asyncio.timeout(5):
                        await work


@pytest.mark.usefixtures("hasty")
async def test_the_server_ends_a_statement_that_takes_too_long(postgres: PostgresDatabase) -> None:
    connections = Pool(postgres.url, postgres.prefix, 1)
    with pytest.raises(StoreUnavailable, match=r"^PostgreSQL answers QueryCanceled"):
        await connections.write(lambda db: db.execute("SELECT pg_sleep(5)"))
    await connections.close()


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("patiently", [False, True])
async def test_a_replica_that_freezes_in_a_transaction_gives_its_rows_back(
    postgres: PostgresDatabase, patiently: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_locked, goes_on = asyncio.Event(), asyncio.Event()

    async def freeze(db: Session) -> None:
        await db.execute("LOCK TABLE @threads")
        has_locked.set()
        await goes_on.wait()

    begin = pool.BEGIN_PATIENTLY.replace(f"'{pool.LOCK_SECONDS}s'".encode(), b"'500ms'")
    monkeypatch.setattr(pool, "BEGIN_PATIENTLY", begin)
    async with postgres.open() as store:
        connections = Pool(postgres.url, postgres.prefix, 1)
        writing = connections.write_patiently(freeze, 60) if patiently else connections.write(freeze)
        frozen = asyncio.create_task(writing)
        await has_locked.wait()
        try:
            async with asyncio.timeout(5):
                await store.load_threads(9, None, "asc", alice())
        finally:
            goes_on.set()
        with pytest.raises(StoreUnavailable):
            await frozen
        await connections.close()


@pytest.mark.usefixtures("hasty")
async def test_what_is_removed_may_take_longer_than_a_statement_of_a_request(postgres: PostgresDatabase) -> None:
    async with postgres.open() as store:
        await make_thread(store)
        await make_thread(store, context=bob())
        postgres.execute(
            "CREATE FUNCTION @slow() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN PERFORM pg_sleep(1.2); RETURN old; END $$;"
            " CREATE TRIGGER slow BEFORE DELETE ON @threads FOR EACH ROW EXECUTE FUNCTION @slow()"
        )
        assert (await store.delete_user("alice")).threads == 1
        postgres.age("threads", "active_at", 8 * 86400, "TRUE")
        assert await store.purge(7, now=True) == Purged(threads=1, attachments=0)


# --- connections --------------------------------------------------------------------------------------------------


async def test_a_process_has_no_more_connections_than_it_may_have(postgres: PostgresDatabase) -> None:
    name = f"{postgres.prefix}bound"
    async with PostgresStore(f"{postgres.url}?application_name={name}", postgres.prefix, pool_size=3) as store:
        thread_id = await make_thread(store)
        with held(postgres, "LOCK TABLE @threads"):
            asked = asyncio.gather(*[store.load_thread(thread_id, alice()) for _ in range(30)])
            count = f"SELECT count(*) FROM pg_stat_activity WHERE application_name = '{name}'"
            await until_none(postgres, f"SELECT 1 WHERE ({count}) < 3")
            await asyncio.sleep(0.5)
            assert postgres.query(count) == [(3,)]
        assert len(await asked) == 30
        assert postgres.query(count) == [(3,)]


async def test_whatever_one_user_waits_for_leaves_connections_to_others(postgres: PostgresDatabase) -> None:
    quota = Quota(turns_per_minute=1000)
    async with PostgresStore(postgres.url, postgres.prefix, pool_size=2) as store:
        threads = [await make_thread(store) for _ in range(6)]
        leases = [await store.acquire_lease(thread_id, alice(), quota=quota) for thread_id in threads[3:]]
        uploads = [await begin_upload(store, f"a{number}") for number in range(3)]
        starts = [store.acquire_lease(thread_id, alice(), quota=quota) for thread_id in threads[:3]]
        refusals = [
            store.end_turn(thread_id, [], RequestContext("alice", lease=lease), began=False)
            for thread_id, lease in zip(threads[3:], leases, strict=True)
        ]
        files = [store.reserve_attachment(file(f"b{number}"), 3, 100, alice()) for number in range(3)]
        chunks = [store.write_chunk(f"a{number}", uploads[number], 0, b"abc", 100, alice()) for number in range(3)]
        for lock, asked in (("turns of alice", starts + refusals), ("storage of alice", files + chunks)):
            async with locked(postgres, lock):
                waiting = asyncio.gather(*asked)
                await asyncio.sleep(0.2)
                async with asyncio.timeout(3):
                    assert await store.load_threads(9, None, "asc", bob())
            await waiting


async def begin_upload(store: ConversationStore, name: str) -> str:
    await store.reserve_attachment(file(name), 3, 100, alice())
    return await store.begin_upload(name, alice())


@asynccontextmanager
async def locked(database: PostgresDatabase, name: str) -> AsyncIterator[None]:
    """Lock the name, as a transaction of another process."""
    connections, is_locked, may_end = Pool(database.url, database.prefix, 1), asyncio.Event(), asyncio.Event()

    async def hold(db: Session) -> None:
        await db.lock(name)
        is_locked.set()
        await may_end.wait()

    holding = asyncio.create_task(connections.write(hold))
    await is_locked.wait()
    try:
        yield
    finally:
        may_end.set()
        await holding
        await connections.close()


async def test_a_turn_holds_no_connection_while_it_waits(postgres: PostgresDatabase) -> None:
    async with PostgresStore(postgres.url, postgres.prefix, pool_size=1) as store:
        leases = {await store.acquire_lease(await make_thread(store), alice()) for _ in range(5)}
        assert await store.renew_leases(leases) == leases


async def test_a_write_that_waits_for_a_row_ends_although_its_caller_was_cancelled(postgres: PostgresDatabase) -> None:
    async with postgres.open() as store:
        thread_id = await make_thread(store)
        turn = RequestContext("alice", lease=await store.acquire_lease(thread_id, alice()))
        with held(postgres, f"SELECT FROM @threads WHERE id = '{thread_id}' FOR UPDATE"):
            cancelled = asyncio.create_task(store.add_thread_item(thread_id, end("i", thread_id), turn))
            await asyncio.sleep(0.2)
            cancelled.cancel()
            ending = asyncio.create_task(store.end_turn(thread_id, [end("j", thread_id)], turn))
            await asyncio.sleep(0.2)
        await ending
        assert cancelled.cancelled()
        assert await ids(store, thread_id) == ["i", "j"]


async def test_a_store_that_is_closed_ends_what_was_begun_and_leaves_no_connection(postgres: PostgresDatabase) -> None:
    name = f"{postgres.prefix}closed"
    async with open_store(f"{postgres.url}?application_name={name}", postgres.prefix) as store:
        thread_id = await make_thread(store)
        writing = asyncio.create_task(store.add_thread_item(thread_id, end("i", thread_id), alice()))
        await asyncio.sleep(0)
        writing.cancel()
    async with postgres.open() as store:
        assert await ids(store, thread_id) == ["i"]
    deadline = time.monotonic() + 5
    while postgres.query(f"SELECT 1 FROM pg_stat_activity WHERE application_name = '{name}'"):
        assert time.monotonic() < deadline


@pytest.mark.parametrize("kind", ["read", "write"])
async def test_a_store_is_closed_in_seconds_although_the_server_is_frozen(
    postgres: PostgresDatabase, kind: str
) -> None:
    line = Line(postgres.url)
    async with line.open() as url:
        async with PostgresStore(url, postgres.prefix, pool_size=1) as store:
            thread_id = await make_thread(store)
            line.is_frozen = True
            work = store.load_thread if kind == "read" else store.delete_thread
            asked = asyncio.gather(*[work(thread_id, alice()) for _ in range(2)], return_exceptions=True)
            await asyncio.sleep(0.1)
            began = time.monotonic()
        assert time.monotonic() - began < 8
        assert outcomes(await asked) == {StoreUnavailable: 2}


async def test_what_runs_when_a_store_is_closed_is_ended_at_the_server_too(postgres: PostgresDatabase) -> None:
    name = f"{postgres.prefix}ended"
    with ExitStack() as stack:
        async with open_store(f"{postgres.url}?application_name={name}", postgres.prefix) as store:
            thread_id = await make_thread(store)
            stack.enter_context(held(postgres, "LOCK TABLE @threads"))
            asked = asyncio.gather(store.load_thread(thread_id, alice()), return_exceptions=True)
            await asyncio.sleep(0.1)
        assert outcomes(await asked) == {StoreUnavailable: 1}
        await until_none(postgres, f"SELECT 1 FROM pg_stat_activity WHERE application_name = '{name}'")


async def test_a_store_that_is_closed_takes_no_more_writes(postgres: PostgresDatabase) -> None:
    ends: list[str] = []

    async def write(store: ConversationStore, thread_id: str) -> None:
        with suppress(StoreUnavailable):
            while True:
                await store.add_thread_item(thread_id, end("i", thread_id), alice())
        ends.append(thread_id)

    async with asyncio.timeout(10):
        async with postgres.open() as store:
            thread_id = await make_thread(store)
            writing = asyncio.create_task(write(store, thread_id))
            await asyncio.sleep(0.1)
        await writing
    with pytest.raises(StoreUnavailable, match="closed"):
        await store.load_thread(thread_id, alice())
    assert ends == [thread_id]


async def test_a_failure_that_nobody_waits_for_any_more_is_not_logged(
    postgres: PostgresDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    async with PostgresStore(postgres.url, postgres.prefix, work_seconds=0.5) as store:
        thread_id = await make_thread(store)
        with held(postgres, "LOCK TABLE @threads"):
            asked = [
                asyncio.create_task(store.load_thread(thread_id, alice())),
                asyncio.create_task(store.delete_thread(thread_id, alice())),
            ]
            await asyncio.sleep(0.1)
            for task in asked:
                task.cancel()
            await asyncio.sleep(1)
    gc.collect()
    await asyncio.sleep(0)
    assert caplog.text == ""


async def test_a_pooler_in_transaction_mode_may_stand_between(
    postgres: PostgresDatabase, running_postgres: PostgresServer
) -> None:
    with pgbouncer(running_postgres, pool_size=3) as url:
        async with AsyncExitStack() as stack:
            stores = await asyncio.gather(
                *[stack.enter_async_context(open_store(url, postgres.prefix)) for _ in range(4)]
            )

            async def turn(number: int) -> list[str]:
                store, context = stores[number % 4], RequestContext(f"user{number % 5}")
                thread_id = await make_thread(store, items=2, context=context)
                quota = Quota(turns_per_minute=100, concurrent_turns=100, tokens_per_day=100)
                lease = await store.acquire_lease(thread_id, context, quota=quota)
                running = RequestContext(context.user_id, lease=lease)
                await store.save_checkpoints(thread_id, [end("open", thread_id)], running)
                await store.end_turn(thread_id, [end("open", thread_id)], running)
                await store.reserve_attachment(file(f"a{number}"), 3, 1000, context)
                upload = await store.begin_upload(f"a{number}", context)
                await store.write_chunk(f"a{number}", upload, 0, b"\x00\xff\\", 1000, context)
                await store.finish_upload(f"a{number}", upload, context)
                assert await store.read_chunk(f"a{number}", 0, context) == b"\x00\xff\\"
                page = await store.load_thread_items(thread_id, None, 9, "asc", RequestContext(context.user_id))
                return [item.id for item in page.data]

            turns = await asyncio.gather(*[turn(number) for number in range(40)])
            assert turns == [["item_0", "item_1", "open"]] * 40


async def test_what_postgresql_never_takes_does_not_hold_its_thread(postgres: PostgresDatabase) -> None:
    async def answer(thread_id: str) -> Events:
        yield ThreadItemAddedEvent(item=end(secrets.token_hex(6_000), thread_id))  # too long for an index

    async with postgres.open() as store, Turns.running(store) as turns:
        thread_id = await make_thread(store)
        async with turns.opening(thread_id, alice()) as context:
            thread = await store.load_thread(thread_id, context)
            turn = turns.start(thread, context, answer(thread_id), lambda event, _: event)
        async with asyncio.timeout(10):
            await asyncio.wait({turn.task})
        assert not await store.is_leased(thread_id, alice())
