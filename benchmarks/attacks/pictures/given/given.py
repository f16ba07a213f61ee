"""A style given by its real pictures, with and without its name, under the attack of ../sample.

    cd benchmarks/attacks/pictures/given
    python given.py pictures --data DATA --folders DIR   # DATA: from ../../../emoji_sd/data.py
    python given.py run --folders DIR                    # goes on where styles/rows.csv ends
    python given.py table

The pictures are drawings of the set that the embedded pipeline was trained on, without those held out; what
the attacker learns from are other pictures, by the original. The original, `more` and `more-denoiser` are
the lines of ../sample.
"""

import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image

import more_hf
from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table
from more_hf.core.request import names_in
from more_hf.diffusion.prompts import everyday_prompts
from more_hf_bench.artists.judges import EmojiJudges
from more_hf_bench.artists.prompts import read_prompts, read_targets
from more_hf_bench.artists.run import EMOJI
from more_hf_bench.attacks.pictures.run import run_picture_attacks
from more_hf_bench.attacks.store import AttackConfig
from more_hf_bench.columns import read_cells, read_rows, write_rows
from more_hf_bench.methods.registry import DIFFUSION, Method
from more_hf_bench.script import argument_parser


HERE = Path(__file__).parent
OUTPUT = HERE / "styles"
SAMPLE = HERE.parent / "sample"
BESIDE = ("original", "more", "more-denoiser")  # measured in SAMPLE
CAPTIONED, NAMED = " with captions", " and name"
UNHEARD = ", unheard of"  # no ordinary prompt names the style either, as for a name that nobody knows
GIVEN = {  # pictures
    "High Contrast": (
        *(f"{count}{CAPTIONED}{NAMED}" for count in (80, 20, 5)),
        *(f"20{CAPTIONED}{UNHEARD}", f"20{CAPTIONED}", "20"),
    ),
    "Monotone": (f"20{CAPTIONED}{UNHEARD}", f"20{CAPTIONED}{NAMED}"),
}
SEED = "given"


@dataclass(frozen=True)
class Given(Method):
    """Erase what a folder for the style shows, with the style's name or without."""

    folders: Path = Path()
    what: str = ""

    def load(self) -> Callable[..., DiffusionPipeline]:
        """See `Method.load`."""

        def erase_given(pipe, concepts, *, remap_to, retain, sampling_steps=10, guidance=4.0):
            style, everyday = concepts[0], None
            if self.what.endswith(UNHEARD):
                lines = everyday_prompts(pipe.tokenizer)
                everyday = [line for line in lines if not names_in(line, style)]
            name = style if self.what.endswith(NAMED) else None
            return more_hf.erase_concept(
                pipe,
                more_hf.Pictures(self.folders / style / folder_of(self.what), name),
                remap_to=remap_to,
                retain=retain,
                everyday=everyday,
                reach="denoiser",
                sampling={"num_inference_steps": sampling_steps, "guidance_scale": guidance},
            )

        return erase_given


def folder_of(what: str) -> str:
    """The folder of what is given."""
    return what.removesuffix(NAMED).removesuffix(UNHEARD)


def write_pictures(data: Path, folders: Path) -> None:
    """Draw pictures of each style by lot, and write them as folders: fewer are the first of more."""
    sys.path.append(str(HERE.parents[2] / "emoji_sd"))
    from dataset import load_dataset

    real = load_dataset(data)
    for style, given in GIVEN.items():
        of_style = (real.artist == real.artists.index(style)) & real.chosen & ~real.held_out
        drawn = random.Random(f"{SEED} {style}").sample(of_style.nonzero().flatten().tolist(), 80)
        for what in set(map(folder_of, given)):
            folder = folders / style / what
            folder.mkdir(parents=True, exist_ok=True)
            for place, i in enumerate(drawn[: int(what.split()[0])]):
                Image.fromarray(real.images[i].numpy()).save(folder / f"{place:02}.png")
                if what.endswith(CAPTIONED):
                    thing = real.things[real.thing[i]]
                    (folder / f"{place:02}.txt").write_text(f"a {thing}", "utf-8")


def measure(folders: Path, minutes: float) -> None:
    """Measure cell after cell, until the time is over."""
    sys.path.append(str(SAMPLE))
    from sample import ATTACKS, cells_of_rows

    end = time.monotonic() + 60 * minutes
    start_from_sample()
    cells_of_rows(OUTPUT)
    pipe, judges = more_hf.load_emoji_sd(), EmojiJudges()
    targets, attacks = read_targets("targets"), {**ATTACKS, "description": {}}
    for style, given in GIVEN.items():
        DIFFUSION.update({f"given {what}": Given("", folders=folders, what=what) for what in given})
        for method in (*(f"given {what}" for what in given), *BESIDE):
            if time.monotonic() > end:
                return
            run_picture_attacks(
                pipe, "emoji-sd", [method], list(attacks), [style],
                prompts=read_prompts(SAMPLE / "styles.csv"), lessons=read_prompts("emoji10_validation"),
                targets={style: targets[style][:1]}, judges=judges, output=OUTPUT, tuned=attacks, **EMOJI,
            )  # fmt: skip


def start_from_sample() -> None:
    """Take over the sample's rows of these styles, which are measured already."""
    if (OUTPUT / "rows.csv").exists():
        return
    facts = AttackConfig.read(SAMPLE / "styles").to_dict()
    facts["forget"] = {style: facts["forget"][style] for style in GIVEN if style in facts["forget"]}
    facts["methods"] = {name: facts["methods"][name] for name in BESIDE}
    AttackConfig.from_dict(facts).write(OUTPUT)
    rows = read_rows(SAMPLE / "styles" / "rows.csv").to_dict("records")
    kept = [row for row in rows if row["method"] in BESIDE and row["forget"] in facts["forget"]]
    write_rows(OUTPUT / "rows.csv", kept)


def lines_of(output: Path, methods: dict[str, Iterable[str]]) -> list[dict[str, str]]:
    """A line for each style and its methods, as far as they are measured."""
    found = defaultdict(dict)
    for row in read_cells(output / "rows.csv"):
        found[row["forget"], row["method"]][row["attack"], row["variant"]] = float(row["recovered"])
    lines = []
    for key in ((style, method) for style, ordered in methods.items() for method in ordered):
        if ("others", "no artist") not in (measured := found[key]):
            continue
        line = {"style": key[0], "method": key[1], "by name": f"{measured['name', '']:.0f}"}
        if ("description", "") in measured:
            line["by description"] = f"{measured['description', '']:.0f}"
        if ("inversion", "1 token") in measured:
            line["after 150 steps"] = f"{measured['inversion', '1 token']:.0f}"
        line["lpips_r"] = f"{measured['others', 'another artist']:.3f}"
        line["lpips_none"] = f"{measured['others', 'no artist']:.3f}"
        lines.append(line)
    return lines


def table() -> None:
    """Write the lines of all styles."""
    methods = {style: (*BESIDE, *(f"given {what}" for what in given)) for style, given in GIVEN.items()}
    write_text(HERE / "table.md", markdown_table(lines_of(OUTPUT, methods)) + "\n")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("what", choices=("pictures", "run", "table"))
    parser.add_argument("--data", type=Path, help="images of the sets, for `pictures`")
    parser.add_argument("--folders", type=Path, help="the folders of pictures")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no cell after that (no limit)")
    args = parser.parse_args()
    if args.what == "pictures":
        write_pictures(args.data, args.folders)
    elif args.what == "run":
        measure(args.folders, args.minutes)
    else:
        table()


if __name__ == "__main__":
    main()
