"""Read a pipeline's `model_index.json`, and load the pipeline for a command: dtype, device, offloading."""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from more_hf.data import FOLDER

from .options import DTYPES, EMOJI_SD


if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


INDEX = "model_index.json"
OFFLOADS = ("none", "model", "sequential")
STORED = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """The facts about a pipeline that are known before reading any weight."""

    model: str  # a folder, a Hub id, or `EMOJI_SD`
    pipeline: str  # its class
    parts: dict[str, str]  # component -> its class

    @property
    def in_one_file(self) -> bool:
        """Whether the model is a single file, whose pipeline is found out from it."""
        return not self.pipeline


def add_device(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--device", metavar="DEVICE", help=f"cpu, cuda, cuda:1, mps, ... ({default})")


def add_placement(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for where a pipeline runs; `place` uses them."""
    add_device(parser, "cuda where there is one, else cpu")
    parser.add_argument(
        "--offload",
        choices=OFFLOADS,
        default="none",
        help="keep on the device only the model that runs, or only the layer (none: all of the pipeline)",
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help=f"precision to load the weights in (as stored; float32 for {EMOJI_SD})",
    )


def read_checkpoint(model: str) -> Checkpoint:
    """
    Read a pipeline's index. For a model on the Hub, only this file is downloaded.

    Raises:
        FileNotFoundError: the folder has no index.
    """
    if Path(model).is_file():
        return Checkpoint(model, "", {})
    folder = FOLDER / "emoji_sd" if model == EMOJI_SD else Path(model)
    file = folder / INDEX
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        file = Path(hf_hub_download(model, INDEX))
    elif not file.is_file():
        raise FileNotFoundError(f"{model} has no {INDEX}, so it is not a pipeline of diffusers.")
    index = json.loads(file.read_text("utf-8"))
    entries = {name: value for name, value in index.items() if isinstance(value, list)}
    parts = {name: cls for name, (library, cls) in entries.items() if library is not None}
    return Checkpoint(model, index["_class_name"], parts)


def load_pipeline(
    checkpoint: Checkpoint,
    *,
    dtype: str | None = None,
    device: str | None = None,
    offload: str = "none",
    without: Iterable[str] = (),
    erased: bool = False,
    text_encoder: str | None = None,
) -> DiffusionPipeline:
    """
    Load a pipeline onto a device, by default onto `cuda` if there is one, and in the dtype in which its
    denoiser is stored.

    The components `without` are left out, as far as there are such. An `erased` pipeline is loaded with its
    record, by [`~more_hf.load`]; one file by [`~more_hf.load_file`], with a `text_encoder` from elsewhere.

    Raises:
        SiteNotFoundError: no component is a known denoiser. No weight is read then.
        ValueError: the device does not exist, or the weights are stored in a dtype that cannot be edited.
    """
    import torch

    import more_hf
    from more_hf.diffusion.families import denoiser_names
    from more_hf.saving.layers import pipeline_class

    where = find_device(device, offload)
    if checkpoint.in_one_file:
        own = getattr(torch, dtype or own_dtype(checkpoint))
        pipe = more_hf.load_file(checkpoint.model, text_encoder=text_encoder, dtype=own)
        place(pipe, where, offload)
        return pipe
    denoiser_names(checkpoint.pipeline, checkpoint.parts)  # refuses before a weight is read
    left_out = {name: None for name in without if name in checkpoint.parts}
    if "safety_checker" in left_out:
        left_out["requires_safety_checker"] = False
    dtype = dtype or own_dtype(checkpoint, **left_out)
    logger.info("Loading %s in %s for %s", checkpoint.model, dtype, where)
    if checkpoint.model == EMOJI_SD:
        pipe = more_hf.load_emoji_sd(dtype=getattr(torch, dtype))
    else:
        load = more_hf.load if erased else pipeline_class(checkpoint.pipeline).from_pretrained
        pipe = load(checkpoint.model, dtype=getattr(torch, dtype), **left_out)
    place(pipe, where, offload)
    return pipe


def own_dtype(checkpoint: Checkpoint, **left_out: None) -> str:
    """The dtype in which the denoiser is stored; a model on the Hub is downloaded first."""
    from diffusers import DiffusionPipeline

    from more_hf.diffusion.families import denoiser_names
    from more_hf.saving.tensor_file import read_tensor_file

    if checkpoint.model == EMOJI_SD:
        return "float32"
    if checkpoint.in_one_file:
        return str(read_tensor_file(checkpoint.model).precision).removeprefix("torch.")
    folder = Path(checkpoint.model)
    if not folder.is_dir():
        folder = Path(DiffusionPipeline.download(checkpoint.model, **left_out))
    return stored_dtype(folder / denoiser_names(checkpoint.pipeline, checkpoint.parts)[0])


def stored_dtype(folder: Path) -> str:
    """
    torch's name for the dtype in which most of a component's parameters are stored, from the headers of its
    files; `float32` if there is no safetensors file.

    Raises:
        ValueError: a weight of this dtype cannot be edited (fp8, for instance).
    """
    from safetensors import safe_open

    from more_hf.saving.contents import variant_of

    sizes: Counter[str] = Counter()
    files = list(folder.glob("diffusion_pytorch_model*.safetensors"))
    # A folder can hold a variant (fp16) next to the weights that are loaded, or instead of them.
    for file in [file for file in files if variant_of(file.name) == ""] or files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (it is no mapping)
                stored = weights.get_slice(name)
                sizes[stored.get_dtype()] += math.prod(stored.get_shape())
    if not sizes:
        return "float32"
    (most, _), *_ = sizes.most_common(1)
    if most not in STORED:
        raise ValueError(
            f"{folder} is stored in {most}, which cannot be edited. Take the model in one of "
            f"{', '.join(DTYPES)}, or pass `--dtype` to convert it."
        )
    return STORED[most]


def find_device(name: str | None, offload: str) -> torch.device:
    """
    The device that `--device` names, or the default.

    Raises:
        ValueError: the device does not exist here, or cannot be offloaded from.
    """
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        kind = torch.get_device_module(device)
    except RuntimeError as error:
        raise ValueError(f"torch knows no device {name!r}. Name one like cpu or cuda:1.") from error
    if not kind.is_available() or (device.index or 0) >= kind.device_count():
        raise ValueError(f"There is no device {name!r} here. Take another, or leave `--device` out.")
    if offload != "none" and device.type == "cpu":
        raise ValueError(f"`--offload {offload}` spares a device's memory, but the device is the CPU.")
    return device


def place(pipe: DiffusionPipeline, device: torch.device, offload: str) -> None:
    """Move a pipeline to a device, or let its parts move there when they are called."""
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device, silence_dtype_warnings=True)
