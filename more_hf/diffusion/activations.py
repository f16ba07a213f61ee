"""
The denoiser's own activations as features: the inputs of its layers while it denoises pictures of a name.

Editing the layers that read text removes a name, but not other words that are learned for the same concept.
Whatever the word, the denoiser goes on to read its own activations. Their means over pictures of the
forgotten name, and over pictures of its target from the same noise, are prototypes like any others.
"""

from __future__ import annotations

import copy
import math
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
from ..core.facts import READERS, ConceptFacts, is_text
from ..core.interrupts import unwound
from ..core.moment import Moment
from ..core.prototypes import PrototypeFitter, Prototypes
from ..core.request import ConceptRequest, names_in
from ..core.site import AffineSite, Site, check_unshared, feature_dim, is_linear
from ..core.views import running_eagerly
from .draw import call, draw
from .encoder import column
from .given import check_vae, drawn_sentences, encode_pictures, shown_sentences
from .prompts import TEMPLATES, evenly, everyday_prompts, sentences_around
from .quantized import scheme_of
from .sites import Denoiser, base_layer, find_sites, is_lora


# The levels of noise are cut into this many equal parts, each with prototypes of its own.
PARTS = 3
LEVELS = 2 * PARTS  # levels of noise at which a finished picture is shown, besides pure noise
BATCH = 8  # pictures drawn together, unless the memory is too small for them
POSITIONS = 64  # evenly spaced positions of a picture that count
ROUNDING = 1e-6  # two means over float32 activations that differ by less, as a share, count as equal
ORDINARY = "ordinary pictures"  # the target of a concept without one
RETAINED = "pictures of retained names"
OWN = "pictures of the concepts"


@dataclass(frozen=True)
class Activations:
    """Statistics of the layers' inputs over pictures."""

    spaces: dict[str, str]  # layer -> its space of features; layers that read the same tensor share one
    # space -> the prototype of each concept and part, followed by the mean of its targets' prototypes
    # under the name `target_of(...)`; with the second moment of ordinary pictures and of pictures of
    # retained names, at equal weight
    prototypes: dict[str, Prototypes]
    own: dict[str, Moment]  # space -> the second moment of the concepts' own pictures


PART_NAMES = tuple(f"part {part + 1} of {PARTS}" for part in range(PARTS))


def in_place_of(concept: str, target: str) -> str:
    """The name of a target's pictures that are drawn with a concept's sentences and noise."""
    return f"{target} in place of {concept}"


def target_of(forgotten: str) -> str:
    """The name of the prototype that a forgotten prototype is sent to."""
    return f"target of {forgotten}"


@torch.no_grad()
def record_activations(
    pipe: DiffusionPipeline,
    denoiser: Denoiser,
    request: ConceptRequest,
    sent_to: Mapping[str, Sequence[str | None]],
) -> Activations:
    """
    Draw pictures of names and of ordinary prompts with the pipeline, or take given ones, and record the
    inputs of its denoiser's layers. The pipeline is not changed.

    Picture i of a concept and picture i of its target have the same sentence around the name and the same
    noise, so that whatever the names have in common cancels in the difference of their prototypes. A finished
    picture is noised to each of `LEVELS` levels and shown to the denoiser with its prompt, because on the way
    to a picture most of it is not there yet. Prototypes are means over positions and pictures, for the half
    of guidance that has the prompt; the moment of ordinary pictures is over both halves.

    Args:
        pipe (`DiffusionPipeline`):
            The pipeline, which must draw as the original does.
        denoiser (`Denoiser`):
            Its denoiser.
        request (`ConceptRequest`):
            The number of pictures, and how to draw them.
        sent_to (`Mapping[str, Sequence[str | None]]`):
            Each concept's targets, whose mean it is sent to; `None` stands for ordinary pictures.

    Raises:
        `SiteNotFoundError`: no layer of a denoiser tells the concepts from their targets, some layers inside
        cannot be recorded, or given pictures cannot be encoded. `PrototypeError`: given
        pictures cannot be read.
    """
    if denoiser.family.unrecorded_layers:
        raise SiteNotFoundError(
            f"{denoiser.family.name} has {denoiser.family.unrecorded_layers}, whose inputs are not recorded "
            "yet, so the concept would stay in them. Leave `reach` at 'name'."
        )
    layers = find_listeners(denoiser)
    prompts = picture_prompts(request, sent_to, request.everyday or everyday_prompts(pipe.tokenizer))
    resting = next(denoiser.module.parameters()).device
    recorder = _Recorder(prompts, sent_to, negatives_last=denoiser.family.joined, resting=resting)
    with running_eagerly():
        for pictures in draw_pictures(pipe, request, sent_to, prompts):
            recorder.start(pictures.name, len(pictures.seeds))
            with recorder.listening(denoiser.parts.values(), layers):
                # Denoisers that take turns share the levels, so there have to be more.
                pictures.show(LEVELS * len(denoiser.parts), recorder)
    activations = recorder.activations(sent_to)
    for component, prefix in denoiser.prefixes.items():
        if not any(layer.startswith(prefix) for layer in activations.spaces):
            raise SiteNotFoundError(
                f"No linear layer of `{component}` reads pictures of {', '.join(sent_to)} differently from "
                "pictures of the targets at the levels of noise that it is shown: there is nothing to edit "
                "inside it. Leave `reach` at 'name'."
            )
    return activations


