"""Show the progress of commands: one line for each stage, on stderr."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class _AboveBars(logging.Handler):
    """Writes lines above the progress bars without breaking them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def stages_shown() -> Iterator[None]:
    """Show what the package logs; of several processes, only the first one reports its stages."""
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
