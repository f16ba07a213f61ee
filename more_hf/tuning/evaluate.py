"""`evaluate`: what a model still draws of a concept, and what else changed, whoever erased it and how."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..core.errors import MoreError
from ..core.files import write_text
from ..core.markdown import markdown_table
from ..core.request import ConceptRequest, read_names
from ..diffusion.compare import READABLE
from ..diffusion.draw import draw
from ..diffusion.grid import draw_grid
from ..diffusion.prompts import evenly
from ..diffusion.sites import as_pipeline
from .candidates import find_candidates, find_nameless, find_sentences, kind_of
from .judge import FOLDS, Estimate, Judge, features_of, lpips_distance


NAMELESS = "no name"  # the label of ordinary prompts
OTHERS = 4  # names of its kind that the judge knows if none are retained
SHOWN = 2  # columns of the sheet for each group of prompts


class Group(NamedTuple):
    """Prompts that say the same: what they have in common, the name to look for if any, and the prompts."""

    label: str
    judged: str | None
    prompts: list[str]


@dataclass(frozen=True)
class Finding:
    """What a group of prompts shows before and after."""

    prompts: str  # what they have in common
    judged: str | None  # the name that the judge looks for
    base: Estimate | None  # the share of the base's pictures that it takes for that name
    erased: Estimate | None  # of the erased model's
    moved: Estimate  # LPIPS between the two, from the same noise


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of `evaluate`; `print` and notebooks show it as a table."""

    concept: str
    findings: tuple[Finding, ...]
    judge: Judge
    differences: tuple[str, ...]  # in what the two pipelines differ
    sheet: Image.Image  # some of the pictures: the base's above the erased model's

    def to_markdown(self) -> str:
        """The table, and what to know about it."""
        rows = [
            {
                "prompts": finding.prompts,
                "pictures": finding.moved.n,
                "recognized as": finding.judged,
                "base": finding.base and finding.base.percent,
                "erased": finding.erased and finding.erased.percent,
                "moved (LPIPS)": finding.moved.distance,
            }
            for finding in self.findings
        ]
        found, mistaken = self.judge.found(self.concept), self.judge.mistaken(self.concept)
        notes = [
            f"The judge was fitted on other pictures by the base. Of pictures that it did not see, it finds "
            f"{found.percent} of {self.concept!r}, and takes {mistaken.percent} of the others for it.",
            f"The two pipelines differ in: {'; '.join(self.differences) or 'nothing'}.",
        ]
        if not self.judge.can_tell(self.concept):
            notes[0] += " It cannot tell them apart: its shares say nothing."
        return "\n\n".join([markdown_table(rows), *notes])

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `table.md` and `sheet.png` into a folder, which is created if needed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "table.md", self.to_markdown() + "\n")
        self.sheet.save(folder / "sheet.png")
        return folder

    def __str__(self) -> str:
        return self.to_markdown()

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