def moments_on(resting: torch.device) -> torch.device:
    """
    Where moments are kept, given where the denoiser's weights are while it does not run. They take gigabytes,
    so those of an offloaded denoiser are kept beside it; MPS has no float64.
    """
    return resting if resting.type == "cuda" else torch.device("cpu")


@dataclass(frozen=True)
class Drawn:
    """Finished pictures of a name, and what they are shown to the denoiser with."""

    name: str
    pipe: DiffusionPipeline
    prompts: list[str]
    seeds: list[int]  # of the noise that is added to each
    latents: Tensor  # as the pipeline's loop has them
    sampling: Mapping[str, Any]
    size: int  # how many fit into the memory together

    def show(self, levels: int, recorder: Any) -> None:
        """
        Show them to the denoiser after pure noise, at so many levels of noise, from the noisiest to none. In
        front of each, the recorder's `step` is called with its number and how many there are.
        """
        sampling = {**self.sampling, "num_inference_steps": levels + 1}
        with _replay_latents(self.pipe, self.latents, self.seeds, recorder):
            call(self.pipe, self.prompts, self.seeds, sampling, "latent")

    def take(self, rows: Sequence[int]) -> Drawn:
        """Those with these numbers."""
        prompts, seeds = ([values[i] for i in rows] for values in (self.prompts, self.seeds))
        return replace(self, prompts=prompts, seeds=seeds, latents=self.latents[list(rows)])

    def __add__(self, other: Drawn) -> Drawn:
        """Both in turn, as pictures of this name."""
        latents = torch.cat([self.latents, other.latents])
        prompts, seeds = self.prompts + other.prompts, self.seeds + other.seeds
        return replace(other, prompts=prompts, seeds=seeds, latents=latents)


