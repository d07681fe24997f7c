"""People who talk without a pause, each turn on a connection of its own."""

import threading
import time

from clients import Stream
from service import errors_of


def talk(url: str, over: threading.Event, waited: list[float]) -> list[str]:
    """Talk until it is over; note how many seconds each turn took, and return what went wrong."""
    wrong = []
    while not over.is_set():
        began = time.monotonic()
        try:
            with Stream.create(url) as stream:
                events = stream.read_to_end(300)
        except ConnectionError as error:
            wrong.append(repr(error))
            continue
        waited.append(time.monotonic() - began)
        if stream.status != 200 or not stream.is_whole or errors_of(events):
            wrong.append(f"{stream.status} {stream.text}")
    return wrong
