"""
`run_artists`: draw every artist before and after each artist's erasure, and measure with LPIPS and judges.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate.utils import tqdm
from diffusers import DiffusionPipeline

from more_hf import __version__
from more_hf.core.request import names_in
from more_hf.diffusion.encoder import Encoder
from more_hf.diffusion.sites import find_denoiser

from ..errors import BenchmarkError
from ..machine import peak_memory, processes, this_run, weights_sha256
from ..methods.registry import find_diffusion_method
from ..run import Run, held_settings, method_settings, refuse_unused_settings
from .cells import Case, Picture, Pictures
from .config import JOINT, ArtistsConfig, Erasure, Generation, artists_of
from .generate import cut_off, generate, known, takes_pictures
from .grid import read_image
from .judges import LPIPS, ClipJudges, Judges, all_distances
from .prompts import IMAGE, Prompts, read_prompts, spread
from .rows import ORIGINAL
from .tables import write_outputs


FIELD = {"scheduler": "lms", "steps": 50, "guidance": 7.5}  # as for the published numbers
EMOJI = {"scheduler": "own", "steps": 10, "guidance": 4.0}  # for the embedded pipeline
SCHEDULERS = {
    "own": None,  # the one that the pipeline was saved with
    "lms": diffusers.LMSDiscreteScheduler,
    "ddim": diffusers.DDIMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "dpm": diffusers.DPMSolverMultistepScheduler,
}
# parameters of a method that are not settings; each reach is registered as a method of its own
GIVEN = ("remap_to", "retain", "reach", "sampling")

logger = logging.getLogger(__name__)

Method = Callable[..., DiffusionPipeline]


def run_artists(
    pipe: DiffusionPipeline,
    methods: str | Sequence[str] | Mapping[str, Method],
    prompts: str | Path | Prompts,
    forget: str | Sequence[str] | Mapping[str, Sequence[str] | Erasure],
    *,
    remap_to: str | Sequence[str] | Mapping[str, Sequence[str]] | None,
    output: str | Path,
    several: Mapping[str, Sequence[str]] | None = None,
    retain: Sequence[str] | None = None,
    judges: Judges | None = None,
    seeds: int = 1,
    limit: int | None = None,
    pictures: tuple[int, int] | None = None,
    scheduler: str = FIELD["scheduler"],
    steps: int = FIELD["steps"],
    guidance: float = FIELD["guidance"],
    batch_size: int = 16,
    settings: Mapping[str, Any] | None = None,
    tuned: Mapping[str, Mapping[str, Any]] | None = None,
    tuned_by_size: Mapping[int, Mapping[str, Mapping[str, Any]]] | None = None,
) -> list[dict[str, Any]]:
    """
    Erase each artist (or thing, depending on the prompts' kind) in turn with each method, and measure what
    that does to the pictures of all artists.

    Under `accelerate launch`, the pictures are split over the processes. The run can be killed at any point;
    the same call continues where it stopped.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]):
            The original. It is moved to accelerate's device, and otherwise not modified: methods get a copy
            of its denoiser.
        methods (`str`, `Sequence[str]` or `Mapping[str, Callable]`):
            Names from `more_hf_bench.methods.registry.DIFFUSION`; or your own, `"my_module:my_erase"`, a
            function that is called like `erase_concept`; or a mapping of names to such functions.
        prompts (`str`, `Path` or `Prompts`):
            A CSV file, the name of a packaged one, or a result of `read_prompts`.
        forget (`str`, `Sequence[str]` or `Mapping[str, Sequence[str] | Erasure]`):
            The artists to erase, one after the other; `"all"` for every artist of the prompts, provided that
            the model knows at least one. `"A+B"` erases A and B in one call. A mapping gives each set of
            artists a short name, or says all of each erasure as the `config.json` of a folder does.
        remap_to (`str`, `Sequence[str]` or `Mapping[str, Sequence[str]]`, *optional*):
            Targets of every erasure, or a mapping from each entry of `forget` to its targets. `None` erases
            without remapping.
        output (`str` or `Path`):
            The folder for pictures, rows and tables. It may already hold part of the same benchmark.
        several (`Mapping[str, Sequence[str]]`, *optional*):
            Targets for the methods that take several. Defaults to `remap_to`.
        retain (`Sequence[str]`, *optional*):
            Names that every method is asked to keep. Defaults to the other artists of the group.
        judges (`Judges`, *optional*):
            Without judges, the columns for style and content stay empty.
        seeds, limit, scheduler, steps, guidance, batch_size, settings, tuned:
            As the options of `more-hf bench artists`. The published numbers were made with the defaults of
            `scheduler`, `steps` and `guidance`; of an argument, `settings` take precedence over `tuned`.
        pictures (`tuple[int, int]`, *optional*):
            How many prompts of the forgotten names, and how many of the others, all erasures of one size
            share at each level, spread over the names. As many prompts without a name are added. Defaults to
            all prompts.
        tuned_by_size (`Mapping[int, Mapping[str, Mapping[str, Any]]]`, *optional*):
            Number of names erased together -> the same; these take precedence over `tuned`.

    Returns:
        `list[dict[str, Any]]`: the lines of `summary.csv`.

    Raises:
        BenchmarkError, JudgeError: before anything is generated, if the arguments do not fit together or
        `output` holds a benchmark with another configuration. MethodError: after all others are measured, if
        a method of your own failed.
    """
    # 1. Read and check the arguments.
    state, output = processes(), Path(output)
    prompts = prompts if isinstance(prompts, Prompts) else read_prompts(prompts)
    prompts = replace(prompts, rows=prompts.limited(limit))
    functions, sets = _functions(methods), _sets(forget, prompts)
    settings, tuned, by_size = settings or {}, tuned or {}, tuned_by_size or {}
    if seeds < 1 or batch_size < 1 or not sets or scheduler not in SCHEDULERS:
        raise BenchmarkError(
            f"Needs seeds and batch_size of at least 1, an artist to forget, and a scheduler of "
            f"{', '.join(SCHEDULERS)}; got {seeds}, {batch_size}, {list(sets)}, {scheduler!r}."
        )
    for own in (tuned, *by_size.values()):
        refuse_unused_settings(functions, settings, own, without=GIVEN)
    if judges is not None:
        judges.check(prompts.rows)

    # 2. Decide for each erasure its targets, the names to keep, the methods' own settings and its prompts.
    erasures = {}
    for entry, names in sets.items():
        if isinstance(forget, Mapping) and isinstance(forget[entry], Erasure):
            erasures[entry] = forget[entry]
            continue
        erasures[entry] = replace(
            _erasure(entry, names, remap_to, several, retain, prompts),
            settings={
                name: {key: value for key, value in own.items() if key not in settings}
                for name, own in by_size.get(len(names), {}).items()
            },
            cases=_share(entry, sets, pictures, prompts),
        )

    # 3. Join this run's configuration with the folder's, or refuse before anything is generated.
    held = held_settings(output)
    _check_reading(pipe, prompts, forget)
    pipe = quiet_copy(pipe.to(state.device), scheduler)
    config = ArtistsConfig(
        more_hf=__version__,
        model=str(pipe.config.get("_name_or_path") or ""),
        generation=_generation(pipe, prompts, steps, guidance),
        lpips=LPIPS,
        seeds=seeds,
        limit=limit,
        judges=None if judges is None else judges.name,
        judge_facts={} if judges is None else judges.facts,
        methods={
            name: method_settings(function, tuned.get(name, {}), settings, without=GIVEN, held=held.get(name))
            for name, function in functions.items()
        },
        forget=erasures,
        runs=[this_run(state)],
        kind=prompts.kind.name,
    )
    for name, entry in itertools.product(functions, sets):
        config.arguments(name, entry)  # raises if the method needs targets and there are none
    run = _Artists(config, output, pipe, judges, batch_size)

    # 4. Draw the original's pictures, then each method's of each erasure, as far as they are missing.
    cases_of = {entry: _cases(prompts, seeds, erasures[entry], sets[entry]) for entry in sets}
    before = dict.fromkeys(case for cases in cases_of.values() for case in cases)
    run.draw(pipe, run.original.of(before), desc="before")
    for entry, cases in cases_of.items():
        for name, function in functions.items():
            pictures = Pictures(output, run.config, name, entry)
            missing = run.missing(pictures.of(cases))
            if name != ORIGINAL and missing:
                with run.going_on(name, f"{name} without {entry}"):
                    run.draw(run.erased(function, pictures), missing, desc=f"{name} without {entry}")
    return run.finish(write_outputs)


class _Artists(Run):
    """A run, with everything that its pictures have in common: the original pipeline and the judges."""

    def __init__(
        self,
        config: ArtistsConfig,
        output: Path,
        pipe: DiffusionPipeline,
        judges: Judges | None,
        batch_size: int,
    ):
        super().__init__(config, output)
        self.pipe = pipe
        self.judges = judges
        self.batch_size = batch_size
        self.original = Pictures(output, self.config, ORIGINAL, "")

    def erased(self, function: Method, pictures: Pictures) -> DiffusionPipeline:
        """Let the method edit a pipeline with a denoiser of its own, and write down the cost."""
        edited, denoiser = copy.copy(self.pipe), find_denoiser(self.pipe)
        edited.register_modules(**copy.deepcopy(denoiser.parts))
        method, forget = pictures.method, pictures.forget
        arguments = asdict(self.config.arguments(method, forget))
        settings = self.config.settings(method, forget)
        forgotten = self.config.forget[forget].forgotten(forget)
        with peak_memory(self.state.device) as peak:
            start = time.perf_counter()
            edited = function(edited, forgotten, **arguments, **settings)
            if self.state.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        edited.set_progress_bar_config(disable=True)
        if self.state.is_main_process and not pictures.cost.is_done:
            pictures.cost.write(
                {
                    "method": method,
                    "forget": forget,
                    **arguments,
                    "settings": settings,
                    "seconds_prepare": round(seconds, 4),
                    "peak_memory": None if peak.mebibytes is None else round(peak.mebibytes, 1),
                }
            )
        return edited

    def draw(self, pipe: DiffusionPipeline, pictures: Sequence[Picture], *, desc: str) -> None:
        """
        Generate and measure this process's share of the missing pictures; each batch is written when done.
        """
        share = self.share(self.missing(pictures))
        bar = tqdm(total=len(share), desc=desc, unit="image", disable=not share)
        for start in range(0, len(share), self.batch_size):
            # another run may have drawn some meanwhile
            batch = [picture for picture in share[start : start + self.batch_size] if not picture.is_done]
            if batch:
                self._draw_batch(pipe, batch)
                bar.update(len(batch))
        bar.close()
        self.state.wait_for_everyone()

    def _draw_batch(self, pipe: DiffusionPipeline, batch: Sequence[Picture]) -> None:
        cases = [picture.case for picture in batch]
        rows = [case.row for case in cases]
        start = time.perf_counter()
        images = generate(
            pipe,
            [row.prompt for row in rows],
            [case.seed for case in cases],
            steps=self.config.generation.steps,
            guidance=self.config.generation.guidance,
            batch_size=self.batch_size,
            pictures=[row.image for row in rows],
        )
        seconds = round((time.perf_counter() - start) / len(batch), 4)
        style, content = [None] * len(batch), [None] * len(batch)
        if self.judges is not None:
            style, content = self.judges.judge(images, rows)
        scores = self.judges.scores(images, rows) if isinstance(self.judges, ClipJudges) else None
        before = images
        if batch[0].method != ORIGINAL:
            before = torch.stack([read_image(picture.image) for picture in self.original.of(cases)])
        distances = all_distances(before, images, self.state.device)
        for i, picture in enumerate(batch):
            measured = {name: round(values[i].item(), 6) for name, values in distances.items()}
            measured |= {"style": style[i], "content": content[i], "seconds": seconds}
            if scores is not None:
                measured["clip_score"] = round(scores[i], 4)
            picture.write(measured, images[i])


def _functions(methods: str | Sequence[str] | Mapping[str, Method]) -> dict[str, Method]:
    if isinstance(methods, Mapping):
        return dict(methods)
    names = [methods] if isinstance(methods, str) else methods
    return {name: find_diffusion_method(name) for name in names}


def _check_reading(
    pipe: DiffusionPipeline, prompts: Prompts, forget: str | Sequence[str] | Mapping[str, Sequence[str]]
) -> None:
    """
    Check that the pipeline can read the prompts, and warn about names beyond the end of what it reads.

    Raises:
        `BenchmarkError`: it cannot read pictures, or all names are to be forgotten and it knows none.
    """
    encoder, what = Encoder(pipe), prompts.kind.one
    if IMAGE in prompts.levels and not takes_pictures(pipe):
        raise BenchmarkError(
            f"{type(pipe).__name__} has no IP-Adapter, so it cannot read pictures. Leave the level {IMAGE!r} "
            "out, or load an adapter with `load_ip_adapter`."
        )
    if forget in ("all", ["all"]) and not known(encoder, prompts.names):
        name = prompts.names[0]
        raise BenchmarkError(
            f"The model knows no {what} of {prompts.name}: its tokenizer keeps no word of their names whole "
            f"({name!r} is {len(encoder.token_ids(name))} tokens). Choose prompts with {prompts.kind.name} "
            f"it was trained on, or name the {prompts.kind.name} instead of `all` to run them anyway."
        )
    if cut := cut_off(encoder, prompts):
        logger.warning(
            "In %d of %d prompts the %s's name ends after the %d tokens that the text encoder reads (first: "
            "case %d). The model sees no name in them. Shorten them or leave them out.",
            len(cut),
            len(prompts.rows),
            what,
            encoder.length,
            cut[0].case_number,
        )


def _sets(
    forget: str | Sequence[str] | Mapping[str, Sequence[str] | Erasure], prompts: Prompts
) -> dict[str, list[str]]:
    """The entries of `forget` with their names, spelt as in the prompts."""
    if isinstance(forget, Mapping):
        sets = {}
        for entry, names in forget.items():
            sets[entry] = _spelt(names.forgotten(entry) if isinstance(names, Erasure) else names, prompts)
        return sets
    entries = [forget] if isinstance(forget, str) else list(forget)
    if entries == ["all"]:
        entries = prompts.names
    sets = [_spelt(artists_of(entry), prompts) for entry in entries]
    return {JOINT.join(names): names for names in sets}


def _spelt(names: Sequence[str], prompts: Prompts) -> list[str]:
    """Names in the prompts' spelling. Raises `BenchmarkError` for a name that the prompts do not have."""
    spelling = {name.casefold(): name for name in prompts.names}
    for name in names:
        if name.casefold() not in spelling:
            raise BenchmarkError(
                f"{prompts.name} has no prompts of {name!r}. "
                f"Its {prompts.kind.name} are {', '.join(prompts.names)}."
            )
    return [spelling[name.casefold()] for name in names]


