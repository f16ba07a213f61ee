"""The benchmarks' error."""

from __future__ import annotations

from more_hf.core.errors import MoreError


class BenchmarkError(MoreError, ValueError):
    """The benchmark cannot be run with these arguments, or the folder holds another one."""


class MethodError(BenchmarkError):
    """A method of the user's own failed; everything else is measured."""

    exit_status = 1
