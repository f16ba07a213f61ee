"""From names to prototypes: encode prompts as the pipeline does, find a name's positions, average there."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Self

import torch
from accelerate.utils import tqdm
from diffusers import DiffusionPipeline
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor

from ..core.errors import PrototypeError
from ..core.prototypes import PrototypeFitter, Prototypes
from ..core.request import ConceptRequest
from .kept import KeptFeatures, precisions_of
from .prefixes import PrefixEncoder
from .prompts import TEMPLATES
from .sites import Denoiser, as_pipeline, find_denoiser, text_of
from .text import Layout, Segment, Text


logger = logging.getLogger(__name__)

# token mode -> the kinds of prototype that a name has, each a mean over some positions of its prompts
TOKENS = {
    "positions": ("last", "after", "end", "padding"),
    "last+end": ("last", "end"),
    "subject+end": ("subject", "end+padding"),
    "subject": ("subject",),
    "end": ("end+padding",),
    "last": ("bare last",),
}
BEGIN, EMPTY_POOLED, EMPTY_PADDING = "begin token", "empty prompt", "empty prompt, padding"
POOLED = "pooled"
# Beyond this many positions, padding is most of a text encoder's work, so the padding of one prompt with a
# name stands for that of all its prompts.
LONG = 40
DELAY = 2  # seconds after which a progress bar shows
BATCH, CLIP_LENGTH = 128, 77  # prompts encoded at once, at this many positions; fewer if they are longer


class Span(NamedTuple):
    """The positions `[start, stop)` of one prompt among its token features."""

    prompt: str
    start: int
    stop: int


class PlacedSegment(NamedTuple):
    """A segment, the offset of its positions among the token features, and their number."""

    segment: Segment
    offset: int
    length: int


def column(name: str, kind: str) -> str:
    """The prototype's name for one kind of position of a concept."""
    return f"{name} · {kind}"


