"""The progress bar settings of a pipeline; diffusers keeps them in a private attribute, which only this file
reads."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline


def progress_bar_config(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The last arguments of `set_progress_bar_config`; empty if it was not called."""
    return dict(vars(pipe).get("_progress_bar_config", {}))


def is_quiet(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline's user disabled its progress bar; then nothing that works on the pipeline shows
    one."""
    return progress_bar_config(pipe).get("disable", False)
