"""
The denoiser's own activations as features: what its layers read of pictures of a name.

An edit of the layers that read text shuts the door of a name, and whoever learns another word for it walks
around. Behind every word the denoiser reads its own activations. Their means over pictures of the forgotten
name and, from the same noise, of its target are prototypes like any others.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..core.errors import SiteNotFoundError
from ..core.facts import TEXT_SPACES, ConceptFacts
from ..core.interrupts import unwound
from ..core.moment import Moment
from ..core.prototypes import PrototypeFitter, Prototypes
from ..core.request import ConceptRequest
from ..core.site import Site, check_unshared
from ..core.views import running_eagerly
from .encoder import column
from .prompts import TEMPLATES, everyday_prompts, names_in
from .sites import Denoiser, base_layer, find_sites, is_lora


# Levels of noise are cut into so many equal parts, each with prototypes of its own.
PARTS = 3
LEVELS = 2 * PARTS  # of noise at which a finished picture is looked at, besides noise alone
BATCH = 8  # pictures that are drawn together
POSITIONS = 64  # of a picture that count, evenly
ROUNDING = 1e-6  # as a share: the difference of two means over float32 activations that is none
ORDINARY = "ordinary pictures"  # what a concept without a target is sent to
RETAINED = "pictures of retained names"
OWN = "pictures of the concepts"
MEANS = "means over each name's pictures"


@dataclass(frozen=True)
class Activations:
    """
    What the layers read of pictures.

    Args:
        spaces (`dict[str, str]`):
            Layer -> its space of features; layers that read the same tensor share one.
        prototypes (`dict[str, Prototypes]`):
            Space -> the prototype of each concept and part, and behind it the mean of its targets' prototypes
            under the name that `target_of` gives; with the second moment of ordinary pictures and of those of
            retained names, both to the same mass.
        own (`dict[str, Moment]`):
            Space -> the second moment of the concepts' own pictures.
    """

    spaces: dict[str, str]
    prototypes: dict[str, Prototypes]
    own: dict[str, Moment]


PART_NAMES = tuple(f"part {part + 1} of {PARTS}" for part in range(PARTS))


def in_place_of(concept: str, target: str) -> str:
    """What pictures of a target are called that are drawn with a concept's sentences and noise."""
    return f"{target} in place of {concept}"


def target_of(forgotten: str) -> str:
    """The name of what a forgotten prototype is sent to."""
    return f"target of {forgotten}"


