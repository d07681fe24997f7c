"""Measures the service beside what people would use instead: `python3 bench/run.py [--quick] [--only GROUP,…]`.

It makes a virtual environment with the locked packages and those of bench/requirements.lock, pins what is measured to
one core and the load to another, prints a table, and, when everything was measured in full, writes bench/RESULTS.md
and bench/samples.json. Where those are of the same code already, it says what was found again. It runs on Linux with
two cores or more; everything in full takes about an hour, and wants a machine that does nothing else.
"""

import argparse
import asyncio
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BENCH = Path(__file__).resolve().parent
ENVIRONMENT = BENCH.parent / ".venv-bench"
SAMPLES = BENCH / "samples.json"
NOT_MEASURED = [":!*.md", f":!bench/{SAMPLES.name}"]
ROUNDS = 5
"""Fewer are nothing to quote."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little of everything, in seven minutes: nothing to quote")
    parser.add_argument(
        "--only", default="", help="some alone: turns,long,paced,requests,silent,start,workers,store,endurance"
    )
    parser.add_argument("--rounds", type=int, help="samples of each figure")
    options = parser.parse_args()
    if (BENCH.parent / ".env").exists():
        raise SystemExit("bench: move .env away; the service would be measured with its settings.")
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("bench: this needs two cores, one for what is measured and one for the load.")
    if Path(sys.prefix) != ENVIRONMENT:
        python = ENVIRONMENT / "bin" / "python"
        install(python)
        os.execv(python, [str(python), __file__, *sys.argv[1:]])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else 65536, hard))
    try:
        asyncio.run(measure(options))
    except (asyncio.CancelledError, KeyboardInterrupt):
        raise SystemExit("bench: interrupted") from None


def install(python: Path) -> None:
    """Install what the locks name, unless that was done already."""
    locks = [BENCH.parent / "requirements.lock", BENCH / "requirements.lock"]
    installed, wanted = ENVIRONMENT / "installed", "".join(lock.read_text() for lock in locks)
    if installed.exists() and installed.read_text() == wanted:
        return
    print(f"bench: making {ENVIRONMENT.name} …", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
    for lock in locks:
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--require-hashes", "-r", lock], check=True)
    installed.write_text(wanted)


async def measure(options: argparse.Namespace) -> None:
    from dataclasses import replace

    from contestants import LOAD
    from figures import ALONE, GROUPS, QUICK, Bench, Results, Sizes, prepared
    from load import standing_in
    from report import report

    os.sched_setaffinity(0, [LOAD])
    sizes = QUICK if options.quick else Sizes()
    if options.rounds:
        sizes = replace(sizes, rounds=options.rounds)
    groups = options.only.split(",") if options.only else [name for name in GROUPS if name not in ALONE]
    if unknown := set(groups) - GROUPS.keys():
        raise SystemExit(f"bench: there is no {', '.join(unknown)}; there are {', '.join(GROUPS)}.")
    if ALONE.intersection(groups) and len(groups) > 1:
        raise SystemExit(f"bench: {', '.join(ALONE)} is measured alone.")
    is_look = bool(options.quick or options.only) or sizes.rounds < ROUNDS
    rounds = 1 if ALONE.intersection(groups) else sizes.rounds
    results, commit, begin = Results(), commit_of(BENCH.parent), time.monotonic()
    command = shlex.join(["python3", "bench/run.py", *sys.argv[1:]])
    measuring = asyncio.current_task()
    assert measuring
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that whatever runs is ended too
        asyncio.get_running_loop().add_signal_handler(number, measuring.cancel)
    remark = "Cut short, nothing to quote."
    try:
        with tempfile.TemporaryDirectory(dir=ENVIRONMENT) as directory:  # on a disk: /tmp may be none
            async with standing_in() as upstream:
                bench = Bench(sizes, results, upstream, Path(directory))
                async with prepared(bench, groups):
                    for number in range(rounds):
                        bench.round = number
                        for group in groups:
                            started = time.monotonic()
                            await GROUPS[group][0](bench)
                            took = f"{group} in {time.monotonic() - started:.0f} s"
                            print(f"bench: round {number + 1} of {rounds}: {took}", flush=True)
        remark = f"A look at {options.only or 'all'}, nothing to quote." if is_look else ""
    finally:  # what was measured before an interruption is worth reading
        minutes = (time.monotonic() - begin) / 60
        print(report(results, minutes, command=command, commit=commit, remark=remark))
    if not is_look:
        runs = json.loads(SAMPLES.read_text()) if SAMPLES.exists() else {}
        before = Results(runs[commit]) if commit in runs else None
        page = report(results, minutes, command=command, commit=commit, before=before)
        (BENCH / "RESULTS.md").write_text(page, encoding="utf-8")
        SAMPLES.write_text(json.dumps({commit: results.samples}) + "\n")


def commit_of(root: Path) -> str:
    """Return the short name of what is measured, and whether it was changed."""

    def git(*arguments: str) -> str:
        return subprocess.check_output(["git", "-C", root, *arguments], stderr=subprocess.DEVNULL, text=True).strip()

    try:
        changed = git("status", "--porcelain", "--", ".", *NOT_MEASURED)
        return git("log", "-1", "--format=%h", "--", ".", *NOT_MEASURED) + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    main()
