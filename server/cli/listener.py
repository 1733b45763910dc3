"""The socket that `trunkline serve` listens on: an address and a port, or a path."""

import ipaddress
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from server.settings import BadSettings, Settings

BACKLOG = 2048
NOT_OTHERS = 0o117  # umask of a unix socket: its owner and group may connect


def is_loopback(settings: Settings) -> bool:
    """Whether only this machine reaches the server; a unix socket counts as that."""
    if settings.uds is not None:
        return True
    try:
        return ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        return settings.host == "localhost"


def listen(settings: Settings) -> socket.socket:
    """Raises BadSettings, with the address, where it can't be had."""
    return _on_path(settings.uds) if settings.uds is not None else _on_port(settings)


def url_of(settings: Settings, listener: socket.socket) -> str:
    """The server's address as clients write it: an IPv6 address in brackets, or unix:///path."""
    if settings.uds is not None:
        return f"unix://{settings.uds.absolute()}"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{listener.getsockname()[1]}"


@contextmanager
def removed_at_end(settings: Settings) -> Iterator[None]:
    """Takes a unix socket's path away at the end, unless another server has replaced it."""
    mine = settings.uds.stat().st_ino if settings.uds is not None else None
    try:
        yield
    finally:
        if settings.uds is not None:
            with suppress(OSError):
                if settings.uds.stat().st_ino == mine:
                    settings.uds.unlink()


def _on_port(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    both = settings.host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            (settings.host, settings.port), family=family, backlog=BACKLOG, dualstack_ipv6=both
        )
    except (OSError, UnicodeError) as error:  # UnicodeError: no host is called so
        number = error.errno if isinstance(error, OSError) else None
        why = os.strerror(number) if number and number > 0 else "no address has this name"
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        raise BadSettings(
            f"can't listen on {host}:{settings.port}: {why}; try another --host or --port"
        ) from error


def _on_path(path: Path) -> socket.socket:
    try:
        _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(NOT_OTHERS)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(BACKLOG)
    except OSError as error:
        why = error.strerror or str(error)
        raise BadSettings(f"can't listen on the unix socket {path}: {why}") from error
    return listener


def _remove_stale(path: Path) -> None:
    """A socket that nobody listens on is of a server that was killed. Raises BadSettings."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise BadSettings(f"setting uds: {path} is there and no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise BadSettings(f"setting uds: another server listens on {path}")
