"""What nobody wants any more is removed, hour by hour, by one of the processes that share the database."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from conversations import ConversationStore, StoreUnavailable
from failures import log_failure

log = logging.getLogger("service.upkeep")

LOOK_SECONDS = 600.0
"""How often each process looks whether the hour is over, by the database's clock."""


@asynccontextmanager
async def upkeep(
    store: ConversationStore, retention_days: int, look_seconds: float = LOOK_SECONDS
) -> AsyncIterator[None]:
    """Remove, while inside, threads idle for so many days (0: none), and attachments that were never sent."""
    keeper = asyncio.create_task(_keep(store, retention_days, look_seconds), name="upkeep")
    try:
        yield
    finally:
        keeper.cancel()
        await asyncio.wait({keeper})


async def _keep(store: ConversationStore, retention_days: int, look_seconds: float) -> None:
    while True:
        try:
            purged = await store.purge(retention_days)
            if purged and (purged.threads or purged.attachments):
                log.info("removed %d idle threads and %d unsent attachments", purged.threads, purged.attachments)
        except StoreUnavailable as error:
            log_failure(log, "what is too old could not be removed", error)
        await asyncio.sleep(look_seconds)
