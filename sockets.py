"""The sockets that the process listens on: made here, or inherited."""

import asyncio
import multiprocessing
import os
import signal
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

BACKLOG = 2048
UNREAD_SECONDS = 60
"""How long a client may take nothing of what was sent, before its connection is given up."""


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket whose connections send small events at once; raise `OSError`.

    uvicorn 0.54 leaves TCP_NODELAY off on the connections of a socket that it is given. Who connects while the
    service starts waits, and is not refused.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _set_for_connections(listener)
    listener.bind((host, port))
    listener.listen(BACKLOG)
    listener.set_inheritable(True)
    return listener


def inherited() -> socket.socket | None:
    """Return the socket that systemd hands over (sd_listen_fds(3)), if it does."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        return None
    listener = socket.socket(fileno=3)
    if listener.family != socket.AF_UNIX:
        _set_for_connections(listener)
    listener.set_inheritable(True)
    return listener


def notify(*states: str) -> None:
    """Tell systemd how the process fares (sd_notify(3)), where it asks to be told."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as telling, suppress(OSError):  # it draws its conclusions
            telling.sendto("\n".join(states).encode(), "\0" + address[1:] if address.startswith("@") else address)


@contextmanager
def held_no_longer_than_by_parent() -> Iterator[None]:
    """End as on SIGTERM when the process that started this one and keeps an eye on it is gone.

    A worker would hold the port for ever: its parent (uvicorn 0.54) ends it only where it ends itself in good order.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        yield
        return
    loop = asyncio.get_running_loop()

    def end() -> None:
        loop.remove_reader(parent.sentinel)
        signal.raise_signal(signal.SIGTERM)

    loop.add_reader(parent.sentinel, end)
    try:
        yield
    finally:
        loop.remove_reader(parent.sentinel)


def _set_for_connections(listener: socket.socket) -> None:
    """Set what the listener's connections inherit."""
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if (user_timeout := getattr(socket, "TCP_USER_TIMEOUT", None)) is not None:  # Linux
        listener.setsockopt(socket.IPPROTO_TCP, user_timeout, UNREAD_SECONDS * 1000)


def listening_hosts() -> Iterator[str]:
    """Yield the addresses that this process listens on for TCP, however it came by the sockets."""
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):  # closed meanwhile
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as found:
                    is_tcp = found.family in (socket.AF_INET, socket.AF_INET6)
                    if is_tcp and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        yield str(found.getsockname()[0])
