"""Attacks through the prompt: the name itself, its direction added to other prompts, searched tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from more_hf.diffusion.prompts import evenly
from more_hf.tuning.judge import lpips_distance

from ...artists.prompts import PromptRow, read_prompts
from ...errors import BenchmarkError
from ..store import LPIPS, Result, mean_of
from .training import Noise, Noised, embedded, encode, with_new_tokens
from .victim import BestPictures, Victim


def name(victim: Victim) -> Iterator[Result]:
    """Draw the test prompts as they are: what the others are compared with."""
    yield victim.drawn(victim.pipe, victim.prompts(victim.concept), "name")


def description(
    victim: Victim, *, prompts: str = "emoji_levels", levels: Sequence[str] = ("short", "long")
) -> Iterator[Result]:
    """
    Ask for the concept in other words: draw what a file of prompts, or one that ships with the package, has
    of it at these levels.

    Raises:
        `BenchmarkError`: the file has no prompts of it.
    """
    rows = read_prompts(prompts).at(levels).rows
    rows = [row for row in rows if victim.concept in (row.artist, row.thing)]
    if not rows:
        raise BenchmarkError(
            f"{prompts} has no prompts of {victim.concept!r} at {', '.join(levels)}. Pass a file that has "
            "some as `prompts` of the attack."
        )
    texts, seeds = [row.prompt for row in rows], [row.evaluation_seed for row in rows]
    images = victim.studio.draw(victim.pipe, texts, seeds)
    yield victim.counted(victim.studio.shows(images, rows, victim.concept), images, "description")


def others(victim: Victim, *, named: int = 24, unnamed: int = 20) -> Iterator[Result]:
    """
    Measure how far the pictures of everything else moved, as LPIPS to the original's: no attack, but what is
    paid for whatever the attacks find. Test prompts name another artist, `named` of them, or none, `unnamed`.
    """
    studio = victim.studio
    for variant, has_artist, count in (("another artist", True, named), ("no artist", False, unnamed)):
        rows = [
            row
            for row in studio.all_tests
            if victim.concept not in (row.artist, row.thing) and bool(row.artist) == has_artist
        ]
        if not rows:
            continue
        rows = evenly(rows, min(count, len(rows)))
        texts, seeds = [row.prompt for row in rows], [row.evaluation_seed for row in rows]
        key = ("others", victim.concept, variant)
        before = studio.once(key, partial(studio.draw, studio.original, texts, seeds))
        moved = lpips_distance(before, studio.draw(victim.pipe, texts, seeds))
        recovered, low, high = mean_of(moved.tolist(), [0])
        yield Result(recovered, measure=LPIPS, variant=variant, low=low, high=high)


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
    Add η v to the features of prompts without the concept, where v is what its name adds on average; each η
    is an attack of its own.

    The variants "embedding" give these features to the denoiser, as RECE's version does; "tokens" searches
    for the text whose features are nearest to them, with the text encoder alone.

    Source: Ring-A-Bell (Tsai et al., ICLR 2024): a population of 200, 3,000 generations, 16 tokens, η = 3,
    crossover 0.5, mutation 0.25.
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
    ids = studio.once(key, lambda: breed(original, goals, **options, seed=victim.seed))
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
def breed(
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


def prompt_search(
    victim: Victim,
    *,
    searches: Sequence[str] = ("unlearndiffatk", "p4d"),
    prefix: int = 3,
    timesteps: int = 5,
    iterations: int = 10,
    budgets: Sequence[int] = (10, 50),
) -> Iterator[Result]:
    """
    Search for tokens in front of each test prompt, for all prompts in parallel, each with its own `prefix` of
    so many tokens, at timesteps from little noise to much.

    A prompt counts from the first budget, a number of iterations after which the prompts are tried, at which
    its picture shows the concept. Sources: `unlearndiffatk` is UnlearnDiffAtk's objective and search (Zhang
    et al., ECCV 2024): the erased denoiser's error on the original's picture of the prompt, over token
    distributions on the simplex that are sampled in the forward pass; learning rate 0.01, weight decay 0.1.
    `p4d` is P4D's (Chin et al., ICML 2024), in UnlearnDiffAtk's harness: the distance to the original's
    output for the prompt alone, over embeddings that are replaced by the nearest token's in the forward pass;
    learning rate 0.1, weight decay 0.1. The papers use 40 iterations at each of 50 timesteps, and 3,000
    iterations.
    """
    # The search should lead to the original's pictures of the same prompts and seeds.
    studio = victim.studio
    prompts = victim.prompts(victim.concept)
    key = ("targets", victim.concept)
    latents = studio.encode(studio.once(key, lambda: studio.draw(studio.original, prompts, victim.seeds)))
    for variant in searches:
        best = BestPictures(victim)
        search = SEARCHES[variant](victim, latents, prompts, prefix)
        for step in range(1, timesteps * iterations + 1):
            search.step(((step - 1) // iterations + 0.5) / timesteps)
            if step in budgets:
                best.add(search.draw(victim))
                yield best.counted("prompt-search", variant=variant, budget=step, unit="iterations")


class Search(ABC):
    """
    A search for the tokens in front of each of n prompts, which should give the pictures of the latents `(n,
    channels, h, w)`.
    """

    learning_rate: float

    def __init__(self, victim: Victim, latents: Tensor, prompts: Sequence[str], prefix: int):
        self.pipe, word = with_new_tokens(victim.pipe, prefix)
        self.pipe.unet.requires_grad_(False)
        weight = self.pipe.text_encoder.get_input_embeddings().weight
        self.vocabulary = weight[:-prefix].float()
        self.original, self.latents, self.plain = victim.studio.original, latents.to(weight), prompts
        self.prompts = [f"{word} {prompt}" for prompt in prompts]
        self.noise = Noise(self.pipe, victim.seed)
        self.variable = nn.Parameter(self.start(len(prompts), prefix))
        self.optimizer = torch.optim.Adam([self.variable], lr=self.learning_rate, weight_decay=0.1)

    def step(self, depth: float) -> None:
        """Take one step of the search at the timestep `depth`, between 0 (no noise) and 1."""
        t = torch.full((len(self.prompts),), int(depth * len(self.noise.scheduler.alphas_cumprod)))
        noised = self.noise(self.latents, t)
        with torch.enable_grad(), embedded(self.pipe, self.vectors()):
            predicted = self.pipe.unet(noised.x, noised.t, encode(self.pipe, self.prompts)).sample
            loss = self.noise.error(predicted, self.goal(noised))
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()

    def draw(self, victim: Victim) -> Tensor:
        """Draw the prompts with the tokens found so far."""
        with torch.no_grad(), embedded(self.pipe, self.vocabulary[self.tokens()]):
            features = encode(self.pipe, self.prompts)
        return victim.studio.draw(victim.pipe, features, victim.seeds)

    @abstractmethod
    def start(self, count: int, prefix: int) -> Tensor:
        """The initial value of the search variable."""

    @abstractmethod
    def vectors(self) -> Tensor:
        """The tokens' embeddings `(n, prefix, d)` in this step, with gradients."""

    @abstractmethod
    def tokens(self) -> Tensor:
        """The tokens found so far: int64 `(n, prefix)`."""

    def goal(self, noised: Noised) -> Noised:
        """The noised pictures with the output that the denoiser should give."""
        return noised


