"""CA: Ablating Concepts in Text-to-Image Diffusion Models (Kumari et al., ICCV 2023)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from accelerate.utils import tqdm
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from torch import Tensor

from ....core.errors import MoreError
from ....diffusion.encoder import Encoder
from ....diffusion.sites import find_denoiser, find_sites
from .names import Concepts, names_asked, ordinary_prompts, require_stable_diffusion
from .progress import is_quiet
from .training import Checkpoint, base_facts, float_copy, train, trainable_names, with_gradients


CAPTIONS = ("{prompt}, in the style of {name}", "in {name}'s style, {prompt}")


def ca(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: str | Sequence[str] | None,
    retain: Sequence[str] | None,
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
    """Erase styles by training with CA: edits the pipeline's keys and values in place, at the end, and returns the pipeline.

    The output for a caption with the concept learns to be the output for its anchor, on noised pictures of anchors that the pipeline
    itself draws first. Source: CA, its model-based loss; the begin token's keys and values get no gradient, pictures are flipped at
    random, AdamW. The loss is on the denoiser's own output, noise or v. `retain` plays no part.

    Args:
        pipe, concepts: as in `erase_concept`; a `StableDiffusionPipeline`, and styles, for the captions say so. Of several names, each
            caption takes one at random.
        remap_to (`str` or `Sequence[str]`, *optional*): anchors: the prompts in the style of one of these, at random. Without: the plain
            prompts, as published.
        images (`int`, defaults to 1000): anchor pictures.
        prompts (`Sequence[str]`, *optional*): what they show; by default the package's everyday prompts that name no concept and leave room
            for a name (published: 200 prompts about paintings).
        iterations (`int`, defaults to 200), batch_size (`int`, defaults to 4): of the training (published for one GPU).
        learning_rate (`float`, *optional*): by default 2e-6 times the batch size, as published.
        sampling_steps (`int`, defaults to 25), guidance (`float`, defaults to 6): how anchors are drawn, with DPM-Solver.
        seed (`int`, defaults to 0): of everything random here; no global random state is touched.
        checkpoint (`str`, *optional*): a folder; the same run that was stopped goes on from there, and runs that differ only in their
            training share their anchors. Written every `save_every` iterations and with every batch of anchors.

    Raises `PrototypeError` and `TargetNotFoundError` as `erase_concept` does, and `IncompatibleBaseError` if training diverged; the
    pipeline is unchanged then.
    """
    asked = names_asked(concepts, remap_to, retain)
    require_stable_diffusion(pipe)
    encoder = Encoder(pipe)
    given = ordinary_prompts(pipe, asked) if prompts is None else list(prompts)
    prompts_that_fit = [prompt for prompt in given if _fits(encoder, prompt, [*asked.forget, *asked.targets])]
    if prompts is not None and len(prompts_that_fit) < len(given):
        longest = max(given, key=lambda prompt: len(encoder.token_ids(prompt)))
        raise MoreError(f"{longest!r} leaves no room for a name in this model's {encoder.length} tokens. Give CA shorter prompts.")
    prompts = prompts_that_fit
    if images < 1 or not prompts:
        raise MoreError(f"CA draws its anchors: it needs at least one image and one prompt, got {images} and {len(prompts)}.")
    names = trainable_names(pipe, "x-strict")
    learning_rate = 2e-6 * batch_size if learning_rate is None else learning_rate
    facts = {
        "method": "ca-anchors",
        "targets": asked.targets,
        "prompts": prompts,
        "images": images,
        "sampling_steps": sampling_steps,
        "guidance": guidance,
        "seed": seed,
        **base_facts(pipe, names),
    }
    texts = anchor_texts(prompts, asked.targets, images)
    held = Checkpoint(checkpoint, facts)
    anchors = draw_anchors(pipe, [text for _, text in texts], held, steps=sampling_steps, guidance=guidance, seed=seed)

    student = float_copy(pipe)
    for name in find_sites(pipe, find_denoiser(pipe)):
        student.get_submodule(name).register_forward_hook(_without_begin_token)
    optimizer = torch.optim.AdamW(with_gradients(student, names), lr=learning_rate)
    device = pipe._execution_device
    bars = pipe.scheduler.alphas_cumprod.to(device)

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(texts), (batch_size,), generator=generator).tolist()
        flips = torch.randint(2, (batch_size,), generator=generator).tolist()
        forms = torch.randint(len(CAPTIONS), (batch_size,), generator=generator).tolist()
        chosen = torch.randint(len(asked.forget), (batch_size,), generator=generator).tolist()
        captions = [CAPTIONS[f].format(prompt=texts[r][0], name=asked.forget[c]) for r, f, c in zip(rows, forms, chosen, strict=True)]
        x = torch.stack([anchors[row, flip] for row, flip in zip(rows, flips, strict=True)]).to(device)
        t = torch.randint(len(bars), (batch_size,), generator=generator).to(device)
        noise = torch.randn(x.shape, generator=generator).to(device)
        a = bars[t][:, None, None, None]
        x = a.sqrt() * x + (1 - a).sqrt() * noise
        text = encoder.encode([*captions, *(texts[row][1] for row in rows)]).float()
        return ablation_loss(student, x, t, *text.chunk(2))

    training = {"iterations": iterations, "batch_size": batch_size, "learning_rate": learning_rate}
    facts = {**facts, "method": "ca", "concepts": asked.forget, **training}
    train(
        pipe,
        student,
        names,
        loss,
        optimizer,
        Checkpoint(checkpoint, facts),
        iterations=iterations,
        seed=seed,
        save_every=save_every,
        desc=f"ca without {', '.join(asked.forget)}",
    )
    return pipe


def ablation_loss(denoiser, x: Tensor, t: Tensor, concept: Tensor, anchor: Tensor) -> Tensor:
    """Mean square of the output for the concept less that for its anchor, which gets no gradient; the same denoiser makes both.

    `x` `(batch, channels, h, w)` noised pictures of anchors, `t` `(batch,)`, `concept` and `anchor` `(batch, tokens, d)`.
    """
    with torch.no_grad():
        wanted = denoiser(x, t, anchor).sample
    return torch.nn.functional.mse_loss(denoiser(x, t, concept).sample, wanted)


def anchor_texts(prompts: Sequence[str], targets: Sequence[str], images: int) -> list[tuple[str, str]]:
    """For each image its prompt and the text it is drawn with: prompts in turn, and with targets each prompt with every target in turn."""
    texts = []
    for i in range(images):
        prompt, form = prompts[i % len(prompts)], CAPTIONS[0]
        texts.append((prompt, form.format(prompt=prompt, name=targets[(i + i // len(prompts)) % len(targets)]) if targets else prompt))
    return texts


@torch.no_grad()
def draw_anchors(
    pipe: DiffusionPipeline, texts: Sequence[str], checkpoint: Checkpoint, *, steps: int, guidance: float, seed: int
) -> Tensor:
    """`(n, 2, channels, h, w)`, float32 on the CPU: latents of a picture for every text, and of its mirror image.

    Picture i has seed `seed + i`; `checkpoint` holds those that are done.
    """
    drawing = copy.copy(pipe)
    drawing.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    drawing.set_progress_bar_config(disable=True)
    vae = pipe.vae
    state = checkpoint.load()
    done = [] if state is None else list(state["latents"])
    bar = tqdm(total=len(texts), initial=len(done), desc="anchors", unit="image", disable=is_quiet(pipe))
    while len(done) < len(texts):
        batch = range(len(done), min(len(done) + 16, len(texts)))
        pictures = drawing(
            [texts[i] for i in batch],
            generator=[torch.Generator().manual_seed(seed + i) for i in batch],
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="pt",
        ).images
        pixels = (2 * pictures - 1).to(vae.device, vae.dtype)
        both = [vae.encode(x).latent_dist.mode() * vae.config.scaling_factor for x in (pixels, pixels.flip(-1))]
        done.extend(torch.stack(both, dim=1).float().cpu())
        checkpoint.save({"latents": torch.stack(done)})
        bar.update(len(batch))
    bar.close()
    return torch.stack(done)


def _fits(encoder: Encoder, prompt: str, names: Sequence[str]) -> bool:
    """Whether every caption of the prompt is short enough to be read whole."""
    captions = [form.format(prompt=prompt, name=name) for form in CAPTIONS for name in names]
    return all(len(encoder.token_ids(caption)) + 2 <= encoder.length for caption in captions)


def _without_begin_token(module, args, output: Tensor) -> Tensor:
    """A forward hook on keys and values `(batch, tokens, width)`: no gradient from the begin token, which every prompt has."""
    return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)
