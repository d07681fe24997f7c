"""Makes the README's pictures of the page, from the repository's folder:

PYTHONPATH=.:tests python tests/browser/screenshots.py
"""

import asyncio
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from chatkit.types import (
    AssistantMessageContent,
    AssistantMessageItem,
    CustomSummary,
    InferenceOptions,
    SearchTask,
    ThreadItem,
    ThreadMetadata,
    UserMessageItem,
    UserMessageTextContent,
    WidgetItem,
    Workflow,
    WorkflowItem,
)
from playwright.sync_api import Browser, expect

from browser.chat_page import Chat, chromium
from browser.process import Service, running
from browser.stage import CARD, root
from context import LOCAL_USER, RequestContext
from store import open_store

IMAGES = Path(__file__).parents[2] / "docs" / "images"
DESKTOP = {"width": 1280, "height": 860}
PHONE = {"width": 390, "height": 800}

ANSWER = """\
Three ways, from the quickest to the most thorough:

| Method | Water | Time |
| --- | ---: | ---: |
| Cup and bag | 100 °C | 3 min |
| Pot, loose leaves | 95 °C | 4 min |
| Cold, overnight | 8 °C | 8 h |

1. **Warm the pot** first: cold china takes five degrees.
2. Take one spoon of leaves for each cup.
3. Pour, wait, and pour out *all* of it.

```python
def minutes(leaf: str) -> int:
    return {"green": 2, "black": 4}.get(leaf, 3)
```
"""
TITLES = ["Summary of the March report", "Names for a small boat", "Why the build is slow", "Plan for Saturday"]


async def fill(database_url: str) -> dict[str, str]:
    """Store the conversations that the pictures show, and return the ids of two."""
    context = RequestContext(LOCAL_USER)
    async with open_store(database_url) as store:

        async def keep(title: str, days: int, *items: Any) -> str:
            at = datetime.now(UTC).replace(hour=9, minute=41) - timedelta(days=days)
            thread = ThreadMetadata(id=store.generate_thread_id(context), created_at=at, title=title)
            await store.save_thread(thread, context)
            for make in items:
                base = {
                    "id": store.generate_item_id("message", thread, context),
                    "thread_id": thread.id,
                    "created_at": at,
                }
                await store.add_thread_item(thread.id, make(base), context)
            return thread.id

        for days, title in enumerate(TITLES):
            await keep(title, len(TITLES) - days + 1)
        tea = await keep("How to make good tea", 1, asks("How do I make a good cup of tea?"), says(ANSWER))
        order = await keep(
            "Two cups of tea", 0, asks("When does my order arrive?"), searched, says("It is on its way:"), shows(CARD)
        )
        return {"tea": tea, "order": order}


def asks(text: str) -> Any:
    def make(base: dict[str, Any]) -> ThreadItem:
        words = UserMessageTextContent(text=text)
        return UserMessageItem(content=[words], inference_options=InferenceOptions(), **base)

    return make


def says(text: str) -> Any:
    return lambda base: AssistantMessageItem(content=[AssistantMessageContent(text=text)], **base)


def shows(widget: dict[str, Any]) -> Any:
    return lambda base: WidgetItem(widget=root(widget), **base)


def searched(base: dict[str, Any]) -> ThreadItem:
    task = SearchTask(title="Looked into the orders", queries=["open orders"])
    return WorkflowItem(
        workflow=Workflow(type="custom", tasks=[task], summary=CustomSummary(title="Looked up the order")), **base
    )


def take(browser: Browser, url: str, name: str, thread_id: str | None, size: Any, scheme: Any) -> None:
    context = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce", locale="en-GB")
    chat = Chat(context.new_page(), url).open(thread_id)
    expect(chat.page.locator("#threads li")).to_have_count(len(TITLES) + 2)
    if thread_id:
        expect(chat.button("Answer again")).to_be_visible()
        chat.page.wait_for_timeout(200)
    chat.page.screenshot(path=IMAGES / f"{name}.png")
    context.close()


def main() -> int:
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, running(Service(Path(folder) / "chat.db")) as service:
        ids = asyncio.run(fill(service.database_url))
        with chromium() as browser:
            take(browser, service.url, "start", None, DESKTOP, "light")
            take(browser, service.url, "widget", ids["order"], DESKTOP, "light")
            take(browser, service.url, "dark", ids["tea"], DESKTOP, "dark")
            take(browser, service.url, "phone", ids["order"], PHONE, "light")
    return 0


if __name__ == "__main__":
    sys.exit(main())
