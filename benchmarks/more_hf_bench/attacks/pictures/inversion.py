"""Concept inversion: train new tokens to mean what the name no longer means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from ..result import Result
from .studio import Pictures
from .training import Noise, embedded, encode, with_new_tokens
from .victim import Victim


def inversion(
    victim: Victim,
    *,
    tokens: Sequence[int] = (1, 4),
    steps: Sequence[int] = (15, 50),
    pictures: int = 25,
    batch_size: int = 8,
    learning_rate: float = 5e-3,
    start: str = "art",
) -> Iterator[Result]:
    """
    Train token embeddings on the original's pictures of the concept, with all weights frozen.

    Source: Circumventing Concept Erasure (Pham et al., ICLR 2024): textual inversion of 25 pictures, learning
    rate 5e-3, from the word "art"; the paper uses 5,000 steps with batches of 16. The variant "never
    forgotten" attacks another concept that was not forgotten, and says how well the attack does without an
    erasure.

    Args:
        victim (`Victim`):
            The pipeline under attack.
        tokens (`Sequence[int]`):
            Numbers of new tokens; each is an attack of its own.
        steps (`Sequence[int]`):
            Numbers of steps after which the test pictures are drawn; training ends with the last.
        pictures (`int`), batch_size (`int`), learning_rate (`float`), start (`str`):
            As above.
    """
    studio = victim.studio
    attacks = [(victim, count, "1 token" if count == 1 else f"{count} tokens") for count in tokens]
    unforgotten = Victim(victim.pipe, studio, victim.other, victim.concept, victim.seed, victim.folder)
    for attacker, count, variant in [*attacks, (unforgotten, 1, "never forgotten")]:
        shown = studio.pictures(attacker.concept, pictures)
        options = {"batch_size": batch_size, "learning_rate": learning_rate, "start": start}
        learning = learn_tokens(victim.pipe, shown, count, steps, seed=victim.seed, **options)
        for step, pipe, word in learning:
            prompts = attacker.prompts(word)
            yield attacker.drawn(pipe, prompts, "inversion", variant=variant, budget=step, unit="steps")


def learn_tokens(
    pipe: StableDiffusionPipeline,
    pictures: Pictures,
    count: int,
    steps: Sequence[int],
    *,
    batch_size: int,
    learning_rate: float,
    start: str,
    seed: int,
) -> Iterator[tuple[int, StableDiffusionPipeline, str]]:
    """
    Yield the number of steps done, a pipeline that knows the new tokens, and these tokens as text. The
    arguments are those of `inversion`.
    """
    pipe, word = with_new_tokens(pipe, count)
    pipe.unet.requires_grad_(False)
    noise = Noise(pipe, seed)
    # All new tokens start near the mean token of a neutral word.
    weight = pipe.text_encoder.get_input_embeddings().weight
    ids = pipe.tokenizer(start, add_special_tokens=False).input_ids
    apart = 1e-3 * torch.randn(count, weight.shape[1], generator=noise.generator)
    vectors = nn.Parameter(weight[ids].float().mean(0) + apart.to(weight.device))
    optimizer = torch.optim.AdamW([vectors], lr=learning_rate)
    captions = pictures.texts(word)
    for step in range(1, max(steps) + 1):
        rows = noise.rows(len(captions), batch_size)
        noised = noise(pictures.latents[rows].to(weight))
        with torch.enable_grad(), embedded(pipe, vectors):
            features = encode(pipe, [captions[i] for i in rows])
            predicted = pipe.unet(noised.x, noised.t, features).sample
            loss = nn.functional.mse_loss(predicted, noised.wanted)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        if step in steps:
            with torch.no_grad():
                weight[-count:] = vectors.to(weight)
            yield step, pipe, word
