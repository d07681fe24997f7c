"""How often Python's garbage collector looks at what lives as long as the process; to be imported before the SDKs."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

YOUNG_OBJECTS = 50_000
"""How many more objects there are before the garbage collector looks again (Python's own: 700)."""

OLDER_ROUNDS = 3
"""How often it looks at young objects before it looks at older ones (Python's own: 10), which are few then."""

gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])  # here, so that imports are spared as well


@contextmanager
def quiet_collector() -> Iterator[None]:
    """Spare the garbage collector the SDKs' hundreds of thousands of objects, which live as long as the process.

    It would walk them again and again (`bench/NOTES.md`). It does not walk them once more before (0.2 s at every
    start): what is garbage by then is little, and stays.
    """
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, OLDER_ROUNDS, OLDER_ROUNDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
