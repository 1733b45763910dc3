"""faulty_server, which waits for a stuck batch for 5 s instead of 60."""

import faulty_server  # noqa: F401 -- its forward

from server.cli import main
from server.engine import engine

engine.LOST_AFTER_S = 5.0
main()
