"""`Runner.run_streamed` alone, with the SDK's own model and client; its events are thrown away.

Each line on standard input is `{"turns": [[marker, ...], ...]}`: for each client the messages that it sends one after
the other. One line comes back when all are answered.
"""

import asyncio
import json
import sys
from typing import Any

from agents import Agent, Runner, set_tracing_disabled

EXCHANGES = [{"role": role, "content": "Some words of before."} for role in ("user", "assistant")] * 10
"""As much history as the other contestants have in their threads."""


async def client(agent: Agent[Any], markers: list[str]) -> None:
    for marker in markers:
        run = Runner.run_streamed(agent, [*EXCHANGES[1:], {"role": "user", "content": marker}])
        async for _ in run.stream_events():
            pass


async def main() -> None:
    set_tracing_disabled(True)
    agent: Agent[Any] = Agent(name="Assistant", instructions="You are a helpful assistant.")
    while line := await asyncio.to_thread(sys.stdin.readline):
        await asyncio.gather(*[client(agent, markers) for markers in json.loads(line)["turns"]])
        print("{}", flush=True)


if __name__ == "__main__":
    print("{}", flush=True)
    asyncio.run(main())
