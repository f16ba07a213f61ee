"""What `more-hf erase` and `more-hf lora` share: the arguments that say what to erase from which pipeline."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from more_hf.core.options import TOKENS

from .checkpoint import Checkpoint, add_placement, load_pipeline, read_checkpoint
from .options import (
    EMOJI_SD,
    add_model,
    add_remap_to,
    add_solver,
    positive,
    read_model,
    read_remap_to,
    refuse_typo,
)


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """
    What to erase from which pipeline.

    Args:
        checkpoint (`Checkpoint`):
            The pipeline, not loaded yet.
        concepts (`dict[str, list[str]]`):
            Name -> aliases.
        options (`dict[str, Any]`):
            Keyword arguments of [`~more_hf.erase_concept`].
    """

    checkpoint: Checkpoint
    concepts: dict[str, list[str]]
    options: dict[str, Any]


def add_request(parser: argparse.ArgumentParser) -> None:
    """Add the model and what to erase from it."""
    add = parser.add_argument
    add_model(parser, f"a folder, a Hub id, or {EMOJI_SD}")
    add(
        "--concept",
        "--forget",
        nargs="+",
        action="extend",
        required=True,
        metavar="NAME",
        help="what to erase",
    )
    add(
        "--alias",
        action="append",
        default=[],
        metavar="NAME=ALIAS",
        help='"Van Gogh=Vincent van Gogh"; repeatable',
    )
    add_remap_to(parser, required=True)
    add("--retain", nargs="+", action="extend", metavar="NAME", help="what else must stay as it is")
    add("--num_experts", type=positive, metavar="N", help="remapping experts (one per target)")
    add_solver(parser, default="auto")
    add("--tokens", choices=TOKENS, help="which positions of a prompt give a concept's prototypes")
    add("--seed", type=int, default=0, help="draws the experts' targets (0)")
    add_placement(parser)


def read_request(args: argparse.Namespace, *, router: str | None = None) -> Request:
    """
    Read the arguments of `add_request`, checked as far as names and files can tell, without heavy imports.

    Args:
        args (`argparse.Namespace`):
            The parsed arguments.
        router (`str`, *optional*):
            One of `ROUTERS`.
    """
    model = read_model(args)
    concepts = _with_aliases(args.concept, args.alias)
    targets = read_remap_to(args.remap_to)
    if model == EMOJI_SD:
        for name in [*args.concept, *(targets or []), *(args.retain or [])]:
            refuse_typo(name)
    options = {
        "remap_to": targets,
        "retain": args.retain,
        "num_experts": args.num_experts,
        "router": router,
        "solver": args.solver,
        "seed": args.seed,
    }
    if args.tokens is not None:
        options["tokens"] = args.tokens
    return Request(read_checkpoint(model), concepts, options)


def erased_pipeline(
    request: Request, *, dtype: str | None, device: str | None, offload: str, without: Iterable[str] = ()
) -> DiffusionPipeline:
    """
    Load a pipeline as `load_pipeline` does, and erase from it what was asked for.

    Returns:
        [`~diffusers.DiffusionPipeline`]: the erased pipeline, without offloading.
    """
    import more_hf
    from more_hf.core.request import ConceptRequest
    from more_hf.diffusion.plan import check_names

    # What is wrong with the request is told before anything is loaded.
    check_names(ConceptRequest.of(request.concepts, **request.options))
    pipe = load_pipeline(request.checkpoint, dtype=dtype, device=device, offload=offload, without=without)
    logger.info("Erasing %s", ", ".join(request.concepts))
    more_hf.erase_concept(pipe, request.concepts, **request.options)
    if offload != "none":
        # Offloaded weights are stand-ins, which could not be saved.
        pipe.remove_all_hooks()
    return pipe


def _with_aliases(concepts: list[str], aliases: list[str]) -> dict[str, list[str]]:
    named: dict[str, list[str]] = {concept: [] for concept in concepts}
    for pair in aliases:
        name, equals, alias = (part.strip() for part in pair.partition("="))
        if not (name and equals and alias):
            raise ValueError(f"`--alias {pair}` is not of the form NAME=ALIAS.")
        if name not in named:
            raise ValueError(
                f"`--alias {pair}` is for {name!r}, which is not erased; `--concept` has {concepts}."
            )
        named[name].append(alias)
    return named
