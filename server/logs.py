"""Logs: one line an event, to standard error, as text or as JSON."""

import logging
import time
from contextvars import ContextVar
from typing import Any

import orjson

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
FACTS = "facts"  # of a record: what is known of a request besides its message
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JSONLines(logging.Formatter):
    """time (RFC 3339, UTC), level, logger, message; request_id and facts where there are some."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = REQUEST_ID.get()
        if request_id is not None:
            line["request_id"] = request_id
        line |= getattr(record, FACTS, {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=repr).decode()


def configure_logs(level: str, form: str = "text") -> None:
    """Set the level of trunkline's and uvicorn's loggers, and their one format: text or json."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONLines() if form == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(handlers=[handler], force=True)
    logging.captureWarnings(form == "json")  # else they are text between the lines
    for name in ("trunkline", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())


def announce(message: str, facts: dict[str, Any]) -> None:
    """A log line with its facts, at any level: what an operator must be told."""
    log = logging.getLogger("trunkline")
    record = log.makeRecord(log.name, logging.INFO, "", 0, message, (), None, extra={FACTS: facts})
    log.handle(record)  # beyond the level, which log() asks for
