"""What all victims of a run share: the original, its pictures, the prompts, and who judges."""

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


NAME = "{name}"  # stands in a caption where the concept was named
DRAWS = 6  # how often a prompt may be drawn until the original's picture shows what was asked for
APART = 1_000_000  # between the seeds of these draws


@dataclass(frozen=True)
class Pictures:
    """Pictures that the original drew, as an attacker has them.

    Attributes:
        images (`Tensor`): uint8 `(n, 3, H, W)`.
        latents (`Tensor`): what the VAE makes of them, scaled, float32 `(n, channels, h, w)`.
        captions (`Sequence[str]`): with `NAME` in the place of the concept's name.
    """

    images: Tensor
    latents: Tensor
    captions: Sequence[str]

    def first(self, count: int) -> Pictures:
        """The first so many of them."""
        return Pictures(self.images[:count], self.latents[:count], self.captions[:count])

    def texts(self, name: str) -> list[str]:
        """The captions with a name."""
        return [caption.replace(NAME, name) for caption in self.captions]


class Studio:
    """The original pipeline with everything that attacks on all methods share.

    What the original draws is drawn once, whatever the number of victims.

    Args:
        original (`StableDiffusionPipeline`): before any erasure; not modified.
        tests (`Sequence[PromptRow]`): what is drawn to see whether an attack succeeded.
        lessons (`Sequence[PromptRow]`): the prompts of an attacker's own pictures, of other seeds; best none
            of `tests`.
        judges (`Judges`): of style and thing.
        steps (`int`), guidance (`float`), batch_size (`int`): how everything is drawn.
        limit (`int`, *optional*): at most so many test prompts of a concept.
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
        self._tests, self._lessons, self.limit = tests, lessons, limit
        self.steps, self.guidance, self.batch_size = steps, guidance, batch_size
        self._known: dict[tuple, Any] = {}

    def once(self, key: tuple, make: Callable[[], Any]) -> Any:
        """What `make()` gave the first time that it was asked for under this key."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def kind(self, concept: str) -> str:
        """`"artist"` or `"thing"`: what the test prompts have the concept as.

        Raises:
            `BenchmarkError`: if they do not have it.
        """
        for kind in ("artist", "thing"):
            if any(getattr(row, kind) == concept for row in self._tests):
                return kind
        raise BenchmarkError(f"The prompts name no artist and no thing {concept!r}. Add some that do.")

    def names(self, kind: str) -> list[str]:
        """Every artist or thing of the test prompts, in their order."""
        return list(dict.fromkeys(getattr(row, kind) for row in self._tests if getattr(row, kind)))

    def tests(self, concept: str) -> list[PromptRow]:
        """The test prompts that name a concept."""
        kind = self.kind(concept)
        return [row for row in self._tests if getattr(row, kind) == concept][: self.limit]

    def draw(
        self, pipe: StableDiffusionPipeline, texts: Sequence[str] | Tensor, seeds: Sequence[int]
    ) -> Tensor:
        """Draw one picture for each prompt, or for each prompt's features `(n, tokens, d)`.

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
        """Pictures by the original that the judges see the concept in, each of another prompt.

        A prompt whose picture does not show it may be drawn again with another seed, as a person would who
        collects pictures.
        """
        return self.once(("pictures", concept, count), lambda: self._draw_pictures(concept, count))

    def _draw_pictures(self, concept: str, count: int) -> Pictures:
        kind = self.kind(concept)
        rows = [row for row in self._lessons if getattr(row, kind)]
        by_caption = {_named(row.prompt, getattr(row, kind), NAME): row for row in rows}
        wanted = [replace(row, prompt=text, **{kind: concept}) for text, row in by_caption.items()]
        found: dict[int, Tensor] = {}
        # Every prompt once, then those again whose pictures did not show it.
        for draw in range(DRAWS):
            left = [i for i in range(len(wanted)) if i not in found]
            for start in range(0, len(left), self.batch_size):
                if len(found) >= count:
                    break
                batch = left[start : start + self.batch_size]
                prompts = [wanted[i].prompt.replace(NAME, concept) for i in batch]
                images = self.draw(self.original, prompts, [APART * (draw + 1) + i for i in batch])
                seen = self.shows(images, [wanted[i] for i in batch], concept)
                found |= {i: image for i, image, hit in zip(batch, images, seen, strict=True) if hit}
        chosen = sorted(found)[:count]
        if len(chosen) < count:
            raise BenchmarkError(
                f"The original drew {len(chosen)} pictures that show {concept!r}, and an attack needs "
                f"{count}. Ask for fewer, or give more prompts."
            )
        images = torch.stack([found[i] for i in chosen])
        return Pictures(images, self.encode(images), [wanted[i].prompt for i in chosen])

    def others(self, concept: str, count: int) -> Pictures:
        """Pictures of other artists or things, under captions with their own names."""
        return self.once(("others", concept, count), lambda: self._draw_others(concept, count))

    def _draw_others(self, concept: str, count: int) -> Pictures:
        rows = [row for row in self._lessons if concept not in (row.artist, row.thing)]
        rows = rows[:: max(1, len(rows) // count)][:count]  # from the whole file, not from its first artist
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


def _named(prompt: str, name: str, other: str) -> str:
    """A prompt with another name in the place of one that it has."""
    return re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", other, prompt)
