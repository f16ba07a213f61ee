"""Every attack on every method: cells that are measured once, each in a file of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from accelerate.utils import tqdm

from ..errors import BenchmarkError
from ..machine import processes
from .registry import ATTACKS, Kind, attacks_of
from .store import AttackConfig, Case
from .tables import write_outputs


def attack_settings(
    kind: Kind, names: Iterable[str], tuned: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The settings of the named attacks with their values: tuned, else the default.

    Raises:
        `BenchmarkError`: for a name that is none of an attack on `kind`, or a setting that it does not take.
    """
    known, collected = attacks_of(kind), {}
    for name in names:
        if name not in known:
            raise BenchmarkError(f"There is no attack {name!r} on {kind}. There are {', '.join(known)}.")
        _, *others = inspect.signature(known[name].load()).parameters.values()
        settings = {parameter.name: parameter.default for parameter in others}
        if unknown := sorted(tuned.get(name, {}).keys() - settings):
            raise BenchmarkError(f"{name} takes no `{unknown[0]}`. It takes {', '.join(settings)}.")
        collected[name] = {**settings, **tuned.get(name, {})}
    return collected


def run_attacks(
    config: AttackConfig, build: Callable[[Case], Any], *, output: str | Path
) -> list[dict[str, Any]]:
    """Run what is missing of a folder of attacks, and write its tables and its picture.

    Under `accelerate launch` the cases are split over the processes. A killed run continues with the same
    call: nothing is measured twice.

    Args:
        config (`AttackConfig`): what to run; it is joined with what `output` holds.
        build (`Callable`): makes the victim of a case, which is what the attacks take. It is called once for
            each case that has an attack left.
        output (`str` or `Path`): the folder for cells, rows, tables and the picture.

    Returns:
        `list[dict]`: the lines of `summary.csv`; empty but in the first process.

    Raises:
        `BenchmarkError`: before anything is run, if `output` holds another benchmark.
    """
    state, output = processes(), Path(output)
    joined = config.joined_with(output)
    state.wait_for_everyone()  # no process writes before all have read
    if state.is_main_process:
        joined.write(output)
    # Only what this call names is run, though the folder may have more that is unfinished.
    named = {cell.path for cell in config.cells(output)}
    missing = [cell for cell in joined.cells(output) if cell.path in named and not cell.is_done]
    groups = [(case, list(cells)) for case, cells in groupby(missing, lambda cell: cell.case)]
    mine = groups[state.process_index :: state.num_processes]
    bar = tqdm(total=sum(len(cells) for _, cells in mine), unit="attack", main_process_only=False)
    for case, cells in mine:
        victim = build(case)
        for cell in cells:
            bar.set_postfix_str(f"{cell.attack}: {case.model}, {case.method} without {case.forget}")
            cell.write(ATTACKS[cell.attack].run(victim, **joined.attacks[cell.attack]))
            bar.update()
    bar.close()
    state.wait_for_everyone()
    return write_outputs(output, joined) if state.is_main_process else []