def draw_pictures(
    pipe: DiffusionPipeline,
    request: ConceptRequest,
    sent_to: Mapping[str, Sequence[str | None]],
    prompts: Mapping[str, Sequence[str]],
) -> Iterator[Drawn]:
    """
    Yield batches of pictures of each name in `prompts`, drawn or given. The pipeline is not changed. Where a
    batch does not fit into the memory, it and all later ones are half as large.

    Raises:
        As `record_activations`, of which this is a part, about given pictures.
    """
    if request.given.keys() & sent_to.keys():
        check_vae(pipe)
    shown = {**prompts, **_prompts_beside(request, sent_to)}
    # Work on a shallow copy of the pipeline, with a scheduler that may be changed and a silent bar.
    pipe = copy.copy(pipe)
    pipe.scheduler = copy.deepcopy(pipe.scheduler)
    bar = {"desc": "Drawing pictures", "unit": "picture", **getattr(pipe, "_progress_bar_config", {})}
    pipe.set_progress_bar_config(disable=True)
    size = BATCH
    with tqdm(total=sum(map(len, prompts.values())), **bar) as progress:
        given = _given_latents(pipe, request, sent_to)
        for name, sentences in prompts.items():
            first = 0
            while first < len(sentences):
                rows = range(first, min(first + size, len(sentences)))
                seeds = [(request.seed + i) % 2**63 for i in rows]
                # Keep only their latents; given ones take turns.
                try:
                    if name in given:
                        latents = [given[name][[i % len(given[name]) for i in rows]]]
                    else:
                        with _capture_latents(pipe) as latents:
                            call(pipe, [sentences[i] for i in rows], seeds, request.sampling, "latent")
                except torch.OutOfMemoryError:
                    if len(rows) == 1:
                        raise
                    size = len(rows) // 2
                    continue
                beside = [shown[name][i] for i in rows]
                yield Drawn(name, pipe, beside, seeds, latents[-1], request.sampling, size)
                progress.update(len(rows))
                first = rows.stop


def picture_prompts(
    request: ConceptRequest, sent_to: Mapping[str, Sequence[str | None]], everyday: Sequence[str]
) -> dict[str, list[str]]:
    """The prompts of each concept, of each target in its place, and of what must stay."""
    prompts = {}
    for concept, targets in sent_to.items():
        named = [name for name in dict.fromkeys(targets) if name is not None]
        own = [concept] if concept in request.named else []
        sentences = _sentences(request, [*own, *named, *request.retain], everyday)
        if concept in request.given:
            request.given[concept].require_folder()
            sentences = drawn_sentences(request.given[concept], sentences)
        prompts[concept] = [sentence.replace("{}", concept) for sentence in sentences]
        for target in named:
            prompts[in_place_of(concept, target)] = [line.replace("{}", target) for line in sentences]
    return prompts | _other_prompts(request, everyday)


def _prompts_beside(
    request: ConceptRequest, sent_to: Mapping[str, Sequence[str | None]]
) -> dict[str, list[str]]:
    """
    The prompts with which given pictures, and pictures of the targets in their place, are shown: their
    captions, with the names in them. Without a name, both have the same prompt, or none.
    """
    prompts = {}
    for concept in request.given.keys() & sent_to.keys():
        given = request.given[concept]
        lines = shown_sentences(given, request.pictures)
        names = {concept: concept} | {in_place_of(concept, name): name for name in sent_to[concept] if name}
        for pictures, name in names.items():
            prompts[pictures] = [line.replace("{}", "" if given.name is None else name) for line in lines]
    return prompts


def _given_latents(
    pipe: DiffusionPipeline, request: ConceptRequest, concepts: Iterable[str]
) -> dict[str, Tensor]:
    """
    By concept, the latents of its given pictures, as the pipeline's loop would have them.

    Raises:
        `SiteNotFoundError`: the loop has them in another form than the VAE. `PrototypeError`: a file is no
        picture.
    """
    found = {name: request.given[name] for name in concepts if name in request.given}
    if not found:
        return {}
    # a picture by the pipeline shows which size it draws, and how its loop has the latents
    with _capture_latents(pipe) as latents:
        sampling = {**request.sampling, "num_inference_steps": LEVELS + 1}
        size = draw(pipe, [""], [0], sampling).shape[-2:]
    given = {name: encode_pictures(pipe, pictures, size).to(latents[-1]) for name, pictures in found.items()}
    for encoded in given.values():
        if encoded.shape[1:] != latents[-1].shape[1:]:
            raise SiteNotFoundError(
                f"{type(pipe).__name__} has latents of the form {tuple(latents[-1].shape[1:])}, and its VAE "
                f"encodes pictures as {tuple(encoded.shape[1:])}. Name the concept, of which the pipeline "
                "draws pictures itself."
            )
    return given


