"""MidSteer: an affine map of what the attentions to text write (Gaintseva et al., ICML 2026)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from more_hf.core.interrupts import unwound
from more_hf.core.request import ConceptRequest
from more_hf.diffusion.activations import BATCH, ORDINARY, RETAINED, in_place_of, picture_prompts
from more_hf.diffusion.draw import call
from more_hf.diffusion.prompts import everyday_prompts

from .pipelines import AtInference
from .texts import Concepts, Retained, Targets, name_roles


def midsteer(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: Targets,
    retain: Retained,
    strength: float = 1.0,
    clipped: bool = False,
    pictures: int = 32,
    sampling_steps: int = 10,
    guidance: float = 4.0,
) -> AtInference:
    """Steer what the attentions to text write with MidSteer (Gaintseva et al., ICML 2026).

    For Stable Diffusion. Source: its map x ↦ x + β A (x − μ), A = Σ^½ (u_t − u_f) u_f⁺ Σ^−½ with
    u = Σ^−½ (m − μ), for the prompt's half of guidance, at the outputs of cross-attention. Means and Σ are of
    pictures that the pipeline draws itself, each at its own step; our own are their prompts, with the concept
    and its target in the same sentences, and their number (published: a thousand captions of a concept,
    50,000 of anything). A step of another run takes the map of the nearest timestep. Without a target the
    concept becomes μ, as in the source. The pipeline that is returned has a denoiser of its own, with hooks:
    nothing is erased at rest.

    Args:
        strength (`float`, defaults to 1): β, at which the concept's mean becomes its target's (published: 1
            to 5).
        clipped (`bool`, defaults to `False`): leave alone what has less than nothing of the concept.
        pictures (`int`): pictures of the concept, as many of its target, and three times as many of others.
        sampling_steps (`int`), guidance (`float`): of these pictures.
    """
    made = AtInference.around(pipe, forget=name_roles(concepts, remap_to, retain).forget)
    made.register_modules(unet=copy.deepcopy(pipe.unet))
    sampling = {"num_inference_steps": sampling_steps, "guidance_scale": guidance}
    request = ConceptRequest.of(
        concepts, remap_to=remap_to, retain=retain, pictures=pictures, sampling=sampling, reach="denoiser"
    )
    written = listen(made, request)
    maps = {
        place: [
            Map.between(written[place], concept, targets) for concept, targets in request.remap_to.items()
        ]
        for place in written
    }
    Steering(maps, strength, clipped).attach(made.unet)
    return made


@dataclass
class Written:
    """Sums over what a layer writes at one step while pictures are drawn."""

    counts: dict[str, int]  # of positions, by the pictures' name
    sums: dict[str, Tensor]
    moment: Tensor | float = 0.0  # of the other pictures, times their positions

    def add(self, name: str, z: Tensor) -> None:
        """Add features `(pictures, positions, d)` of a name's pictures."""
        z = z.flatten(0, 1).double()
        self.counts[name] = self.counts.get(name, 0) + len(z)
        self.sums[name] = self.sums.get(name, 0) + z.sum(0)
        if name in (ORDINARY, RETAINED):
            self.moment = self.moment + z.T @ z

    def mean(self, *names: str) -> Tensor:
        """The mean over all positions of some names' pictures."""
        return sum(self.sums.get(name, 0) for name in names) / sum(self.counts.get(name, 0) for name in names)


Place = tuple[str, float]  # a layer, and the timestep of a step


@dataclass(frozen=True)
class Map:
    """x ↦ x + β shift · (reader · (x − mean)), each `(d,)`: the reader is 1 at the concept's mean."""

    mean: Tensor
    reader: Tensor
    shift: Tensor

    @classmethod
    def fit(cls, concept: Tensor, target: Tensor, mean: Tensor, covariance: Tensor) -> Map:
        """u_f⁺ Σ^−½ is Σ⁻¹ c / (c Σ⁻¹ c) with c = m_f − μ, and Σ^½ (u_t − u_f) is m_t − m_f."""
        rtol = len(mean) * torch.finfo(covariance.dtype).eps  # directions below rounding do not count
        centered = concept - mean
        reader = torch.linalg.pinv(covariance, hermitian=True, rtol=rtol) @ centered
        return cls(mean, reader / (centered @ reader), target - concept)

    @classmethod
    def between(cls, written: Written, concept: str, targets: Sequence[str]) -> Map:
        """Fit it for what a layer wrote; of several targets to the mean of their means."""
        mean = written.mean(ORDINARY, RETAINED)
        count = sum(written.counts.get(name, 0) for name in (ORDINARY, RETAINED))
        covariance = written.moment / count - torch.outer(mean, mean)
        means = [written.mean(in_place_of(concept, name)) for name in targets] or [mean]
        return cls.fit(written.mean(concept), torch.stack(means).mean(0), mean, covariance)


