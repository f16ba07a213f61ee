"""Everything that the victims of a run share: the original, its pictures, the prompts and the judges."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from ...artists.generate import generate
from ...artists.judges import Judges
from ...artists.prompts import PromptRow
from ...errors import BenchmarkError


NAME = "{name}"  # replaces the concept's name in a caption
DRAWS = 6  # how often a prompt may be drawn until the original's picture shows the concept
APART = 1_000_000  # between the seeds of these draws


@dataclass(frozen=True)
class Pictures:
    """Pictures by the original, as an attacker has them."""

    images: Tensor  # uint8 `(n, 3, H, W)`
    latents: Tensor  # their scaled latents, float32 `(n, channels, h, w)`
    captions: Sequence[str]  # their prompts, with `NAME` in place of the concept's name

    def first(self, count: int) -> Pictures:
        """The first `count` pictures."""
        return Pictures(self.images[:count], self.latents[:count], self.captions[:count])

    def texts(self, name: str) -> list[str]:
        """The captions with a name filled in."""
        return [caption.replace(NAME, name) for caption in self.captions]


class Studio:
    """
    The original pipeline, which is not modified, with everything that attacks on all methods share.

    The `tests` are the prompts that are drawn to see whether an attack succeeds, at most `limit` of a
    concept. The `lessons` are those of an attacker's own pictures, with other seeds; preferably none of
    `tests`. The original's pictures are drawn once, whatever the number of victims.
    """

    def __init__(
        self,
        original: StableDiffusionPipeline,
        tests: Sequence[PromptRow],
        lessons: Sequence[PromptRow],
        judges: Judges,
        *,
        steps: int,
        guidance: float,
        batch_size: int = 20,
        limit: int | None = None,
    ):
        self.original, self.judges = original, judges
        self.all_tests, self._lessons, self.limit = tests, lessons, limit
        self.steps, self.guidance, self.batch_size = steps, guidance, batch_size
        self._cache: dict[tuple, Any] = {}

    def once(self, key: tuple, make: Callable[[], Any]) -> Any:
        """The result of `make()`, which is called only the first time for each key."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def kind(self, concept: str) -> str:
        """
        `"artist"` or `"thing"`: what the concept is in the test prompts.

        Raises:
            `BenchmarkError`: they do not name it.
        """
        for kind in ("artist", "thing"):
            if any(getattr(row, kind) == concept for row in self.all_tests):
                return kind
        raise BenchmarkError(f"The prompts name no artist and no thing {concept!r}. Add some that do.")

    def names(self, kind: str) -> list[str]:
        """Every artist or thing of the test prompts, in their order."""
        return list(dict.fromkeys(getattr(row, kind) for row in self.all_tests if getattr(row, kind)))

    def tests(self, concept: str) -> list[PromptRow]:
        """The test prompts that name a concept."""
        kind = self.kind(concept)
        return [row for row in self.all_tests if getattr(row, kind) == concept][: self.limit]

    def draw(
        self, pipe: StableDiffusionPipeline, texts: Sequence[str] | Tensor, seeds: Sequence[int]
    ) -> Tensor:
        """
        Draw one picture for each prompt, or for each prompt's features `(n, tokens, d)`.

        Returns:
            `Tensor`: uint8 `(n, 3, H, W)`, on the CPU.
        """
        settings = {"steps": self.steps, "guidance": self.guidance, "batch_size": self.batch_size}
        if not isinstance(texts, Tensor):
            return generate(pipe, texts, seeds, **settings)
        images = []
        for start in range(0, len(texts), self.batch_size):
            features = texts[start : start + self.batch_size]
            batch = seeds[start : start + len(features)]
            drawn = pipe(
                prompt_embeds=features.to(pipe.unet.device, pipe.unet.dtype),
                generator=[torch.Generator().manual_seed(seed) for seed in batch],
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                output_type="pt",
            ).images
            images.append((drawn.float() * 255).round().clamp(0, 255).to("cpu", torch.uint8))
        return torch.cat(images)

    def shows(self, images: Tensor, rows: Sequence[PromptRow], concept: str) -> list[bool]:
        """Whether the judges see the concept in each picture."""
        artists, content = self.judges.judge(images, rows)
        if self.kind(concept) == "artist":
            return [artist == concept for artist in artists]
        return [bool(seen) for seen in content]

    def pictures(self, concept: str, count: int) -> Pictures:
        """
        Pictures by the original in which the judges see the concept, each from a different prompt.

        If the picture of a prompt does not show it, the prompt may be drawn again with another seed, as
        somebody who collects pictures would do.
        """
        return self.once(("pictures", concept, count), lambda: self._draw_pictures(concept, count))

    def _draw_pictures(self, concept: str, count: int) -> Pictures:
        # 1. The distinct lessons with the concept in place of whatever they name.
        kind = self.kind(concept)
        captions: dict[str, PromptRow] = {}
        for row in self._lessons:
            if name := getattr(row, kind):
                captions[_with_name(row.prompt, name, NAME)] = row
        rows = [replace(row, prompt=caption, **{kind: concept}) for caption, row in captions.items()]

        # 2. Draw every lesson once, then again those whose pictures did not show it.
        shown: dict[int, Tensor] = {}
        for draw in range(DRAWS):
            missing = [i for i in range(len(rows)) if i not in shown]
            for start in range(0, len(missing), self.batch_size):
                if len(shown) >= count:
                    break
                batch = missing[start : start + self.batch_size]
                prompts = [rows[i].prompt.replace(NAME, concept) for i in batch]
                images = self.draw(self.original, prompts, [APART * (draw + 1) + i for i in batch])
                hits = self.shows(images, [rows[i] for i in batch], concept)
                shown |= {i: image for i, image, hit in zip(batch, images, hits, strict=True) if hit}

        # 3. Take the first `count` of them.
        numbers = sorted(shown)[:count]
        if len(numbers) < count:
            raise BenchmarkError(
                f"The original drew {len(numbers)} pictures that show {concept!r}, and an attack needs "
                f"{count}. Ask for fewer, or give more prompts."
            )
        images = torch.stack([shown[i] for i in numbers])
        return Pictures(images, self.encode(images), [rows[i].prompt for i in numbers])

    def others(self, concept: str, count: int) -> Pictures:
        """Pictures of other artists or things, with captions that name them."""
        return self.once(("others", concept, count), lambda: self._draw_others(concept, count))

    def _draw_others(self, concept: str, count: int) -> Pictures:
        rows = [row for row in self._lessons if concept not in (row.artist, row.thing)]
        rows = rows[:: max(1, len(rows) // count)][:count]  # spread over the file, not all of one artist
        captions = [row.prompt for row in rows]
        images = self.draw(self.original, captions, [row.evaluation_seed for row in rows])
        return Pictures(images, self.encode(images), captions)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The scaled latents of pictures, float32 `(n, channels, h, w)`."""
        vae = self.original.vae
        pixels = (images.float() / 127.5 - 1).to(vae.device, vae.dtype)
        latents = [vae.encode(batch).latent_dist.mode() for batch in pixels.split(self.batch_size)]
        return torch.cat(latents).float() * vae.config.scaling_factor


def _with_name(prompt: str, name: str, other: str) -> str:
    """A prompt with `other` in place of `name`."""
    return re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", other, prompt)
