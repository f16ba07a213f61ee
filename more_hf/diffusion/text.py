"""How a pipeline turns prompts into what its denoiser reads: text spaces, and the tokenizers that lay out
positions.

A space is a kind of feature: `"tokens"` `(batch, tokens, d)` everywhere, and in some models also `"pooled"`
`(batch, d')`, one feature for the whole prompt. Where a model reads several layers of a language model, each
by layers of its own, the tokens of each are a space of their own: `layer_space`. A family of denoisers names
its kind of text encoding, one of the constants below; any other is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..core.errors import SiteNotFoundError


def tokenizer_in(part: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """A pipeline's tokenizer, or the one in its processor."""
    return part.tokenizer if isinstance(part, ProcessorMixin) else part


def layer_space(layer: int) -> str:
    """The space of the tokens after one layer of a language model, counted from 0."""
    return f"tokens of layer {layer}"


class Template(NamedTuple):
    """The text that a pipeline puts around a prompt, and what it does to the tokens of both."""

    before: str = ""
    after: str = ""
    dropped: int = 0  # how many tokens it drops again, in front or after the `kept` first
    kept: int = 0
    lower: bool = False  # whether the prompt is put into lower case
    multiple: int = 1  # of which the number of tokens is, by padding in front that is read like them


class Token(NamedTuple):
    """A token, and the prompt's characters that it is made of: below 0 in front, from its length behind."""

    id: int
    start: int
    stop: int


class Layout(NamedTuple):
    """Where the parts of a prompt begin among its segment's positions."""

    start: int  # the prompt's own tokens
    end: int  # the end token, or the template's tokens after the prompt
    stop: int  # the padding


