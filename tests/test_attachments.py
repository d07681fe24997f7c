"""Attachments and dictation: up by both ways, to the model, back by signed links, and gone when deleted."""

import base64
import re
import socket
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
from chatkit.store import NotFoundError
from chatkit.types import (
    Attachment,
    AttachmentCreateParams,
    FileAttachment,
    InferenceOptions,
    ThreadMetadata,
    UserMessageItem,
    UserMessageTextContent,
)

from attachments import Attachments, KeptImages, LinkRefused, kept_id
from conftest import probing
from context import RequestContext
from conversations import MAX_UNSENT, QuotaExceeded
from history import HistoryConverter
from service import Client, errors_of, eventually, fold, message, process, service, thread_of
from standin import Fail, StandIn
from store import open_store

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
PDF = b"%PDF-1.7\n" + bytes(range(256)) * 64_000  # 15.6 MiB
STRATEGIES = ["direct", "two_phase"]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attachments") / "chatkit.db"


@pytest.fixture(scope="module")
def taking(database: Path, running_model: StandIn) -> Iterator[Client]:
    with service(**probing(running_model, database)) as client:
        yield client


@pytest.fixture
def client(taking: Client, model: StandIn) -> Client:
    return taking


def create(client: Client, name: str, data: bytes, mime_type: str) -> dict[str, Any]:
    return client.ask("attachments.create", {"name": name, "size": len(data), "mime_type": mime_type})


def put(client: Client, attachment: dict[str, Any], data: Any, **headers: str) -> httpx2.Response:
    upload = attachment["upload_descriptor"]
    return client.http.request(upload["method"], upload["url"], content=data, headers={**upload["headers"], **headers})


def send_direct(client: Client, name: str, data: Any, mime_type: str) -> httpx2.Response:
    return client.http.post("/attachments", files={"file": (name, data, mime_type)})


def upload(client: Client, strategy: str, name: str, data: bytes, mime_type: str) -> dict[str, Any]:
    """Bring a file up and return its attachment."""
    if strategy == "direct":
        response = send_direct(client, name, data, mime_type)
        assert response.status_code == 200, response.text
        return response.json()
    attachment = create(client, name, data, mime_type)
    response = put(client, attachment, data)
    assert response.status_code == 200, response.text
    return attachment


def stored(database: Path) -> tuple[int, int]:
    """Return how many attachments and chunks are in the database."""
    with sqlite3.connect(database) as db:
        count = "SELECT (SELECT count(*) FROM attachments), (SELECT count(*) FROM attachment_chunks)"
        return tuple(db.execute(count).fetchone())


# --- up, to the model, back, and gone -----------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_pdf_and_an_image_reach_the_model_come_back_and_are_gone_after_deletion(
    client: Client, model: StandIn, database: Path, strategy: str
) -> None:
    before = stored(database)
    pdf = upload(client, strategy, "Bericht 2026.pdf", PDF, "application/pdf")
    image = upload(client, strategy, "dot.png", PNG, "image/png")
    events = client.create("Look at these", attachments=[pdf["id"], image["id"]])
    assert not errors_of(events)
    thread = thread_of(events)
    client.say(thread, "And again")
    for asked in model.asked:
        parts = asked.body["input"][0]["content"]
        assert [part["type"] for part in parts] == ["input_text", "input_file", "input_image"]
        assert parts[1]["filename"] == "Bericht 2026.pdf"
        assert base64.b64decode(parts[1]["file_data"].partition(",")[2]) == PDF
        assert parts[2]["image_url"] == "data:image/png;base64," + base64.b64encode(PNG).decode()

    said = client.items(thread)[0]
    assert [attachment["name"] for attachment in said["attachments"]] == ["Bericht 2026.pdf", "dot.png"]
    shown = client.http.get(said["attachments"][1]["preview_url"])
    assert (shown.status_code, shown.content) == (200, PNG)
    token = {"authorization": "Bearer of-whoever-is-asked-for-none"}
    assert client.http.get(f"/attachments/{pdf['id']}", headers=token).content == PDF

    client.ask("threads.delete", {"thread_id": thread})
    assert client.http.get(said["attachments"][1]["preview_url"]).status_code == 404
    assert client.http.get(f"/attachments/{pdf['id']}", headers=token).status_code == 404
    assert stored(database) == before


