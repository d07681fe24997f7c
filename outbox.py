"""What a turn's client has not fetched yet."""

from collections.abc import Callable

from chatkit.types import (
    AssistantMessageContentPartTextDelta,
    GeneratedImageUpdated,
    ThreadItemUpdatedEvent,
    ThreadStreamEvent,
    WidgetRootUpdated,
    WorkflowTaskUpdated,
)

from sdk import mended

PIECE_BYTES = 60
"""What a piece of text takes in memory beside its letters."""


class Outbox:
    """Events as the bytes of a stream, in order.

    An event is encoded when it is put, as its item may change. Text that follows text of the same message is joined
    with it until it is fetched: a process that is behind sends longer pieces, one that is not sends each as it came.
    What is told as a whole again and again, a growing thought say, is told once, as it is when it is fetched.
    """

    def __init__(self, encode: Callable[[ThreadStreamEvent], bytes]):
        self.size_bytes = 0
        self._encode = encode
        self._chunks: list[bytes] = []
        self._texts: list[str] = []
        self._place = ("", 0)
        """Item and part that the texts belong to."""
        self._told: tuple[object, ...] | None = None
        """What the last chunk tells the whole of."""

    def __bool__(self) -> bool:
        return bool(self._chunks or self._texts)

    def put(self, event: ThreadStreamEvent) -> None:
        match event:
            case ThreadItemUpdatedEvent(
                item_id=item_id, update=AssistantMessageContentPartTextDelta(content_index=index, delta=delta)
            ):
                if self._place != (item_id, index):
                    self._encode_texts()
                    self._place = item_id, index
                self._texts.append(delta)
                self.size_bytes += len(delta) + PIECE_BYTES
            case _:
                self._encode_texts()
                told = _told_whole(event)
                if told is not None and told == self._told:
                    self.size_bytes -= len(self._chunks.pop())
                self._append(event)
                self._told = told

    def take(self) -> bytes:
        """Return all that waits, and nothing again."""
        self._encode_texts()
        taken = b"".join(self._chunks)
        self.clear()
        return taken

    def clear(self) -> None:
        self._chunks.clear()
        self._told = None
        self._texts.clear()
        self.size_bytes = 0

    def _encode_texts(self) -> None:
        if self._texts:
            item_id, index = self._place
            update = AssistantMessageContentPartTextDelta(content_index=index, delta=mended("".join(self._texts)))
            self.size_bytes -= sum(len(text) + PIECE_BYTES for text in self._texts)
            self._texts.clear()
            self._append(ThreadItemUpdatedEvent(item_id=item_id, update=update))

    def _append(self, event: ThreadStreamEvent) -> None:
        chunk = b"data: " + self._encode(event) + b"\n\n"
        self._chunks.append(chunk)
        self._told = None
        self.size_bytes += len(chunk)


def _told_whole(event: ThreadStreamEvent) -> tuple[object, ...] | None:
    """Return what the event tells the whole of, so that one before it about the same need not be read any more."""
    match event:
        case ThreadItemUpdatedEvent(item_id=item_id, update=WorkflowTaskUpdated(task_index=index)):
            return item_id, index
        case ThreadItemUpdatedEvent(item_id=item_id, update=WidgetRootUpdated() | GeneratedImageUpdated() as update):
            return item_id, update.type
    return None
