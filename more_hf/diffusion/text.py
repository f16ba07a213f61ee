"""How a pipeline turns prompts into what its denoiser reads: text spaces, and the tokenizers that lay out
positions.

A space is a kind of feature: `"tokens"` `(batch, tokens, d)` everywhere, and in some models also `"pooled"`
`(batch, d')`, one feature for the whole prompt. A kind of text encoding is one entry in `TEXTS`; anything
else is refused by name.
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
    """
    The token positions that one tokenizer lays out: special tokens, the prompt, the end token, padding.

    Args:
        tokenizer (`str`, *optional*, defaults to `"tokenizer"`):
            The pipeline's component.
        clip (`bool`, *optional*, defaults to `True`):
            CLIP (a begin token in front; causal, so that equal starts have equal features) or T5 (neither).
        padding (`bool`, *optional*, defaults to `True`):
            Whether the denoiser reads the padding, or a mask hides it.
        label (`str`, *optional*):
            In front of the names of its prototypes, where there are several segments.
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
        """How many positions it lays out."""
        if self.clip:
            return getattr(pipe, self.tokenizer).model_max_length
        return inspect.signature(pipe.encode_prompt).parameters["max_sequence_length"].default


@dataclass(frozen=True)
class Text:
    """
    One way to encode prompts.

    Args:
        encode (`Callable`):
            `(pipe, prompts) -> {space: features}`, by the pipeline's own `encode_prompt`, so that its hidden
            layers, padding and learned tokens are right.
        segments (`tuple[Segment, ...]`):
            In the order of the token features' positions.
        arguments (`tuple[str, ...]`):
            What `encode_prompt` must take.
        pooled (`bool`, *optional*, defaults to `True`):
            Whether there is a pooled feature.
        lower (`bool`, *optional*, defaults to `False`):
            Whether the pipeline puts prompts into lower case.
        leaks (`tuple[str, ...]`, *optional*):
            What a call can do that no prototype covers.
    """

    encode: Callable[[DiffusionPipeline, list[str]], dict[str, Tensor]]
    segments: tuple[Segment, ...]
    arguments: tuple[str, ...]
    pooled: bool = True
    lower: bool = False
    leaks: tuple[str, ...] = ()


def _encode_sd(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
    device = pipe._execution_device
    embeds, _ = pipe.encode_prompt(
        prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return {"tokens": embeds}


def _encode_sdxl(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
    device = pipe._execution_device
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
    return {"tokens": embeds, "pooled": pooled}


def _encode_sd3(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
    device = pipe._execution_device
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompts, prompt_2=None, prompt_3=None, device=device, do_classifier_free_guidance=False
    )
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
CASE = (
    "T5 tells upper from lower case: "
    "the name in another case moves only as far as its features are like the fitted ones"
)

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
        arguments=(
            "prompt",
            "prompt_2",
            "prompt_3",
            "device",
            "do_classifier_free_guidance",
            "max_sequence_length",
        ),
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


# the denoiser's class -> how its pipeline uses text encoders that another family uses differently
TEXTS_BY_DENOISER: dict[str, Text] = {}


def text_of(pipe: DiffusionPipeline) -> Text:
    """
    How the pipeline encodes prompts.

    Raises:
        `SiteNotFoundError`: a text encoder is missing, or the way to encode prompts is not known.
    """
    encoders = {name: part for name, part in pipe.components.items() if name.startswith("text_encoder")}
    if missing := [name for name, part in encoders.items() if part is None]:
        raise SiteNotFoundError(
            f"{type(pipe).__name__} was loaded without its text encoder `{missing[0]}`, which prototypes are "
            "made with. What it says to the model would stay. Load the pipeline with all of its text "
            "encoders."
        )
    classes = tuple(type(unwrap_module(encoders[name])).__name__ for name in sorted(encoders))
    others = [type(unwrap_module(part)).__name__ for part in pipe.components.values()]
    own = [TEXTS_BY_DENOISER[name] for name in others if name in TEXTS_BY_DENOISER]
    if not own and classes not in TEXTS:
        known = "; ".join(" + ".join(names) for names in TEXTS)
        raise SiteNotFoundError(
            f"{type(pipe).__name__} reads prompts with {' + '.join(classes) or 'no text encoder'}, which is "
            f"not supported yet. Supported are {known}. To add it, describe how its prompts are encoded in "
            "a call of `more_hf.register_family`."
        )
    text = own[0] if own else TEXTS[classes]
    parameters = inspect.signature(pipe.encode_prompt).parameters if hasattr(pipe, "encode_prompt") else {}
    if missing := [argument for argument in text.arguments if argument not in parameters]:
        raise SiteNotFoundError(
            f"{type(pipe).__name__} encodes prompts in its own way (its `encode_prompt` takes no "
            f"`{missing[0]}`), so what its denoiser reads is not known. Erase from the model's text-to-image "
            "pipeline, and pass its components on."
        )
    return text