def _cases(prompts: Prompts, seeds: int, erasure: Erasure, forgotten: Collection[str]) -> list[Case]:
    """The erasure's prompts; those that name what it forgets, with all their seeds."""
    cases = []
    for row in prompts.rows:
        if erasure.cases is None or row.case_number in erasure.cases:
            samples = seeds if prompts.concept(row) in forgotten else 1
            cases += [Case(row, sample) for sample in range(samples)]
    return cases


def _generation(pipe: DiffusionPipeline, prompts: Prompts, steps: int, guidance: float) -> Generation:
    # Keys that start with an underscore are diffusers' own notes.
    own = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    denoiser = next(iter(find_denoiser(pipe).parts.values()))
    return Generation(
        more_hf=__version__,
        weights=weights_sha256(pipe),
        scheduler={"class": type(pipe.scheduler).__name__, **own},
        steps=steps,
        guidance=guidance,
        dtype=str(denoiser.dtype).removeprefix("torch."),
        device=denoiser.device.type,
        prompts=prompts.name,
        prompts_sha256=prompts.sha256,
    )


def _erasure(
    entry: str,
    forgotten: list[str],
    remap_to: str | Sequence[str] | Mapping[str, Sequence[str]] | None,
    several: Mapping[str, Sequence[str]] | None,
    retain: Sequence[str] | None,
    prompts: Prompts,
) -> Erasure:
    """The targets of one entry of `forget`, and the names to keep."""
    key = JOINT.join(forgotten).casefold()  # prompts and targets may differ in case: Mckernan, McKernan
    if isinstance(remap_to, Mapping):
        remap_to_folded = _with_folded_keys(remap_to)
        if key not in remap_to_folded:
            raise BenchmarkError(
                f"There is no target for {entry!r}. There are targets for {', '.join(remap_to)}."
            )
        remap_to = remap_to_folded[key]
    if isinstance(remap_to, str):
        remap_to = [remap_to]
    targets = None if remap_to is None else list(remap_to)
    if retain is None:
        retain = itertools.chain.from_iterable(map(prompts.group_of, forgotten))
    # A name that contains a forgotten one cannot be kept: "fire engine" would keep "fire".
    kept = [name for name in dict.fromkeys(retain) if not any(names_in(name, each) for each in forgotten)]
    return Erasure(
        remap_to=targets,
        several=targets if several is None else _with_folded_keys(several).get(key),
        retain=kept,
        names=None if forgotten == artists_of(entry) else forgotten,
    )


