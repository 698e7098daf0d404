"""Logs for machines (one JSON object a line) or for people, with the id of the request they belong to."""

import logging
import sys
from contextvars import ContextVar

from pythonjsonlogger.json import JsonFormatter

request_id_var: ContextVar[str | None] = ContextVar("request_id", default=None)


def configure_logs(level: str, form: str, process: str) -> None:
    """Sends every logger's records to standard error; ``form`` is ``json`` or ``text``."""
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        handler.setFormatter(
            JsonFormatter(
                "{levelname}{name}{message}",
                style="{",
                timestamp=True,
                rename_fields={"levelname": "level", "name": "logger"},
                static_fields={"process": process},
            )
        )
    else:
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)-7s {process}: %(message)s"))
    handler.addFilter(_add_request_id)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Below a warning, httpx, Apprise and its urllib3 also tell the whole URL, the secret of a webhook with it.
    for noisy in ("uvicorn.error", "uvicorn.access", "httpx", "apprise", "urllib3", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _add_request_id(record: logging.LogRecord) -> bool:
    request_id = request_id_var.get()
    if request_id is not None and not hasattr(record, "request_id"):
        record.request_id = request_id
    return True