def test_chat_completions_gets_files_too(tmp_path: Path, model: StandIn) -> None:
    with service(**probing(model, tmp_path / "chatkit.db", OPENAI_API="chat_completions")) as client:
        files = [
            upload(client, "direct", "a.pdf", b"%PDF-1.7 small", "application/pdf"),
            upload(client, "direct", "dot.png", PNG, "image/png"),
            upload(client, "direct", "a.txt", "Größe".encode(), "text/plain"),
        ]
        assert not errors_of(client.create("Look", attachments=[file["id"] for file in files]))
    content = model.asked[-1].body["messages"][-1]["content"]
    assert [part["type"] for part in content] == ["text", "file", "image_url", "text"]
    assert "Größe" in content[3]["text"]


def test_text_is_read_out_to_the_model_up_to_a_limit(client: Client, model: StandIn) -> None:
    text = upload(client, "direct", "long.txt", b"x" * 150_000 + b"\xff\xfe", "text/plain")
    client.create("Read", attachments=[text["id"]])
    part = model.asked[-1].body["input"][0]["content"][1]["text"]
    assert "long.txt" in part
    assert 100_000 < len(part) < 101_000
    assert "50002 more characters" in part


def test_what_a_model_cannot_read_is_named_in_words_also_when_it_is_gone(client: Client, model: StandIn) -> None:
    office = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
    letter = upload(client, "direct", "letter.docx", b"PK\x03\x04 zipped", office)
    events = client.create("Read", attachments=[letter["id"]])
    assert "letter.docx" in model.asked[-1].body["input"][0]["content"][1]["text"]
    client.ask("attachments.delete", {"attachment_id": letter["id"]})
    assert not errors_of(client.say(thread_of(events)))
    assert "has been deleted" in model.asked[-1].body["input"][0]["content"][1]["text"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("declared", ["text/plain;charset=utf-8", "Text/Plain"])
def test_a_type_is_taken_with_parameters_and_in_any_case(client: Client, strategy: str, declared: str) -> None:
    assert upload(client, strategy, "a.txt", b"abc", declared)["mime_type"] == "text/plain"


def test_a_file_that_a_message_names_twice_is_sent_once(client: Client, model: StandIn) -> None:
    text = upload(client, "direct", "a.txt", b"abc", "text/plain")
    events = client.create("Read", attachments=[text["id"]] * 3)
    assert len(fold(events)[0]["attachments"]) == 1
    assert len(model.asked[-1].body["input"][0]["content"]) == 2


@pytest.mark.anyio
async def test_files_that_are_too_large_together_are_named_in_words_the_oldest_first(tmp_path: Path) -> None:
    alice = RequestContext("alice")
    async with open_store(f"sqlite:///{tmp_path}/db") as store:
        files = Attachments(store, b"k", max_bytes=99, types=["text/plain"], max_storage_bytes=0)
        said = [sending(await files.receive_direct(name, "text/plain", whole(b"x" * 40), alice)) for name in "abc"]
        read = await HistoryConverter(files, alice, max_file_bytes=80).to_agent_input(said)
    assert ["too large" in str(message) for message in read] == [True, False, False]
    assert [name in str(message) for name, message in zip("abc", read, strict=True)] == [True] * 3


def sending(attachment: Attachment) -> UserMessageItem:
    text = [UserMessageTextContent(text="Read")]
    options, now = InferenceOptions(), datetime.now(UTC)
    return UserMessageItem(
        id="msg", thread_id="thr", created_at=now, content=text, attachments=[attachment], inference_options=options
    )


async def whole(data: bytes) -> AsyncIterator[bytes]:
    yield data


def test_a_retry_of_an_earlier_message_removes_the_files_of_later_ones(
    client: Client, model: StandIn, database: Path
) -> None:
    before = stored(database)
    events = client.create("First")
    text = upload(client, "direct", "a.txt", b"abc", "text/plain")
    client.say(thread_of(events), "Second", attachments=[text["id"]])
    params = {"thread_id": thread_of(events), "item_id": fold(events)[0]["id"]}
    client.stream("threads.retry_after_item", params)
    assert stored(database) == before


def test_twenty_megabytes_go_up_without_being_in_memory(tmp_path: Path) -> None:
    size = 20_000_000
    with process(
        tmp_path, through=["env"], OPENAI_BASE_URL="http://127.0.0.1:9/v1"
    ) as client:  # a fork shares its parent's memory
        upload(client, "direct", "warm.txt", b"x" * 3_000_000, "text/plain")
        status = Path(f"/proc/{client.process.pid}/status")

        def peak() -> int:
            return int(re.search(r"VmHWM:\s+(\d+)", status.read_text()).group(1)) * 1024

        Path(f"/proc/{client.process.pid}/clear_refs").write_text("5")
        idle = peak()
        for strategy in STRATEGIES:
            upload(client, strategy, "large.txt", b"x" * size, "text/plain")
        print(f"\npeak memory while {size} bytes went up twice: {peak() - idle} bytes above idle")
        assert peak() - idle < size / 4


# --- refused ------------------------------------------------------------------------------------------------------

HTML = b"<!doctype html><script>alert(1)</script>"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("name", "data", "mime_type", "status"),
    [
        ("empty.txt", b"", "text/plain", 422),
        ("page.html", HTML, "text/html", 415),
        ("vector.svg", b"<svg/>", "image/svg+xml", 415),
        ("page.png", HTML, "image/png", 415),
        ("page.pdf", HTML, "application/pdf", 415),
        ("sound.webp", b"RIFF....WAVE", "image/webp", 415),
        ("binary.txt", b"a\x00b", "text/plain", 415),
        ("../../etc/passwd", b"abc", "text/plain", 422),
        ("..\\windows", b"abc", "text/plain", 422),
        ("a\nb", b"abc", "text/plain", 422),
        ("x" * 300, b"abc", "text/plain", 422),
    ],
)
def test_what_is_not_taken_is_refused_and_nothing_of_it_kept(
    client: Client, database: Path, strategy: str, name: str, data: bytes, mime_type: str, status: int
) -> None:
    before = stored(database)
    if strategy == "direct":
        response = send_direct(client, name, data, mime_type)
    else:
        params = {"name": name, "size": len(data), "mime_type": mime_type}
        response = client.post("attachments.create", params)
        if response.status_code == 200:
            response = put(client, response.json(), data)
            client.ask("attachments.delete", {"attachment_id": _newest(database)})
    assert response.status_code == status, response.text
    assert response.json().keys() == {"code", "message"}
    assert stored(database) == before


