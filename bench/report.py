"""The table: medians with the spread, ratios, and what was promised."""

import operator
import os
import platform
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from statistics import median

from figures import BARE, MEMORY, OURS, Results

TARGETS: list[tuple[str, str, str, str, float]] = [
    ("turns a second, 32 clients", OURS, MEMORY, "at least", 2.5),
    ("turns a second, 256 clients", OURS, MEMORY, "at least", 2.5),
    *((f"CPU ms per turn, {clients} clients", OURS, BARE, "at most", 1.0) for clients in (32, 256)),
    *((f"CPU ms per turn of {deltas} deltas, 4 clients", OURS, BARE, "at most", 1.0) for deltas in (50, 1000)),
    ("CPU ms per threads.list", OURS, MEMORY, "at most", 1 / 15),
    ("CPU ms per threads.get_by_id", OURS, MEMORY, "at most", 1 / 15),
    ("ms to the first delta, 1 client, p50", OURS, MEMORY, "at most", 0.5),
    *(
        (f"ms to the first delta, 256 streams of 20 deltas/s, {p}", OURS, MEMORY, "at most", 0.2)
        for p in ("p50", "p99")
    ),
    ("CPU µs per page of 20 items", "1000000 items", "1000 items", "at most", 1.3),
    ("durable writes a second, 64 writers", OURS, "a commit each", "at least", 15),
    ("ms for a durable write, 64 writers, p99", OURS, "a commit each", "at most", 1.0),
    ("ms from start to first answer", OURS, "import", "at most", 1.2),
    ("idle memory, MB", OURS, "import", "at most", 1.15),
]
"""Figure, whose, beside whose, and what the ratio of the medians is to be."""

LEGEND = """\
- **ours**: this service with SQLite on the disk, without login, so that all turns are one user's, and without quotas.
  Its garbage collector is set as it sets it itself; the others have Python's own settings.
- **template**: what ChatKit's documentation has one write, a FastAPI endpoint and a `ChatKitServer` with the default
  `process` and a store in memory; **template, sqlite3**: with a connection and a commit for each of its operations.
- **bare run**: `Runner.run_streamed` with the SDK's own model; its events are thrown away.
- **wire**: a Starlette endpoint that sends the bytes of the template's answer and does nothing else.
- **import**: a process that imports the SDKs. **a commit each**: our statements on our connection, each write in a
  transaction of its own. **fsync**: 4 KB written to the disk. **python-jose**: `jwt.decode`, with the key as the issuer
  lists it.

uvicorn serves all of them, with h11 and asyncio's own loop. Template and bare run keep as many idle connections to the
model as openai's client does by itself, 100; ours as many as it has turns. 21 items go to the model with each turn, the
new message among them; in those of 4 clients 3, and two more with each that follows. A *silent stream* is an answer
whose model has stopped after its first word; KB for each is what the second half of them adds to the first. Memory with
silent streams is the process's own alone; when idle, and after the first answer, it is all that is resident, mapped
files too. Pages of items come from files that are in memory. *Pieces* are the deltas in which a text comes: a process
that is behind may join them. *p99* of 100 waits or fewer, as those of 20 streams, is the longest of them. Of turns at
1, 4 and 32 clients, requests and starts a sample is taken in two halves, around those of the others."""

MAX_KB_ABOVE_BARE = 60
LONG_TURNS = 3
SAME_COST = 1.1


