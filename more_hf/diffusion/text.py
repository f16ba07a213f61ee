"""How a pipeline turns prompts into what its denoiser reads: the text spaces, and which tokenizer lays out which positions.

A space is a kind of feature: `"tokens"` `(batch, tokens, d)` everywhere, and in some models also `"pooled"` `(batch, d')`, one feature
for the whole prompt. A kind of text encoding is one entry in `TEXTS`; anything else is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor

from ..core.errors import SiteNotFoundError


@dataclass(frozen=True)
class Segment:
    """Positions of the token features that one tokenizer lays out: special tokens in front, the prompt, the end token, padding.

    Attributes:
        tokenizer (`str`): the pipeline's component.
        clip (`bool`): CLIP (a begin token in front; causal, so that equal starts have equal features) or T5 (neither).
        padding (`bool`): whether the denoiser reads the padding, or a mask hides it.
        label (`str`): in front of the names of its prototypes, where there are several segments.
    """

    tokenizer: str = "tokenizer"
    clip: bool = True
    padding: bool = True
    label: str = ""

    @property
    def before(self) -> int:
        """How many special tokens are in front of the prompt."""
        return int(self.clip)

    def length(self, pipe: DiffusionPipeline) -> int:
        if self.clip:
            return getattr(pipe, self.tokenizer).model_max_length
        return inspect.signature(pipe.encode_prompt).parameters["max_sequence_length"].default


@dataclass(frozen=True)
class Text:
    """One way to encode prompts.

    Attributes:
        encode (`Callable`): `(pipe, prompts)` -> `{space: features}`, by the pipeline's own `encode_prompt`, so that its hidden layers,
            padding and learned tokens are right.
        segments (`tuple[Segment, ...]`): in the order of the token features' positions.
        arguments (`tuple[str, ...]`): what `encode_prompt` must take.
        pooled (`bool`): whether there is a pooled feature.
        lower (`bool`): whether the pipeline puts prompts into lower case.
        leaks (`tuple[str, ...]`): what a call can do that no prototype covers.
    """

    encode: Callable[[DiffusionPipeline, list[str]], dict[str, Tensor]]
    segments: tuple[Segment, ...]
    arguments: tuple[str, ...]
    pooled: bool = True
    lower: bool = False
    leaks: tuple[str, ...] = ()


def _encode_sd(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
    embeds, _ = pipe.encode_prompt(prompts, pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    return {"tokens": embeds}


def _encode_sdxl(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, device=pipe._execution_device, do_classifier_free_guidance=False)
    return {"tokens": embeds, "pooled": pooled}


def _encode_sd3(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None, device=pipe._execution_device, do_classifier_free_guidance=False)
    return {"tokens": embeds, "pooled": pooled}


def _encode_flux(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
    embeds, pooled, _ = pipe.encode_prompt(prompts, device=pipe._execution_device)
    return {"tokens": embeds, "pooled": pooled}


def _encode_pixart(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
    embeds, *_ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, device=pipe._execution_device)
    return {"tokens": embeds}


CLIP_SKIP = "a call with `clip_skip` reads another layer of the text encoder, on which nothing was fitted"
PROMPT_2 = "a call with another `prompt_2` joins features of two prompts, on which nothing was fitted"
LENGTH = "a call with another `max_sequence_length` has other padding, on which nothing was fitted"
CASE = "T5 tells upper from lower case: the name in another case moves only as far as its features are like the fitted ones"

# classes of the text encoders, in order -> how they are used
TEXTS = {
    ("CLIPTextModel",): Text(
        encode=_encode_sd,
        segments=(Segment(),),
        arguments=("prompt", "device", "num_images_per_prompt", "do_classifier_free_guidance"),
        pooled=False,
        leaks=(CLIP_SKIP,),
    ),
    ("CLIPTextModel", "CLIPTextModelWithProjection"): Text(
        encode=_encode_sdxl,
        segments=(Segment(),),  # the two encoders' features of one position are one feature
        arguments=("prompt", "prompt_2", "device", "do_classifier_free_guidance"),
        leaks=(CLIP_SKIP, PROMPT_2),
    ),
    ("CLIPTextModelWithProjection", "CLIPTextModelWithProjection", "T5EncoderModel"): Text(
        encode=_encode_sd3,
        segments=(Segment(), Segment("tokenizer_3", clip=False, label="T5 ")),
        arguments=("prompt", "prompt_2", "prompt_3", "device", "do_classifier_free_guidance", "max_sequence_length"),
        leaks=(CLIP_SKIP, PROMPT_2, LENGTH, CASE),
    ),
    ("CLIPTextModel", "T5EncoderModel"): Text(
        encode=_encode_flux,
        segments=(Segment("tokenizer_2", clip=False),),
        arguments=("prompt", "prompt_2", "device", "max_sequence_length"),
        leaks=(LENGTH, CASE),
    ),
    ("T5EncoderModel",): Text(
        encode=_encode_pixart,
        segments=(Segment(clip=False, padding=False),),
        arguments=("prompt", "do_classifier_free_guidance", "device", "max_sequence_length"),
        pooled=False,
        lower=True,
    ),
}


def text_of(pipe: DiffusionPipeline) -> Text:
    """How the pipeline encodes prompts. Raises `SiteNotFoundError` if an encoder is missing or the way is not known."""
    encoders = {name: part for name, part in pipe.components.items() if name.startswith("text_encoder")}
    if missing := [name for name, part in encoders.items() if part is None]:
        raise SiteNotFoundError(
            f"{type(pipe).__name__} was loaded without its text encoder `{missing[0]}`, which prototypes are made with: what it says to "
            "the model would stay. Load the pipeline with all of its text encoders."
        )
    classes = tuple(type(unwrap_module(encoders[name])).__name__ for name in sorted(encoders))
    if classes not in TEXTS:
        known = "; ".join(" + ".join(names) for names in TEXTS)
        raise SiteNotFoundError(
            f"{type(pipe).__name__} reads prompts with {' + '.join(classes) or 'no text encoder'}. Supported are {known}."
        )
    text = TEXTS[classes]
    takes = inspect.signature(pipe.encode_prompt).parameters if hasattr(pipe, "encode_prompt") else {}
    if lacking := [argument for argument in text.arguments if argument not in takes]:
        raise SiteNotFoundError(
            f"{type(pipe).__name__} encodes prompts in a way of its own (its `encode_prompt` takes no `{lacking[0]}`), so that it is not "
            "known what its denoiser reads. Erase from the model's text-to-image pipeline, and pass its components on."
        )
    return text
