"""The controls of every table, and SLD, which acts while the pipeline runs and changes no weight."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from more_hf.core.errors import MoreError
from more_hf.core.request import check_choice, names_in

from .pipelines import AtInference, intercepted, noise_per_output, require_stable_diffusion
from .texts import Concepts, Retained, Targets, name_roles


def original(
    pipe: DiffusionPipeline, concepts: Concepts, *, remap_to: Targets, retain: Retained
) -> DiffusionPipeline:
    """Do nothing: return the pipeline as it is. Every other line is compared with this one."""
    return pipe


def random_weights(
    pipe: DiffusionPipeline, concepts: Concepts, *, remap_to: Targets, retain: Retained, seed: int = 0
) -> DiffusionPipeline:
    """Put in a denoiser of the same form that was never trained. What an attack finds in it is no memory.

    The names play no part.
    """
    require_stable_diffusion(pipe)
    unet = pipe.unet
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe.register_modules(unet=type(unet).from_config(unet.config).to(unet.device, unet.dtype).eval())
    return pipe


def noise(pipe: DiffusionPipeline, concepts: Concepts, *, remap_to: Targets, retain: Retained) -> AtInference:
    """Give noise in place of every prompt that names a concept; each position keeps the length of its
    feature, and the noise is a function of the prompt.

    What a measure says about it is what the measure says about destruction: a large change and nothing of
    what was asked for. `remap_to` and `retain` play no part.
    """
    return NoisePipeline.around(pipe, forget=name_roles(concepts, remap_to, retain).forget)


def negative_prompt(
    pipe: DiffusionPipeline, concepts: Concepts, *, remap_to: Targets, retain: Retained
) -> AtInference:
    """Name the concepts in the negative prompt, after the caller's own if there is one.

    Without guidance it does nothing. `remap_to` and `retain` play no part.
    """
    return NegativePromptPipeline.around(pipe, forget=name_roles(concepts, remap_to, retain).forget)


class NoisePipeline(AtInference):
    """See `noise`."""

    def encode_prompt(self, prompt, device, num_images_per_prompt, *args, **kwargs):
        embeds, negative = super().encode_prompt(prompt, device, num_images_per_prompt, *args, **kwargs)
        embeds = embeds.clone()
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        for i, text in enumerate(prompts):
            if any(names_in(text, name) for name in self.forget):
                for row in range(i * num_images_per_prompt, (i + 1) * num_images_per_prompt):
                    embeds[row] = noise_like(embeds[row], text)
        return embeds, negative


class NegativePromptPipeline(AtInference):
    """See `negative_prompt`."""

    def encode_prompt(
        self,
        prompt,
        device,
        num_images_per_prompt,
        do_classifier_free_guidance,
        negative_prompt=None,
        **kwargs,
    ):
        if prompt is None:
            raise MoreError(
                "The concepts are added to a negative prompt in words: pass `prompt`, not `prompt_embeds`."
            )
        negative_prompt = with_names(prompt, negative_prompt, self.forget)
        return super().encode_prompt(
            prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt, **kwargs
        )


def noise_like(embeds: Tensor, prompt: str) -> Tensor:
    """Gaussian directions for features `(tokens, d)`, a function of the prompt alone, each with the length
    of the feature in its place."""
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7], "big")
    directions = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(seed)).to(embeds)
    return directions * embeds.norm(dim=-1, keepdim=True) / directions.norm(dim=-1, keepdim=True)


def with_names(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None, names: Sequence[str]
) -> str | list[str]:
    """The caller's negative prompt or prompts with the names added, as many as there are prompts."""
    added = ", ".join(names)
    if isinstance(prompt, str):
        return f"{negative_prompt}, {added}" if negative_prompt else added
    if negative_prompt is None or isinstance(negative_prompt, str):
        negative_prompt = [negative_prompt or ""] * len(prompt)
    return [f"{text}, {added}" if text else added for text in negative_prompt]


PRESETS = {
    "weak": {"warmup": 15, "scale": 200.0, "threshold": 0.0, "momentum_scale": 0.0, "momentum_beta": 0.0},
    "medium": {"warmup": 10, "scale": 1000.0, "threshold": 0.01, "momentum_scale": 0.3, "momentum_beta": 0.4},
    "strong": {"warmup": 7, "scale": 2000.0, "threshold": 0.025, "momentum_scale": 0.5, "momentum_beta": 0.7},
    "max": {"warmup": 0, "scale": 5000.0, "threshold": 1.0, "momentum_scale": 0.5, "momentum_beta": 0.7},
}