class Encoder:
    """
    The pipeline's own text encoding, which also knows where a name's tokens are. One call makes one.

    The `templates` are sentences around a name, with `{}` in its place. The `denoiser` is given if the
    pipeline was loaded without it, and features `kept` on the disk if it was without its text encoders.

    Raises:
        `SiteNotFoundError`: the way this pipeline encodes prompts is unknown.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        templates: Sequence[str] = TEMPLATES,
        denoiser: Denoiser | None = None,
        kept: KeptFeatures | None = None,
    ):
        self.pipe = pipe = as_pipeline(pipe)
        self.kept = kept
        self.templates = templates
        self.denoiser = denoiser or find_denoiser(pipe)
        self.text = text_of(pipe, self.denoiser)
        norms = self.denoiser.family.norms
        self.norms = {space: self.denoiser.module.get_submodule(name) for space, name in norms.items()}
        self.ids: dict[tuple[str, str], list[int]] = {}  # tokenizer of a segment, prompt -> its token ids
        self.segments: dict[str, list[PlacedSegment]] = {}  # of each space of tokens
        for segment in self.text.segments:
            for space in segment.spaces:
                before = self.segments.setdefault(space, [])
                offset = sum(placed.length for placed in before)
                before.append(PlacedSegment(segment, offset, segment.length(pipe)))
        self.spaces = [*self.segments, *(["pooled"] if self.text.pooled else [])]
        self.num_positions = sum(segment.length(pipe) for segment in self.text.segments)
        self.length = self.text.segments[0].length(pipe)
        # A CLIP encoder of which only token features are read need not compute positions nobody wants.
        self.causal = not self.text.pooled and all(segment.clip for segment in self.text.segments)
        self.sparing = self.causal and self.length > LONG
        self.padded = self.templates[len(self.templates) // 2]  # the same for a name and its target

    @classmethod
    def of(
        cls,
        pipe: DiffusionPipeline,
        request: ConceptRequest,
        denoiser: Denoiser | None = None,
        kept: KeptFeatures | None = None,
    ) -> Self:
        """The encoder with a request's sentences around a name."""
        return cls(pipe, request.templates or TEMPLATES, denoiser, kept)

    @property
    def device(self) -> torch.device:
        """Where the text encoders run."""
        return self.pipe._execution_device if self.kept is None else self.kept.device

    @property
    def precisions(self) -> dict[str, str]:
        """The precision of each text encoder, and how it is quantized."""
        return precisions_of(self.pipe) if self.kept is None else self.kept.precisions

    @property
    def causal_segment(self) -> Segment | None:
        """The first segment of a causal encoder, if there is one."""
        return next((segment for segment in self.text.segments if segment.causal), None)

    def token_ids(self, prompt: str, segment: Segment | None = None) -> list[int]:
        """
        The token ids of a prompt in a segment (the first by default), without begin and end token; a learned
        token of several vectors counts as several.
        """
        segment = segment or self.text.segments[0]
        # Cached, because every kind of prototype asks for the same prompts.
        key = segment.tokenizer, prompt
        if key not in self.ids:
            self.ids[key] = self._tokenize(prompt, segment)
        return self.ids[key]

    def _tokenize(self, prompt: str, segment: Segment) -> list[int]:
        tokenizer = getattr(self.pipe, segment.tokenizer)
        if segment.template is not None:
            layout = self.layout(prompt, segment)
            return [token.id for token in segment.tokens(self.pipe, prompt)][layout.start : layout.end]
        if isinstance(self.pipe, TextualInversionLoaderMixin):
            prompt = self.pipe.maybe_convert_prompt(prompt, tokenizer)
        # tokenize what the pipeline will, or positions would be off
        prompt = prompt.lower().strip() if self.text.lower else prompt
        ids = tokenizer(prompt).input_ids
        return ids[segment.before : len(ids) - segment.ends]

    def layout(self, prompt: str, segment: Segment | None = None) -> Layout:
        """Where the parts of a prompt are in a segment, the first by default."""
        segment = segment or self.text.segments[0]
        if segment.template is not None:
            return segment.layout(segment.tokens(self.pipe, prompt), len(prompt))
        end = segment.before + len(self.token_ids(prompt, segment))
        return Layout(segment.before, end, end + segment.ends)

    def place(self, template: str, name: str, segment: Segment) -> tuple[int, int, Layout] | None:
        """
        The positions `[start, stop)` of a name in a prompt, and the prompt's layout; `None` if the name is
        split into different tokens there.
        """
        prompt = template.format(name)
        if segment.template is None:
            own, ids = self.token_ids(name, segment), self.token_ids(prompt, segment)
            first = _find(own, ids)
            if first is None:
                return None
            start = segment.before + first
            return start, start + len(own), self.layout(prompt, segment)
        # A language model's tokens depend on their surroundings, so look for the name's characters.
        begin = len(template.split("{}")[0])
        tokens = segment.tokens(self.pipe, prompt)
        # Tokens may straddle the name's ends: take each that holds one of its characters.
        start = sum(token.stop <= begin for token in tokens)
        stop = sum(token.start < begin + len(name) for token in tokens)
        return start, stop, segment.layout(tokens, len(prompt))

    @torch.no_grad()
    def features(
        self, prompts: Sequence[str], wanted: Sequence[int] | None = None, *, keep: bool = True
    ) -> dict[str, Tensor]:
        """
        The features that the denoiser's layers read: `"tokens"`, and other spaces of tokens if there are any,
        `(len(prompts), tokens, d)`, and `"pooled"` `(len(prompts), d')` if there is one. With `wanted`, the
        positions of each prompt beyond that number may be left at zero. Without `keep`, none is on the disk.
        """
        if self.kept is not None and keep:
            features = self.kept.features(self, prompts, wanted)
        else:
            features = self.run(prompts, wanted)
        for space, norm in self.norms.items():
            dtype = next(norm.parameters()).dtype
            z = features[space].to(get_module_execution_device(norm), dtype)
            features[space] = norm.forward(z)  # bypasses an erasure's routing hook
        return features

    def run(self, prompts: Sequence[str], wanted: Sequence[int] | None) -> dict[str, Tensor]:
        """What the text encoders make of prompts, before the denoiser's norms. See `features`."""
        pipe = self.pipe
        if self.kept is not None:
            self.kept.load_into(pipe)
        if wanted is not None and self.causal:
            # The stand-in is registered with a copy, so that the user's pipeline keeps its own encoder.
            pipe = copy.copy(pipe)
            pipe.register_modules(text_encoder=PrefixEncoder(pipe.text_encoder, wanted))
        found = self.text.encode(pipe, list(prompts))
        return {space: found[space] for space in self.spaces}

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """The token features, `(len(prompts), tokens, d)`."""
        return self.features(prompts)["tokens"]

    def constant_spans(self, space: str = "tokens") -> dict[str, Span]:
        """The prototypes that always stay, by name: begin tokens and the parts of the empty prompt."""
        spans = {}
        for segment, offset, length in self.segments[space]:
            layout = self.layout("", segment)
            names = [BEGIN if i == 1 else f"{BEGIN} {i}" for i in range(1, layout.start + 1)]
            names += [f"empty prompt, {kind}" for kind in segment.kinds("end")]
            # with padding in front, everything else is shifted
            pads = segment.pads_before(layout, length)
            for i, name in enumerate(names):
                spans[segment.label + name] = Span("", offset + pads + i, offset + pads + i + 1)
            start, stop = segment.padding_at(layout, length)
            if start < stop:
                spans[segment.label + EMPTY_PADDING] = Span("", offset + pads + start, offset + pads + stop)
        return spans

    def ordinary_spans(self, prompt: str, space: str = "tokens") -> list[tuple[Span, Span]]:
        """For each segment, the prompt's own positions without begin tokens, and its padding that is read."""
        spans = []
        for segment, offset, length in self.segments[space]:
            layout = self.layout(prompt, segment)
            first = offset + segment.pads_before(layout, length)
            # a prompt that is too long is cut off, as the pipeline does
            end = min(layout.stop, segment.read_until(layout, length))
            start, stop = segment.padding_at(layout, length) if segment.padding_varies else (end, end)
            own = Span(prompt, first + layout.start, first + end)
            spans.append((own, Span(prompt, first + start, first + stop)))
        return spans

    def prompts_of(self, names: Iterable[str]) -> dict[str, int]:
        """The prompts that hold names -> how often the padding of each counts toward Σ."""
        prompts = {}
        for name in names:
            for template in self.templates:
                stands_for = len(self.templates) if template == self.padded else 0
                prompts[template.format(name)] = stands_for if self.sparing else 1
        return prompts

    def name_spans(self, name: str, kind: str, space: str = "tokens") -> list[Span]:
        """
        The positions that one kind of prototype of a name averages, in every prompt that holds the name.

        Raises:
            `PrototypeError`: the name has no tokens, or too many for a prompt around it.
        """
        # Kinds of different segments differ by their label: "T5 last" beside "last".
        # A kind starts with its segment's label; the last segment that matches has the longest label.
        labeled = [placed for placed in self.segments[space] if kind.startswith(placed.segment.label)]
        segment, offset, length = labeled[-1]
        kind = kind.removeprefix(segment.label)
        # 1. Choose the sentences: a "bare" kind takes the name alone, and one padding may stand for all.
        ids = self.token_ids(name, segment)
        if not ids:
            raise PrototypeError(f"The concept {name!r} has no tokens in this tokenizer. Give it a name.")
        templates = ("{}",) if kind == "bare last" else self.templates
        one_is_enough = kind == "padding" and self.sparing
        if one_is_enough:
            templates = (self.padded, *templates)
        # 2. Find the name in each sentence that holds it whole, and take the kind's positions there.
        spans = []
        for template in templates:
            place = self.place(template, name, segment)
            if place is None:
                continue
            start, stop, layout = place
            if layout.stop > length:  # the prompt would be cut off
                continue
            if kind == "padding":
                first, last = segment.padding_at(layout, length)
            else:
                first, last = _positions(kind, start, stop, layout, segment.read_until(layout, length))
            if first < last:
                shift = offset + segment.pads_before(layout, length)
                spans.append(Span(template.format(name), shift + first, shift + last))
                if one_is_enough:
                    break
        if not spans:
            raise PrototypeError(
                f"{name!r} takes {len(ids)} of this model's {length} tokens: too long for a prompt around "
                "it. Use a shorter name."
            )
        return spans


