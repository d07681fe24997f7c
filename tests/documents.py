"""The fenced blocks of the documents, so that tests run what people are told to."""

import re


def blocks_of(text: str, language: str | None = None) -> list[str]:
    """Return the fenced blocks in order; those of one language where it is named."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in found if language in (None, name)]
