"""`trunkline serve` that may open FILES descriptors, as under `ulimit -n FILES`."""

import os
import resource

from server.cli import main

if __name__ == "__main__":
    files = int(os.environ["FILES"])
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    main()
