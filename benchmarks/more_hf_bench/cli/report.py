"""`more-hf bench report`: make a benchmark's tables and pages again from its rows."""

import argparse
from pathlib import Path
from types import ModuleType

from more_hf.cli.options import add_command, refuse_missing_folder

from ..errors import BenchmarkError
from ..run import BenchmarkConfig, read_config


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
    tables, config = benchmark_of(args.folder)
    of_kind = [config.of_kind] if config.benchmark == "artists" else []
    print(tables.short_markdown(tables.write_outputs(args.folder, config), *of_kind))
    return 0


def benchmark_of(folder: Path) -> tuple[ModuleType, BenchmarkConfig]:
    """
    The module that writes the tables of a benchmark's folder, and the folder's configuration. Raises
    `BenchmarkError` if it has none.
    """
    from ..artists import tables as artists
    from ..artists.config import ArtistsConfig
    from ..attacks import tables as attacks
    from ..attacks.store import AttackConfig
    from ..classes import tables as classes
    from ..classes.store import ClassesConfig

    held = read_config(folder)
    if held is None:
        raise BenchmarkError(f"{folder} has no config.json. Name the folder of a benchmark.")
    kinds = {"kd": (classes, ClassesConfig), "attacks": (attacks, AttackConfig)}
    tables, config = kinds.get(held.get("benchmark", "").partition("-")[0], (artists, ArtistsConfig))
    return tables, config.read(folder)
