"""Every attack on every method: cells that are measured once, each in a file of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from accelerate.utils import tqdm

from ..columns import rounded
from ..errors import BenchmarkError
from ..run import Cell, Run, read_config
from .registry import ATTACKS, Kind, attacks_of
from .store import AttackConfig
from .tables import write_outputs


def attack_settings(
    kind: Kind, names: Iterable[str], tuned: Mapping[str, Mapping[str, Any]], output: str | Path
) -> dict[str, dict[str, Any]]:
    """The settings of the named attacks with their values: tuned, else the default.

    A setting that the folder `output` lacks for an attack that it has is newer than its results. At its
    default the attack does what it did before, and it is left out.

    Raises:
        `BenchmarkError`: for a name that is none of an attack on `kind`, or a setting that it does not take.
    """
    known, collected = attacks_of(kind), {}
    held = (read_config(output) or {}).get("attacks", {})
    for name in names:
        if name not in known:
            raise BenchmarkError(f"There is no attack {name!r} on {kind}. There are {', '.join(known)}.")
        _, *others = inspect.signature(known[name].load()).parameters.values()
        settings = {parameter.name: parameter.default for parameter in others}
        if unknown := sorted(tuned.get(name, {}).keys() - settings):
            raise BenchmarkError(f"{name} takes no `{unknown[0]}`. It takes {', '.join(settings)}.")
        newer = settings.keys() - held.get(name, settings).keys()
        settings = {key: value for key, value in settings.items() if key not in newer}
        collected[name] = {**settings, **tuned.get(name, {})}
    return collected


def run_attacks(
    config: AttackConfig,
    build: Callable[[Cell], Any],
    *,
    output: str | Path,
    write: Callable[[Path, AttackConfig], list[dict[str, Any]]] = write_outputs,
) -> list[dict[str, Any]]:
    """Run what is missing of a folder of attacks, and write its tables and its picture.

    Under `accelerate launch` the victims are split over the processes. A killed run continues with the same
    call: nothing is measured twice.

    Args:
        config (`AttackConfig`): what to run; it is joined with what `output` holds.
        build (`Callable`): makes the victim of a cell, which is what the attacks take. It is called once for
            all cells of one victim that are left.
        output (`str` or `Path`): the folder for cells, rows, tables and the picture.
        write (`Callable`, *optional*): writes what is made of the cells, in the first process.

    Returns:
        `list[dict]`: the lines of `summary.csv`; empty but in the first process.

    Raises:
        `BenchmarkError`: before anything is run, if `output` holds another benchmark. `MethodError`: after
            everything else, if a method of the user's own failed.
    """
    run = Run(config, output)
    # Only what this call names is run, though the folder may have more that is unfinished.
    named = {cell.path for cell in config.cells(run.output)}
    missing = run.missing([cell for cell in run.config.cells(run.output) if cell.path in named])
    groups = [list(cells) for _, cells in groupby(missing, victim_of)]
    mine = run.share(groups)
    bar = tqdm(total=sum(map(len, mine)), unit="attack", main_process_only=False)
    for cells in mine:
        method, what = cells[0].method, f"{cells[0].method} without {cells[0].forget}"
        with run.going_on(method, f"{what}, {cells[0].model}, seed {cells[0].seed}"):
            victim = build(cells[0])
            for cell in cells:
                bar.set_postfix_str(f"{cell.attack}: {cell.model}, {what}")
                found = ATTACKS[cell.attack].run(victim, **run.config.attacks[cell.attack])
                cell.write([rounded(asdict(result)) for result in found])
                bar.update()
    bar.close()
    return run.finish(write)


def victim_of(cell: Cell) -> tuple[str, str, str, int]:
    """What names one erased model: which model, by which method, without what, in which run."""
    return cell.model, cell.method, cell.forget, cell.seed