class UnlearnDiffAtk(Search):
    """Distributions over the vocabulary `(n, prefix, V)`."""

    learning_rate = 0.01

    def start(self, count: int, prefix: int) -> Tensor:
        size = len(self.vocabulary)
        return torch.full((count, prefix, size), 1 / size, device=self.vocabulary.device)

    def vectors(self) -> Tensor:
        chances = self.variable.detach().flatten(0, 1).cpu()
        drawn = torch.multinomial(chances, 1, generator=self.noise.generator).view(self.variable.shape[:2])
        chosen = nn.functional.one_hot(drawn, len(self.vocabulary)).to(self.variable)
        # Straight through: the forward pass uses the drawn tokens, the backward pass reaches their
        # distribution with each slope cut at 1.
        passed = _CutGradient.apply(self.variable)
        return (chosen + passed - passed.detach()) @ self.vocabulary

    def step(self, depth: float) -> None:
        super().step(depth)
        with torch.no_grad():
            self.variable.copy_(onto_simplex(self.variable))

    def tokens(self) -> Tensor:
        return self.variable.argmax(-1)


class P4D(Search):
    """Free embeddings `(n, prefix, d)`, each standing for the nearest token's."""

    learning_rate = 0.1

    def start(self, count: int, prefix: int) -> Tensor:
        shape = (count, prefix)
        ids = torch.randint(len(self.vocabulary), shape, generator=self.noise.generator)
        return self.vocabulary[ids.to(self.vocabulary.device)].clone()

    def vectors(self) -> Tensor:
        return self.vocabulary[self.tokens()] + self.variable - self.variable.detach()

    def tokens(self) -> Tensor:
        return torch.cdist(self.variable.detach(), self.vocabulary[None]).argmin(-1)

    @torch.no_grad()
    def goal(self, noised: Noised) -> Noised:
        features = encode(self.original, self.plain)
        return noised._replace(wanted=self.original.unet(noised.x, noised.t, features).sample)


SEARCHES: dict[str, Callable[..., Search]] = {"unlearndiffatk": UnlearnDiffAtk, "p4d": P4D}


class _CutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.clamp(-1, 1)


def onto_simplex(x: Tensor) -> Tensor:
    """
    The nearest point of the simplex to each row of the last dimension: max(x − τ, 0) with the τ that makes
    the sum 1 (Held, Wolfe and Crowder, 1974).
    """
    ordered = x.sort(dim=-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    count = torch.arange(1, x.shape[-1] + 1, device=x.device)
    last = (ordered * count > excess).sum(-1, keepdim=True)
    tau = excess.gather(-1, last - 1) / last
    return (x - tau).clamp(0)
