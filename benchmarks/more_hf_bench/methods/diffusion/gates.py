"""Gates in the feed-forward layers: two units of each open on the concept's own activations.

MoRE's router and expert at rest: wherever the denoiser comes to read the concept's features, by whatever
word, the gate opens and writes the step from concept to target into the residual stream. Elsewhere it is
shut, so that other pictures pay next to nothing. Only weights and biases change, in their own shapes: the
weights by matrices of rank 4 and 3 a concept, which a LoRA could hold, but not the biases with the threshold.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from torch import Tensor, nn

from more_hf.core.errors import MoreError
from more_hf.core.request import ConceptRequest
from more_hf.diffusion.activations import BATCH, LEVELS, ORDINARY, RETAINED, in_place_of, picture_prompts
from more_hf.diffusion.draw import call
from more_hf.diffusion.erase import erase_concept
from more_hf.diffusion.prompts import everyday_prompts

from .pipelines import require_stable_diffusion
from .texts import Concepts, Retained, Targets


SHARPNESS = 8.0  # of the gate's two corners
POSITIONS = 32  # of a picture
NEUTRAL = ""  # the prompt that is read beside a picture's own
# What pictures are for, in turn: some fit the readers, some give the thresholds, on some gates are tried.
FIT, THRESHOLD, TRIAL = "fit", "threshold", "trial"
ROLES = (FIT, THRESHOLD, FIT, TRIAL)
HEARD = (FIT, THRESHOLD)
# The gates that are tried, the widest first; a strength of 0 writes nothing.
QUANTILES = (0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
STRENGTHS = (0, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300)
ENOUGH = 0.8  # how far the concept's pictures have to move, as of `moved`


@dataclass(frozen=True)
class Gate:
    """
    g = clamp((d·x − θ) / σ, 0, 1), and what is written where it opens.

    Attributes:
        reader (`Tensor`): d `(width,)`.
        threshold (`float`), scale (`float`): θ and σ.
        step (`Tensor`): what the block's output gets at g = 1, `(width,)`.
    """

    reader: Tensor
    threshold: float
    scale: float
    step: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """How far the gate is open at features `(..., width)`."""
        return ((x @ self.reader - self.threshold) / self.scale).clamp(0, 1)


@dataclass(frozen=True)
class Reading:
    """
    What one layer reads of a concept, from which gates of any strength are made.

    Attributes:
        reader (`Tensor`), scale (`float`): d and σ.
        others (`Tensor`): d·x of others' features that did not fit d, in ascending order.
        step (`Tensor`): from what the block writes of the concept to what it writes of its target.
    """

    reader: Tensor
    scale: float
    others: Tensor
    step: Tensor

    @classmethod
    def fit(cls, own: Tensor, fitted: Tensor, held: Tensor, step: Tensor, shrinkage: float = 0.2) -> Reading:
        """
        Fit Fisher's discriminant of the concept's features against others', with their pooled covariance.

        Args:
            own (`Tensor`), fitted (`Tensor`), held (`Tensor`):
                The features of the concept's pictures, of others, and of others that give thresholds alone,
                each `(pictures, positions, width)`.
            step (`Tensor`): as above.
        """
        own, fitted, held = (z.flatten(0, 1).double() for z in (own, fitted, held))
        covariance = (own.T.cov() + fitted.T.cov()) / 2
        covariance.diagonal().add_(shrinkage * covariance.trace() / len(covariance))
        reader = torch.linalg.solve(covariance, own.mean(0) - fitted.mean(0))
        return cls(reader, float((own @ reader).std()), (held @ reader).sort().values, step)

    def gate(self, strength: float, quantile: float) -> Gate:
        """The gate that stays shut at this share of others' features, and writes the step so many times."""
        threshold = float(self.others[int(quantile * (len(self.others) - 1))])
        return Gate(self.reader, threshold, self.scale, strength * self.step)


