"""ESD: Erasing Concepts from Diffusion Models (Gandikota et al., ICCV 2023)."""

from __future__ import annotations

from functools import partial

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor, nn

from more_hf.core.request import check_choice
from more_hf.diffusion.encoder import Encoder

from .pipelines import require_stable_diffusion
from .texts import Concepts, Retained, Targets, name_roles
from .training import Checkpoint, base_facts, float_copy, train, trainable_names, with_gradients


VARIANTS = {
    "paper": {"iterations": 1000, "learning_rate": 1e-5, "eta": 1.0},
    "repo": {"iterations": 200, "learning_rate": 5e-5, "eta": 2.0},
}


def esd(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: Targets,
    retain: Retained,
    variant: str = "paper",
    iterations: int | None = None,
    learning_rate: float | None = None,
    eta: float | None = None,
    layers: str = "x",
    sampling_steps: int = 50,
    start_guidance: float = 3.0,
    batch_size: int = 1,
    seed: int = 0,
    checkpoint: str | None = None,
    save_every: int = 25,
) -> DiffusionPipeline:
    """Train with Erasing Concepts from Diffusion Models (Gandikota et al., ICCV 2023), for Stable Diffusion:
    the output for the concept learns to be what guidance away from the concept gives.

    Source: its loss, in the form of the paper (negative guidance around the empty prompt) and of the current
    repository (around the concept itself). The weights of a target add to one, so that noise and v prediction
    are trained alike. It has no target and keeps no list: `remap_to` and `retain` play no part. Of several
    names, each iteration takes one at random.

    Args:
        variant (`str`, defaults to `"paper"`): `"paper"`: start points sampled with the model in training;
            1000 iterations, learning rate 1e-5, η 1. `"repo"`: start points sampled with the original; 200
            iterations, 5e-5, η 2.
        iterations (`int`), learning_rate (`float`), eta (`float`) (*optional*): instead of the variant's.
        layers (`str`, defaults to `"x"`): `"x"` (the attentions that read text, for styles), `"x-strict"`,
            `"u"` (all others), `"all"`.
        sampling_steps (`int`, defaults to 50): DDIM steps of a start point's whole run, stopped at a random
            one.
        start_guidance (`float`, defaults to 3): guidance of that run.
        batch_size (`int`, defaults to 1): start points per iteration; they share the step.
        seed (`int`, defaults to 0): of everything random here.
        checkpoint (`str`, *optional*): a folder; the same run that was stopped goes on from there. Written
            every `save_every` iterations.
    """
    check_choice("variant", variant, tuple(VARIANTS))
    overrides = {"iterations": iterations, "learning_rate": learning_rate, "eta": eta}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    settings = {**VARIANTS[variant], **overrides}
    forget = name_roles(concepts, remap_to, retain).forget
    require_stable_diffusion(pipe)
    names = trainable_names(pipe, layers)
    student, frozen = float_copy(pipe), float_copy(pipe)
    optimizer = torch.optim.Adam(with_gradients(student, names), lr=settings["learning_rate"])
    empty, *texts = Encoder(pipe).encode(["", *forget]).float()
    sampler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    sampler.set_timesteps(sampling_steps, device=empty.device)
    shape = (batch_size, student.config.in_channels, *[student.config.sample_size] * 2)
    total = sampler.config.num_train_timesteps
    starting = student if variant == "paper" else frozen

    def loss(generator: torch.Generator) -> Tensor:
        # A start point: a guided run from noise, stopped at a random level, of which 0 is the cleanest.
        text = texts[_below(len(texts), generator)]
        level = _below(sampling_steps, generator)
        x = torch.randn(shape, generator=generator).to(empty)
        x = sample_until(starting, sampler, x, empty, text, start_guidance, level)
        t = sampler.timesteps[sampling_steps - 1 - level]
        if variant == "paper":
            # anywhere between this level and the next, on the scale of training
            first, after = (round(i * total / sampling_steps) for i in (level, level + 1))
            t = torch.tensor(first + _below(max(1, after - first), generator), device=x.device)
        # The original says where to go, the student goes there.
        with torch.no_grad():
            rows = _rows(empty, text, len(x))
            unguided, guided = frozen(torch.cat([x, x]), t, rows).sample.chunk(2)
        predicted = student(x, t, text.expand(len(x), -1, -1)).sample
        wanted = target(unguided, guided, settings["eta"], variant)
        return torch.nn.functional.mse_loss(predicted, wanted)

    facts = {
        "method": "esd",
        "variant": variant,
        "concepts": forget,
        "seed": seed,
        "layers": layers,
        "sampling_steps": sampling_steps,
        "start_guidance": start_guidance,
        "batch_size": batch_size,
        **settings,
        **base_facts(pipe, names),
    }
    train(pipe, student, names, loss, optimizer, Checkpoint(checkpoint, facts), save_every)
    return pipe


esd_repo = partial(esd, variant="repo")


def target(unguided: Tensor, guided: Tensor, eta: float, variant: str) -> Tensor:
    """What the concept's output should become, from the original's for the empty prompt and for the concept.

    `"paper"`: ε_∅ − η (ε_c − ε_∅); `"repo"`: ε_c − η (ε_c − ε_∅).
    """
    around = unguided if variant == "paper" else guided
    return around - eta * (guided - unguided)


@torch.no_grad()
def sample_until(
    denoiser: nn.Module,
    sampler: DDIMScheduler,
    x: Tensor,
    empty: Tensor,
    text: Tensor,
    guidance: float,
    level: int,
) -> Tensor:
    """Run DDIM with guidance from noise `x` `(batch, channels, h, w)` down to a level: 0 is the run's last
    timestep, which is not taken.

    `empty` and `text` are the two prompts' features `(tokens, d)`.
    """
    rows = _rows(empty, text, len(x))
    for t in sampler.timesteps[: len(sampler.timesteps) - 1 - level]:
        unguided, guided = denoiser(torch.cat([x, x]), t, rows).sample.chunk(2)
        x = sampler.step(unguided + guidance * (guided - unguided), t, x).prev_sample
    return x


def _rows(empty: Tensor, text: Tensor, count: int) -> Tensor:
    return torch.stack([empty, text]).repeat_interleave(count, dim=0)


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator))