def _find(part: list[int], whole: list[int]) -> int | None:
    """The index at which `part` first occurs in `whole`."""
    for i in range(len(whole) - len(part) + 1):
        if whole[i : i + len(part)] == part:
            return i
    return None


def _positions(kind: str, start: int, stop: int, layout: Layout, last: int) -> tuple[int, int]:
    """The positions `[first, last)` of a kind in a prompt read to `last`, with a name at `[start, stop)`."""
    if kind.startswith("end "):  # one of several end tokens, counted from 1
        position = layout.end + int(kind.removeprefix("end ")) - 1
        return position, position + 1
    return {
        "subject": (start, stop),
        "last": (stop - 1, stop),
        "bare last": (stop - 1, stop),
        "after": (stop, layout.end),
        "end": (layout.end, layout.end + 1),
        "end+padding": (layout.end, last),
    }[kind]


def kinds_of(text: Text, tokens: str, *, pooled: bool) -> dict[str, list[str]]:
    """The kinds of prototype that a name has in each space, for a key `tokens` of `TOKENS`."""
    kinds: dict[str, list[str]] = {}
    for segment in text.segments:
        # an ordered set: two kinds can be the same positions
        own: dict[str, None] = {}
        for kind in TOKENS[tokens]:
            parts = segment.kinds(kind)
            if kind == "end" and not parts:  # with no end token, the padding says what the whole prompt says
                parts = segment.kinds("padding")
            own |= dict.fromkeys(segment.label + part for part in parts)
        for space in segment.spaces:
            kinds[space] = [*kinds.get(space, []), *own]
    return {**kinds, "pooled": [POOLED]} if text.pooled and pooled else kinds


