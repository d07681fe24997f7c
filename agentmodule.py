"""The module that the user of this service writes, as the service sees it."""

import importlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Self

from agents import Agent
from chatkit.types import SyncCustomActionResponse, ThreadStreamEvent

from context import RequestContext
from history import DescribeTag


@dataclass(frozen=True)
class AgentModule:
    """The module's functions; only the first is needed."""

    create_agent: Callable[[RequestContext], Agent[Any] | Awaitable[Agent[Any]]]
    handle_action: Callable[..., AsyncIterator[ThreadStreamEvent]] | None = None
    handle_sync_action: Callable[..., Awaitable[SyncCustomActionResponse]] | None = None
    describe_tag: DescribeTag | None = None

    @classmethod
    def load(cls, name: str) -> Self:
        """Import `module` or `module:function`; raise `ImportError` that says what is missing."""
        module_name, _, function = name.partition(":")
        module = importlib.import_module(module_name)
        create_agent = getattr(module, function or "create_agent", None)
        if not callable(create_agent):
            raise ImportError(f"AGENT={name}: the module has no function {function or 'create_agent'}(context).")
        optional = ("handle_action", "handle_sync_action", "describe_tag")
        return cls(create_agent, **{each: getattr(module, each, None) for each in optional})
