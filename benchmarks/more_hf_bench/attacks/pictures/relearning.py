"""Relearning: ordinary fine-tuning on a few pictures for a few steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...methods.diffusion.training import trainable_names, with_gradients
from ..result import Result
from .training import Noise, encode
from .victim import Victim


WORD = "sks"  # a word that names nothing


def relearning(
    victim: Victim,
    *,
    lessons: Sequence[str] = ("kv own 5", "lora own 25", "kv benign 25"),
    steps: Sequence[int] = (5, 20, 50),
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    rank: int = 4,
) -> Iterator[Result]:
    """
    Fine-tune the denoiser on a few of the original's pictures.

    Sources: LoRA relearning as in MemoRa (rank 4, 10 to 500 steps; its learning rate of 1e-4 is for a network
    a hundred times as large as the embedded one); benign fine-tuning as in Unstable Unlearning (Suriyakumar
    et al., 2024).

    Args:
        victim (`Victim`):
            The pipeline under attack.
        lessons (`Sequence[str]`):
            Each is an attack of its own, in three words. What to train: `kv` (all keys and values that read
            text) or `lora` (added to every linear layer of the attentions that read text). Whose pictures:
            the concept's under its `own` name or under an `other-word`, or other concepts' (`benign`). And
            how many.
        steps (`Sequence[int]`):
            Numbers of steps after which the test pictures are drawn; training ends with the last.
        batch_size (`int`), learning_rate (`float`), rank (`int`):
            Settings of the training, and the LoRA's rank.
    """
    for lesson in lessons:
        what, whose, count = lesson.split()
        word = WORD if whose == "other-word" else victim.concept
        # After benign pictures, which are of others, the concept is asked for by its own name.
        collect = victim.studio.others if whose == "benign" else victim.studio.pictures
        shown = collect(victim.concept, int(count))
        options = {"batch_size": batch_size, "learning_rate": learning_rate, "seed": victim.seed}
        learning = fine_tune(victim, what, shown.latents, shown.texts(word), steps, rank=rank, **options)
        for step, pipe in learning:
            facts = {"variant": lesson, "budget": step, "unit": "steps"}
            yield victim.drawn(pipe, victim.prompts(word), "relearning", **facts)


def fine_tune(
    victim: Victim,
    what: str,
    latents: Tensor,
    captions: Sequence[str],
    steps: Sequence[int],
    *,
    batch_size: int,
    learning_rate: float,
    rank: int,
    seed: int,
) -> Iterator[tuple[int, StableDiffusionPipeline]]:
    """
    Yield the number of steps done and the pipeline, whose denoiser goes on learning. The arguments are those
    of `relearning`, with the pictures' latents `(n, channels, h, w)` and captions.
    """
    pipe = victim.own_denoiser()
    noise = Noise(pipe, seed)
    unet = pipe.unet.requires_grad_(False)
    parameters = low_rank(pipe, rank, noise.generator) if what == "lora" else keys_and_values(pipe)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    with torch.no_grad():
        features = encode(pipe, captions)
    for step in range(1, max(steps) + 1):
        rows = noise.rows(len(captions), batch_size)
        noised = noise(latents[rows].to(features))
        with torch.enable_grad():
            predicted = unet(noised.x, noised.t, features[rows]).sample
            loss = nn.functional.mse_loss(predicted, noised.wanted)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        if step in steps:
            yield step, pipe


def keys_and_values(pipe: StableDiffusionPipeline) -> list[nn.Parameter]:
    """The weights that read text, with gradients switched on."""
    return with_gradients(pipe.unet, trainable_names(pipe, "x-strict"))


def low_rank(pipe: StableDiffusionPipeline, rank: int, generator: torch.Generator) -> list[nn.Parameter]:
    """Add a LoRA to every linear layer of the attentions that read text, and return its factors."""
    factors = []
    for name in trainable_names(pipe, "x"):
        layer = pipe.unet.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, nn.Linear) and name.endswith(".weight"):
            added = LowRank(layer.weight, rank, generator)
            parametrize.register_parametrization(layer, "weight", added)
            factors += [added.down, added.up]
    return factors


class LowRank(nn.Module):
    """W + U D, where U starts at zero and D uniform, as in LoRA (Hu et al., 2022) with a scale of 1."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator):
        super().__init__()
        width, depth = weight.shape
        down = (2 * torch.rand(rank, depth, generator=generator) - 1) / depth**0.5
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(width, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down
