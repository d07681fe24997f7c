"""The figures: in each round every figure takes one sample of every contestant that it has.

So they share what the machine does, and a figure's spread has what the machine does during the whole run. A sample of
what is soon done is taken in two halves, around the others': a machine that is slow for a while is it for all.
"""

import asyncio
import json
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

from contestants import BENCH, CORES, MEASURED, PAGE_BYTES, ROOT, Contestant, end, running
from load import Answer, Client, Connection, Script, Upstream, clock, marker

OURS, MEMORY, SQLITE, BARE, WIRE = "ours", "template", "template, sqlite3", "bare run", "wire"
IMPORT = "import"
HISTORY_ITEMS = 21
"""What goes to the model at most, with the new message. An odd number begins with a message of the user's, where the
service would begin anyway."""
TURNS_BEFORE = (HISTORY_ITEMS - 3) // 2
"""That each thread has behind it, beside its first, where the history is to be as long as it gets."""
OF_BEFORE = Script(deltas=1, words=50)
"""The answers of a history: as long as those that are measured, and soon given."""
SETTLING_SECONDS = 0.3


@dataclass
class Results:
    """Samples by figure and contestant."""

    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, figure: str, contestant: str, sample: float) -> None:
        self.samples.setdefault(figure, {}).setdefault(contestant, []).append(sample)


@dataclass
class Sample:
    """What a contestant answered, and what it took."""

    answered: list[Answer] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def cpu_ms_each(self) -> float:
        return self.cpu_seconds / len(self.answered) * 1000


@dataclass(frozen=True)
class Sizes:
    """How much each figure does; the quick form does little of everything."""

    rounds: int = 7
    """By chance alone, the median of seven lies outside the spread of seven others once in 14 times (of five, in 6)."""
    turns: tuple[tuple[int, int, int], ...] = ((1, 2, 20), (32, 2, 2), (256, 1, 2))
    """Clients, how often a sample comes to each contestant, and the turns that each client then takes."""
    long_turns: tuple[tuple[int, int], ...] = ((50, 6), (1000, 1), (10_000, 1))
    """Deltas, and how many such turns each of four clients takes, both times."""
    paced: tuple[int, ...] = (20, 200, 256)
    requests_each: int = 50
    """Of each of eight clients, both times."""
    silent: int = 1000
    writes_each: int = 300
    items: int = 1_000_000
    endurance: int = 20_160


QUICK = Sizes(
    rounds=2,
    turns=((1, 2, 8), (32, 2, 2)),
    long_turns=((50, 3), (1000, 1), (3000, 1)),
    paced=(64,),
    requests_each=7,
    silent=100,
    writes_each=10,
    items=100_000,
    endurance=1600,
)


def hang_up(users: list[Client]) -> None:
    for user in users:
        user.connection.close()


