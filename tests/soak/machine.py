"""A machine to boot: this one's own root with a throwaway layer on top, systemd as its first process."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service import eventually

TARGET = "[Unit]\nRequires=basic.target\nAfter=basic.target\nAllowIsolate=yes\n"


class Machine:
    """`root` is its file system as seen from here; `run` runs a command in it. Its network is this machine's."""

    def __init__(self, root: Path, first: int):
        self.root = root
        self._enter = ["nsenter", "-t", str(first), "-m", "-u", "-i", "-p", "env", "PATH=/usr/bin:/bin:/usr/sbin:/sbin"]

    def run(self, command: str, *, check: bool = True) -> str:
        """Return what the command says on standard output."""
        ended = subprocess.run([*self._enter, "bash", "-ec", command], capture_output=True, text=True, check=False)
        assert ended.returncode == 0 or not check, f"{command}\n{ended.stdout}{ended.stderr}\n{self.journal()}"
        return ended.stdout.strip()

    def journal(self) -> str:
        return self.run("journalctl --quiet --no-pager --lines=60", check=False)


@contextmanager
def booted() -> Iterator[Machine]:
    """Boot into systemd's basic target, with none of the services that this machine has beside."""
    with _layered() as root:
        (root / "etc" / "machine-id").write_text("")
        (root / "etc/systemd/system/machine.target").write_text(TARGET)
        command = [
            "systemd-nspawn",
            "-q",
            "-D",
            root,
            "--register=no",
            "--keep-unit",
            "-b",
            "systemd.unit=machine.target",
        ]
        with (root.parent / "log").open("wb") as log:
            nspawn = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            machine = Machine(root, eventually(lambda: _first_process(nspawn.pid), 30, "the first process"))
            state = "systemctl is-system-running || true"
            eventually(lambda: machine.run(state, check=False) in ("running", "degraded"), 60, "the boot")
            yield machine
        finally:
            nspawn.send_signal(signal.SIGTERM)  # an orderly shutdown
            try:
                nspawn.wait(60)
            except subprocess.TimeoutExpired:
                nspawn.kill()
                nspawn.wait()


@contextmanager
def _layered() -> Iterator[Path]:
    """Yield a view of `/` whose changes are kept in memory, and then forgotten."""
    assert os.getuid() == 0, "Booting a machine needs root."
    with tempfile.TemporaryDirectory(prefix="machine-") as folder:
        layer = Path(folder)
        _run("mount", "-t", "tmpfs", "tmpfs", layer)
        try:
            for name in ("upper", "work", "root"):
                (layer / name).mkdir()
            layers = f"lowerdir=/,upperdir={layer / 'upper'},workdir={layer / 'work'}"
            _run("mount", "-t", "overlay", "overlay", "-o", layers, layer / "root")
            try:
                yield layer / "root"
            finally:
                _run("umount", layer / "root")
        finally:
            _run("umount", layer)


def _first_process(nspawn: int) -> int | None:
    """Return the id of the machine's first process, once that is systemd."""
    for child in Path(f"/proc/{nspawn}/task/{nspawn}/children").read_text(encoding="utf-8").split():
        if Path(f"/proc/{child}/comm").read_text(encoding="utf-8") == "systemd\n":
            return int(child)
    return None


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True)


def copy_code(source: Path, destination: Path) -> None:
    """Copy what a clone would have."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=source, capture_output=True, check=True).stdout.decode()
    for name in filter(None, tracked.split("\0")):
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, destination / name)
