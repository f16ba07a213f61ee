"""`more-hf bench report`: make a benchmark's tables and pages again from its rows."""

import argparse
from pathlib import Path

from more_hf.cli.options import add_command, refuse_missing_folder


def add_to(benches) -> None:
    """Add it to the sub-commands of `bench`."""
    parser = add_command(
        benches,
        "report",
        _bench_report,
        purpose="make a benchmark's tables and pages again from its rows, without generating",
        examples=(
            "more-hf bench report benchmarks/artists/whole",
            "more-hf bench report benchmarks/kd/fashion-mnist-vit",
        ),
    )
    parser.add_argument(
        "folder", metavar="DIR", type=Path, help="a folder that `more-hf bench` wrote, finished or not"
    )


def _bench_report(args: argparse.Namespace) -> int:
    refuse_missing_folder(args.folder, "`bench report` reads a folder that `more-hf bench` wrote.")

    from ..artists import tables as artists
    from ..artists.kinds import ARTISTS, KINDS
    from ..attacks import tables as attacks
    from ..classes import tables as classes
    from ..run import read_config

    config = read_config(args.folder) or {}
    kinds = {"kd": classes, "kd-samples": classes}
    kinds |= {"attacks-classes": attacks, "attacks-pictures": attacks}
    benchmark = kinds.get(config.get("benchmark"), artists)
    of_kind = [KINDS[config.get("kind", ARTISTS.name)]] if benchmark is artists else []
    print(benchmark.short_markdown(benchmark.rebuild(args.folder), *of_kind))
    return 0
