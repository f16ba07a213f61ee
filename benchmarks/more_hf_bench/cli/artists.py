"""`more-hf bench artists`: the benchmark of text-to-image pipelines."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from more_hf.cli.options import (
    DTYPES,
    EMOJI_SD,
    SEVERAL_PROCESSES,
    add_command,
    positive,
    read_remap_to,
    refuse_missing_model,
    refuse_typo,
)
from more_hf.core.request import CLIP

from ..artists.config import KINDS
from ..methods.registry import DIFFUSION, diffusion_groups
from .options import (
    NAMES,
    add_options,
    emoji_artist,
    flag,
    key,
    read_options,
    refuse_unknown,
    split_names,
    start_processes,
)
from .rehearse import OF_PICTURES, check_filled, rehearse_artists


@dataclass(frozen=True)
class ArtistsOptions:
    """What a benchmark of artists is told, by flags or in a file."""

    model: str = flag(EMOJI_SD, f"a folder, a Hub id, or {EMOJI_SD} ({EMOJI_SD})")
    methods: str | list = flag(
        "more",
        "methods to compare, with commas, your own as MODULE:FUNCTION; "
        f"or one of {', '.join(diffusion_groups())} (more)",
        metavar="A,B",
    )
    forget: str | list | dict | None = flag(
        None, "artists to erase in turn, or all; A+B erases two in one call", also="--concept", **NAMES
    )
    sizes: list | None = key(None, "in place of forget: sets of so many artists, and a curve over the sizes")
    kind: str = key("artists", "what is erased: artists or things (artists)")
    remap_to: list | None = flag(
        None, "what every artist is sent to; none erases without remapping (from targets)", **NAMES
    )
    targets: str = key("targets", "table with the columns forget, remap_to (the packaged one)")
    several: str = key("targets_several", "the same for methods that take several targets")
    retain: list | None = key(None, "what the methods are asked to keep (the others of the artist's group)")
    prompts: str | None = flag(
        None,
        f"CSV file or packaged name (of {EMOJI_SD} emoji10, emoji108 for things, emoji_levels for levels; "
        "else artists10)",
        metavar="FILE",
    )
    levels: str | None = key(
        None,
        f"ask in other words: levels of the prompts, with commas, or all (the prompts as they are); of "
        f"{EMOJI_SD}\n    name, alias, near, variant, short, long, and the last three with -trained",
    )
    limit: int | None = flag(
        None, "the first N rows of each artist at each level (all)", type=positive, metavar="N"
    )
    pictures: list | None = key(
        None, "how many prompts of what is forgotten, and of the rest, for each size and level (all)"
    )
    seeds: int = key(1, "pictures per prompt of the forgotten artist (1)")
    scheduler: str | None = key(None, f"own, lms, ddim, pndm or dpm (own for {EMOJI_SD}, else lms)")
    steps: int | None = flag(None, f"denoising steps (10 for {EMOJI_SD}, else 50)", type=positive)
    guidance: float | int | None = key(None, f"classifier-free guidance (4 for {EMOJI_SD}, else 7.5)")
    batch_size: int = flag(16, "images per call; does not change them (16)", type=positive)
    dtype: str = key("float32", f"of {', '.join(DTYPES)} (float32)")
    judges: str | None = key(
        None, f"of style and content: emoji, clip or none (emoji for {EMOJI_SD}, else clip)"
    )
    clip: list | tuple = key(CLIP, f"model and weights as open_clip names them ({' '.join(CLIP)})")
    settings: dict | None = key(None, "arguments for all methods that take them: router, solver, ...")
    tuned: dict | None = key(
        None, "method -> its own arguments, under `sizes` for each size; or the name of a JSON file of them"
    )

    @property
    def emoji(self) -> bool:
        return self.model == EMOJI_SD


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
            "more-hf bench artists --preset paper --rehearse --output DIR",
        ),
    )
    add_options(parser, ArtistsOptions, "artists")


def _bench_artists(args: argparse.Namespace) -> int:
    from ..artists.prompts import read_targets

    options = read_options(ArtistsOptions, args, _of_folder)
    if args.rehearse:
        options = rehearse_artists(options, args.output)
    refuse_missing_model(options.model)
    refuse_unknown([options.kind], KINDS, what="kind")
    refuse_unknown([options.dtype], DTYPES, what="dtype")
    methods = split_names(options.methods, diffusion_groups(), DIFFUSION, what="method")
    if (options.forget is None) == (options.sizes is None):
        raise ValueError("Say what to erase: `--forget NAME`, `--forget all`, or `sizes`; one of them.")
    if options.emoji and options.kind == "artists":
        for name in [*(options.remap_to or []), *(options.retain or [])]:
            refuse_typo(name)
    tuned = dict(options.tuned or {})
    by_size = {int(size): settings for size, settings in tuned.pop("sizes", {}).items()}
    prompts = _prompts(options)
    forget = _forget(options, prompts)
    if options.remap_to:
        targets, several = read_remap_to(options.remap_to), None
    else:
        targets, several = read_targets(options.targets), read_targets(options.several)

    import torch

    from ..artists.run import run_artists
    from ..artists.tables import short_markdown

    state = start_processes(args.device)
    pipe, protocol = load_pipeline(options.model, dtype=getattr(torch, options.dtype))
    judges = options.judges or ("emoji" if options.emoji else "clip")
    summary = run_artists(
        pipe,
        methods,
        prompts,
        forget,
        remap_to=targets,
        several=several,
        retain=options.retain,
        output=args.output,
        judges=judges_of(judges, options.clip, prompts, state.device),
        seeds=options.seeds,
        limit=options.limit,
        pictures=options.pictures and tuple(options.pictures),
        scheduler=options.scheduler or protocol["scheduler"],
        steps=options.steps or protocol["steps"],
        guidance=protocol["guidance"] if options.guidance is None else options.guidance,
        batch_size=options.batch_size,
        settings=options.settings,
        tuned=tuned,
        tuned_by_size=by_size,
    )
    if state.is_main_process:
        if args.rehearse:
            check_filled(summary, methods, OF_PICTURES)
        pages = f"{args.output / 'report.html'} and {args.output / 'grid.webp'}"
        print(short_markdown(summary, KINDS[options.kind]))
        print(f"\nOpen {pages}; the tables are in {args.output / 'table.md'}.")
    return 0


def _of_folder(data: Mapping[str, Any]) -> dict[str, Any]:
    """The options that made a folder, from its `config.json`."""
    from ..artists.config import ArtistsConfig
    from ..artists.run import SCHEDULERS

    config = ArtistsConfig.from_dict(data)
    made = config.generation
    names = {scheduler.__name__: name for name, scheduler in SCHEDULERS.items() if scheduler is not None}
    if config.model == EMOJI_SD:
        names = {}
    judges, *clip = (config.judges or "none").split()
    return {
        "model": config.model,
        "methods": list(config.methods),
        "tuned": config.methods,
        "forget": config.forget,
        "kind": config.kind,
        "prompts": made.prompts,
        "limit": config.limit,
        "seeds": config.seeds,
        "scheduler": names.get(made.scheduler["class"], "own"),
        "steps": made.steps,
        "guidance": made.guidance,
        "dtype": made.dtype,
        "judges": judges.lower(),
        "clip": clip,
    }


def _prompts(options: ArtistsOptions):
    from ..artists.prompts import IMAGE, read_prompts

    if options.levels is not None:
        of_emoji = "emoji_levels"
    else:
        of_emoji = "emoji10" if options.kind == "artists" else "emoji108"
    levels = None if options.levels in (None, "all") else options.levels.split(",")
    if levels is not None and IMAGE in levels:
        raise ValueError(
            f"This command loads no IP-Adapter, and {EMOJI_SD} has none, so that nobody can ask by a "
            f"picture. Leave the level {IMAGE} out."
        )
    name = options.prompts or (of_emoji if options.emoji else "artists10")
    prompts = read_prompts(name, KINDS[options.kind])
    return prompts if levels is None else prompts.at(levels)


def _forget(options: ArtistsOptions, prompts):
    """What is erased; names of the embedded pipeline's artists in its own spelling."""
    from ..artists.prompts import sets_of

    if options.sizes is not None:
        sets = {}
        for size in options.sizes:
            sets |= sets_of(prompts.names, size)
        return sets
    if options.forget in ("all", ["all"]):
        return "all"
    if isinstance(options.forget, dict) or not options.emoji or options.kind != "artists":
        return options.forget
    return ["+".join(map(emoji_artist, entry.split("+"))) for entry in options.forget]


def load_pipeline(model: str, **options: Any):
    """The pipeline of this name, and how its pictures are drawn unless one says otherwise."""
    from diffusers import DiffusionPipeline

    import more_hf

    from ..artists.run import EMOJI, FIELD

    if model == EMOJI_SD:
        return more_hf.load_emoji_sd(**options), EMOJI
    return DiffusionPipeline.from_pretrained(model, **options), FIELD


def judges_of(kind: str, clip: Sequence[str], prompts, device):
    """The judges of a kind, for these prompts; `clip` is a model and its weights. `None` for none."""
    from ..artists.judges import ClipJudges, EmojiJudges

    refuse_unknown([kind], ("emoji", "clip", "none"), what="kind of judges")
    if kind == "none":
        return None
    if kind == "emoji":
        return EmojiJudges(device)
    model, weights = clip
    return ClipJudges.load(prompts.rows, model=model, pretrained=weights, device=device)
