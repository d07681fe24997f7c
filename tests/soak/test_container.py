"""The image: built by the README's command on a base that is made here, and run as docs/operations.md says."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from documents import blocks_of
from service import ROOT, Client, eventually, free_port, is_up, thread_of

pytestmark = pytest.mark.soak

BASE = "localhost/python-of-debian:bookworm"
IMAGE = "localhost/chatkit:soak"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


def run(*command: str | Path, check: bool = True) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 or not check, f"{command}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout.strip()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small Debian with Python 3.11, in the place of `python:slim`, which needs a registry. It is kept."""
    if BASE not in run("buildah", "images", "--format", "{{.Name}}:{{.Tag}}"):
        root = tmp_path_factory.mktemp("base") / "root"
        packages = "--include=python3,python3-venv,python3-pip,ca-certificates"
        run("debootstrap", "--variant=minbase", packages, "bookworm", root)
        run("bash", "-c", f"rm -rf {root}/var/cache/apt/archives/*.deb {root}/var/lib/apt/lists/*")
        run("tar", "-C", root, "-cf", root.parent / "base.tar", ".")
        made = run("buildah", "from", "scratch")
        run("buildah", "add", "--quiet", made, root.parent / "base.tar", "/")
        run("buildah", "commit", "--quiet", "--rm", made, BASE)
    return BASE


@pytest.fixture(scope="module")
def image(base: str) -> str:
    certificates = f"{CERTIFICATES}:{CERTIFICATES}:ro"  # of whatever stands between this machine and the registries
    options = ["--isolation", "chroot", "--network", "host", "--volume", certificates, "--build-arg", f"BASE={base}"]
    run("buildah", "build", "--quiet", "--format", "docker", *options, "-t", IMAGE, ROOT)
    return IMAGE


@pytest.fixture
def podman(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    limits = '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]\n'
    (tmp_path / "containers.conf").write_text(limits)
    monkeypatch.setenv("CONTAINERS_CONF", str(tmp_path / "containers.conf"))
    return ["podman", "--runtime", "runc"]


class Container(Client):
    def __init__(self, podman: list[str], name: str, port: int):
        super().__init__(f"http://127.0.0.1:{port}")
        self.name = name
        self._podman = podman

    def podman(self, *arguments: str, check: bool = True) -> str:
        return run(*self._podman, *arguments, check=check)

    def python(self, code: str) -> str:
        return self.podman("exec", self.name, "/venv/bin/python", "-c", code)

    def wait(self) -> None:
        eventually(lambda: is_up(self), 60, "the readiness of the container")


@pytest.fixture
def container(image: str, podman: list[str], tmp_path: Path) -> Iterator[Container]:
    """The container as docs/operations.md runs it, but on this machine's network, with a port of ours."""
    document = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    [command] = [block for block in blocks_of(document) if "podman run -d --name chatkit" in block]
    words = command.partition("podman run")[2].replace("\\\n", " ").split()
    hardened = [word for word in words if word in ("--read-only", "--cap-drop=all", "--security-opt=no-new-privileges")]
    assert len(hardened) == 3
    name = f"chatkit-{os.getpid()}"
    port = free_port()
    options = ["--network", "host", "--no-healthcheck", "--read-only-tmpfs=false", "--volume", f"{name}:/data"]
    environ = ["-e", f"PORT={port}", "-e", "ALLOW_ANONYMOUS=1", "-e", "HOST=127.0.0.1"]
    run(*podman, "run", "-d", "--name", name, *hardened, *options, *environ, image)
    started = Container(podman, name, port)
    try:
        started.wait()
        yield started
    finally:
        started.podman("rm", "--force", "--time", "0", name, check=False)
        started.podman("volume", "rm", name, check=False)


def test_the_image_has_a_user_a_volume_a_health_check_and_labels(image: str) -> None:
    [found] = json.loads(run("podman", "image", "inspect", image))
    config = found["Config"]
    assert config["User"] == "10001:10001"
    assert config["Volumes"] == {"/data": {}}
    assert found["Healthcheck"]["Test"][:2] == ["CMD", "/venv/bin/python"]
    assert config["Labels"]["org.opencontainers.image.title"] == "chatkit-service"
    assert not any("sh" in word.split("/") for word in [*config["Entrypoint"], *config["Cmd"]])


def test_the_images_size_is_the_readmes(image: str, base: str) -> None:
    whole, below = (
        int(run("podman", "image", "inspect", "--format", "{{.Size}}", each)) / 1e6 for each in (image, base)
    )
    print(f"\nthe image: {whole:.0f} MB, of which its base: {below:.0f} MB")
    [said] = re.findall(r"adds (\d+) MB to its base", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert abs(whole - below - int(said)) < 10


def test_it_talks_as_a_user_of_its_own_on_a_system_that_it_cannot_write(container: Container) -> None:
    assert container.create("Hello")
    assert container.python("import os; print(os.getuid())") == "10001"
    tried = "import os\nfor d in ('/', '/app', '/venv', '/tmp', '/data'): print(d, os.access(d, os.W_OK))"
    assert container.python(tried).split() == [
        "/",
        "False",
        "/app",
        "False",
        "/venv",
        "False",
        "/tmp",
        "False",
        "/data",
        "True",
    ]


def test_its_health_check_says_that_it_is_up_and_that_it_is_not(container: Container) -> None:
    [found] = json.loads(run("podman", "image", "inspect", IMAGE))
    command = found["Healthcheck"]["Test"][1:]
    container.podman("exec", container.name, *command)
    gone = [*container._podman, "exec", "-e", "PORT=9", container.name, *command]
    assert subprocess.run(gone, capture_output=True, check=False).returncode == 1


def test_it_stops_within_its_grace_and_keeps_its_data(container: Container) -> None:
    thread_id = thread_of(container.create("Remember this"))
    container.podman("stop", "--time", "30", container.name)
    assert container.podman("inspect", "--format", "{{.State.ExitCode}}", container.name) == "0"
    container.podman("start", container.name)
    container.wait()
    assert container.thread_ids() == [thread_id]


def test_a_killed_container_keeps_its_data(container: Container) -> None:
    thread_id = thread_of(container.create("Remember this"))
    container.podman("kill", "--signal", signal.SIGKILL.name, container.name)
    container.podman("wait", container.name)
    container.podman("start", container.name)
    container.wait()
    assert container.thread_ids() == [thread_id]
