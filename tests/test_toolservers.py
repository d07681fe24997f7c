"""The tools of a real MCP server: listed, called through the agent, left out while it is down, and back by itself."""

import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import httpx2
import pytest
from agents import Agent
from chatkit.types import ThreadMetadata

from conftest import probing
from context import RequestContext
from history import RecordingContext
from issuer import Issuer
from service import Client, InProcess, errors_of, eventually, fold, free_port, message, run, service, text_of, thread_of
from standin import Call, Say, StandIn
from toolservers import with_tools_of

SERVER = Path(__file__).with_name("toolserver.py")


class ToolServerProcess:
    """The server as a process that can be killed and started again on the same port."""

    def __init__(self, port: int, mute: str | None = None):
        self.port = port
        self._arguments = [str(port), *([mute] if mute else [])]
        self.url = f"http://127.0.0.1:{port}/mcp"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen([sys.executable, str(SERVER), *self._arguments], stderr=subprocess.DEVNULL)
        eventually(self._is_up, 30, "the start of the tool server")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _is_up(self) -> bool:
        try:
            httpx2.get(self.url, trust_env=False)
        except httpx2.TransportError:
            return False
        return True


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture
def tools(port: int) -> Iterator[ToolServerProcess]:
    with ToolServerProcess(port) as server:
        yield server


@pytest.fixture
def client(tmp_path: Path, model: StandIn, port: int) -> Iterator[InProcess]:
    environ = probing(model, tmp_path / "chatkit.db", MCP_SERVER_URL=f"http://127.0.0.1:{port}/mcp")
    with service(**environ) as client:
        yield client


