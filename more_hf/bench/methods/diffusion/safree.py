"""SAFREE: training-free and adaptive guard (Yoon et al., ICLR 2025)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ....core.errors import MoreError
from .controls import with_names
from .inference import AtInference, intercepted
from .names import Concepts, names_asked


SKIP_SCALES = (0.9, 0.2)  # s1 and s2, for the first two up blocks; b1 = b2 = 1 change nothing


def safree(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: str | Sequence[str] | None,
    retain: Sequence[str] | None,
    re_attention: bool = False,
    alpha: float = 0.01,
    midpoint: float = 5.5,
    slope: float = 3.5,
    negative: bool = True,
) -> AtInference:
    """Return a pipeline that projects the tokens that trigger a concept while it runs; `pipe` is not modified, no weight changes.

    Source: SAFREE, token projection, self-validating filter, optional latent re-attention, settings for artists. Every prompt is treated
    by itself, in batches of any size (the published code takes one prompt at a time). `remap_to` and `retain` play no part.

    Args:
        pipe, concepts: as in `erase_concept`; a `StableDiffusionPipeline`.
        re_attention (`bool`, defaults to `False`): also attenuate low frequencies of the skip features where the projected prompt has more
            of them than the original one; a third branch, half as slow again.
        alpha (`float`, defaults to 0.01): how much further than the other tokens' mean makes a token a trigger.
        midpoint (`float`, defaults to 5.5), slope (`float`, defaults to 3.5): of the filter that decides for how many of the first 10 of 50
            steps (the same share of a shorter run) the projected prompt is used.
        negative (`bool`, defaults to `True`): the concepts are the negative prompt too, as in the published code.

    Raises `PrototypeError` and `TargetNotFoundError`.
    """
    settings = {"re_attention": re_attention, "alpha": alpha, "midpoint": midpoint, "slope": slope, "negative": negative}
    return SafreePipeline.around(pipe, forgotten=names_asked(concepts, remap_to, retain).forget, settings=settings)


safree_re_attention = partial(safree, re_attention=True)


def projector(columns: Tensor) -> Tensor:
    """X (Xᵀ X)⁺ Xᵀ, `(d, d)`, for X `(d, n)`; directions below float32 rounding of Xᵀ X do not count."""
    gram = columns.T @ columns
    return columns @ torch.linalg.pinv(gram, hermitian=True, rtol=len(gram) * torch.finfo(torch.float32).eps) @ columns.T


def triggers(masked: Tensor, away: Tensor, alpha: float) -> Tensor:
    """`(n,)`, bool: token i is a trigger if, without it, the prompt is further from the concepts than without the other tokens.

    `masked` `(n, d)`: pooled features of the prompt without token i. `away` `(d, d)`: I − P_C.
    """
    distance = (masked @ away).norm(dim=1)
    others = (distance.sum() - distance) / (len(distance) - 1)  # a single token has no others, and 0 / 0 is no trigger
    return distance >= (1 + alpha) * others


def filter_steps(features: Tensor, projected: Tensor, midpoint: float, slope: float) -> int:
    """How many of 50 steps use the projected prompt: round(10 σ(2k (10 β − t0))), β one minus the mean cosine of `(tokens, d)`."""
    beta = 1 - float(torch.nn.functional.cosine_similarity(features, projected, dim=-1).mean())
    return round(10 / (1 + math.exp(-2 * slope * (10 * beta - midpoint))))


def attenuate(skip: Tensor, same: Tensor, scale: float) -> Tensor:
    """Scale the lowest frequencies of the projected branch of skip features `(…, c, h, w)` where it has no less of them than the original.

    The last n rows of the batch are the original prompts', the n before them the projected ones'. `same` `(n,)`, bool: rows in which the
    two prompts are equal, so that "no less" does not hang on rounding.
    """
    rows = len(same)
    spectrum = torch.fft.fftshift(torch.fft.fftn(skip.float(), dim=(-2, -1)), dim=(-2, -1))
    projected, original = spectrum[-2 * rows : -rows], spectrum[-rows:]
    h, w = skip.shape[-2] // 2, skip.shape[-1] // 2
    scaled = projected.clone()
    scaled[..., h - 1 : h + 1, w - 1 : w + 1] *= scale
    no_less = ((original - projected).real <= 0) | same[:, None, None, None]
    projected = torch.where(no_less, scaled, projected)
    changed = torch.fft.ifftn(torch.fft.ifftshift(projected, dim=(-2, -1)), dim=(-2, -1)).real
    return torch.cat([skip[: -2 * rows], changed.to(skip.dtype), skip[-rows:]])


class SafreePipeline(AtInference):
    """See `safree`."""

    def pooled(self, ids: Tensor) -> Tensor:
        """`(n, d)`, float64 on the CPU: the text encoder's pooled output for token ids `(n, tokens)`."""
        return self.text_encoder(ids.to(self.text_encoder.device)).pooler_output.double().cpu()

    def token_ids(self, texts: Sequence[str]) -> Tensor:
        texts = [self.maybe_convert_prompt(text, self.tokenizer) for text in texts]
        length = self.tokenizer.model_max_length
        return self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids

    def project(self, prompt: str, features: Tensor, away: Tensor) -> tuple[Tensor, int]:
        """The prompt's features `(tokens, d)` with its triggers projected, and for how many of 50 steps to use them."""
        ids = self.token_ids([prompt])[0]
        count = min(len(self.tokenizer(self.maybe_convert_prompt(prompt, self.tokenizer)).input_ids), len(ids)) - 2
        if count == 0:
            return features, 0
        masked = ids.repeat(count, 1)
        masked[torch.arange(count), torch.arange(1, count + 1)] = 0
        pooled = self.pooled(masked)
        z = features.double().cpu()
        moved = z @ (away @ projector(pooled.T)).T
        found = 1 + triggers(pooled, away, self.settings["alpha"]).nonzero()[:, 0]
        steps = filter_steps(z[: count + 2], moved[: count + 2], self.settings["midpoint"], self.settings["slope"])
        z[found] = moved[found]
        return z.to(features), steps

    @torch.no_grad()
    def encode_prompt(
        self, prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt=None, prompt_embeds=None, **kwargs
    ):
        if prompt is None:
            raise MoreError("SAFREE reads the prompt's tokens: pass `prompt`, not `prompt_embeds`.")
        if self.settings["negative"]:
            negative_prompt = with_names(prompt, negative_prompt, self.forgotten)
        embeds, negative = super().encode_prompt(
            prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt, **kwargs
        )
        concept = self.pooled(self.token_ids(self.forgotten)).T
        away = torch.eye(len(concept), dtype=concept.dtype) - projector(concept)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        rows = [self.project(text, embeds[i * num_images_per_prompt], away) for i, text in enumerate(prompts)]
        self._original = embeds
        self._steps = torch.tensor([steps for _, steps in rows]).repeat_interleave(num_images_per_prompt)
        return torch.stack([z for z, _ in rows]).repeat_interleave(num_images_per_prompt, dim=0), negative

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        calls = 0
        rows, same = 0, torch.zeros(0)
        third = self.settings["re_attention"]

        def before(args, kwargs):
            nonlocal calls, rows, same
            (x, *rest), prompt = args, kwargs["encoder_hidden_states"]
            original = self._original.to(prompt)
            rows = len(original)
            over = (self.share_of_run(calls) > self._steps).to(prompt.device)  # rows that are past their last projected step
            used = torch.where(over[:, None, None], original, prompt[-rows:])
            same = (used == original).flatten(1).all(1)
            calls += 1
            branches = [prompt[:-rows], used, *([original] if third else [])]
            x = torch.cat([x, x[-rows:]]) if third else x
            return (x, *rest), {**kwargs, "encoder_hidden_states": torch.cat(branches)}

        def after(args, kwargs, output):
            return (output[0][:-rows], *output[1:]) if third else output

        def skips(scale):
            def hook(_, args, kwargs):
                changed = tuple(attenuate(skip, same, scale) for skip in kwargs["res_hidden_states_tuple"])
                return args, {**kwargs, "res_hidden_states_tuple": changed}

            return hook

        with intercepted(self.unet, before, after), ExitStack() as stack:
            for block, scale in zip(self.unet.up_blocks if third else (), SKIP_SCALES, strict=False):
                stack.callback(block.register_forward_pre_hook(skips(scale), with_kwargs=True).remove)
            return super().__call__(*args, **kwargs)
