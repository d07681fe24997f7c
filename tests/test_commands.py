"""The command line: how the process starts, refuses to start, and listens."""

import asyncio
import gc
import os
import pty
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest

import copying
from check import check
from clients import Stream
from commands import main
from conftest import probing
from databases import Database, PostgresDatabase
from service import ROOT, Client, errors_of, eventually, fold, is_up, message, process, run, service, text_of, thread_of
from settings import Settings
from sockets import UNREAD_SECONDS, listen
from standin import Begin, Call, Fail, Hang, Say, StandIn, standing_in
from test_faults import seen_text


def test_unreadable_settings_are_all_named_and_the_exit_code_is_2(tmp_path: Path) -> None:
    result = run(tmp_path, PORT="http", WORKERS="none", LOG_LEVEL="verbose")
    assert result.returncode == 2
    for name in ("PORT", "WORKERS", "LOG_LEVEL"):
        assert f"{name} must be" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_address_that_others_reach_needs_login_or_a_word_that_it_does_not(tmp_path: Path, host: str) -> None:
    result = run(tmp_path, HOST=host, PORT="0")
    assert result.returncode == 2
    assert "ALLOW_ANONYMOUS=1" in result.stderr


def test_a_database_of_a_newer_release_is_refused_in_one_line(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "chatkit.db") as db:
        db.execute("PRAGMA user_version = 9999")
    result = run(tmp_path, PORT="0")
    assert result.returncode == 2
    assert "made by a newer release" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_database_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    result = run(tmp_path, PORT="0", DATABASE_URL="sqlite:///nowhere/chatkit.db")
    assert result.returncode == 1
    assert "nowhere/chatkit.db" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_database_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "chatkit.db").write_bytes(b"no database at all, but rather a text" * 100)
    result = run(tmp_path, PORT="0")
    assert result.returncode == 1
    assert f"{tmp_path}/chatkit.db" in result.stderr
    assert "DATABASE_URL" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_postgresql_that_does_not_answer_is_named_without_its_password(tmp_path: Path) -> None:
    result = run(tmp_path, PORT="0", DATABASE_URL="postgresql://chat:s3cret@127.0.0.1:9/chat")
    assert result.returncode == 1
    assert "127.0.0.1" in result.stderr
    assert "DATABASE_URL" in result.stderr
    assert "s3cret" not in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("agent", ["no_such_module", "no_such.module", "settings", "settings:nothing"])
def test_an_agent_that_is_not_there_is_named_with_where_it_must_be(tmp_path: Path, agent: str) -> None:
    result = run(tmp_path, PORT="0", AGENT=agent)
    assert result.returncode == 2
    assert f"AGENT={agent}" in result.stderr
    assert ("beside app.py" in result.stderr) == agent.startswith("no_such")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = 1\ndef create_agent(context:\n", "line 2"),
        ("import json\n\njson.loads('')\n", "line 3"),
        ("import no_such_package\n", "no_such_package"),
        ("raise SystemExit('over')\n", "SystemExit"),
    ],
)
def test_an_agent_that_cannot_be_imported_is_told_with_its_line(tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "my_agent.py").write_text(source)
    result = run(tmp_path, PORT="0", AGENT="my_agent", PYTHONPATH=str(tmp_path))
    assert result.returncode == 2
    assert "AGENT=my_agent" in result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [(), ("check",), ("usage",)])
