"""The units on a machine that really boots, installed by the words of docs/operations.md."""

import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from machine import Machine, booted, copy_code

from clients import Stream
from deploy.talk import talk
from documents import blocks_of
from service import ROOT, Client, eventually, free_port, is_up, text_of, thread_of
from standin import Say, StandIn

pytestmark = pytest.mark.soak

KEY = "sk-of-the-credential"


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with booted() as machine:
        yield machine


@pytest.fixture(scope="module")
def url(machine: Machine, running_model: StandIn) -> str:
    """The service's address, once it is installed as the document says, but for its port and its settings."""
    port = free_port()
    sections = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    install, settings, secrets, start, *_ = blocks_of(sections.partition("## Install under systemd")[2])
    copy_code(ROOT, machine.root / "opt" / "chatkit-0.1.0")
    socket_unit = machine.root / "opt/chatkit-0.1.0/deploy/chatkit.socket"
    socket_unit.write_text(socket_unit.read_text().replace("127.0.0.1:8000", f"127.0.0.1:{port}"))
    environ = f"OPENAI_BASE_URL={running_model.url}\nOPENAI_DEFAULT_MODEL=stand-in\n"
    environ += "TURNS_PER_MINUTE=0\nCONCURRENT_TURNS_PER_USER=0\n"
    assert re.fullmatch(r"([A-Z_]+=\S+\n)+", settings)
    files = {"environment": environ, "openai_api_key": KEY}
    machine.run("install -d -m 700 /etc/chatkit /etc/systemd/system/chatkit.service.d")
    for name, text in files.items():
        (machine.root / "etc/chatkit" / name).write_text(text)
    (machine.root / "etc/systemd/system/chatkit.service.d/secrets.conf").write_text(secrets)
    machine.run(re.sub("git clone .*", "", install))
    machine.run(start)
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def client(url: str, model: StandIn) -> Client:
    return Client(url)


def test_the_unit_starts_and_answers_with_the_key_that_was_handed_over(client: Client, model: StandIn) -> None:
    client.create("Hello")
    assert model.asked[0].headers["authorization"] == f"Bearer {KEY}"


def test_it_runs_as_nobody_else_with_a_system_that_it_cannot_write(machine: Machine, client: Client) -> None:
    client.create("Hello")
    status = machine.run("cat /proc/$(systemctl show -P MainPID chatkit)/status")
    assert re.search(r"^Uid:\s+6\d{4}\s", status, re.MULTILINE)  # one of DynamicUser's
    assert re.search(r"^CapBnd:\s+0+$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
    assert re.search(r"^Seccomp:\s+2$", status, re.MULTILINE)
    assert machine.run("stat -c %a /var/lib/private/chatkit") == "700"


def test_a_killed_process_comes_back_with_all_that_was_said(machine: Machine, client: Client) -> None:
    thread_id = thread_of(client.create("Remember this"))
    before = machine.run("systemctl show -P MainPID chatkit")
    machine.run(f"kill -{signal.SIGKILL.value} {before}")
    eventually(lambda: machine.run("systemctl show -P MainPID chatkit") not in (before, "0"), 30, "another process")
    [said, answered] = client.items(thread_id)
    assert text_of(said) == "Remember this"
    assert text_of(answered) == "Hello from the stand-in."


def test_a_release_is_put_in_place_while_people_talk(machine: Machine, url: str, model: StandIn) -> None:
    model.otherwise = [Say("one two three four five", gap=0.02)]
    over, waited = threading.Event(), list[float]()
    with ThreadPoolExecutor(8) as pool:
        talking = [pool.submit(talk, url, over, waited) for _ in range(8)]
        try:
            for _ in range(5):
                enough = len(waited) + 20
                eventually(lambda enough=enough: len(waited) > enough, 300, "the next turns")
                machine.run("systemctl restart chatkit.service")
        finally:
            over.set()
    assert not [wrong for each in talking for wrong in each.result()]
    print(f"\n{len(waited)} turns over 5 restarts, the longest took {max(waited):.1f} s")


def test_the_other_commands_run_as_the_service_does(machine: Machine, client: Client) -> None:
    client.create("Hello")
    answer = machine.run(commands())
    assert "ok     database: SQLite" in answer
    assert re.search(r"^[-\d]{10} +local ", answer, re.MULTILINE)


def test_the_other_commands_reach_a_database_that_is_named_in_a_secret(machine: Machine, client: Client) -> None:
    dropin = machine.root / "etc/systemd/system/chatkit.service.d/secrets.conf"
    before = dropin.read_text(encoding="utf-8")
    (machine.root / "etc/chatkit/database_url").write_text("sqlite:////var/lib/chatkit/named.db")
    more = "LoadCredential=database_url:/etc/chatkit/database_url\nEnvironment=DATABASE_URL_FILE=%d/database_url\n"
    dropin.write_text(before + more, encoding="utf-8")
    try:
        machine.run(commands().partition("chatkit check")[0] + "chatkit migrate")
    finally:
        dropin.write_text(before, encoding="utf-8")
    machine.run("test -f /var/lib/private/chatkit/named.db")


def commands() -> str:
    sections = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    [found] = [block for block in blocks_of(sections) if block.startswith("chatkit()")]
    return found


def test_settings_that_are_refused_do_not_start_it_over_and_over(machine: Machine, client: Client) -> None:
    settings = machine.root / "etc/chatkit/environment"
    good = settings.read_text(encoding="utf-8")
    settings.write_text(good + "MAX_TURNS=many\n", encoding="utf-8")
    machine.run("systemctl restart chatkit.service", check=False)
    assert machine.run("systemctl show -P ActiveState chatkit") == "failed"
    assert "MAX_TURNS must be" in machine.run("journalctl -u chatkit --no-pager")
    settings.write_text(good, encoding="utf-8")
    machine.run("systemctl restart chatkit.socket chatkit.service")
    assert eventually(lambda: is_up(client), 30)


def test_the_data_survive_a_stop_and_a_restore_of_a_copy(machine: Machine, client: Client, url: str) -> None:
    thread_id = thread_of(client.create("Before the copy"))
    machine.run("systemctl stop chatkit.socket chatkit.service")
    machine.run("cp -p /var/lib/private/chatkit/chatkit.db /var/lib/private/chatkit/backup.db")
    machine.run("systemctl start chatkit.socket chatkit.service")
    after = thread_of(client.create("After the copy"))
    sections = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    [restore] = [block for block in blocks_of(sections) if "mkdir -m 700 replaced" in block]
    machine.run(restore)
    with Stream.say(url, thread_id, "Again") as stream:
        stream.read_to_end(60)
    kept = Client(url).thread_ids()
    assert thread_id in kept
    assert after not in kept
