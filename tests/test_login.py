"""Login over HTTP: which tokens get in, whose things they reach, and what a process without login lets in."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import httpx2
import pytest
from chatkit.types import NonStreamingReq, StreamingReq
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from app import create_app
from attacks import ATTACKS, attack_tokens
from auth import Verifier
from conftest import probing
from issuer import Issuer
from service import ROOT, Client, eventually, fold, message, process, run, service, serving, thread_of
from standin import Call, Say, StandIn

LIST = {"type": "threads.list", "params": {}}


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    with Issuer() as issuer:
        yield issuer


@pytest.fixture(scope="module")
def guarded(issuer: Issuer, running_model: StandIn, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A service with login, that knows its issuer's keys."""
    environ = probing(running_model, tmp_path_factory.mktemp("login") / "chatkit.db")
    with service(**environ, JWKS_URL=issuer.jwks_url, JWT_ISSUER=issuer.url) as client:
        eventually(lambda: client.http.get("/readyz").status_code == 200)
        yield client


Attacks = dict[str, list[tuple[str, str]]]


@pytest.fixture(scope="module")
def attacks(issuer: Issuer) -> Attacks:
    """The headers of every attack, by name."""
    return {
        name: [("authorization", value)] if isinstance(value, str) else value for name, value in attack_tokens(issuer)
    }


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def as_user(guarded: Client, issuer: Issuer, name: str) -> Client:
    """Return a client of the same service that is signed in under this name."""
    return Client(guarded.url, bearer(issuer.token(claims={"sub": name})))


# --- tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["EdDSA", "ES256", "ES384", "RS256"])
def test_a_good_token_gets_in_whatever_its_issuer_signs_with(guarded: Client, issuer: Issuer, algorithm: str) -> None:
    assert guarded.http.post("/chatkit", json=LIST, headers=bearer(issuer.token(algorithm))).status_code == 200


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_gets_in_and_none_is_our_fault(guarded: Client, attacks: Attacks, name: str) -> None:
    headers = attacks[name]
    try:
        response = guarded.http.post("/chatkit", json=LIST, headers=headers)
    except httpx2.TransportError:
        assert _length(headers) > 1_000_000  # the HTTP server hangs up on such headers
        return
    if response.status_code == 400:
        assert _length(headers) > 1_000_000
        return
    expected = {"expired": "token_expired", "scheme:": "token_missing"}.get(name.split()[0], "token_invalid")
    assert (response.status_code, response.json()["code"]) == (401, expected)
    assert response.headers["www-authenticate"] == "Bearer"


def _length(headers: list[tuple[str, str]]) -> int:
    return sum(len(value) for _, value in headers)


def test_without_a_token_one_is_asked_for(guarded: Client) -> None:
    response = guarded.http.post("/chatkit", json=LIST)
    assert (response.status_code, response.json()["code"]) == (401, "token_missing")
    assert response.headers["www-authenticate"] == "Bearer"


def test_no_attack_costs_more_than_twenty_good_tokens(guarded: Client, issuer: Issuer, attacks: Attacks) -> None:
    def seconds(headers: list[tuple[str, str]]) -> float:
        took = []
        for _ in range(5):
            began = time.perf_counter()
            guarded.http.post("/chatkit", json=LIST, headers=headers)
            took.append(time.perf_counter() - began)
        return min(took)

    good = seconds([("authorization", f"Bearer {issuer.token()}")])
    costs = {name: seconds(headers) / good for name, headers in attacks.items() if _length(headers) < 20_000}
    dearest = max(costs, key=lambda name: costs[name])
    print(f"\nthe dearest of {len(costs)} attacks, “{dearest}”, costs {costs[dearest]:.1f} good tokens")
    assert costs[dearest] < 20


def test_a_stream_goes_on_when_its_token_expires(guarded: Client, issuer: Issuer, model: StandIn) -> None:
    model.will(Say("This answer takes longer than its token", gap=0.3))
    expiring = issuer.token(claims={"exp": time.time() - 27})  # 30 s of leeway: three are left, the answer takes longer
    client = Client(guarded.url, bearer(expiring))
    events = client.create("Take your time")
    assert fold(events)[-1]["content"][0]["text"] == "This answer takes longer than its token"
    assert client.post("threads.list").json()["code"] == "token_expired"


