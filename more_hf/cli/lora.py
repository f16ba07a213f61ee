"""`more-hf lora`: erase concepts and write the edit as a LoRA file for the original model."""

import argparse
from pathlib import Path

from .options import DTYPES, add_command
from .request import add_request, erased_pipeline


def add_to(commands) -> None:
    """Add it to the parser's sub-commands."""
    parser = add_command(
        commands,
        "lora",
        _lora,
        purpose="erase concepts and write the edit as a LoRA file for the original model",
        examples=(
            "more-hf lora emoji-sd --concept Blobmoji --remap_to Fluent --output loras",
            'more-hf lora MODEL --concept "Van Gogh" --remap_to none --format kohya --output loras',
        ),
    )
    add = parser.add_argument
    add_request(parser)
    add(
        "--format",
        choices=("peft", "kohya"),
        default="peft",
        help="kohya for ComfyUI and A1111 (peft, for diffusers)",
    )
    add("--dtype", choices=DTYPES, default="float16", help="of the file (float16)")
    add(
        "--output",
        type=Path,
        required=True,
        metavar="FILE_OR_DIR",
        help="a .safetensors file, or a folder for it",
    )


def _lora(args: argparse.Namespace) -> int:
    pipe = erased_pipeline(args, dtype="float32")

    import torch

    import more_hf

    dtype = getattr(torch, args.dtype)
    file = more_hf.save_lora(pipe, args.output, format=args.format, dtype=dtype)
    print(more_hf.get_erasure(pipe))
    print(f"\nSaved to {file}, for the original model at weight 1.")
    print("Together with the erased weights it gives the concept back: keep the two apart.")
    return 0
