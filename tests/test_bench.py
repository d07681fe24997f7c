"""The bench measures what it says, so that it does not rot between two releases."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def direct(*arguments: object) -> dict[str, float]:
    command = [sys.executable, str(BENCH / "direct.py"), *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def test_what_is_measured_without_http_runs(tmp_path: Path) -> None:
    writes = direct("writes", tmp_path / "writes.db", 2)
    assert writes.keys() == {"together", "together_p99", "each", "each_p99"}
    for items in (100, 1000):
        direct("build", tmp_path / f"{items}.db", items)
    pages = direct("page", tmp_path, 100, 1000)
    assert pages.keys() == {"100", "1000"}
    assert all(pages.values())
    imported = subprocess.run([sys.executable, str(BENCH / "imported.py")], check=True, capture_output=True)
    assert json.loads(imported.stdout)["pages"] > 1000


def test_the_report_says_what_holds_what_does_not_and_what_was_not_measured() -> None:
    from figures import BARE, MEMORY, OURS, Results
    from report import report

    results = Results()
    for ours in (100, 90, 110):
        results.add("turns a second, 32 clients", OURS, ours)
        results.add("turns a second, 32 clients", MEMORY, ours / 4)
        results.add("turns a second, 256 clients", OURS, ours)
        results.add("turns a second, 256 clients", MEMORY, ours / 2)
        results.add("KB per silent stream", OURS, 150)
        results.add("KB per silent stream", BARE, ours)
        for deltas, cost in ((50, 10), (1000, 105), (10_000, 105 + 9000 * 0.2)):
            results.add(f"CPU ms per turn of {deltas} deltas, 4 clients", OURS, cost)
    page = report(results, 1, command="python3 bench/run.py --rounds 3")
    assert "Written by `python3 bench/run.py --rounds 3` on" in page
    assert "Median of 3 rounds" in page
    assert "[samples.json](samples.json)" in page
    assert "| ours | 100 | 90 to 110 |  |  |" in page
    assert "| template | 25 | 22.5 to 27.5 | 4.00 | 4.00 to 4.00 |" in page
    assert "turns a second, 32 clients: at least 2.5 times template | 4 | 4 to 4 | holds |" in page
    assert "turns a second, 256 clients: at least 2.5 times template | 2 | 2 to 2 | does not hold |" in page
    assert "idle memory, MB: at most 1.15 times import | | | not measured |" in page
    assert "60 KB more than the bare run's (here KB) | 50 | 40 to 60 | holds |" in page
    assert "at least 2.5 times template | 3 | 2 to 4 | holds, 2 of 3 rounds do |" in report(uneven(), 1)
    assert "at most 1.1 times one before | 2 | 2 to 2 | does not hold |" in page


def uneven() -> Any:
    from figures import MEMORY, OURS, Results

    results = Results()
    for ours in (3, 2, 4):
        results.add("turns a second, 32 clients", OURS, ours)
        results.add("turns a second, 32 clients", MEMORY, 1)
    return results


def test_a_run_that_was_interrupted_is_reported_as_far_as_it_came() -> None:
    from figures import MEMORY, OURS, Results
    from report import report

    results = Results()
    for ours in (100, 90, 110):
        results.add("turns a second, 32 clients", OURS, ours)
        if ours != 110:
            results.add("turns a second, 32 clients", MEMORY, ours / 4)
    page = report(results, 1, remark="A look.")
    assert "A look.\n" in page
    assert "samples.json" not in page, "nothing is written of it"
    assert "| 4.00 to 4.00 |" in page


def test_the_report_says_what_of_the_run_before_was_found_again() -> None:
    from figures import MEMORY, OURS, Results
    from report import report

    def run(*ours: float) -> Results:
        results = Results()
        for sample in ours:
            for figure in ("a", "b"):
                results.add(figure, OURS, sample if figure == "b" else 10)
                results.add(figure, MEMORY, 10)
        return results

    assert "Of 2 ratios 2 lie within" in report(run(10, 11), 1, before=run(10, 12))
    assert "lie within" not in report(run(10, 11, 12), 1, before=run(10, 12)), "fewer rounds are another measurement"
    page = report(run(13, 14), 1, before=run(10, 12))
    assert "Of 2 ratios 1 lie within" in page
    assert "| b, by template | 1.1 | 1 to 1.2 | 1.35 |" in page


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="the bench needs two cores")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_interrupted_ends_what_it_started_and_says_so(number: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOOKING, str(tmp_path), "--quick", "--only", "store"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=BENCH, process_group=0) as run:
        child = direct_of(run.pid)
        os.killpg(run.pid, number)  # as ^C at a terminal does
        out, error = run.communicate(timeout=30)
    assert run.returncode
    assert error == "bench: interrupted\n"
    assert "Cut short, nothing to quote." in out
    assert not child.exists(), "it is not left behind"


def direct_of(pid: int) -> Path:
    """Return the directory in /proc of the direct.py that a run has started."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with suppress(OSError):  # it had others, which have ended
                if b"direct.py" in Path("/proc", child, "cmdline").read_bytes():
                    return Path("/proc", child)
        time.sleep(0.01)
    raise AssertionError("nothing was started")


