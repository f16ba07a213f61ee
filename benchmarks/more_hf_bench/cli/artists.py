"""`more-hf bench artists`: the benchmark of text-to-image pipelines."""

import argparse
from pathlib import Path

from more_hf.cli.checkpoint import add_device
from more_hf.cli.options import (
    DTYPES,
    EMOJI_SD,
    SEVERAL_PROCESSES,
    add_command,
    add_concepts,
    add_remap_to,
    add_solver,
    emoji_artist,
    positive,
    read_remap_to,
    refuse_missing_model,
    refuse_typo,
    refuse_unknown,
)
from more_hf.core.request import ROUTERS, TOKENS

from ..artists.kinds import KINDS
from ..methods.registry import DIFFUSION, diffusion_groups
from .options import read_settings, start_processes


CLIP = ("ViT-L-14", "openai")
PASSED_ON = ("num_experts", "router", "solver", "tokens", "seed")  # to the methods that take them


def add_to(benches) -> None:
    """Add it to the sub-commands of `bench`."""
    parser = add_command(
        benches,
        "artists",
        _bench_artists,
        purpose="erase artists or things and measure LPIPS, style and content of all pictures",
        details="It can be killed at any point and goes on where it was;\n"
        f"{SEVERAL_PROCESSES.format('bench artists')}",
        resumes=True,
        examples=(
            "more-hf bench artists --methods original,more --forget Blobmoji --limit 4 --output DIR",
            "more-hf bench artists --kind things --sizes 1 10 --remap_to emoji --pictures 60 60 --output DIR",
        ),
    )
    add = parser.add_argument
    add("--model", default=EMOJI_SD, help=f"a folder, a Hub id, or {EMOJI_SD} ({EMOJI_SD})")
    add(
        "--methods",
        default="more",
        metavar="A,B",
        help="methods to compare, with commas, your own as MODULE:FUNCTION; "
        f"or one of {', '.join(diffusion_groups())} (more)",
    )
    several = "artists to erase in turn, or all; A+B erases two in one call"
    add_concepts(parser, "forget", several)
    add(
        "--sizes",
        type=positive,
        nargs="+",
        metavar="N",
        help="in place of --forget: sets of so many artists, and a curve over the sizes",
    )
    add("--kind", choices=tuple(KINDS), default="artists", help="what is erased (artists)")
    add_remap_to(parser, note=", the same for every artist (from --targets)")
    add(
        "--targets",
        default="targets",
        metavar="FILE",
        help="table with the columns forget, remap_to (the packaged one)",
    )
    add(
        "--several",
        default="targets_several",
        metavar="FILE",
        help="the same for methods that take several targets",
    )
    add(
        "--settings",
        type=Path,
        metavar="FILE",
        help="JSON file of the arguments of each method, under `sizes` for each size; the options below take "
        "precedence",
    )
    add(
        "--retain",
        nargs="*",
        metavar="NAME",
        help="what the methods are asked to keep (the others of the artist's group)",
    )
    add(
        "--prompts",
        metavar="FILE",
        help=f"CSV file or packaged name (of {EMOJI_SD} emoji10, emoji108 for things, emoji_levels for "
        "levels; else artists10)",
    )
    add(
        "--levels",
        metavar="A,B",
        help="ask in other words: levels of the prompts, with commas, or all (the prompts as they are); of "
        f"{EMOJI_SD} name, alias, near, variant, short, long, and the last three with -trained",
    )
    add("--limit", type=positive, metavar="N", help="the first N rows of each artist at each level (all)")
    add(
        "--pictures",
        type=positive,
        nargs=2,
        metavar=("F", "R"),
        help="prompts of what is forgotten and of the rest, in all for each size and level (all)",
    )
    add(
        "--seeds",
        type=positive,
        default=1,
        metavar="K",
        help="pictures per prompt of the forgotten artist (1)",
    )
    add("--scheduler", choices=("own", "lms", "ddim", "pndm", "dpm"), help=f"(own for {EMOJI_SD}, else lms)")
    add("--steps", type=positive, help=f"denoising steps (10 for {EMOJI_SD}, else 50)")
    add("--guidance", type=float, help=f"classifier-free guidance (4 for {EMOJI_SD}, else 7.5)")
    add("--batch_size", type=positive, default=16, help="images per call; does not change them (16)")
    add("--dtype", choices=DTYPES, default="float32", help="(float32)")
    add_device(parser, "accelerate's choice")
    add(
        "--judges",
        choices=("emoji", "clip", "none"),
        help=f"of style and content (emoji for {EMOJI_SD}, else clip)",
    )
    add(
        "--clip",
        nargs=2,
        default=CLIP,
        metavar=("MODEL", "WEIGHTS"),
        help=f"as open_clip names them ({' '.join(CLIP)})",
    )
    add(
        "--num_experts",
        type=positive,
        metavar="N",
        help="for methods that take it, as all below (the method's default)",
    )
    add("--router", choices=ROUTERS)
    add_solver(parser)
    add("--tokens", choices=TOKENS)
    add("--seed", type=int)
    add("--output", type=Path, required=True, metavar="DIR", help="folder for pictures, rows and tables")


