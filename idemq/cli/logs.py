"""How the log lines of the command look."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from enum import StrEnum

import msgspec


class Format(StrEnum):
    """Lines for people, or one JSON object per line for programs."""

    text = "text"
    json = "json"


def configure(kind: Format) -> None:
    """Log `idemq` at INFO and everything else at WARNING, on standard error."""
    handler = logging.StreamHandler()
    formatter = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(_Json() if kind is Format.json else formatter)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("idemq").setLevel(logging.INFO)
    # While a broker is away it logs many errors a second; idemq says the same in one line each try.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()
