"""`more-hf demo | erase | lora | verify`: text-to-image pipelines."""

import argparse
from pathlib import Path

from more_hf.data import EMOJI_ARTISTS

from .options import EMOJI_SD, TOKENS, add_remap_to, emoji_artist, positive, read_remap_to, refuse_typo


def add_commands(commands) -> None:
    """Add them to the parser's sub-commands."""
    demo = commands.add_parser("demo", help="erase one artist from the embedded pipeline and look at the result")
    demo.add_argument("--concept", default="High Contrast", help=f"the artist: {', '.join(EMOJI_ARTISTS)} (High Contrast)")
    add_remap_to(demo, default=None, note=" (Fluent, or Twemoji for Fluent)")
    demo.add_argument("--limit", type=positive, default=27, help="prompts in each of the three groups (27)")
    demo.add_argument("--steps", type=positive, default=10, help="denoising steps (10)")
    demo.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance (4)")
    demo.add_argument("--seed", type=int, default=0, help="the first prompt's seed; the others count up from it (0)")
    demo.add_argument("--batch_size", type=positive, default=16, help="images per call; does not change them (16)")
    demo.add_argument("--output", type=Path, default=Path("more_hf_demo"), metavar="DIR", help="(more_hf_demo)")
    demo.set_defaults(run=_demo)

    erase = commands.add_parser("erase", help="erase concepts from a pipeline and save it with a record")
    _add_request(erase)
    erase.add_argument("--router", choices=("random", "hash"), help="the saved weights hold the mean expert with any")
    erase.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="(float32)")
    erase.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to save the pipeline to")
    erase.add_argument("--single_file", type=Path, metavar="FILE", help="also write a .safetensors checkpoint for ComfyUI and A1111")
    erase.set_defaults(run=_erase)

    lora = commands.add_parser("lora", help="erase concepts and write the edit as a LoRA file for the original model")
    _add_request(lora)
    lora.add_argument("--format", choices=("peft", "kohya"), default="peft", help="kohya for ComfyUI and A1111 (peft, for diffusers)")
    lora.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float16", help="of the file (float16)")
    lora.add_argument("--output", type=Path, required=True, metavar="FILE_OR_DIR", help="a .safetensors file, or a folder for it")
    lora.set_defaults(run=_lora, router=None)

    verify = commands.add_parser("verify", help="check a saved pipeline's files against its record")
    verify.add_argument("folder", metavar="DIR", help="a folder that `more-hf erase` or `more_hf.save` wrote")
    verify.set_defaults(run=_verify)


def _add_request(parser: argparse.ArgumentParser) -> None:
    """The model and what to erase from it."""
    parser.add_argument("model", help=f"a folder, a Hub id, or {EMOJI_SD}; before the flags")
    parser.add_argument("--concept", nargs="+", action="extend", required=True, metavar="NAME", help="what to erase")
    parser.add_argument("--alias", action="append", default=[], metavar="NAME=ALIAS", help='"Van Gogh=Vincent van Gogh"; repeatable')
    add_remap_to(parser, required=True)
    parser.add_argument("--retain", nargs="+", action="extend", metavar="NAME", help="what else must stay as it is")
    parser.add_argument("--num_experts", type=positive, metavar="N", help="remapping experts (one per target)")
    parser.add_argument("--solver", choices=("auto", "pinv", "covariance"), default="auto", help="(auto)")
    parser.add_argument("--tokens", choices=TOKENS, help="which positions of a prompt give a concept's prototypes")
    parser.add_argument("--seed", type=int, default=0, help="draws the experts' targets (0)")


def _demo(args: argparse.Namespace) -> int:
    concept = emoji_artist(args.concept)
    targets = read_remap_to(args.remap_to or ["Twemoji" if concept == "Fluent" else "Fluent"])
    targets = targets and [emoji_artist(name) for name in targets]

    from more_hf.bench.artists.demo import run_demo

    run_demo(
        concept,
        targets,
        limit=args.limit,
        steps=args.steps,
        guidance=args.guidance,
        seed=args.seed,
        batch_size=args.batch_size,
        output=args.output,
    )
    return 0


def _erase(args: argparse.Namespace) -> int:
    pipe = _erased(args, args.dtype)

    import more_hf

    more_hf.save(pipe, args.output)
    if args.single_file is not None:
        more_hf.save_checkpoint(pipe, args.single_file)
    print(more_hf.get_erasure(pipe).to_markdown())
    print(f"\nSaved to {args.output}. Check it with: more-hf verify {args.output}")
    return 0


def _lora(args: argparse.Namespace) -> int:
    pipe = _erased(args, "float32")

    import torch

    import more_hf

    file = more_hf.save_lora(pipe, args.output, format=args.format, dtype=getattr(torch, args.dtype))
    print(more_hf.get_erasure(pipe).to_markdown())
    print(f"\nSaved to {file}, for the original model at weight 1. With it the erased weights give the concept back: keep them apart.")
    return 0


def _erased(args: argparse.Namespace, dtype: str):
    """The pipeline without what the arguments of `_add_request` name."""
    concepts = _with_aliases(args.concept, args.alias)
    targets = read_remap_to(args.remap_to)
    if args.model == EMOJI_SD:
        for name in [*args.concept, *(targets or []), *(args.retain or [])]:
            refuse_typo(name)

    import torch
    from diffusers import DiffusionPipeline

    import more_hf

    if args.model == EMOJI_SD:
        pipe = more_hf.load_emoji_sd(dtype=getattr(torch, dtype))
    else:
        pipe = DiffusionPipeline.from_pretrained(args.model, dtype=getattr(torch, dtype))
    tokens = {} if args.tokens is None else {"tokens": args.tokens}
    more_hf.erase_concept(
        pipe,
        concepts,
        remap_to=targets,
        retain=args.retain,
        num_experts=args.num_experts,
        router=args.router,
        solver=args.solver,
        seed=args.seed,
        **tokens,
    )
    return pipe


def _verify(args: argparse.Namespace) -> int:
    import more_hf

    result = more_hf.verify(args.folder)
    print(result.to_markdown())
    return 0 if result.ok else 1


def _with_aliases(concepts: list[str], aliases: list[str]) -> dict[str, list[str]]:
    named = {concept: [] for concept in concepts}
    for pair in aliases:
        name, equals, alias = (part.strip() for part in pair.partition("="))
        if not (name and equals and alias):
            raise ValueError(f"`--alias {pair}` is not of the form NAME=ALIAS.")
        if name not in named:
            raise ValueError(f"`--alias {pair}` is for {name!r}, which is not erased; `--concept` has {concepts}.")
        named[name].append(alias)
    return named
