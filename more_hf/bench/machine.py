"""What a number was measured on: processes, weights, versions, hardware, memory."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import shlex
import sys
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import nn


PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "lpips",
    "open_clip_torch",
    "numpy",
)


def processes() -> PartialState:
    """
    This process among those that `accelerate launch` or `torchrun` started. Several on CPUs have to be asked
    for as such.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that have a part in the numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def this_run(state: PartialState) -> dict[str, Any]:
    """When, with which command and on what a benchmark runs: an entry of its `config.json`."""
    program = Path(sys.argv[0])
    ours = program.name == "more-hf" or (program.name == "__main__.py" and program.parent.name == "more_hf")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["more-hf" if ours else sys.argv[0], *sys.argv[1:]]),
        "processes": state.num_processes,
        "hardware": hardware(state.device),
        "versions": versions(),
    }


def weights_sha256(pipe) -> str:
    """
    sha256 over every tensor of the pipeline's models: what its images depend on, wherever it was loaded from.
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
    """Filled by `peak_memory`: mebibytes, or `None` where the system does not say."""

    mebibytes: float | None = None


@contextmanager
def peak_memory(device: torch.device):
    """
    Measure the most memory held inside the block: allocated on a CUDA device, else resident in this process
    (Linux).
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.mebibytes = torch.cuda.max_memory_allocated(device) / 2**20
        return
    resettable = sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)
    if resettable:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
    yield peak
    if resettable:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak.mebibytes = int(status["VmHWM"].split()[0]) / 1024
