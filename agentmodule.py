"""The module that the user of this service writes, as the service sees it."""

import importlib
import traceback
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
    handle_sync_action: Callable[..., SyncCustomActionResponse | Awaitable[SyncCustomActionResponse]] | None = None
    describe_tag: DescribeTag | None = None

    @classmethod
    def load(cls, name: str) -> Self:
        """Import `module` or `module:function`; raise `ImportError` that says what is missing or wrong, and where."""
        module_name, _, function = name.partition(":")
        try:
            module = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:  # it is the user's code, and may raise anything
            raise ImportError(f"AGENT={name}: {_what_is_wrong(module_name, error)}") from error
        create_agent = getattr(module, function or "create_agent", None)
        if not callable(create_agent):
            raise ImportError(f"AGENT={name}: the module has no function {function or 'create_agent'}(context).")
        optional = ("handle_action", "handle_sync_action", "describe_tag")
        return cls(create_agent, **{each: getattr(module, each, None) for each in optional})


def _what_is_wrong(module_name: str, error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
        return f"there is no module {error.name}. It must be beside app.py, or in a folder that PYTHONPATH names."
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}."
    last = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in last if not frame.filename.startswith("<frozen")]
    where = next((frame for frame in reversed(own) if frame.name == "<module>"), own[-1])
    return f"{where.filename}, line {where.lineno}: {type(error).__name__}: {error}."