LOOKING = """
import signal
import sys
from pathlib import Path
import run

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for what it starts in the background

sys.prefix = sys.argv.pop(1)  # in place of an environment of its own
run.ENVIRONMENT = Path(sys.prefix)
run.BENCH = run.ENVIRONMENT / "bench"
run.main()
"""


def said(*texts: str) -> str:
    events = [{"update": {"type": "part.text_delta", "content_index": 0, "delta": text}} for text in texts]
    return "".join(f"data: {json.dumps(event, separators=(',', ':'))}\n\n" for event in events)


WHOLE, DONE = said(" 0000", " 0001"), 'data: {"type":"thread.item.done","item":{"text":" 0000 0001"}}\n\n'
TURNS = {
    "a whole one": (WHOLE + DONE, ""),
    "a joined one": (said(" 0000 0001") + DONE, ""),
    "one with an error": (WHOLE + DONE + 'data: {"type":"error"}', "a turn failed"),
    "one without words": (DONE, "half a turn"),
    "one without its last word": (said(" 0000") + DONE, "half a turn"),
    "one with a word twice": (said(" 0000", " 0000", " 0001") + DONE, "half a turn"),
    "one in another order": (said(" 0001", " 0000") + DONE, "half a turn"),
    "one without an end": (WHOLE, "half a turn"),
    "one with half an end": (WHOLE + DONE.replace(" 0001", ""), "half a turn"),
}


@pytest.mark.parametrize("what", TURNS)
def test_only_a_whole_turn_is_counted(what: str) -> None:
    body, fault = TURNS[what]
    command = [sys.executable, "-c", SAYING, body]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=BENCH)
    assert (ended.returncode == 0) == (not fault), ended.stderr
    assert fault in ended.stderr


SAYING = """
import asyncio, sys
from load import Client, Connection, Script

HEAD = b"HTTP/1.1 200 OK\\r\\ntransfer-encoding: chunked\\r\\n\\r\\n"

async def answering(reader, writer):
    await reader.readuntil(b"\\r\\n\\r\\n")
    body = sys.argv[1].encode()
    writer.write(HEAD + b"%x\\r\\n%s\\r\\n0\\r\\n\\r\\n" % (len(body), body))

async def main():
    server = await asyncio.start_server(answering, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    await Client(Connection(port), "thr_1").say("Hello", Script(deltas=2))

asyncio.run(main())
"""


def test_a_run_is_of_the_code_and_not_of_what_was_written_about_it(tmp_path: Path) -> None:
    from run import commit_of

    def commit(name: str) -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
        author = ["-c", "user.name=Me", "-c", "user.email=me@example.com"]
        subprocess.run(["git", "add", "."], check=True, cwd=tmp_path)
        subprocess.run(["git", *author, "commit", "--quiet", "--message", name], check=True, cwd=tmp_path)
        return commit_of(tmp_path)

    assert commit_of(tmp_path) == "unknown"
    subprocess.run(["git", "init", "--quiet", "."], check=True, cwd=tmp_path)
    measured = commit("app.py")
    assert commit("bench/samples.json") == measured
    assert commit("bench/RESULTS.md") == measured
    (tmp_path / "app.py").write_text("another")
    assert commit_of(tmp_path) == f"{measured} with changes"
    assert commit("store.py") not in (measured, f"{measured} with changes")
