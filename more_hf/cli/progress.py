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
    """Show what the library and the benchmarks log; of several processes, only the first reports stages."""
    handler = _AboveBars()
    is_first = os.environ.get("RANK", "0") == "0"
    packages = [logging.getLogger(name) for name in ("more_hf", "more_hf_bench")]
    before = [(package.level, package.propagate) for package in packages]
    for package in packages:
        package.addHandler(handler)
        package.setLevel(logging.INFO if is_first else logging.WARNING)
        package.propagate = False
    try:
        yield
    finally:
        for package, (level, propagate) in zip(packages, before, strict=True):
            package.removeHandler(handler)
            package.setLevel(level)
            package.propagate = propagate
