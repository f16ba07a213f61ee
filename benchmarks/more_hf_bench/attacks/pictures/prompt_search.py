"""Prompt search: look for tokens in front of the prompt that bring the concept back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..result import Result
from .training import Noise, Noised, embedded, encode, with_new_tokens
from .victim import BestPictures, Victim


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
    Search for tokens in front of each test prompt, for all prompts in parallel, each with its own tokens.

    A prompt counts from the first budget at which its picture shows the concept. Sources: `unlearndiffatk` is
    UnlearnDiffAtk's objective and search (Zhang et al., ECCV 2024): the erased denoiser's error on the
    original's picture of the prompt, over token distributions on the simplex that are sampled in the forward
    pass; learning rate 0.01, weight decay 0.1. `p4d` is P4D's (Chin et al., ICML 2024), in UnlearnDiffAtk's
    harness: the distance to the original's output for the prompt alone, over embeddings that are replaced by
    the nearest token's in the forward pass; learning rate 0.1, weight decay 0.1. The papers use 40 iterations
    at each of 50 timesteps, and 3,000 iterations.

    Args:
        victim (`Victim`):
            The pipeline under attack.
        searches (`Sequence[str]`):
            Names in `SEARCHES`.
        prefix (`int`):
            The number of tokens in front of each prompt.
        timesteps (`int`), iterations (`int`):
            Timesteps of the search, from little noise to much, and iterations at each.
        budgets (`Sequence[int]`):
            Numbers of iterations after which the prompts are tried.
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
    A search for the tokens in front of each prompt.

    Args:
        victim (`Victim`):
            The pipeline under attack.
        latents (`Tensor`):
            Latents of the pictures that the prompts should give, `(n, channels, h, w)`.
        prompts (`Sequence[str]`):
            The n prompts.
        prefix (`int`):
            The number of tokens.
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