def _sentences(request: ConceptRequest, names: Sequence[str], everyday: Sequence[str]) -> list[str]:
    """
    Sentences with `{}` for a concept, one for each picture: evenly spaced ordinary prompts that hold the
    concept, a target or a retained name (the model knows such sentences), or all of them and the templates.
    """
    sentences = sentences_around(names, everyday)
    return evenly(sentences, request.pictures, request.templates or TEMPLATES)


def _other_prompts(request: ConceptRequest, everyday: Sequence[str]) -> dict[str, list[str]]:
    """
    The prompts of what must stay: for each picture of a concept, two of retained names and an ordinary one,
    or two ordinary ones if no name is retained.
    """
    kept = [line for line in everyday if not any(names_in(line, name) for name in request.surfaces)]
    retained = [line for line in kept if any(names_in(line, name) for name in request.retain)]
    plain = [line for line in kept if line not in set(retained)]
    if not request.retain:
        return {ORDINARY: evenly(plain, 2 * request.pictures)}
    templates = request.templates or TEMPLATES
    named = [template.format(name) for template in templates for name in request.retain]
    return {
        ORDINARY: evenly(plain, request.pictures),
        RETAINED: evenly(retained, 2 * request.pictures, named),
    }


@contextmanager
def _stepping(pipe: DiffusionPipeline, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the block, the results of the scheduler's `step` go through `change`."""
    scheduler = pipe.scheduler
    step = scheduler.step

    @wraps(step)  # pipelines inspect its parameters
    def changed(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        # schedulers return a tuple or an object, as `return_dict` asks
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
def _capture_latents(pipe: DiffusionPipeline) -> Iterator[list[Tensor]]:
    """Inside the block, the list holds the latents of the last step, as the pipeline's loop has them."""
    latents: list[Tensor] = []

    def keep(sample: Tensor) -> Tensor:
        latents[:] = [sample]
        return sample

    with _stepping(pipe, keep):
        yield latents


@contextmanager
def _replay_latents(
    pipe: DiffusionPipeline, latents: Tensor, seeds: Sequence[int], recorder: Any
) -> Iterator[None]:
    """Inside the block, the pipeline gets finished latents at each level of noise instead of its own."""
    # the same noise for a concept's picture and its target's, so that it cancels in their difference
    noises = [torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    noise = torch.stack(noises).to(latents)
    scheduler, steps = pipe.scheduler, 0

    def show(sample: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        timesteps = scheduler.timesteps
        # the last step's result is the finished picture, which has no noise
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
    Sums up the layers' inputs. Its methods are called by the denoiser, its layers and its scheduler.

    Args:
        names (`Iterable[str]`):
            The names whose pictures are drawn.
        concepts (`Iterable[str]`):
            The names among them that are forgotten.
        negatives_last (`bool`):
            Whether a batch with both halves of guidance starts with the prompt's half.
        resting (`torch.device`):
            Where the denoiser's weights are while it does not run.
    """

    def __init__(
        self, names: Iterable[str], concepts: Iterable[str], *, negatives_last: bool, resting: torch.device
    ):
        self.names = list(names)
        self.concepts = set(concepts)
        self.negatives_last = negatives_last
        self.device = moments_on(resting)
        self.spaces: dict[str, str] = {}
        self.fitters: dict[tuple[str, str], PrototypeFitter] = {}  # by space and by what they sum up
        self.last: tuple[str, Tensor | None] = "", None  # the last space and the tensor read there

    def start(self, name: str, pictures: int) -> None:
        """Begin a batch of pictures of this name."""
        self.name = name
        self.pictures = pictures
        self.calls = 0
        self.part: str | None = None  # the first step shows pure noise

    def step(self, level: int, levels: int) -> None:
        """Move on to this level of noise, counted from 0."""
        self.part = PART_NAMES[level * PARTS // levels]
        self.calls = 0

    def call(self, denoiser: nn.Module, args: tuple) -> None:
        """Count the denoiser's calls in a step; the first has the prompt."""
        self.calls += 1

    def read(self, layer: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Record a layer's input `(batch, ..., d)`, or a convolution's `(batch, d, height, width)`."""
        z = args[0]
        if z.ndim < 3:  # a feature of the whole picture, such as its timestep
            return
        # An attention's queries, keys and values read the same tensor one after the other.
        space, last = self.last
        if last is not z:
            space = layer
            self._add(space, z.movedim(feature_dim(module), -1).flatten(1, -2))
            self.last = space, z
        self.spaces.setdefault(layer, space)

    def _add(self, space: str, z: Tensor) -> None:
        """Add features `(batch, positions, d)`."""
        if self.part is None:
            return
        # neighboring positions say nearly the same
        z = z[:, :: math.ceil(z.shape[1] / POSITIONS)].to(self.device)
        # Pictures that must stay count toward Σ, with both halves of guidance ...
        if self.name in (ORDINARY, RETAINED):
            self._fitter(space, self.name, z).update_moment(z)
        # ... and all toward their means, with the prompt's half alone.
        if self.calls > 1:
            return
        prompted = z[: self.pictures] if self.negatives_last else z[-self.pictures :]
        labels = torch.full((self.pictures,), self.names.index(self.name))
        self._fitter(space, self.part, z).update(prompted.double().mean(1), labels)
        if self.name in self.concepts:
            self._fitter(space, OWN, z).update_moment(prompted)

    def _fitter(self, space: str, kind: str, z: Tensor) -> PrototypeFitter:
        if (space, kind) not in self.fitters:
            names = self.names if kind in PART_NAMES else ()
            self.fitters[space, kind] = PrototypeFitter(z.shape[-1], names, device=z.device, thin=True)
        return self.fitters[space, kind]

    def _moment(self, space: str, kind: str) -> Moment:
        """Hand over a second moment, with the weight of one feature."""
        return replace(self.fitters.pop((space, kind)).prototypes.moment, count=1)

    @contextmanager
    def listening(self, denoisers: Iterable[nn.Module], layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Inside the block, the recorder listens to the denoisers and these layers of them."""
        with unwound() as hooks:
            for denoiser in denoisers:
                hooks.callback(denoiser.register_forward_pre_hook(self.call).remove)
            for name, module in layers.items():
                hooks.callback(module.register_forward_pre_hook(partial(self.read, name)).remove)
            yield
        # let go of the last tensor that was read
        self.last = "", None

    def activations(self, sent_to: Mapping[str, Sequence[str | None]]) -> Activations:
        """The statistics so far, without the spaces in which concepts and targets do not differ."""
        prototypes, own = {}, {}
        for space in dict.fromkeys(self.spaces.values()):
            # one of several denoisers sees the parts of its own steps alone
            seen = [part for part in PART_NAMES if (space, part) in self.fitters]
            means = {part: self.fitters[space, part].prototypes for part in seen}
            columns = _pairs(means, sent_to)
            if not columns:
                continue
            counts = torch.full((len(columns),), int(means[seen[0]].counts[0]))
            pairs = Prototypes(torch.stack([*columns.values()], 1), tuple(columns), counts)
            moment = self._moment(space, ORDINARY)
            if (space, RETAINED) in self.fitters:
                moment += self._moment(space, RETAINED)
            prototypes[space] = pairs.with_moment(moment)
            own[space] = self._moment(space, OWN)
        spaces = {layer: space for layer, space in self.spaces.items() if space in prototypes}
        return Activations(spaces, prototypes, own)


def _pairs(means: Mapping[str, Prototypes], sent_to: Mapping[str, Sequence[str | None]]) -> dict[str, Tensor]:
    """
    By name, the prototype of each concept and part, followed by its target: the mean over its targets.

    A pair that does not differ is left out: from the same noise, the layers in front of the first that
    depends on the prompt read the same. So is a part in which a concept reads as in one before: layers behind
    the prompt alone read the same at every level of noise.
    """
    columns = {}
    for concept, targets in sent_to.items():
        drawn = [ORDINARY if name is None else in_place_of(concept, name) for name in targets]
        for part, prototypes in means.items():
            forgotten = prototypes[concept]
            target = torch.stack([prototypes[name] for name in drawn]).mean(0)
            before = [columns[key] for name in means if (key := column(concept, name)) in columns]
            if all((forgotten - other).norm() > ROUNDING * forgotten.norm() for other in [target, *before]):
                columns[column(concept, part)] = forgotten
                columns[target_of(column(concept, part))] = target
    return columns


def find_listeners(denoiser: Denoiser) -> dict[str, nn.Module]:
    """
    The linear layers and 1×1 convolutions of the denoiser's repeated blocks, except those that read the
    prompt; for a layer with a LoRA, its base layer.

    A UNet's convolutional shortcuts are left out: they lead around larger convolutions, which stay.
    """
    text = denoiser.find()
    modules = dict(denoiser.module.named_modules())
    adapted = tuple(f"{name}." for name, module in modules.items() if is_lora(module))
    layers = {}
    for name, module in modules.items():
        path = name.split(".")
        # blocks are in lists, so their names have a number in them
        in_block = any(part.isdecimal() for part in path) and path[-1] != "conv_shortcut"
        if in_block and name not in text and not name.startswith(adapted):
            layers[name] = base_layer(module)
    return {name: layer for name, layer in layers.items() if is_linear(layer)}


def refuse_quantized(denoiser: Denoiser) -> None:
    """Raises `SiteNotFoundError` if layers inside the denoiser are quantized: all would have to be plain."""
    layers = find_listeners(denoiser)
    if quantized := {name: scheme.name for name, layer in layers.items() if (scheme := scheme_of(layer))}:
        first = next(iter(quantized))
        raise SiteNotFoundError(
            f"{len(quantized)} of the {len(layers)} layers inside the denoiser are quantized (first: "
            f"`{first}`, {quantized[first]}), and `reach='denoiser'` would have to keep every one of them "
            "plain. Write a LoRA with `more_hf.erase_to_lora(pipe, ...)` and load it, which lies beside the "
            "weights, tells what was erased and can be taken off. Or leave `reach` at 'name', or erase from "
            "the unquantized model."
        )


class UntouchedSite(Site):
    """A layer that stays as it is, quantized or not, because a LoRA is to lie beside it."""

    def check(self) -> None:
        """See `Site.check`."""
        if scheme_of(self.module) is None:
            super().check()

    def _whole(self, parameter: str = "weight") -> Tensor:
        scheme = scheme_of(self.module)
        if scheme is None or parameter != "weight":
            return super()._whole(parameter)
        return scheme.dequantize(self.module, torch.float32)

    @property
    def width(self) -> int:
        """See `Site.width`."""
        return super().width if scheme_of(self.module) is None else self.module.in_features


def named_sites(pipe: DiffusionPipeline, denoiser: Denoiser, request: ConceptRequest) -> dict[str, Site]:
    """The layers that read text, if anything that is forgotten has a name there. Raises as `find_sites`."""
    return find_sites(pipe, denoiser, pooled=request.pooled) if request.named else {}


def find_activation_sites(
    denoiser: Denoiser, spaces: Mapping[str, str], *, kind: type[Site] = Site
) -> dict[str, Site]:
    """
    The layers that read activations, by their names in `spaces`, as sites of a kind.

    Raises:
        `SiteNotFoundError`: a layer does not exist, or it cannot be edited in place; the message has the
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
        if space == READERS:
            sites[name] = AffineSite(name, modules[name], space=space)
        else:
            sites[name] = kind(name, base_layer(modules[name]), space=space)
    check_unshared(sites, denoiser.module)
    return sites


def edited_sites(
    pipe: DiffusionPipeline, denoiser: Denoiser, request: ConceptRequest, facts: ConceptFacts
) -> dict[str, Site]:
    """The layers that an erasure edited. Raises the same errors as `find_sites`."""
    inner = {name: space for name, space in facts.spaces.items() if not is_text(space)}
    return named_sites(pipe, denoiser, request) | find_activation_sites(denoiser, inner)
