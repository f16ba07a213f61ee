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
    demo.add_argument("--concept", default="High Contrast", help=f"the artist: {', '.join(EMOJI_ARTISTS)} (High Contrast)")
    _add_remap_to(demo, default=None, note=" (Fluent, or Twemoji for Fluent)")
    demo.add_argument("--limit", type=_positive, default=27, help="prompts in each of the three groups (27)")
    demo.add_argument("--steps", type=_positive, default=10, help="denoising steps (10)")
    demo.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance (4)")
    demo.add_argument("--seed", type=int, default=0, help="the first prompt's seed; the others count up from it (0)")
    demo.add_argument("--batch_size", type=_positive, default=16, help="images per call; does not change them (16)")
    demo.add_argument("--output", type=Path, default=Path("more_hf_demo"), metavar="DIR", help="(more_hf_demo)")
    demo.set_defaults(run=_demo)

    erase = commands.add_parser("erase", help="erase concepts from a pipeline and save it with a record")
    _add_request(erase)
    erase.add_argument("--router", choices=("random", "hash"), help="the saved weights hold the mean expert with any")
    erase.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="(float32)")
    erase.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to save the pipeline to")
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

    bench = commands.add_parser("bench", help="measure what erasing does to the pictures of ten artists")
    benches = bench.add_subparsers(metavar="benchmark", required=True)
    _add_bench_artists(benches)
    report = benches.add_parser("report", help="make a benchmark's tables and pages again from its rows, without generating")
    report.add_argument("folder", metavar="DIR", type=Path, help="a folder that `more-hf bench` wrote, finished or not")
    report.set_defaults(run=_bench_report)
    return parser


