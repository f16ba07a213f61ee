"""`more-hf erase`: erase concepts from a pipeline and save it with a record."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import add_dtype, find_device, place
from .options import add_command, add_router, add_text_encoder
from .request import (
    Request,
    add_layers_only,
    add_request,
    drawing_options,
    erased_pipeline,
    needs_denoiser,
    read_layers_only,
    read_request,
)


if TYPE_CHECKING:
    from more_hf.diffusion.erasure import ConceptErasure

logger = logging.getLogger(__name__)


def add_to(commands) -> None:
    """Add it to the parser's sub-commands."""
    parser = add_command(
        commands,
        "erase",
        _erase,
        purpose="erase concepts from a pipeline and save it with a record",
        examples=(
            "more-hf erase emoji-sd --concept Blobmoji --remap_to Fluent --output without_blobmoji",
            'more-hf erase model.safetensors --concept "Van Gogh" cat --remap_to "Van Gogh=Monet" cat=dog '
            "--output erased.safetensors",
        ),
    )
    add = parser.add_argument
    add_request(parser)
    add_router(parser)
    add_dtype(parser)
    add_layers_only(parser)
    add_text_encoder(parser)
    add(
        "--output",
        type=Path,
        required=True,
        metavar="DIR_OR_FILE",
        help="folder to save the pipeline to, or the erased file of a MODEL in one file",
    )
    add(
        "--single_file",
        type=Path,
        metavar="FILE",
        help="also write a .safetensors checkpoint for ComfyUI and A1111",
    )
    add(
        "--compare",
        nargs="+",
        action="extend",
        metavar="PROMPT",
        help="also draw these prompts before and after, into compare.png in the folder",
    )


def _erase(args: argparse.Namespace) -> int:
    request = read_request(args)
    if args.layers_only or request.checkpoint.in_one_file:
        return _from_layers(args, request)
    if args.single_file is not None:
        from more_hf.saving.single_file import refuse_other_suffix

        refuse_other_suffix(args.single_file)
    pipe = erased_pipeline(request, dtype=args.dtype, device=args.device, offload=args.offload)

    import more_hf

    logger.info("Saving to %s", args.output)
    more_hf.save(pipe, args.output, include_delta=args.include_delta)
    if args.single_file is not None:
        more_hf.save_checkpoint(pipe, args.single_file)
    if args.compare:
        logger.info("Drawing %d prompts before and after", len(args.compare))
        place(pipe, find_device(args.device, args.offload), args.offload)
        picture = more_hf.compare(pipe, args.compare, seed=args.seed or 0, **drawing_options(args))
        picture.save(args.output / "compare.png")
    also = [args.single_file] if args.single_file is not None else []
    also += [args.output / "compare.png"] if args.compare else []
    return _report(more_hf.get_erasure(pipe), args.output, *also)


def _from_layers(args: argparse.Namespace, request: Request) -> int:
    """`erase_to_folder`, or `erase_file` for a model in one file, with the command's arguments."""
    for flag in ("compare", "single_file", "dtype"):
        if getattr(args, flag) is not None:
            raise needs_denoiser(flag, request)
    given = read_layers_only(args, request)

    import more_hf

    if request.checkpoint.in_one_file:
        if args.include_delta:
            raise ValueError("`--include_delta` writes a file beside the weights of a folder. Leave it out.")
        erasure = more_hf.erase_file(file=args.output, **given)
        encoder = f" --text_encoder {args.text_encoder}" if args.text_encoder is not None else ""
        return _report(erasure, args.output, with_flag=encoder)
    erasure = more_hf.erase_to_folder(folder=args.output, include_delta=args.include_delta, **given)
    return _report(erasure, args.output)


def _report(erasure: ConceptErasure, folder: Path, *also: Path, with_flag: str = "") -> int:
    print(erasure)
    for file in also:
        print(f"\nWrote {file}.")
    print(f"\nSaved to {folder}. Check it with: more-hf verify {folder}{with_flag}")
    return 0
