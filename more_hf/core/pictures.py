"""A concept given by pictures: a folder of them, with a caption for each or none."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from .errors import PrototypeError, shown


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
METADATA = "metadata.jsonl"  # the captions, as the `imagefolder` of `datasets` has them
# What one or two pictures have in common is as much what they happen to show as the concept.
FEWEST = 3
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Pictures:
    """
    A folder of pictures of what is to be forgotten, in place of its name, for `reach="denoiser"`.

    For an artist whose name the text encoder does not know, a look that a LoRA brought along, or a person. A
    picture's caption is the text in `NAME.txt` beside it, or the `text` of its `file_name` in
    `metadata.jsonl`. In a caption, the name or `{}` is where a target's name goes; after one without either,
    the target's name follows. Folders inside the folder are not read.

    Args:
        folder (`str` or `Path`):
            The folder. It is read now, for the number and the hash, and again for each edit. A record has
            `None`, since it never holds the pictures or where they were.
        name (`str`, *optional*):
            What prompts call it: the layers that read the prompt are edited for this name, too. Without it
            they stay as they are, and a name that the model does know still draws it (measured in
            `benchmarks/attacks/pictures`), the more so if ordinary prompts have it, since what they draw is
            spared: then pass `everyday` without those.
        number, sha256 (*optional*):
            How many pictures there are, and the hash of their files and captions; found in the folder.

    Raises:
        `PrototypeError`: the folder does not exist, has fewer than three pictures, or has captions that
        cannot be read.

    Example:

        >>> from pathlib import Path
        >>> import more_hf
        >>> pipe, folder = more_hf.load_emoji_sd(), Path("blobs")
        >>> folder.mkdir()
        >>> for i, image in enumerate(pipe(["a Blobmoji cat face"] * 3, num_inference_steps=4).images):
        ...     image.save(folder / f"{i}.png")
        >>> blobs, few = more_hf.Pictures(folder), {"num_inference_steps": 4}
        >>> pipe = more_hf.erase_concept(
        ...     pipe, blobs, remap_to="Fluent", reach="denoiser", pictures=3, sampling=few
        ... )
    """

    folder: Path | None = field(compare=False)
    name: str | None = None
    number: int = 0
    sha256: str = ""

    def __post_init__(self) -> None:
        if self.folder is None:
            return
        object.__setattr__(self, "folder", Path(self.folder))
        captions, digest = self.captions(), hashlib.sha256()
        if len(captions) < FEWEST:
            raise PrototypeError(
                f"{self.folder} has {len(captions)} picture(s) ({', '.join(SUFFIXES)}; folders inside it are "
                f"not read), too few to tell the concept from what they happen to show. Add some, to at "
                f"least {FEWEST}."
            )
        for file, caption in captions.items():
            digest.update(hashlib.sha256(file.read_bytes()).digest() + caption.encode())
        object.__setattr__(self, "number", len(captions))
        object.__setattr__(self, "sha256", digest.hexdigest())

    @property
    def label(self) -> str:
        """The concept's name in reports; without one, the folder's."""
        return self.folder.resolve().name if self.name is None else self.name

    def captions(self) -> dict[Path, str]:
        """Each picture and its caption, in the order of their file names; empty where it has none."""
        if not self.folder.is_dir():
            raise PrototypeError(f"{self.folder} is no folder. Name the one that has the pictures in it.")
        listed, found = _listed_captions(self.folder / METADATA), {}
        for file in sorted(self.folder.iterdir()):
            if file.suffix.lower() in SUFFIXES:
                beside = file.with_suffix(".txt")
                text = beside.read_text("utf-8-sig") if beside.is_file() else listed.get(file.name, "")
                found[file] = " ".join(text.split())
        return found

    def require_folder(self) -> None:
        """Raises `PrototypeError` if the pictures are not here, or no longer those of the hash."""
        if self.folder is None:
            raise PrototypeError(
                f"A concept was given by {self.number} pictures (sha256 {self.sha256[:12]}), which a record "
                "does not hold. Erase again with `more_hf.Pictures` of their folder."
            )
        if (now := Pictures(self.folder, self.name)) != self:
            raise PrototypeError(
                f"The {now.number} pictures or captions in {self.folder} are not the {self.number} that were "
                "there before. Restore the folder, or erase again from the original."
            )

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, without the folder."""
        return {"name": self.name, "number": self.number, "sha256": self.sha256}

    @classmethod
    def from_dict(cls, argument: str, data: Any) -> Self:
        """The inverse of `to_dict`. Raises `PrototypeError` for anything else."""
        found = data if isinstance(data, Mapping) else {}
        name, number, sha256 = (found.get(key) for key in ("name", "number", "sha256"))
        right = isinstance(name, str | None) and type(number) is int and number >= FEWEST
        if not right or not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
            raise PrototypeError(
                f"`{argument}` needs the name, number and sha256 of pictures, got {shown(data)}."
            )
        return cls(None, name, number, sha256)


def _listed_captions(file: Path) -> dict[str, str]:
    """File name -> caption, from a file with a JSON object on each line; empty if there is none."""
    if not file.is_file():
        return {}
    try:
        rows = [json.loads(line) for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
        return {row["file_name"]: "" + row["text"] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise PrototypeError(
            f"{file} needs a line of JSON with `file_name` and `text` for each picture, and one has not "
            f"({error!r}). Correct it, or remove it."
        ) from error
