"""What the commands say while they work: one line for each stage, on stderr."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class _AboveBars(logging.Handler):
    """Lines that do not tear the progress bars below them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def stages_shown() -> Iterator[None]:
    """Show what the package logs, of several processes the first one's alone."""
    package, handler = logging.getLogger("more_hf"), _AboveBars()
    is_first = os.environ.get("RANK", "0") == "0"
    level, propagate = package.level, package.propagate
    package.addHandler(handler)
    package.setLevel(logging.INFO if is_first else logging.WARNING)
    package.propagate = False
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        package.propagate = propagate
