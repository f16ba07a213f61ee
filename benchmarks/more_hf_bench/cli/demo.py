"""`more-hf demo`: erase artists from the embedded pipeline and look at the result."""

import argparse
from pathlib import Path

from more_hf.cli.options import add_command, add_concepts, add_remap_to, positive, read_remap_to
from more_hf.data import EMOJI_ARTISTS

from .options import emoji_artist


def add_to(commands) -> None:
    """Add it to the parser's sub-commands."""
    parser = add_command(
        commands,
        "demo",
        _demo,
        purpose="erase artists from the embedded pipeline and look at the result",
        examples=(
            "more-hf demo",
            "more-hf demo --concept Blobmoji Monotone --remap_to Noto --limit 4 --output demo_two",
        ),
    )
    add = parser.add_argument
    artists = f"one artist, or several to erase together: {', '.join(EMOJI_ARTISTS)} (High Contrast)"
    add_concepts(parser, "concept", artists)
    add_remap_to(parser, note=" (Fluent, or another where that is erased)")
    add("--limit", type=positive, default=27, help="prompts in each of the three groups (27)")
    add("--steps", type=positive, default=10, help="denoising steps (10)")
    add("--guidance", type=float, default=4.0, help="classifier-free guidance (4)")
    add("--seed", type=int, default=0, help="of the first prompt; the others count up (0)")
    add("--batch_size", type=positive, default=16, help="images per call; does not change them (16)")
    add("--output", type=Path, default=Path("more_hf_demo"), metavar="DIR", help="folder (more_hf_demo)")


def _demo(args: argparse.Namespace) -> int:
    concepts = list(dict.fromkeys(map(emoji_artist, args.concept or ["High Contrast"])))
    remaining = [artist for artist in ("Fluent", *EMOJI_ARTISTS) if artist not in concepts]
    if not remaining:
        raise ValueError(f"`--concept` has all {len(EMOJI_ARTISTS)} artists. Leave at least one out.")
    targets = read_remap_to(args.remap_to or remaining[:1])
    if targets is not None:
        targets = [emoji_artist(name) for name in targets]

    from ..artists.demo import run_demo

    run_demo(
        concepts,
        targets,
        limit=args.limit,
        steps=args.steps,
        guidance=args.guidance,
        seed=args.seed,
        batch_size=args.batch_size,
        output=args.output,
    )
    return 0
