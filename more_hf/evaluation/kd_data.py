"""Alias of `more_hf.bench.classes.data`, for scripts that import `load_kd_data` from its former place."""

from ..bench.classes.data import load_kd_data


__all__ = ["load_kd_data"]