def test_a_file_of_settings_that_cannot_be_read_is_said_in_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    for source in ROOT.glob("*.py"):
        (tmp_path / source.name).symlink_to(source)
    (tmp_path / "app.py").unlink()
    shutil.copy(ROOT / "app.py", tmp_path)
    (tmp_path / ".env").write_bytes(b"AGENT=m\xfcller")
    command = [sys.executable, str(tmp_path / "app.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 2
    assert ".env is not text in UTF-8" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_log_begins_with_what_runs(tmp_path: Path) -> None:
    with process(tmp_path) as offline:
        [line] = [line for line in offline.log.splitlines() if "starting" in line]
        for words in (offline.url, "SQLite", f"{tmp_path}/chatkit.db", "no login", "offline demo"):
            assert words in line
    environ = {
        "OPENAI_BASE_URL": "http://127.0.0.1:9/v1",
        "OPENAI_API_KEY": "s3cret",
        "OPENAI_DEFAULT_MODEL": "small",
        "JWKS_URL": "http://127.0.0.1:9/keys",
        "JWT_ISSUER": "https://issuer.example",
        "PORT": "0",
    }
    with subprocess.Popen(
        [sys.executable, str(ROOT / "app.py")], cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True
    ) as online:
        assert online.stderr is not None
        line = next(line for line in iter(online.stderr.readline, "") if "starting" in line)
        online.kill()
    for words in ("https://issuer.example", "small", "http://127.0.0.1:9/v1"):
        assert words in line
    assert "s3cret" not in line


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run(tmp_path, PORT=str(taken.getsockname()[1]))
    assert result.returncode == 2
    assert "PORT=" in result.stderr


def test_the_sockets_of_the_service_send_small_events_at_once_and_give_up_who_reads_nothing() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == UNREAD_SECONDS * 1000


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_hangup_ends_and_reloads_nothing(tmp_path: Path, model: StandIn, workers: str) -> None:
    with process(tmp_path, **probing(model, tmp_path / "chatkit.db", WORKERS=workers)) as client:
        model.will(Say("This takes a little while to be said", gap=0.3))
        with client.streaming("threads.create", {"input": message("Slowly")}) as events:
            seen = [next(events)]
            client.signal(signal.SIGHUP)
            seen += list(events)
        assert not errors_of(seen)
        assert text_of(fold(seen)[-1]) == "This takes a little while to be said"
        assert "SIGHUP" not in client.log
        client.signal(signal.SIGTERM)
        assert client.wait() == 0


def test_workers_that_take_long_to_start_are_waited_for(tmp_path: Path) -> None:
    slowly = "import sys, time\nif '--multiprocessing-fork' in sys.orig_argv: time.sleep(7)\n"
    (tmp_path / "sitecustomize.py").write_text(slowly)
    with process(tmp_path, WORKERS="2", PYTHONPATH=str(tmp_path)) as client:
        assert client.ask("threads.list")["data"] == []


def test_a_terminal_that_is_closed_ends_the_service_well(tmp_path: Path) -> None:
    terminal, standard_input = pty.openpty()
    with process(tmp_path, stdin=standard_input) as client:
        client.signal(signal.SIGHUP)
        assert client.wait() == 0
    os.close(terminal)
    os.close(standard_input)


def test_a_second_interrupt_ends_the_service_at_once_and_loses_nothing_that_was_shown(
    tmp_path: Path, model: StandIn
) -> None:
    environ = probing(model, tmp_path / "chatkit.db", SHUTDOWN_GRACE_SECONDS="300")
    model.will(Begin("Half an answer"), Hang())
    hang = {"input": message("Hang")}
    with process(tmp_path, **environ) as client, client.streaming("threads.create", hang) as events:
        seen: list[dict] = []
        while "answer" not in str(seen[-1:]):
            seen.append(next(events))
        client.signal(signal.SIGINT)
        eventually(lambda: not is_up(client))
        client.signal(signal.SIGINT)
        assert client.wait(20) == 0
    with process(tmp_path, **environ) as client:
        assert [text_of(item) for item in client.items(thread_of(seen))] == ["Hang", "Half an answer"]


@pytest.mark.parametrize("arguments", [["no-such-command"], ["export-user"], ["delete-user"], ["purge", "all"]])
def test_arguments_that_are_wrong_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert any(word in said for word in ("'no-such-command'", "required: ID", "unrecognized arguments: all"))


def test_migrate_makes_the_schema_and_says_so(tmp_path: Path) -> None:
    migrated = run(tmp_path, "migrate")
    assert (migrated.returncode, migrated.stdout) == (0, "The database has this release's schema.\n")
    assert "from schema 0 to" in migrated.stderr
    assert sqlite3.connect(tmp_path / "chatkit.db").execute("SELECT count(*) FROM threads").fetchone() == (0,)


def checked(database: Database, schema: int) -> tuple[bool, str, list[tuple[Any, ...]]]:
    """Return what `check` of a release with this schema says of the database, and how it leaves the tables."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for kind in (copying._SQLite, copying._Postgres):
            patch.setattr(kind, "newest", schema)
        is_right = asyncio.run(check(Settings.from_environ(database.environ), None, said.append))
    [line] = [line for line in said if " database: " in line]
    return is_right, line, database.schema()


async def make(database: Database) -> None:
    async with database.open():
        pass


def test_check_leaves_a_database_of_an_older_release_as_it_is(database: Database) -> None:
    asyncio.run(make(database))
    before = database.schema()
    is_right, said, after = checked(database, 2)
    assert (is_right, after) == (True, before)
    assert "has schema 1, of an older release, and is brought to schema 2 at the next start" in said
    assert checked(database, 1)[1].endswith("answers, and has this release's schema")


def test_check_makes_no_tables(postgres: PostgresDatabase) -> None:
    is_right, said, after = checked(postgres, 1)
    assert (is_right, after) == (True, [])
    assert "has nothing of the service's yet, and is brought to schema 1 at the next start" in said


def test_check_says_that_a_database_is_of_a_newer_release(database: Database) -> None:
    asyncio.run(make(database))
    database.set_schema(9999)
    is_right, said, _ = checked(database, 1)
    assert not is_right
    assert "made by a newer release" in said


def test_usage_is_counted_by_day_user_and_model_with_feedback(tmp_path: Path, model: StandIn) -> None:
    with service(**probing(model, tmp_path / "chatkit.db")) as client:
        events = client.create("Hello")
        on_thread = {"thread_id": thread_of(events)}
        eventually(lambda: "title" in client.ask("threads.get_by_id", on_thread), what="its title, which counts too")
        model.will(Call("look_up", {"word": "x"}))
        client.say(thread_of(events))
        rated = {**on_thread, "item_ids": [fold(events)[-1]["id"]]}
        client.ask("items.feedback", {**rated, "kind": "positive"})
        client.ask("items.feedback", {**rated, "kind": "negative"})
    lines = run(tmp_path, "usage").stdout.splitlines()
    assert lines[1].split() == [f"{datetime.now(UTC):%Y-%m-%d}", "local", "stand-in", "4", "28", "20"]
    assert lines[-1].split() == ["local", "0", "1"]


def test_nothing_is_counted_of_an_answer_that_never_began(tmp_path: Path, model: StandIn) -> None:
    model.will(Fail(400))
    with service(**probing(model, tmp_path / "chatkit.db")) as client:
        events = client.create("x" * 100_000)
        assert errors_of(events)
        on_thread = {"thread_id": thread_of(events)}
        eventually(lambda: "title" in client.ask("threads.get_by_id", on_thread), what="its title, which counts")
    assert run(tmp_path, "usage").stdout.splitlines()[1].split()[3:] == ["1", "7", "5"]


def test_what_was_said_before_an_answer_was_stopped_is_counted_too(tmp_path: Path, model: StandIn) -> None:
    model.will(Call("look_up", {"word": "x"}))
    model.will(Begin("word " * 1000), Hang())
    with service(**probing(model, tmp_path / "chatkit.db")) as client:
        with Stream.create(client.url) as stream:
            stream.read_until(seen_text("word " * 1000))

        def output_tokens() -> int:
            return int(run(tmp_path, "usage").stdout.splitlines()[1].split()[-1])

        eventually(lambda: output_tokens() >= 5 + 1250, what="the count of both responses")


def test_a_changed_agent_is_served_without_a_restart(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    agent = folder / "my_agent.py"
    source = (
        "from agents import Agent\n\n\ndef create_agent(context):\n    return Agent(name='Mine', instructions=...)\n"
    )
    agent.write_text(source.replace("...", "'first words'"))
    with standing_in() as model:
        environ = {"AGENT": "my_agent", "PYTHONPATH": str(folder), "OPENAI_BASE_URL": model.url}
        with process(tmp_path, "serve", "--reload", **environ) as client:
            client.create("Hello")
            assert model.asked[-1].body["instructions"] == "first words"
            agent.write_text(source.replace("...", "'second words'"))

            def changed() -> bool:
                try:
                    client.create("Hello again")
                except httpx2.TransportError:
                    return False
                return bool(model.asked[-1].body["instructions"] == "second words")

            eventually(changed, 30, "the change of the agent")
            client.signal(signal.SIGTERM)
            assert client.wait() == 0


BY_UVICORN = [sys.executable, "-m", "uvicorn", "--factory", "app:create_app", "--port", "0", "--app-dir", str(ROOT)]


def test_the_service_runs_under_uvicorns_own_command_too(tmp_path: Path) -> None:
    environ = {"PATH": os.environ["PATH"], "LOG_FORMAT": "json"}
    with subprocess.Popen(BY_UVICORN, cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        lines = iter(server.stderr.readline, "")
        [url] = re.findall(r"Uvicorn running on (http://[\d.:]+)", next(line for line in lines if "running on" in line))
        assert Client(url).ask("threads.list")["data"] == []
        assert any(line.startswith('{"time"') and "threads.list" in line for line in lines)
        server.send_signal(signal.SIGTERM)
        server.wait(20)


def test_uvicorns_own_command_names_bad_settings_as_ours_does(tmp_path: Path) -> None:
    environ = {"PATH": os.environ["PATH"], "WORKERS": "none"}
    ended = subprocess.run(BY_UVICORN, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert (ended.returncode, "WORKERS must be" in ended.stderr) == (2, True)
    assert "Traceback" not in ended.stderr


def test_the_garbage_collector_is_spared_what_lives_as_long_as_the_process(model: StandIn, tmp_path: Path) -> None:
    before = gc.get_threshold()
    with service(**probing(model, tmp_path / "chatkit.db")):
        assert gc.get_freeze_count() > 100_000
        assert gc.get_threshold() == (50_000, 3, 3)
    assert gc.get_freeze_count() == 0
    assert gc.get_threshold() == before