def _add_bench_artists(benches) -> None:
    parser = benches.add_parser(
        "artists",
        help="erase artists in turn and measure LPIPS, style and content of all artists' pictures",
        description="Erase artists in turn and measure LPIPS, style and content of all artists' pictures. It can be killed at any point "
        "and goes on where it was; `accelerate launch -m more_hf bench artists ...` splits the pictures over processes.",
    )
    parser.add_argument("--model", default=EMOJI_SD, help=f"a folder, a Hub id, or {EMOJI_SD} ({EMOJI_SD})")
    parser.add_argument("--methods", default="more", metavar="A,B", help="methods to compare, with commas; original changes nothing (more)")
    parser.add_argument("--forget", nargs="+", action="extend", required=True, metavar="NAME", help="artists to erase in turn, or all")
    _add_remap_to(parser, default=None, note=", the same for every artist (from --targets)")
    parser.add_argument("--targets", default="targets", metavar="FILE", help="table with the columns forget, remap_to (the packaged one)")
    parser.add_argument("--retain", nargs="*", metavar="NAME", help="what methods are told to keep (the others of the artist's group)")
    parser.add_argument("--prompts", metavar="FILE", help=f"CSV file or packaged name (emoji10 for {EMOJI_SD}, else artists10)")
    parser.add_argument("--limit", type=_positive, metavar="N", help="the first N rows of each artist (all)")
    parser.add_argument("--seeds", type=_positive, default=1, metavar="K", help="pictures per prompt of the forgotten artist (1)")
    parser.add_argument("--scheduler", choices=("own", "lms", "ddim", "pndm", "dpm"), help=f"(own for {EMOJI_SD}, else lms)")
    parser.add_argument("--steps", type=_positive, help=f"denoising steps (10 for {EMOJI_SD}, else 50)")
    parser.add_argument("--guidance", type=float, help=f"classifier-free guidance (4 for {EMOJI_SD}, else 7.5)")
    parser.add_argument("--batch_size", type=_positive, default=16, help="images per call; does not change them (16)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="(float32)")
    parser.add_argument("--judges", choices=("emoji", "clip", "none"), help=f"of style and content (emoji for {EMOJI_SD}, else clip)")
    clip = ("ViT-L-14", "openai")
    parser.add_argument("--clip", nargs=2, default=clip, metavar=("MODEL", "WEIGHTS"), help=f"as open_clip names them ({' '.join(clip)})")
    parser.add_argument("--num_experts", type=_positive, metavar="N", help="for methods that take it, as all below (the method's default)")
    parser.add_argument("--router", choices=("random", "hash"))
    parser.add_argument("--solver", choices=("auto", "pinv", "covariance"))
    parser.add_argument("--tokens", choices=TOKENS)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for pictures, rows and tables")
    parser.set_defaults(run=_bench_artists)


def _add_request(parser: argparse.ArgumentParser) -> None:
    """The model and what to erase from it."""
    parser.add_argument("model", help=f"a folder, a Hub id, or {EMOJI_SD}; before the flags")
    parser.add_argument("--concept", nargs="+", action="extend", required=True, metavar="NAME", help="what to erase")
    parser.add_argument("--alias", action="append", default=[], metavar="NAME=ALIAS", help='"Van Gogh=Vincent van Gogh"; repeatable')
    _add_remap_to(parser, required=True)
    parser.add_argument("--retain", nargs="+", action="extend", metavar="NAME", help="what else must stay as it is")
    parser.add_argument("--num_experts", type=_positive, metavar="N", help="remapping experts (one per target)")
    parser.add_argument("--solver", choices=("auto", "pinv", "covariance"), default="auto", help="(auto)")
    parser.add_argument("--tokens", choices=TOKENS, help="which positions of a prompt give a concept's prototypes")
    parser.add_argument("--seed", type=int, default=0, help="draws the experts' targets (0)")


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
    pipe = _erased(args, args.dtype)

    import more_hf

    more_hf.save(pipe, args.output)
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
    targets = _targets(args.remap_to)
    if args.model == EMOJI_SD:
        for name in [*args.concept, *(targets or []), *(args.retain or [])]:
            _refuse_typo(name)

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


def _bench_artists(args: argparse.Namespace) -> int:
    emoji = args.model == EMOJI_SD
    targets = args.remap_to and _targets(args.remap_to)
    forget = "all" if args.forget == ["all"] else [_artist(name) if emoji else name for name in args.forget]

    import torch
    from diffusers import DiffusionPipeline

    import more_hf
    from more_hf.evaluation.artists import EMOJI, FIELD, run_artists
    from more_hf.evaluation.judges import ClipJudges, EmojiJudges
    from more_hf.evaluation.machine import processes
    from more_hf.evaluation.outputs import short_markdown
    from more_hf.evaluation.prompts import read_prompts, read_targets

    prompts = read_prompts(args.prompts or ("emoji10" if emoji else "artists10"))
    remap_to = targets if args.remap_to else read_targets(args.targets)
    state, judges = processes(), None
    if (args.judges or ("emoji" if emoji else "clip")) == "emoji":
        judges = EmojiJudges(state.device)
    elif args.judges != "none":
        model, weights = args.clip
        judges = ClipJudges.load(prompts.rows, model=model, pretrained=weights, device=state.device)
    dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[args.dtype]
    pipe = more_hf.load_emoji_sd(dtype=dtype) if emoji else DiffusionPipeline.from_pretrained(args.model, dtype=dtype)
    protocol = EMOJI if emoji else FIELD
    settings = {name: vars(args)[name] for name in ("num_experts", "router", "solver", "tokens", "seed")}
    summary = run_artists(
        pipe,
        args.methods.split(","),
        prompts,
        forget,
        remap_to=remap_to,
        retain=args.retain,
        output=args.output,
        judges=judges,
        seeds=args.seeds,
        limit=args.limit,
        scheduler=args.scheduler or protocol["scheduler"],
        steps=args.steps or protocol["steps"],
        guidance=protocol["guidance"] if args.guidance is None else args.guidance,
        batch_size=args.batch_size,
        settings={name: value for name, value in settings.items() if value is not None},
    )
    if state.is_main_process:
        print(short_markdown(summary))
        print(f"\nOpen {args.output / 'report.html'} and {args.output / 'grid.png'}; the tables are in {args.output / 'table.md'}.")
    return 0


def _bench_report(args: argparse.Namespace) -> int:
    from more_hf.evaluation.outputs import rebuild, short_markdown

    print(short_markdown(rebuild(args.folder)))
    return 0


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
    raise ValueError(f"The embedded pipeline has no artist {name!r}.{_did_you_mean(name)} Available: {', '.join(EMOJI_ARTISTS)}.")


def _refuse_typo(name: str) -> None:
    """Things can be erased from the embedded pipeline as well, so only a name just beside an artist's is refused."""
    if name.casefold() not in {artist.casefold() for artist in EMOJI_ARTISTS} and (hint := _did_you_mean(name, 0.8)):
        raise ValueError(f"The embedded pipeline has no artist {name!r}.{hint}")


def _did_you_mean(name: str, cutoff: float = 0.6) -> str:
    spelling = {artist.casefold(): artist for artist in EMOJI_ARTISTS}
    close = difflib.get_close_matches(name.casefold(), spelling, n=1, cutoff=cutoff)
    return f" Did you mean {spelling[close[0]]!r}?" if close else ""