@dataclass(frozen=True)
class Segment:
    """The token positions that one tokenizer lays out: special tokens, the prompt, the end token, padding."""

    tokenizer: str = "tokenizer"  # the pipeline's component
    # CLIP (a begin token in front; causal, so that equal starts have equal features) or T5 (neither)
    clip: bool = True
    padding: bool = True  # whether the denoiser reads the padding, or a mask hides it
    label: str = ""  # in front of the names of its prototypes, where there are several segments
    # `pipe -> Template`, for a causal language model: its tokens that are not dropped stand where CLIP has
    # its begin and end token
    template: Callable[[DiffusionPipeline], Template] | None = None
    # how many special tokens are in front of the prompt, where there is no template: by default CLIP's
    # one, and none of T5
    begins: int | None = None
    ends: int = 1  # how many tokens follow the prompt; with a template, `fitted` counts them
    # whether padding that is read is in front of everything, where a causal model has seen nothing of
    # the prompt; with a template, `fitted` asks the tokenizer
    left: bool = False
    attends: bool = False  # whether such padding attends to the whole prompt all the same, as ChatGLM's does
    # the spaces that have these positions; `fitted` fills in those of `layers`
    spaces: tuple[str, ...] = ("tokens",)
    layers: bool = False  # whether each layer of the language model that the denoiser reads is a space

    @property
    def before(self) -> int:
        """How many special tokens are in front of the prompt, where there is no template."""
        return int(self.clip) if self.begins is None else self.begins

    @property
    def causal(self) -> bool:
        """Whether a token's feature does not depend on what follows it; only T5's does."""
        return self.before > 0 or self.template is not None

    @property
    def padding_varies(self) -> bool:
        """Whether the denoiser reads padding, and it is not the same for all prompts of a length."""
        return self.padding and (self.attends or not self.left)

    def length(self, pipe: DiffusionPipeline) -> int:
        """How many positions it lays out, at most if there is a template."""
        if self.clip:
            return getattr(pipe, self.tokenizer).model_max_length
        limit = inspect.signature(pipe.encode_prompt).parameters.get("max_sequence_length")
        return pipe.tokenizer_max_length if limit is None else limit.default

    def read_until(self, layout: Layout, length: int) -> int:
        """Where the positions that the denoiser reads end, of so many."""
        return length if self.padding and not self.left else min(layout.stop, length)

    def pads_before(self, layout: Layout, length: int) -> int:
        """How many positions of padding, of so many positions, are in front of the prompt."""
        return max(length - layout.stop, 0) if self.left else 0

    def padding_at(self, layout: Layout, length: int) -> tuple[int, int]:
        """The positions `[start, stop)` of the padding that is read, counted as those of the layout are."""
        if self.left:
            return -self.pads_before(layout, length), 0
        return layout.stop, self.read_until(layout, length)

    def fitted(self, pipe: DiffusionPipeline, read: Iterable[str]) -> Segment:
        """
        The same, knowing where padding is, how many tokens the template has after the prompt, and which
        layers are among the spaces that are `read`.
        """
        if self.template is None:
            return self
        layout = self.layout(self.tokens(pipe, ""), 0)
        left = self.padding and self.tokenizer_of(pipe).padding_side == "left"
        spaces = tuple(space for space in read if space != "tokens") if self.layers else self.spaces
        return replace(self, ends=layout.stop - layout.end, left=left, spaces=spaces)

    def tokenizer_of(self, pipe: DiffusionPipeline) -> PreTrainedTokenizerBase:
        """The tokenizer, which may be part of a processor."""
        return tokenizer_in(getattr(pipe, self.tokenizer))

    def tokens(self, pipe: DiffusionPipeline, prompt: str) -> list[Token]:
        """The tokens of the prompt in its template that are read, up to padding behind it."""
        template, tokenizer = self.template(pipe), self.tokenizer_of(pipe)
        text = template.before + (prompt.lower() if template.lower else prompt) + template.after
        begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)  # by the template
        found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not begun)
        # offsets count from the prompt's first character
        shift = len(template.before)
        tokens = []
        for token, (start, stop) in zip(found.input_ids, found.offset_mapping, strict=True):
            made_of = (start - shift, stop - shift) if start < stop else (-1, -1)  # nothing: a begin token
            tokens.append(Token(token, *made_of))
        # CogView4 pads in front to a multiple, and reads that padding like tokens
        padding = [Token(tokenizer.pad_token_id, -1, -1)] * (-len(tokens) % template.multiple)
        return padding + tokens[: template.kept] + tokens[template.kept + template.dropped :]

    def kinds(self, kind: str) -> list[str]:
        """What a kind of prototype is here: none of what is not there, and one for each token at the end."""
        if kind == "padding":
            return ["padding"] if self.padding_varies else []
        if kind == "end+padding" and not self.ends:
            return self.kinds("padding")
        if kind == "end":
            return [f"end {i}" if i > 1 else "end" for i in range(1, self.ends + 1)]
        return [kind]

    def layout(self, tokens: Sequence[Token], length: int) -> Layout:
        """Where a prompt of so many characters is in its template."""
        start = sum(token.stop <= 0 for token in tokens)
        return Layout(start, sum(token.start < length for token in tokens), len(tokens))


@dataclass(frozen=True)
class Text:
    """
    One way to encode prompts.

    Args:
        encode (`Callable`):
            `(pipe, prompts) -> {space: features}`, by the pipeline's own `encode_prompt`, so that its hidden
            layers, padding and learned tokens are right.
        segments (`tuple[Segment, ...]`):
            In the order of the token features' positions; the first is in `"tokens"`.
        arguments (`tuple[str, ...]`):
            What `encode_prompt` must take.
        encoders (`tuple[str, ...]`, *optional*):
            The classes of the text encoders that it is for, in order; any by default.
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
    encoders: tuple[str, ...] = ()
    pooled: bool = True
    lower: bool = False
    leaks: tuple[str, ...] = ()

    def fitted(self, pipe: DiffusionPipeline, read: Iterable[str]) -> Text:
        """The same, with the pipeline's templates counted, for a denoiser that reads these spaces."""
        return replace(self, segments=tuple(segment.fitted(pipe, read) for segment in self.segments))


