"""A wall clock that jumps while the service runs: deadlines do not follow it, and no thread waits for it."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from clients import Stream
from conftest import probing
from service import Process, errors_of, eventually, fold, process, text_of, thread_of
from standin import Begin, Hang, Say, StandIn
from test_faults import assert_kept, rows, seen_text

HOUR = 3600


class Clock:
    """The wall clock of one process and of the SQLite inside it: off by what a file says. Monotonic time is not."""

    def __init__(self, file: Path):
        self._file = file
        self.set(0)

    def set(self, seconds: int) -> None:
        self._file.write_text(f"{seconds:+d}")

    def environ(self) -> dict[str, str]:
        [library] = Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")
        return {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path / "clock")


@pytest.fixture
def running(model: StandIn, tmp_path: Path, clock: Clock) -> Iterator[Process]:
    quota = {"TURNS_PER_MINUTE": "9", "CONCURRENT_TURNS_PER_USER": "2", "TURN_TIMEOUT_SECONDS": "120"}
    variables = probing(model, tmp_path / "chatkit.db") | quota | clock.environ()
    with process(tmp_path, **variables) as running:
        clock.set(HOUR)
        [created] = [event["thread"] for event in running.create() if event["type"] == "thread.created"]
        assert datetime.fromisoformat(created["created_at"]) - datetime.now(UTC) > timedelta(minutes=59)
        clock.set(0)
        yield running


def test_a_turn_goes_on_while_the_clock_jumps_and_nobody_waits_for_it(
    running: Process, model: StandIn, clock: Clock, tmp_path: Path
) -> None:
    database = tmp_path / "chatkit.db"
    model.will(Say("word " * 2000, gap=0.1))
    with Stream.create(running.url) as stream:
        thread_id = thread_of(stream.read_until(lambda events: "word" in str(events)))
        for seconds in (HOUR, -HOUR):
            before = lease_end(database)
            clock.set(seconds)
            eventually(lambda before=before: abs(lease_end(database) - before) > HOUR / 2, what="the lease's renewal")
            for _ in range(2):  # of nine in a minute; those of another time do not count
                assert errors_of(running.create()) == []
        seen = len(stream.seen)
        stream.read_until(lambda events: len(events) > seen + 10)
        stream.leave()
    assert errors_of(stream.seen) == []
    eventually(lambda: not rows(database, "SELECT * FROM leases"), 20, "the end of the turn")
    assert_kept(running, stream.seen)
    assert errors_of(running.say(thread_id)) == []


def lease_end(database: Path) -> float:
    [(expires_at,)] = rows(database, "SELECT min(expires_at) FROM leases")
    return float(expires_at)


def test_what_was_shown_is_kept_although_its_thread_is_read_in_the_moment_of_a_jump(
    running: Process, model: StandIn, clock: Clock, tmp_path: Path
) -> None:
    """Until its lease is renewed, a turn looks like one that died; what it had shown is stored then, and it says so."""
    database = tmp_path / "chatkit.db"
    for seconds in (HOUR, -HOUR, 0):
        model.will(Begin("Half an answer"), Hang())
        with Stream.create(running.url) as stream:
            thread_id = thread_of(stream.read_until(seen_text("Half an answer")))
            eventually(lambda: "Half an" in str(rows(database, "SELECT body FROM checkpoints")), what="the checkpoint")
            clock.set(seconds)
            assert text_of(running.items(thread_id)[0]) == "Hello"
            stream.leave()
        eventually(lambda: not rows(database, "SELECT * FROM leases"), 20, "the end of the turn")
        assert_kept(running, stream.seen)
        assert text_of(fold(running.say(thread_id))[-1]) == "Hello from the stand-in."