def prompted(x: Tensor) -> slice:
    """The rows of a batch that have the prompt: with guidance the second half of the same latents twice."""
    half, odd = divmod(len(x), 2)
    return slice(half if not odd and torch.equal(x[:half], x[half:]) else 0, None)


def cross_attentions(unet: nn.Module) -> dict[str, nn.Module]:
    """The attentions to text, by name."""
    return {name: part for name, part in unet.named_modules() if getattr(part, "is_cross_attention", False)}


@torch.no_grad()
def listen(pipe: DiffusionPipeline, request: ConceptRequest) -> dict[Place, Written]:
    """Draw the pictures, and sum up what each attention to text writes at each step."""
    pipe = copy.copy(pipe)
    pipe.set_progress_bar_config(disable=True)
    found: dict[Place, Written] = {}
    prompts = picture_prompts(request, request.remap_to, everyday_prompts(pipe.tokenizer))
    for name, sentences in prompts.items():
        with listening(pipe.unet, name, found):
            for start in range(0, len(sentences), BATCH):
                batch = sentences[start : start + BATCH]
                call(pipe, batch, range(start, start + len(batch)), request.sampling, "latent")
    return found


@contextmanager
def listening(unet: nn.Module, name: str, found: dict[Place, Written]) -> Iterator[None]:
    """Inside the block, what the attentions write goes into `found`, under a name."""
    seen: tuple[float, slice] = 0.0, slice(None)

    def see(module: nn.Module, args: tuple) -> None:
        nonlocal seen
        seen = float(args[1]), prompted(args[0])

    def read(layer: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        timestep, rows = seen
        found.setdefault((layer, timestep), Written({}, {})).add(name, output[rows])

    with unwound() as hooks:
        hooks.callback(unet.register_forward_pre_hook(see).remove)
        for layer, part in cross_attentions(unet).items():
            hooks.callback(part.register_forward_hook(partial(read, layer)).remove)
        yield


class Steering:
    """
    Steers a denoiser as long as its hooks are there.

    Args:
        maps (`Mapping[Place, Sequence[Map]]`): the maps of each layer and step, one for each concept in turn.
        strength (`float`), clipped (`bool`): as of `midsteer`.
    """

    def __init__(self, maps: Mapping[Place, Sequence[Map]], strength: float, clipped: bool):
        self.strength, self.clipped = strength, clipped
        self.timesteps = torch.tensor(sorted({timestep for _, timestep in maps}))
        self.maps = {
            layer: [
                self._stacked([maps[layer, t][i] for t in self.timesteps.tolist()]) for i in range(len(own))
            ]
            for (layer, _), own in maps.items()
        }

    @staticmethod
    def _stacked(steps: Sequence[Map]) -> Map:
        """The maps of all steps in one, whose parts are `(steps, 1, d)`."""
        parts = zip(*((step.mean, step.reader, step.shift) for step in steps), strict=True)
        return Map(*(torch.stack(part)[:, None].float() for part in parts))

    def attach(self, unet: nn.Module) -> None:
        """Hook into a denoiser; a deep copy of it takes the hooks along."""
        unet.register_forward_pre_hook(self.see)
        for layer, part in cross_attentions(unet).items():
            part.register_forward_hook(partial(self.steer, layer))

    def see(self, module: nn.Module, args: tuple) -> None:
        """Note which rows to steer, and the step of each."""
        x, t = args[:2]
        self.rows = prompted(x)
        timesteps = torch.as_tensor(t).cpu().reshape(-1, 1)  # one for all rows, or one for each
        self.steps = (timesteps - self.timesteps).abs().argmin(1).expand(len(x))[self.rows]

    def steer(self, layer: str, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """What the layer is to write instead of `output` `(batch, positions, d)`."""
        x = output[self.rows]
        for of_steps in self.maps[layer]:
            mean, reader, shift = (part[self.steps].to(x) for part in vars(of_steps).values())
            how_much = ((x - mean) * reader).sum(-1, keepdim=True)
            if self.clipped:
                how_much = how_much.clamp(min=0)
            x = x + self.strength * how_much * shift
        return torch.cat([output[: self.rows.start], x])
