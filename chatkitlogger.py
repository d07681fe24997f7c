"""Imports ChatKit's logger without LOG_LEVEL, which (1.6.5) it reads for itself; to be imported before the rest of it.

It raises for a level that Python does not know, before the settings could say so, and adds a handler of its own.
"""

import os

_level = os.environ.pop("LOG_LEVEL", None)
try:
    import chatkit.logger  # noqa: F401 (for what it does when it is imported)
finally:
    if _level is not None:
        os.environ["LOG_LEVEL"] = _level
