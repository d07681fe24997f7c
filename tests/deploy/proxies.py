"""Real proxies before the service, with the files and the examples that are given to operators; ports are ours."""

import ipaddress
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from documents import blocks_of
from service import ROOT, Client, eventually, free_port, is_reachable, tls_trusting

DOCUMENT = (ROOT / "docs" / "proxies.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Site:
    """What a proxy is told. `folder` has the certificate (`cert.pem`, `key.pem`, `both.pem`), and takes its files."""

    folder: Path
    port: int
    service: str
    frontend: str
    timeout_seconds: int | None = None
    """In place of what the operators' files say; None leaves that as it is."""
    under_prefix: bool = False
    """Whether the service stands under /chat too, as the document's last example has it (nginx)."""

    def placed(self, text: str, *more: tuple[str, str]) -> str:
        """Return the text with its addresses replaced; each replacement must find something."""
        for old, new in (("127.0.0.1:8000", self.service), ("127.0.0.1:3000", self.frontend), *more):
            assert old in text, f"{old!r} is not there to be replaced"
            text = text.replace(old, new)
        return text


def nginx(site: Site) -> list[str | Path]:
    timeout = "proxy_read_timeout 10m"
    plain = free_port()
    conf = (ROOT / "deploy" / "nginx.conf").read_text(encoding="utf-8")
    for old, new in (
        ("    listen [::]:80;\n", ""),
        ("    listen [::]:443 ssl http2;\n", ""),
        ("listen 80;", f"listen 127.0.0.1:{plain};"),
        ("listen 443 ", f"listen 127.0.0.1:{site.port} "),
        ("/etc/nginx/tls/fullchain.pem", str(site.folder / "cert.pem")),
        ("/etc/nginx/tls/privkey.pem", str(site.folder / "key.pem")),
        (timeout, f"proxy_read_timeout {site.timeout_seconds}s" if site.timeout_seconds else timeout),
    ):
        assert old in conf
        conf = conf.replace(old, new)
    if site.under_prefix:
        [prefix] = blocks_of(DOCUMENT, "nginx")
        conf = conf.replace("    # The operator's.", prefix + "    # The operator's.")
    assert "/var/log/nginx/access.log" in conf
    conf = conf.replace("/var/log/nginx/access.log", str(site.folder / "access.log"))
    upstreams = site.placed((ROOT / "deploy" / "nginx-upstreams.conf").read_text(encoding="utf-8"))
    places = "".join(
        f"{kind}_temp_path {site.folder / kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;\n" if os.getuid() == 0 else ""
    main = site.folder / "nginx.conf"
    main.write_text(
        f"{user}daemon off;\npid {site.folder / 'pid'};\nevents {{}}\n"
        f"http {{\naccess_log {site.folder / 'access.log'};\n{places}"
        f"{conf}\n{upstreams}}}\n"
    )
    return [_program("nginx"), "-c", main, "-e", "stderr"]


def caddy(site: Site) -> list[str | Path]:
    [given] = blocks_of(DOCUMENT, "caddy")
    tls = f"tls {site.folder / 'cert.pem'} {site.folder / 'key.pem'}"
    text = site.placed(
        given,
        ("{\n\tlog default", "{\n\tadmin off\n\tauto_https off\n\tdefault_sni 127.0.0.1\n\tlog default"),
        ("chat.example.com {\n", f"https://127.0.0.1:{site.port} {{\n\tlog\n\t{tls}\n"),
    )
    file = site.folder / "Caddyfile"
    file.write_text(text)
    return [_program("caddy"), "run", "--config", file, "--adapter", "caddyfile"]


def haproxy(site: Site) -> list[str | Path]:
    [given] = blocks_of(DOCUMENT, "haproxy")
    text = site.placed(
        given,
        ("bind :443", f"bind 127.0.0.1:{site.port}"),
        ("/etc/haproxy/chatkit.pem", str(site.folder / "both.pem")),
        ("log /dev/log local0", "log stdout format raw local0"),
        ("timeout client 1m", f"timeout client {site.timeout_seconds or 60}s"),
        ("timeout server 1m", f"timeout server {site.timeout_seconds or 60}s"),
    )
    file = site.folder / "haproxy.cfg"
    file.write_text(text)
    return [_program("haproxy"), "-db", "-f", file]


def apache(site: Site) -> list[str | Path]:
    [given] = blocks_of(DOCUMENT, "apache")
    text = site.placed(
        given,
        ("*:443", f"127.0.0.1:{site.port}"),
        ("/etc/apache2/chatkit/fullchain.pem", str(site.folder / "cert.pem")),
        ("/etc/apache2/chatkit/privkey.pem", str(site.folder / "key.pem")),
        ("/var/log/apache2/chatkit.log", str(site.folder / "access.log")),
        ("ProxyTimeout 60", f"ProxyTimeout {site.timeout_seconds or 60}"),
    )
    modules = ("mpm_event", "authz_core", "socache_shmcb", "ssl", "http2", "headers", "proxy", "proxy_http")
    loaded = "".join(f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so\n" for name in modules)
    user = "User www-data\nGroup www-data\n" if os.getuid() == 0 else ""
    file = site.folder / "apache.conf"
    file.write_text(
        f"{loaded}{user}ServerRoot {site.folder}\nDefaultRuntimeDir {site.folder}\nPidFile {site.folder / 'pid'}\n"
        f"Mutex file:{site.folder}\nServerName 127.0.0.1\nErrorLog /dev/stderr\nListen 127.0.0.1:{site.port}\n{text}"
    )
    return [_program("apache2"), "-f", file, "-DFOREGROUND"]


PROXIES: dict[str, Callable[[Site], list[str | Path]]] = {
    "nginx": nginx,
    "caddy": caddy,
    "haproxy": haproxy,
    "apache": apache,
}


@contextmanager
def proxy(
    name: str,
    folder: Path,
    service: Client,
    frontend: str,
    *,
    timeout_seconds: int | None = None,
    under_prefix: bool = False,
) -> Iterator[Client]:
    """Run the proxy before the two, and yield a client of its address."""
    port = free_port()
    _write_certificate(folder)
    addresses = (service.url.removeprefix("http://"), frontend.removeprefix("http://"))
    site = Site(folder, port, *addresses, timeout_seconds, under_prefix)
    command = PROXIES[name](site)
    environ = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    with (folder / "log").open("wb") as log:
        running = subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log)
    try:
        client = Client(f"https://127.0.0.1:{port}", tls=tls_trusting(folder / "cert.pem"))

        def up() -> bool:
            assert running.poll() is None, f"{name} ended:\n{(folder / 'log').read_text()}"
            return is_reachable(client)

        eventually(up, 30, f"the start of {name}")
        yield client
        client.close()
    finally:
        running.terminate()
        running.wait(20)


def _program(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    assert found, f"{name} is missing. On Debian: apt-get install {name}"
    return found


@cache
def _certificate() -> tuple[bytes, bytes]:
    """Return a certificate of 127.0.0.1 and its key, both as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
    encoding, none = serialization.Encoding.PEM, serialization.NoEncryption()
    return certificate.public_bytes(encoding), key.private_bytes(
        encoding, serialization.PrivateFormat.TraditionalOpenSSL, none
    )


def _write_certificate(folder: Path) -> None:
    certificate, key = _certificate()
    for name, data in {"cert.pem": certificate, "key.pem": key, "both.pem": certificate + key}.items():
        (folder / name).write_bytes(data)
