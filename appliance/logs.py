"""Structured logs on stderr: for people on a terminal, else one JSON object a line.

`HAIRPIN_LOG` names the level: debug, info (the default), warning or error.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import structlog

from steering.errors import FieldError, WrongInput

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def configure_logs(default: str = "info") -> None:
    """Set up structlog, and the standard library's logging for what libraries say.

    ``default`` holds where `HAIRPIN_LOG` is not set. Raises WrongInput for an unknown level.
    """
    name = os.environ.get("HAIRPIN_LOG", "").lower() or default
    if name not in LEVELS:
        raise WrongInput([FieldError("HAIRPIN_LOG", f"{name!r} is none of {', '.join(LEVELS)}")])
    level = LEVELS[name]
    steps: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if sys.stderr.isatty():
        steps.append(structlog.dev.ConsoleRenderer())
    else:
        steps += [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=steps,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: structlog.PrintLogger(
            sys.stderr
        ),  # as it is when a line is written
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=steps[:-1],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                steps[-1],
            ],
        )
    )
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler], force=True)
