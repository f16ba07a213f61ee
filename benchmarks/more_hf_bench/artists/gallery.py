"""
The benchmark's page: methods as columns, prompts as rows, every picture before and after, with filters and
sorting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from more_hf.core.markdown import number

from ..page import SMALL, Section, image_uri, png_uri, write_page
from .config import ArtistsConfig
from .grid import methods_of
from .rows import Row, When


BUDGET = 14_000_000  # bytes of pictures on the page
SIDE = 256  # larger pictures are shown at this size
EXPLANATION = (
    "Every method's picture starts from the same noise as the one before. LPIPS is the distance between the "
    "two: it should be large for what is forgotten and small for the rest. Below each picture is what "
    "the judges take it for."
)
FIRST = 3  # rows above the tables: the forgotten artist's first prompt, then other artists'

# Rows of the forgotten artist and of each other artist; the page takes the first choice that fits `BUDGET`.
CHOICES = ((20, 20), (20, 6), (20, 3), (10, 3), (10, 2), (5, 1), (2, 1))

Options = list[tuple[str, str]]  # a menu's values and texts


@dataclass(frozen=True)
class Picture:
    """A picture on the page, with a note below it."""

    uri: str
    note: str
    lpips: float | None = None


@dataclass(frozen=True)
class Prompt:
    """One prompt and seed of one erasure, with the rows of every method."""

    first: Row
    rows: Mapping[str, Row]

    def files(self, methods: Sequence[str]) -> list[str]:
        return [self.first.before, *(self.rows[method].after for method in methods if method in self.rows)]


@dataclass(frozen=True)
class GalleryRow:
    """A row of the page; `after` has a picture for each method, or `None`."""

    forget: str
    artist: str
    is_forgotten: bool
    prompt: str
    seed: int
    before: Picture
    after: Mapping[str, Picture | None]


@dataclass(frozen=True)
class Gallery:
    """The content of `gallery.html.jinja`: `first` above the tables, and `rows` below them with filters."""

    first: Sequence[GalleryRow]
    rows: Sequence[GalleryRow]
    methods: Sequence[str]
    explanation: str
    note: str

    @property
    def erased_choices(self) -> Options:
        return [("", "any"), *((name, name) for name in dict.fromkeys(row.forget for row in self.rows))]

    @property
    def artist_choices(self) -> Options:
        artists = dict.fromkeys(row.artist for row in self.rows if row.artist)
        names = [(name, name) for name in artists]
        return [("", "any"), ("forgotten", "the forgotten one"), *names, ("none", "none")]

    @property
    def method_choices(self) -> Options:
        return [("", "all"), *((name, name) for name in self.methods)]

    @property
    def order_choices(self) -> Options:
        choices = [("", "prompts")]
        for method in self.methods:
            choices.append((f"{method}:d", f"LPIPS of {method}, largest first"))
            choices.append((f"{method}:a", f"LPIPS of {method}, smallest first"))
        return choices


def write_report(
    path: Path,
    images: Path,
    config: ArtistsConfig,
    rows: Sequence[Row],
    *,
    finding: str,
    tables: Sequence[Section],
) -> None:
    """
    Write the page: the finding, some pictures, the tables, how it was made, and more pictures: as many rows
    of each artist as fit into `BUDGET`. The page says how many.
    """
    prompts, methods, uris = _prompts(rows), methods_of(rows), _Uris(images)
    for own, other in CHOICES:
        shown = _first(prompts, own, other)
        if uris.estimated_bytes(shown, methods) <= BUDGET:
            break
    made = config.generation
    write_page(
        path,
        template="gallery.html.jinja",
        title=f"{config.of_kind.name.title()} erased: before and after",
        finding=finding,
        sections=[
            *tables,
            Section(
                "How it was made",
                folded=True,
                facts={
                    "model": config.model,
                    "weights": made.weights[:16],
                    "generated with": f"{config.generation_text}, {made.dtype} on {made.device}",
                    "prompts": f"{made.prompts}, sha256 {made.prompts_sha256[:16]}",
                    "judges": config.judges,
                    "targets": config.targets_text,
                    "commands": config.commands,
                },
            ),
        ],
        gallery=Gallery(
            [_gallery_row(prompt, methods, uris) for prompt in _first_of_each(prompts)],
            [_gallery_row(prompt, methods, uris) for prompt in shown],
            methods,
            EXPLANATION,
            f"{len(shown)} of {len(prompts)} rows are shown: of each erasure at most {own} of each forgotten "
            f"name and {other} of each other. All numbers are in rows.csv, all pictures in the folder "
            "images.",
        ),
    )


def _prompts(rows: Sequence[Row]) -> list[Prompt]:
    """The rows of all methods together; within each erasure, the forgotten artist's come first."""
    by_case: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault(row.case, {})[row.method] = row
    prompts = [Prompt(next(iter(methods.values())), methods) for methods in by_case.values()]
    order = {forget: i for i, forget in enumerate(dict.fromkeys(row.forget for row in rows))}
    return sorted(prompts, key=lambda prompt: (order[prompt.first.forget], not prompt.first.is_forgotten))


