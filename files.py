"""Attachments over HTTP: uploads that are never whole in memory or in /tmp, and downloads by signed links."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import quote

from chatkit.types import Attachment
from python_multipart.exceptions import FormParserError, MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from attachments import IMAGE_TYPES, Attachments, media_type_of
from context import RequestContext
from failures import Refused
from sdk import encode
from telemetry import note

Authenticate = Callable[[Request], Awaitable[RequestContext]]

MAX_PART_HEADER_BYTES = 8 * 1024
MAX_BEFORE_FILE_BYTES = 64 * 1024
"""Of other fields: what proxies let through beyond the file itself."""


def file_routes(authenticate: Authenticate) -> list[Route]:
    """Return the routes of attachments; `authenticate` is asked where no signed link is shown."""

    async def upload_direct(request: Request) -> Response:
        context = await authenticate(request)
        name, mime_type, data = await _file_part(request)
        attachment = await _attachments(request).receive_direct(name, mime_type, data, context)
        return Response(encode(attachment), media_type="application/json")

    async def download(request: Request) -> Response:
        if "authorization" in request.headers and not request.query_params:  # only images get a link of ChatKit
            return await _download(request, await authenticate(request), "no-store")  # or it would be the next user's
        return await _download(request, await _open_link(request, "view"), "private, max-age=3600")

    return [
        Route("/attachments", upload_direct, methods=["POST"]),
        Route("/api/attachments", upload_direct, methods=["POST"]),
        Route("/attachments/{id}", upload_announced, methods=["POST", "PUT"]),
        Route("/attachments/{id}", download, methods=["GET"]),
    ]


async def upload_announced(request: Request) -> Response:
    context = await _open_link(request, "upload")
    mime_type = media_type_of(request.headers.get("content-type", "")) or None
    data = (chunk async for chunk in request.stream() if chunk)
    await _attachments(request).receive_announced(request.path_params["id"], mime_type, data, context)
    return Response(b"{}", media_type="application/json")


async def _download(request: Request, context: RequestContext, caching: str) -> Response:
    attachment_id = request.path_params["id"]
    store = request.state.store
    attachment: Attachment = await store.load_attachment(attachment_id, context)
    size: int = await store.load_attachment_size(attachment_id, context)
    start, end = _range(request.headers.get("range"), size)
    headers = {
        "content-type": _media_type(attachment),
        "content-length": str(end - start),
        "content-disposition": _disposition(attachment),
        "accept-ranges": "bytes",
        "cache-control": caching,
        "content-security-policy": "default-src 'none'; sandbox",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    partial = (start, end) != (0, size)
    if partial:
        headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
    data = _attachments(request).read(attachment_id, start, end, context)
    return StreamingResponse(data, 206 if partial else 200, headers)


def _attachments(request: Request) -> Attachments:
    attachments: Attachments = request.state.attachments
    return attachments


async def _open_link(request: Request, use: str) -> RequestContext:
    query = request.query_params
    context = await _attachments(request).open_link(
        use, request.path_params["id"], query.get("expires", ""), query.get("signature", "")
    )
    note(user_id=context.user_id)
    return context


def _media_type(attachment: Attachment) -> str:
    text = attachment.mime_type.startswith("text/")
    return f"{attachment.mime_type}; charset=utf-8" if text else attachment.mime_type


def _disposition(attachment: Attachment) -> str:
    """Show images and nothing else in the browser (RFC 6266; names beyond ASCII as RFC 8187 has them)."""
    kind = "inline" if attachment.mime_type in IMAGE_TYPES else "attachment"
    return f"{kind}; filename*=UTF-8''{quote(attachment.name, safe='')}"


def _range(header: str | None, size: int) -> tuple[int, int]:
    """Return the first byte to send and the one behind the last; all of them where no single range is asked for."""
    match = re.fullmatch(r"bytes=(\d{0,15})-(\d{0,15})", header or "")
    if not match or match.groups() == ("", ""):
        return 0, size
    first, last = match.groups()
    if first:
        start, end = int(first), min(size, int(last) + 1) if last else size
    else:
        start, end = max(0, size - int(last)), size
    if start >= end:
        length = {"content-range": f"bytes */{size}"}  # RFC 9110 §15.5.17
        raise Refused("bad_range", f"The file has {size} bytes: ask for some of them.", length)
    return start, end


async def _file_part(request: Request) -> tuple[str, str, AsyncIterator[bytes]]:
    """Return name, type and bytes of the form's field `file`, read as they come.

    (Starlette 1.10's own parser writes a whole part to /tmp before the handler runs.)
    """
    media_type, options = parse_options_header(request.headers.get("content-type", ""))
    if media_type != b"multipart/form-data" or not options.get(b"boundary"):
        raise Refused("unsupported_type", "The content-type must be multipart/form-data, with the field `file`.")
    parts = _Parts(options[b"boundary"])
    body, before = request.stream(), 0
    while parts.file is None and not parts.ended:
        if before > MAX_BEFORE_FILE_BYTES:
            raise Refused("bad_params", "The form has too much before the field `file`. Put that first.")
        parts.feed(chunk := await anext(body, b""))
        before += len(chunk)
    if parts.file is None:
        raise Refused("bad_params", "The form has no field `file`.")

    async def data() -> AsyncIterator[bytes]:
        while True:
            yield parts.take()
            if parts.file_ended:
                return
            parts.feed(await anext(body, b""))

    name, mime_type = parts.file
    return name, mime_type, data()


def _file_name(encoded: bytes) -> str:
    """Return the name as browsers write it into a form (HTML, "multipart/form-data encoding algorithm")."""
    name = encoded.decode("utf-8", errors="replace")
    for escaped, letter in (("%22", '"'), ("%0D", "\r"), ("%0A", "\n")):
        name = name.replace(escaped, letter)
    return name


class _Parts:
    """Looks for the field `file` in a form, and lets all other fields pass by."""

    def __init__(self, boundary: bytes):
        self.file: tuple[str, str] | None = None
        self.file_ended = self.ended = False
        self._in_file = False
        self._data = bytearray()
        self._header = [bytearray(), bytearray()]
        self._headers: dict[bytes, bytes] = {}
        callbacks: Any = {
            "on_part_begin": self._headers.clear,
            "on_header_field": lambda data, start, end: self._add_to_header(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._add_to_header(1, data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._begin_part,
            "on_part_data": self._add_data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except FormParserError as error:  # it is longer than 256 bytes
            raise Refused("bad_params", "The form cannot be read.") from error

    def feed(self, data: bytes) -> None:
        """Parse what came; nothing means that nothing more will."""
        try:
            if data:
                self._parser.write(data)
            else:
                self._parser.finalize()
                self.ended = True
        except MultipartParseError as error:
            raise Refused("bad_params", "The form cannot be read.") from error
        if self.ended and self._in_file and not self.file_ended:
            raise Refused("bad_params", "The form breaks off inside the file.")

    def take(self) -> bytes:
        """Return the bytes of the file that have come since."""
        data = bytes(self._data)
        self._data.clear()
        return data

    def _add_to_header(self, part: int, data: bytes) -> None:
        self._header[part] += data
        if len(self._header[part]) > MAX_PART_HEADER_BYTES:
            raise Refused("bad_params", "A header of the form is too long.")

    def _end_header(self) -> None:
        name, value = (bytes(part) for part in self._header)
        self._headers[name.lower()] = value
        self._header = [bytearray(), bytearray()]

    def _begin_part(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if options.get(b"name") == b"file" and self.file is None:
            declared = self._headers.get(b"content-type", b"").decode("ascii", errors="replace")
            self._in_file = True
            self.file = _file_name(options.get(b"filename", b"")), media_type_of(declared)

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._data += data[start:end]

    def _end_part(self) -> None:
        self.file_ended = self.file_ended or self._in_file
        self._in_file = False

    def _end(self) -> None:
        self.ended = True
