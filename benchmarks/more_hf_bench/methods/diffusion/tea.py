"""TEA: text encoder alignment (Dehghanpour Farashah et al., arXiv 2608.15341, 2026)."""

from __future__ import annotations

import copy

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cosine_similarity

from more_hf.core.errors import IncompatibleBaseError, MoreError
from more_hf.diffusion.prompts import TEMPLATES, evenly, everyday_prompts, sentences_around

from .pipelines import require_stable_diffusion
from .texts import Concepts, Retained, Targets, name_roles


ANCHORS = 5  # of each prompt


def tea(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: Targets,
    retain: Retained,
    epochs: int = 2,
    batch_size: int = 32,
    learning_rate: float = 1e-5,
    critic_learning_rate: float = 1e-3,
    adversarial: float = 0.5,
    preserving: float = 1.0,
    prompts: int = 20,
    seed: int = 0,
) -> DiffusionPipeline:
    """Train the text encoder with TEA (arXiv 2608.15341), for Stable Diffusion: a critic tells the tokens of
    prompts with the concept from those of the same prompts with an anchor, and the encoder learns to deceive
    it while anchors stay where they were.

    Source: its losses, its order of steps and its settings for artists in Stable Diffusion 1.4; the anchors
    are the targets and retained names, at most five. Our own: features are those that the denoiser reads
    (published: without begin and end token, before the last norm), and the sentences are the package's. The
    pipeline gets a trained copy of its text encoder; the denoiser and the encoder that it had stay as they
    are.

    Args:
        epochs (`int`, defaults to 2), batch_size (`int`, defaults to 32): of the pairs of prompts.
        learning_rate (`float`), critic_learning_rate (`float`): of the two AdamW.
        adversarial (`float`), preserving (`float`): weights of the encoder's two losses.
        prompts (`int`, defaults to 20): sentences around each concept.
        seed (`int`, defaults to 0): of the critic and of the order.
    """
    require_stable_diffusion(pipe)
    roles = name_roles(concepts, remap_to, retain)
    if not roles.keep:
        raise MoreError(
            "TEA needs anchors: the targets and the names to keep, and there are none. Give some."
        )
    anchors = roles.keep[:ANCHORS]
    known = sentences_around([*roles.forget, *anchors], everyday_prompts(pipe.tokenizer))
    sentences = evenly(known, prompts, TEMPLATES)
    pairs = [
        (sentence.replace("{}", concept), sentence.replace("{}", anchor))
        for concept in roles.forget
        for sentence in sentences
        for anchor in anchors
    ]
    device, generator = pipe._execution_device, torch.Generator().manual_seed(seed)
    original = pipe.text_encoder
    student = copy.deepcopy(original).float().requires_grad_(True)
    critic = new_critic(student.config.hidden_size, seed).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=critic_learning_rate)

    def tokens(texts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids, and which of them are no padding."""
        length = pipe.tokenizer.model_max_length
        read = pipe.tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(device)
        return read.input_ids, read.attention_mask.bool()

    for _ in range(epochs):
        for rows in torch.randperm(len(pairs), generator=generator).split(batch_size):
            (named, in_named), (plain, in_plain) = (
                tokens([pairs[row][side] for row in rows]) for side in (0, 1)
            )
            with torch.no_grad():
                stay, seen = original(plain)[0].float(), (student(named)[0], student(plain)[0])
            with torch.enable_grad():
                # 1. The critic learns to tell them apart.
                loss = critic_loss(critic(seen[0][in_named]), critic(seen[1][in_plain]))
                critic_optimizer.zero_grad()
                loss.backward()
                critic_optimizer.step()
                # 2. The encoder learns that it cannot.
                deceived = critic(student(named)[0][in_named])
                moved = 1 - cosine_similarity(student(plain)[0], stay, dim=-1)[in_plain]
                taken_for_plain = binary_cross_entropy_with_logits(deceived, torch.zeros_like(deceived))
                loss = adversarial * taken_for_plain + preserving * moved.mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    student = student.to(original.dtype).requires_grad_(False)
    if not all(torch.isfinite(parameter).all() for parameter in student.parameters()):
        raise IncompatibleBaseError(
            f"The trained text encoder is not finite in {original.dtype}. Nothing was changed. Choose a "
            "smaller learning rate."
        )
    pipe.register_modules(text_encoder=student)
    return pipe


def new_critic(width: int, seed: int) -> nn.Module:
    """Half as wide as what it reads, with one answer for each token."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, 1))


def critic_loss(named: Tensor, plain: Tensor) -> Tensor:
    """Of its answers to tokens with the concept, which should be 1, and without, which should be 0."""
    return binary_cross_entropy_with_logits(named, torch.ones_like(named)) + binary_cross_entropy_with_logits(
        plain, torch.zeros_like(plain)
    )
