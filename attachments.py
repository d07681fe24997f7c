"""Attachments: what is taken, the links that reach it, and what the model reads of it. The bytes are the store's."""

import base64
import hmac
import re
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import suppress
from typing import Any
from urllib.parse import urlencode

import anyio
from chatkit.agents import ResponseStreamConverter
from chatkit.store import AttachmentStore, NotFoundError
from chatkit.types import (
    Attachment,
    AttachmentCreateParams,
    AttachmentUploadDescriptor,
    FileAttachment,
    GeneratedImage,
    GeneratedImageItem,
    GeneratedImageUpdated,
    ImageAttachment,
    ThreadItem,
    ThreadItemUpdatedEvent,
    ThreadStreamEvent,
    UserMessageItem,
)
from openai.types.responses import ResponseInputContentParam
from pydantic import AnyUrl

from context import RequestContext
from conversations import CHUNK_BYTES, KEPT, AlreadyUploaded, ConversationStore, new_id
from failures import Refused

UPLOAD_LINK_SECONDS = 15 * 60
VIEW_LINK_SECONDS = 60 * 60
MAX_NAME_LENGTH = 255
MAX_TEXT_LENGTH = 100_000
"""Characters of a text file that the model reads, and of what a tool returned in an earlier turn."""

IMAGE_TYPES = ("image/png", "image/jpeg", "image/gif", "image/webp")
"""What a browser shows and cannot be made to run (no SVG), and what models look at."""

MAGIC: dict[str, tuple[bytes, ...]] = {
    "image/png": (b"\x89PNG\r\n\x1a\n",),
    "image/jpeg": (b"\xff\xd8\xff",),
    "image/gif": (b"GIF87a", b"GIF89a"),
    "image/webp": (b"RIFF",),
    "application/pdf": (b"%PDF-",),
    "application/zip": (b"PK\x03\x04", b"PK\x05\x06"),
}
"""How a file of a type begins. The office formats are zip files."""


class LinkRefused(Exception):
    """The link has ended, or is not one of ours."""