def _encode(
    pooled: int | None = None, **options: Any
) -> Callable[[DiffusionPipeline, list[str]], dict[str, Tensor]]:
    """Call `encode_prompt` with these options: tokens come first, and a pooled feature is at `pooled`."""

    def encode(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
        results = pipe.encode_prompt(prompts, device=pipe._execution_device, **options)
        features = {"tokens": results[0]}
        return features if pooled is None else {**features, "pooled": results[pooled]}

    return encode


def _encode_z_image(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
    # `encode_prompt` writes the templated prompts into the list that it is given: here, one of ours
    embeds, _ = pipe.encode_prompt(prompts, device=pipe._execution_device, **UNGUIDED)
    return {"tokens": pad_sequence(embeds, batch_first=True)}


def _encode_one_by_one(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
    """For a pipeline that pads in front and masks nothing, so that features depend on the longest prompt."""
    encode = _encode(**UNGUIDED)
    found = [encode(pipe, [prompt])["tokens"][0] for prompt in prompts]
    return {"tokens": pad_sequence(found, batch_first=True)}


def _encode_sana(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
    options = {"device": pipe._execution_device, "complex_human_instruction": _instruction(pipe)}
    if "do_classifier_free_guidance" in inspect.signature(pipe.encode_prompt).parameters:  # not in Sprint
        options |= UNGUIDED
    embeds, *_ = pipe.encode_prompt(prompts, **options)
    return {"tokens": embeds}


def _instruction(pipe: DiffusionPipeline) -> list[str]:
    """The lines that Sana's call puts in front of a prompt by default."""
    return inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default


def _encode_hunyuan_image(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
    embeds, *_ = pipe.encode_prompt(prompts, device=pipe._execution_device, batch_size=len(prompts))
    return {"tokens": embeds}


def _encode_hidream(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
    found = pipe.encode_prompt(prompts, device=pipe._execution_device, **UNGUIDED)
    t5, _, llama, _, pooled, _ = found  # each followed by that of the negative prompt
    layers = {layer_space(i): embeds for i, embeds in enumerate(llama)}
    return {"tokens": t5, **layers, "pooled": pooled}


def _own_template(pipe: DiffusionPipeline) -> Template:
    """The template that the pipeline keeps as an attribute."""
    template = pipe.prompt_template if hasattr(pipe, "prompt_template") else pipe.prompt_template_encode
    if "image" in inspect.signature(pipe.encode_prompt).parameters:
        behind = "<|image_pad|>" in template.partition("{}")[2]
        why = (
            "behind the prompt, whose tokens then hold the name as well"
            if behind
            else "before the prompt, whose tokens go through the edited layer as well, where an edit that is "
            "fitted on names moves them, too"
        )
        raise SiteNotFoundError(
            f"The text encoder of {type(pipe).__name__} sees a picture {why}. Erase from the model's "
            "text-to-image pipeline."
        )
    return Template(*template.split("{}"), pipe.prompt_template_encode_start_idx)


def _chat(**options: bool) -> Callable[[DiffusionPipeline], Template]:
    """A chat with one message, the prompt, as the tokenizer's own template writes it."""

    def template(pipe: DiffusionPipeline) -> Template:
        chat = [{"role": "user", "content": PROMPT}]
        text = pipe.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **options)
        return Template(*text.split(PROMPT))

    return template


def _z_image_template(pipe: DiffusionPipeline) -> Template:
    if "num_condition_images" in inspect.signature(pipe.encode_prompt).parameters:
        raise SiteNotFoundError(
            f"{type(pipe).__name__} puts pictures between the tokens of the prompt, which is not supported "
            "yet. Erase from the model's text-to-image pipeline."
        )
    return _chat(enable_thinking=True)(pipe)


def _flux_2_template(pipe: DiffusionPipeline) -> Template:
    """Of [dev], which has a system message, or [klein]."""
    if not hasattr(pipe, "system_message"):
        return _chat(enable_thinking=False)(pipe)
    # the message is part of every call's prompt, so it is part of the template
    said = {"system": pipe.system_message, "user": PROMPT}
    chat = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said.items()]
    return Template(*pipe.tokenizer.apply_chat_template(chat, add_generation_prompt=False).split(PROMPT))


def _sana_template(pipe: DiffusionPipeline) -> Template:
    """Of the instruction only its first and last token are read."""
    before = "\n".join(_instruction(pipe))
    return Template(before, dropped=len(pipe.tokenizer(before).input_ids) - 2, kept=1, lower=True)


def _lumina_template(pipe: DiffusionPipeline) -> Template:
    return Template(f"{pipe.system_prompt} <Prompt Start> ")


UNGUIDED = {"do_classifier_free_guidance": False}  # the negative prompt is no concern of an edit
BASIC = ("prompt", "device")  # what every `encode_prompt` takes
PROMPT = "\ue000"  # stands for the prompt in a template; a character that no text has
GLYPHS = (
    "where there is a second text encoder, it reads letter by letter what a prompt has in quotation marks, "
    "which stays as it is"
)
OTHER_LAYERS = (
    "a call with other `text_encoder_out_layers` reads other layers of the text encoder, "
    "on which nothing was fitted"
)
CLIP_SKIP = "a call with `clip_skip` reads another layer of the text encoder, on which nothing was fitted"
PROMPT_2 = "a call with another `prompt_2` joins features of two prompts, on which nothing was fitted"
LENGTH = "a call with another `max_sequence_length` has other padding, on which nothing was fitted"
UNEQUAL = (
    "prompts of unequal length in one call are padded to one length without a mask, "
    "on which nothing was fitted"
)
INSTRUCTION = (
    "a call with another `complex_human_instruction`, and a negative prompt, which has none, give features "
    "on which nothing was fitted"
)
SYSTEM = "a call with another `system_prompt` gives features on which nothing was fitted"
CASE = "the text encoder is case-sensitive: the name in a different case is erased only partly"

# the encodings that depend on the text encoders alone
STABLE_DIFFUSION = Text(
    encode=_encode(num_images_per_prompt=1, **UNGUIDED),
    segments=(Segment(),),
    arguments=(*BASIC, *UNGUIDED, "num_images_per_prompt"),
    encoders=("CLIPTextModel",),
    pooled=False,
    leaks=(CLIP_SKIP,),
)
SDXL = Text(
    encode=_encode(pooled=2, **UNGUIDED),
    segments=(Segment(),),  # the two encoders' features of one position are one feature
    arguments=(*BASIC, *UNGUIDED, "prompt_2"),
    encoders=("CLIPTextModel", "CLIPTextModelWithProjection"),
    leaks=(CLIP_SKIP, PROMPT_2),
)
SD3 = Text(
    encode=_encode(pooled=2, prompt_2=None, prompt_3=None, **UNGUIDED),
    segments=(Segment(), Segment("tokenizer_3", clip=False, label="T5 ")),
    arguments=(*BASIC, *UNGUIDED, "prompt_2", "prompt_3", "max_sequence_length"),
    encoders=("CLIPTextModelWithProjection", "CLIPTextModelWithProjection", "T5EncoderModel"),
    leaks=(CLIP_SKIP, PROMPT_2, LENGTH, CASE),
)
FLUX = Text(
    encode=_encode(pooled=1),
    segments=(Segment("tokenizer_2", clip=False),),
    arguments=(*BASIC, "prompt_2", "max_sequence_length"),
    encoders=("CLIPTextModel", "T5EncoderModel"),
    leaks=(LENGTH, CASE),
)
PIXART = Text(
    encode=_encode(**UNGUIDED),
    segments=(Segment(clip=False, padding=False),),
    arguments=(*BASIC, *UNGUIDED, "max_sequence_length"),
    encoders=("T5EncoderModel",),
    pooled=False,
    lower=True,
)

# the encodings of families whose text encoders others use differently
Z_IMAGE = Text(
    encode=_encode_z_image,
    segments=(Segment(clip=False, padding=False, template=_z_image_template),),
    arguments=(*BASIC, *UNGUIDED, "max_sequence_length"),
    pooled=False,
    leaks=(CASE,),
)
QWEN_IMAGE = Text(
    encode=_encode(),
    segments=(Segment(clip=False, padding=False, template=_own_template),),
    arguments=BASIC,
    pooled=False,
    leaks=(CASE,),
)
FLUX_2 = Text(
    encode=_encode(),
    segments=(Segment(clip=False, template=_flux_2_template),),
    arguments=(*BASIC, "max_sequence_length", "text_encoder_out_layers"),
    pooled=False,
    leaks=(OTHER_LAYERS, LENGTH, CASE),
)
ZEROS = Text(  # of Wan and AuraFlow
    encode=_encode(**UNGUIDED),
    # behind the prompt are zeros, which no edit moves
    segments=(Segment(clip=False, padding=False),),
    arguments=(*BASIC, *UNGUIDED, "max_sequence_length"),
    pooled=False,
    leaks=(CASE,),
)
CHROMA = Text(
    encode=_encode(**UNGUIDED),
    # its mask is of floats, which attention adds: the padding is read, only with less weight
    segments=(Segment(clip=False),),
    arguments=(*BASIC, *UNGUIDED, "max_sequence_length"),
    pooled=False,
    leaks=(LENGTH, CASE),
)
HUNYUAN_IMAGE = Text(
    encode=_encode_hunyuan_image,
    segments=(Segment(clip=False, padding=False, template=_own_template),),
    arguments=(*BASIC, "batch_size"),
    pooled=False,
    leaks=(GLYPHS, CASE),
)
SANA = Text(
    encode=_encode_sana,
    segments=(Segment(clip=False, padding=False, template=_sana_template),),
    arguments=(*BASIC, "complex_human_instruction"),
    pooled=False,
    lower=True,
    leaks=(INSTRUCTION,),
)
LUMINA_2 = Text(
    encode=_encode(**UNGUIDED),
    segments=(Segment(clip=False, padding=False, template=_lumina_template),),
    arguments=(*BASIC, *UNGUIDED, "system_prompt"),
    pooled=False,
    leaks=(SYSTEM, CASE),
)
COGVIEW_4 = Text(
    encode=_encode_one_by_one,
    segments=(Segment(clip=False, padding=False, template=lambda pipe: Template(multiple=16)),),
    arguments=(*BASIC, *UNGUIDED),
    pooled=False,
    leaks=(UNEQUAL, CASE),
)
KANDINSKY_5 = Text(
    encode=_encode(pooled=1),
    segments=(Segment(clip=False, padding=False, template=_own_template),),
    arguments=BASIC,
    leaks=(UNEQUAL, CASE),
)
KOLORS = Text(
    encode=_encode(pooled=2, **UNGUIDED),
    segments=(Segment(clip=False, begins=2, ends=0, left=True, attends=True),),
    arguments=(*BASIC, *UNGUIDED, "max_sequence_length"),
    leaks=(LENGTH, CASE),
)
HIDREAM = Text(
    encode=_encode_hidream,
    # each encoder masks its padding, but the denoiser reads it
    segments=(
        Segment("tokenizer_3", clip=False),
        Segment("tokenizer_4", clip=False, template=lambda pipe: Template(), layers=True),
    ),
    arguments=(*BASIC, *UNGUIDED, "prompt_2", "prompt_3", "prompt_4", "max_sequence_length"),
    leaks=(PROMPT_2, LENGTH, CASE),
)