def sld(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: Targets,
    retain: Retained,
    preset: str = "medium",
    warmup: float | None = None,
    scale: float | None = None,
    threshold: float | None = None,
    momentum_scale: float | None = None,
    momentum_beta: float | None = None,
) -> AtInference:
    """Guide away from the concepts with Safe Latent Diffusion (Schramowski et al., CVPR 2023), for Stable
    Diffusion.

    Source: its guidance with warm-up and momentum; for artists the safety concept is the name, as RECE's
    comparison has it. The threshold is in units of noise: a pipeline that predicts v is converted at each
    step. `remap_to` and `retain` play no part; without classifier-free guidance the method does nothing.

    Args:
        preset (`str`, defaults to `"medium"`): `"weak"`, `"medium"`, `"strong"` or `"max"`. What follows
            overrides it one by one.
        warmup (`float`, *optional*): steps of 50 before it acts; the same share of a shorter run.
        scale, threshold, momentum_scale, momentum_beta (`float`, *optional*): s_S, λ, s_m, β_m.
    """
    check_choice("preset", preset, tuple(PRESETS))
    overrides = {
        "warmup": warmup,
        "scale": scale,
        "threshold": threshold,
        "momentum_scale": momentum_scale,
        "momentum_beta": momentum_beta,
    }
    overrides = {name: value for name, value in overrides.items() if value is not None}
    forget = name_roles(concepts, remap_to, retain).forget
    return SLDPipeline.around(pipe, forget=forget, settings={**PRESETS[preset], **overrides})


sld_weak = partial(sld, preset="weak")
sld_medium = partial(sld, preset="medium")
sld_strong = partial(sld, preset="strong")
sld_max = partial(sld, preset="max")


def safety_guidance(
    uncond: Tensor,
    text: Tensor,
    safety: Tensor,
    momentum: Tensor,
    *,
    scale: float,
    threshold: float,
    momentum_scale: float,
) -> Tensor:
    """γ, what is taken from the guidance: γ = μ ⊙ (ε_s − ε_∅) + s_m ν, with μ = min(1, s_S |ε_p − ε_s|)
    wherever ε_p − ε_s < λ, else 0.

    `uncond`, `text` and `safety` are the noise predictions ε_∅, ε_p and ε_s for the empty prompt, the prompt
    and the safety concept, `momentum` is ν; all of one shape."""
    difference = text - safety
    weight = torch.where(difference < threshold, (difference.abs() * scale).clamp(max=1), 0)
    return weight * (safety - uncond) + momentum_scale * momentum


class SLDPipeline(AtInference):
    """See `sld`: each call of the denoiser has a third branch, the safety concept, and hands back ε_p − γ in
    place of ε_p."""

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        concept, clip_skip = ", ".join(self.forget), kwargs.get("clip_skip")
        safety, _ = self.encode_prompt([concept], self._execution_device, 1, False, clip_skip=clip_skip)
        limits = {name: self.settings[name] for name in ("scale", "threshold", "momentum_scale")}
        beta = self.settings["momentum_beta"]
        calls, momentum = 0, torch.zeros(())

        def add_branch(args, kwargs):
            if not self.do_classifier_free_guidance:
                return args, kwargs
            (x, *rest), prompt = args, kwargs["encoder_hidden_states"]
            rows = len(x) // 2
            branches = torch.cat([prompt, safety.to(prompt).expand(rows, -1, -1)])
            return (torch.cat([x, x[:rows]]), *rest), {**kwargs, "encoder_hidden_states": branches}

        def guide(args, kwargs, output):
            nonlocal calls, momentum
            if not self.do_classifier_free_guidance:
                return output
            predicted, ratio = output[0], noise_per_output(self.scheduler, args[1])
            # Every term of γ is a difference of two predictions at the same x_t, which the ratio converts.
            noise = predicted.float() * ratio
            gamma = safety_guidance(*noise.chunk(3), momentum.to(noise), **limits)
            momentum = beta * momentum.to(noise) + (1 - beta) * gamma
            is_warm = self.share_of_run(calls) >= self.settings["warmup"]
            calls += 1
            uncond, text, _ = predicted.chunk(3)
            if is_warm and ratio > 0:  # at ratio 0 x_t is pure noise, and nothing is predicted of it
                text = text - (gamma / ratio).to(text)
            return (torch.cat([uncond, text]), *output[1:])

        with intercepted(self.unet, add_branch, guide):
            return super().__call__(*args, **kwargs)
