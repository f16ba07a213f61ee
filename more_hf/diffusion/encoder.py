"""From names to prototypes: prompts, token positions, and the second moment of ordinary text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor

from ..core.errors import PrototypeError
from ..core.prototypes import PrototypeFitter, Prototypes
from .prompts import TEMPLATES
from .text import Segment, Text, text_of


# token mode -> the kinds of prototype that a name has, each a mean over some positions of its prompts
TOKENS = {
    "positions": ("last", "after", "end", "padding"),
    "subject+end": ("subject", "end+padding"),
    "subject": ("subject",),
    "end": ("end+padding",),
    "last": ("bare last",),
}
BEGIN, EMPTY_END, EMPTY_PADDING, EMPTY_POOLED = "begin token", "empty prompt, end", "empty prompt, padding", "empty prompt"
POOLED = "pooled"
ORDINARY = -1
BATCH, CLIP_LENGTH = 128, 77  # prompts encoded at once, of so many positions; fewer where there are more


def column(name: str, kind: str) -> str:
    """The prototype's name for one kind of position of a concept."""
    return f"{name} · {kind}"


class Encoder:
    """The pipeline's own text encoding, and where a name's tokens are in it."""

    def __init__(self, pipe: DiffusionPipeline):
        """Raises `TargetNotFoundError` if the pipeline's way to encode prompts is not known."""
        self.pipe = pipe
        self.text = text_of(pipe)
        self.lengths = [segment.length(pipe) for segment in self.text.segments]
        self.length = self.lengths[0]

    def token_ids(self, prompt: str, segment: Segment | None = None) -> list[int]:
        """Without begin and end token, by the first segment's tokenizer if not another's; multi-vector learned tokens spelled out."""
        segment = segment or self.text.segments[0]
        tokenizer = getattr(self.pipe, segment.tokenizer)
        if isinstance(self.pipe, TextualInversionLoaderMixin):
            prompt = self.pipe.maybe_convert_prompt(prompt, tokenizer)
        return tokenizer(prompt.lower().strip() if self.text.lower else prompt).input_ids[segment.before : -1]

    @torch.no_grad()
    def features(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`"tokens"` `(len(prompts), tokens, d)`, and `"pooled"` `(len(prompts), d')` where there is one."""
        return self.text.encode(self.pipe, list(prompts))

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """The token features, `(len(prompts), tokens, d)`."""
        return self.features(prompts)["tokens"]

    def fixed(self) -> list[tuple[str, str, int, int]]:
        """Prototypes that always stay: `(name, prompt, start, stop)`, the range of positions among the token features."""
        found, offset = [], 0
        for segment, length in zip(self.text.segments, self.lengths, strict=True):
            end = offset + segment.before
            if segment.clip:
                found.append((segment.label + BEGIN, "", offset, end))
            found.append((segment.label + EMPTY_END, "", end, end + 1))
            if segment.padding:
                found.append((segment.label + EMPTY_PADDING, "", end + 1, offset + length))
            offset += length
        return found

    def read(self, prompt: str) -> list[tuple[int, int]]:
        """Ranges of positions that the denoiser reads, but for begin tokens."""
        found, offset = [], 0
        for segment, length in zip(self.text.segments, self.lengths, strict=True):
            stop = length if segment.padding else min(segment.before + len(self.token_ids(prompt, segment)) + 1, length)
            found.append((offset + segment.before, offset + stop))
            offset += length
        return found

    def spans(self, name: str, kind: str) -> list[tuple[str, int, int]]:
        """Prompts that hold the name, each with the range of positions `[start, stop)` that this kind of prototype averages."""
        index = max(i for i, segment in enumerate(self.text.segments) if kind.startswith(segment.label))
        segment, length, offset = self.text.segments[index], self.lengths[index], sum(self.lengths[:index])
        kind = kind.removeprefix(segment.label)
        own = self.token_ids(name, segment)
        if not own:
            raise PrototypeError(f"The concept {name!r} has no tokens in this tokenizer. Give it a name.")
        found = []
        for template in ("{}",) if kind == "bare last" else TEMPLATES:
            prompt = template.format(name)
            ids = self.token_ids(prompt, segment)
            starts = [i for i in range(len(ids)) if ids[i : i + len(own)] == own]
            if segment.before + len(ids) + 1 > length or not starts:
                continue
            start = segment.before + starts[0]
            stop, end = start + len(own), segment.before + len(ids)  # `end` is the position of the end token
            last = length if segment.padding else end + 1
            ranges = {
                "subject": (start, stop),
                "last": (stop - 1, stop),
                "bare last": (stop - 1, stop),
                "after": (stop, end),
                "end": (end, end + 1),
                "padding": (end + 1, last),
                "end+padding": (end, last),
            }
            if ranges[kind][0] < ranges[kind][1]:
                found.append((prompt, offset + ranges[kind][0], offset + ranges[kind][1]))
        if not found:
            raise PrototypeError(f"{name!r} takes {len(own)} of this model's {length} tokens: too long for a prompt around it.")
        return found


def kinds_of(text: Text, tokens: str) -> dict[str, list[str]]:
    """Space -> the kinds of prototype that a name has there; `tokens` is a key of `TOKENS`."""
    kinds = {
        "tokens": [segment.label + kind for segment in text.segments for kind in TOKENS[tokens] if segment.padding or kind != "padding"]
    }
    return {**kinds, "pooled": [POOLED]} if text.pooled else kinds


def fit_prototypes(pipe: DiffusionPipeline, names: Iterable[str], tokens: str, *, sigma_prompts: Sequence[str]) -> dict[str, Prototypes]:
    """Prototypes of names, of begin tokens and of the empty prompt, and the second moment of ordinary text, in every space.

    Args:
        pipe: the pipeline; its text encoders run once over every distinct prompt, in batches.
        names (`Iterable[str]`): forgotten names and aliases, targets, retained names.
        tokens (`str`): a key of `TOKENS`.
        sigma_prompts (`Sequence[str]`): prompts behind Σ; every token but begin tokens counts. Empty for no Σ.

    Returns for `"tokens"`, and `"pooled"` where there is one, `Prototypes` with the begin tokens' and the empty prompt's columns, then one
    `column(name, kind)` per name and kind. A pooled prototype is the mean over the name's prompts.
    """
    encoder = Encoder(pipe)
    kinds = kinds_of(encoder.text, tokens)
    # space -> prompt -> [(label, start, stop)]; a pooled feature is at position 0, and ORDINARY is the label of what Σ is over
    wanted: dict[str, dict[str, list[tuple[int, int, int]]]] = {space: {} for space in kinds}
    labels: dict[str, list[str]] = {space: [] for space in kinds}

    def want(space: str, name: str, spans: Iterable[tuple[str, int, int]]) -> None:
        for prompt, start, stop in spans:
            wanted[space].setdefault(prompt, []).append((len(labels[space]), start, stop))
        labels[space].append(name)

    for name, *span in encoder.fixed():
        want("tokens", name, [span])
    if encoder.text.pooled:
        want("pooled", EMPTY_POOLED, [("", 0, 1)])
    for name in dict.fromkeys(names):
        for kind in kinds["tokens"]:
            want("tokens", column(name, kind), encoder.spans(name, kind))
        if encoder.text.pooled:
            want("pooled", column(name, POOLED), [(template.format(name), 0, 1) for template in TEMPLATES])
    for prompt in dict.fromkeys(sigma_prompts):
        for space in kinds:
            ranges = [(0, 1)] if space == "pooled" else encoder.read(prompt)
            wanted[space].setdefault(prompt, []).extend((ORDINARY, *span) for span in ranges)

    fitters: dict[str, PrototypeFitter] = {}
    prompts = list(dict.fromkeys(prompt for spans in wanted.values() for prompt in spans))
    size = min(BATCH, max(1, BATCH * CLIP_LENGTH // sum(encoder.lengths)))
    for first in range(0, len(prompts), size):
        batch = prompts[first : first + size]
        for space, features in encoder.features(batch).items():
            features = features[:, None] if space == "pooled" else features
            spans = [(row, *span) for row, prompt in enumerate(batch) for span in wanted[space].get(prompt, ())]
            at = [(row, i, label) for row, label, start, stop in spans for i in range(start, stop)]
            rows, positions, marks = torch.tensor(at, dtype=torch.int64, device=features.device).reshape(-1, 3).T
            if space not in fitters:
                fitters[space] = PrototypeFitter(features.shape[-1], labels[space], device=features.device)
            fitters[space].update(features[rows, positions], marks)  # which leaves ORDINARY out
            if len(ordinary := (marks == ORDINARY).nonzero()[:, 0]):
                fitters[space].update_moment(features[rows[ordinary], positions[ordinary]])
    return {space: fitter.prototypes for space, fitter in fitters.items()}


def shared_first_tokens(pipe: DiffusionPipeline, name: str, others: Iterable[str]) -> Mapping[str, int]:
    """Names whose first tokens are those of `name`: in a causal encoder these tokens have the same vectors. Name -> how many."""
    encoder = Encoder(pipe)
    if not encoder.text.segments[0].clip:
        return {}
    own = encoder.token_ids(name)
    shared = {}
    for other in others:
        ids = encoder.token_ids(other)
        count = next((i for i, (a, b) in enumerate(zip(own, ids, strict=False)) if a != b), min(len(own), len(ids)))
        if count:
            shared[other] = count
    return shared