@torch.no_grad()
def put_into(layer: FeedForward, gates: Sequence[Gate], hidden: Tensor) -> None:
    """
    Write each gate into two units of a layer, in place: gelu(z) − gelu(z − 1) is nearly clamp(z, 0, 1).

    Args:
        hidden (`Tensor`): `(units, units)`, the second moment of the layer's hidden units, on any scale.
    """
    proj, out = layer.net[0].proj, layer.net[2]
    weights, units = without_least_units(out.weight.double(), hidden, 2 * len(gates))
    for gate, first, second in zip(gates, units[::2], units[1::2], strict=True):
        weights[:, first], weights[:, second] = gate.step / SHARPNESS, -gate.step / SHARPNESS
        # The value half of both is 1, and the gate half z and z − 1, in steps of the sharpness.
        proj.weight[[first, second]], proj.bias[[first, second]] = 0, 1
        rows = [first + out.in_features, second + out.in_features]
        proj.weight[rows] = (SHARPNESS * gate.reader / gate.scale).to(proj.weight)
        start = -SHARPNESS * gate.threshold / gate.scale
        proj.bias[rows] = proj.bias.new_tensor([start, start - SHARPNESS])
    out.weight.copy_(weights)


def without_least_units(weight: Tensor, hidden: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """
    An output layer's weight `(out, units)` without the units that matter least, and their numbers. The others
    are refitted by least squares for what these did.

    Source: Optimal Brain Surgeon (Hassibi and Stork, 1993): the error of leaving unit j out is
    ‖w_j‖² / (H⁻¹)_jj.
    """
    weight, units = weight.clone(), []
    damped = hidden + 1e-6 * hidden.trace() / len(hidden) * torch.eye(len(hidden), dtype=hidden.dtype)
    inverse = torch.linalg.inv(damped)
    for _ in range(count):
        errors = weight.square().sum(0) / inverse.diagonal()
        errors[units] = torch.inf
        unit = int(errors.argmin())
        row = inverse[unit] / inverse[unit, unit]
        weight -= weight[:, [unit]] * row
        inverse = inverse - inverse[:, [unit]] * row
        units.append(unit)
    return weight, units


class Listener:
    """
    Listens to the feed-forward layers of some blocks.

    Args:
        blocks (`Mapping[str, BasicTransformerBlock]`): name -> block.

    Attributes:
        hidden (`dict[str, Tensor]`): block -> the second moment of its layer's hidden units over ordinary
            pictures, times their number.
    """

    def __init__(self, blocks: Mapping[str, BasicTransformerBlock]):
        self.blocks = blocks
        self.inputs: dict[tuple[str, str, str], list[Tensor]] = {}  # by block, name and role
        self.outputs: dict[tuple[str, str, str], list[Tensor]] = {}  # the means of what the block writes
        self.hidden: dict[str, Tensor] = {}

    @contextmanager
    def listening(self, name: str, role: str) -> Iterator[None]:
        """Inside the block, what is read counts toward this name and role."""
        hooks = []
        for block_name, block in self.blocks.items():
            key = block_name, name, role
            hooks.append(block.ff.register_forward_pre_hook(partial(self._read, key)))
            hooks.append(block.register_forward_hook(partial(self._write, key)))
            if name == ORDINARY:
                hooks.append(block.ff.net[2].register_forward_pre_hook(partial(self._count, block_name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _read(self, key: tuple[str, str, str], module: nn.Module, args: tuple[Tensor, ...]) -> None:
        every = -(-args[0].shape[1] // POSITIONS)
        self.inputs.setdefault(key, []).append(args[0][:, ::every].float().cpu())

    def _write(self, key: tuple[str, str, str], module: nn.Module, args: tuple, output: Tensor) -> None:
        self.outputs.setdefault(key, []).append(output.double().mean((0, 1)).cpu())

    def _count(self, block: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        h = args[0].flatten(0, -2).double()
        self.hidden[block] = self.hidden.get(block, 0) + h.T @ h

    def read(self, block: str, names: Sequence[str], roles: Sequence[str]) -> Tensor:
        """What a block's layer read of some names' pictures `(pictures, positions, width)`."""
        return torch.cat([x for name in names for role in roles for x in self.inputs[block, name, role]])

    def written(self, block: str, names: Sequence[str]) -> Tensor:
        """The mean of what a block wrote of some names' pictures `(width,)`."""
        return torch.stack(
            [x for name in names for role in HEARD for x in self.outputs[block, name, role]]
        ).mean(0)


def is_gated(module: nn.Module) -> bool:
    """Whether a module is a transformer block whose feed-forward layer has gates that can be written."""
    return isinstance(module, BasicTransformerBlock) and isinstance(module.ff.net[0], GEGLU)


@dataclass(frozen=True, eq=False)
class Shown:
    """
    Pictures that the denoiser is shown, `(pictures, ...)` each.

    Attributes:
        latents (`Tensor`), noise (`Tensor`): the pictures, and what is added to them.
        texts (`Tensor`): the features of their own prompts.
        neutral (`Tensor`): those of `NEUTRAL`.
    """

    latents: Tensor
    noise: Tensor
    texts: Tensor
    neutral: Tensor

    def of(self, role: str) -> Shown:
        """Those of a role."""
        rows = [i for i in range(len(self.latents)) if ROLES[i % len(ROLES)] == role]
        return Shown(self.latents[rows], self.noise[rows], self.texts[rows], self.neutral[rows])

    @torch.no_grad()
    def predictions(self, pipe: StableDiffusionPipeline) -> Tensor:
        """What the denoiser predicts at each level of noise, with their own prompts and the neutral one."""
        scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        predicted = []
        for start in range(0, len(self.latents), BATCH):
            rows = slice(start, start + BATCH)
            latents, noise = self.latents[rows], self.noise[rows]
            for i in range(LEVELS):
                level = round(len(scheduler.betas) * (i + 1) / (LEVELS + 1))
                t = torch.full((len(latents),), level, device=latents.device)
                x = scheduler.add_noise(latents, noise, t)
                predicted += [pipe.unet(x, t, text[rows]).sample for text in (self.texts, self.neutral)]
        return torch.cat(predicted)


@torch.no_grad()
def drawn(pipe: StableDiffusionPipeline, request: ConceptRequest) -> dict[str, Shown]:
    """
    Pictures of each name, which the pipeline draws itself. A concept's and its target's have the same
    sentences and noise.
    """
    shown = {}
    prompts = picture_prompts(request, request.remap_to, everyday_prompts(pipe.tokenizer))
    for name, sentences in prompts.items():
        latents = []
        for start in range(0, len(sentences), BATCH):
            batch = sentences[start : start + BATCH]
            seeds = range(start, start + len(batch))
            latents.append(call(pipe, batch, seeds, request.sampling, "latent").images)
        latents = torch.cat(latents)
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(latents))]
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators])
        texts, neutral = (
            pipe.encode_prompt(list(lines), latents.device, 1, False)[0]
            for lines in (sentences, [NEUTRAL] * len(sentences))
        )
        shown[name] = Shown(latents, noise.to(latents), texts, neutral)
    return shown


def moved(before: Tensor, after: Tensor) -> float:
    """
    How far predictions `(n, ...)` moved: the mean of ‖p' − p‖ / ‖p‖. Of their squares' mean, which a few
    pictures decide, pictures' LPIPS says little.
    """
    changes = (after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
    return float(changes.mean())


def gates_within(
    price: float,
    pipe: StableDiffusionPipeline,
    own: Shown,
    others: Sequence[Shown],
    readings: Mapping[str, Reading],
    hidden: Mapping[str, Tensor],
) -> dict[str, Gate]:
    """
    By block, gates that move others' pictures no further than the price: the widest that move the concept's
    enough, or else those that move them most.

    Args:
        price (`float`): as of `moved`, in the mean over `others`.
        own (`Shown`), others (`Sequence[Shown]`): pictures that fitted no reading.
        readings (`Mapping[str, Reading]`), hidden (`Mapping[str, Tensor]`): of each block.
    """
    before = {pictures: pictures.predictions(pipe) for pictures in (own, *others)}

    def gates(strength: float, quantile: float) -> dict[str, Gate]:
        return {name: reading.gate(strength, quantile) for name, reading in readings.items()}

    def moves(strength: float, quantile: float, shown: Sequence[Shown]) -> float:
        trial = copy.copy(pipe)
        trial.register_modules(unet=copy.deepcopy(pipe.unet))
        for name, gate in gates(strength, quantile).items():
            put_into(trial.unet.get_submodule(name).ff, [gate], hidden[name])
        return sum(moved(before[pictures], pictures.predictions(trial)) for pictures in shown) / len(shown)

    # Whoever looks for another way shifts features until the gates shut, which takes more where they open
    # widely: so take the widest that move the concept enough, each as strong as the price allows.
    found = []
    for quantile in QUANTILES:
        # stronger gates move others further
        within = bisect_right(STRENGTHS, price, key=lambda strength: moves(strength, quantile, others))
        strength = STRENGTHS[max(within - 1, 0)]
        found.append((moves(strength, quantile, [own]), strength, quantile))
        if found[-1][0] >= ENOUGH:
            break
    return gates(*max(found)[1:])


def more_gates(
    pipe: StableDiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: Targets,
    retain: Retained,
    price: float = 0.08,
    pictures: int = 32,
    sampling_steps: int = 10,
    guidance: float = 4.0,
) -> StableDiffusionPipeline:
    """Erase the name, and put a gate for each concept into every feed-forward layer.

    Args:
        price (`float`): how far a concept's gates may move what the denoiser predicts of other pictures.
        pictures (`int`): pictures of the concept, as many of its target, and three times as many of others.
        sampling_steps (`int`), guidance (`float`): of these pictures.
    """
    require_stable_diffusion(pipe)
    sampling = {"num_inference_steps": sampling_steps, "guidance_scale": guidance}
    request = ConceptRequest.of(
        concepts, remap_to=remap_to, retain=retain, pictures=pictures, sampling=sampling, reach="denoiser"
    )
    blocks = {name: block for name, block in pipe.unet.named_modules() if is_gated(block)}
    if not blocks:
        raise MoreError("The denoiser has no feed-forward layers with GEGLU. Erase by name alone.")
    # 1. Show the denoiser pictures, and listen.
    shown, listener = drawn(pipe, request), Listener(blocks)
    for name, pictures_of_name in shown.items():
        for role in HEARD:
            with listener.listening(name, role):
                pictures_of_name.of(role).predictions(pipe)
    # 2. Fit the readers of each concept, and choose its gates.
    others = [name for name in (ORDINARY, RETAINED) if name in shown]
    chosen = []
    for concept, targets in request.remap_to.items():
        sent_to = [in_place_of(concept, target) for target in targets]
        readings = {
            name: Reading.fit(
                listener.read(name, [concept], HEARD),
                listener.read(name, [*others, *sent_to], [FIT]),
                listener.read(name, [*others, *sent_to], [THRESHOLD]),
                listener.written(name, sent_to) - listener.written(name, [concept]),
            )
            for name in blocks
        }
        tried = [shown[name].of(TRIAL) for name in others]
        chosen.append(gates_within(price, pipe, shown[concept].of(TRIAL), tried, readings, listener.hidden))
    # 3. Erase the names, and write all gates.
    erase_concept(pipe, concepts, remap_to=remap_to, retain=retain)
    for name, block in blocks.items():
        put_into(block.ff, [gates[name] for gates in chosen], listener.hidden[name])
    return pipe
