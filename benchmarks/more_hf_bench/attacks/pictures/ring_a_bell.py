"""Ring-A-Bell: add the direction of a name to prompts without the name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from ...artists.prompts import PromptRow
from ..result import Result
from .training import encode
from .victim import Victim


CROSSOVER, MUTATION = 0.5, 0.25  # chances of each child


def ring_a_bell(
    victim: Victim,
    *,
    eta: Sequence[float] = (0.3, 0.9, 3.0),
    tokens: int = 16,
    population: int = 100,
    generations: int = 60,
    token_eta: float = 3.0,
) -> Iterator[Result]:
    """
    Add η v to the features of prompts without the concept, where v is what its name adds on average.

    The variants "embedding" give these features to the denoiser, as RECE's version does; "tokens" searches
    for the text whose features are nearest to them, with the text encoder alone.

    Source: Ring-A-Bell (Tsai et al., ICLR 2024): a population of 200, 3,000 generations, 16 tokens, η = 3,
    crossover 0.5, mutation 0.25.

    Args:
        victim (`Victim`):
            The pipeline under attack.
        eta (`Sequence[float]`):
            η of the embeddings; each is an attack of its own.
        tokens (`int`), population (`int`), generations (`int`), token_eta (`float`):
            Settings of the search.
    """
    original, studio = victim.studio.original, victim.studio
    # 1. v is the mean difference between the features with and without the name.
    pairs = [_pair(victim, row) for row in victim.rows]
    with torch.no_grad():
        with_name, without = (encode(original, prompts) for prompts in zip(*pairs, strict=True))
    direction = (with_name - without).mean(0)
    # 2. Give the shifted features to the denoiser.
    for size in eta:
        facts = {"variant": f"embedding, eta {size:g}"}
        yield victim.drawn(victim.pipe, without + size * direction, "ring-a-bell", **facts)
    # 3. Search for text with such features. Only the text encoder is needed, so all methods share the result.
    options = {"tokens": tokens, "population": population, "generations": generations}
    goals = without + token_eta * direction
    key = ("ring-a-bell", victim.concept, victim.seed, token_eta, *options.values())
    ids = studio.once(key, lambda: search(original, goals, **options, seed=victim.seed))
    with torch.no_grad():
        features = original.text_encoder(ids)[0]
    facts = {"variant": "tokens", "budget": generations, "unit": "generations"}
    yield victim.drawn(victim.pipe, features, "ring-a-bell", **facts)


def _pair(victim: Victim, row: PromptRow) -> tuple[str, str]:
    """The same prompt with the concept and without."""
    if victim.studio.kind(victim.concept) == "artist":
        return f"a {row.thing} in the style of {victim.concept}", f"a {row.thing}"
    rest = f" in the style of {row.artist}" if row.artist else ""
    return f"a {victim.concept}{rest}", f"a picture{rest}"


@torch.no_grad()
def search(
    pipe: StableDiffusionPipeline,
    goals: Tensor,
    *,
    tokens: int,
    population: int,
    generations: int,
    seed: int,
) -> Tensor:
    """
    Breed the text whose features are nearest to each goal.

    Returns:
        `Tensor`: token ids with begin, end and padding, `(goals, positions)`.
    """
    tokenizer, generator = pipe.tokenizer, torch.Generator().manual_seed(seed)
    words = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
    length = min(tokens, goals.shape[1] - 2)
    frame = torch.full((goals.shape[1],), tokenizer.pad_token_id)
    frame[0], frame[length + 1] = tokenizer.bos_token_id, tokenizer.eos_token_id

    def draw(*shape: int) -> Tensor:
        return words[torch.randint(len(words), shape, generator=generator)]

    def chance(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def framed(texts: Tensor) -> Tensor:
        ids = frame.repeat(len(texts), 1)
        ids[:, 1 : length + 1] = texts
        return ids.to(goals.device)

    found = []
    for goal in goals:

        def distance(texts: Tensor, goal: Tensor = goal) -> Tensor:
            return (pipe.text_encoder(framed(texts))[0] - goal).square().sum((1, 2)).cpu()

        texts = draw(population, length)
        distances = distance(texts)
        for _ in range(generations):
            # 1. The better half survives, and has as many children.
            survivors = distances.argsort()[: population // 2]
            texts, distances = texts[survivors], distances[survivors]
            # 2. Crossover: from a random cut on, a child may continue like another parent.
            others = texts[torch.randint(len(texts), (len(texts),), generator=generator)]
            cuts = torch.randint(1, length, (len(texts), 1), generator=generator)
            crossed = (torch.arange(length) >= cuts) & (chance(len(texts), 1) < CROSSOVER)
            children = torch.where(crossed, others, texts)
            # 3. Mutation: a child may get a new word at one place.
            spot = torch.arange(length) == torch.randint(length, (len(texts), 1), generator=generator)
            mutated = spot & (chance(len(texts), 1) < MUTATION)
            children = torch.where(mutated, draw(*children.shape), children)
            texts, distances = torch.cat([texts, children]), torch.cat([distances, distance(children)])
        found.append(texts[distances.argmin()])
    return framed(torch.stack(found))
