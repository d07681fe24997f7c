"""Python's strings as PostgreSQL's text.

That cannot hold U+0000, and Python's can: an id or a title with one must neither fail nor become another. U+001A
(substitute) stands for it. JSON is not touched by this: it has neither, but for escapes of its own.
"""

import psycopg
from psycopg.adapt import AdaptersMap, Buffer
from psycopg.types.string import StrDumperUnknown, TextLoader


class _Dumper(StrDumperUnknown):
    def dump(self, obj: str) -> Buffer | None:
        return super().dump(obj.replace("\x1a", "\x1a1").replace("\x00", "\x1a0"))


class _Loader(TextLoader):
    def load(self, data: Buffer) -> bytes | str:
        text = super().load(data)
        return text.replace("\x1a0", "\x00").replace("\x1a1", "\x1a") if isinstance(text, str) else text


STRINGS = AdaptersMap(psycopg.adapters)
"""What a connection is to be given as its `context`."""
STRINGS.register_dumper(str, _Dumper)
STRINGS.register_loader("text", _Loader)
