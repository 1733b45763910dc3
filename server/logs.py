"""Logs: one line an event, to standard error."""

import logging


def configure_logs(level: str) -> None:
    """Set the level of trunkline's and uvicorn's loggers, and their one format."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    for name in ("trunkline", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())