def evaluate(
    base: DiffusionPipeline,
    erased: DiffusionPipeline,
    concept: str,
    *,
    retain: str | Sequence[str] | None = None,
    descriptions: str | Sequence[str] | None = None,
    sentences: Sequence[str] | None = None,
    pictures: int = 32,
    sampling: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 8,
) -> Evaluation:
    """
    Measure what a pipeline still draws of a concept, and what else changed, against the original. It may have
    been made in any way: by this package, by another method, as a checkpoint, with a LoRA. Neither pipeline
    is changed.

    Both draw the same prompts from the same noise, with the base's scheduler: with the name, with
    misspellings of it, with descriptions, with each retained name, and without any. A judge that is fitted on
    other pictures by the base says what each picture shows, and LPIPS how far the two are apart.

    Args:
        base (`DiffusionPipeline`):
            The original.
        erased (`DiffusionPipeline`):
            The pipeline to measure, whose pictures have the same size.
        concept (`str`):
            The erased concept's name.
        retain (`str` or `Sequence[str]`, *optional*):
            Names that should be unchanged, best of the same kind, and the target if it is known: the judge
            takes whatever it sees for the concept or the nearest of these. By default four names of its kind.
        descriptions (`str` or `Sequence[str]`, *optional*):
            The concept in other words, such as those that [`find_aliases`] finds.
        sentences (`Sequence[str]`, *optional*):
            Prompts with `{}` for a name. By default such as suit its kind.
        pictures (`int`, *optional*, defaults to 32):
            Of each kind by each pipeline, at least 4; by the base as many of each name again, for the judge.
        sampling (`Mapping[str, Any]`, *optional*):
            Arguments of the pipelines' call with which to draw, such as `{"num_inference_steps": 20}`.
        seed (`int`, *optional*, defaults to 0):
            Of the first picture's noise.
        batch_size (`int`, *optional*, defaults to 8):
            Pictures per call of a pipeline.

    Returns:
        [`Evaluation`]: `print` shows the table, `sheet` has pictures, `save` writes both into a folder.

    Raises:
        `PrototypeError`: a name is given twice, or a sentence has no `{}`. `MoreError`: there are too few
        pictures, or those of the two differ in size. `SiteNotFoundError`: one cannot draw from a prompt.

    Example:

        >>> import more_hf
        >>> base, erased = more_hf.load_emoji_sd(), more_hf.load_emoji_sd()
        >>> erased = more_hf.erase_concept(erased, "High Contrast", remap_to="Fluent")
        >>> drawn = {"num_inference_steps": 6, "guidance_scale": 4.0}
        >>> others = ["Fluent", "Noto"]
        >>> found = more_hf.evaluate(base, erased, "High Contrast", retain=others, pictures=8, sampling=drawn)
    """
    base, erased = as_pipeline(base), as_pipeline(erased)
    # Check the names and sentences, as for an erasure.
    request = ConceptRequest.of(
        concept, remap_to=None, retain=retain, templates=sentences, pictures=pictures, seed=seed
    )
    if pictures < FOLDS:
        raise MoreError(f"`pictures` must be at least {FOLDS}, got {pictures}.")
    names = (concept, *(request.retain or _others(base, concept)))
    groups = _prompts(base, request, names, read_names("descriptions", descriptions))
    differences = tuple(_differences(base, erased))
    twin = copy.copy(erased)
    twin.register_modules(scheduler=type(base.scheduler).from_config(base.scheduler.config))
    bar = {"desc": "Evaluating", "unit": "picture", **getattr(base, "_progress_bar_config", {})}

    with tqdm(total=pictures * (len(names) + 2 * len(groups)), **bar) as progress:

        def drawn(pipe: DiffusionPipeline, prompts: Sequence[str], first: int) -> Tensor:
            batches = []
            for i in range(0, len(prompts), batch_size):
                batch = prompts[i : i + batch_size]
                seeds = range(first + i, first + i + len(batch))
                batches.append(draw(pipe, batch, seeds, sampling or {}))
                progress.update(len(batch))
            return torch.cat(batches)

        # 1. The same prompts from the same noise by both.
        before, after = [], []
        for group in groups:
            before.append(drawn(base, group.prompts, seed))
            after.append(drawn(twin, group.prompts, seed))
            _refuse_other_size(before[-1], after[-1])
        # 2. A judge, fitted on pictures by the base from other noise.
        named = {group.label: group.prompts for group in groups if group.label in names}
        judge = Judge.fit({name: drawn(base, prompts, seed + pictures) for name, prompts in named.items()})
    # 3. What they show, and how far they are apart. What all names have in common, by the base, says nothing.
    features = [tuple(map(features_of, pair)) for pair in zip(before, after, strict=True)]
    own = [a for group, (a, _) in zip(groups, features, strict=True) if group.label in names]
    here = replace(judge, centers=torch.stack(own).mean(0))
    findings = []
    for group, pair, a, b in zip(groups, features, before, after, strict=True):
        shares = [None, None]
        if group.judged is not None:
            shares = [Estimate.share(here.taken_for(z).count(group.judged), pictures) for z in pair]
        findings.append(Finding(group.label, group.judged, *shares, Estimate.mean(lpips_distance(a, b))))
    return Evaluation(concept, tuple(findings), judge, differences, _sheet(concept, groups, before, after))


def _others(base: DiffusionPipeline, concept: str) -> list[str]:
    """Names of the concept's kind, from a list of the package."""
    return evenly(find_candidates(base, concept, kind_of(base, concept), None), OTHERS)


