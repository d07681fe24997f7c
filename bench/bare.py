"""`Runner.run_streamed` alone, with the SDK's own model and client; its events are thrown away.

Each line on standard input is `{"turns": [[marker, ...], ...], "items": 20, "delays": [0.1, ...]}`: for each client the
messages that it sends one after the other, how many items go with the first (two more, at most 21, go with each that
follows), and the seconds until it begins. One line comes back when all are answered.
"""

import asyncio
import json
import os
import sys
import traceback
from typing import Any

from agents import Agent, Runner, set_tracing_disabled

EXCHANGES = [
    {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}
    for role, kind, text in (("user", "input_text", "turn-0;"), ("assistant", "output_text", " word" * 50))
] * 10
"""As ChatKit's converter writes them."""


async def client(agent: Agent[Any], markers: list[str], items: int, delay: float) -> None:
    await asyncio.sleep(delay)
    for place, marker in enumerate(markers):
        items = min(len(EXCHANGES) + 1, items + 2 * (place > 0))
        before = EXCHANGES[1 - items :] if items > 1 else []
        message = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": marker}]}
        run = Runner.run_streamed(agent, [*before, message])
        async for _ in run.stream_events():
            pass


async def answer(agent: Agent[Any], asked: dict[str, Any]) -> None:
    clients = zip(asked["turns"], asked["delays"], strict=True)
    try:
        await asyncio.gather(*[client(agent, markers, asked["items"], delay) for markers, delay in clients])
    except Exception:
        traceback.print_exc()
        os._exit(1)  # whoever asked waits for a line
    print("{}", flush=True)


async def main() -> None:
    set_tracing_disabled(True)
    agent: Agent[Any] = Agent(name="Assistant", instructions="You are a helpful assistant.")
    async with asyncio.TaskGroup() as answers:
        while line := await asyncio.to_thread(sys.stdin.readline):
            answers.create_task(answer(agent, json.loads(line)))


if __name__ == "__main__":
    print("{}", flush=True)
    asyncio.run(main())
