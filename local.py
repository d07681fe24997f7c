"""Without login every request is the one local user, so that only this machine's own pages and programs may ask."""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from settings import SettingsError, is_loopback, origin_of
from sockets import listening_hosts

log = logging.getLogger("service.local")

WATCH_SECONDS = 0.5

NO_LOGIN = (
    "HOST={host} lets other machines in, and without JWKS_URL everybody is the same user. Set JWKS_URL and JWT_ISSUER,"
    " or ALLOW_ANONYMOUS=1 if whoever reaches the service may share that user."
)


class Forbidden(Exception):
    """The request comes from where a process without login takes none. `message` says what to set."""

    def __init__(self, message: str):
        super().__init__(message)
        self.message = message


class LocalAccess:
    """Tells whether a request may be the local user's. A page on the web must not reach a prototype by its author's
    browser: not under a name of its own that it points at this machine (DNS rebinding), and not from its own origin.
    """

    def __init__(self, allowed_origins: Collection[str], public_url: str | None, *, allow_anonymous: bool):
        self._origins = {*allowed_origins, *([origin_of(public_url)] if public_url else [])}
        self._public_host = urlsplit(public_url).hostname if public_url else None
        self._allow_anonymous = allow_anonymous
        self._warned: set[str] = set()

    def require(
        self,
        *,
        host: str,
        origin: str | None,
        scheme: str,
        server_address: str | None,
        client_address: str | None,
        forwarded_for: Sequence[str],
    ) -> None:
        """Raise `Forbidden` unless these headers, and the address that the request arrived at, are a local one's.

        `forwarded_for` are the values of `X-Forwarded-For`, also those that the server does not believe: whoever says
        that a request comes from elsewhere is taken at their word.
        """
        if forwarded_for:
            self._warn("a proxy passes requests on (X-Forwarded-For), but without JWKS_URL everybody is the same user")
        is_unix_socket = (server_address or "").startswith("/")  # reached by this machine's programs only
        if server_address and not (is_unix_socket or is_loopback(server_address) or self._allow_anonymous):
            self._warn(f"refused requests to {server_address}: set JWKS_URL and JWT_ISSUER, or ALLOW_ANONYMOUS=1")
            raise Forbidden("This service has no login configured, and takes requests from its own machine only.")
        addresses = [address.strip() for value in forwarded_for for address in value.split(",")]
        if client_address:
            addresses.append(client_address)
        if not (all(map(is_loopback, addresses)) or self._allow_anonymous):
            self._warn("refused requests that a proxy passed on: set JWKS_URL and JWT_ISSUER, or ALLOW_ANONYMOUS=1")
            raise Forbidden("This service has no login configured, and takes requests from its own machine only.")
        name = urlsplit(f"//{host}").hostname or ""
        if not is_loopback(name) and name != self._public_host:
            self._warn(f"refused the Host {name!a:.100}: set PUBLIC_URL if this is where your users find the service")
            raise Forbidden("This service is not known under this host name. Set PUBLIC_URL to the address you use.")
        if origin is not None and origin not in self._origins and origin != f"{scheme}://{host}":
            self._warn(f"refused the Origin {origin!a:.100}: set ALLOWED_ORIGINS if this page is yours")
            raise Forbidden("Pages of this origin may not call the service. Add it to ALLOWED_ORIGINS if it is yours.")

    def _warn(self, message: str) -> None:
        """Log once: such requests come in numbers."""
        if message not in self._warned and len(self._warned) < 100:
            self._warned.add(message)
            log.warning("%s", message)


@asynccontextmanager
async def loopback_only() -> AsyncIterator[None]:
    """End the process when it listens beyond loopback without login, whichever server was told to listen there.

    A socket that was handed over is there already; one that the server binds comes after the start, however long that
    takes, so that the watch goes on.
    """
    require_loopback(listening_hosts())

    async def watch() -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                require_loopback(listening_hosts())
            except SettingsError as error:
                log.critical("%s", error)
                signal.raise_signal(signal.SIGTERM)
                return

    watching = asyncio.create_task(watch(), name="loopback only")
    try:
        yield
    finally:
        watching.cancel()


def require_loopback(hosts: Iterable[str]) -> None:
    """Raise `SettingsError` naming the first of these hosts that other machines can reach."""
    for host in hosts:
        if not is_loopback(host):
            raise SettingsError([NO_LOGIN.format(host=host)])