def test_the_users_claim_can_be_another(tmp_path: Path, issuer: Issuer, model: StandIn) -> None:
    environ = probing(model, tmp_path / "chatkit.db", JWKS_URL=issuer.jwks_url, JWT_ISSUER=issuer.url)
    with service(**environ, JWT_USER_CLAIM="tenant_user") as guarded:
        tokens = [issuer.token(claims={"sub": "7", "tenant_user": f"{tenant}/7"}) for tenant in ("a", "b")]
        here, there = (Client(guarded.url, bearer(token)) for token in tokens)
        eventually(lambda: guarded.http.get("/readyz").status_code == 200)
        thread = thread_of(here.create("Hello"))
        assert here.thread_ids() == [thread]
        assert there.thread_ids() == []
        assert guarded.http.get("/settings.json").json()["login"] == "tenant_user"  # for the page, which reads it too


def test_the_claims_and_the_locale_reach_the_agent_and_no_log(
    guarded: Client, issuer: Issuer, model: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    token = issuer.token(claims={"sub": "carol", "email": "SENTINEL@example.org"})
    client = Client(guarded.url, {**bearer(token), "accept-language": "de-CH,de;q=0.9"})
    model.will(Call("who_am_i"))
    client.create("Who am I?")
    output = str(model.asked[-1].body["input"])
    assert all(known in output for known in ("carol", "de-CH", "SENTINEL@example.org"))
    assert "SENTINEL" not in caplog.text
    guarded.http.post("/chatkit", json=LIST, headers=bearer(issuer.token(claims={"email": "SENTINEL", "aud": "x"})))
    assert "SENTINEL" not in caplog.text


def test_a_process_whose_issuer_cannot_be_reached_starts_waits_and_recovers(tmp_path: Path, model: StandIn) -> None:
    issuer = Issuer()
    issuer.start()
    issuer.stop()
    environ = probing(model, tmp_path / "chatkit.db", JWKS_URL=issuer.jwks_url, JWT_ISSUER=issuer.url)
    with service(**environ) as guarded:
        client = Client(guarded.url, bearer(issuer.token()))
        response = client.post("threads.list")
        assert (response.status_code, response.json()["code"]) == (503, "keys_unavailable")
        assert response.headers["retry-after"]
        assert guarded.http.get("/readyz").status_code == 503
        assert guarded.http.get("/healthz").status_code == 200
        issuer.start()
        try:
            eventually(lambda: client.post("threads.list").status_code == 200, 40)
            assert guarded.http.get("/readyz").status_code == 200
            issuer.stop()
            assert client.post("threads.list").status_code == 200
        finally:
            issuer.stop()


def test_a_thousand_unknown_kids_cause_one_fetch_at_most(guarded: Client, issuer: Issuer) -> None:
    before, began = issuer.fetches, time.monotonic()
    for number in range(1000):
        token = issuer.token(header={"kid": f"unknown-{number}"})
        assert guarded.http.post("/chatkit", json=LIST, headers=bearer(token)).status_code == 401
    assert issuer.fetches - before <= 1 + (time.monotonic() - began) // 30


# --- Better Auth --------------------------------------------------------------------------------------------------


@contextmanager
def better_auth(**environ: str) -> Iterator[str]:
    """Run a real Better Auth server and yield its address."""
    node = shutil.which("node")
    assert node, "Node.js is needed: tests/run.py installs it"
    folder = ROOT / "tests" / "betterauth"
    with subprocess.Popen([node, "issuer.mjs"], cwd=folder, env=environ, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip()
        finally:
            server.kill()


def sign_up(address: str) -> Callable[[], str]:
    """Make a user and return a function that gets a token for them."""
    origin, user = {"origin": address}, {"email": "alice@example.org", "password": "a long password", "name": "Alice"}
    with httpx2.Client(base_url=address, trust_env=False) as browser:
        browser.post("/api/auth/sign-up/email", json=user, headers=origin).raise_for_status()
        cookies = dict(browser.cookies)

    def token() -> str:
        with httpx2.Client(base_url=address, trust_env=False, cookies=cookies) as browser:
            return str(browser.get("/api/auth/token").json()["token"])

    return token


def test_better_auths_own_tokens_get_in_and_those_of_another_instance_do_not(tmp_path: Path, model: StandIn) -> None:
    with better_auth() as ours, better_auth() as another:
        environ = {"BETTER_AUTH_JWKS_URL": f"{ours}/api/auth/jwks", "BETTER_AUTH_ISSUER": ours}
        with service(**probing(model, tmp_path / "chatkit.db"), **environ) as guarded:
            client, stranger = (Client(guarded.url, bearer(sign_up(address)())) for address in (ours, another))
            eventually(lambda: client.post("threads.list").status_code == 200, 40)
            thread = thread_of(client.create("Hello"))
            assert client.thread_ids() == [thread]
            assert stranger.post("threads.list").json()["code"] == "token_invalid"


@pytest.mark.anyio
async def test_better_auths_rotated_keys_need_no_restart() -> None:
    clock = [0.0]
    with better_auth(ROTATE_SECONDS="1") as address:
        new_token = sign_up(address)
        first = new_token()
        async with Verifier(f"{address}/api/auth/jwks", address, monotonic=lambda: clock[0]) as verifier:
            await verifier.verify(first)
            rotated = eventually(lambda: token if (token := new_token()).split(".")[0] != first.split(".")[0] else "")
            clock[0] += 31  # an unknown key is looked for again after 30 s at the earliest
            assert (await verifier.verify(rotated)).user_id == (await verifier.verify(first)).user_id


# --- whose things -------------------------------------------------------------------------------------------------

ON_THREAD: dict[str, Callable[[dict[str, str]], dict[str, Any]]] = {
    "threads.get_by_id": lambda ids: {},
    "threads.update": lambda ids: {"title": "Mine now"},
    "threads.delete": lambda ids: {},
    "items.list": lambda ids: {},
    "items.feedback": lambda ids: {"item_ids": [ids["answer"]], "kind": "negative"},
    "threads.add_user_message": lambda ids: {"input": message("Let me in")},
    "threads.retry_after_item": lambda ids: {"item_id": ids["question"]},
    "threads.add_client_tool_output": lambda ids: {"result": "forged"},
    "threads.add_structured_input": lambda ids: {"item_id": ids["form"], "input": {"status": "skipped"}},
    "threads.custom_action": lambda ids: {"item_id": ids["widget"], "action": {"type": "press"}},
    "threads.sync_custom_action": lambda ids: {"item_id": ids["widget"], "action": {"type": "press"}},
}
OTHERWISE: dict[str, Callable[[dict[str, str]], dict[str, Any]]] = {
    "threads.list": lambda ids: {"after": ids["thread"]},
    "threads.create": lambda ids: {"input": message("Let me have it", attachments=[ids["attachment"]])},
    "attachments.create": lambda ids: {"name": "a", "size": 1, "mime_type": "text/plain"},
    "attachments.delete": lambda ids: {"attachment_id": ids["attachment"]},
    "input.transcribe": lambda ids: {"audio_base64": "AAAA", "mime_type": "audio/webm"},
}
NOT_ABOUT_ONE_THING = {"attachments.create", "input.transcribe"}
PNG = b"\x89PNG\r\n\x1a\n and so on"
UNKNOWN = dict.fromkeys(["thread", "question", "answer", "form", "widget", "attachment"], "unknown")


@pytest.fixture(scope="module")
def alices(guarded: Client, issuer: Issuer, running_model: StandIn) -> dict[str, str]:
    """Alice's things of every kind, by id."""
    running_model.reset()
    alice = as_user(guarded, issuer, "alice")
    running_model.will(Call("show_widget"), Call("ask_form", call_id="c2"), Call("pick_file", call_id="c3"))
    thread = thread_of(alice.create("ALICE'S SECRET"))
    running_model.will(Say("ALICE'S ANSWER"))
    alice.say(thread)
    items = {item["type"]: item["id"] for item in alice.items(thread)}
    image = alice.http.post("/attachments", files={"file": ("dot.png", PNG, "image/png")}).json()
    return {
        "thread": thread,
        "question": items["user_message"],
        "answer": items["assistant_message"],
        "form": items["structured_input"],
        "widget": items["widget"],
        "attachment": image["id"],
        "preview": image["preview_url"],
    }


def test_every_operation_of_the_protocol_is_tried_with_another_users_ids() -> None:
    operations = {
        request.model_fields["type"].default for request in (*get_args(StreamingReq), *get_args(NonStreamingReq))
    }
    assert operations == ON_THREAD.keys() | OTHERWISE.keys()


@pytest.mark.parametrize("operation", [*ON_THREAD, *OTHERWISE])
def test_another_users_things_answer_as_what_does_not_exist_and_do_not_change(
    guarded: Client, issuer: Issuer, alices: dict[str, str], operation: str
) -> None:
    alice, mallory = as_user(guarded, issuer, "alice"), as_user(guarded, issuer, "mallory")

    def try_with(ids: dict[str, str]) -> tuple[int, Any]:
        params = (ON_THREAD | OTHERWISE)[operation](ids)
        if operation in ON_THREAD:
            params = {"thread_id": ids["thread"], **params}
        response = mallory.post(operation, params)
        return response.status_code, response.json()

    before = alice.items(alices["thread"]), alice.ask("threads.get_by_id", {"thread_id": alices["thread"]})
    if operation not in NOT_ABOUT_ONE_THING:
        refused = try_with(alices)
        assert refused == try_with(UNKNOWN)
        assert refused[0] in (404, 422)
    after = alice.items(alices["thread"]), alice.ask("threads.get_by_id", {"thread_id": alices["thread"]})
    assert after == before
    assert mallory.thread_ids() == []
    assert alice.http.get(alices["preview"]).content == PNG


def test_a_file_is_had_with_its_users_token_and_with_nobody_elses(guarded: Client, issuer: Issuer) -> None:
    alice, mallory = as_user(guarded, issuer, "alice"), as_user(guarded, issuer, "mallory")
    pdf = alice.http.post("/attachments", files={"file": ("a.pdf", b"%PDF-1.7 secret", "application/pdf")}).json()
    address = f"/attachments/{pdf['id']}"
    had = alice.http.get(address)
    assert (had.status_code, had.content) == (200, b"%PDF-1.7 secret")
    assert had.headers["content-disposition"] == "attachment; filename*=UTF-8''a.pdf"
    assert had.headers["cache-control"] == "no-store", "or the browser gives it to whoever signs in next"
    assert mallory.http.get(address).json() == mallory.http.get("/attachments/atc_none").json()
    assert mallory.http.get(address).status_code == 404
    assert guarded.http.get(address).status_code == 403


def test_every_route_is_public_or_asks_for_a_token(guarded: Client) -> None:
    public = {"/healthz", "/readyz", "/", "/settings.json", "/metrics"}
    for route in create_app().routes:
        path = str(getattr(route, "path", "")).replace("{id}", "atc_none")
        if path in public or path.startswith(("/web", "/page")):
            continue
        for method in getattr(route, "methods", None) or {"GET"}:
            status = guarded.http.request(method, path, json=LIST).status_code
            assert status in (401, 404, 403), f"{method} {path} answers {status} to whom nobody knows"


# --- without login ------------------------------------------------------------------------------------------------


def test_a_name_that_is_pointed_at_this_machine_does_not_reach_it(client: Client, caplog: Any) -> None:
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "", "[::2]"):
        response = client.http.post("/chatkit", json=LIST, headers={"host": host})
        assert response.status_code in (400, 403), host
    assert caplog.text.count("refused the Host 'evil.example'") == 1


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1:8000", "[::1]:8000", "chat.localhost"])
def test_the_machines_own_names_reach_it(client: Client, host: str) -> None:
    assert client.http.post("/chatkit", json=LIST, headers={"host": host}).status_code == 200


def test_a_page_of_another_origin_is_refused_and_the_log_says_once_what_to_set(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        for origin in ("https://evil-1.example", "null", "http://localhost:5999"):
            response = client.http.post("/chatkit", json=LIST, headers={"origin": origin})
            assert (response.status_code, response.json()["code"]) == (403, "forbidden")
            assert "ALLOWED_ORIGINS" in response.json()["message"]
    assert caplog.text.count("evil-1.example") == 1
    own = client.http.post("/chatkit", json=LIST, headers={"origin": client.url})
    allowed = client.http.post("/chatkit", json=LIST, headers={"origin": "http://localhost:3000"})
    assert (own.status_code, allowed.status_code) == (200, 200)


def test_a_form_that_a_foreign_page_posts_does_nothing(client: Client) -> None:
    form = {"content-type": "text/plain", "origin": "https://evil.example"}
    before = client.thread_ids()
    body = json.dumps({"type": "threads.create", "params": {"input": message("Hello")}})
    assert client.http.post("/chatkit", content=body, headers=form).status_code == 403
    assert client.http.post("/chatkit", content=body, headers={"content-type": "text/plain"}).status_code == 415
    assert client.thread_ids() == before


def test_the_public_name_and_origin_are_known(tmp_path: Path, model: StandIn) -> None:
    environ = probing(model, tmp_path / "chatkit.db", PUBLIC_URL="https://Chat.Example:443/path")
    with service(**environ) as client:
        headers = {"host": "chat.example", "origin": "https://chat.example"}
        assert client.http.post("/chatkit", json=LIST, headers=headers).status_code == 200


def test_what_a_proxy_passes_on_for_other_machines_is_refused_without_login(tmp_path: Path, model: StandIn) -> None:
    elsewhere, here = {"x-forwarded-for": "203.0.113.7"}, {"x-forwarded-for": "127.0.0.1"}
    with service(**probing(model, tmp_path / "chatkit.db")) as client:
        refused = client.http.post("/chatkit", json=LIST, headers=elsewhere)
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        assert client.http.post("/chatkit", json=LIST, headers=here).status_code == 200
    with service(**probing(model, tmp_path / "chatkit.db", ALLOW_ANONYMOUS="1")) as client:
        assert client.http.post("/chatkit", json=LIST, headers=elsewhere).status_code == 200


@pytest.mark.parametrize("value", ["203.0.113.9", "127.0.0.1, 203.0.113.9", "203.0.113.9, 127.0.0.1", "unknown", ""])
@pytest.mark.parametrize("believed", ["10.0.0.0/8", "*"])
def test_a_proxy_that_is_not_believed_is_taken_at_its_word_that_a_request_comes_from_elsewhere(
    tmp_path: Path, model: StandIn, value: str, believed: str
) -> None:
    environ = probing(model, tmp_path / "chatkit.db", FORWARDED_ALLOW_IPS=believed)
    with service(**environ) as client:
        refused = client.http.post("/chatkit", json=LIST, headers={"x-forwarded-for": value})
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")


def test_a_proxy_in_front_of_a_process_without_login_is_warned_of_once(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        client.http.post("/chatkit", json=LIST, headers={"x-forwarded-for": "127.0.0.1"})
    assert caplog.text.count("X-Forwarded-For") <= 1


def test_uvicorns_own_command_on_every_address_ends_itself_without_login(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "uvicorn", "--factory", "app:create_app", "--app-dir", str(ROOT)]
    options = ["--host", "0.0.0.0", "--port", "0"]
    result = subprocess.run(
        [*command, *options], cwd=tmp_path, env={}, capture_output=True, text=True, timeout=30, check=False
    )
    assert result.returncode != 0
    assert "ALLOW_ANONYMOUS=1" in result.stderr


BINDS_LATE = """
import asyncio, socket
from local import loopback_only

async def main():
    async with loopback_only():
        await asyncio.sleep(6)
        with socket.create_server(("0.0.0.0", 0)):
            await asyncio.sleep(60)

asyncio.run(main())
"""


def test_a_socket_that_is_bound_long_after_the_start_is_noticed() -> None:
    command = [sys.executable, "-c", BINDS_LATE]  # whatever else serves in this process watches its sockets too
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == -signal.SIGTERM, result.stderr
    assert "HOST=0.0.0.0 lets other machines in" in result.stderr


def test_a_process_on_every_address_serves_when_that_is_said_to_be_meant(tmp_path: Path) -> None:
    with process(tmp_path, HOST="0.0.0.0", ALLOW_ANONYMOUS="1") as client:
        local = Client(client.url.replace("0.0.0.0", "127.0.0.1"))
        assert local.ask("threads.list")["data"] == []


def test_a_unix_socket_needs_no_login_and_is_no_way_around_the_host(tmp_path: Path) -> None:
    path, environ = str(tmp_path / "socket"), {"PATH": os.environ["PATH"], "LISTEN_FDS": "1"}
    with socket.socket(socket.AF_UNIX) as listener, (tmp_path / "log").open("wb") as log:
        listener.bind(path)
        listener.listen()
        given = f'LISTEN_PID=$$ exec "$0" "$@" 3<&{listener.fileno()}'  # as systemd hands it over
        command = ["bash", "-c", given, sys.executable, str(ROOT / "app.py")]
        running = subprocess.Popen(command, cwd=tmp_path, env=environ, pass_fds=[listener.fileno()], stderr=log)
    try:
        with httpx2.Client(transport=httpx2.HTTPTransport(uds=path), base_url="http://localhost", timeout=30) as http:
            assert http.post("/chatkit", json=LIST).status_code == 200
            assert http.post("/chatkit", json=LIST, headers={"host": "evil.example"}).status_code == 403
        assert f"listening on unix:{path}" in (tmp_path / "log").read_text()
    finally:
        running.terminate()
        running.wait(30)


# --- check --------------------------------------------------------------------------------------------------------


def check(directory: Path, token: str | None = None, **environ: str) -> tuple[int, str]:
    result = run_check(directory, token, **environ)
    return result.returncode, result.stdout


def run_check(directory: Path, token: str | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    judging = [] if token is None else ["--token", "-"]
    result = run(directory, "check", *judging, input=token or "", **environ)
    assert "Traceback" not in result.stderr
    return result


def test_check_says_of_each_part_that_it_is_right(tmp_path: Path, issuer: Issuer, model: StandIn) -> None:
    environ = {
        "OPENAI_BASE_URL": model.url,
        "OPENAI_DEFAULT_MODEL": "stand-in",
        "JWKS_URL": issuer.jwks_url,
        "JWT_ISSUER": issuer.url,
    }
    code, said = check(tmp_path, issuer.token(), **environ)
    assert code == 0, said
    assert all(line.startswith("ok ") for line in said.splitlines())
    assert "EdDSA" in said
    assert "the user is alice" in said


def test_check_says_of_each_part_what_to_do(tmp_path: Path, issuer: Issuer) -> None:
    (tmp_path / "chatkit.db").write_bytes(b"no database at all, but rather a text" * 100)
    code, said = check(
        tmp_path,
        issuer.token(claims={"aud": "https://another.example"}),
        AGENT="no_such_agent",
        OPENAI_BASE_URL="http://127.0.0.1:9/v1",
        JWKS_URL=issuer.jwks_url,
        JWT_ISSUER=issuer.url,
    )
    assert code == 1
    wrong = {line.split()[1].rstrip(":"): line for line in said.splitlines() if line.startswith("wrong")}
    assert wrong.keys() == {"agent", "database", "model", "token"}
    assert "expected" in wrong["token"]
    assert "AGENT" in wrong["agent"]
    code, said = check(tmp_path, JWKS_URL="http://127.0.0.1:9/jwks", JWT_ISSUER="x")
    assert "JWKS_URL" in next(line for line in said.splitlines() if line.startswith("wrong  issuer"))


def test_check_lists_each_key_once(tmp_path: Path, issuer: Issuer) -> None:
    environ = {"JWKS_URL": issuer.jwks_url, "JWT_ISSUER": issuer.url}
    result = run_check(tmp_path, issuer.token(), **environ)
    said = (result.stdout + result.stderr).splitlines()
    assert len([line for line in said if "EdDSA" in line]) == 1, said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{token}\n", "ok     token"),
        ("Bearer {token}", "ok     token"),
        ("Authorization: Bearer {token}\r\n", "ok     token"),
        ("{half}\n{other_half}", "wrong  token: it has spaces or line breaks inside"),
        ("", "wrong  token: there is none on standard input"),
        ("Bearer\n", "wrong  token: there is none on standard input"),
        ("YTpi.YTpi.YTpi", "wrong  token: refused: its header is not JSON"),
    ],
)
def test_check_says_of_what_was_piped_in_what_to_do(tmp_path: Path, issuer: Issuer, given: str, said: str) -> None:
    token = issuer.token()
    piped = given.format(token=token, half=token[:50], other_half=token[50:])
    code, lines = check(tmp_path, piped, JWKS_URL=issuer.jwks_url, JWT_ISSUER=issuer.url)
    assert said in lines
    assert code == (0 if said.startswith("ok") else 1)


def test_check_makes_no_database(tmp_path: Path) -> None:
    code, said = check(tmp_path)
    assert (code, list(tmp_path.iterdir())) == (0, [])
    assert f"{tmp_path}/chatkit.db is not there yet" in said
    code, said = check(tmp_path, DATABASE_URL="sqlite:///nowhere/chatkit.db")
    assert (code, list(tmp_path.iterdir())) == (1, [])
    assert "wrong  database" in said
    assert f"{tmp_path}/nowhere" in said


def test_check_says_whether_the_server_has_the_models(tmp_path: Path, model: StandIn) -> None:
    known = {"OPENAI_BASE_URL": model.url, "OPENAI_DEFAULT_MODEL": "stand-in"}
    code, said = check(tmp_path, **known)
    assert code == 0
    assert "has stand-in" in said
    code, said = check(tmp_path, **known, MODELS="stand-in,huge,alias")
    assert code == 1
    assert "has no model huge: it has stand-in, other. Set OPENAI_DEFAULT_MODEL or MODELS to what it has." in said
    code, said = check(tmp_path, OPENAI_BASE_URL=model.url)
    assert code == 1
    assert "OPENAI_DEFAULT_MODEL" in said


def test_what_check_quotes_of_others_cannot_pretend_to_be_its_lines(tmp_path: Path) -> None:
    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "\x1b[2Jm\nok     token: taken"}]})

    async def model(request: Request) -> Response:
        return JSONResponse({"error": {"message": "none"}}, 404)

    routes = [Route("/v1/models", models), Route("/v1/models/{name}", model)]
    with serving(Starlette(routes=routes)) as url:
        code, said = check(tmp_path, OPENAI_BASE_URL=f"{url}/v1", OPENAI_DEFAULT_MODEL="m")
    assert code == 1
    assert r"it has \x1b[2Jm\nok     token: taken." in said


def test_check_tells_the_line_of_an_agent_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "my_agent.py").write_text("x = 1\ndef create_agent(context:\n")
    code, said = check(tmp_path, AGENT="my_agent", PYTHONPATH=str(tmp_path))
    assert code == 1
    assert "my_agent.py, line 2: SyntaxError" in said


def test_nothing_of_a_database_changes_by_a_token_that_is_refused(guarded: Client, issuer: Issuer) -> None:
    create = {"type": "threads.create", "params": {"input": message("Hello")}}
    before = as_user(guarded, issuer, "dave").thread_ids()
    expired = issuer.token(claims={"sub": "dave", "exp": 1})
    assert guarded.http.post("/chatkit", json=create, headers=bearer(expired)).status_code == 401
    assert as_user(guarded, issuer, "dave").thread_ids() == before
