"""
Gates in the denoiser's feed-forward layers: fitted on pictures that it draws itself, and tried on others.

MoRE's router and expert at rest: wherever the denoiser comes to read the concept's features, by whatever
word, two units of a layer open and write the step from concept to target into the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.nn.functional import pad

from ..core.errors import PrototypeError, SiteNotFoundError
from ..core.facts import READERS, STEPS
from ..core.gate import Gate, Rewrite, fit_reader, written
from ..core.interrupts import unwound
from ..core.moment import Moment
from ..core.prototypes import PrototypeFitter
from ..core.request import ConceptRequest
from ..core.views import running_eagerly
from .activations import (
    LEVELS,
    ORDINARY,
    POSITIONS,
    RETAINED,
    Drawn,
    draw_pictures,
    find_activation_sites,
    in_place_of,
    moments_on,
    picture_prompts,
)
from .prompts import everyday_prompts
from .sites import Denoiser


# What pictures are for, in turn: some fit the readers, some give the thresholds, some tell what gates move.
FIT, THRESHOLD, TRIAL = "fit", "threshold", "trial"
ROLES = (FIT, THRESHOLD, FIT, TRIAL)
# Whoever looks for another way shifts features until the gates shut. So these are wide, and a step is large:
# a rarer gate with a larger step moves the concept's own pictures as far, and is evaded.
QUANTILE = 0.98  # the share of others' positions at which a gate stays shut
STRENGTH = 100  # how many times it writes the step from concept to target, at softness 1


@dataclass(frozen=True)
class Gates:
    """
    The gates of a denoiser.

    Attributes:
        gates (`dict[str, list[Gate]]`): by block, one for each concept.
        energy (`dict[str, Tensor]`): by block, E h² of each hidden unit over ordinary pictures.
        moved (`dict[str, float]`): how far they move held-out pictures of the concepts and of others.
    """

    gates: dict[str, list[Gate]]
    energy: dict[str, Tensor]
    moved: dict[str, float]

    @property
    def spaces(self) -> dict[str, str]:
        """What gates take the place of in each layer that they change."""
        return spaces_in(self.gates)

    def rewrites(self, originals: Mapping[str, Tensor]) -> dict[str, Rewrite]:
        """The change of each of these layers, given their original weights."""
        rewrites = {}
        for block, gates in self.gates.items():
            front, behind = spaces_in([block])
            rewrites[front], rewrites[behind] = written(
                gates, originals[front], originals[behind], self.energy[block]
            )
        return rewrites


def spaces_in(blocks: Iterable[str]) -> dict[str, str]:
    """What gates take the place of in both layers of each block's feed-forward."""
    spaces = {}
    for block in blocks:
        spaces |= {f"{block}.ff.net.0.proj": READERS, f"{block}.ff.net.2": STEPS}
    return spaces


def find_blocks(denoiser: Denoiser) -> dict[str, BasicTransformerBlock]:
    """
    The transformer blocks whose feed-forward layers can have gates.

    Raises:
        `SiteNotFoundError`: there are none, or their layers cannot be edited in place.
    """
    blocks = {
        name: module
        for name, module in denoiser.module.named_modules()
        if isinstance(module, BasicTransformerBlock) and isinstance(module.ff.net[0], GEGLU | GELU)
    }
    if not blocks:
        raise SiteNotFoundError(
            f"The denoiser of {denoiser.family.name} ({type(denoiser.module).__name__}) has no transformer "
            "blocks whose feed-forward layers have a GEGLU or GELU, so gates cannot be written into it. Pass "
            "reach='denoiser', or leave `reach` at 'name'."
        )
    find_activation_sites(denoiser, spaces_in(blocks))
    return blocks


