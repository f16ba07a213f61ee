"""Describe how a number was measured: processes, weights, versions, hardware, memory."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import nn


PACKAGES = (
    "torch", "diffusers", "transformers", "accelerate", "safetensors", "lpips", "open_clip_torch", "numpy",
)  # fmt: skip


def processes(device: torch.device | None = None) -> PartialState:
    """
    Return accelerate's state of this process, among those that `accelerate launch` or `torchrun` started. A
    `device` is this process's, also for later calls of accelerate; by default, accelerate decides.

    Raises:
        `ValueError`: a device is given for several processes, whose devices accelerate assigns.
    """
    # If there is an accelerator, several processes run on CPUs only if the launcher says so.
    state = PartialState(
        cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    )
    if device is not None:
        if state.num_processes > 1:
            raise ValueError(f"{state.num_processes} processes cannot share {device}. Leave `--device` out.")
        state.device = device
    return state


def describe(state: PartialState) -> str:
    """Describe how many processes share the work, and on which kind of device."""
    count = "1 process" if state.num_processes == 1 else f"{state.num_processes} processes"
    return f"Running in {count} on {state.device.type}."


def versions() -> dict[str, str]:
    """List the versions of Python and of the libraries that the numbers depend on."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def hardware(device: torch.device) -> str:
    """Describe the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def this_run(state: PartialState) -> dict[str, Any]:
    """Describe a run for its `config.json`: its time, command and machine."""
    program = Path(sys.argv[0])
    # The path of an installed command or of `python -m more_hf` means nothing to a reader.
    is_ours = program.name == "more-hf" or (
        program.name == "__main__.py" and program.parent.name == "more_hf"
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["more-hf" if is_ours else sys.argv[0], *sys.argv[1:]]),
        "processes": state.num_processes,
        "hardware": hardware(state.device),
        "versions": versions(),
    }


def weights_sha256(pipe) -> str:
    """
    Hash every tensor of a pipeline's models with sha256: the same wherever the pipeline was loaded from.
    """
    digest = hashlib.sha256()
    for component, module in sorted(pipe.components.items()):
        if not isinstance(module, nn.Module):
            continue
        for name, tensor in module.state_dict().items():
            digest.update(f"{component}.{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Peak:
    """The result of `peak_memory`: mebibytes, or `None` if the system does not report it."""

    mebibytes: float | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """
    Measure the peak memory inside the block: allocated on a CUDA device, or else resident in this process,
    which only Linux reports.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.mebibytes = torch.cuda.max_memory_allocated(device) / 2**20
        return
    is_resettable = sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)
    if is_resettable:
        # Reset the high-water mark to the memory that is resident now.
        Path("/proc/self/clear_refs").write_text("5")
    yield peak
    if is_resettable:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak.mebibytes = int(status["VmHWM"].split()[0]) / 1024