def _newest(database: Path) -> str:
    with sqlite3.connect(database) as db:
        return str(db.execute("SELECT id FROM attachments ORDER BY rowid DESC").fetchone()[0])


def test_a_file_larger_than_is_taken_is_cut_off_whatever_was_announced(tmp_path: Path, model: StandIn) -> None:
    database = tmp_path / "chatkit.db"
    with service(**probing(model, database, MAX_ATTACHMENT_BYTES="1000000")) as client:
        big = b"x" * 3_000_000

        def unannounced() -> Iterator[bytes]:
            for start in range(0, len(big), 100_000):
                yield big[start : start + 100_000]

        announced = create(client, "a.txt", b"x" * 10, "text/plain")
        for attempt in (
            lambda: send_direct(client, "big.txt", big, "text/plain"),
            lambda: put(client, announced, big),
            lambda: put(client, announced, unannounced()),
            lambda: client.post("attachments.create", {"name": "big.txt", "size": len(big), "mime_type": "text/plain"}),
        ):
            with suppress(httpx2.TransportError):  # the answer came, and the connection closed, before all was sent
                assert attempt().status_code == 413
        assert stored(database) == (1, 0)
        assert put(client, announced, b"too short").json()["code"] == "bad_params"
        assert put(client, announced, b"x" * 10).status_code == 200


def test_an_upload_that_breaks_off_leaves_nothing(client: Client, database: Path) -> None:
    before = stored(database)
    with begin_upload(client, length=10_000_000) as connection:
        connection.sendall(b"x" * 600_000)
        eventually(lambda: stored(database)[1] > before[1])
    eventually(lambda: stored(database) == before)


