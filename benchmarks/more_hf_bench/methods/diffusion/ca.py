"""CA: Ablating Concepts in Text-to-Image Diffusion Models (Kumari et al., ICCV 2023)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from accelerate.utils import tqdm
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from torch import Tensor, nn

from more_hf.core.errors import MoreError
from more_hf.diffusion.encoder import Encoder
from more_hf.diffusion.sites import find_denoiser, find_sites

from .pipelines import is_quiet, require_stable_diffusion
from .texts import Concepts, Retained, Roles, Targets, name_roles, ordinary_prompts
from .training import Checkpoint, base_facts, float_copy, train, trainable_names, with_gradients


CAPTIONS = ("{prompt}, in the style of {name}", "in {name}'s style, {prompt}")
DRAWN_AT_ONCE = 16


def ca(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: Targets,
    retain: Retained,
    images: int = 1000,
    prompts: Sequence[str] | None = None,
    iterations: int = 200,
    batch_size: int = 4,
    learning_rate: float | None = None,
    sampling_steps: int = 25,
    guidance: float = 6.0,
    seed: int = 0,
    checkpoint: str | None = None,
    save_every: int = 25,
) -> DiffusionPipeline:
    """Train with Ablating Concepts (Kumari et al., ICCV 2023), for styles in Stable Diffusion: the output for
    a caption with the concept learns to be the output for its anchor, on noised pictures of anchors that the
    pipeline itself draws first.

    Source: its model-based loss; the begin token's keys and values get no gradient, pictures are flipped at
    random, AdamW. The loss is on the denoiser's own output, noise or v. The captions say "style". `retain`
    plays no part. Of several names, each caption takes one at random, and of several targets each anchor;
    without targets the anchors are the plain prompts, as published.

    Args:
        images (`int`, defaults to 1000): anchor pictures.
        prompts (`Sequence[str]`, *optional*): what they show; by default the package's everyday prompts that
            name no concept and leave room for a name (published: 200 prompts about paintings).
        iterations (`int`, defaults to 200), batch_size (`int`, defaults to 4): of the training (published
            for one GPU).
        learning_rate (`float`, *optional*): by default 2e-6 times the batch size, as published.
        sampling_steps (`int`, defaults to 25), guidance (`float`, defaults to 6): how anchors are drawn, with
            DPM-Solver.
        seed (`int`, defaults to 0): of everything random here.
        checkpoint (`str`, *optional*): a folder; the same run that was stopped goes on from there, and runs
            that differ only in their training share their anchors. Written every `save_every` iterations and
            with every batch of anchors.
    """
    roles = name_roles(concepts, remap_to, retain)
    require_stable_diffusion(pipe)
    encoder = Encoder(pipe)
    prompts = _fitting_prompts(encoder, prompts, ordinary_prompts(pipe, roles.forget), roles)
    if images < 1 or not prompts:
        raise MoreError(
            "CA draws its anchors: it needs at least one image and one prompt, "
            f"got {images} and {len(prompts)}."
        )
    names = trainable_names(pipe, "x-strict")
    learning_rate = 2e-6 * batch_size if learning_rate is None else learning_rate
    facts = {
        "method": "ca-anchors",
        "targets": roles.targets,
        "prompts": prompts,
        "images": images,
        "sampling_steps": sampling_steps,
        "guidance": guidance,
        "seed": seed,
        **base_facts(pipe, names),
    }
    texts = anchor_texts(prompts, roles.targets, images)
    anchors = draw_anchors(
        pipe,
        [text for _, text in texts],
        Checkpoint(checkpoint, facts),
        steps=sampling_steps,
        guidance=guidance,
        seed=seed,
    )

    student = float_copy(pipe)
    for name in find_sites(pipe, find_denoiser(pipe)):
        student.get_submodule(name).register_forward_hook(detach_begin_token)
    optimizer = torch.optim.AdamW(with_gradients(student, names), lr=learning_rate)
    device = pipe._execution_device
    alpha_bars = pipe.scheduler.alphas_cumprod.to(device)

    def loss(generator: torch.Generator) -> Tensor:
        def draw(limit: int) -> list[int]:
            return torch.randint(limit, (batch_size,), generator=generator).tolist()

        rows, flips, forms, chosen = draw(len(texts)), draw(2), draw(len(CAPTIONS)), draw(len(roles.forget))
        # Noised pictures of anchors, each under a caption with the concept and under its anchor's own text.
        x = torch.stack([anchors[row, flip] for row, flip in zip(rows, flips, strict=True)]).to(device)
        t = torch.tensor(draw(len(alpha_bars)), device=device)
        noise = torch.randn(x.shape, generator=generator).to(device)
        alpha_bar = alpha_bars[t][:, None, None, None]
        x = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
        captions = [
            CAPTIONS[form].format(prompt=texts[row][0], name=roles.forget[concept])
            for row, form, concept in zip(rows, forms, chosen, strict=True)
        ]
        features = encoder.encode([*captions, *(texts[row][1] for row in rows)]).float()
        return ablation_loss(student, x, t, *features.chunk(2))

    facts |= {
        "method": "ca",
        "concepts": roles.forget,
        "iterations": iterations,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
    }
    train(pipe, student, names, loss, optimizer, Checkpoint(checkpoint, facts), save_every)
    return pipe


def ablation_loss(denoiser: nn.Module, x: Tensor, t: Tensor, concept: Tensor, anchor: Tensor) -> Tensor:
    """Mean square of the output for the concept less that for its anchor, which gets no gradient; the same
    denoiser makes both.

    `x` `(batch, channels, h, w)` are noised pictures of anchors, `t` is `(batch,)`, `concept` and `anchor`
    are `(batch, tokens, d)`."""
    with torch.no_grad():
        wanted = denoiser(x, t, anchor).sample
    return torch.nn.functional.mse_loss(denoiser(x, t, concept).sample, wanted)


def anchor_texts(prompts: Sequence[str], targets: Sequence[str], images: int) -> list[tuple[str, str]]:
    """For each image its prompt and the text it is drawn with: prompts in turn, and with targets each prompt
    with every target in turn."""
    texts = []
    for i in range(images):
        prompt = text = prompts[i % len(prompts)]
        if targets:
            name = targets[(i + i // len(prompts)) % len(targets)]
            text = CAPTIONS[0].format(prompt=prompt, name=name)
        texts.append((prompt, text))
    return texts


@torch.no_grad()
def draw_anchors(
    pipe: DiffusionPipeline,
    texts: Sequence[str],
    checkpoint: Checkpoint,
    *,
    steps: int,
    guidance: float,
    seed: int,
) -> Tensor:
    """Latents of a picture for every text, and of its mirror image: `(n, 2, channels, h, w)`, float32 on the
    CPU.

    Picture i has seed `seed + i`; `checkpoint` holds those that are done.
    """
    drawing = copy.copy(pipe)
    drawing.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    drawing.set_progress_bar_config(disable=True)
    vae = pipe.vae
    state = checkpoint.load()
    latents = [] if state is None else list(state["latents"])
    bar = tqdm(total=len(texts), initial=len(latents), desc="anchors", unit="image", disable=is_quiet(pipe))
    while len(latents) < len(texts):
        batch = range(len(latents), min(len(latents) + DRAWN_AT_ONCE, len(texts)))
        pictures = drawing(
            [texts[i] for i in batch],
            generator=[torch.Generator().manual_seed(seed + i) for i in batch],
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="pt",
        ).images
        pixels = (2 * pictures - 1).to(vae.device, vae.dtype)
        encoded = [vae.encode(x).latent_dist.mode() for x in (pixels, pixels.flip(-1))]
        latents.extend(torch.stack(encoded, dim=1).mul(vae.config.scaling_factor).float().cpu())
        checkpoint.save({"latents": torch.stack(latents)})
        bar.update(len(batch))
    bar.close()
    return torch.stack(latents)


def detach_begin_token(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """A forward hook on keys and values `(batch, tokens, width)`: no gradient from the begin token, which
    every prompt has."""
    return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)


def _fitting_prompts(
    encoder: Encoder, prompts: Sequence[str] | None, ordinary: Sequence[str], roles: Roles
) -> list[str]:
    """The caller's prompts, or those ordinary ones that leave room for every name.

    Raises `MoreError` if one of the caller's does not.
    """
    names = [*roles.forget, *roles.targets]

    def fits(prompt: str) -> bool:
        for form in CAPTIONS:
            captions = [form.format(prompt=prompt, name=name) for name in names]
            if any(len(encoder.token_ids(caption)) + 2 > encoder.length for caption in captions):
                return False
        return True

    if prompts is None:
        return [prompt for prompt in ordinary if fits(prompt)]
    for prompt in prompts:
        if not fits(prompt):
            raise MoreError(
                f"{prompt!r} leaves no room for a name in this model's {encoder.length} tokens. "
                "Give CA shorter prompts."
            )
    return list(prompts)
