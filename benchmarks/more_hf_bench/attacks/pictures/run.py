"""Run every attack on every method that makes a pipeline forget artists and things."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from more_hf import __version__

from ...artists.config import Erasure
from ...artists.judges import Judges
from ...artists.prompts import Prompts
from ...artists.run import GIVEN, quiet_copy
from ...errors import BenchmarkError
from ...machine import processes, this_run, weights_sha256
from ...methods.diffusion.pipelines import require_stable_diffusion
from ...methods.registry import find_diffusion_method
from ...run import Cell, held_settings, method_settings
from ..run import attack_settings, run_attacks
from ..store import AttackConfig
from ..tables import write_outputs
from .grid import write_grids
from .studio import Studio
from .victim import Victim


ORIGINAL = "original"


def run_picture_attacks(
    pipe: DiffusionPipeline,
    name: str,
    methods: Sequence[str],
    attacks: Sequence[str],
    forget: Sequence[str],
    *,
    prompts: Prompts,
    lessons: Prompts,
    targets: Mapping[str, Sequence[str]],
    judges: Judges,
    output: str | Path,
    steps: int,
    guidance: float,
    batch_size: int = 20,
    scheduler: str = "own",
    seeds: int = 1,
    limit: int | None = None,
    tuned: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """
    Let each method erase each concept, and run every attack on the results and on the original.

    Args:
        pipe (`DiffusionPipeline`):
            The original, a `StableDiffusionPipeline`. It is moved to accelerate's device; methods get a copy
            of its denoiser.
        name (`str`):
            The pipeline's name in the tables.
        methods (`Sequence[str]`):
            Names from `more_hf_bench.methods.registry.DIFFUSION`, or your own.
        attacks (`Sequence[str]`):
            Names from `more_hf_bench.attacks.registry.ATTACKS`.
        forget (`Sequence[str]`):
            Artists or things of the prompts.
        prompts (`Prompts`):
            The test prompts, which are drawn to see whether an attack succeeds.
        lessons (`Prompts`):
            The prompts of an attacker's own pictures; each concept's name replaces the artist's or thing's.
        targets (`Mapping[str, Sequence[str]]`):
            Concept -> its targets; methods that take one get the first.
        judges (`Judges`):
            Judges of artist and thing.
        output (`str` or `Path`):
            The folder for cells, rows, tables and pictures.
        steps (`int`), guidance (`float`), batch_size (`int`), scheduler (`str`):
            How to draw pictures, as in `run_artists`.
        seeds (`int`, *optional*, defaults to 1):
            Runs of each attack.
        limit (`int`, *optional*):
            The largest number of test prompts of each concept.
        tuned (`Mapping`, *optional*):
            Method or attack -> its own arguments.

    Returns:
        `list[dict]`: the lines of `summary.csv`.

    Raises:
        `BenchmarkError`, `SiteNotFoundError`: before anything is run, if the arguments do not fit together or
        `output` holds another benchmark.
    """
    # 1. Everything that all victims share: the original in a quiet pipeline, the prompts and the judges.
    require_stable_diffusion(pipe)
    state, tuned, output = processes(), tuned or {}, Path(output)
    pipe = quiet_copy(pipe.to(state.device), scheduler)
    drawing = {"steps": steps, "guidance": guidance, "limit": limit}
    studio = Studio(pipe, prompts.rows, lessons.rows, judges, batch_size=batch_size, **drawing)

    # 2. What each method is given for each concept.
    functions = {method: find_diffusion_method(method) for method in dict.fromkeys([ORIGINAL, *methods])}
    held = held_settings(output)
    settings = {
        method: method_settings(function, tuned.get(method, {}), without=GIVEN, held=held.get(method))
        for method, function in functions.items()
    }
    erasures = {concept: _erasure(concept, targets, studio, prompts) for concept in forget}
    for method in functions:
        for concept, erasure in erasures.items():
            erasure.arguments(method, concept)  # raises if the method needs several targets

    # 3. The configuration, whose cells are run as far as they are missing.
    config = AttackConfig(
        benchmark="attacks-pictures",
        more_hf=__version__,
        evaluation={
            "prompts": prompts.name,
            "prompts_sha256": prompts.sha256,
            "lessons": lessons.name,
            "lessons_sha256": lessons.sha256,
            "judges": judges.name,
            "scheduler": type(pipe.scheduler).__name__,
            **drawing,
        },
        references=[ORIGINAL],
        models={name: {"weights": weights_sha256(pipe)}},
        methods=settings,
        forget={
            concept: {"concept": concept, "other": _other(concept, erasure, studio), **asdict(erasure)}
            for concept, erasure in erasures.items()
        },
        attacks=attack_settings("pictures", attacks, tuned, output),
        seeds=seeds,
        runs=[this_run(state)],
    )

    def build(cell: Cell) -> Victim:
        erased = _erased(studio, functions[cell.method], cell, erasures[cell.forget], settings, output)
        other = config.forget[cell.forget]["other"]
        folder = output / "pictures" / cell.forget / cell.method
        return Victim(erased, studio, cell.forget, other, cell.seed, folder)

    def write(folder: Path, joined: AttackConfig) -> list[dict[str, Any]]:
        write_grids(folder)
        return write_outputs(folder, joined)

    return run_attacks(config, build, output=output, write=write)


def _erasure(concept: str, targets: Mapping[str, Sequence[str]], studio: Studio, prompts: Prompts) -> Erasure:
    """The targets of a concept and the names to keep: an artist's group, or all other things."""
    if concept not in targets:
        raise BenchmarkError(
            f"There is no target for {concept!r}. There are targets for {', '.join(targets)}."
        )
    if studio.kind(concept) == "artist":
        retain = prompts.group_of(concept)
    else:
        retain = [thing for thing in studio.names("thing") if thing != concept]
    return Erasure([targets[concept][0]], list(targets[concept]), retain)


def _other(concept: str, erasure: Erasure, studio: Studio) -> str:
    """A concept of the same kind that is neither forgotten nor a target."""
    names = [*erasure.retain, *studio.names(studio.kind(concept))]
    return next(name for name in names if name != concept and name not in erasure.several)


def _erased(
    studio: Studio,
    function: Callable[..., DiffusionPipeline],
    cell: Cell,
    erasure: Erasure,
    settings: Mapping[str, Mapping[str, Any]],
    output: Path,
) -> DiffusionPipeline:
    """Let a method erase from the original, with a denoiser of its own."""
    edited, method_options = copy.copy(studio.original), dict(settings[cell.method])
    edited.register_modules(unet=copy.deepcopy(studio.original.unet))
    if "checkpoint" in method_options:
        method_options["checkpoint"] = str(output / "models")  # so that training happens only once
    names = asdict(erasure.arguments(cell.method, cell.forget))
    edited = function(edited, [cell.forget], **names, **method_options)
    edited.set_progress_bar_config(disable=True)
    return edited
