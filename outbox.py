"""What a turn's client has not fetched yet."""

from collections.abc import Callable

from chatkit.types import AssistantMessageContentPartTextDelta, ThreadItemUpdatedEvent, ThreadStreamEvent

from sdk import mended

PIECE_BYTES = 60
"""What a piece of text takes in memory beside its letters."""


class Outbox:
    """Events as the bytes of a stream, in order.

    An event is encoded when it is put, as its item may change. Text that follows text of the same message is joined
    with it until it is fetched: a process that is behind sends longer pieces, one that is not sends each as it came.
    """

    def __init__(self, encode: Callable[[ThreadStreamEvent], bytes]):
        self.size_bytes = 0
        self._encode = encode
        self._chunks: list[bytes] = []
        self._texts: list[str] = []
        self._place = ("", 0)
        """Item and part that the texts belong to."""

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
                self._append(event)

    def take(self) -> bytes:
        """Return all that waits, and nothing again."""
        self._encode_texts()
        taken = b"".join(self._chunks)
        self.clear()
        return taken

    def clear(self) -> None:
        self._chunks.clear()
        self._texts.clear()
        self.size_bytes = 0

    def _encode_texts(self) -> None:
        if self._texts:
            item_id, index = self._place
            update = AssistantMessageContentPartTextDelta(content_index=index, delta=mended("".join(self._texts)))
            self._texts.clear()
            self._append(ThreadItemUpdatedEvent(item_id=item_id, update=update))

    def _append(self, event: ThreadStreamEvent) -> None:
        chunk = b"data: " + self._encode(event) + b"\n\n"
        self._chunks.append(chunk)
        self.size_bytes += len(chunk)