@torch.no_grad()
def find_gates(
    pipe: DiffusionPipeline,
    denoiser: Denoiser,
    request: ConceptRequest,
    sent_to: Mapping[str, Sequence[str | None]],
) -> Gates:
    """
    Draw pictures, read what the feed-forward layers make of them, and choose each concept's gates. Nothing is
    changed.

    Args:
        pipe (`DiffusionPipeline`), denoiser (`Denoiser`):
            The pipeline, which must draw as the original does, and its denoiser.
        request (`ConceptRequest`):
            The number of pictures, how to draw them, and the softness, which divides the step.
        sent_to (`Mapping[str, Sequence[str | None]]`):
            Each concept's targets, to whose mean the step leads; `None` stands for ordinary pictures.

    Raises:
        `SiteNotFoundError`: as `find_blocks`. `PrototypeError`: there are too few ordinary prompts.
    """
    theater = _Theater(denoiser, find_blocks(denoiser))
    prompts = picture_prompts(request, sent_to, request.everyday or everyday_prompts(pipe.tokenizer))
    if len(prompts[ORDINARY]) < len(ROLES):
        raise PrototypeError(
            f"Gates need at least {len(ROLES)} ordinary prompts, some of which are held out, and `everyday` "
            f"has {len(prompts[ORDINARY])}. Add some, or leave it out."
        )
    others = [name for name in (ORDINARY, RETAINED) if name in prompts]
    targets = {
        concept: [ORDINARY if name is None else in_place_of(concept, name) for name in dict.fromkeys(names)]
        for concept, names in sent_to.items()
    }
    beside = {concept: list(dict.fromkeys([*others, *names])) for concept, names in targets.items()}
    strength = STRENGTH * request.strength / request.softness
    with running_eagerly():
        # 1. Draw the pictures.
        drawn: dict[str, Drawn] = {}
        for batch in draw_pictures(pipe, request, sent_to, prompts):
            drawn[batch.name] = drawn[batch.name] + batch if batch.name in drawn else batch
        size = min(pictures.size for pictures in drawn.values())
        drawn = {name: replace(pictures, size=size) for name, pictures in drawn.items()}
        theater.leave_out_the_widest(drawn[ORDINARY].take([0]))
        # 2. Fit a reader for each concept and block. What would give thresholds of a concept fits, too.
        for name, pictures in drawn.items():
            theater.listen(name, _of(pictures, FIT, *(THRESHOLD,) * (name in sent_to)))
        fitted = {
            concept: {
                block: fit_reader(theater.moment(block, [concept]), theater.moment(block, names))
                for block in theater.blocks
            }
            for concept, names in beside.items()
        }
        # 3. Hear what the readers say of pictures that did not fit them.
        readers = {
            block: torch.stack([fitted[concept][block][0] for concept in sent_to], 1)
            for block in theater.blocks
        }
        for name, pictures in drawn.items():
            if name not in sent_to:
                theater.listen_by(readers, name, _of(pictures, THRESHOLD))
        # 4. Choose the gates of each concept.
        gates: dict[str, list[Gate]] = {block: [] for block in theater.blocks}
        for i, concept in enumerate(sent_to):
            for block, reader in fitted[concept].items():
                said = theater.said(block, beside[concept])[:, i]
                step = theater.written(block, targets[concept]) - theater.written(block, [concept])
                gates[block].append(Gate.shut_at(QUANTILE, said, *reader, strength * step))
        # 5. See what all of them together move.
        moved = {}
        for name in (*sent_to, *others):
            pictures = _of(drawn[name], TRIAL)
            moved[name] = _moved(theater.predictions(pictures, {}), theater.predictions(pictures, gates))
    moved_by = {
        "gates_move_own": min(moved[name] for name in sent_to),
        "gates_move_others": fmean(moved[name] for name in others),
    }
    return Gates(gates, {block: theater.energy(block) for block in gates}, moved_by)


def _of(pictures: Drawn, *roles: str) -> list[Drawn]:
    """Batches of the pictures that have one of these roles."""
    rows = [i for i in range(len(pictures.seeds)) if ROLES[i % len(ROLES)] in roles]
    return [pictures.take(rows[i : i + pictures.size]) for i in range(0, len(rows), pictures.size)]


def _moved(before: Tensor, after: Tensor) -> float:
    """
    How far predictions `(n, ...)` moved: the mean of ‖p' − p‖ / ‖p‖. Of their squares' mean, which a few
    pictures decide, pictures' LPIPS says little.
    """
    before, after = before.flatten(1), after.flatten(1)
    return float(((after - before).norm(dim=1) / before.norm(dim=1)).mean())


