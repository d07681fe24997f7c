"""The command line: how the process starts, refuses to start, and listens."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import httpx2
import pytest

from conftest import probing
from service import ROOT, eventually, fold, process, service, thread_of
from sockets import listen
from standin import Call, StandIn, standing_in


def run(directory: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "app.py"), *arguments],
        cwd=directory,
        env={"PATH": os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_unreadable_settings_are_all_named_and_the_exit_code_is_2(tmp_path: Path) -> None:
    result = run(tmp_path, PORT="http", WORKERS="none")
    assert result.returncode == 2
    assert "PORT must be" in result.stderr
    assert "WORKERS must be" in result.stderr
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


@pytest.mark.parametrize("agent", ["no_such_module", "settings", "settings:nothing"])
def test_an_agent_that_is_not_there_is_named(tmp_path: Path, agent: str) -> None:
    result = run(tmp_path, PORT="0", AGENT=agent)
    assert result.returncode == 2
    assert agent.partition(":")[0] in result.stderr


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run(tmp_path, PORT=str(taken.getsockname()[1]))
    assert result.returncode == 2
    assert "PORT=" in result.stderr


def test_the_sockets_of_the_service_send_small_events_at_once() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_process_may_open_more_files_than_it_was_given(tmp_path: Path) -> None:
    with process(tmp_path) as service:
        limits = Path(f"/proc/{service.process.pid}/limits").read_text()
        [line] = [line for line in limits.splitlines() if line.startswith("Max open files")]
        soft, hard = line.split()[3:5]
        assert int(soft) == min(int(hard), 65536)


def test_usage_is_counted_by_day_user_and_model_with_feedback(tmp_path: Path, model: StandIn) -> None:
    with service(**probing(model, tmp_path / "chatkit.db")) as client:
        events = client.create("Hello")
        model.will(Call("look_up", {"word": "x"}))
        client.say(thread_of(events))
        rated = {"thread_id": thread_of(events), "item_ids": [fold(events)[-1]["id"]]}
        client.ask("items.feedback", {**rated, "kind": "positive"})
        client.ask("items.feedback", {**rated, "kind": "negative"})
    lines = run(tmp_path, "usage").stdout.splitlines()
    assert lines[1].split() == [f"{datetime.now(UTC):%Y-%m-%d}", "local", "stand-in", "3", "21", "15"]
    assert lines[-1].split() == ["local", "0", "1"]


def test_a_changed_agent_is_served_without_a_restart(tmp_path: Path) -> None:
    agent = tmp_path / "my_agent.py"
    source = (
        "from agents import Agent\n\n\ndef create_agent(context):\n    return Agent(name='Mine', instructions=...)\n"
    )
    agent.write_text(source.replace("...", "'first words'"))
    with standing_in() as model:
        environ = {"AGENT": "my_agent", "PYTHONPATH": str(tmp_path), "OPENAI_BASE_URL": model.url}
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


def test_the_service_runs_under_uvicorns_own_command_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "uvicorn", "--factory", "app:create_app", "--port", "0", "--app-dir", str(ROOT)]
    with subprocess.Popen(
        command, cwd=tmp_path, env={"PATH": os.environ["PATH"]}, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stderr is not None
        lines = iter(server.stderr.readline, "")
        assert any("Uvicorn running on" in line for line in lines)
        server.send_signal(signal.SIGTERM)
        server.wait(20)