def test_a_form_that_breaks_off_inside_the_file_is_refused(client: Client, database: Path) -> None:
    before = stored(database)
    with begin_upload(client, length=1000) as connection:
        connection.sendall(b"x" * 1000)
        assert connection.recv(1000).startswith(b"HTTP/1.1 422")
    assert stored(database) == before


def begin_upload(client: Client, length: int) -> socket.socket:
    """Return a connection that has begun to send a form of this length, and is inside its file."""
    address = httpx2.URL(client.url)
    connection = socket.create_connection((address.host, address.port))
    part = '--b\r\ncontent-disposition: form-data; name="file"; filename="a.txt"\r\ncontent-type: text/plain\r\n\r\n'
    head = f"POST /attachments HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n"
    connection.sendall(f"{head}content-type: multipart/form-data; boundary=b\r\n\r\n{part}".encode())
    return connection


def test_a_form_without_the_file_or_with_other_things_is_understood(client: Client, database: Path) -> None:
    before = stored(database)
    assert client.http.post("/attachments", files={"other": ("a.txt", b"abc", "text/plain")}).status_code == 422
    assert client.http.post("/attachments", json={}).status_code == 415
    garbage = {"content-type": "multipart/form-data; boundary=b"}
    assert client.http.post("/attachments", content=b"no form at all", headers=garbage).status_code == 422
    assert client.http.post("/attachments", content=b"", headers=garbage).status_code == 422
    assert stored(database) == before
    form = {"data": {"first": "x" * 60_000}, "files": {"file": ("a.txt", b"abc", "text/plain")}}
    assert client.http.post("/api/attachments", **form).json()["name"] == "a.txt"


def test_a_link_fits_one_attachment_and_one_upload_and_ends(client: Client, model: StandIn) -> None:
    first, second = (create(client, name, b"abc", "text/plain") for name in ("a.txt", "b.txt"))
    link = first["upload_descriptor"]["url"]
    for altered in (
        link.replace(first["id"], second["id"]),
        re.sub(r"expires=\d+", f"expires={int(time.time()) + 9999}", link),
        re.sub(r"signature=.", "signature=~", link),
        link.partition("?")[0],
        link.replace("expires=", "expires=x"),
    ):
        response = client.http.put(altered, content=b"abc", headers={"content-type": "text/plain"})
        assert (response.status_code, response.json()["code"]) == (403, "link_refused"), altered
        assert client.http.get(link).status_code == 403  # it uploads, and shows nothing
    assert put(client, first, b"abc", **{"Content-Type": "text/html"}).status_code == 415
    assert put(client, first, b"abc").status_code == 200
    assert put(client, first, b"xyz").json()["code"] == "conflict"


@pytest.mark.anyio
async def test_links_end_after_a_quarter_of_an_hour_and_after_an_hour(tmp_path: Path) -> None:
    clock = [1000.0]
    async with open_store(f"sqlite:///{tmp_path}/db") as store:
        files = Attachments(store, b"k", max_bytes=9, types=["image/png"], max_storage_bytes=0, now=lambda: clock[0])
        params = AttachmentCreateParams(name="a.png", size=9, mime_type="image/png")
        made: Any = await files.create_attachment(params, RequestContext("alice", base_url="http://localhost"))
        for use, link, seconds in (("upload", made.upload_descriptor.url, 900), ("view", made.preview_url, 3600)):
            query = dict(re.findall(r"(\w+)=([^&]+)", str(link)))
            clock[0] = 1000 + seconds
            assert (await files.open_link(use, made.id, **query)).user_id == "alice"
            clock[0] += 1
            with pytest.raises(LinkRefused):
                await files.open_link(use, made.id, **query)


def test_a_file_that_is_not_here_yet_or_was_sent_elsewhere_cannot_be_sent(client: Client) -> None:
    missing = create(client, "a.txt", b"abc", "text/plain")
    response = client.post("threads.create", {"input": message("Look", attachments=[missing["id"]])})
    assert (response.status_code, response.json()["code"]) == (409, "conflict")
    put(client, missing, b"abc")
    thread = thread_of(client.create("Look", attachments=[missing["id"]]))
    assert client.post("threads.create", {"input": message("Look", attachments=[missing["id"]])}).status_code == 409
    assert not errors_of(client.say(thread, "Look again", attachments=[missing["id"]]))