class _Theater:
    """
    Shows pictures to the denoiser, and hears what its feed-forward layers read and write meanwhile.

    Args:
        denoiser (`Denoiser`): the denoiser.
        blocks (`Mapping[str, BasicTransformerBlock]`): by name, the blocks whose layers are heard.
    """

    def __init__(self, denoiser: Denoiser, blocks: Mapping[str, BasicTransformerBlock]):
        self.denoiser = denoiser
        self.blocks = blocks
        self.device = moments_on(next(denoiser.module.parameters()).device)
        self.shows = False  # whether a picture with noise is shown
        self.read: dict[tuple[str, str], PrototypeFitter] = {}  # by block and name
        self.outputs: dict[tuple[str, str], list[Tensor]] = {}
        self.hidden: dict[str, list[Tensor]] = {}
        self.readings: dict[tuple[str, str], list[Tensor]] = {}

    def step(self, level: int, levels: int) -> None:
        """See `Drawn.show`. The last level is a picture without noise."""
        self.shows = level < levels - 1

    def _show(self, batches: Iterable[Drawn], hooks: Iterable[tuple[nn.Module, Callable]]) -> None:
        """Show pictures. While there is one with noise, each hook gets what its module reads and writes."""

        def act(hook: Callable, module: nn.Module, args: tuple, output: Any) -> Tensor | None:
            return hook(args[0] if args else None, output) if self.shows else None

        with unwound() as handles:
            for module, hook in hooks:
                handles.callback(module.register_forward_hook(partial(act, hook)).remove)
            for batch in batches:
                self.shows = False
                batch.show(LEVELS + 1, self)

    def leave_out_the_widest(self, picture: Drawn) -> None:
        """Leave out the blocks with the most positions, if there are others: these cost most for least."""
        positions: dict[str, int] = {}

        def count(name: str, x: Tensor, output: Tensor) -> None:
            positions[name] = x.shape[1]

        self._show([picture], [(block.ff, partial(count, name)) for name, block in self.blocks.items()])
        inner = {name for name, count in positions.items() if count < max(positions.values())}
        self.blocks = {name: block for name, block in self.blocks.items() if name in inner or not inner}

    def listen(self, name: str, batches: Iterable[Drawn]) -> None:
        """Show pictures of a name whose features fit the readers."""
        hooks: list[tuple[nn.Module, Callable]] = []
        for block_name, block in self.blocks.items():
            key = block_name, name
            hooks.append((block.ff, partial(self._read, key)))
            hooks.append((block, partial(self._write, key)))
            if name == ORDINARY:
                hooks.append((block.ff.net[2], partial(self._count, block_name)))
        self._show(batches, hooks)

    def listen_by(self, readers: Mapping[str, Tensor], name: str, batches: Iterable[Drawn]) -> None:
        """Show pictures of a name, of which only what each block's readers `(d, k)` say is kept."""

        def read(block: str, x: Tensor, output: Tensor) -> None:
            said = _thinned(x).flatten(0, 1).float().cpu().double() @ readers[block]
            self.readings.setdefault((block, name), []).append(said)

        hooks: list[tuple[nn.Module, Callable]] = []
        for block_name, block in self.blocks.items():
            hooks.append((block.ff, partial(read, block_name)))
            hooks.append((block, partial(self._write, (block_name, name))))
        self._show(batches, hooks)

    def _read(self, key: tuple[str, str], x: Tensor, output: Tensor) -> None:
        x = pad(_thinned(x).to(self.device), (0, 1), value=1)
        if key not in self.read:
            self.read[key] = PrototypeFitter(x.shape[-1], (), device=x.device, thin=True)
        self.read[key].update_moment(x)

    def _write(self, key: tuple[str, str], x: Tensor, output: Tensor) -> None:
        self.outputs.setdefault(key, []).append(output.float().mean((0, 1)).cpu().double())

    def _count(self, block: str, h: Tensor, output: Tensor) -> None:
        self.hidden.setdefault(block, []).append(h.float().square().mean((0, 1)).cpu().double())

    def moment(self, block: str, names: Sequence[str]) -> Moment:
        """The second moment of what a block's layer reads of some names' pictures, with a 1 behind each."""
        first, *others = (self.read[block, name].prototypes.moment for name in names)
        return sum(others, first)

    def said(self, block: str, names: Sequence[str]) -> Tensor:
        """What the readers of a block say of some names' pictures, `(n, k)`."""
        return torch.cat([said for name in names for said in self.readings[block, name]])

    def written(self, block: str, names: Sequence[str]) -> Tensor:
        """The mean of what a block writes of some names' pictures."""
        return torch.stack([mean for name in names for mean in self.outputs[block, name]]).mean(0)

    def energy(self, block: str) -> Tensor:
        """E h² of each hidden unit of a block's layer over ordinary pictures."""
        return torch.stack(self.hidden[block]).mean(0)

    def predictions(self, batches: Iterable[Drawn], gates: Mapping[str, Sequence[Gate]]) -> Tensor:
        """What the denoiser predicts of pictures at each level of noise, with these gates in its layers."""
        predicted: list[Tensor] = []

        def keep(x: Any, output: Any) -> None:
            predicted.append(output[0].float().cpu())

        def add(gate: Gate, x: Tensor, output: Tensor) -> Tensor:
            return output + gate(x)[..., None] * gate.step.to(output)

        hooks: list[tuple[nn.Module, Callable]] = [(part, keep) for part in self.denoiser.parts.values()]
        for name, own in gates.items():
            hooks += [(self.blocks[name].ff, partial(add, gate)) for gate in own]
        self._show(batches, hooks)
        return torch.cat(predicted)


def _thinned(x: Tensor) -> Tensor:
    """Features of evenly spaced positions of `(batch, positions, d)`, since neighbors say nearly the same."""
    return x[:, :: math.ceil(x.shape[1] / POSITIONS)]
