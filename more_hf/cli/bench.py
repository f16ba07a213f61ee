"""`more-hf bench`: the benchmarks."""

import argparse
import json
from pathlib import Path

from more_hf.bench.methods import GROUPS

from .bench_kd import add_bench_kd
from .options import EMOJI_SD, TOKENS, add_remap_to, emoji_artist, positive, read_remap_to


def add_commands(commands) -> None:
    """Add it to the parser's sub-commands."""
    bench = commands.add_parser("bench", help="measure what erasing does to pictures, and to classifiers")
    benches = bench.add_subparsers(metavar="benchmark", required=True)
    _add_bench_artists(benches)
    add_bench_kd(benches)
    report = benches.add_parser("report", help="make a benchmark's tables and pages again from its rows, without generating")
    report.add_argument("folder", metavar="DIR", type=Path, help="a folder that `more-hf bench` wrote, finished or not")
    report.set_defaults(run=_bench_report)


def _add_bench_artists(benches) -> None:
    parser = benches.add_parser(
        "artists",
        help="erase artists in turn and measure LPIPS, style and content of all artists' pictures",
        description="Erase artists in turn and measure LPIPS, style and content of all artists' pictures. It can be killed at any point "
        "and goes on where it was; `accelerate launch -m more_hf bench artists ...` splits the pictures over processes.",
    )
    parser.add_argument("--model", default=EMOJI_SD, help=f"a folder, a Hub id, or {EMOJI_SD} ({EMOJI_SD})")
    words = ", ".join(GROUPS)
    parser.add_argument("--methods", default="more", metavar="A,B", help=f"methods to compare, with commas, or one of {words} (more)")
    erased = "artists to erase in turn, or all; A+B erases two in one call"
    parser.add_argument("--forget", nargs="+", action="extend", required=True, metavar="NAME", help=erased)
    add_remap_to(parser, default=None, note=", the same for every artist (from --targets)")
    parser.add_argument("--targets", default="targets", metavar="FILE", help="table with the columns forget, remap_to (the packaged one)")
    parser.add_argument("--several", default="targets_several", metavar="FILE", help="the same for methods that take several targets")
    parser.add_argument("--settings", type=Path, metavar="FILE", help="JSON, method to its arguments; the options below go before them")
    parser.add_argument("--retain", nargs="*", metavar="NAME", help="what methods are told to keep (the others of the artist's group)")
    parser.add_argument("--prompts", metavar="FILE", help=f"CSV file or packaged name (emoji10 for {EMOJI_SD}, else artists10)")
    parser.add_argument("--limit", type=positive, metavar="N", help="the first N rows of each artist (all)")
    parser.add_argument("--seeds", type=positive, default=1, metavar="K", help="pictures per prompt of the forgotten artist (1)")
    parser.add_argument("--scheduler", choices=("own", "lms", "ddim", "pndm", "dpm"), help=f"(own for {EMOJI_SD}, else lms)")
    parser.add_argument("--steps", type=positive, help=f"denoising steps (10 for {EMOJI_SD}, else 50)")
    parser.add_argument("--guidance", type=float, help=f"classifier-free guidance (4 for {EMOJI_SD}, else 7.5)")
    parser.add_argument("--batch_size", type=positive, default=16, help="images per call; does not change them (16)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="(float32)")
    parser.add_argument("--judges", choices=("emoji", "clip", "none"), help=f"of style and content (emoji for {EMOJI_SD}, else clip)")
    clip = ("ViT-L-14", "openai")
    parser.add_argument("--clip", nargs=2, default=clip, metavar=("MODEL", "WEIGHTS"), help=f"as open_clip names them ({' '.join(clip)})")
    parser.add_argument("--num_experts", type=positive, metavar="N", help="for methods that take it, as all below (the method's default)")
    parser.add_argument("--router", choices=("random", "hash"))
    parser.add_argument("--solver", choices=("auto", "pinv", "covariance"))
    parser.add_argument("--tokens", choices=TOKENS)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for pictures, rows and tables")
    parser.set_defaults(run=_bench_artists)


def _bench_artists(args: argparse.Namespace) -> int:
    emoji = args.model == EMOJI_SD
    targets = args.remap_to and read_remap_to(args.remap_to)
    forget = "all" if args.forget == ["all"] else args.forget
    if emoji and forget != "all":
        forget = ["+".join(map(emoji_artist, entry.split("+"))) for entry in forget]
    tuned = json.loads(args.settings.read_text("utf-8")) if args.settings else None

    import torch
    from diffusers import DiffusionPipeline

    import more_hf
    from more_hf.bench.artists.judges import ClipJudges, EmojiJudges
    from more_hf.bench.artists.prompts import read_prompts, read_targets
    from more_hf.bench.artists.run import EMOJI, FIELD, run_artists
    from more_hf.bench.artists.tables import short_markdown
    from more_hf.bench.machine import processes

    prompts = read_prompts(args.prompts or ("emoji10" if emoji else "artists10"))
    remap_to, several = (targets, None) if args.remap_to else (read_targets(args.targets), read_targets(args.several))
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
        GROUPS.get(args.methods) or args.methods.split(","),
        prompts,
        forget,
        remap_to=remap_to,
        several=several,
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
        tuned=tuned,
    )
    if state.is_main_process:
        print(short_markdown(summary))
        print(f"\nOpen {args.output / 'report.html'} and {args.output / 'grid.png'}; the tables are in {args.output / 'table.md'}.")
    return 0


def _bench_report(args: argparse.Namespace) -> int:
    from more_hf.bench.artists import tables as outputs
    from more_hf.bench.artists.store import read_config
    from more_hf.bench.classes import samples as kd_samples
    from more_hf.bench.classes import tables as kd_outputs

    kinds = {"kd": kd_outputs, "kd-samples": kd_samples}
    made_by = kinds.get((read_config(args.folder) or {}).get("benchmark"), outputs)
    print(made_by.short_markdown(made_by.rebuild(args.folder)))
    return 0
