"""How often Python's garbage collector looks at what lives as long as the process."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

YOUNG_OBJECTS = 50_000
"""How many more objects there are before the garbage collector looks again (Python's own: 700)."""


@contextmanager
def quiet_collector() -> Iterator[None]:
    """Spare the garbage collector the SDKs' hundreds of thousands of objects, which live as long as the process.

    It would walk them again and again, for a good part of what a turn costs.
    """
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
