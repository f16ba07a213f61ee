"""Who says what is in a picture: is the style still recognised, is the thing still there? LPIPS cannot, noise scores best on it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from ...core.errors import MoreError
from ...data import load_lpips
from .prompts import PromptRow


JUDGES_FILE = Path(__file__).parents[2] / "data" / "judges.safetensors"
CLIP_MEAN, CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's, of most models


class JudgeError(MoreError, ValueError):
    """A judge does not know a name that it is asked about."""


@torch.no_grad()
def pooled_features(lpips_model: nn.Module, images: Tensor, batch_size: int = 64) -> Tensor:
    """Describe images `(n, 3, H, W)` in [-1, 1]: mean, deviation and maximum over the image of AlexNet's five layers, `(n, 3456)`.

    The images are resized to 128 x 128 first: AlexNet's first stride would eat the thin lines of smaller ones.
    """
    rows = []
    for batch in images.split(batch_size):
        x = interpolate(batch, size=(128, 128), mode="bilinear", align_corners=False)
        layers = lpips_model.net(lpips_model.scaling_layer(x))
        rows.append(torch.cat([pool for h in layers for pool in (h.mean((2, 3)), h.std((2, 3)), h.amax((2, 3)))], dim=1))
    return torch.cat(rows)


class EmojiJudges:
    """The embedded pipeline's judges: linear classifiers of artist and thing over pooled AlexNet features, made from real images only.

    Attributes:
        artists (`list[str]`), things (`list[str]`): what they tell apart.
        facts (`dict`): measured on real images that they were not fitted on, in percent and by artist: `artist_accuracy`,
            `thing_accuracy`, the same after the pipeline's VAE (`_vae`), and `confusion`: {artist: {artist taken for: percent}}.
    """

    def __init__(self, device: torch.device | str = "cpu", path: str | Path = JUDGES_FILE):
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = json.loads(file.metadata()["more_hf"])
            self.weights = {name: file.get_tensor(name).float().to(device) for name in file.keys()}  # noqa: SIM118
        self.device = torch.device(device)
        self.artists: list[str] = metadata["artists"]
        self.things: list[str] = metadata["things"]
        self.facts: dict[str, Any] = metadata["facts"]
        self.name = f"emoji judges, sha256 {hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}"
        self.lpips = load_lpips().to(self.device)

    def check(self, rows: Sequence[PromptRow]) -> None:
        """Raises `JudgeError` if a row has an artist or a thing that the judges cannot recognise."""
        for row in rows:
            for word, name, known in (("artist", row.artist, self.artists), ("thing", row.thing, self.things)):
                if name and name not in known:
                    raise JudgeError(f"Case {row.case_number} has the {word} {name!r}. The embedded pipeline's judges do not know it.")

    def judge(self, images: Tensor, rows: Sequence[PromptRow]) -> tuple[list[str], list[int | None]]:
        """What uint8 images `(n, 3, H, W)` show: the artist each is taken for, and whether (1, 0) it is taken for its row's thing."""
        z = pooled_features(self.lpips, images.to(self.device).float() / 127.5 - 1)
        z = (z - self.weights["mean"]) / self.weights["deviation"]
        artist = (z @ self.weights["artist.weight"].T + self.weights["artist.bias"]).argmax(1).tolist()
        thing = (z @ self.weights["thing.weight"].T + self.weights["thing.bias"]).argmax(1).tolist()
        content = [int(self.things[t] == row.thing) if row.thing else None for t, row in zip(thing, rows, strict=True)]
        return [self.artists[a] for a in artist], content


class ClipJudges:
    """Judges for other pipelines: an open_clip model, zero-shot.

    Style: the artist whose sentence "a picture in the style of ..." is nearest to the image, among all artists of the prompts.
    Content: the row's own prompt, with "the artist" for the name, is nearer to the image than every other prompt of the same artist
    (equal sentences count as one). With 20 prompts an artist, chance is 5 %.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        rows: Sequence[PromptRow],
        *,
        mean: Sequence[float] = CLIP_MEAN,
        deviation: Sequence[float] = CLIP_DEVIATION,
        name: str = "CLIP",
        device: torch.device | str = "cpu",
    ):
        self.model = model.to(device).eval().requires_grad_(False)
        self.mean, self.deviation = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, deviation))
        self.tokenizer, self.device, self.name = tokenizer, torch.device(device), name
        self.artists = list(dict.fromkeys(row.artist for row in rows if row.artist))
        self.facts: dict[str, Any] = {}
        self.styles = self._encode([f"a picture in the style of {artist}" for artist in self.artists])
        self.sentences = {a: list(dict.fromkeys(without_artist(r.prompt, a) for r in rows if r.artist == a)) for a in (*self.artists, "")}
        self.contents = {artist: self._encode(sentences) for artist, sentences in self.sentences.items() if sentences}

    @classmethod
    def load(cls, rows: Sequence[PromptRow], *, model: str, pretrained: str, device: torch.device | str = "cpu") -> ClipJudges:
        """Build from open_clip's names of an architecture and its weights; downloads them if they are not in the cache.

        Raises `JudgeError` if open_clip knows no such model or cannot get its weights.
        """
        import open_clip

        try:
            clip = open_clip.create_model(model, pretrained=pretrained)
        except (RuntimeError, OSError) as error:
            raise JudgeError(f"No CLIP judge {model} {pretrained}: {error} Name another one, or do without (`--judges none`).") from error
        pixels = {"mean": clip.visual.image_mean, "deviation": clip.visual.image_std}
        return cls(clip, open_clip.get_tokenizer(model), rows, **pixels, name=f"CLIP {model} {pretrained}", device=device)

    @torch.no_grad()
    def _encode(self, sentences: Sequence[str]) -> Tensor:
        return normalize(self.model.encode_text(self.tokenizer(list(sentences)).to(self.device)).float(), dim=1)

    def check(self, rows: Sequence[PromptRow]) -> None:
        """Raises `JudgeError` if a row is not among those that the judges were built for."""
        for row in rows:
            if without_artist(row.prompt, row.artist) not in self.sentences.get(row.artist, ()):
                raise JudgeError(f"Case {row.case_number} is not among the prompts that the CLIP judges were built for.")

    @torch.no_grad()
    def judge(self, images: Tensor, rows: Sequence[PromptRow]) -> tuple[list[str], list[int | None]]:
        """What uint8 images `(n, 3, H, W)` show: the artist each is taken for, and whether (1, 0) its own prompt fits it best."""
        side = self.model.visual.image_size
        size = (side, side) if isinstance(side, int) else tuple(side)
        x = interpolate(images.to(self.device).float() / 255, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        z = normalize(self.model.encode_image((x - self.mean) / self.deviation).float(), dim=1)
        style = [self.artists[i] for i in (z @ self.styles.T).argmax(1).tolist()]
        content: list[int | None] = []
        for image, row in zip(z, rows, strict=True):
            best = int((self.contents[row.artist] @ image).argmax())
            content.append(int(self.sentences[row.artist][best] == without_artist(row.prompt, row.artist)))
        return style, content


def without_artist(prompt: str, artist: str) -> str:
    """The prompt with "the artist" where it names the artist: by full name, by what stands before a colon, or by surname.

    "A wheat field in Van Gogh's style" gives "A wheat field in the artist's style".
    """
    if not artist:
        return prompt
    names = sorted({artist, artist.split(":")[0], artist.split()[-1]}, key=len, reverse=True)
    return re.sub(rf"(?<!\w)(?:{'|'.join(map(re.escape, names))})(?!\w)", "the artist", prompt, flags=re.IGNORECASE)