def test_a_users_storage_is_bounded(tmp_path: Path, model: StandIn) -> None:
    with service(**probing(model, tmp_path / "chatkit.db", MAX_STORAGE_BYTES_PER_USER="1000")) as client:
        first = upload(client, "direct", "a.txt", b"x" * 600, "text/plain")
        for response in (
            send_direct(client, "b.txt", b"x" * 600, "text/plain"),
            client.post("attachments.create", {"name": "b.txt", "size": 600, "mime_type": "text/plain"}),
        ):
            assert (response.status_code, response.json()["code"]) == (429, "quota")
            assert response.headers["retry-after"]
        client.ask("attachments.delete", {"attachment_id": first["id"]})
        upload(client, "direct", "b.txt", b"x" * 600, "text/plain")


# --- down ---------------------------------------------------------------------------------------------------------


def test_a_download_runs_nothing_and_tells_nobody(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    image = upload(client, "direct", 'do"t ü.png', PNG, "image/png")
    response = client.http.get(image["preview_url"])
    assert response.headers["content-type"] == "image/png"
    assert response.headers["content-disposition"] == "inline; filename*=UTF-8''do%22t%20%C3%BC.png"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert "signature" not in caplog.text


def test_what_is_no_image_is_never_shown_inline(client: Client, taking: Client) -> None:
    text = upload(client, "direct", "a.txt", HTML, "text/plain")
    image = upload(client, "direct", "a.png", PNG, "image/png")
    signed = image["preview_url"].replace(image["id"], text["id"])
    assert client.http.get(signed).status_code == 403


def test_a_part_of_a_file_can_be_asked_for(client: Client) -> None:
    data = PNG + bytes(range(256)) * 4000
    link = upload(client, "direct", "a.png", data, "image/png")["preview_url"]
    for asked, expected in [
        ("bytes=0-9", data[:10]),
        ("bytes=262140-262150", data[262140:262151]),
        ("bytes=1000000-", data[1000000:]),
        ("bytes=-5", data[-5:]),
        ("bytes=5-99999999", data[5:]),
    ]:
        part = client.http.get(link, headers={"range": asked})
        assert (part.status_code, part.content) == (206, expected), asked
        assert part.headers["content-range"].endswith(f"/{len(data)}")
    for ignored in ("bytes=a-b", "bytes=0-1,3-4", "lines=1-2"):
        whole = client.http.get(link, headers={"range": ignored})
        assert (whole.status_code, whole.content) == (200, data), ignored
    for beyond in (f"bytes={len(data)}-", "bytes=-0"):
        refused = client.http.get(link, headers={"range": beyond})
        assert (refused.status_code, refused.json()["code"]) == (416, "bad_range"), beyond
        assert refused.headers["content-range"] == f"bytes */{len(data)}"


def test_what_the_service_notes_of_a_file_is_not_shown(client: Client) -> None:
    announced = create(client, "a.txt", b"abc", "text/plain")
    assert put(client, announced, b"abc").status_code == 200
    direct = upload(client, "direct", "b.txt", b"abc", "text/plain")
    events = client.create("Read", attachments=[announced["id"], direct["id"]])
    shown = [*client.items(thread_of(events))[0]["attachments"], *fold(events)[0]["attachments"], announced, direct]
    assert not [attachment for attachment in shown if "metadata" in attachment]


def test_every_answer_has_a_fresh_link(client: Client) -> None:
    image = upload(client, "direct", "a.png", PNG, "image/png")
    events = client.create("Look", attachments=[image["id"]])
    thread = thread_of(events)
    eventually(lambda: int(time.time()) > int(re.search(r"expires=(\d+)", image["preview_url"]).group(1)) - 3600 + 1)
    got = client.ask("threads.get_by_id", {"thread_id": thread})["items"]["data"][0]
    listed = client.items(thread)[0]
    for item in (got, listed):
        [attachment] = item["attachments"]
        assert attachment["preview_url"] > image["preview_url"]
        assert client.http.get(attachment["preview_url"]).content == PNG
    assert "urn:" not in str(events)


def test_links_begin_with_the_public_address(tmp_path: Path, model: StandIn) -> None:
    environ = probing(model, tmp_path / "chatkit.db", PUBLIC_URL="https://chat.example/base")
    with service(**environ) as client:
        image = upload(client, "direct", "a.png", PNG, "image/png")
        assert image["preview_url"].startswith(f"https://chat.example/base/attachments/{image['id']}?")


@pytest.mark.anyio
async def test_an_image_of_the_models_is_kept_whatever_users_may_upload(tmp_path: Path) -> None:
    alice, thread = RequestContext("alice"), ThreadMetadata(id="thr_1", created_at=datetime.now(UTC))
    async with open_store(f"sqlite:///{tmp_path}/db") as store:
        files = Attachments(store, b"k", max_bytes=9, types=["text/plain"], max_storage_bytes=len(PNG))
        await store.save_thread(thread, alice)
        images = KeptImages(files, store, thread.id, alice)
        kept = kept_id(await images.base64_image_to_url("image", base64.b64encode(PNG).decode()))
        assert await files.read_all(kept, alice) == PNG
        with pytest.raises(QuotaExceeded):
            await images.base64_image_to_url("another", base64.b64encode(PNG).decode())


@pytest.mark.anyio
async def test_a_kept_image_is_its_threads_from_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alice, thread = RequestContext("alice"), ThreadMetadata(id="thr_1", created_at=datetime.now(UTC))
    async with open_store(f"sqlite:///{tmp_path}/db") as store:
        files = Attachments(store, b"k", max_bytes=9, types=["text/plain"], max_storage_bytes=0)
        await store.save_thread(thread, alice)
        for number in range(MAX_UNSENT):
            unsent = FileAttachment(id=f"atc_{number}", name="a", mime_type="text/plain")
            await store.reserve_attachment(unsent, 1, 0, alice)
        images, finish, threads = KeptImages(files, store, thread.id, alice), store.finish_upload, []

        async def finish_noting(attachment_id: str, upload: str, context: RequestContext) -> None:
            threads.append((await store.load_attachment(attachment_id, context)).thread_id)
            await finish(attachment_id, upload, context)

        monkeypatch.setattr(store, "finish_upload", finish_noting)
        drawn = [
            kept_id(await images.base64_image_to_url("image", base64.b64encode(PNG).decode(), partial))
            for partial in (0, 1, None)
        ]
        assert threads == ["thr_1"] * 3
        for shown in drawn:  # a draft stays for as long as something may still name it
            assert await files.read_all(shown, alice) == PNG
        await images.delete_superseded()
        for draft in drawn[:-1]:
            with pytest.raises(NotFoundError):
                await store.load_attachment(draft, alice)
        assert await files.read_all(drawn[-1], alice) == PNG


# --- dictation ----------------------------------------------------------------------------------------------------


def test_what_was_said_becomes_text_and_is_not_stored(client: Client, model: StandIn, database: Path) -> None:
    with sqlite3.connect(database) as db:
        before = list(db.iterdump())
    spoken = base64.b64encode(b"some audio").decode()
    for mime_type, name in [("audio/webm;codecs=opus", "speech.webm"), ("audio/mp4", "speech.mp4")]:
        answer = client.ask("input.transcribe", {"audio_base64": spoken, "mime_type": mime_type})
        assert answer == {"text": "I heard 10 bytes."}
        assert model.heard == b"some audio"
        assert model.asked[-1].body["name"] == name
        assert model.asked[-1].body["model"] == "gpt-4o-transcribe"
    with sqlite3.connect(database) as db:
        assert list(db.iterdump()) == before


def test_dictation_without_a_model_and_with_a_failing_one_says_so(
    client: Client, model: StandIn, tmp_path: Path
) -> None:
    params = {"audio_base64": "AAAA", "mime_type": "audio/ogg"}
    model.fails = Fail(401, "invalid_api_key")
    response = client.post("input.transcribe", params)
    assert (response.status_code, response.json()["code"]) == (502, "model_failed")
    assert "key" in response.json()["message"]
    with service(DATABASE_URL=f"sqlite:///{tmp_path}/db") as offline:
        assert offline.post("input.transcribe", params).json()["code"] == "not_configured"
        long = {**params, "audio_base64": "A" * 2 * 1024 * 1024}
        assert offline.post("input.transcribe", long).json()["code"] == "too_large"


@pytest.mark.parametrize(
    "transcript", [b"", b"not JSON", b"null", b"[]", b"{}", b'{"text": null}', b'{"text": 7}'], ids=str
)
def test_an_answer_of_the_audio_api_that_is_no_text_is_the_models_failure(
    client: Client, model: StandIn, transcript: bytes
) -> None:
    model.transcript = transcript
    response = client.post("input.transcribe", {"audio_base64": "AAAA", "mime_type": "audio/ogg"})
    assert (response.status_code, response.json()["code"]) == (502, "model_failed")
    assert response.json()["message"] == "The model's answer could not be read. Try again."


def test_half_of_a_letter_in_what_was_heard_is_mended(client: Client, model: StandIn) -> None:
    model.transcript = b'{"text": "so \\ud83d far"}'
    heard = client.ask("input.transcribe", {"audio_base64": "AAAA", "mime_type": "audio/ogg"})
    assert heard == {"text": "so \N{REPLACEMENT CHARACTER} far"}


# --- forms --------------------------------------------------------------------------------------------------------


def test_a_form_with_a_boundary_longer_than_any_is_refused(client: Client) -> None:
    form = {"content-type": f"multipart/form-data; boundary={'B' * 300}"}
    response = client.http.post("/attachments", content=b"", headers=form)
    assert (response.status_code, response.json()["code"]) == (422, "bad_params")


def test_a_form_has_little_before_its_file(client: Client) -> None:
    def posted(before: int) -> Any:
        parts = [("note", (None, "x" * before)), ("file", ("a.txt", b"Hello", "text/plain"))]
        return client.http.post("/attachments", files=parts)

    assert posted(60 * 1024).status_code == 200
    response = posted(1024 * 1024)
    assert (response.status_code, response.json()["code"]) == (422, "bad_params")
    assert "Put that first." in response.json()["message"]


def test_without_a_link_nobody_learns_which_attachments_there_are(client: Client) -> None:
    announced = {"name": "a.png", "size": 9, "mime_type": "image/png"}
    there = client.ask("attachments.create", announced)["id"]
    for query in ("", "?expires=1", "?expires=9999999999&signature=x", "?expires=9999999999&signature=x.y"):
        answers = [client.http.get(f"/attachments/{which}{query}") for which in (there, "atc_none")]
        assert [answer.status_code for answer in answers] == [403, 403]
        assert answers[0].content == answers[1].content


@pytest.mark.anyio
async def test_a_link_to_what_is_anothers_says_what_one_to_nothing_says(tmp_path: Path) -> None:
    async with open_store(f"sqlite:///{tmp_path}/db") as store:
        files = Attachments(store, b"k", max_bytes=9, types=["image/png"], max_storage_bytes=0)
        params = AttachmentCreateParams(name="a.png", size=9, mime_type="image/png")
        made: Any = await files.create_attachment(params, RequestContext("alice", base_url="http://localhost"))
        for attachment in (made, made.model_copy(update={"id": "atc_none"})):
            shown: Any = files.present(attachment, RequestContext("mallory", base_url="http://localhost"))
            query = dict(re.findall(r"(\w+)=([^&]+)", str(shown.preview_url)))
            with pytest.raises(NotFoundError):
                await files.open_link("view", attachment.id, **query)


@pytest.mark.anyio
async def test_nothing_is_reserved_where_no_link_can_be_made(tmp_path: Path) -> None:
    nowhere = RequestContext("alice", base_url="http://256.1.1.1")
    announced = AttachmentCreateParams(name="a.txt", size=3, mime_type="text/plain")
    async with open_store(f"sqlite:///{tmp_path}/db") as store:
        files = Attachments(store, b"k", max_bytes=9, types=["text/plain"], max_storage_bytes=9)
        with pytest.raises(ValueError, match="invalid IPv4 address"):
            await files.create_attachment(announced, nowhere)
        assert await store.load_attachments("", 9, nowhere) == []
