"""From names to prototypes: prompts, token positions, and the second moment of ordinary text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor

from ..errors import PrototypeError
from ..prototypes import PrototypeFitter, Prototypes


TEMPLATES = (
    "{}",
    "{} style",
    "a picture by {}",
    "an image of a tree by {}",
    "a house in the style of {}",
    "a horse in {}'s style",
    "{}'s drawing of a flower",
    "a {} drawing of a boat",
    "{} cat",
    "a chair, {} style",
    "a photo of a {}",
    "a {} on a table",
    "a small {} next to a dog",
    "a {} in the rain",
)

# token mode -> the kinds of prototype that a name has, each a mean over some positions of its prompts
TOKENS = {
    "positions": ("last", "after", "end", "padding"),
    "subject+end": ("subject", "end+padding"),
    "subject": ("subject",),
    "end": ("end+padding",),
    "last": ("bare last",),
}
BEGIN, EMPTY_END, EMPTY_PADDING = "begin token", "empty prompt, end", "empty prompt, padding"
BATCH = 128  # prompts encoded at once


def column(name: str, kind: str) -> str:
    """The prototype's name for one kind of position of a concept."""
    return f"{name} · {kind}"


def names_in(text: str, name: str) -> bool:
    """Whether `text` contains `name` as whole words, whatever the case."""
    return re.search(rf"(?<!\w){re.escape(name.casefold())}(?!\w)", text.casefold()) is not None


@cache
def everyday_prompts() -> tuple[str, ...]:
    """The ordinary prompts behind Σ that ship with the package."""
    lines = files("more_hf").joinpath("data", "everyday_prompts.txt").read_text("utf-8").splitlines()
    return tuple(line for line in lines if line and not line.startswith("#"))


class Encoder:
    """The pipeline's own text encoding: `encode_prompt`, so that its hidden layer and textual-inversion tokens are right."""

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe
        self.length = pipe.tokenizer.model_max_length

    def token_ids(self, prompt: str) -> list[int]:
        """Without begin and end token; a multi-vector textual-inversion token spelled out."""
        if isinstance(self.pipe, TextualInversionLoaderMixin):
            prompt = self.pipe.maybe_convert_prompt(prompt, self.pipe.tokenizer)
        return self.pipe.tokenizer(prompt).input_ids[1:-1]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """`(len(prompts), tokens, d)`."""
        embeds, _ = self.pipe.encode_prompt(
            list(prompts), self.pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return embeds

    def spans(self, name: str, kind: str) -> list[tuple[str, int, int]]:
        """Prompts that hold the name, each with the range of positions `[start, stop)` that this kind of prototype averages."""
        own = self.token_ids(name)
        if not own:
            raise PrototypeError(f"The concept {name!r} has no tokens in this tokenizer. Give it a name.")
        found = []
        for template in ("{}",) if kind == "bare last" else TEMPLATES:
            prompt = template.format(name)
            ids = self.token_ids(prompt)
            starts = [i for i in range(len(ids)) if ids[i : i + len(own)] == own]
            if len(ids) + 2 > self.length or not starts:
                continue
            start = 1 + starts[0]
            stop, end = start + len(own), 1 + len(ids)  # `end` is the position of the end token
            ranges = {
                "subject": (start, stop),
                "last": (stop - 1, stop),
                "bare last": (stop - 1, stop),
                "after": (stop, end),
                "end": (end, end + 1),
                "padding": (end + 1, self.length),
                "end+padding": (end, self.length),
            }
            if ranges[kind][0] < ranges[kind][1]:
                found.append((prompt, *ranges[kind]))
        if not found:
            raise PrototypeError(f"{name!r} takes {len(own)} of this model's {self.length} tokens: too long for a prompt around it.")
        return found


def fit_prototypes(pipe: DiffusionPipeline, names: Iterable[str], tokens: str, *, sigma_prompts: Sequence[str]) -> Prototypes:
    """Prototypes of names, of the begin token and of the empty prompt, and the second moment of ordinary text.

    Args:
        pipe: the pipeline; its text encoder runs once over every distinct prompt, in batches.
        names (`Iterable[str]`): forgotten names and aliases, targets, retained names.
        tokens (`str`): a key of `TOKENS`.
        sigma_prompts (`Sequence[str]`): prompts behind Σ; every token but the begin token counts. Empty for no Σ.

    Returns `Prototypes` with one column `column(name, kind)` per name and kind, then the begin token's and the empty prompt's.
    """
    encoder = Encoder(pipe)
    wanted: dict[str, list[tuple[int, int, int]]] = {"": [(0, 0, 1), (1, 1, 2), (2, 2, encoder.length)]}  # prompt -> [(label, start, stop)]
    labels = [BEGIN, EMPTY_END, EMPTY_PADDING]
    for name in dict.fromkeys(names):
        for kind in TOKENS[tokens]:
            for prompt, start, stop in encoder.spans(name, kind):
                wanted.setdefault(prompt, []).append((len(labels), start, stop))
            labels.append(column(name, kind))
    fitter = None
    ordinary = set(sigma_prompts)
    prompts = list(dict.fromkeys([*wanted, *sigma_prompts]))
    for first in range(0, len(prompts), BATCH):
        batch = prompts[first : first + BATCH]
        features = encoder.encode(batch)
        fitter = fitter or PrototypeFitter(features.shape[-1], labels, device=features.device)
        at = [(row, i, label) for row, prompt in enumerate(batch) for label, *span in wanted.get(prompt, ()) for i in range(*span)]
        rows, positions, marks = torch.tensor(at, dtype=torch.int64, device=features.device).reshape(-1, 3).T
        fitter.update(features[rows, positions], marks)
        fitter.update_moment(features[[row for row, prompt in enumerate(batch) if prompt in ordinary], 1:])
    return fitter.prototypes


def shared_first_tokens(pipe: DiffusionPipeline, name: str, others: Iterable[str]) -> Mapping[str, int]:
    """Names whose first tokens are those of `name`: in a causal encoder these tokens have the same vectors. Name -> how many."""
    encoder = Encoder(pipe)
    own = encoder.token_ids(name)
    shared = {}
    for other in others:
        ids = encoder.token_ids(other)
        count = next((i for i, (a, b) in enumerate(zip(own, ids, strict=False)) if a != b), min(len(own), len(ids)))
        if count:
            shared[other] = count
    return shared
