"""The `more-hf` command. Heavy imports happen inside the commands, so that `--help` answers at once."""

import argparse
import difflib
import os
import sys
from pathlib import Path

from more_hf.data import EMOJI_ARTISTS
from more_hf.errors import MoreError


EMOJI_SD = "emoji-sd"
TOKENS = ("subject", "end", "subject+end", "positions", "last")


def main(argv: list[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv (`list[str]`, *optional*):
            The arguments after the program's name. Defaults to the process's own.

    Returns:
        `int`: 0 for success, 1 if `verify` found a difference, 2 for an expected failure, told in one line on stderr
        (with `MORE_HF_DEBUG=1` it is raised instead).

    Raises:
        SystemExit: from argparse, for `--help` and for arguments it does not know.
    """
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (MoreError, OSError, ValueError) as error:
        if os.environ.get("MORE_HF_DEBUG") == "1":
            raise
        print(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("more-hf", description="Erase concepts from text-to-image pipelines.")
    commands = parser.add_subparsers(metavar="command", required=True)

    demo = commands.add_parser("demo", help="erase one artist from the embedded pipeline and look at the result")
    demo.add_argument("--concept", default="Blobmoji", help=f"the artist: {', '.join(EMOJI_ARTISTS)} (Blobmoji)")
    _add_remap_to(demo, default=None, note=" (Fluent, or Twemoji for Fluent)")
    demo.add_argument("--limit", type=_positive, default=27, help="prompts in each of the three groups (27)")
    demo.add_argument("--steps", type=_positive, default=10, help="denoising steps (10)")
    demo.add_argument("--guidance", type=float, default=5.0, help="classifier-free guidance (5)")
    demo.add_argument("--seed", type=int, default=0, help="the first prompt's seed; the others count up from it (0)")
    demo.add_argument("--batch_size", type=_positive, default=16, help="images per call; does not change them (16)")
    demo.add_argument("--output", type=Path, default=Path("more_hf_demo"), metavar="DIR", help="(more_hf_demo)")
    demo.set_defaults(run=_demo)

    erase = commands.add_parser("erase", help="erase concepts from a pipeline and save it with a record")
    erase.add_argument("model", help=f"a folder, a Hub id, or {EMOJI_SD}; before the flags")
    erase.add_argument("--concept", nargs="+", action="extend", required=True, metavar="NAME", help="what to erase")
    erase.add_argument(
        "--alias", action="append", default=[], metavar="NAME=ALIAS", help='"Van Gogh=Vincent van Gogh"; repeatable'
    )
    _add_remap_to(erase, required=True)
    erase.add_argument("--retain", nargs="+", action="extend", metavar="NAME", help="what else must stay as it is")
    erase.add_argument("--num_experts", type=_positive, metavar="N", help="remapping experts (one per target)")
    erase.add_argument("--router", choices=("random", "hash"), help="the saved weights hold the mean expert with any")
    erase.add_argument("--solver", choices=("auto", "pinv", "covariance"), default="auto", help="(auto)")
    erase.add_argument("--tokens", choices=TOKENS, help="which positions of a prompt give a concept's prototypes")
    erase.add_argument("--seed", type=int, default=0, help="draws the experts' targets (0)")
    erase.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="(float32)")
    erase.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to save the pipeline to")
    erase.set_defaults(run=_erase)

    verify = commands.add_parser("verify", help="check a saved pipeline's files against its record")
    verify.add_argument("folder", metavar="DIR", help="a folder that `more-hf erase` or `more_hf.save` wrote")
    verify.set_defaults(run=_verify)
    return parser


def _add_remap_to(parser: argparse.ArgumentParser, *, note: str = "", **options) -> None:
    parser.add_argument(
        "--remap_to",
        nargs="+",
        action="extend",
        metavar="NAME",
        help=f"what the concepts are sent to; none erases without remapping{note}",
        **options,
    )


def _demo(args: argparse.Namespace) -> int:
    concept = _artist(args.concept)
    targets = _targets(args.remap_to or ["Twemoji" if concept == "Fluent" else "Fluent"])
    targets = targets and [_artist(name) for name in targets]

    from more_hf.demo import run_demo

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
    concepts = _with_aliases(args.concept, args.alias)
    targets = _targets(args.remap_to)
    if args.model == EMOJI_SD:
        for name in [*args.concept, *(targets or []), *(args.retain or [])]:
            _refuse_typo(name)

    import torch
    from diffusers import DiffusionPipeline

    import more_hf

    dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[args.dtype]
    if args.model == EMOJI_SD:
        pipe = more_hf.load_emoji_sd(dtype=dtype)
    else:
        pipe = DiffusionPipeline.from_pretrained(args.model, dtype=dtype)
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
    more_hf.save(pipe, args.output)
    print(more_hf.get_erasure(pipe).to_markdown())
    print(f"\nSaved to {args.output}. Check it with: more-hf verify {args.output}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    import more_hf

    result = more_hf.verify(args.folder)
    print(result.to_markdown())
    return 0 if result.ok else 1


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _targets(names: list[str]) -> list[str] | None:
    none = [name for name in names if name.casefold() == "none"]
    if none and len(names) > 1:
        raise ValueError(f"`--remap_to` has {none[0]!r} beside other names; pass names, or none alone.")
    return None if none else names


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


def _artist(name: str) -> str:
    """The embedded pipeline's spelling of an artist's name."""
    for artist in EMOJI_ARTISTS:
        if artist.casefold() == name.casefold():
            return artist
    raise ValueError(
        f"The embedded pipeline has no artist {name!r}.{_did_you_mean(name)} Available: {', '.join(EMOJI_ARTISTS)}."
    )


def _refuse_typo(name: str) -> None:
    """Things can be erased from the embedded pipeline as well, so only a name just beside an artist's is refused."""
    if name.casefold() not in {artist.casefold() for artist in EMOJI_ARTISTS} and (hint := _did_you_mean(name, 0.8)):
        raise ValueError(f"The embedded pipeline has no artist {name!r}.{hint}")


def _did_you_mean(name: str, cutoff: float = 0.6) -> str:
    spelling = {artist.casefold(): artist for artist in EMOJI_ARTISTS}
    close = difflib.get_close_matches(name.casefold(), spelling, n=1, cutoff=cutoff)
    return f" Did you mean {spelling[close[0]]!r}?" if close else ""
