"""A command that takes its time says how far it is."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


@asynccontextmanager
async def progress(doing: str, patience_seconds: float = 2.0) -> AsyncIterator[Callable[[str], None]]:
    """Say on standard error every so often what is being done, and how far it is: what the yielded was last told."""
    reached, began_at = "", time.monotonic()

    def say(words: str) -> None:
        nonlocal reached
        reached = f": {words}"

    async def tell() -> None:
        while True:
            await asyncio.sleep(patience_seconds)
            print(f"{doing}{reached} ({time.monotonic() - began_at:.0f} s)", file=sys.stderr, flush=True)

    telling = asyncio.create_task(tell(), name="progress")
    try:
        yield say
    finally:
        telling.cancel()