class _Plan:
    """A space's input to its fitter: prototypes' names, and which positions of a prompt count for which."""

    def __init__(self) -> None:
        self.names: list[str] = []
        # prompt -> (label, start, stop); a label −n counts n times toward Σ, and for no prototype
        self.spans: dict[str, list[tuple[int, int, int]]] = {}

    def prototype(self, name: str, spans: Iterable[Span]) -> None:
        self._add(len(self.names), spans)
        self.names.append(name)

    def ordinary(self, spans: Iterable[Span], times: int = 1) -> None:
        if times:
            self._add(-times, spans)

    def wanted(self, prompt: str) -> int:
        """How many leading positions of a prompt are needed; 0 if only another space reads the prompt."""
        return max((stop for _, _, stop in self.spans.get(prompt, ())), default=0)

    def _add(self, label: int, spans: Iterable[Span]) -> None:
        for prompt, start, stop in spans:
            self.spans.setdefault(prompt, []).append((label, start, stop))

    def entries(self, batch: Sequence[str]) -> Tensor:
        """`(entries, 3)`, int64: row in the batch, position and label of every feature that counts."""
        entries = []
        for row, prompt in enumerate(batch):
            for label, start, stop in self.spans.get(prompt, ()):
                entries += [(row, position, label) for position in range(start, stop)]
        return torch.tensor(entries, dtype=torch.int64).reshape(-1, 3)


def _plan(
    encoder: Encoder,
    kinds: Mapping[str, Sequence[str]],
    names: Iterable[str],
    sigma_prompts: Mapping[str, int],
) -> dict[str, _Plan]:
    """The plan of each space. A pooled feature is at position 0 of its prompt."""
    plans = {space: _Plan() for space in kinds}
    for space in encoder.segments:
        tokens = plans[space]
        for name, span in encoder.constant_spans(space).items():
            tokens.prototype(name, [span])
        for name in names:
            for kind in kinds[space]:
                tokens.prototype(column(name, kind), encoder.name_spans(name, kind, space))
        for prompt, stands_for in sigma_prompts.items():
            for own, padding in encoder.ordinary_spans(prompt, space):
                tokens.ordinary([own])
                tokens.ordinary([padding], stands_for)
    if "pooled" not in kinds:
        return plans

    pooled = plans["pooled"]
    pooled.prototype(EMPTY_POOLED, [Span("", 0, 1)])
    for name in names:
        pooled.prototype(column(name, POOLED), [Span(text.format(name), 0, 1) for text in encoder.templates])
    for prompt in sigma_prompts:
        pooled.ordinary([Span(prompt, 0, 1)])
    return plans