class Attachments(AttachmentStore[RequestContext]):
    """What may be uploaded, by whom, and how it is reached afterwards.

    Links are capabilities for one attachment and one use; they end, and must not be logged.
    """

    def __init__(
        self,
        store: ConversationStore,
        link_key: bytes,
        *,
        max_bytes: int,
        types: Collection[str],
        max_storage_bytes: int,
        now: Callable[[], float] = time.time,
    ):
        self._store = store
        self._link_key = link_key
        self._max_bytes = max_bytes
        self._types = types
        self._max_storage_bytes = max_storage_bytes
        self._now = now

    def generate_attachment_id(self, mime_type: str, context: RequestContext) -> str:
        return new_id("attachment")

    # --- uploads --------------------------------------------------------------------------------------------------

    async def create_attachment(self, input: AttachmentCreateParams, context: RequestContext) -> Attachment:
        """Set the announced bytes aside, and return the attachment with the link that they are to be sent to."""
        if not 0 < input.size <= self._max_bytes:
            raise _too_large(self._max_bytes) if input.size > 0 else Refused("bad_params", "The file is empty.")
        attachment = self._new(input.name, media_type_of(input.mime_type), announced=input.size)
        upload = AttachmentUploadDescriptor(
            url=AnyUrl(self._link("upload", attachment.id, UPLOAD_LINK_SECONDS, context)),
            method="PUT",
            headers={"Content-Type": input.mime_type},
        )
        shown = self.present(attachment, context).model_copy(update={"upload_descriptor": upload})
        await self._store.reserve_attachment(attachment, input.size, self._max_storage_bytes, context)
        return shown

    async def receive_announced(
        self, attachment_id: str, mime_type: str | None, data: AsyncIterator[bytes], context: RequestContext
    ) -> None:
        """Store the bytes of an attachment that was announced: as many as were announced, and of its type."""
        attachment = await self._store.load_attachment(attachment_id, context)
        if mime_type and mime_type != attachment.mime_type:
            raise Refused("unsupported_type", f"The file was announced as {attachment.mime_type}.")
        await self._receive(attachment, data, context, announced=(attachment.metadata or {}).get("size"))

    async def receive_direct(
        self, name: str, mime_type: str, data: AsyncIterator[bytes], context: RequestContext
    ) -> Attachment:
        """Store a file that was not announced and return its attachment; nothing of it is kept when it is refused."""
        attachment = self._new(name, mime_type)
        await self._store_whole(attachment, data, context)
        return self.present(attachment, context)

    async def keep_image(self, data: bytes, thread_id: str, context: RequestContext) -> str:
        """Store an image that a model made for the thread and return its id.

        The user's storage bounds it. What users may upload does not: they did not choose its type or size.
        """
        mime_type = next((each for each in IMAGE_TYPES if data.startswith(MAGIC[each])), "image/png")
        name, kept = f"image.{mime_type.partition('/')[2]}", new_id("attachment")
        image = ImageAttachment(
            id=kept, name=name, mime_type=mime_type, preview_url=_kept_url(kept), thread_id=thread_id
        )

        async def whole() -> AsyncIterator[bytes]:
            yield data

        await self._store_whole(image, whole(), context, announced=len(data))
        return kept

    async def _store_whole(
        self,
        attachment: Attachment,
        data: AsyncIterator[bytes],
        context: RequestContext,
        announced: int | None = None,
    ) -> None:
        await self._store.reserve_attachment(attachment, 0, self._max_storage_bytes, context)
        try:
            await self._receive(attachment, data, context, announced)
        except BaseException:
            with anyio.CancelScope(shield=True), suppress(NotFoundError):
                await self._store.delete_attachment(attachment.id, context)
            raise

    async def _receive(
        self,
        attachment: Attachment,
        data: AsyncIterator[bytes],
        context: RequestContext,
        announced: int | None = None,
    ) -> None:
        most = self._max_bytes if announced is None else announced
        upload = await self._store.begin_upload(attachment.id, context)
        try:
            number, total = 0, 0
            async for chunk in _chunks(data):
                total += len(chunk)
                if total > most:
                    raise _too_large(most)
                if number == 0:
                    _require_type(chunk, attachment.mime_type)
                await self._store.write_chunk(attachment.id, upload, number, chunk, self._max_storage_bytes, context)
                number += 1
            if total == 0:
                raise Refused("bad_params", "The file is empty.")
            if announced is not None and total < announced:
                raise Refused("bad_params", f"{announced} bytes were announced, and {total} came.")
            await self._store.finish_upload(attachment.id, upload, context)
        except BaseException:  # a client that goes away too
            with anyio.CancelScope(shield=True), suppress(NotFoundError, AlreadyUploaded):
                await self._store.abandon_upload(attachment.id, upload, context)
            raise

    def _new(self, name: str, mime_type: str, announced: int | None = None) -> Attachment:
        if mime_type not in self._types:
            raise Refused("unsupported_type", f"Files of the type {mime_type[:100]} are not taken.")
        if not 0 < len(name) <= MAX_NAME_LENGTH or name in (".", "..") or re.search(r"[/\\\x00-\x1f\x7f]", name):
            raise Refused("bad_params", "The file needs a name without a path in it.")
        fields: dict[str, Any] = {"id": new_id("attachment"), "name": name, "mime_type": mime_type}
        if announced is not None:
            fields["metadata"] = {"size": announced}
        if mime_type in IMAGE_TYPES:
            return ImageAttachment(**fields, preview_url=_kept_url(fields["id"]))
        return FileAttachment(**fields)

    async def require_sendable(self, attachment: Attachment, thread_id: str, context: RequestContext) -> None:
        """Raise `Refused` unless the attachment's bytes are here and it is in no other thread."""
        if attachment.thread_id not in (None, thread_id):
            raise Refused("conflict", "This file is part of another conversation. Attach it anew.")
        try:
            await self._store.load_attachment_size(attachment.id, context)
        except NotFoundError:
            raise Refused("conflict", "This file has not been uploaded yet. Wait for it, or remove it.") from None

    # --- links ----------------------------------------------------------------------------------------------------

    def _link(self, use: str, attachment_id: str, seconds: float, context: RequestContext) -> str:
        expires = str(int(self._now() + seconds))
        signature = self._signature(use, attachment_id, expires, self._tag(context.user_id))
        query = urlencode({"expires": expires, "signature": signature})
        return f"{context.base_url}/attachments/{attachment_id}?{query}"

    async def open_link(self, use: str, attachment_id: str, expires: str, signature: str) -> RequestContext:
        """Return the context of the user whose link for this use it is; raise `LinkRefused` or `NotFoundError`."""
        tag = signature.partition(".")[0]
        expected = self._signature(use, attachment_id, expires, tag)
        if not hmac.compare_digest(expected.encode(), signature.encode()) or int(expires) < self._now():
            raise LinkRefused  # before the file is looked for: whoever has no link learns nothing
        user_id = await self._store.load_attachment_owner(attachment_id)
        if self._tag(user_id) != tag:  # an author may have named another user's file, and had a link made of it
            raise NotFoundError(attachment_id)
        return RequestContext(user_id)

    def _signature(self, use: str, attachment_id: str, expires: str, tag: str) -> str:
        """Return the user's tag and what only this service can make of it and of the rest of the link."""
        return f"{tag}.{self._sealed(use, attachment_id, expires, tag)}"

    def _tag(self, user_id: str) -> str:
        return self._sealed("user", user_id)

    def _sealed(self, *parts: str) -> str:
        sealed = hmac.digest(self._link_key, "\n".join(parts).encode(), "sha256")
        return base64.urlsafe_b64encode(sealed).rstrip(b"=").decode()

    def present(self, attachment: Attachment, context: RequestContext) -> Attachment:
        """Return the attachment as a client sees it: its preview behind a fresh link."""
        if isinstance(attachment, ImageAttachment):
            link = AnyUrl(self._link("view", attachment.id, VIEW_LINK_SECONDS, context))
            return attachment.model_copy(update={"preview_url": link})
        return attachment

    def present_item(self, item: ThreadItem, context: RequestContext) -> ThreadItem:
        """Return the item as a client sees it."""
        match item:
            case UserMessageItem(attachments=[_, *_]):
                shown = [self.present(attachment, context) for attachment in item.attachments]
                return item.model_copy(update={"attachments": shown})
            case GeneratedImageItem(image=GeneratedImage() as image):
                return item.model_copy(update={"image": self._present_image(image, context)})
        return item

    def present_event(self, event: ThreadStreamEvent, context: RequestContext) -> ThreadStreamEvent:
        """Return the event as a client sees it."""
        match event:
            case ThreadItemUpdatedEvent(update=GeneratedImageUpdated() as update):
                shown = update.model_copy(update={"image": self._present_image(update.image, context)})
                return event.model_copy(update={"update": shown})
        item = getattr(event, "item", None)
        return event if item is None else event.model_copy(update={"item": self.present_item(item, context)})

    def _present_image(self, image: GeneratedImage, context: RequestContext) -> GeneratedImage:
        attachment_id = kept_id(image.url)
        if attachment_id is None:
            return image
        return image.model_copy(update={"url": self._link("view", attachment_id, VIEW_LINK_SECONDS, context)})

    # --- bytes ----------------------------------------------------------------------------------------------------

    async def read(self, attachment_id: str, start: int, end: int, context: RequestContext) -> AsyncIterator[bytes]:
        """Yield the bytes from `start` up to and without `end`, a chunk at a time."""
        for number in range(start // CHUNK_BYTES, -(-end // CHUNK_BYTES)):
            chunk = await self._store.read_chunk(attachment_id, number, context)
            yield chunk[max(0, start - number * CHUNK_BYTES) : end - number * CHUNK_BYTES]

    async def read_all(self, attachment_id: str, context: RequestContext) -> bytes:
        size = await self._store.load_attachment_size(attachment_id, context)
        return b"".join([chunk async for chunk in self.read(attachment_id, 0, size, context)])

    async def load_size(self, attachment_id: str, context: RequestContext) -> int:
        """Return how many bytes there are to read: none of an attachment that has been deleted."""
        try:
            return await self._store.load_attachment_size(attachment_id, context)
        except NotFoundError:
            return 0

    async def to_model(self, attachment: Attachment, context: RequestContext) -> ResponseInputContentParam:
        """Return what the model reads: the image, the PDF or the text itself; else, in words, that it is there."""
        try:
            data = await self.read_all(attachment.id, context)
        except NotFoundError:
            return _words(f"[The user attached {attachment.name}, which has been deleted.]")
        if attachment.mime_type in IMAGE_TYPES:
            return {"type": "input_image", "detail": "auto", "image_url": _data_url(attachment.mime_type, data)}
        if attachment.mime_type == "application/pdf":
            return {
                "type": "input_file",
                "filename": attachment.name,
                "file_data": _data_url(attachment.mime_type, data),
            }
        if _is_text(attachment.mime_type):
            text = shortened(data.decode("utf-8", errors="replace"))
            return _words(f"The user attached {attachment.name}:\n\n{text}")
        return _words(f"[The user attached {attachment.name} ({attachment.mime_type}), which you cannot read.]")

    async def image_to_model(self, attachment_id: str, context: RequestContext) -> ResponseInputContentParam:
        """Return a kept image as the model sees it, or raise `NotFoundError`."""
        return await self.to_model(await self._store.load_attachment(attachment_id, context), context)

    async def delete_attachment(self, attachment_id: str, context: RequestContext) -> None:
        await self._store.delete_attachment(attachment_id, context)


class KeptImages(ResponseStreamConverter):
    """Keeps the images that a model generates as attachments of the thread, in place of base64 inside it."""

    def __init__(self, attachments: Attachments, store: ConversationStore, thread_id: str, context: RequestContext):
        super().__init__()
        self._attachments = attachments
        self._store = store
        self._thread_id = thread_id
        self._context = context
        self._drafts: dict[str, str] = {}
        self._superseded: list[str] = []

    async def base64_image_to_url(
        self, image_id: str, base64_image: str, partial_image_index: int | None = None
    ) -> str:
        data = base64.b64decode(base64_image)
        kept = await self._attachments.keep_image(data, self._thread_id, self._context)
        if draft := self._drafts.pop(image_id, None):
            self._superseded.append(draft)
        if partial_image_index is not None:
            self._drafts[image_id] = kept
        return str(_kept_url(kept))

    async def delete_superseded(self) -> None:
        """Delete the drafts that nothing shows any more: to be called when an image is stored."""
        while self._superseded:
            with suppress(NotFoundError):
                await self._store.delete_attachment(self._superseded.pop(), self._context)


def _kept_url(attachment_id: str) -> AnyUrl:
    """Return what stands in the store where a client sees a link."""
    return AnyUrl(KEPT + attachment_id)


def kept_id(url: str) -> str | None:
    """Return the attachment's id in a stored address; None for an address elsewhere."""
    return url.removeprefix(KEPT) if url.startswith(KEPT) else None


async def _chunks(data: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the bytes again in chunks of `CHUNK_BYTES`, and what is left."""
    waiting = bytearray()
    async for part in data:
        waiting += part
        while len(waiting) >= CHUNK_BYTES:
            yield bytes(waiting[:CHUNK_BYTES])
            del waiting[:CHUNK_BYTES]
    if waiting:
        yield bytes(waiting)


def media_type_of(declared: str) -> str:
    """Return the media type without its parameters, `text/plain; charset=utf-8` say."""
    return declared.partition(";")[0].strip().lower()


def _require_type(beginning: bytes, mime_type: str) -> None:
    """Raise `Refused` where the first bytes cannot be of the type that they were said to be."""
    key = "application/zip" if "openxmlformats" in mime_type else mime_type
    if key in MAGIC:
        fits = beginning.startswith(MAGIC[key]) and (key != "image/webp" or beginning[8:12] == b"WEBP")
    else:
        fits = not _is_text(mime_type) or b"\x00" not in beginning
    if not fits:
        raise Refused("unsupported_type", f"The file is not of the type {mime_type} that it is said to be.")


def shortened(text: str) -> str:
    """Return what the model reads of a long text, and how much there is beyond that."""
    rest = f"\n[… {len(text) - MAX_TEXT_LENGTH} more characters]" if len(text) > MAX_TEXT_LENGTH else ""
    return text[:MAX_TEXT_LENGTH] + rest


def _is_text(mime_type: str) -> bool:
    return mime_type.startswith("text/") or mime_type == "application/json"


def _too_large(most: int) -> Refused:
    return Refused("too_large", f"The file is larger than {most} bytes.")


def _data_url(mime_type: str, data: bytes) -> str:
    return f"data:{mime_type};base64,{base64.b64encode(data).decode()}"


def _words(text: str) -> ResponseInputContentParam:
    return {"type": "input_text", "text": text}