def _bench_artists(args: argparse.Namespace) -> int:
    from ..artists.prompts import read_targets, sets_of

    emoji = args.model == EMOJI_SD
    refuse_missing_model(args.model)
    groups = diffusion_groups()
    methods = groups.get(args.methods) or args.methods.split(",")
    registered = [name for name in methods if ":" not in name]
    refuse_unknown(registered, DIFFUSION, what="method", also=f"; or one of {', '.join(groups)}")
    if (args.forget is None) == (args.sizes is None):
        raise ValueError("Say what to erase: `--forget NAME`, `--forget all`, or `--sizes N`; one of them.")
    if emoji and args.kind == "artists":
        for name in [*(args.remap_to or []), *(args.retain or [])]:
            refuse_typo(name)
    tuned = read_settings(args.settings) or {}
    by_size = {int(size): settings for size, settings in tuned.pop("sizes", {}).items()}
    kind, prompts = KINDS[args.kind], _prompts(args, emoji)
    if args.sizes is None:
        forget = _forget(args.forget, emoji and args.kind == "artists")
    else:
        forget = {name: names for size in args.sizes for name, names in sets_of(prompts.names, size).items()}
    if args.remap_to:
        targets, several = read_remap_to(args.remap_to), None
    else:
        targets, several = read_targets(args.targets), read_targets(args.several)

    import torch
    from diffusers import DiffusionPipeline

    import more_hf

    from ..artists.run import EMOJI, FIELD, run_artists
    from ..artists.tables import short_markdown

    state = start_processes(args.device)
    dtype = getattr(torch, args.dtype)
    if emoji:
        pipe, protocol = more_hf.load_emoji_sd(dtype=dtype), EMOJI
    else:
        pipe, protocol = DiffusionPipeline.from_pretrained(args.model, dtype=dtype), FIELD
    settings = {name: getattr(args, name) for name in PASSED_ON}
    summary = run_artists(
        pipe,
        methods,
        prompts,
        forget,
        remap_to=targets,
        several=several,
        retain=args.retain,
        output=args.output,
        judges=_judges(args, emoji, prompts, state.device),
        seeds=args.seeds,
        limit=args.limit,
        pictures=args.pictures and tuple(args.pictures),
        scheduler=args.scheduler or protocol["scheduler"],
        steps=args.steps or protocol["steps"],
        guidance=protocol["guidance"] if args.guidance is None else args.guidance,
        batch_size=args.batch_size,
        settings={name: value for name, value in settings.items() if value is not None},
        tuned=tuned,
        tuned_by_size=by_size,
    )
    if state.is_main_process:
        pages = f"{args.output / 'report.html'} and {args.output / 'grid.webp'}"
        print(short_markdown(summary, kind))
        print(f"\nOpen {pages}; the tables are in {args.output / 'table.md'}.")
    return 0


def _prompts(args: argparse.Namespace, emoji: bool):
    from ..artists.prompts import IMAGE, read_prompts

    if args.levels is not None:
        of_emoji = "emoji_levels"
    else:
        of_emoji = "emoji10" if args.kind == "artists" else "emoji108"
    levels = None if args.levels in (None, "all") else args.levels.split(",")
    if levels is not None and IMAGE in levels:
        raise ValueError(
            f"This command loads no IP-Adapter, and {EMOJI_SD} has none, so that nobody can ask by a "
            f"picture. Leave the level {IMAGE} out."
        )
    prompts = read_prompts(args.prompts or (of_emoji if emoji else "artists10"), KINDS[args.kind])
    return prompts if levels is None else prompts.at(levels)


def _forget(entries: list[str], emoji: bool) -> list[str] | str:
    if entries == ["all"]:
        return "all"
    if not emoji:
        return entries
    return ["+".join(map(emoji_artist, entry.split("+"))) for entry in entries]


def _judges(args: argparse.Namespace, emoji: bool, prompts, device):
    from ..artists.judges import ClipJudges, EmojiJudges

    kind = args.judges or ("emoji" if emoji else "clip")
    if kind == "none":
        return None
    if kind == "emoji":
        return EmojiJudges(device)
    model, weights = args.clip
    return ClipJudges.load(prompts.rows, model=model, pretrained=weights, device=device)