def until_the_call(events: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Read until a tool's call is shown; return all that was."""
    seen: list[dict[str, Any]] = []
    while "workflow" not in str(seen[-1:]):
        seen.append(next(events))
    return seen


def is_degraded(client: Client) -> bool:
    response = client.http.get("/readyz")
    assert response.status_code == 200
    return response.json()["status"] == "degraded"


def tool_names(model: StandIn) -> set[str]:
    """Return the tools that the model was offered last."""
    return {tool["name"] for tool in model.asked[-1].body.get("tools", [])}


def result_of_last_call(model: StandIn) -> str:
    return str(
        [item["output"] for item in model.asked[-1].body["input"] if item.get("type") == "function_call_output"][-1]
    )


def test_a_servers_tools_are_called_shown_as_tasks_and_remembered(
    tools: ToolServerProcess, client: Client, model: StandIn
) -> None:
    model.will(Call("add", {"a": 20, "b": 22}))
    model.will(Say("It is 42."))
    events = client.create("Add them")
    assert not errors_of(events)
    assert "42" in result_of_last_call(model)
    assert [item["type"] for item in fold(events)] == ["user_message", "workflow", "assistant_message"]
    [task] = fold(events)[1]["workflow"]["tasks"]
    assert (task["title"], task["status_indicator"]) == ("add", "complete")
    assert client.items(thread_of(events)) == fold(events)
    client.say(thread_of(events), "And what was it?")
    assert "42" in result_of_last_call(model)


def test_of_a_long_result_the_beginning_is_remembered(tools: ToolServerProcess, client: Client, model: StandIn) -> None:
    model.will(Call("recite"))
    thread = thread_of(client.create("Recite"))
    assert "x" * 150_000 in result_of_last_call(model)
    client.say(thread, "And what was it?")
    assert result_of_last_call(model) == "x" * 100_000 + "\n[… 50000 more characters]"


def test_tools_that_two_servers_name_alike_are_told_apart(
    tmp_path: Path, tools: ToolServerProcess, model: StandIn
) -> None:
    second = ToolServerProcess(free_port())
    urls = f"{tools.url},{second.url}"
    with second, service(**probing(model, tmp_path / "chatkit.db", MCP_SERVER_URL=urls)) as client:
        assert not errors_of(client.create("Hello"))
        named = sorted(name for name in tool_names(model) if "add" in name)
        assert named == sorted(f"mcp_127_0_0_1_{each.port}__add" for each in (tools, second))
        model.will(Call(named[1], {"a": 20, "b": 22}))
        client.create("Add them")
        assert "42" in result_of_last_call(model)


def test_the_server_is_told_who_asks_and_no_token(tools: ToolServerProcess, client: Client, model: StandIn) -> None:
    model.will(Call("who_asks"))
    client.create("Who am I?")
    assert "local with no token" in result_of_last_call(model)


def test_each_user_s_token_is_forwarded_in_a_session_of_its_own(
    tmp_path: Path, tools: ToolServerProcess, model: StandIn
) -> None:
    with Issuer() as issuer:
        environ = probing(
            model,
            tmp_path / "chatkit.db",
            MCP_SERVER_URL=tools.url,
            MCP_FORWARD_AUTH="1",
            JWKS_URL=issuer.jwks_url,
            JWT_ISSUER=issuer.url,
        )
        with service(**environ) as guarded:
            for user in ("alice", "bob", "alice"):
                token = issuer.token(claims={"sub": user})
                client = Client(guarded.url, {"authorization": f"Bearer {token}"})
                eventually(lambda client=client: client.post("threads.list").status_code == 200)
                model.will(Call("who_asks"))
                assert not errors_of(client.create("Who am I?"))
                assert f"{user} with Bearer {token}" in result_of_last_call(model)


def test_a_server_that_is_down_costs_five_seconds_once_is_left_out_and_comes_back(
    tmp_path: Path, client: Client, model: StandIn, port: int
) -> None:
    began = time.monotonic()
    assert not errors_of(client.create("Hello"))
    assert time.monotonic() - began < 8
    assert "add" not in tool_names(model)
    assert is_degraded(client)
    began = time.monotonic()
    client.create("Hello again")
    assert time.monotonic() - began < 3
    with ToolServerProcess(port):
        eventually(lambda: not is_degraded(client), 30)
        client.create("Hello once more")
        assert "add" in tool_names(model)


def test_a_server_that_is_down_is_named_without_what_may_be_secret_in_its_address(
    tmp_path: Path, model: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    address = "http://secret:secret@127.0.0.1:9/secret/mcp?key=secret"
    with service(**probing(model, tmp_path / "chatkit.db", MCP_SERVER_URL=address)) as client:
        client.create("Hello")
        assert client.http.get("/readyz").json() == {"status": "degraded", "tool_servers": ["127.0.0.1:9"]}
    assert "127.0.0.1:9 does not answer" in caplog.text
    assert "secret" not in caplog.text


def test_a_server_that_connects_but_does_not_list_its_tools_is_left_out(
    tmp_path: Path, model: StandIn, port: int
) -> None:
    muted = ToolServerProcess(port, mute="tools/list")
    with muted, service(**probing(model, tmp_path / "chatkit.db", MCP_SERVER_URL=muted.url)) as client:
        for _ in range(2):
            assert not errors_of(client.create("Hello"))
            assert is_degraded(client)
        muted.kill()
        with ToolServerProcess(port):
            eventually(lambda: not is_degraded(client), 30)
            client.create("Hello once more")
            assert "add" in tool_names(model)


def test_a_slow_server_that_would_get_the_users_token_holds_up_one_turn(
    tmp_path: Path, model: StandIn, port: int
) -> None:
    forwarding = {"MCP_SERVER_URL": f"http://127.0.0.1:{port}/mcp", "MCP_FORWARD_AUTH": "1"}
    with Issuer() as issuer, ToolServerProcess(port, mute="tools/list"):
        login = {"JWKS_URL": issuer.jwks_url, "JWT_ISSUER": issuer.url}
        with service(**probing(model, tmp_path / "chatkit.db", **forwarding, **login)) as guarded:
            client = Client(guarded.url, {"authorization": f"Bearer {issuer.token(claims={'sub': 'alice'})}"})
            eventually(lambda: client.post("threads.list").status_code == 200)
            assert not errors_of(client.create("Hello"))
            assert is_degraded(client)
            began = time.monotonic()
            assert not errors_of(client.create("Hello again"))
            assert time.monotonic() - began < 3


def test_a_server_that_dies_in_a_call_ends_the_turn_with_words_and_is_used_again_when_it_is_back(
    client: Client, model: StandIn, port: int
) -> None:
    tools = ToolServerProcess(port)
    tools.start()
    try:
        eventually(lambda: not is_degraded(client), 30)
        model.will(Call("sleep"))
        with client.streaming("threads.create", {"input": message("Sleep")}) as events:
            seen = until_the_call(events)
            tools.kill()
            seen += list(events)
        [error] = errors_of(seen)
        assert "tool" in error["message"]
        assert error["allow_retry"]
        tools.start()
        eventually(lambda: not is_degraded(client), 30)
        model.will(Call("add", {"a": 1, "b": 1}))
        model.will(Say("Two."))
        events = client.say(thread_of(seen), "Add one and one")
        assert not errors_of(events)
        assert text_of(fold(events)[-1]) == "Two."
    finally:
        tools.kill()


@pytest.mark.parametrize(
    ("call", "told"),
    [(Call("decline"), "not today"), (Call("add", {"a": 1}), "missing required parameters: b")],
    ids=["an error of the protocol", "an argument left out"],
)
def test_the_model_is_told_why_its_call_failed_and_goes_on(
    tools: ToolServerProcess, client: Client, model: StandIn, call: Call, told: str
) -> None:
    eventually(lambda: not is_degraded(client), 30)
    model.will(call)
    model.will(Say("I was told."))
    events = client.create("Fail")
    assert not errors_of(events)
    assert told in result_of_last_call(model)
    assert text_of(fold(events)[-1]) == "I was told."


@pytest.mark.parametrize("call", [Call("decline"), Call("add", {"a": 1})], ids=str)
def test_a_call_that_fails_on_its_own_account_disturbs_nobody_elses(
    tools: ToolServerProcess, client: Client, model: StandIn, call: Call
) -> None:
    eventually(lambda: not is_degraded(client), 30)
    model.will(Call("nap"))
    with client.streaming("threads.create", {"input": message("Take a nap")}) as events:
        seen = until_the_call(events)
        model.will(call)
        client.create("Fail")
        seen += list(events)
    assert not errors_of(seen)
    assert any("rested" in str(asked.body["input"]) for asked in model.asked)


def test_a_slow_tool_of_one_user_holds_up_nobody_elses_call(
    tools: ToolServerProcess, client: Client, model: StandIn
) -> None:
    eventually(lambda: not is_degraded(client), 30)
    model.will(Call("sleep"))
    with client.streaming("threads.create", {"input": message("Sleep")}) as events:
        until_the_call(events)
        model.will(Call("add", {"a": 20, "b": 22}))
        model.will(Say("Added."))
        quick = client.create("Add 20 and 22")
    assert not errors_of(quick)
    assert "42" in result_of_last_call(model)


def test_check_lists_the_tools_or_says_that_the_server_does_not_answer(tmp_path: Path, port: int) -> None:
    def check() -> subprocess.CompletedProcess[str]:
        return run(tmp_path, "check", MCP_SERVER_URL=f"http://127.0.0.1:{port}/mcp")

    missing = check()
    assert missing.returncode == 1
    assert "wrong  tools: " in missing.stdout
    assert "Traceback" not in missing.stderr
    with ToolServerProcess(port):
        found = check()
    assert found.returncode == 0, found.stdout
    assert f"ok     tools: 127.0.0.1:{port} offers add, who_asks, sleep, nap" in found.stdout


def test_check_says_which_tools_two_servers_name_alike_and_no_secret_of_an_address(tmp_path: Path, port: int) -> None:
    other = free_port()
    with ToolServerProcess(port), ToolServerProcess(other):
        urls = f"http://127.0.0.1:{port}/mcp?key=secret,http://127.0.0.1:{other}/mcp"
        found = run(tmp_path, "check", MCP_SERVER_URL=urls)
    assert found.returncode == 0, found.stdout
    assert f"ok     tools: 127.0.0.1:{port} has add, who_asks, sleep" in found.stdout
    assert "secret" not in found.stdout


def test_500_turns_leave_no_task_and_no_connection_behind(
    tools: ToolServerProcess, client: InProcess, model: StandIn
) -> None:
    def connections() -> int:
        peer = f"0100007F:{tools.port:04X}"  # as the kernel writes 127.0.0.1 and the port
        rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
        return sum(row[2] == peer and row[3] == "01" for row in rows)

    eventually(lambda: not is_degraded(client), 30)
    client.create("Hello")
    tasks = len(client.tasks())
    counts = []
    for number in range(500):
        if number % 10 == 0:
            model.will(Call("add", {"a": number, "b": 1}))
        client.create("Hello")
        counts.append(connections())
    print(f"\nconnections to the tool server after 10 turns: {counts[9]}, after 500: {counts[-1]}")
    assert counts[-1] <= max(counts[:20])
    eventually(lambda: len(client.tasks()) <= tasks, what="the end of all tasks but those of an idle service")


@pytest.mark.anyio
async def test_an_authors_server_is_asked_for_its_tools_with_all_that_its_filter_needs() -> None:
    class Filtering:
        name = "the author's"

        async def list_tools(self, run_context: Any = None, agent: Any = None) -> list[Any]:
            assert isinstance(run_context.context, RecordingContext)
            assert agent is author
            return []

    server: Any = Filtering()
    author = Agent(name="Agent", mcp_servers=[server])
    store: Any = None
    thread = ThreadMetadata(id="thr_1", created_at=datetime.now(UTC))
    context = RecordingContext(thread=thread, store=store, request_context=RequestContext("alice"))
    assert (await with_tools_of([], author, context)).mcp_servers == [server]
