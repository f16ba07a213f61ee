"""`more-hf evaluate`: measure what a model still draws of a concept, and what else changed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import (
    add_dtype,
    add_placement,
    find_device,
    load_pipeline,
    own_dtype,
    place,
    read_checkpoint,
)
from .options import EMOJI_SD, add_command, add_import, positive, refuse_missing_model
from .request import drawing_options


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def add_to(commands) -> None:
    """Add it to the parser's sub-commands."""
    parser = add_command(
        commands,
        "evaluate",
        _evaluate,
        purpose="measure what a model still draws of a concept, and what else changed",
        details="It may have been made in any way. Both draw the same prompts from the same noise: a judge\n"
        "that is fitted on pictures by BASE says what they show, and LPIPS how far they are apart.",
        examples=(
            "more-hf evaluate emoji-sd without_noto --concept Noto --retain Twemoji Fluent --steps 20",
            'more-hf evaluate MODEL esd.safetensors --concept "Van Gogh" --retain Monet --output DIR',
        ),
    )
    add = parser.add_argument
    add("base", metavar="BASE", help=f"the original: a folder, a Hub id, or {EMOJI_SD}")
    add(
        "erased",
        metavar="ERASED",
        help="the model to measure: a folder, a Hub id, or a .safetensors file for BASE, which is a LoRA or "
        "holds weights of its denoiser",
    )
    add_import(parser)
    add("--concept", required=True, metavar="NAME", help="what was erased")
    add(
        "--retain",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="names that should be unchanged, and the target if it is known (some of its kind)",
    )
    add("--descriptions", nargs="+", action="extend", metavar="TEXT", help="the concept in other words")
    add("--pictures", type=positive, metavar="N", help="of each kind, by each model (32)")
    add("--steps", type=positive, metavar="N", help="denoising steps (the pipeline's default)")
    add("--guidance", type=float, metavar="G", help="classifier-free guidance (the pipeline's default)")
    add("--seed", type=int, default=0, metavar="N", help="of the first picture; the others count up (0)")
    add_dtype(parser)
    add_placement(parser)
    add("--output", type=Path, metavar="DIR", help="write the table and a sheet of pictures there")


def _evaluate(args: argparse.Namespace) -> int:
    refuse_missing_model(args.base)
    original = read_checkpoint(args.base)
    file = Path(args.erased)
    if file.suffix == ".safetensors":
        if not file.is_file():
            raise FileNotFoundError(f"There is no file {str(file)!r}. Name a file of weights, or a folder.")
        checkpoint = original
    else:
        refuse_missing_model(args.erased)
        checkpoint = read_checkpoint(args.erased)

    device = find_device(args.device, args.offload)

    import more_hf

    # Both in one precision, so that its rounding is not taken for the edit.
    options = {"dtype": args.dtype or own_dtype(original), "device": "cpu"}
    base, erased = load_pipeline(original, **options), load_pipeline(checkpoint, **options)
    if file.suffix == ".safetensors":
        put_weights(erased, file)
    for pipe in (base, erased):
        place(pipe, device, args.offload)
    given = {"retain": args.retain, "descriptions": args.descriptions, "pictures": args.pictures}
    found = more_hf.evaluate(
        base,
        erased,
        args.concept,
        sampling=drawing_options(args),
        seed=args.seed,
        **{name: value for name, value in given.items() if value is not None},
    )
    print(found.to_markdown())
    if args.output is not None:
        found.save(args.output)
        print(f"\nOpen {args.output / 'sheet.png'}.")
    return 0


def put_weights(pipe: DiffusionPipeline, file: Path) -> None:
    """
    Put a file of weights into a pipeline: a LoRA, or some or all weights of its denoiser.

    Raises:
        ValueError: it is neither.
    """
    from safetensors.torch import load_file

    from more_hf.diffusion.sites import find_denoiser

    tensors = load_file(file)
    if any("lora" in name for name in tensors):
        pipe.load_lora_weights(file.parent, weight_name=file.name)
        return
    denoiser = find_denoiser(pipe)
    if unknown := sorted(tensors.keys() - denoiser.module.state_dict().keys()):
        raise ValueError(
            f"{file} has `{unknown[0]}`, which is no weight of `{denoiser.name}` by diffusers' names, and no "
            "LoRA. Convert it, or name a folder of the whole pipeline."
        )
    denoiser.module.load_state_dict(tensors, strict=False)
