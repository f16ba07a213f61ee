"""
Judge what a picture shows: is the style still recognised, is the thing still there? LPIPS, which is here as
well, cannot tell: noise would score best.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from more_hf.data import FOLDER, load_lpips
from more_hf.tuning.clip import Clip, JudgeError
from more_hf.tuning.judge import lpips_distance, pooled_features

from .prompts import PromptRow


JUDGES_FILE = FOLDER / "judges.safetensors"


class Judges(Protocol):
    """The interface of judges."""

    name: str  # the judges' name, for the configuration
    facts: dict[str, Any]  # facts about how well they judge; may be empty

    def check(self, rows: Sequence[PromptRow]) -> None:
        """Raises `JudgeError` if a row cannot be judged."""

    def judge(self, images: Tensor, rows: Sequence[PromptRow]) -> tuple[list[str], list[int | None]]:
        """
        Judge uint8 images `(n, 3, H, W)` by their prompts: the artist that each image is taken for, and
        whether (1, 0) its row's thing is recognised; `None` if the row has none.
        """


class EmojiJudges:
    """
    The embedded pipeline's judges: linear classifiers of artist and thing over pooled AlexNet features,
    fitted on real images only; by default those of the package.

    Attributes:
        artists, things (`list[str]`):
            The names they know.
        facts (`dict[str, Any]`):
            Measured on held-out real images, in percent and by artist: `artist_accuracy`, `thing_accuracy`,
            the same after the pipeline's VAE (`_vae`), and `confusion`: {artist: {artist that it is taken
            for: percent}}.
    """

    def __init__(self, device: torch.device | str = "cpu", path: str | Path = JUDGES_FILE):
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = json.loads(file.metadata()["more_hf"])
            names = file.keys()
            self.weights = {name: file.get_tensor(name).float().to(device) for name in names}
        self.device = torch.device(device)
        self.artists: list[str] = metadata["artists"]
        self.things: list[str] = metadata["things"]
        self.facts: dict[str, Any] = metadata["facts"]
        self.name = f"emoji judges, sha256 {hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}"
        self.lpips = load_lpips().to(self.device)

    def check(self, rows: Sequence[PromptRow]) -> None:
        """Raises `JudgeError` if a row has an artist or a thing that the judges do not know."""
        known = {"artist": ["", *self.artists], "thing": ["", *self.things]}
        for row, word in itertools.product(rows, known):
            name = getattr(row, word)
            if name not in known[word]:
                raise JudgeError(
                    f"Case {row.case_number} has the {word} {name!r}, which the embedded pipeline's judges "
                    "do not know. Leave the row out, or judge with CLIP (`judges`: clip)."
                )

    def names(self, images: Tensor) -> tuple[list[str], list[str]]:
        """The artist and the thing that each of uint8 images `(n, 3, H, W)` is taken for."""
        z = pooled_features(self.lpips, images.to(self.device).float() / 127.5 - 1)
        z = (z - self.weights["mean"]) / self.weights["deviation"]
        artist = (z @ self.weights["artist.weight"].T + self.weights["artist.bias"]).argmax(1).tolist()
        thing = (z @ self.weights["thing.weight"].T + self.weights["thing.bias"]).argmax(1).tolist()
        return [self.artists[seen] for seen in artist], [self.things[seen] for seen in thing]

    def judge(self, images: Tensor, rows: Sequence[PromptRow]) -> tuple[list[str], list[int | None]]:
        """Judge images; see `Judges.judge`."""
        artists, things = self.names(images)
        content: list[int | None] = []
        for seen, row in zip(things, rows, strict=True):
            content.append(int(seen == row.thing) if row.thing else None)
        return artists, content


class ClipJudges(Clip):
    """
    Judges for other pipelines: an open_clip model, zero-shot.

    Style is the artist whose sentence "a picture in the style of ..." is nearest to the image, among all
    artists of the prompts. Content is whether the row's own prompt, with "the artist" in place of the name,
    is nearer to the image than every other prompt of the same artist (equal sentences count as one). With 20
    prompts an artist, chance is 5 %. If prompts have levels, the thing is used instead of the prompt.

    The model has `encode_image`, `encode_text` and `visual.image_size`, like open_clip's; `rows` are all that
    will be judged, and `options` those of [`Clip`].
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        rows: Sequence[PromptRow],
        **options: Any,
    ):
        super().__init__(model, tokenizer, **options)
        self.artists = list(dict.fromkeys(row.artist for row in rows if row.artist))
        self.facts: dict[str, Any] = {}
        self.styles = self.encode([f"a picture in the style of {artist}" for artist in self.artists])
        self.sentences: dict[str, list[str]] = {}
        for row in rows:
            sentences = self.sentences.setdefault(row.artist, [])
            if sentence_of(row) not in sentences:
                sentences.append(sentence_of(row))
        self.contents = {artist: self.encode(sentences) for artist, sentences in self.sentences.items()}

    def scores(self, images: Tensor, rows: Sequence[PromptRow]) -> list[float]:
        """The CLIP score of each image's content: 100 times its cosine with what its row asks for besides
        the artist."""
        sentences = self.encode([sentence_of(row) for row in rows])
        return (100 * (self.embed(images) * sentences).sum(1)).tolist()

    def check(self, rows: Sequence[PromptRow]) -> None:
        """Raises `JudgeError` if the judges were not built for a row."""
        for row in rows:
            if sentence_of(row) not in self.sentences.get(row.artist, ()):
                raise JudgeError(
                    f"Case {row.case_number} is not among the prompts that the CLIP judges were built for. "
                    "Build them from all rows."
                )

    @torch.no_grad()
    def judge(self, images: Tensor, rows: Sequence[PromptRow]) -> tuple[list[str], list[int | None]]:
        """Judge images; see `Judges.judge`."""
        z = self.embed(images)
        style = [self.artists[i] for i in (z @ self.styles.T).argmax(1).tolist()]
        content: list[int | None] = []
        for image, row in zip(z, rows, strict=True):
            best = int((self.contents[row.artist] @ image).argmax())
            content.append(int(self.sentences[row.artist][best] == sentence_of(row)))
        return style, content


