"""What the benchmarks raise."""

from __future__ import annotations

from ..core.errors import MoreError


class BenchmarkError(MoreError, ValueError):
    """The benchmark cannot be run as asked for, or the folder holds another one."""
