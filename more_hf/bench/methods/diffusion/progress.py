"""What a pipeline's user asked of its progress bar; diffusers keeps it in a private attribute, which only this file reads."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline


def progress_bar_config(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What `set_progress_bar_config` was called with; empty if it was not."""
    return dict(vars(pipe).get("_progress_bar_config", {}))


def is_quiet(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline's user disabled its progress bar; then nothing that works on the pipeline shows one."""
    return progress_bar_config(pipe).get("disable", False)
