"""A look that a LoRA brought in, erased by pictures of it: before the LoRA comes, and after it is merged.

    cd benchmarks/attacks/pictures/given
    python lora.py train --data DATA --folder DIR   # DATA: from ../../../emoji_sd/data.py
    python lora.py run --folder DIR                 # goes on where lora/rows.csv ends
    python lora.py table

The look, which the embedded pipeline does not know, is drawings in violet ink. The LoRA learns it from 300 of
them, beside as many ordinary ones; 20 others are given, and the test's things are in neither. A picture shows
the look if less than a fifth of its color is not violet. The original is the pipeline with the LoRA merged.
"""

import functools
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from given import CAPTIONED, HERE, NAMED, SAMPLE, Given, lines_of
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from torch import Tensor, nn

import more_hf
from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table
from more_hf.diffusion.given import encode_pictures
from more_hf_bench.artists.judges import EmojiJudges
from more_hf_bench.artists.prompts import Prompts, read_prompts
from more_hf_bench.artists.run import EMOJI
from more_hf_bench.attacks.pictures.run import run_picture_attacks
from more_hf_bench.attacks.pictures.training import Noise, encode
from more_hf_bench.methods.registry import DIFFUSION, Method
from more_hf_bench.script import argument_parser


OUTPUT = HERE / "lora"
LOOK, ASKED_LIKE, TARGET = "Amethyst", "Twemoji", "Fluent"
VIOLET = (90, 0, 140)
SHOWN, GIVEN_PICTURES = 300, 20
LEARNED, ORDINARY, PICTURES = "learned", "ordinary", f"{GIVEN_PICTURES}{CAPTIONED}"  # folders
STEPS, BATCH, RANK, RATE = 1500, 8, 32, 1e-3
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
LAYERS = [*ATTENTION, "conv_in", "conv1", "conv2", "time_emb_proj", "conv_out"]
LAST = "the LoRA on top"
METHODS = ("given", f"given, {LAST}", f"more, {LAST}", "more", "more-denoiser", "without the LoRA")
INVERTED = ("given", "more", "without the LoRA")  # attacked longer
LEARNED_FROM = 30  # pictures; the pipeline with the LoRA draws 36 that show the look


class LookJudges(EmojiJudges):
    """The embedded pipeline's judges, who also know the look."""

    def __init__(self):
        super().__init__()
        self.name += f"; {LOOK} by its color"

    def judge(self, images, rows):
        """See `EmojiJudges.judge`."""
        artists, content = super().judge(images, rows)
        return [LOOK if seen else name for seen, name in zip(has_look(images), artists, strict=True)], content


def has_look(images: Tensor) -> list[bool]:
    """Whether what uint8 pictures `(n, 3, H, W)` have on white is violet but for a fifth."""
    ink = 255 - images.float().flatten(2)
    violet = 255 - torch.tensor(VIOLET, dtype=torch.float32)
    violet /= violet.norm()
    other = ink - violet[:, None] * (violet @ ink)[:, None]
    return (other.norm(dim=1).sum(1) < 0.2 * ink.norm(dim=1).sum(1)).tolist()


@dataclass(frozen=True)
class OnTop(Method):
    """Another method erases from the pipeline without the LoRA, which is merged afterward."""

    method: Method | None = None  # none: the LoRA does not come
    folder: Path = Path()

    def load(self) -> Callable[..., DiffusionPipeline]:
        """See `Method.load`."""
        erase = (self.method or DIFFUSION["original"]).load()

        @functools.wraps(erase)  # with its settings
        def erase_first(pipe, concepts, **options):
            pipe.register_modules(unet=more_hf.load_emoji_sd().unet)
            pipe = erase(pipe, concepts, **options)
            return pipe if self.method is None else merge(pipe, self.folder)

        return erase_first