def sentence_of(row: PromptRow) -> str:
    """What a row asks for besides its artist; its thing if levels say the same in other words."""
    return f"a picture of {row.thing}" if row.level else without_artist(row.prompt, row.artist)


def without_artist(prompt: str, artist: str) -> str:
    """
    Replace the artist in a prompt by "the artist": the full name, the part before a colon, or the surname.

    "A wheat field in Van Gogh's style" gives "A wheat field in the artist's style".
    """
    if not artist:
        return prompt
    names = sorted({artist, artist.split(":")[0], artist.split()[-1]}, key=len, reverse=True)
    return re.sub(
        rf"(?<!\w)(?:{'|'.join(map(re.escape, names))})(?!\w)", "the artist", prompt, flags=re.IGNORECASE
    )


NATIVE, ANTIALIASED, PLAIN = DISTANCES = ("lpips", "lpips_64", "lpips_64_rece")  # of `rows.csv`
LPIPS = (
    "LPIPS(alex) 0.1; native size, and resized to 64 with (lpips_64) and without (lpips_64_rece) antialias"
)


def all_distances(before: Tensor, after: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Measure LPIPS in each of the three ways: column -> distances `(n,)`, on the CPU."""
    if before is after:
        return dict.fromkeys(DISTANCES, torch.zeros(len(after)))
    before, after = before.to(device), after.to(device)
    native = lpips_distance(before, after)
    if before.shape[-2:] == (64, 64):
        return dict.fromkeys(DISTANCES, native)
    distances = {NATIVE: native}
    for name, antialias in ((ANTIALIASED, True), (PLAIN, False)):
        small = [resize_64(images, antialias=antialias) for images in (before, after)]
        distances[name] = lpips_distance(*small)
    return distances


def resize_64(images: Tensor, *, antialias: bool) -> Tensor:
    """
    Resize uint8 images to 64 x 64, bilinear, rounded to uint8: with antialiasing as UCE measures, without as
    RECE does.
    """
    small = interpolate(images.float(), (64, 64), mode="bilinear", align_corners=False, antialias=antialias)
    return small.round().clamp(0, 255).to(torch.uint8)
