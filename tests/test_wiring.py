"""What the settings and the command line promise reaches what it is about."""

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from conftest import probing
from provider import open_upstream
from service import ROOT, Client, errors_of, message, process, run, service
from standin import Hang, StandIn

FILE = {"name": "a.txt", "size": 1, "mime_type": "text/plain"}


def test_a_stream_is_neither_kept_nor_changed_on_its_way(client: Client) -> None:
    response = client.post("threads.create", {"input": message("Hello")})
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["cache-control"] == "no-cache, no-transform"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers


@pytest.mark.parametrize(
    ("quota", "words"),
    [
        ({"TURNS_PER_MINUTE": "1"}, "too many messages in a minute"),
        ({"TOKENS_PER_DAY": "1"}, "what you may use in a day"),
        ({"CONCURRENT_TURNS_PER_USER": "1"}, "Too many answers are being written"),
        ({"MAX_TURNS": "1"}, "The service is busy"),
    ],
)
def test_each_quota_of_the_settings_is_kept(tmp_path: Path, model: StandIn, quota: dict[str, str], words: str) -> None:
    with service(**probing(model, tmp_path / "chatkit.db", **quota)) as client:
        counted_at_the_end = quota.keys() <= {"TURNS_PER_MINUTE", "TOKENS_PER_DAY"}
        with nothing() if counted_at_the_end else hanging(client, model):
            if counted_at_the_end:
                assert not errors_of(client.create("First"))
            [error] = errors_of(client.create("Second"))
    assert words in error["message"]


@contextmanager
def nothing() -> Iterator[None]:
    yield


@contextmanager
def hanging(client: Client, model: StandIn) -> Iterator[None]:
    model.will(Hang())
    with client.streaming("threads.create", {"input": message("Hang")}) as events:
        next(events)
        yield


@pytest.mark.anyio
async def test_there_is_a_connection_to_the_model_for_every_turn() -> None:
    async with open_upstream(
        api_key="k", base_url=None, default_model=None, api="responses", max_connections=1234, timeout_seconds=1
    ) as upstream:
        assert upstream.client is not None
        transport = upstream.client._client._transport
        assert isinstance(transport, httpx2.AsyncHTTPTransport)
        assert transport._pool._max_connections == 1234


def test_links_and_headers_are_those_of_the_proxy_that_is_believed(tmp_path: Path) -> None:
    forwarded = {"x-forwarded-proto": "https"}
    with process(tmp_path, ROOT_PATH="/chat/") as behind:
        behind.http.headers.update(forwarded)
        response = behind.post("attachments.create", FILE)
        address = behind.url.removeprefix("http://")
        assert response.json()["upload_descriptor"]["url"].startswith(f"https://{address}/chat/attachments/")
        assert "server" not in response.headers
    with process(tmp_path, FORWARDED_ALLOW_IPS="10.0.0.1") as other:
        other.http.headers.update(forwarded)
        link = other.ask("attachments.create", FILE)["upload_descriptor"]["url"]
        assert link.startswith(f"{other.url}/attachments/")


def test_every_command_is_listed_and_explains_itself(tmp_path: Path) -> None:
    def words(*arguments: str) -> str:
        return run(tmp_path, *arguments, "--help").stdout

    listed = re.findall(r"^    ([a-z-]+)\s+(\S.+)", words(), re.MULTILINE)
    added = re.findall(r'\badd\(\s*"([a-z-]+)"', (ROOT / "commands.py").read_text(encoding="utf-8"))
    assert [name for name, _ in listed] == added
    for name, first_words in listed:
        assert f"usage: app.py {name}" in words(name)
        assert first_words in words(name)


def test_the_limit_of_open_files_is_raised_from_a_low_one(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        with process(tmp_path) as running:
            [line] = re.findall(r"Max open files +(\d+)", Path(f"/proc/{running.process.pid}/limits").read_text())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert int(line) == min(hard, 65536)
