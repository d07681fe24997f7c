"""The nginx of the README before services of the tests."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2

from service import ROOT, eventually, free_port


@contextmanager
def nginx(folder: Path, ports: Sequence[int]) -> Iterator[str]:
    """Run it as "When one machine is not enough" has it, before services on these ports; yield its address.

    Each answer names in `x-replica` who gave it.
    """
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    assert program, "nginx is missing. On Debian: apt-get install nginx"
    port = free_port()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^```\n(upstream chatkit .*?)^```", readme, re.MULTILINE | re.DOTALL)
    servers = " ".join(f"server 127.0.0.1:{port};" for port in ports)
    block, replaced = re.subn(r"(server 10[.0-9]+:8000; ?)+", f"{servers} ", block)
    assert replaced == 1
    block = block.replace(
        "server {", f"server {{\n    listen 127.0.0.1:{port};\n    add_header x-replica $upstream_addr always;"
    )
    temporary = " ".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root; " if os.getuid() == 0 else ""  # the folder is ours alone
    configuration = folder / "nginx.conf"
    configuration.write_text(
        f"{user}daemon off; pid {folder}/nginx.pid; error_log stderr; worker_processes 1; events {{}}\n"
        f"http {{ access_log {folder}/access.log; {temporary}\n{block}}}\n"
    )
    with (folder / "nginx.log").open("wb") as log:
        running = subprocess.Popen(
            [program, "-p", folder, "-c", configuration, "-e", "stderr"], stderr=log, env={"PATH": os.environ["PATH"]}
        )
    try:
        url = f"http://127.0.0.1:{port}"
        eventually(lambda: _answers(url), what="the start of nginx")
        yield url
    finally:
        running.terminate()
        running.wait(10)


def _answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/healthz", trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False