class Bench:
    """The contestants that serve, with as many users each as any figure needs."""

    def __init__(self, sizes: Sizes, results: Results, upstream: Upstream, directory: Path):
        self.sizes = sizes
        self.results = results
        self.upstream = upstream
        self.directory = directory
        self.contestants: dict[str, Contestant] = {}
        self.users: dict[str, list[Client]] = {}
        self.databases = 0
        self.round = 0

    # --- contestants ----------------------------------------------------------------------------------------------

    def start(self, name: str, **more: Any) -> Any:
        """Return the context of a contestant that begins with nothing."""
        self.databases += 1
        environ = {
            "BENCH_DIRECTORY": str(self.directory),
            "BENCH_DATABASE": str(self.directory / f"{self.databases}.db"),
            "BENCH_STREAM": str(self.directory / "stream.sse"),
            "OPENAI_API_KEY": "none",
            "OPENAI_BASE_URL": self.upstream.url,
        }
        if name != OURS:
            arguments = {
                MEMORY: ["template.py", "memory"],
                SQLITE: ["template.py", "sqlite"],
                BARE: ["bare.py"],
                WIRE: ["wire.py"],
            }[name]
            return running(name, [str(BENCH / arguments[0]), *arguments[1:]], environ, **more)
        environ |= {
            "DATABASE_URL": f"sqlite:///{environ['BENCH_DATABASE']}",
            "PORT": "0",
            "HISTORY_ITEMS": str(HISTORY_ITEMS),
            "MAX_TURNS": "0",  # the bench has one user and no mercy
            "TURNS_PER_MINUTE": "0",
            "CONCURRENT_TURNS_PER_USER": "0",
            "LOG_LEVEL": "INFO",
            **more.pop("environ", {}),
        }
        return running(name, [str(ROOT / "app.py")], environ, **more)

    async def open_users(self, contestant: Contestant, users: int) -> list[Client]:
        """Return users with titled threads, of one exchange."""
        self.upstream.script = OF_BEFORE
        if contestant.name == WIRE:
            return [Client(Connection(contestant.port), "") for _ in range(users)]
        opened: list[Client] = []
        for begin in range(0, users, 32):
            opened += await asyncio.gather(
                *[Client.open(contestant.port, OF_BEFORE) for _ in range(begin, min(users, begin + 32))]
            )
        return opened

    async def talk(
        self,
        contestant: Contestant,
        users: int,
        turns_each: int,
        stagger_seconds: float = 0.0,
        items: int = HISTORY_ITEMS,
        first: int = 0,
    ) -> list[Answer]:
        """Have so many users, from the first on, say something so often; what the bare run answers has no times.

        `items` go with the bare run's first message: as many as with the others', of which two come with each turn.
        """
        delays = [place * stagger_seconds / users for place in range(users)]
        markers = [[marker() for _ in range(turns_each)] for _ in range(users)]
        if contestant.name == BARE:
            await contestant.ask({"turns": markers, "items": items, "delays": delays})
            return [Answer(0.0) for texts in markers for _ in texts]
        script = self.upstream.script

        async def one(place: int) -> list[Answer]:
            await asyncio.sleep(delays[place])
            return await self.users[contestant.name][first + place].say_all(markers[place], script)

        answered = await asyncio.gather(*[one(place) for place in range(users)])
        return [each for answers in answered for each in answers]

    async def cost(self, contestant: Contestant, work: Awaitable[list[Answer]], sample: Sample) -> None:
        """Add to the sample what the work returns, the seconds that it takes, and the CPU's, with what follows it."""
        begin, cpu = clock(), contestant.cpu_seconds()
        sample.answered += await work
        sample.seconds += clock() - begin
        await asyncio.sleep(SETTLING_SECONDS)
        sample.cpu_seconds += contestant.cpu_seconds() - cpu

    async def prepare(self, names: list[str], stack: AsyncExitStack) -> None:
        """Start the contestants, give their users threads with a history, and warm them up."""
        users = max(*self.sizes.paced, *[clients for clients, _, _ in self.sizes.turns])
        for number, name in enumerate(names, 1):
            print(f"bench: preparing {name}, {number} of {len(names)}, for {users} clients …", flush=True)
            if name == WIRE:
                await self._record_stream()
            contestant = await stack.enter_async_context(self.start(name))
            self.contestants[name] = contestant
            if name != BARE:
                self.users[name] = await self.open_users(contestant, users)
            if name not in (BARE, WIRE):
                for begin in range(0, users, 32):
                    group = self.users[name][begin : begin + 32]
                    await asyncio.gather(*[user.say_all([marker()] * TURNS_BEFORE, OF_BEFORE) for user in group])
            self.upstream.script = Script()
            await self.talk(contestant, min(users, 16), 2)

    async def _record_stream(self) -> None:
        """Keep the bytes of the template's answer for the wire."""
        self.upstream.script = Script()
        answer = await self.users[MEMORY][0].say(marker(), self.upstream.script)
        events = [line for line in bytes(answer.body).split(b"\r\n") if line.startswith(b"data: ")]
        (self.directory / "stream.sse").write_bytes(b"".join(events))

    def in_turn(self, *names: str) -> list[str]:
        """Return them in an order of its own in each round; the first has that of the table."""
        return random.Random(self.round).sample(names, len(names)) if self.round else list(names)

    def there_and_back(self, *names: str, times: int = 2) -> list[str]:
        """Return them in the round's order, and where they come a second time once more in the opposite one."""
        order = self.in_turn(*names)
        return order + order[::-1] if times == 2 else order

    # --- turns ----------------------------------------------------------------------------------------------------

    async def turns(self) -> None:
        self.upstream.script = Script()
        for users, times, turns_each in self.sizes.turns:
            samples = defaultdict[str, Sample](Sample)
            for name in self.there_and_back(OURS, MEMORY, SQLITE, BARE, WIRE, times=times):
                contestant = self.contestants[name]
                each = 10 * turns_each if name == WIRE else turns_each  # or it were a few ticks of its clock
                await self.talk(contestant, min(users, 8), 1)  # it may have waited for minutes
                await self.cost(contestant, self.talk(contestant, users, each), samples[name])
            for name, sample in samples.items():
                answered = sample.answered
                self.results.add(f"turns a second, {users} clients", name, len(answered) / sample.seconds)
                self.results.add(f"CPU ms per turn, {users} clients", name, sample.cpu_ms_each)
                self._add_pieces(f"{users} clients", name, answered)
                if users == 1 and name != BARE:
                    waits = [answer.first_delta_at - answer.asked_at for answer in answered]
                    self.results.add("ms to the first delta, 1 client, p50", name, median(waits) * 1000)

    async def long_turns(self) -> None:
        """In threads of their own, so that no long answer is part of another one's cost."""
        longest = self.sizes.long_turns[-1][0]  # which says what a delta costs as an answer grows
        for deltas, turns_each in self.sizes.long_turns:
            samples = defaultdict[str, Sample](Sample)
            for name in self.there_and_back(*([OURS] if deltas == longest else [OURS, MEMORY, BARE])):
                contestant, kept = self.contestants[name], self.users.get(name, [])
                if name != BARE:
                    self.users[name] = await self.open_users(contestant, 4)
                self.upstream.script = Script(deltas=deltas)
                await self.cost(contestant, self.talk(contestant, 4, turns_each, items=3), samples[name])
                if name != BARE:
                    hang_up(self.users[name])
                    self.users[name] = kept
            for name, sample in samples.items():
                load = f"{deltas} deltas, 4 clients"
                self.results.add(f"CPU ms per turn of {load}", name, sample.cpu_ms_each)
                self._add_pieces(load, name, sample.answered)

    async def paced(self) -> None:
        """Streams of 20 deltas a second: each user says two things, and the first is not counted."""
        self.upstream.script = script = Script(gap_seconds=0.05)
        for users in self.sizes.paced:
            for name in self.in_turn(OURS, MEMORY, BARE):
                contestant, sample = self.contestants[name], Sample()
                await self.cost(contestant, self.talk(contestant, users, 2, stagger_seconds=2.5), sample)
                counted = sample.answered[1::2]
                load = f"{users} streams of 20 deltas/s"
                self.results.add(f"CPU ms per turn, {load}", name, sample.cpu_ms_each)
                if name == BARE:
                    continue
                waits = [answer.first_delta_at - answer.asked_at for answer in counted]
                self._add_waits(f"to the first delta, {load}", name, waits)
                lasted = script.deltas * script.gap_seconds
                late = [answer.ended_at - answer.asked_at - lasted for answer in counted]
                self._add_waits(f"added to a whole answer, {load}", name, late)
                self._add_pieces(load, name, sample.answered)

    def _add_pieces(self, load: str, name: str, answered: list[Answer]) -> None:
        """In how many pieces an answer's text came: a process that is behind may join them."""
        if name not in (BARE, WIRE):
            pieces = sum(answer.pieces for answer in answered) / len(answered)
            self.results.add(f"pieces of an answer, {load}", name, pieces)

    def _add_waits(self, what: str, name: str, waits: list[float]) -> None:
        """The stand-in waits for nothing but its pauses, so that all time beside them was added to it."""
        waits = sorted(waits)
        self.results.add(f"ms {what}, p50", name, waits[len(waits) // 2] * 1000)
        self.results.add(f"ms {what}, p99", name, waits[len(waits) * 99 // 100] * 1000)

    # --- requests that do not stream ------------------------------------------------------------------------------

    async def requests(self) -> None:
        for operation in ("threads.list", "threads.get_by_id", "threads.update"):
            samples = defaultdict[str, Sample](Sample)
            for name in self.there_and_back(OURS, MEMORY, SQLITE):
                asking = self._ask(self.users[name][:8], operation)
                await self.cost(self.contestants[name], asking, samples[name])
            for name, sample in samples.items():
                self.results.add(f"{operation} a second", name, len(sample.answered) / sample.seconds)
                self.results.add(f"CPU ms per {operation}", name, sample.cpu_ms_each)

    async def _ask(self, users: list[Client], operation: str) -> list[Answer]:
        """Have users send so many requests each."""

        async def one(user: Client) -> Answer:
            if operation == "threads.update":
                return await user.rename(marker())  # another one each time, or there is nothing to store
            params = {} if operation == "threads.list" else {"thread_id": user.thread_id}
            answer = await user.connection.send(operation, params)
            created = 20 if operation == "threads.list" else 21  # a page of threads; a thread and a page of items
            assert answer.body.count(b'"created_at"') == created, f"half a page: {answer.body.decode()}"
            return answer

        async def all_of(user: Client) -> list[Answer]:
            return [await one(user) for _ in range(self.sizes.requests_each)]

        answered = await asyncio.gather(*map(all_of, users))
        return [each for answers in answered for each in answers]

    # --- memory, start, workers -----------------------------------------------------------------------------------

    async def silent(self) -> None:
        """Memory per stream that is open and says nothing: what the second half of them adds to the first.

        So nothing counts that a process takes once for all its streams, or had not thrown away yet.
        """
        for name in self.in_turn(OURS, MEMORY, BARE):  # threads of one exchange, and the new message
            async with self.start(name) as contestant:
                kept, self.users[name] = self.users.get(name, []), []
                try:
                    await self._fall_silent(contestant)
                finally:
                    hang_up(self.users[name])
                    contestant.process.kill()
                    self.users[name] = kept

    async def _fall_silent(self, contestant: Contestant) -> None:
        name, silent = contestant.name, self.sizes.silent
        if name == BARE:  # as many turns as the others have had when their users have come
            self.upstream.script = OF_BEFORE
            for _ in range(silent // 32):
                await self.talk(contestant, 32, 1, items=1)
        else:
            self.users[name] = await self.open_users(contestant, silent)
        self.upstream.script = Script()
        await self.talk(contestant, 32, 2, items=3)
        hang_up(self.users[name])
        await asyncio.sleep(1)
        self.upstream.script = Script(hangs=True)
        half, talking, held = silent // 2, set[asyncio.Task[Any]](), list[int]()
        try:
            for first in (0, half):
                answers = self.upstream.answers
                talking.add(asyncio.create_task(self.talk(contestant, half, 1, items=3, first=first)))
                while self.upstream.answers < answers + half or not self._all_are_answering(name, first + half):
                    assert not any(each.done() for each in talking), talking
                    await asyncio.sleep(0.05)
                await asyncio.sleep(2)  # for what follows the first delta: checkpoints are written each half second
                assert not any(each.done() for each in talking), talking
                held.append(contestant.memory_bytes())
            assert self._all_are_answering(name, 2 * half)
        finally:
            for each in talking:
                each.cancel()
            await asyncio.wait(talking)
        self.results.add("KB per silent stream", name, (held[1] - held[0]) / half / 1000)
        self.results.add(f"MB with {silent} silent streams", name, held[1] / 1e6)

    def _all_are_answering(self, name: str, users: int) -> bool:
        return all(user.connection.is_answering for user in self.users[name][:users])

    async def start_up(self) -> None:
        """From the process's start to its first whole answer; what it holds after that, and while nobody has asked."""
        for name in (OURS, MEMORY, IMPORT):  # once uncounted: what was read minutes ago may be out of memory again
            await self._start_up(name)
        samples = defaultdict[str, list[tuple[float, ...]]](list)
        for name in self.there_and_back(OURS, MEMORY, IMPORT):
            samples[name].append(await self._start_up(name))
        figures = ("ms from start to first answer", "memory after the first answer, MB", "idle memory, MB")
        for name, both in samples.items():
            for figure, values in zip(figures, zip(*both, strict=True), strict=True):
                self.results.add(figure, name, mean(values))

    async def _start_up(self, name: str) -> tuple[float, ...]:
        """Return a sample of each figure; the process that only imports is one at all times."""
        if name == IMPORT:
            imported = await self.direct(program="imported.py")
            megabytes = imported["pages"] * PAGE_BYTES / 1e6
            return imported["seconds"] * 1000, megabytes, megabytes
        self.upstream.script = Script(deltas=1)
        begin = clock()
        async with self.start(name) as contestant:
            client = await Client.open(contestant.port, self.upstream.script)
            milliseconds = (clock() - begin) * 1000
            await asyncio.sleep(1)
            answered = contestant.resident_bytes() / 1e6
            client.connection.close()
        async with self.start(name) as contestant:
            await asyncio.sleep(2)  # so that it has started, whatever it does behind the scenes
            return milliseconds, answered, contestant.resident_bytes() / 1e6

    async def workers(self) -> None:
        """One process and two, on all cores."""
        for name in self.in_turn("2 workers", "1 worker"):
            async with self.start(OURS, environ={"WORKERS": name[0]}, cores=CORES) as contestant:
                kept = self.users.get(OURS, [])
                self.users[OURS] = await self.open_users(contestant, 32)
                self.upstream.script = Script()
                await self.talk(contestant, 32, 1)
                begin = clock()
                answered = await self.talk(contestant, 32, 4)
                self.results.add(
                    "turns a second, all cores, which the load uses too", name, len(answered) / (clock() - begin)
                )
                self.users[OURS] = kept

    async def endurance(self) -> None:
        """What the process holds while it answers so many turns that a leak would show; not part of a full run."""
        async with self.start(OURS) as contestant:
            self.users[OURS] = await self.open_users(contestant, 32)
            self.upstream.script = Script()
            tenth = self.sizes.endurance // 10 // 32 * 32
            for turns in range(tenth, 10 * tenth + 1, tenth):
                await self.talk(contestant, 32, tenth // 32)
                megabytes = contestant.resident_bytes() / 1e6
                self.results.add("MB resident after turns", f"{turns} turns", megabytes)
                print(f"bench: {megabytes:.0f} MB after {turns} turns", flush=True)

    # --- without HTTP ---------------------------------------------------------------------------------------------

    async def direct(self, *arguments: object, program: str = "direct.py") -> dict[str, float]:
        """Return what the program prints, with the `seconds` until it did."""
        begin = clock()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(BENCH / program),
            *map(str, arguments),
            stdout=asyncio.subprocess.PIPE,
            preexec_fn=lambda: os.sched_setaffinity(0, [MEASURED]),
            process_group=0,
        )
        try:
            assert process.stdout
            line = await process.stdout.readline()
            seconds = clock() - begin
            assert await process.wait() == 0, f"{program} {arguments} failed"
        finally:
            await end(process)
        return {**(json.loads(line) or {}), "seconds": seconds}

    async def store(self) -> None:
        few, many = 1000, self.sizes.items
        for items in (few, many):
            if not (built := self.directory / f"{items}.db").exists():
                await self.direct("build", built, items)
        disk = await self.direct("disk", self.directory / "disk")
        self.results.add("ms until 4 KB are on the disk", "fsync", disk["milliseconds"])
        wrote = await self.direct("writes", self.directory / "writes.db", self.sizes.writes_each)
        for kind, name in (("together", OURS), ("each", "a commit each")):
            self.results.add("durable writes a second, 64 writers", name, wrote[kind])
            self.results.add("ms for a durable write, 64 writers, p99", name, wrote[f"{kind}_p99"])
        read = await self.direct("page", self.directory, many, few)
        for items in (many, few):
            self.results.add("CPU µs per page of 20 items", f"{items} items", read[str(items)])
        verified = await self.direct("tokens")
        for algorithm in ("EdDSA", "ES256", "RS256"):
            name = f"CPU µs per token, {algorithm}"
            self.results.add(name, OURS, verified[algorithm])
            if f"{algorithm} jose" in verified:
                self.results.add(name, "python-jose", verified[f"{algorithm} jose"])


GROUPS = {
    "turns": (Bench.turns, [OURS, MEMORY, SQLITE, BARE, WIRE]),
    "long": (Bench.long_turns, [OURS, MEMORY, BARE]),
    "paced": (Bench.paced, [OURS, MEMORY, BARE]),
    "requests": (Bench.requests, [OURS, MEMORY, SQLITE]),
    "silent": (Bench.silent, []),
    "start": (Bench.start_up, []),
    "workers": (Bench.workers, []),
    "store": (Bench.store, []),
    "endurance": (Bench.endurance, []),
}
"""What `--only` names: the figures, and the contestants that they need running."""

ALONE = {"endurance"}
"""What takes too long for a full run, and has no rounds."""


@asynccontextmanager
async def prepared(bench: Bench, groups: list[str]) -> AsyncIterator[None]:
    needed = [name for name in (OURS, MEMORY, SQLITE, BARE, WIRE) if any(name in GROUPS[group][1] for group in groups)]
    async with AsyncExitStack() as stack:
        if needed:
            begin = time.monotonic()
            await bench.prepare(needed, stack)
            print(f"bench: prepared in {time.monotonic() - begin:.0f} s", flush=True)
        yield
        for users in bench.users.values():
            hang_up(users)
