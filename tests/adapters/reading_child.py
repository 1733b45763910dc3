"""A process that starts a library of what is stored, and reads, while system calls fail.

python reading_child.py FOLDER BACKBONE NAME...: loads each name twice. Each outcome
is a line on its standard input, a socket. A start that fails is tried once more.
"""

import os
import socket
import sys
from pathlib import Path

import torch
from faulty_child import open_library, outcome

from adapters.library import Library


def load(library: Library, name: str) -> None:
    library.slots.evict(library.version(name).digest)
    library.slots.forgive(library.version(name).digest)
    library.load(name, 30)


def main() -> None:
    torch.set_num_threads(1)
    folder, backbone, *names = sys.argv[1:]
    report = socket.socket(fileno=os.dup(0))
    opened: list[Library] = []
    for turn in ("start", "start again"):
        if not opened:
            result = outcome(lambda: opened.append(open_library(Path(folder), Path(backbone))))
            report.send(f"{turn}: {result}\n".encode())
    for turn in ("load", "load again") if opened else ():
        for name in names:
            result = outcome(lambda name=name: load(opened[0], name))
            report.send(f"{turn} {name}: {result}\n".encode())
    report.send(b"end\n")
    os._exit(0)


if __name__ == "__main__":
    main()
