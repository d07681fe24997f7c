"""Who is asking: handed to every layer below the HTTP routes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LOCAL_USER = "local"
"""The one user of a process without login."""


@dataclass(frozen=True)
class RequestContext:
    """One request by one user. Only `user_id` decides what the request may see."""

    user_id: str
    claims: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The verified token's claims, as its issuer names them; empty without login."""
    locale: str | None = None
    """The client's first `Accept-Language` tag, such as `de-CH`."""
    request_id: str = ""
    """Stands in the log, in the `x-request-id` header, and in the call to the model."""
    base_url: str = ""
    """Where the client finds this service, for links in its answers."""
    bearer_token: str | None = field(default=None, repr=False, compare=False)
    """The verified token itself, for tool servers that are to see it."""
    lease: str | None = field(default=None, repr=False, compare=False)
    """Set while a turn runs: the store then refuses this request's writes to a thread that another turn has taken."""
    loaded_threads: dict[str, dict[str, str | None]] = field(default_factory=dict, repr=False, compare=False)
    """Threads' columns as this request last read or wrote them, by id: `save_thread` writes only what differs."""