@torch.no_grad()
def record_activations(
    pipe: DiffusionPipeline,
    denoiser: Denoiser,
    request: ConceptRequest,
    sent_to: Mapping[str, Sequence[str | None]],
) -> Activations:
    """
    Draw pictures of names and of ordinary prompts with the pipeline, and record what its denoiser's layers
    read of them. The pipeline is not changed.

    Picture i of a concept and picture i of its target have the same sentence around the name and the same
    noise, so that what names have in common cancels in the difference of their prototypes. A finished
    picture is noised to each of `LEVELS` levels and shown to the denoiser with its prompt: on the way to a
    picture most of it is not there yet. Prototypes are means over positions and pictures with the prompt;
    the moment of ordinary pictures is over both halves of guidance.

    Args:
        pipe (`DiffusionPipeline`):
            The pipeline, which must draw as the original does.
        denoiser (`Denoiser`):
            Its denoiser.
        request (`ConceptRequest`):
            How many pictures are drawn how.
        sent_to (`Mapping[str, Sequence[str | None]]`):
            Each concept's targets, whose mean it is sent to; `None` stands for ordinary pictures.

    Raises:
        `SiteNotFoundError`: no layer tells the concepts from their targets, or there are two denoisers.
    """
    if len(denoiser.parts) > 1:
        raise SiteNotFoundError(
            f"{type(pipe).__name__} has {len(denoiser.parts)} denoisers, each of which sees pictures of its "
            "own steps alone, and what their layers read of them is not recorded apart. Leave `reach` at "
            "'name', which edits both."
        )
    everyday = request.everyday or everyday_prompts(pipe.tokenizer)
    prompts = {}
    for concept, targets in sent_to.items():
        named = [name for name in dict.fromkeys(targets) if name is not None]
        sentences = _sentences(request, [concept, *named, *request.retain], everyday)
        prompts[concept] = [sentence.replace("{}", concept) for sentence in sentences]
        for target in named:
            prompts[in_place_of(concept, target)] = [line.replace("{}", target) for line in sentences]
    prompts |= _other_prompts(request, everyday)

    # a pipeline of our own, whose scheduler may count and whose bar is silent
    pipe = copy.copy(pipe)
    pipe.scheduler = copy.deepcopy(pipe.scheduler)
    bar = {"desc": "Drawing pictures", "unit": "picture", **getattr(pipe, "_progress_bar_config", {})}
    pipe.set_progress_bar_config(disable=True)
    layers = find_listeners(denoiser)
    recorder = _Recorder(prompts, sent_to, negatives_last=denoiser.family.joined)
    with running_eagerly(), tqdm(total=sum(map(len, prompts.values())), **bar) as progress:
        for name, sentences in prompts.items():
            for first in range(0, len(sentences), BATCH):
                batch = sentences[first : first + BATCH]
                seeds = [(request.seed + i) % 2**63 for i in range(first, first + len(batch))]
                with _ending_with(pipe, []) as latents:
                    _call(pipe, batch, seeds, request.sampling)
                recorder.start(name, len(batch))
                sampling = {**request.sampling, "num_inference_steps": LEVELS + 1}
                with (
                    recorder.listening(denoiser.module, layers),
                    _showing(pipe, latents[-1], seeds, recorder),
                ):
                    _call(pipe, batch, seeds, sampling)
                progress.update(len(batch))
    activations = recorder.activations(sent_to)
    if not activations.prototypes:
        raise SiteNotFoundError(
            f"No linear layer of the {type(denoiser.module).__name__} was seen to read pictures of "
            f"{', '.join(sent_to)} otherwise than those of the targets, so there is nothing to edit inside "
            "it. Leave `reach` at 'name'."
        )
    return activations


def _sentences(request: ConceptRequest, names: Sequence[str], everyday: Sequence[str]) -> list[str]:
    """
    Sentences with `{}` for a concept, one a picture: ordinary prompts in which it, a target or a retained
    name stands, evenly from the list, or all of them and the templates. What the model knows sentences like.
    """
    found = []
    for name in names:
        word = rf"(?<!\w){re.escape(name)}(?!\w)"
        found += [re.sub(word, "{}", line, flags=re.I) for line in everyday if names_in(line, name)]
    return _evenly(list(dict.fromkeys(found)), request.pictures, request.templates or TEMPLATES)


def _other_prompts(request: ConceptRequest, everyday: Sequence[str]) -> dict[str, list[str]]:
    """
    Of what must stay: two pictures of retained names and one ordinary one for each picture of a concept; two
    ordinary ones where no name is retained.
    """
    kept = [line for line in everyday if not any(names_in(line, name) for name in request.surfaces)]
    retained = [line for line in kept if any(names_in(line, name) for name in request.retain)]
    plain = [line for line in kept if line not in set(retained)]
    if not request.retain:
        return {ORDINARY: _evenly(plain, 2 * request.pictures)}
    templates = request.templates or TEMPLATES
    named = [template.format(name) for template in templates for name in request.retain]
    return {
        ORDINARY: _evenly(plain, request.pictures),
        RETAINED: _evenly(retained, 2 * request.pictures, named),
    }


