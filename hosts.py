"""What a request's `Host` header must be before anything makes an address of it."""

import re
from ipaddress import IPv6Address

from pydantic import AnyUrl, TypeAdapter
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from answers import answer

_address = TypeAdapter(AnyUrl)
"""What links are made as, which refuses hosts that the grammar allows: `256.1.1.1`, `%2f`, `xn--a`."""


class OneHost:
    """Refuses a request whose `Host` is not one host name or address."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hosts = Headers(scope=scope).getlist("host") if scope["type"] == "http" else []
        if len(hosts) > 1 or not all(map(is_host, hosts)):  # all that makes an address of it would fail, anywhere
            refused = answer(
                400, "bad_host", "The Host header must be one host name or address, with or without a port."
            )
            await refused(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def is_host(host: str) -> bool:
    """Whether a `Host` header can name a host (RFC 9110 §7.2); an empty one names none, and is one all the same."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|[\w.~%-]*)(?::(\d{0,5}))?", host, re.ASCII)
    if match is None or int(match[2] or 0) > 65535:
        return False
    try:
        if match[1] is not None:
            return bool(IPv6Address(match[1]))
        return not host or bool(_address.validate_python(f"http://{host}"))
    except ValueError:
        return False
