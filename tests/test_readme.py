"""The README is true: its commands run, and its table of settings is the code's."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest

from conftest import probing
from service import ROOT, address, errors_of, eventually, fold, service, thread_of
from settings import Settings
from standin import Call, Say, StandIn

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str = "") -> list[str]:
    """Return the fenced blocks of the README in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def settings_rows() -> dict[str, str]:
    """Return the settings of the table with their defaults, as they are written."""
    rows = {}
    for names, defaults in re.findall(r"^\| (`[A-Z_`, ]+`) \| (.+?) \| .+ \|$", README, re.MULTILINE):
        variables = re.findall(r"`([A-Z_]+)`", names)
        values = [defaults] if len(variables) == 1 else defaults.split(", ")
        assert len(values) == len(variables), names
        rows.update(zip(variables, values, strict=True))
    return rows


def test_the_table_names_every_setting_with_its_default() -> None:
    rows = settings_rows()
    assert rows.keys() == {field.name.upper() for field in fields(Settings)}
    for field in fields(Settings):
        written = rows[field.name.upper()]
        if field.name == "attachment_types":
            assert written == "images, PDF, text, office files"
        elif written == "\N{EN DASH}":
            assert not field.default
        else:
            assert field.metadata["read"](written.strip("`")) == field.default, field.name


def test_the_first_two_blocks_are_one_command_each() -> None:
    first, second, *_ = re.findall(r"^```\w*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert first.count("\n") == 1
    assert second == "python3 tests/run.py\n"


def test_every_test_that_the_page_on_reliability_names_exists() -> None:
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"))
    files = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    there = {name for text in files for name in re.findall(r"^(?:async )?def (test_\w+)", text, re.MULTILINE)}
    assert len(named) > 30
    assert [name for name in named if name not in there] == []


def test_the_lock_files_name_no_registry() -> None:
    for lock in ROOT.glob("requirements*.lock"):
        lines = lock.read_text(encoding="utf-8").splitlines()
        assert not [line for line in lines if "://" in line or line.startswith(("-i", "--index", "--extra"))], lock
        assert all("==" in line for line in lines if line and not line.startswith((" ", "#")))


def test_the_locked_packages_are_those_that_the_project_asks_for() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    locked = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    for name in ("starlette", "uvicorn", "openai-chatkit", "openai-agents", "aiosqlite", "python-jose"):
        assert name in project
        assert re.search(rf"^{name}(\[\w+\])?==", locked, re.MULTILINE), name


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A fresh clone with an empty home beside it."""
    (tmp_path / "home").mkdir()
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, tracked.split("\0")):
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "clone" / name)
    return tmp_path / "clone"


def test_the_first_command_serves_and_the_readmes_curl_is_answered_and_kept(clone: Path) -> None:
    create, listing, *_ = blocks("bash")
    began = time.monotonic()
    with first_command(clone) as url:
        answer = curl(create, url)
        print(f"\nfrom the clone to the whole first answer: {time.monotonic() - began:.0f} s")
    said = "".join(re.findall(r'"delta":"(.*?)"}', answer))
    assert "No model is configured" in said
    with first_command(clone) as url:
        assert re.findall(r'"(thr_[0-9a-f]+)"', answer)[0] in curl(listing, url)


@contextmanager
def first_command(clone: Path) -> Iterator[str]:
    """Run the README's first command in a clean environment, and yield the address that it serves on."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(clone.parent / "home"), "PORT": "0"}
    environ |= {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "REQUESTS_"))}
    log = clone.parent / "log"
    with log.open("wb") as output:
        serving = subprocess.Popen(
            ["bash", "-c", blocks()[0]], cwd=clone, env=environ, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield eventually(lambda: address(serving, log, 0), 300, "the start from a fresh clone")
    finally:
        os.killpg(serving.pid, 15)
        serving.wait(30)


def curl(command: str, url: str) -> str:
    """Run a command of the README against a service that listens elsewhere."""
    command = command.replace("http://127.0.0.1:8000", url).replace("curl ", "curl -sS --noproxy '*' ", 1)
    return subprocess.run(["bash", "-c", command], capture_output=True, check=True, timeout=60).stdout.decode()


EXAMPLES: dict[str, tuple[list[Call | Say], Callable[[list[dict], StandIn], bool]]] = {
    "opening_hours": (
        [Call("opening_hours", {"day": "Sunday"}), Say("Closed.")],
        lambda events, model: "closed" in str(model.asked[-1].body["input"]),
    ),
    "search": (
        [Call("search", {"query": "Homer"}), Say("Two.")],
        lambda events, model: {"type": "progress_update", "text": "Searching for Homer"} in events,
    ),
    "show_order": (
        [Call("show_order"), Say("There.")],
        lambda events, model: (
            [item["type"] for item in fold(events)] == ["user_message", "widget", "assistant_message"]
        ),
    ),
    "pick_file": ([Call("pick_file")], lambda events, model: fold(events)[-1]["name"] == "pick_file"),
    "ask_address": ([Call("ask_address")], lambda events, model: fold(events)[-1]["inputs"][0]["id"] == "address"),
    "my_orders": (
        [Call("my_orders"), Say("One.")],
        lambda events, model: "The Odyssey" in str(model.asked[-1].body["input"]),
    ),
}


def test_every_example_of_an_agent_is_run_below() -> None:
    named = [name for name in EXAMPLES for code in blocks("python") if f"def {name}(" in code]
    assert named == list(EXAMPLES)
    assert len(blocks("python")) == len(EXAMPLES)
    assert all(len(list(filter(None, code.splitlines()))) < 20 for code in blocks("python"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_readmes_agents_do_what_is_said_of_them(
    tmp_path: Path, model: StandIn, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    [code] = [code for code in blocks("python") if f"def {name}(" in code]
    (tmp_path / f"readme_{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    steps, shown = EXAMPLES[name]
    for step in steps:
        model.will(step)
    with service(**probing(model, tmp_path / "chatkit.db", AGENT=f"readme_{name}")) as client:
        events = client.create("Please")
        assert not errors_of(events)
        assert shown(events, model)
        if name == "show_order":
            [widget] = [item for item in fold(events) if item["type"] == "widget"]
            action = {"thread_id": thread_of(events), "item_id": widget["id"], "action": {"type": "order"}}
            assert "Ordered" in str(client.stream("threads.custom_action", action))


def test_the_table_of_commands_is_that_of_the_help() -> None:
    command = [sys.executable, str(ROOT / "app.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    listed = set(re.findall(r"`python app\.py ([a-z-]+)", README))
    assert listed == set(re.findall(r"^    ([a-z-]+)\b", shown, re.MULTILINE))
