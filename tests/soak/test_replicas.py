"""Two services on one PostgreSQL behind a real nginx: one is killed, the database goes, everybody wants one thread."""

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2
import pytest
from test_kills import Witness, assert_all_is_kept_and_goes_on

from conftest import LONG, probing
from databases import PostgresDatabase
from nginx import nginx
from postgres_server import PostgresServer
from service import (
    Client,
    Process,
    errors_of,
    eventually,
    fold,
    free_port,
    message,
    process,
    text_of,
    thread_of,
)
from standin import Echo, StandIn
from test_faults import say

TURNS = 300 if LONG else 40
TURNS_A_KILL = 20


class Replicas:
    """Two services and the proxy before them, at `url`."""

    def __init__(self, folder: Path, environ: dict[str, str]):
        self.ports = [free_port(), free_port()]
        self.url = ""
        self._folders = [folder / "one", folder / "other"]
        self._environ = environ
        for each in self._folders:
            each.mkdir()

    @contextmanager
    def run(self, number: int) -> Iterator[Process]:
        with process(self._folders[number], **self._environ, PORT=str(self.ports[number])) as running:
            yield running

    @contextmanager
    def behind_nginx(self, folder: Path) -> Iterator[None]:
        with nginx(folder, self.ports) as self.url:
            yield

    def log(self) -> str:
        return "".join((folder / "service.log").read_text(encoding="utf-8") for folder in self._folders)


@pytest.fixture
def environ(model: StandIn, postgres: PostgresDatabase) -> dict[str, str]:
    return probing(model, **postgres.environ)


@pytest.fixture
def replicas(tmp_path: Path, environ: dict[str, str]) -> Replicas:
    """Neither of them runs yet."""
    return Replicas(tmp_path, environ)


