"""SAFREE: training-free and adaptive guard (Yoon et al., ICLR 2025)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from more_hf.core.errors import MoreError

from .inference import with_names
from .pipelines import AtInference, intercepted
from .texts import Concepts, Retained, Targets, name_roles


SKIP_SCALES = (0.9, 0.2)  # s1 and s2, for the first two up blocks; b1 = b2 = 1 change nothing
MASK_ID = 0  # the token id that takes the place of a masked token


def safree(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: Targets,
    retain: Retained,
    re_attention: bool = False,
    alpha: float = 0.01,
    midpoint: float = 5.5,
    slope: float = 3.5,
    negative: bool = True,
) -> AtInference:
    """Project the tokens that trigger a concept with SAFREE (Yoon et al., ICLR 2025), for Stable Diffusion.

    Source: token projection, self-validating filter, optional latent re-attention, settings for artists.
    Every prompt is treated by itself, in batches of any size (the published code takes one prompt at a time).
    `remap_to` and `retain` play no part.

    Args:
        re_attention (`bool`, defaults to `False`): also attenuate low frequencies of the skip features where
            the projected prompt has more of them than the original one; a third branch, half as slow again.
        alpha (`float`, defaults to 0.01): how much further than the other tokens' mean makes a token a
            trigger.
        midpoint (`float`, defaults to 5.5), slope (`float`, defaults to 3.5): of the filter that decides for
            how many of the first 10 of 50 steps (the same share of a shorter run) the projected prompt is
            used.
        negative (`bool`, defaults to `True`): the concepts are the negative prompt too, as in the published
            code.
    """
    settings = {
        "re_attention": re_attention,
        "alpha": alpha,
        "midpoint": midpoint,
        "slope": slope,
        "negative": negative,
    }
    forget = name_roles(concepts, remap_to, retain).forget
    return SafreePipeline.around(pipe, forget=forget, settings=settings)


safree_re_attention = partial(safree, re_attention=True)


def projector(columns: Tensor) -> Tensor:
    """X (Xᵀ X)⁺ Xᵀ, `(d, d)`, for X `(d, n)`; directions below float32 rounding of Xᵀ X do not count."""
    gram = columns.T @ columns
    rtol = len(gram) * torch.finfo(torch.float32).eps
    return columns @ torch.linalg.pinv(gram, hermitian=True, rtol=rtol) @ columns.T


def triggers(masked: Tensor, away: Tensor, alpha: float) -> Tensor:
    """Which tokens are triggers, `(n,)` bool: without such a token the prompt is further from the concepts
    than without the other tokens.

    `masked` `(n, d)` are pooled features of the prompt without token i, `away` `(d, d)` is I − P_C.
    """
    distance = (masked @ away).norm(dim=1)
    others = (distance.sum() - distance) / (len(distance) - 1)  # of a single token 0 / 0, which is no trigger
    return distance >= (1 + alpha) * others


def filter_steps(features: Tensor, projected: Tensor, midpoint: float, slope: float) -> int:
    """How many of 50 steps use the projected prompt: round(10 σ(2k (10 β − t0))), with β one minus the mean
    cosine of features `(tokens, d)` before and after."""
    beta = 1 - float(torch.nn.functional.cosine_similarity(features, projected, dim=-1).mean())
    return round(10 / (1 + math.exp(-2 * slope * (10 * beta - midpoint))))


def attenuate(skip: Tensor, same: Tensor, scale: float) -> Tensor:
    """Scale the lowest frequencies of the projected branch of skip features `(…, c, h, w)` where it has no
    less of them than the original.

    The last n rows of the batch are the original prompts', the n before them the projected ones'. `same`
    `(n,)` bool are the rows in which the two prompts are equal, so that "no less" does not hang on rounding.
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
        """The text encoder's pooled output for token ids `(n, tokens)`: `(n, d)`, float64 on the CPU."""
        return self.text_encoder(ids.to(self.text_encoder.device)).pooler_output.double().cpu()

    def token_ids(self, texts: Sequence[str]) -> Tensor:
        """Padded token ids, `(n, tokens)`."""
        texts = [self.maybe_convert_prompt(text, self.tokenizer) for text in texts]
        length = self.tokenizer.model_max_length
        return self.tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids

    def project(self, prompt: str, features: Tensor, away: Tensor) -> tuple[Tensor, int]:
        """The prompt's features `(tokens, d)` with its triggers projected, and for how many of 50 steps to
        use them."""
        ids = self.token_ids([prompt])[0]
        unpadded = self.tokenizer(self.maybe_convert_prompt(prompt, self.tokenizer)).input_ids
        count = min(len(unpadded), len(ids)) - 2  # without begin and end
        if count == 0:
            return features, 0
        # The prompt without each of its tokens in turn spans the prompt's own subspace.
        masked = ids.repeat(count, 1)
        masked[torch.arange(count), torch.arange(1, count + 1)] = MASK_ID
        pooled = self.pooled(masked)
        # A trigger goes to the part of that subspace that is orthogonal to the concepts.
        z = features.double().cpu()
        projected = z @ (away @ projector(pooled.T)).T
        at = 1 + triggers(pooled, away, self.settings["alpha"]).nonzero()[:, 0]
        midpoint, slope = self.settings["midpoint"], self.settings["slope"]
        steps = filter_steps(z[: count + 2], projected[: count + 2], midpoint, slope)
        z[at] = projected[at]
        return z.to(features), steps

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt,
        device,
        num_images_per_prompt,
        do_classifier_free_guidance,
        negative_prompt=None,
        prompt_embeds=None,
        **kwargs,
    ):
        if prompt is None:
            raise MoreError("SAFREE reads the prompt's tokens: pass `prompt`, not `prompt_embeds`.")
        if self.settings["negative"]:
            negative_prompt = with_names(prompt, negative_prompt, self.forget)
        embeds, negative = super().encode_prompt(
            prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt, **kwargs
        )
        concept = self.pooled(self.token_ids(self.forget)).T
        away = torch.eye(len(concept), dtype=concept.dtype) - projector(concept)
        features, steps = [], []
        for i, text in enumerate([prompt] if isinstance(prompt, str) else prompt):
            projected, count = self.project(text, embeds[i * num_images_per_prompt], away)
            features.append(projected)
            steps.append(count)
        self.original_features = embeds
        self.projected_steps = torch.tensor(steps).repeat_interleave(num_images_per_prompt)
        return torch.stack(features).repeat_interleave(num_images_per_prompt, dim=0), negative

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        calls, rows, same = 0, 0, torch.zeros(0)
        third_branch = self.settings["re_attention"]

        def choose_prompt(args, kwargs):
            nonlocal calls, rows, same
            (x, *rest), prompt = args, kwargs["encoder_hidden_states"]
            original = self.original_features.to(prompt)
            rows = len(original)
            # rows that are past their last projected step
            past = (self.share_of_run(calls) > self.projected_steps).to(prompt.device)
            used = torch.where(past[:, None, None], original, prompt[-rows:])
            same = (used == original).flatten(1).all(1)
            calls += 1
            branches = [prompt[:-rows], used]
            if third_branch:
                branches.append(original)
                x = torch.cat([x, x[-rows:]])
            return (x, *rest), {**kwargs, "encoder_hidden_states": torch.cat(branches)}

        def drop_branch(args, kwargs, output):
            return (output[0][:-rows], *output[1:]) if third_branch else output

        def attenuate_skips(scale: float) -> Callable:
            def hook(_, args, kwargs):
                skips = kwargs["res_hidden_states_tuple"]
                attenuated = tuple(attenuate(skip, same, scale) for skip in skips)
                return args, {**kwargs, "res_hidden_states_tuple": attenuated}

            return hook

        blocks = self.unet.up_blocks if third_branch else ()
        with intercepted(self.unet, choose_prompt, drop_branch), ExitStack() as stack:
            for block, scale in zip(blocks, SKIP_SCALES, strict=False):
                handle = block.register_forward_pre_hook(attenuate_skips(scale), with_kwargs=True)
                stack.callback(handle.remove)
            return super().__call__(*args, **kwargs)
