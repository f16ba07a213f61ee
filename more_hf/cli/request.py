"""What `erase`, `lora` and `compare` share: what to erase from which pipeline, and how it is loaded."""

import argparse

from more_hf.core.options import TOKENS

from .options import (
    EMOJI_SD,
    add_remap_to,
    add_solver,
    positive,
    read_remap_to,
    refuse_missing_model,
    refuse_typo,
)


def add_request(parser: argparse.ArgumentParser) -> None:
    """Add the model and what to erase from it."""
    add = parser.add_argument
    models = f"a folder, a Hub id, or {EMOJI_SD}"
    add("model", nargs="?", metavar="MODEL", help=f"{models}; before the flags")
    add("--model", dest="model_flag", metavar="MODEL", help="the same as a flag")
    add("--concept", nargs="+", action="extend", required=True, metavar="NAME", help="what to erase")
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


def erased_pipeline(args: argparse.Namespace, *, dtype: str, router: str | None = None):
    """
    Load the pipeline that the arguments of `add_request` name, and erase what they name from it.

    Args:
        args (`argparse.Namespace`):
            The parsed arguments, all of which are checked before anything heavy is imported.
        dtype (`str`):
            To load the pipeline in, one of `DTYPES`.
        router (`str`, *optional*):
            One of `ROUTERS`.

    Returns:
        [`~diffusers.DiffusionPipeline`]: the erased pipeline.
    """
    model = _model(args)
    concepts = _with_aliases(args.concept, args.alias)
    targets = read_remap_to(args.remap_to)
    if model == EMOJI_SD:
        for name in [*args.concept, *(targets or []), *(args.retain or [])]:
            refuse_typo(name)

    pipe = load_pipeline(model, dtype)

    import more_hf

    tokens = {} if args.tokens is None else {"tokens": args.tokens}
    more_hf.erase_concept(
        pipe,
        concepts,
        remap_to=targets,
        retain=args.retain,
        num_experts=args.num_experts,
        router=router,
        solver=args.solver,
        seed=args.seed,
        **tokens,
    )
    return pipe


def load_pipeline(model: str, dtype: str):
    """
    Load a pipeline by the name that the command line has for it: a folder, a Hub id, or `EMOJI_SD`.

    Returns:
        [`~diffusers.DiffusionPipeline`]: the pipeline, on the CPU.
    """
    import torch
    from diffusers import DiffusionPipeline

    import more_hf

    if model == EMOJI_SD:
        return more_hf.load_emoji_sd(dtype=getattr(torch, dtype))
    return DiffusionPipeline.from_pretrained(model, dtype=getattr(torch, dtype))


def _model(args: argparse.Namespace) -> str:
    given = [model for model in (args.model, args.model_flag) if model is not None]
    if len(given) != 1:
        raise ValueError(f"Name one model, as MODEL or as `--model MODEL`; got {', '.join(given) or 'none'}.")
    refuse_missing_model(given[0])
    return given[0]


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
