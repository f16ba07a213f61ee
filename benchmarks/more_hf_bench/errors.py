"""The benchmarks' error."""

from __future__ import annotations

from more_hf.core.errors import MoreError


class BenchmarkError(MoreError, ValueError):
    """A benchmark cannot be run with these arguments, data, prompts or judges; or a folder holds another."""


class MethodError(BenchmarkError):
    """A method of the user's own failed; everything else is measured."""

    exit_status = 1