def test_a_replica_that_is_killed_takes_nothing_with_it_that_was_seen_and_disturbs_no_other(
    replicas: Replicas, model: StandIn, postgres: PostgresDatabase, tmp_path: Path
) -> None:
    model.otherwise = [Echo(gap=0.03)]
    witness, over, kills = Witness(random.Random(), doomed=f":{replicas.ports[1]}"), threading.Event(), 0
    with ExitStack() as stack:
        stays = stack.enter_context(replicas.run(0))
        restarted = stack.enter_context(replicas.run(1))
        stack.enter_context(replicas.behind_nginx(tmp_path))
        loading = witness.load(replicas.url, over, clients=8)
        while len(witness.streams) < TURNS or (witness.open_texts == 0 and kills < 3 * TURNS // TURNS_A_KILL):
            enough = min(len(witness.streams) + TURNS_A_KILL, max(len(witness.streams), TURNS))
            eventually(lambda enough=enough: len(witness.streams) >= enough, 120, "so many turns")
            witness.answering.clear()
            assert witness.answering.wait(120)  # nginx gives a replica that failed nothing for 10 s
            witness.killed_at = time.monotonic()
            restarted.kill()
            kills += 1
            restarted = stack.enter_context(replicas.run(1))
            witness.killed_at = float("inf")
        over.set()
        for each in loading:
            each.join()
        of_the_other = [each for each in witness.streams if each.header("x-replica").endswith(str(replicas.ports[0]))]
        broken = [each for each in witness.streams if each.status == 200 and not each.is_whole]
        kept = assert_all_is_kept_and_goes_on(Client(replicas.url), postgres, witness)
        for each in witness.streams:
            if each.status == 200 and each.is_whole:
                assert errors_of(each.seen) == []
                stored = {item["id"]: item for item in stays.items(thread_of(each.seen))}
                assert all(stored.get(item["id"]) == item for item in fold(each.seen))
    assert all(
        each.status == 409 or (each.status == 200 and each.is_whole) for each in of_the_other
    )  # 409: it was busy
    assert witness.refused == []
    assert Counter(each.status for each in witness.streams).keys() <= {0, 200, 409, 502, 504}
    print(
        f"\n{len(witness.streams)} turns, {len(of_the_other)} of the replica that stayed, {kills} kills of the other,"
        f" {len(broken)} answers broken off; {kept}"
    )


def test_a_database_that_was_away_costs_errors_meanwhile_and_none_afterwards(
    replicas: Replicas, model: StandIn, running_postgres: PostgresServer, tmp_path: Path
) -> None:
    model.otherwise = [Echo(gap=0.01)]
    over = threading.Event()
    outcomes: list[tuple[float, float, str]] = []

    def load() -> None:
        with httpx2.Client(base_url=replicas.url, timeout=60, trust_env=False) as client:
            while not over.is_set():
                began = time.monotonic()
                body = {"type": "threads.create", "params": {"input": message("One word and another")}}
                response = client.post("/chatkit", json=body)
                well = response.status_code == 200 and '"type":"error"' not in response.text
                outcomes.append((began, time.monotonic(), "well" if well else f"{response.status_code}"))
                time.sleep(0 if well else 0.05)

    with ExitStack() as stack:
        for number in range(2):
            stack.enter_context(replicas.run(number))
        stack.enter_context(replicas.behind_nginx(tmp_path))
        client = Client(replicas.url)
        before = thread_of(client.create("Before"))
        loading = [threading.Thread(target=load) for _ in range(6)]
        for each in loading:
            each.start()
        eventually(lambda: len(outcomes) > 12, 60, "some answers")
        running_postgres.stop("immediate")
        stopped = time.monotonic()
        try:
            eventually(lambda: any(began > stopped and how != "well" for began, _, how in outcomes), 30, "an error")
        finally:
            running_postgres.start()
        back = time.monotonic()
        eventually(lambda: sum(began > back + 2 and how == "well" for began, _, how in outcomes) > 30, 60, "answers")
        over.set()
        for each in loading:
            each.join()
        while (response := say(client, before, "And after")).status_code == 409:
            assert time.monotonic() < back + 30
        assert text_of(client.items(before)[-1]) == "And after"
    meanwhile = Counter(how for began, _, how in outcomes if stopped < began < back)
    late = [how for began, _, how in outcomes if began > back + 2 and how != "well"]
    slowest = max(ended - began for began, ended, _ in outcomes)
    print(
        f"\nwhile it was away for {back - stopped:.1f} s: {dict(meanwhile)}; afterwards none of "
        f"{sum(began > back + 2 for began, _, _ in outcomes)} failed; the slowest took {slowest:.1f} s"
    )
    assert late == []
    assert set(meanwhile) <= {"well", "200", "503"}
    assert response.status_code == 200


def test_messages_for_one_thread_at_the_same_moment_are_answered_one_after_the_other_or_refused(
    replicas: Replicas, model: StandIn, tmp_path: Path
) -> None:
    model.otherwise = [Echo(gap=0.01)]
    with ExitStack() as stack, ThreadPoolExecutor(6) as pool:
        two = [stack.enter_context(replicas.run(number)) for number in range(2)]
        thread_id = thread_of(two[0].create("The first words"))
        said, refused = ["The first words"], 0
        for number in range(TURNS // 6):
            words = [f"round {number} client {each}" for each in range(6)]
            answers = list(pool.map(say, two * 3, [thread_id] * 6, words))
            for text, answer in zip(words, answers, strict=True):
                if answer.status_code == 200:
                    said.append(text)
                else:
                    refused += 1
                    assert (answer.status_code, answer.json()["code"]) == (409, "thread_busy")
        items = two[1].items(thread_id)
    texts = [text_of(item) for item in items]
    assert texts[::2] == texts[1::2], "an answer is not where its question is"
    assert sorted(texts[::2]) == sorted(said)
    print(f"\n{len(said) - 1} answered one after the other, {refused} refused")


@pytest.mark.parametrize("quota", ["TURNS_PER_MINUTE", "CONCURRENT_TURNS_PER_USER"])
def test_quotas_hold_across_replicas_to_within_one_turn(
    replicas: Replicas, environ: dict[str, str], model: StandIn, tmp_path: Path, quota: str
) -> None:
    environ[quota] = "10"
    model.otherwise = [Echo(gap=1)]
    with ExitStack() as stack, ThreadPoolExecutor(24) as pool:
        for number in range(2):
            stack.enter_context(replicas.run(number))
        stack.enter_context(replicas.behind_nginx(tmp_path))
        answers = list(pool.map(lambda n: Client(replicas.url).create(f"Number {n}"), range(24)))
    answered = sum(not errors_of(events) for events in answers)
    print(f"\n{answered} of 24 answered, where {quota} is 10")
    assert answered in (10, 11)