def fit_prototypes(
    encoder: Encoder,
    names: Iterable[str],
    tokens: str,
    *,
    sigma_prompts: Mapping[str, int],
    keep: bool = True,
) -> dict[str, Prototypes]:
    """
    Prototypes of names, begin tokens and the empty prompt, and the second moment of ordinary text, in every
    space of tokens, and of `"pooled"` if there is one: the columns of begin tokens and the empty prompt, then
    one `column(name, kind)` per name and kind. A pooled prototype is the mean over the name's prompts.

    The text encoders run once over every distinct prompt, in batches. `tokens` is a key of `TOKENS`;
    `sigma_prompts` are the prompts behind Σ -> how often the padding of each counts; their other tokens,
    except begin tokens, count once. An encoder that keeps features on the disk keeps these, if `keep`.
    """
    # 1. Plan which positions of which prompts count for which prototype, in each space.
    kinds = kinds_of(encoder.text, tokens, pooled=True)
    plans = _plan(encoder, kinds, dict.fromkeys(names), sigma_prompts)
    distinct: dict[str, None] = {}
    for plan in plans.values():
        distinct |= dict.fromkeys(plan.spans)
    prompts = list(distinct)

    # 2. Encode the distinct prompts once, for all spaces together, and feed the fitters.
    # A batch has as many positions as 128 prompts of CLIP have, so that long prompts fit into memory.
    logger.info("Encoding %d prompts", len(prompts))
    size = min(BATCH, max(1, BATCH * CLIP_LENGTH // encoder.num_positions))
    fitters: dict[str, PrototypeFitter] = {}
    for first in _progress(encoder.pipe, range(0, len(prompts), size)):
        batch = prompts[first : first + size]
        wanted = [plans["tokens"].wanted(prompt) for prompt in batch]
        for space, features in encoder.features(batch, wanted, keep=keep).items():
            features = features[:, None] if space == "pooled" else features
            if space not in fitters:
                width, device = features.shape[-1], features.device
                fitters[space] = PrototypeFitter(width, plans[space].names, device=device, thin=True)
            _feed(fitters[space], features, plans[space].entries(batch))
    prototypes = {space: fitter.prototypes for space, fitter in fitters.items()}

    # 3. Some encoders leave the empty prompt's padding at zero, which is no prototype: no edit moves it.
    for space in encoder.segments:
        zeros = [name for name in encoder.constant_spans(space) if not prototypes[space][name].any()]
        prototypes[space] = prototypes[space].without(zeros)
    return prototypes


def _feed(fitter: PrototypeFitter, features: Tensor, entries: Tensor) -> None:
    """Add a batch's features `(batch, positions, d)` by the entries of its plan."""
    rows, positions, labels = entries.to(features.device).T
    fitter.update(features[rows, positions], labels)  # leaves out negative labels
    for label in labels[labels < 0].unique().tolist():
        ordinary = labels == label
        fitter.update_moment(features[rows[ordinary], positions[ordinary]], times=-label)


def _progress(pipe: DiffusionPipeline, batches: range) -> tqdm:
    """A bar that heeds `set_progress_bar_config`, like the pipeline's own; shown only after `DELAY`."""
    config = getattr(pipe, "_progress_bar_config", {})  # absent until `set_progress_bar_config` is called
    return tqdm(batches, **{"desc": "Encoding prompts", "unit": "batch", "delay": DELAY, **config})


def shared_first_tokens(encoder: Encoder, name: str, others: Iterable[str]) -> Mapping[str, int]:
    """
    The other names that start with the same tokens as `name` -> the number of tokens they share.

    In a causal encoder these tokens have the same vectors, so whatever moves one moves the other.
    """
    # Without causality, what follows a token changes its vector, and equal beginnings share nothing.
    segment = encoder.causal_segment
    if segment is None:
        return {}
    own_ids, shared = encoder.token_ids(name, segment), {}
    for other in others:
        count = 0
        for own_id, other_id in zip(own_ids, encoder.token_ids(other, segment), strict=False):
            if own_id != other_id:
                break
            count += 1
        if count:
            shared[other] = count
    return shared