def report(
    results: Results,
    minutes: float,
    *,
    command: str = "python3 bench/run.py",
    commit: str = "unknown",
    before: Results | None = None,
    remark: str = "",
) -> str:
    """Return the page, in Markdown; `before` is a run of the same commit, a remark says why the page is not kept."""
    lines = [
        "# Measured beside what people would use instead",
        "",
        *([remark, ""] if remark else []),
        f"Written by `{command}` on {datetime.now(UTC):%Y-%m-%d} in {minutes:.0f} minutes: commit {commit},"
        f" {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()},"
        f" ChatKit SDK {version('openai-chatkit')}, Agents SDK {version('openai-agents')}, openai {version('openai')}.",
        "What is measured runs on one core, the load and the stand-in for the model on the other (two workers: all on"
        f" both). Median of {_rounds(results)} rounds and their spread. A ratio is the first line's by this line's: of"
        " the medians, and its spread over the rounds. Absolute numbers compare within a run.",
        "",
        LEGEND if remark else f"{LEGEND}\nAll samples are in [samples.json](samples.json).",
        "",
        "| | median | spread | ratio | its spread |",
        "|---|---:|---:|---:|---:|",
    ]
    for figure, by_contestant in results.samples.items():
        lines.append(f"| **{figure}** | | | | |")
        first = next(iter(by_contestant))
        for contestant, samples in by_contestant.items():
            ratio = _Ratio.of(by_contestant, first, contestant) if contestant != first else None
            row = [contestant, _number(median(samples)), f"{_number(min(samples))} to {_number(max(samples))}"]
            row += [f"{ratio.median:.2f}", f"{ratio.least:.2f} to {ratio.most:.2f}"] if ratio else ["", ""]
            lines.append(f"| {' | '.join(row)} |")
    lines += ["", "| promised | ratio | its spread | |", "|---|---:|---:|---|", *_kept(results)]
    if before and _rounds(before) == _rounds(results):
        lines += ["", *_reproduced(results, before)]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _Ratio:
    """One contestant's figure by another's: that of the medians, and the least and the most of a round.

    A run that was interrupted has one sample more of some than of others.
    """

    median: float
    rounds: list[float]

    @property
    def least(self) -> float:
        return min(self.rounds)

    @property
    def most(self) -> float:
        return max(self.rounds)

    @classmethod
    def of(cls, by_contestant: dict[str, list[float]], ours: str, theirs: str) -> "_Ratio | None":
        pairs = zip(by_contestant[ours], by_contestant[theirs], strict=False)
        of_rounds = [one / other for one, other in pairs if other]
        if not of_rounds or not median(by_contestant[theirs]):
            return None
        return cls(median(by_contestant[ours]) / median(by_contestant[theirs]), of_rounds)

    def holds(self, other: float) -> bool:
        return self.least <= other <= self.most


def _rounds(results: Results) -> int:
    return max((len(each) for found in results.samples.values() for each in found.values()), default=0)


def _reproduced(results: Results, before: Results) -> list[str]:
    """Say which ratios of this run lie within the spread of the run before, and name the others."""
    outside, compared = [], 0
    for figure, by_contestant in results.samples.items():
        first, *others = by_contestant
        for contestant in others:
            then = before.samples.get(figure, {})
            if first in then and contestant in then:
                earlier, now = _Ratio.of(then, first, contestant), _Ratio.of(by_contestant, first, contestant)
                if earlier and now:
                    compared += 1
                    if not earlier.holds(now.median):
                        outside.append(
                            f"| {figure}, by {contestant} | {earlier.median:.3g}"
                            f" | {earlier.least:.3g} to {earlier.most:.3g} | {now.median:.3g} |"
                        )
    lines = [f"Of {compared} ratios {compared - len(outside)} lie within the spread that they had in the run before."]
    if outside:
        lines += ["", "| others | before | its spread | now |", "|---|---:|---:|---:|", *outside]
    return lines


def _kept(results: Results) -> list[str]:
    rows = []
    for figure, ours, theirs, sense, bound in TARGETS:
        found, words = results.samples.get(figure, {}), f"{figure}: {sense} {bound:.3g} times {theirs}"
        ratio = _Ratio.of(found, ours, theirs) if ours in found and theirs in found else None
        rows.append(_row(words, ratio, sense, bound))
    turns = {
        int(match.group(1)): by_contestant[OURS]
        for figure, by_contestant in results.samples.items()
        if (match := re.match(r"CPU ms per turn of (\d+) deltas", figure))
    }
    if len(turns) == LONG_TURNS:
        few, more, most = sorted(turns)
        later = [(b - a) / (most - more) for a, b in zip(turns[more], turns[most], strict=False)]
        first = [(b - a) / (more - few) for a, b in zip(turns[few], turns[more], strict=False)]
        words = f"a delta beyond {more} in an answer of {most}, without pauses: at most {SAME_COST} times one before"
        rows.append(_row(words, _Ratio.of({"later": later, "first": first}, "later", "first"), "at most", SAME_COST))
    silent = results.samples.get("KB per silent stream", {})
    if OURS in silent and BARE in silent:
        above = [ours - bare for ours, bare in zip(silent[OURS], silent[BARE], strict=False)]
        words = f"a silent stream holds at most {MAX_KB_ABOVE_BARE} KB more than the bare run's (here KB)"
        median_above = median(silent[OURS]) - median(silent[BARE])
        rows.append(_row(words, _Ratio(median_above, above), "at most", MAX_KB_ABOVE_BARE))
    return rows


def _row(words: str, ratio: _Ratio | None, sense: str, bound: float) -> str:
    if ratio is None:
        return f"| {words} | | | not measured |"
    holds = operator.ge if sense == "at least" else operator.le
    kept = sum(holds(each, bound) for each in ratio.rounds)
    verdict = "holds" if holds(ratio.median, bound) else "does not hold"
    if 0 < kept < len(ratio.rounds):
        verdict += f", {kept} of {len(ratio.rounds)} rounds do"
    return f"| {words} | {ratio.median:.3g} | {ratio.least:.3g} to {ratio.most:.3g} | {verdict} |"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