def _first(prompts: Sequence[Prompt], own: int, other: int) -> list[Prompt]:
    """For each erasure, the first `own` prompts of each forgotten artist and `other` of each other artist."""
    seen: Counter[tuple[str, str]] = Counter()
    first = []
    for prompt in prompts:
        key = (prompt.first.forget, prompt.first.concept)
        seen[key] += 1
        if seen[key] <= (own if prompt.first.is_forgotten else other):
            first.append(prompt)
    return first


def _first_of_each(prompts: Sequence[Prompt]) -> list[Prompt]:
    """From the first erasure, the first prompt of a few artists, starting with the forgotten one."""
    erased = [prompt for prompt in prompts if prompt.first.forget == prompts[0].first.forget]
    return _first(erased, 1, 1)[:FIRST]


class _Uris:
    """Pictures as data URIs, each encoded once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.encoded: dict[str, str] = {}

    def __getitem__(self, name: str) -> str:
        if name not in self.encoded:
            self.encoded[name] = self._encode(self.folder / name)
        return self.encoded[name]

    def estimated_bytes(self, prompts: Sequence[Prompt], methods: Sequence[str]) -> int:
        """Estimate the size of all pictures of prompts from about fifty of them."""
        names = [name for prompt in prompts for name in prompt.files(methods)]
        some = names[:: max(1, len(names) // 50)]
        return sum(len(self[name]) for name in some) * len(names) // max(1, len(some))

    @staticmethod
    def _encode(path: Path) -> str:
        image = Image.open(path)
        if max(image.size) <= SMALL:
            return png_uri(path)
        image.thumbnail((SIDE, SIDE))
        return image_uri(image)


def _gallery_row(prompt: Prompt, methods: Sequence[str], uris: _Uris) -> GalleryRow:
    first = prompt.first
    after: dict[str, Picture | None] = {}
    for method in methods:
        row = prompt.rows.get(method)
        if row is None:
            after[method] = None
            continue
        note = ", ".join([f"LPIPS {number(row.lpips)}", *_judged(row, "after")])
        after[method] = Picture(uris[row.after], note, row.lpips)
    return GalleryRow(
        forget=first.forget,
        artist=first.artist,
        is_forgotten=first.is_forgotten,
        prompt=first.prompt,
        seed=first.evaluation_seed,
        before=Picture(uris[first.before], ", ".join(_judged(first, "before"))),
        after=after,
    )


def _judged(row: Row, when: When) -> list[str]:
    """What the judges see in a picture, in plain words."""
    style, content = row.judged(when)
    judged = [f"taken for {style}"] if style else []
    if content is not None:
        judged.append(f"{row.thing or 'content'} {'recognised' if content else 'not recognised'}")
    return judged