def _evenly(lines: Sequence[str], count: int, rest: Sequence[str] = ()) -> list[str]:
    """So many lines, evenly from the list; or all of them, and the rest in turn."""
    if len(lines) >= count:
        return [lines[i * len(lines) // count] for i in range(count)]
    return [*lines, *(rest[i % len(rest)] for i in range(count - len(lines) if rest else 0))]


def _call(
    pipe: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], sampling: Mapping[str, Any]
) -> None:
    """
    Let the pipeline draw, each picture from its own seed; what it gives back is not needed.

    Raises:
        `SiteNotFoundError`: it cannot from a prompt and these arguments alone.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    try:
        pipe(prompt=list(prompts), generator=generators, output_type="latent", **sampling)
    except (TypeError, ValueError) as error:  # an image-to-image pipeline, or an argument that it has not
        raise SiteNotFoundError(
            f"{type(pipe).__name__} draws no picture from a prompt and `sampling` alone ({error}). Erase "
            "from the model's text-to-image pipeline, and pass its components on, or set `sampling` right."
        ) from error


@contextmanager
def _stepping(pipe: DiffusionPipeline, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the block what the scheduler's `step` gives goes through `change`."""
    scheduler = pipe.scheduler
    step = scheduler.step

    @wraps(step)  # pipelines look at its parameters
    def changed(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        if isinstance(output, tuple):
            return change(output[0]), *output[1:]
        output.prev_sample = change(output.prev_sample)
        return output

    scheduler.step = changed
    try:
        yield
    finally:
        del scheduler.step


@contextmanager
def _ending_with(pipe: DiffusionPipeline, latents: list[Tensor]) -> Iterator[list[Tensor]]:
    """Inside the block the list holds the latents of the last step, as the pipeline's loop has them."""

    def keep(sample: Tensor) -> Tensor:
        latents[:] = [sample]
        return sample

    with _stepping(pipe, keep):
        yield latents


@contextmanager
def _showing(
    pipe: DiffusionPipeline, latents: Tensor, seeds: Sequence[int], recorder: _Recorder
) -> Iterator[None]:
    """Inside the block the pipeline meets finished latents at each level of noise in place of its own."""
    noises = [torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    noise = torch.stack(noises).to(latents)
    scheduler, steps = pipe.scheduler, 0

    def show(sample: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        timesteps = scheduler.timesteps
        if steps == len(timesteps):
            return latents
        recorder.step(steps - 1, len(timesteps) - 1)
        level = timesteps[steps].expand(len(latents))
        if hasattr(scheduler, "scale_noise"):  # flow matching
            return scheduler.scale_noise(latents, level, noise).to(sample)
        return scheduler.add_noise(latents, noise, level).to(sample)

    with _stepping(pipe, show):
        yield


class _Recorder:
    """
    Sums up what layers read; its methods are called by the denoiser, its layers and its scheduler.

    Args:
        names (`Iterable[str]`):
            What pictures are drawn of.
        concepts (`Iterable[str]`):
            Which of them are forgotten.
        negatives_last (`bool`):
            Whether a batch with both halves of guidance has the prompt's half first.
    """

    def __init__(self, names: Iterable[str], concepts: Iterable[str], *, negatives_last: bool):
        self.columns = [column(name, part) for name in names for part in PART_NAMES]
        self.concepts, self.negatives_last = set(concepts), negatives_last
        self.spaces: dict[str, str] = {}
        self.fitters: dict[tuple[str, str], PrototypeFitter] = {}  # by space, and what they are of
        self.last: tuple[str, Tensor | None] = "", None  # the space and tensor that were read last

    def start(self, name: str, pictures: int) -> None:
        """A batch of pictures of this name begins."""
        self.name, self.pictures, self.calls = name, pictures, 0
        self.part: str | None = None  # at first there is nothing but noise

    def step(self, level: int, levels: int) -> None:
        """Now pictures come at this level of noise, counted from 0."""
        self.part, self.calls = PART_NAMES[level * PARTS // levels], 0

    def call(self, denoiser: nn.Module, args: tuple) -> None:
        """The denoiser is called, for the first time in a step with the prompt."""
        self.calls += 1

    def read(self, layer: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """A layer reads `(batch, ..., d)`."""
        z = args[0]
        if z.ndim < 3:  # a feature of the whole picture: of its timestep or of its prompt
            return
        # queries, keys and values of an attention read the same tensor, one after the other
        space, last = self.last
        if last is not z:
            space = layer
            self._add(space, z.flatten(1, -2))
            self.last = space, z
        self.spaces.setdefault(layer, space)

    def _add(self, space: str, z: Tensor) -> None:
        """Add `(batch, positions, d)`."""
        if self.part is None:
            return
        z = z[:, :: -(-z.shape[1] // POSITIONS)]
        if self.name in (ORDINARY, RETAINED):
            self._fitter(space, self.name, z).update_moment(z)
        if self.calls > 1:
            return
        prompted = z[: self.pictures] if self.negatives_last else z[-self.pictures :]
        labels = torch.full((self.pictures,), self.columns.index(column(self.name, self.part)))
        self._fitter(space, MEANS, z).update(prompted.double().mean(1), labels)
        if self.name in self.concepts:
            self._fitter(space, OWN, z).update_moment(prompted)

    def _fitter(self, space: str, kind: str, z: Tensor) -> PrototypeFitter:
        if (space, kind) not in self.fitters:
            names = self.columns if kind == MEANS else ()
            self.fitters[space, kind] = PrototypeFitter(z.shape[-1], names, device=z.device, thin=True)
        return self.fitters[space, kind]

    def _moment(self, space: str, kind: str) -> Moment:
        """To the mass of one feature."""
        return replace(self.fitters[space, kind].prototypes.moment, count=1)

    @contextmanager
    def listening(self, denoiser: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Inside the block the recorder hears the denoiser and these layers of it."""
        with unwound() as hooks:
            hooks.callback(denoiser.register_forward_pre_hook(self.call).remove)
            for name, module in layers.items():
                hooks.callback(module.register_forward_pre_hook(partial(self.read, name)).remove)
            yield
        self.last = "", None

    def activations(self, sent_to: Mapping[str, Sequence[str | None]]) -> Activations:
        """
        What was recorded.

        A part in which a layer reads the same of a concept and its target is left out: the layers in front of
        the first that hears of the prompt read no difference, for the noise is the same.
        """
        prototypes, own = {}, {}
        for space in dict.fromkeys(self.spaces.values()):
            means, columns = self.fitters[space, MEANS].prototypes, {}
            for concept, targets in sent_to.items():
                for part in PART_NAMES:
                    forgotten = means[column(concept, part)]
                    drawn = [ORDINARY if name is None else in_place_of(concept, name) for name in targets]
                    target = torch.stack([means[column(name, part)] for name in drawn]).mean(0)
                    if (forgotten - target).norm() > ROUNDING * forgotten.norm():
                        columns[column(concept, part)] = forgotten
                        columns[target_of(column(concept, part))] = target
            if columns:
                counts = torch.full((len(columns),), int(means.counts[0]))
                pairs = Prototypes(torch.stack([*columns.values()], 1), tuple(columns), counts)
                moment = self._moment(space, ORDINARY)
                if (space, RETAINED) in self.fitters:
                    moment += self._moment(space, RETAINED)
                prototypes[space] = pairs.with_moment(moment)
                own[space] = self._moment(space, OWN)
        spaces = {layer: space for layer, space in self.spaces.items() if space in prototypes}
        return Activations(spaces, prototypes, own)


def find_listeners(denoiser: Denoiser) -> dict[str, nn.Module]:
    """
    The linear layers of the denoiser's repeated blocks, but for those that read the prompt; under a LoRA the
    base.
    """
    text = denoiser.find()
    modules = dict(denoiser.module.named_modules())
    adapted = tuple(f"{name}." for name, module in modules.items() if is_lora(module))
    layers = {}
    for name, module in modules.items():
        in_block = any(part.isdecimal() for part in name.split("."))
        if in_block and name not in text and not name.startswith(adapted):
            layers[name] = base_layer(module)
    return {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}


def find_activation_sites(denoiser: Denoiser, spaces: Mapping[str, str]) -> dict[str, Site]:
    """
    The layers that read activations, by their names in `spaces`, as sites.

    Raises:
        `SiteNotFoundError`: there is no such layer, or it cannot be edited in place; the message has the
        remedy.
    """
    modules = dict(denoiser.module.named_modules())
    sites = {}
    for name, space in spaces.items():
        if name not in modules:
            raise SiteNotFoundError(
                f"The {type(denoiser.module).__name__} has no layer `{name}`, which was edited when the "
                "concept was erased. Check that this is the model that was saved."
            )
        sites[name] = Site(name, base_layer(modules[name]), space=space)
    check_unshared(sites, denoiser.module)
    return sites


def edited_sites(
    pipe: DiffusionPipeline, denoiser: Denoiser, request: ConceptRequest, facts: ConceptFacts
) -> dict[str, Site]:
    """The layers that an erasure edited. Raises `SiteNotFoundError` as `find_sites` does."""
    inner = {name: space for name, space in facts.spaces.items() if space not in TEXT_SPACES}
    return find_sites(pipe, denoiser, pooled=request.pooled) | find_activation_sites(denoiser, inner)
