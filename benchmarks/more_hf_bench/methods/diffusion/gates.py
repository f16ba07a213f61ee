"""Gates in the feed-forward layers: two units of each open on the concept's own activations.

MoRE's router and expert at rest: wherever the denoiser comes to read the concept's features, by whatever
word, the gate opens and writes the step from concept to target into the residual stream. Elsewhere it is
shut, so that other pictures pay next to nothing. Only weights and biases change, in their own shapes: the
weights by matrices of rank 4 and 3 a concept, which a LoRA could hold, but not the biases with the threshold.
"""

from __future__ import annotations

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
HELD_OUT = 3  # every third of the other pictures gives the threshold, and fits nothing
NEUTRAL = ""  # the prompt that is read beside a picture's own


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

    @classmethod
    def fit(cls, own: Tensor, others: Tensor, step: Tensor, quantile: float, shrinkage: float = 1e-3) -> Gate:
        """
        Fit Fisher's discriminant of the concept's features against others', with their pooled covariance.

        Args:
            own (`Tensor`), others (`Tensor`):
                The features of the concept's pictures and of others, `(pictures, positions, width)`; every
                third of the others gives θ alone.
            step (`Tensor`), quantile (`float`):
                What is written; and the share of the others' features that θ is above.
        """
        held_out = torch.arange(len(others)) % HELD_OUT == 0
        own, fitted, kept = (z.flatten(0, 1).double() for z in (own, others[~held_out], others[held_out]))
        covariance = (own.T.cov() + fitted.T.cov()) / 2
        covariance.diagonal().add_(shrinkage * covariance.trace() / len(covariance))
        reader = torch.linalg.solve(covariance, own.mean(0) - fitted.mean(0))
        read = (kept @ reader).sort().values
        threshold = float(read[int(quantile * (len(read) - 1))])
        return cls(reader, threshold, float((own @ reader).std()), step)


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


@dataclass(frozen=True)
class Seen:
    """What one block's feed-forward layer reads and its block writes while the denoiser is shown pictures."""

    inputs: Tensor  # (pictures, positions, width): its features, of each level and prompt
    output: Tensor  # (width,): the mean of what the block writes

    @classmethod
    def joined(cls, parts: Sequence[Seen]) -> Seen:
        return cls(torch.cat([part.inputs for part in parts]), torch.stack([p.output for p in parts]).mean(0))


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
        self.parts: dict[tuple[str, str], list[Seen]] = {}  # by block and name
        self.hidden: dict[str, Tensor] = {}

    @contextmanager
    def listening(self, name: str) -> Iterator[None]:
        """Inside the block, what is read counts toward this name."""
        hooks = []
        for block_name, block in self.blocks.items():
            hooks.append(block.register_forward_hook(partial(self._read, (block_name, name))))
            if name == ORDINARY:
                hooks.append(block.ff.net[2].register_forward_pre_hook(partial(self._count, block_name)))
            hooks.append(block.ff.register_forward_pre_hook(self._keep))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.last = args[0]

    def _count(self, block: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        h = args[0].flatten(0, -2).double()
        self.hidden[block] = self.hidden.get(block, 0) + h.T @ h

    def _read(self, key: tuple[str, str], module: nn.Module, args: tuple, output: Tensor) -> None:
        every = -(-output.shape[1] // POSITIONS)
        seen = Seen(self.last[:, ::every].float().cpu(), output.double().mean((0, 1)).cpu())
        self.parts.setdefault(key, []).append(seen)

    def seen(self, block: str, names: Sequence[str]) -> Seen:
        """Everything that a block read of some names' pictures."""
        return Seen.joined([part for name in names for part in self.parts.get((block, name), [])])


def is_gated(module: nn.Module) -> bool:
    """Whether a module is a transformer block whose feed-forward layer has gates that can be written."""
    return isinstance(module, BasicTransformerBlock) and isinstance(module.ff.net[0], GEGLU)


@torch.no_grad()
def listen(pipe: StableDiffusionPipeline, request: ConceptRequest, listener: Listener) -> None:
    """
    Show the denoiser pictures that it draws itself at each level of noise, with their own prompts and with a
    neutral one. A concept's pictures and its target's have the same sentences and noise.
    """
    prompts = picture_prompts(request, request.remap_to, everyday_prompts(pipe.tokenizer))
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    levels = [round(len(scheduler.betas) * (i + 1) / (LEVELS + 1)) for i in range(LEVELS)]
    for name, sentences in prompts.items():
        for start in range(0, len(sentences), BATCH):
            batch = sentences[start : start + BATCH]
            seeds = range(start, start + len(batch))
            latents = call(pipe, batch, seeds, request.sampling, "latent").images
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators])
            noise = noise.to(latents)
            texts = batch, [NEUTRAL] * len(batch)
            features = [pipe.encode_prompt(list(text), latents.device, 1, False)[0] for text in texts]
            with listener.listening(name):
                for level in levels:
                    t = torch.full((len(batch),), level, device=latents.device)
                    for text in features:
                        pipe.unet(scheduler.add_noise(latents, noise, t), t, text)


def more_gates(
    pipe: StableDiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: Targets,
    retain: Retained,
    strength: float = 30.0,
    quantile: float = 0.999,
    pictures: int = 32,
    sampling_steps: int = 10,
    guidance: float = 4.0,
) -> StableDiffusionPipeline:
    """Erase the name, and put a gate for each concept into every feed-forward layer.

    Args:
        strength (`float`): how many times the step from the concept's mean to the target's is written.
        quantile (`float`): the share of others' positions at which a gate stays shut.
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
    listener = Listener(blocks)
    listen(pipe, request, listener)
    erase_concept(pipe, concepts, remap_to=remap_to, retain=retain)
    for name, block in blocks.items():
        gates = []
        others = listener.seen(name, [ORDINARY, RETAINED])
        for concept, targets in request.remap_to.items():
            own = listener.seen(name, [concept])
            target = listener.seen(name, [in_place_of(concept, target) for target in targets])
            rest = torch.cat([others.inputs, target.inputs])
            step = strength * (target.output - own.output)
            gates.append(Gate.fit(own.inputs, rest, step, quantile))
        put_into(block.ff, gates, listener.hidden[name])
    return pipe