def _with_folded_keys(names: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    return {name.casefold(): targets for name, targets in names.items()}


def _share(
    entry: str, sets: Mapping[str, Sequence[str]], pictures: tuple[int, int] | None, prompts: Prompts
) -> list[int] | None:
    """
    The case numbers of an erasure's share of the prompts that all erasures of its size divide among
    themselves; `None` for all prompts.
    """
    if pictures is None:
        return None
    forgotten = sets[entry]
    others = [name for name in prompts.names if name not in forgotten]
    erasures = sum(len(names) == len(forgotten) for names in sets.values())
    forgotten_count, others_count = (math.ceil(count / erasures) for count in pictures)
    rows = []
    for level in prompts.levels:
        at_level = replace(prompts, rows=tuple(row for row in prompts.rows if row.level == level))
        rows += spread(at_level, forgotten, forgotten_count, entry)
        rows += spread(at_level, others, others_count, entry)
        rows += spread(at_level, [""], others_count, entry)
    return sorted(row.case_number for row in rows)


def quiet_copy(pipe: DiffusionPipeline, scheduler: str) -> DiffusionPipeline:
    """
    The same models in another pipeline object, with the given scheduler and without a progress bar. It has no
    safety checker either, which would turn pictures black and be measured as a change.
    """
    pipe = copy.copy(pipe)
    if SCHEDULERS[scheduler] is not None:
        pipe.register_modules(scheduler=SCHEDULERS[scheduler].from_config(pipe.scheduler.config))
    if "safety_checker" in pipe.components:
        pipe.register_modules(safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe
