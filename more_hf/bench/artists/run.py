"""`run_artists`: pictures of every artist before and after each artist's erasure, measured with LPIPS and by judges."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import PartialState
from accelerate.utils import tqdm
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn.functional import interpolate

from ... import __version__
from ...diffusion.sites import find_denoiser
from ..machine import peak_memory, processes, this_run, weights_sha256
from ..methods.registry import find_diffusion_method
from .images import generate, lpips_distance
from .prompts import PromptRow, Prompts, read_prompts
from .store import ORIGINAL, BenchmarkError, Case, Cell, collect_rows, join_config, read_config, told
from .summary import artists_of
from .tables import write_config, write_outputs


FIELD = {"scheduler": "lms", "steps": 50, "guidance": 7.5}  # what the published numbers were made with
EMOJI = {"scheduler": "own", "steps": 10, "guidance": 4.0}  # for the embedded pipeline
SCHEDULERS = {
    "own": None,  # the one that the pipeline was saved with
    "lms": diffusers.LMSDiscreteScheduler,
    "ddim": diffusers.DDIMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "dpm": diffusers.DPMSolverMultistepScheduler,
}


def run_artists(
    pipe: DiffusionPipeline,
    methods: str | Sequence[str] | Mapping[str, Callable[..., DiffusionPipeline]],
    prompts: str | Path | Prompts,
    forget: str | Sequence[str],
    *,
    remap_to: str | Sequence[str] | Mapping[str, Sequence[str]] | None,
    output: str | Path,
    several: Mapping[str, Sequence[str]] | None = None,
    retain: Sequence[str] | None = None,
    judges: Any = None,
    seeds: int = 1,
    limit: int | None = None,
    scheduler: str = FIELD["scheduler"],
    steps: int = FIELD["steps"],
    guidance: float = FIELD["guidance"],
    batch_size: int = 16,
    settings: Mapping[str, Any] | None = None,
    tuned: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Erase each artist in turn with each method, and measure what that did to the pictures of all artists.

    Under `accelerate launch` the rows are split over the processes. It can be killed at any point; the same call goes on where it was.

    Args:
        pipe (`DiffusionPipeline`): the original. Moved to accelerate's device, otherwise not modified: methods get a copy of its denoiser.
        methods: names from `more_hf.bench.methods.registry.DIFFUSION`; or your own, `"my_module:my_erase"`, a function that is called
            like `erase_concept`; or a mapping of names to such functions.
        prompts: a CSV file, the name of a packaged one, or what `read_prompts` returned.
        forget (`str` or `Sequence[str]`): the artists to erase, one after the other; `"all"` for every artist of the prompts. `"A+B"`
            erases A and B in one call.
        remap_to: targets of every erasure, or a mapping from each forgotten artist to its targets. `None` erases without remapping.
        output (`str` or `Path`): the folder that gets pictures, rows and tables. It may hold a part of the same benchmark already.
        several (*optional*): targets of the methods that take several (`SEVERAL_TARGETS`), as a mapping; by default `remap_to`.
        retain (`Sequence[str]`, *optional*): names that every method is told to keep; by default the others of the artist's group.
        judges (*optional*): `EmojiJudges` or `ClipJudges`; without, the columns of style and content stay empty.
        seeds (`int`, defaults to 1): images per prompt of the forgotten artist, with the seeds s, s + 100000, ...
        limit (`int`, *optional*): only the first rows of each artist.
        scheduler (`str`), steps (`int`), guidance (`float`): how to generate; by default as the published numbers were made.
        batch_size (`int`, defaults to 16): images per call; changes no image beyond rounding.
        settings (`Mapping[str, Any]`, *optional*): further arguments for the methods that take them.
        tuned (`Mapping[str, Mapping[str, Any]]`, *optional*): method to its own arguments; `settings` goes before them.

    Returns:
        `list[dict]`: the lines of `summary.csv`.

    Raises:
        `PromptFileError`, `JudgeError`, `BenchmarkError`: before anything is generated, if the arguments do not go together or `output`
        holds a benchmark with another configuration.
    """
    state, output = processes(), Path(output)
    prompts = prompts if isinstance(prompts, Prompts) else read_prompts(prompts)
    functions, settings, tuned = _functions(methods), settings or {}, tuned or {}
    forget = prompts.artists if forget == "all" else [forget] if isinstance(forget, str) else list(forget)
    if unknown := [artist for entry in forget for artist in artists_of(entry) if artist not in prompts.artists]:
        raise BenchmarkError(f"{prompts.name} has no prompts of {unknown[0]!r}. Its artists are {', '.join(prompts.artists)}.")
    if seeds < 1 or batch_size < 1 or not forget or scheduler not in SCHEDULERS:
        raise BenchmarkError(
            f"Needs seeds and batch_size of at least 1, an artist to forget, and a scheduler of {', '.join(SCHEDULERS)}; "
            f"got {seeds}, {batch_size}, {forget}, {scheduler!r}."
        )
    taken = {key for function in functions.values() for key in inspect.signature(function).parameters}
    if unknown := [key for key in settings if key not in taken]:
        raise BenchmarkError(f"No method among {', '.join(functions)} takes `{unknown[0]}`.")
    rows = prompts.limited(limit)
    if judges is not None:
        judges.check(rows)

    pipe = _quiet_copy(pipe.to(state.device), scheduler)
    config = {
        "more_hf": __version__,
        "model": str(pipe.config.get("_name_or_path") or ""),
        "generation": {
            "more_hf": __version__,
            "weights": weights_sha256(pipe),
            "scheduler": {"class": type(pipe.scheduler).__name__, **_plain(pipe.scheduler.config)},
            "steps": steps,
            "guidance": guidance,
            "dtype": str(find_denoiser(pipe).module.dtype).removeprefix("torch."),
            "device": state.device.type,
            "prompts": prompts.name,
            "prompts_sha256": prompts.sha256,
        },
        "lpips": "LPIPS(alex) 0.1; native size, and resized to 64 with (lpips_64) and without (lpips_64_rece) antialias",
        "seeds": seeds,
        "limit": limit,
        "judges": None if judges is None else judges.name,
        "judge_facts": {} if judges is None else judges.facts,
        "methods": {name: _settings(name, function, settings, tuned.get(name, {})) for name, function in functions.items()},
        "forget": {entry: _asked(entry, remap_to, several, retain, prompts) for entry in forget},
        "runs": [this_run(state)],
    }
    for name in functions:
        for entry in forget:
            told(config, name, entry)  # raises before anything is generated
    config = join_config(read_config(output), config, output)
    state.wait_for_everyone()  # everyone has read before one writes
    if state.is_main_process:
        write_config(output, config)
    state.wait_for_everyone()

    drawing = {"steps": steps, "guidance": guidance, "batch_size": batch_size, "judges": judges}
    before = Cell(output, config, ORIGINAL, None)
    cases = _cases(rows, seeds, {artist for entry in forget for artist in artists_of(entry)})
    _draw(pipe, before, before, cases, state, desc="before", **drawing)
    for entry in forget:
        for name, function in functions.items():
            cell = Cell(output, config, name, entry)
            cases = _cases(rows, seeds, artists_of(entry))
            if cell.folder == before.folder or not _missing(cell, cases, state):
                continue
            edited = _prepare(function, pipe, cell, told(config, name, entry), config["methods"][name], state)
            _draw(edited, cell, before, cases, state, desc=f"{name} without {entry}", **drawing)
            del edited
    state.wait_for_everyone()
    summary = []
    if state.is_main_process:
        summary = write_outputs(output, config, collect_rows(output, config))
    state.wait_for_everyone()
    return summary


def resize_64(images: Tensor, *, antialias: bool) -> Tensor:
    """Resize uint8 images to 64 x 64, bilinear, rounded to uint8: with antialias as UCE measures, without as RECE."""
    small = interpolate(images.float(), (64, 64), mode="bilinear", align_corners=False, antialias=antialias)
    return small.round().clamp(0, 255).to(torch.uint8)


def _functions(methods) -> dict[str, Callable[..., DiffusionPipeline]]:
    if isinstance(methods, Mapping):
        return dict(methods)
    names = [methods] if isinstance(methods, str) else methods
    return {name: find_diffusion_method(name) for name in names}


def _cases(rows: Sequence[PromptRow], seeds: int, artists: Collection[str]) -> list[Case]:
    """Every row, those of the forgotten artists with all their seeds."""
    return [Case(row, k) for row in rows for k in range(seeds if row.artist in artists else 1)]


def _settings(name: str, function: Callable, asked: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a method with their values: those asked for that it takes, those tuned for it, and its defaults."""
    parameters = inspect.signature(function).parameters.items()
    if unknown := [key for key in tuned if key not in dict(parameters)]:
        raise BenchmarkError(f"{name} takes no `{unknown[0]}`. Take it out of the settings.")
    asked = {**tuned, **asked}
    own = {key: parameter.default for key, parameter in parameters if key not in ("remap_to", "retain")}
    return {key: asked.get(key, default) for key, default in own.items() if default is not inspect.Parameter.empty or key in asked}


def _asked(entry: str, remap_to, several, retain: Sequence[str] | None, prompts: Prompts) -> dict[str, Any]:
    """What an erasure is told: its target, several targets where they are declared, and the names to keep."""
    if isinstance(remap_to, Mapping):
        if entry not in remap_to:
            raise BenchmarkError(f"There is no target for {entry!r}. There are targets for {', '.join(remap_to)}.")
        remap_to = remap_to[entry]
    targets = None if remap_to is None else [remap_to] if isinstance(remap_to, str) else list(remap_to)
    erased = artists_of(entry)
    kept = [name for artist in erased for name in prompts.group_of(artist)] if retain is None else retain
    return {
        "remap_to": targets,
        "several": targets if several is None else several.get(entry),
        "retain": [name for name in dict.fromkeys(kept) if name not in erased],
    }


def _quiet_copy(pipe: DiffusionPipeline, scheduler: str) -> DiffusionPipeline:
    """The same models under another pipeline object: with the scheduler, without progress bar, and without the safety checker, which
    would turn pictures black and be measured as a change."""
    pipe = copy.copy(pipe)
    if SCHEDULERS[scheduler] is not None:
        pipe.register_modules(scheduler=SCHEDULERS[scheduler].from_config(pipe.scheduler.config))
    if "safety_checker" in pipe.components:
        pipe.register_modules(safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's settings without diffusers' own notes."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _missing(cell: Cell, cases: Sequence[Case], state: PartialState) -> list[Case]:
    """The cases to do, the same for every process: nobody writes while one still looks."""
    state.wait_for_everyone()
    missing = cell.missing(cases)
    state.wait_for_everyone()
    return missing


def _prepare(function, pipe: DiffusionPipeline, cell: Cell, asked: Mapping, settings: Mapping, state: PartialState) -> DiffusionPipeline:
    """Let the method work on a pipeline with its own denoiser, and note what that cost."""
    edited, denoiser = copy.copy(pipe), find_denoiser(pipe)
    edited.register_modules(**{denoiser.name: copy.deepcopy(denoiser.module)})
    with peak_memory(state.device) as peak:
        start = time.perf_counter()
        edited = function(edited, artists_of(cell.forget), remap_to=asked["remap_to"], retain=asked["retain"], **settings)
        if state.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    edited.set_progress_bar_config(disable=True)
    if state.is_main_process:
        facts = {"method": cell.method, "forget": cell.forget, **asked, "settings": settings}
        cell.write_prepared({**facts, "seconds_prepare": round(seconds, 4), "peak_memory": peak.mebibytes and round(peak.mebibytes, 1)})
    return edited


def _draw(
    pipe: DiffusionPipeline,
    cell: Cell,
    before: Cell,
    cases: Sequence[Case],
    state: PartialState,
    *,
    steps: int,
    guidance: float,
    batch_size: int,
    judges: Any,
    desc: str,
) -> None:
    """Generate and measure this process's share of the missing cases, and write each batch as it comes."""
    # `split_between_processes` would hand the last case to every process that gets none.
    mine = _missing(cell, cases, state)[state.process_index :: state.num_processes]
    bar = tqdm(total=len(mine), desc=desc, unit="image", disable=not mine)
    for start in range(0, len(mine), batch_size):
        batch = cell.missing(mine[start : start + batch_size])  # another run may have done some
        if not batch:
            continue
        began = time.perf_counter()
        prompts, seeds = [case.row.prompt for case in batch], [case.seed for case in batch]
        images = generate(pipe, prompts, seeds, steps=steps, guidance=guidance, batch_size=batch_size)
        seconds = (time.perf_counter() - began) / len(batch)
        style, content = ([None] * len(batch),) * 2 if judges is None else judges.judge(images, [case.row for case in batch])
        distances = _distances(images, images if cell.folder == before.folder else before.read(batch), state.device)
        for i, case in enumerate(batch):
            measured = {name: round(values[i].item(), 6) for name, values in distances.items()}
            cell.write(case, images[i], {**measured, "style": style[i], "content": content[i], "seconds": round(seconds, 4)})
        bar.update(len(batch))
    bar.close()
    state.wait_for_everyone()


def _distances(images: Tensor, before: Tensor, device: torch.device) -> dict[str, Tensor]:
    """LPIPS at the images' own size and under the field's two resizes."""
    if images is before:
        return dict.fromkeys(("lpips", "lpips_64", "lpips_64_rece"), torch.zeros(len(images)))
    images, before = images.to(device), before.to(device)
    native = lpips_distance(before, images)
    if images.shape[-2:] == (64, 64):
        return {"lpips": native, "lpips_64": native, "lpips_64_rece": native}
    resized = {
        name: lpips_distance(resize_64(before, antialias=antialias), resize_64(images, antialias=antialias))
        for name, antialias in (("lpips_64", True), ("lpips_64_rece", False))
    }
    return {"lpips": native, **resized}
