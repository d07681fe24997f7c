"""A thread's title, when nobody has given it one: the model's, or else the first words of the message."""

import asyncio
import logging
import re
from typing import Any

from agents import Agent, RunConfig, Runner
from chatkit.types import UserMessageItem

from conversations import Usage
from failures import log_failure
from provider import estimated_usage, model_name, usage_of

log = logging.getLogger("service.titles")

TITLE_SECONDS = 20.0
MAX_TITLE_LENGTH = 60
MAX_READ_LENGTH = 2000

INSTRUCTIONS = (
    "Write a title for a conversation that begins with the following message: at most six words, in the language of "
    "the message, without quotes and without a full stop. Do not answer the message; write the title only."
)


async def title_by_model(
    message: UserMessageItem, agent: Agent[Any], run_config: RunConfig
) -> tuple[str, Usage | None]:
    """Return the title by the agent's model, and what it used.

    It is the message's first words when the model fails, takes too long or answers nonsense.
    """
    text, title, used = text_of(message)[:MAX_READ_LENGTH], "", None
    if text:
        model = model_name(agent, run_config)
        used = estimated_usage(model, len(text), 0)
        try:
            async with asyncio.timeout(TITLE_SECONDS):
                namer = Agent(name="Title", instructions=INSTRUCTIONS, model=agent.model)
                run = await Runner.run(namer, text, run_config=run_config, max_turns=1)
            answer = str(run.final_output)
            title, used = tidy(answer), usage_of(run, model) or estimated_usage(model, len(text), len(answer))
        except Exception as error:
            log_failure(log, "no title from the model", error)
    return title or title_by_words(message), used


def title_by_words(message: UserMessageItem) -> str:
    """Return the beginning of the message, cut between two words."""
    text = " ".join(text_of(message).split())
    if not text:
        return message.attachments[0].name if message.attachments else "Untitled"
    if len(text) <= MAX_TITLE_LENGTH:
        return text
    return text[: text.rfind(" ", 20, MAX_TITLE_LENGTH) if " " in text[20:MAX_TITLE_LENGTH] else MAX_TITLE_LENGTH] + "…"


def tidy(answer: str) -> str:
    """Return a model's answer as a title, or nothing when it cannot be meant as one."""
    title = re.sub(r"^(?:#+|title:)\s*", "", answer.strip(), flags=re.IGNORECASE).strip("\"'*_`.“”«» \n")
    usable = 0 < len(title) <= MAX_TITLE_LENGTH and "\n" not in title and any(letter.isalnum() for letter in title)
    return title if usable else ""


def text_of(message: UserMessageItem) -> str:
    return "".join(part.text for part in message.content).strip()