def _prompts(
    base: DiffusionPipeline, request: ConceptRequest, names: Sequence[str], descriptions: Sequence[str]
) -> list[Group]:
    """The groups of prompts: the i-th ones of all have the same sentence, but those without a name."""
    (concept,), count = request.concepts, request.pictures
    sentences = request.templates or find_sentences(base, kind_of(base, concept), None, count)

    def about(*forms: str) -> list[str]:
        return [sentences[i % len(sentences)].replace("{}", forms[i % len(forms)]) for i in range(count)]

    groups = [Group(concept, concept, about(concept))]
    for what, forms in (("misspelled", misspellings(concept)), ("described", descriptions)):
        if forms:
            groups.append(Group(f"{what}: {', '.join(forms)}", concept, about(*forms)))
    groups += [Group(name, name, about(name)) for name in names[1:]]
    return [*groups, Group(NAMELESS, None, list(find_nameless(base, names, count)))]


def misspellings(name: str) -> list[str]:
    """
    Three misspellings by rule: in the middle of the longest word two letters swapped, one left out, and one
    doubled. There is none of a single letter.
    """
    word = max(name.split(), key=len)
    i = len(word) // 2
    if i < 1:
        return []
    start, letter, rest = word[: i - 1], word[i], word[i + 1 :]
    wrong = [start + letter + word[i - 1] + rest, word[:i] + rest, word[:i] + letter + letter + rest]
    return [name.replace(word, other, 1) for other in dict.fromkeys(wrong) if other != word]


def _refuse_other_size(before: Tensor, after: Tensor) -> None:
    """Raises `MoreError` if the pictures of the two differ in size."""
    if before.shape != after.shape:
        sizes = ["x".join(map(str, pictures.shape[:-3:-1])) for pictures in (before, after)]
        raise MoreError(
            f"The base draws {sizes[0]} pixels and the other {sizes[1]}, which cannot be compared. Pass "
            "`sampling` with a height and a width that both can draw."
        )


def _differences(base: DiffusionPipeline, erased: DiffusionPipeline) -> Iterator[str]:
    """In what two pipelines differ, component by component."""
    if type(base) is not type(erased):
        yield f"the class ({type(base).__name__} and {type(erased).__name__})"
    parts, others = base.components, erased.components
    for name in parts | others:
        a, b = parts.get(name), others.get(name)
        if name == "scheduler":
            if type(a) is not type(b) or _settings(a) != _settings(b):
                yield f"`scheduler` ({type(a).__name__} and {type(b).__name__}; both drew with the base's)"
        elif type(a) is not type(b):
            yield f"`{name}` ({type(a).__name__} and {type(b).__name__})"
        elif isinstance(a, nn.Module):
            yield from _weight_differences(name, a, b)


def _settings(scheduler: Any) -> dict[str, Any]:
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def _weight_differences(name: str, a: nn.Module, b: nn.Module) -> Iterator[str]:
    precisions = [str(next(model.parameters()).dtype).removeprefix("torch.") for model in (a, b)]
    if precisions[0] != precisions[1]:
        yield f"the precision of `{name}` ({' and '.join(precisions)})"
    first, second = a.state_dict(), b.state_dict()
    names = first.keys() | second.keys()
    if any(tensor.is_meta for tensor in (*first.values(), *second.values())):
        yield f"`{name}`, perhaps: it is offloaded, and was not compared"
        return
    other = [key for key in names if not _same(first.get(key), second.get(key))]
    if other:
        yield f"`{name}` ({len(other)} of {len(names)} tensors)"


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors have the same values in the coarser precision of the two."""
    if a is None or b is None or a.shape != b.shape:
        return False
    coarser = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(a.to(coarser), b.to(a.device, coarser))


def _sheet(
    concept: str, groups: Sequence[Group], before: Sequence[Tensor], after: Sequence[Tensor]
) -> Image.Image:
    """The first pictures of each group."""
    rows: dict[str, list[Image.Image]] = {}
    for label, drawn in (("base", before), ("erased", after)):
        shown = torch.cat([pictures[:SHOWN] for pictures in drawn])
        rows[label] = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in shown]
    prompts = [prompt for group in groups for prompt in group.prompts[:SHOWN]]
    scale = -(-READABLE // rows["base"][0].width)
    return draw_grid(rows, column_labels=prompts, scale=scale, title=f"{concept}: before and after")
