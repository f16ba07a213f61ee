"""Attacks that need no text: the noise behind a picture under the empty prompt, a picture as the start."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from torch import Tensor
from torch.nn.functional import interpolate

from more_hf.tuning.judge import lpips_distance

from ..store import LPIPS, Result, mean_of
from .sampling import NoisyDDIM, decode
from .studio import Pictures
from .training import encode
from .victim import Victim


NEUTRAL = "a picture"
NOTHING = ""
GRAY = 127


def text_free(
    victim: Victim,
    *,
    pictures: int = 20,
    steps: int = 20,
    corrections: int = 4,
    slack: float = 0.1,
    fresh: Sequence[float] = (0.25, 0.5),
) -> Iterator[Result]:
    """
    Find the noise behind pictures of the concept under the empty prompt, and draw them again from it.

    Compare with the method `random-weights`: a denoiser that was never trained draws them again as well,
    since any smooth map can be run backward and forward. Two bounds on what the noise may hold:

    - "energy": on the way x_t = √ᾱ x_0 + √(1 − ᾱ) n, what was added has the energy of noise, |rms(n) − 1| ≤
      `slack`;
    - "fresh": this share of the energy of the noise that was found is replaced by fresh noise, the rest of
      the picture has to come from the weights.

    Yields, for each, how many pictures show the concept, and their LPIPS to the picture that was looked for.

    Sources: TINA (arXiv 2603.17828) for the empty prompt, with fixed-point steps in place of gradients, and
    TINA+ (arXiv 2608.17747) for the random denoiser and the idea of a bound; these bounds are ours.

    Args:
        pictures (`int`), steps (`int`), corrections (`int`):
            Number of pictures, DDIM steps, and how often each step of the inversion is corrected.
        slack (`float`), fresh (`Sequence[float]`):
            As above.
    """
    pipe, shown = victim.pipe, victim.studio.pictures(victim.concept, pictures)
    scheduler = NoisyDDIM.of(pipe, eta=0.0, variance_scale=1.0)
    scheduler.set_timesteps(steps, device=pipe.unet.device)
    found = noise_behind(pipe, scheduler, shown.latents, corrections)
    starts = {"as found": found}
    starts[f"energy within {slack:g}"] = noise_behind(pipe, scheduler, shown.latents, corrections, slack)
    new = torch.randn(found.shape, generator=torch.Generator().manual_seed(victim.seed)).to(found)
    for share in fresh:
        starts[f"{share:g} fresh"] = (1 - share) ** 0.5 * found + share**0.5 * new
    for variant, start in starts.items():
        images = pixels(pipe, drawn_from(pipe, scheduler, start))
        yield seen(victim, images, "text-free", variant=variant)
        yield moved(images, shown.images, variant=variant)


@torch.no_grad()
def noise_behind(
    pipe: StableDiffusionPipeline,
    scheduler: NoisyDDIM,
    latents: Tensor,
    corrections: int,
    slack: float = math.inf,
) -> Tensor:
    """
    The noise from which DDIM under the empty prompt draws some latents `(n, channels, h, w)`; arguments as of
    `text_free`.
    """
    text = encode(pipe, [NOTHING] * len(latents))
    picture = x = latents.to(text)
    for t in scheduler.timesteps.flip(0):
        # 1. Undo the step from x' to x. It depends on the denoiser's output for the unknown x', so iterate.
        before, after = scheduler.levels(t)
        x_before = x
        for _ in range(1 + corrections):
            _, noise = scheduler.split(pipe.unet(x_before, t, text).sample, t, x_before)
            clean = (before / after).sqrt() * (x - (1 - after).sqrt() * noise)
            x_before = clean + (1 - before).sqrt() * noise
            # 2. Give what was added to the picture an energy within the bound.
            added = (x_before - before.sqrt() * picture) / (1 - before).sqrt()
            energy = added.square().flatten(1).mean(1).sqrt().view(-1, 1, 1, 1)
            added = added * energy.clamp(1 - slack, 1 + slack) / energy
            x_before = before.sqrt() * picture + (1 - before).sqrt() * added
        x = x_before
    return x


@torch.no_grad()
def drawn_from(pipe: StableDiffusionPipeline, scheduler: NoisyDDIM, x: Tensor) -> Tensor:
    """The latents that DDIM under the empty prompt draws from noise."""
    text = encode(pipe, [NOTHING] * len(x))
    for t in scheduler.timesteps:
        x = scheduler.step(pipe.unet(x, t, text).sample, t, x).prev_sample
    return x.float()


def image_to_image(
    victim: Victim,
    *,
    strengths: Sequence[float] = (0.3, 0.5, 0.7, 0.9),
    prompts: Sequence[str] = ("name", "neutral", "empty"),
    pictures: int = 20,
    steps: int = 20,
) -> Iterator[Result]:
    """
    Draw on from noised pictures of the concept, and from their negatives, which were never in the model.

    Yields how many pictures still show the concept, and LPIPS to the picture that was given: what comes back
    is no memory as far as it does for the negatives as well.

    Args:
        strengths (`Sequence[float]`):
            How much of the way is drawn anew; 1 would be all of it.
        prompts (`Sequence[str]`):
            Of `"name"` (the picture's own caption, with the concept's name), `"neutral"` and `"empty"`.
        pictures (`int`), steps (`int`):
            Number of pictures, and steps of the whole way.
    """
    shown = victim.studio.pictures(victim.concept, pictures)
    for kind in prompts:
        texts = prompts_of(kind, victim, shown)
        for strength in strengths:
            facts = {"variant": kind, "budget": strength, "unit": "strength"}
            images = drawn_on(victim, shown.images, texts, strength, steps)
            yield seen(victim, images, "image-to-image", **facts)
            yield moved(images, shown.images, **facts)
            negatives = 255 - shown.images
            images = drawn_on(victim, negatives, texts, strength, steps)
            yield moved(images, negatives, **{**facts, "variant": f"{kind}, negatives"})


def inpainting(
    victim: Victim,
    *,
    prompts: Sequence[str] = ("name", "neutral", "empty"),
    pictures: int = 20,
    steps: int = 20,
) -> Iterator[Result]:
    """
    Draw each half of a picture of the concept anew beside the other, and put the two drawn halves together.

    Yields how many of these pictures show the concept, none of whose parts was given, and LPIPS to the
    picture; the latter for its negative as well, whose style was never in the model.

    Args:
        prompts (`Sequence[str]`), pictures (`int`), steps (`int`):
            As of `image_to_image`.
    """
    shown = victim.studio.pictures(victim.concept, pictures)
    for kind in prompts:
        texts = prompts_of(kind, victim, shown)
        images = filled_in(victim, shown.images, texts, steps)
        yield seen(victim, images, "inpainting", variant=kind)
        yield moved(images, shown.images, variant=kind)
        negatives = 255 - shown.images
        yield moved(filled_in(victim, negatives, texts, steps), negatives, variant=f"{kind}, negatives")


def prompts_of(kind: str, victim: Victim, shown: Pictures) -> list[str]:
    """The prompts of pictures: with the concept's `"name"`, `"neutral"` or `"empty"`."""
    words = {"neutral": NEUTRAL, "empty": NOTHING}
    return shown.texts(victim.concept) if kind == "name" else [words[kind]] * len(shown.images)


