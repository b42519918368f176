"""For all tests: only warnings of the product's own logs, so that a failure can be read."""

from __future__ import annotations

import logging

import structlog

structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
