"""The figures for Prometheus: what they count, who may read them, and that several workers' add up."""

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

from clients import Stream
from conftest import probing
from issuer import Issuer
from service import ROOT, Client, eventually, message, process, service
from standin import Call, Fail, Hang, Say, StandIn

Figures = dict[str, float]


def figures(client: Client) -> Figures:
    answer = client.http.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=")
    lines = [line.rpartition(" ") for line in answer.text.splitlines() if line.startswith("chatkit_")]
    return {name: float(value) for name, _, value in lines}


class Since:
    """The figures, less what they were before: a process has them for all that it ever served."""

    def __init__(self, client: Client):
        self._client = client
        self._before = figures(client)

    def __call__(self, name: str) -> float:
        return figures(self._client).get(name, 0) - self._before.get(name, 0)


def test_turns_are_counted_by_how_they_ended(client: Client, model: StandIn) -> None:
    since = Since(client)
    client.create("Hello")
    model.will(Fail(500))
    client.create("Hello")
    client.post("threads.add_user_message", {"thread_id": "thr_0", "input": message("Hello")})
    client.post("threads.list")
    model.will(Say("Hello"), Hang())
    with Stream.create(client.url) as stream:
        stream.read_until(lambda events: any("delta" in str(event) for event in events))
        assert since("chatkit_open_streams") == 1
        stream.reset()
    ended = {"completed": 1, "failed": 1, "refused": 1, "stopped": 1, "timeout": 0}
    for outcome, count in ended.items():
        name = f'chatkit_turns_total{{outcome="{outcome}"}}'
        eventually(lambda name=name, count=count: since(name) == count, what=outcome)
    assert since("chatkit_open_streams") == 0
    assert since("chatkit_time_to_first_token_seconds_count") == 2


def test_the_alerts_in_the_documents_are_on_the_figures_that_there_are(client: Client) -> None:
    alerts = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8").partition("## Watch it")[2]
    shown = re.findall(r"^# TYPE (chatkit_\w+)", client.http.get("/metrics").text, re.MULTILINE)
    assert set(re.findall(r"`(chatkit_\w+)", alerts)) == set(shown)


def test_tokens_and_the_stores_work_are_counted(client: Client, model: StandIn) -> None:
    since = Since(client)
    model.will(Call("look_up", {"word": "x"}))
    client.create("Hello")
    assert since('chatkit_tokens_total{direction="input",model="stand-in"}') >= 14
    assert since('chatkit_tokens_total{direction="output",model="stand-in"}') >= 10
    for kind in ("read", "write"):
        assert since(f'chatkit_store_seconds_count{{kind="{kind}"}}') > 0
        assert since(f'chatkit_store_seconds_sum{{kind="{kind}"}}') > 0


def test_refusals_for_a_quota_are_counted_in_streams_and_out_of_them(tmp_path: Path, model: StandIn) -> None:
    limits = {"TURNS_PER_MINUTE": "1", "MAX_STORAGE_BYTES_PER_USER": "1"}
    with service(**probing(model, tmp_path / "chatkit.db") | limits) as client:
        since = Since(client)
        for _ in range(3):
            client.create("Hello")
        too_much = client.http.post("/attachments", files={"file": ("a.txt", b"abc", "text/plain")})
        assert too_much.status_code == 429
        assert since('chatkit_quota_refusals_total{quota="turns_per_minute"}') == 2
        assert since('chatkit_quota_refusals_total{quota="storage"}') == 1
        assert since('chatkit_turns_total{outcome="refused"}') == 2


def test_fetches_of_the_issuers_keys_are_counted_and_a_login_is_not_asked_for(tmp_path: Path, model: StandIn) -> None:
    with Issuer() as issuer:
        environ = probing(model, tmp_path / "chatkit.db", JWKS_URL=issuer.jwks_url, JWT_ISSUER=issuer.url)
        with service(**environ) as client:
            eventually(lambda: client.http.get("/readyz").status_code == 200)
            assert figures(client)['chatkit_jwks_fetches_total{result="fetched"}'] >= 1
    environ["JWKS_URL"] = "http://127.0.0.1:9/jwks"
    with service(**environ) as client:
        eventually(lambda: figures(client).get('chatkit_jwks_fetches_total{result="failed"}'))


def test_without_login_only_this_machine_reads_them(client: Client) -> None:
    assert client.http.get("/metrics", headers={"host": "evil.example"}).status_code == 403
    assert client.http.get("/metrics", headers={"origin": "http://evil.example"}).status_code == 403


def test_without_the_extra_the_answer_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "prometheus_client.py").write_text("raise ImportError")
    with process(tmp_path, PYTHONPATH=str(tmp_path)) as client:
        client.create("Hello")
        answer = client.http.get("/metrics")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert "chatkit-service[metrics]" in answer.json()["message"]


WORKERS = 4


def test_whichever_worker_is_asked_answers_for_all_and_for_those_that_died(tmp_path: Path, model: StandIn) -> None:
    completed, turns = 'chatkit_turns_total{outcome="completed"}', 3 * WORKERS
    environ = probing(model, tmp_path / "chatkit.db", WORKERS=str(WORKERS), TMPDIR=str(tmp_path))
    with process(tmp_path, **environ) as client:
        eventually(lambda: len(workers_in(tmp_path)) == WORKERS, 90, "the start of all workers")
        with ThreadPoolExecutor(turns) as pool:
            list(pool.map(lambda _: one_turn(client.url), range(turns)))
        eventually(lambda: fresh(client.url).get(completed) == turns, what="the sum")
        assert {fresh(client.url)[completed] for _ in range(5 * WORKERS)} == {turns}
        model.otherwise = [Say("Hello"), Hang()]
        with Stream.create(client.url) as stream:
            stream.read_until(lambda events: any("delta" in str(event) for event in events))
            assert fresh(client.url)["chatkit_open_streams"] == 1
            for worker in workers_in(tmp_path):
                with suppress(ProcessLookupError):  # uvicorn has ended it, on a machine that is busy
                    os.kill(worker, signal.SIGKILL)
                stream.read(0.5)
                if stream.ended:
                    break
        ended = "the end of the dead worker's figure"  # uvicorn starts successors one after the other, and then waits
        eventually(lambda: fresh(client.url)["chatkit_open_streams"] == 0, 30, ended)
        assert fresh(client.url)[completed] == turns
        client.signal(signal.SIGTERM)
        assert client.wait(60) == 0
    assert not list(tmp_path.glob("chatkit-metrics-*"))


def workers_in(folder: Path) -> set[int]:
    """Return the ids of the processes that keep figures in a folder in there."""
    return {int(file.stem.rpartition("_")[2]) for file in folder.glob("chatkit-metrics-*/histogram_*.db")}


def one_turn(url: str) -> None:
    with Stream.create(url) as stream:
        stream.read_to_end()


def fresh(url: str) -> Figures:
    """Return the figures over a connection of its own, which any worker may take."""
    with closing(Client(url)) as client:
        return figures(client)
