"""Attacks that train: new tokens, or the denoiser on a few pictures; and the denoiser's own loss."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...methods.diffusion.pipelines import AtInference, intercepted
from ...methods.diffusion.training import trainable_names, with_gradients
from ..store import Result
from .studio import Pictures
from .victim import Victim


class Noised(NamedTuple):
    """
    Noised latents `x`, their timesteps `t` `(n,)`, and the output that the denoiser was trained to give.
    """

    x: Tensor
    t: Tensor
    wanted: Tensor


class Noise:
    """
    Noises latents as in the denoiser's training.

    Args:
        pipe (`StableDiffusionPipeline`):
            The pipeline, for its schedule and its kind of prediction.
        seed (`int`):
            Seed of everything random here; no global random state is touched.
    """

    def __init__(self, pipe: StableDiffusionPipeline, seed: int):
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        self.generator = torch.Generator().manual_seed(seed)

    def rows(self, count: int, batch_size: int) -> Tensor:
        """Random numbers below `count`, `(batch_size,)`; without repeats if there are enough."""
        if count >= batch_size:
            return torch.randperm(count, generator=self.generator)[:batch_size]
        return torch.randint(count, (batch_size,), generator=self.generator)

    def __call__(self, latents: Tensor, t: Tensor | None = None) -> Noised:
        """Noise latents at random timesteps, or at `t`."""
        if t is None:
            t = torch.randint(len(self.scheduler.alphas_cumprod), (len(latents),), generator=self.generator)
        noise = torch.randn(latents.shape, generator=self.generator).to(latents)
        t = t.to(latents.device)
        wanted = noise
        if self.scheduler.config.prediction_type == "v_prediction":
            wanted = self.scheduler.get_velocity(latents, noise, t)
        return Noised(self.scheduler.add_noise(latents, noise, t), t, wanted)

    def error(self, predicted: Tensor, noised: Noised) -> Tensor:
        """
        The mean square error of the predicted noise, whatever the kind of prediction.

        With x = √ᾱ x_0 + √(1 − ᾱ) ε, an error of v is an error of ε divided by √ᾱ.
        """
        squares = (predicted - noised.wanted).square().flatten(1).mean(1)
        if self.scheduler.config.prediction_type == "v_prediction":
            squares = squares * self.scheduler.alphas_cumprod.to(squares)[noised.t]
        return squares.mean()


def encode(pipe: StableDiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    """The text features that the denoiser reads `(n, tokens, d)`, with gradients if they are enabled."""
    return pipe.encode_prompt(list(prompts), pipe.unet.device, 1, False)[0]


def with_new_tokens(pipe: StableDiffusionPipeline, count: int) -> tuple[StableDiffusionPipeline, str]:
    """A copy of the pipeline whose text encoder knows `count` new tokens, and these tokens as text."""
    pipe = copy.copy(pipe)
    tokenizer, text_encoder = copy.deepcopy(pipe.tokenizer), copy.deepcopy(pipe.text_encoder)
    words = [f"<new-{i}>" for i in range(count)]
    tokenizer.add_tokens(words)
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    pipe.register_modules(tokenizer=tokenizer, text_encoder=text_encoder.requires_grad_(False))
    return pipe, " ".join(words)


@contextmanager
def embedded(pipe: StableDiffusionPipeline, vectors: Tensor) -> Iterator[None]:
    """
    Inside the block, the last tokens of the vocabulary are embedded as `vectors`, with gradients: `(count,
    d)`, or `(n, count, d)` with different ones for each of n prompts.
    """
    embedding: nn.Embedding = pipe.text_encoder.get_input_embeddings()
    first = embedding.num_embeddings - vectors.shape[-2]

    def replace_new(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        ids = args[0]
        of_each = vectors.expand(len(ids), *vectors.shape[-2:])
        new = of_each.gather(1, (ids - first).clamp(0)[..., None].expand(*ids.shape, vectors.shape[-1]))
        return torch.where((ids >= first)[..., None], new.to(output), output)

    handle = embedding.register_forward_hook(replace_new)
    try:
        yield
    finally:
        handle.remove()


def inversion(
    victim: Victim,
    *,
    tokens: Sequence[int] = (1, 4),
    steps: Sequence[int] = (15, 50),
    pictures: int = 25,
    batch_size: int = 8,
    learning_rate: float = 5e-3,
    start: str = "art",
    control: bool = True,
    levels: Sequence[int] = (),
) -> Iterator[Result]:
    """
    Train token embeddings on the original's pictures of the concept, with all weights frozen.

    Source: Circumventing Concept Erasure (Pham et al., ICLR 2024): textual inversion of 25 pictures, learning
    rate 5e-3, from the word "art"; the paper uses 5,000 steps with batches of 16. The variant "never
    forgotten" attacks another concept that was not forgotten, and says how well the attack does without an
    erasure.

    Args:
        tokens (`Sequence[int]`):
            Numbers of new tokens; each is an attack of its own.
        steps (`Sequence[int]`):
            Numbers of steps after which the test pictures are drawn; training ends with the last.
        pictures (`int`), batch_size (`int`), learning_rate (`float`), start (`str`):
            As above.
        control (`bool`):
            Whether to attack another concept as well.
        levels (`Sequence[int]`):
            Numbers of levels of noise that have a token each; every number is an attack of its own.
    """
    studio = victim.studio
    attacks = [(victim, count, 1, "1 token" if count == 1 else f"{count} tokens") for count in tokens]
    if control:
        unforgotten = Victim(victim.pipe, studio, victim.other, victim.concept, victim.seed, victim.folder)
        attacks.append((unforgotten, 1, 1, "never forgotten"))
    attacks += [(victim, parts, parts, f"a token for each of {parts} levels") for parts in levels]
    for attacker, count, parts, variant in attacks:
        shown = studio.pictures(attacker.concept, pictures)
        options = {"batch_size": batch_size, "learning_rate": learning_rate, "start": start, "parts": parts}
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
    parts: int = 1,
) -> Iterator[tuple[int, StableDiffusionPipeline, str]]:
    """
    Yield the number of steps done, a pipeline that knows the new tokens, and what to call it with: these
    tokens as text, or of several parts of the noise the first's, in whose place it takes that of each part.
    The arguments are those of `inversion`.
    """
    pipe, word = with_new_tokens(pipe, count)
    pipe.unet.requires_grad_(False)
    noise = Noise(pipe, seed)
    words = [word]
    if parts > 1:
        words = word.split()
        pipe = WordOfEachPart.around(pipe, forget=words)
    of_a_part = len(noise.scheduler.alphas_cumprod) / parts
    # All new tokens start near the mean token of a neutral word.
    weight = pipe.text_encoder.get_input_embeddings().weight
    ids = pipe.tokenizer(start, add_special_tokens=False).input_ids
    apart = 1e-3 * torch.randn(count, weight.shape[1], generator=noise.generator)
    vectors = nn.Parameter(weight[ids].float().mean(0) + apart.to(weight.device))
    optimizer = torch.optim.AdamW([vectors], lr=learning_rate)
    captions = [pictures.texts(word) for word in words]
    for step in range(1, max(steps) + 1):
        rows = noise.rows(len(pictures.captions), batch_size)
        noised = noise(pictures.latents[rows].to(weight))
        of_rows = (noised.t / of_a_part).int().tolist()
        with torch.enable_grad(), embedded(pipe, vectors):
            features = encode(pipe, [captions[part][i] for part, i in zip(of_rows, rows, strict=True)])
            predicted = pipe.unet(noised.x, noised.t, features).sample
            loss = nn.functional.mse_loss(predicted, noised.wanted)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        if step in steps:
            with torch.no_grad():
                weight[-count:] = vectors.to(weight)
            yield step, pipe, words[0]


class WordOfEachPart(AtInference):
    """A pipeline that draws with another word at each level of noise: those of `forget`, from the least noise
    to the most, the first of which is in the prompts."""

    @torch.no_grad()
    def __call__(self, prompt, **kwargs):
        first, *_ = self.forget
        features = [
            encode(self, [text.replace(first, word) for text in prompt]).to(self.unet.dtype)
            for word in self.forget
        ]
        total = len(self.scheduler.alphas_cumprod)

        def take_word(args, kwargs):
            part = features[int(float(args[1]) * len(features) / total)]
            read = kwargs["encoder_hidden_states"]
            return args, {**kwargs, "encoder_hidden_states": torch.cat([read[: -len(part)], part])}

        with intercepted(self.unet, take_word, lambda args, kwargs, output: output):
            return super().__call__(prompt, **kwargs)


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
