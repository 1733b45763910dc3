"""A process that uses a library while system calls of it are made to fail from outside.

python faulty_child.py FOLDER BACKBONE FILE...: sends one line an operation on its standard input,
a socket, because the calls that write to a file are those that may fail.
"""

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from adapters.errors import ReadOnly, StorageFull, Unreadable, Unwritten
from adapters.library import Library, Upload
from adapters.slots import SlotPool
from model.checkpoint import read_backbone
from model.encoder import Encoder

OPERATIONS = ("put a 0", "put a 1", "point a 1", "put b 2", "delete a 1", "put a 2", "delete b")


def open_library(folder: Path, backbone_folder: Path, **options: Any) -> Library:
    backbone = read_backbone(backbone_folder)
    encoder = Encoder(backbone.config, backbone.tensors)

    def pool(read) -> SlotPool:
        cpu = torch.device("cpu")
        return SlotPool(
            backbone.config, torch.float32, cpu, capacity_bytes=1 << 20, max_slots=0, read=read
        )

    return Library(folder, backbone, encoder, pool, **options)


def operate(library: Library, operation: str, files: list[bytes]) -> None:
    kind, name, *rest = operation.split()
    if kind == "put":
        incoming = library.store.incoming()
        try:
            incoming.write(files[int(rest[0])])
            library.publish(Upload(name, "test"), incoming)
        finally:
            incoming.discard()
    elif kind == "point":
        library.registry.point(name, "stable", int(rest[0]), "test")
    else:
        library.remove(name, int(rest[0]) if rest else None, "test")


def outcome(action: Callable[[], object]) -> str:
    try:
        action()
    except (ReadOnly, StorageFull, Unreadable, Unwritten) as error:
        return type(error).__name__
    except Exception as error:
        return f"unexpected {type(error).__name__}: {error}"
    return "ok"


def main() -> None:
    torch.set_num_threads(1)
    folder, backbone, *paths = map(Path, sys.argv[1:])
    files = [path.read_bytes() for path in paths]
    report = socket.socket(fileno=os.dup(0))
    opened: list[Library] = []
    result = outcome(lambda: opened.append(open_library(folder, backbone)))
    report.send(f"open: {result}\n".encode())
    for operation in OPERATIONS if opened else ():
        result = outcome(lambda op=operation: operate(opened[0], op, files))
        report.send(f"{operation}: {result}\n".encode())
    report.send(b"end\n")
    os._exit(0)  # as a kill would: nothing is closed in order


if __name__ == "__main__":
    main()
