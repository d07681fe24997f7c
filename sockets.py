"""The sockets that the process listens on: made here, or inherited."""

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import suppress

BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket whose connections send small events at once; raise `OSError`.

    uvicorn 0.54 leaves TCP_NODELAY off on the connections of a socket that it is given. Who connects while the
    service starts waits, and is not refused.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.set_inheritable(True)
    return listener


def listening_hosts() -> Iterator[str]:
    """Yield the addresses that this process listens on for TCP, however it came by the sockets."""
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):  # closed meanwhile
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as found:
                    is_tcp = found.family in (socket.AF_INET, socket.AF_INET6)
                    if is_tcp and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        yield str(found.getsockname()[0])
