"""Arguments that several benchmarks take, and how to read their values. Imports nothing heavy."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from accelerate import PartialState

logger = logging.getLogger(__name__)


def read_settings(file: Path | None) -> dict[str, dict[str, Any]] | None:
    """Read the JSON file of `--settings`: method -> its arguments."""
    if file is None:
        return None
    try:
        return json.loads(file.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error


def start_processes(device: str | None) -> PartialState:
    """accelerate's state of this process, on the device that `--device` names; says what it runs in."""
    from more_hf.cli.checkpoint import find_device

    from ..machine import describe, processes

    state = processes(None if device is None else find_device(device, "none"))
    logger.info("%s", describe(state))
    return state