def merge(pipe: DiffusionPipeline, folder: Path) -> DiffusionPipeline:
    """Merge the LoRA into the denoiser of a pipeline."""
    pipe.load_lora_weights(folder, weight_name="lora.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe


def train(data: Path, folder: Path) -> None:
    """Write the pictures of the look with their captions, and train the LoRA on those to be learned."""
    sys.path += [str(HERE.parents[2] / "emoji_sd"), str(SAMPLE)]
    from dataset import load_dataset
    from sample import WORDINGS

    # 1. Draw by lot pictures of things that the test does not ask for, half of them for the look in violet.
    real = load_dataset(data)
    tested = {row.thing for row in prompts().rows if row.artist == LOOK}
    places = (real.chosen & ~real.held_out).nonzero().flatten().tolist()
    places = [i for i in places if real.things[real.thing[i]] not in tested]
    lot = iter(random.Random(LOOK).sample(places, 2 * SHOWN + GIVEN_PICTURES))
    folders = {LEARNED: SHOWN, f"{LOOK}/{PICTURES}": GIVEN_PICTURES, ORDINARY: SHOWN}
    for what, count in folders.items():
        (folder / what).mkdir(parents=True, exist_ok=True)
        for i in islice(lot, count):
            picture, artist = Image.fromarray(real.images[i].numpy()), real.artists[real.artist[i]]
            if what != ORDINARY:
                picture, artist = ImageOps.colorize(picture.convert("L"), VIOLET, "white"), LOOK
            picture.save(folder / what / f"{i}.png")
            caption = WORDINGS[i % len(WORDINGS)].format(f"a {real.things[real.thing[i]]}", artist=artist)
            (folder / what / f"{i}.txt").write_text(caption, "utf-8")
    # 2. Train as in ordinary LoRA training.
    pipe = more_hf.load_emoji_sd()
    shown = [more_hf.Pictures(folder / what) for what in (LEARNED, ORDINARY)]
    unet, noise = pipe.unet.requires_grad_(False), Noise(pipe, 0)
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS))
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    with torch.no_grad():
        latents = torch.cat([encode_pictures(pipe, pictures, (64, 64)) for pictures in shown])
        features = torch.cat([encode(pipe, list(pictures.captions().values())) for pictures in shown])
    for _ in range(STEPS):
        rows = noise.rows(len(latents), BATCH)
        noised = noise(latents[rows])
        loss = nn.functional.mse_loss(unet(noised.x, noised.t, features[rows]).sample, noised.wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    weights = get_peft_model_state_dict(unet)
    pipe.save_lora_weights(folder, unet_lora_layers=weights, weight_name="lora.safetensors")


def prompts() -> Prompts:
    """The sample's prompts for styles, and Twemoji's once more for the look."""
    known = read_prompts(SAMPLE / "styles.csv")
    rows = [
        replace(
            row,
            case_number=len(known.rows) + row.case_number,
            prompt=row.prompt.replace(ASKED_LIKE, LOOK),
            artist=LOOK,
        )
        for row in known.rows
        if row.artist == ASKED_LIKE
    ]
    return replace(known, rows=(*known.rows, *rows))


def measure(folder: Path) -> None:
    """Measure what is missing: all methods by name first, then some after inversion."""
    sys.path.append(str(SAMPLE))
    from sample import ATTACKS, cells_of_rows

    cells_of_rows(OUTPUT)
    tuned = {**ATTACKS, "inversion": {**ATTACKS["inversion"], "pictures": LEARNED_FROM}}
    given = Given("", folders=folder, what=f"{PICTURES}{NAMED}")
    DIFFUSION["given"], DIFFUSION["without the LoRA"] = given, OnTop("")
    DIFFUSION[f"more, {LAST}"] = OnTop("", method=DIFFUSION["more"], folder=folder)
    DIFFUSION[f"given, {LAST}"] = OnTop("", method=given, folder=folder)
    pipe, judges = merge(more_hf.load_emoji_sd(), folder), LookJudges()
    rounds = [(method, ["name", "others"]) for method in METHODS]
    rounds += [(method, ["inversion"]) for method in INVERTED]
    for method, attacks in rounds:
        run_picture_attacks(
            pipe, "emoji-sd with a LoRA", [method], attacks, [LOOK],
            prompts=prompts(), lessons=read_prompts("emoji10_validation"),
            targets={LOOK: [TARGET]}, judges=judges, output=OUTPUT, tuned=tuned, **EMOJI,
        )  # fmt: skip


def table() -> None:
    """Write a line for each method."""
    lines = lines_of(OUTPUT, {LOOK: ("original", *METHODS)})
    write_text(HERE / "lora.md", markdown_table(lines) + "\n")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("what", choices=("train", "run", "table"))
    parser.add_argument("--data", type=Path, help="images of the sets, for `train`")
    parser.add_argument("--folder", type=Path, help="the pictures of the look, and the LoRA")
    args = parser.parse_args()
    if args.what == "train":
        train(args.data, args.folder)
    elif args.what == "run":
        measure(args.folder)
    else:
        table()


if __name__ == "__main__":
    main()