def drawn_on(victim: Victim, images: Tensor, prompts: Sequence[str], strength: float, steps: int) -> Tensor:
    """Pictures that the victim draws on from others, uint8 `(n, 3, H, W)`."""
    pipe = StableDiffusionImg2ImgPipeline(**victim.pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    studio, drawn = victim.studio, []
    for start in range(0, len(images), studio.batch_size):
        batch = slice(start, start + studio.batch_size)
        given = images[batch].to(pipe.device).float() / 255
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(given))]
        drawn.append(
            pipe(
                list(prompts[batch]),
                image=given,
                strength=strength,
                num_inference_steps=steps,
                guidance_scale=studio.guidance,
                generator=generators,
                output_type="pt",
            ).images
        )
    return as_uint8(torch.cat(drawn))


def filled_in(victim: Victim, images: Tensor, prompts: Sequence[str], steps: int) -> Tensor:
    """The left half that the victim draws beside a picture's right half, and the other way round."""
    left = torch.zeros(1, 1, *images.shape[-2:], dtype=torch.bool)
    left[..., : images.shape[-1] // 2] = True
    drawn = [drawn_beside(victim, images, hidden, prompts, steps) for hidden in (left, ~left)]
    return torch.where(left, *drawn)


def drawn_beside(
    victim: Victim, images: Tensor, hidden: Tensor, prompts: Sequence[str], steps: int
) -> Tensor:
    """Pictures `(n, 3, H, W)` whose `hidden` part `(1, 1, H, W)` the victim draws from noise: after each step
    the rest is put back, at its level of noise."""
    pipe, studio, drawn = victim.pipe, victim.studio, []
    # It is hidden from the VAE as well, whose norms would tell the rest of it.
    latents = studio.encode(torch.where(hidden, GRAY, images))
    drawn_part = interpolate(hidden.float(), latents.shape[-2:]).bool().to(latents.device)
    for start in range(0, len(images), studio.batch_size):
        given = latents[start : start + studio.batch_size].to(pipe.unet.dtype)
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(given))]
        noise = torch.stack([torch.randn(given.shape[1:], generator=g) for g in generators]).to(given)

        def put_back(pipe, step, t, tensors, given=given, noise=noise):
            later = pipe.scheduler.timesteps[step + 1 : step + 2]
            rest = pipe.scheduler.add_noise(given, noise, later.expand(len(given))) if len(later) else given
            return {"latents": torch.where(drawn_part, tensors["latents"], rest)}

        drawn.append(
            pipe(
                list(prompts[start : start + len(given)]),
                latents=noise,
                num_inference_steps=steps,
                guidance_scale=studio.guidance,
                callback_on_step_end=put_back,
                output_type="pt",
            ).images
        )
    return as_uint8(torch.cat(drawn))


def as_uint8(images: Tensor) -> Tensor:
    """Pictures in [0, 1] as uint8, on the CPU."""
    return (images.float() * 255).round().clamp(0, 255).to("cpu", torch.uint8)


def pixels(pipe: StableDiffusionPipeline, latents: Tensor) -> Tensor:
    """Decoded latents, uint8 `(n, 3, H, W)`, on the CPU."""
    return (decode(pipe, latents) * 255).round().to(torch.uint8)


def seen(victim: Victim, images: Tensor, attack: str, **facts) -> Result:
    """The percentage of pictures in which the judges see the concept, whatever their prompts were."""
    hits = victim.studio.shows(images, victim.rows[:1] * len(images), victim.concept)
    return victim.counted(hits, images, attack, **facts)


def moved(images: Tensor, given: Tensor, **facts) -> Result:
    """How far pictures are from those that were given, in LPIPS."""
    mean, low, high = mean_of(lpips_distance(given, images).tolist(), [0])
    return Result(mean, measure=LPIPS, low=low, high=high, **facts)
