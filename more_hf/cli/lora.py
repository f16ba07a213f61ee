"""`more-hf lora`: erase concepts and write the edit as a LoRA file for the original model."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from .options import DTYPES, add_command, add_text_encoder
from .request import Request, add_layers_only, add_request, erased_pipeline, read_layers_only, read_request


if TYPE_CHECKING:
    from more_hf.diffusion.erasure import ConceptErasure


NOT_NEEDED = ("safety_checker", "image_encoder", "feature_extractor", "vae")

logger = logging.getLogger(__name__)


def add_to(commands) -> None:
    """Add it to the parser's sub-commands."""
    parser = add_command(
        commands,
        "lora",
        _lora,
        purpose="erase concepts and write the edit as a LoRA file for the original model",
        details="The model is loaded in the dtype that it is stored in, without the parts that\n"
        "read or make images.",
        examples=(
            "more-hf lora emoji-sd --concept Blobmoji --remap_to Fluent --output loras",
            'more-hf lora MODEL --concept "Van Gogh" --remap_to none --format kohya --output loras',
        ),
    )
    add = parser.add_argument
    add_request(parser)
    add(
        "--format",
        choices=("peft", "kohya", "comfyui"),
        default="peft",
        help="comfyui for ComfyUI, kohya for A1111 too (peft, for diffusers)",
    )
    add("--dtype", choices=DTYPES, default="float16", help="precision of the factors in the file (float16)")
    add_layers_only(parser)
    add_text_encoder(parser)
    add(
        "--output",
        type=Path,
        required=True,
        metavar="FILE_OR_DIR",
        help="where to write the LoRA: a .safetensors file, or a folder for it",
    )


def _lora(args: argparse.Namespace) -> int:
    request = read_request(args)
    parts = request.checkpoint.parts
    if request.checkpoint.in_one_file:
        return _from_file(args, request)
    if args.format == "kohya" and "unet" not in parts:
        denoiser = parts.get("transformer", "no UNet")
        raise ValueError(
            f"`--format kohya` names the layers of a UNet, and {request.checkpoint.pipeline} has {denoiser}. "
            "Use `--format comfyui`, or `--format peft` for diffusers."
        )

    import torch

    import more_hf
    from more_hf.diffusion.families import denoiser_names
    from more_hf.saving.layers import pipeline_class
    from more_hf.saving.lora import lora_path, refuse_without_loader

    denoisers = denoiser_names(request.checkpoint.pipeline, parts)
    lora_path(args.output, args.format)  # refuses what cannot be written
    refuse_without_loader(pipeline_class(request.checkpoint.pipeline), args.format)
    dtype = getattr(torch, args.dtype)
    if args.layers_only:
        given = read_layers_only(args, request)
        erasure = more_hf.erase_to_lora(path=args.output, format=args.format, dtype=dtype, **given)
        return _report(erasure, lora_path(args.output, args.format), len(denoisers))
    # The picture's size in a kohya file's metadata is the latent's by the VAE, and so is what is drawn.
    with_vae = args.format == "kohya" or request.edits_denoiser
    without = NOT_NEEDED[:-1] if with_vae else NOT_NEEDED
    pipe = erased_pipeline(request, dtype=None, device=args.device, offload=args.offload, without=without)
    logger.info("Writing the LoRA")
    file = more_hf.save_lora(pipe, args.output, format=args.format, dtype=dtype)
    return _report(more_hf.get_erasure(pipe), file, len(denoisers))


def _from_file(args: argparse.Namespace, request: Request) -> int:
    """`erase_to_lora` of a model in one file."""
    given = read_layers_only(args, request)

    import torch

    import more_hf
    from more_hf.saving.lora import lora_path

    path, dtype = lora_path(args.output, args.format), getattr(torch, args.dtype)
    return _report(more_hf.erase_to_lora(path=path, format=args.format, dtype=dtype, **given), path, 1)


def _report(erasure: ConceptErasure, file: Path, denoisers: int) -> int:
    from more_hf.saving.lora import lora_files

    print(erasure)
    print(f"\nSaved to {file}, for the original model at weight 1.")
    for second in lora_files(file, denoisers)[1:]:
        print(f"Also needed: {second}, with `load_into_transformer_2=True`.")
    print("Together with the erased weights it gives the concept back: keep the two apart.")
    return 0
