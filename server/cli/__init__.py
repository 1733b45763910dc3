"""trunkline: the command line, one file a command."""

import click

from server import __version__
from server.cli.lazy import LazyGroup

main = click.version_option(__version__)(
    LazyGroup(
        help="One resident trunk, thousands of adapters.",
        members={
            "adapters": "server.cli.adapters:adapters",
            "backup": "server.cli.backup:backup",
            "bench": "server.cli.bench:bench",
            "calibrate": "server.cli.calibrate:calibrate",
            "classify": "server.cli.inference:classify",
            "critic": "server.cli.inference:critic",
            "encode": "server.cli.inference:encode",
            "import": "server.cli.checkpoints:import_",
            "info": "server.cli.info:info",
            "keys": "server.cli.keys:keys",
            "recover": "server.cli.recover:recover",
            "restore": "server.cli.backup:restore",
            "serve": "server.cli.serve:serve",
            "train": "server.cli.train:train_",
        },
    )
)
