"""Several things erased at once inside the denoiser: what a learned word finds of each, and what others pay.

    python benchmarks/attacks/pictures/together/together.py    # goes on where together.csv ends

The things, their targets and the attack are those of ../sample, whose rows are for one thing alone. The first
`ATTACKED` things are attacked; what others pay is measured on things that are in no erasure.
"""

import copy
import sys
from pathlib import Path

import more_hf
from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table
from more_hf_bench.artists.judges import EmojiJudges
from more_hf_bench.artists.prompts import read_prompts
from more_hf_bench.artists.run import EMOJI, quiet_copy
from more_hf_bench.attacks.pictures.prompts import name, others
from more_hf_bench.attacks.pictures.studio import Studio
from more_hf_bench.attacks.pictures.training import inversion
from more_hf_bench.attacks.pictures.victim import Victim
from more_hf_bench.columns import append_row, read_cells
from more_hf_bench.methods.registry import DIFFUSION
from more_hf_bench.script import argument_parser


HERE = Path(__file__).parent
SAMPLE = HERE.parent / "sample"
SIZES = {
    "more-denoiser": (1, 5),
    "more-denoiser-soft": (1, 5),
    "more-gates": (1, 5, 20),
    "more": (1, 5, 20),
}
ATTACKED = 3


def measure(rows: Path) -> None:
    """Measure what `rows` lacks: each method, number of things and attacked thing."""
    sys.path.append(str(SAMPLE))
    from sample import ATTACKS

    concepts = [row for row in read_cells(SAMPLE / "concepts.csv") if row["kind"] == "thing"]
    targets = {row["forget"]: row["remap_to"] for row in concepts}
    original = quiet_copy(more_hf.load_emoji_sd(), EMOJI["scheduler"])
    tests = read_prompts(SAMPLE / "things.csv").rows
    elsewhere = [
        row
        for prompts in ("emoji108", "emoji10")
        for row in read_prompts(prompts).rows
        if row.thing not in targets
    ]
    lessons, judges = read_prompts("emoji10_validation").rows, EmojiJudges()
    drawing = {"steps": EMOJI["steps"], "guidance": EMOJI["guidance"]}
    studio, outside = (Studio(original, rows, lessons, judges, **drawing) for rows in (tests, elsewhere))
    held = read_cells(rows) if rows.exists() else []
    done = {(row["method"], int(row["together"]), row["forget"]) for row in held}
    for method, sizes in SIZES.items():
        for size in sizes:
            erased = dict(list(targets.items())[:size])
            missing = [thing for thing in list(erased)[:ATTACKED] if (method, size, thing) not in done]
            if not missing:
                continue
            pipe = copy.copy(original)
            pipe.register_modules(unet=copy.deepcopy(original.unet))
            pipe = DIFFUSION[method].load()(pipe, list(erased), remap_to=erased, retain=list(targets)[size:])
            named, unnamed = others(Victim(pipe, outside, missing[0], ""), **ATTACKS["others"])
            for thing in missing:
                victim = Victim(pipe, studio, thing, "")
                (asked,), (found,) = name(victim), inversion(victim, **ATTACKS["inversion"])
                line = {
                    "method": method,
                    "together": size,
                    "forget": thing,
                    "by name": f"{asked.recovered:.0f}",
                    "after 150 steps": f"{found.recovered:.0f}",
                    "lpips_r": f"{named.recovered:.3f}",
                    "lpips_none": f"{unnamed.recovered:.3f}",
                }
                append_row(rows, line)


def table() -> None:
    """Write the lines of each attacked thing together."""
    lines = read_cells(HERE / "together.csv")
    lines.sort(key=lambda line: (line["forget"], list(SIZES).index(line["method"]), int(line["together"])))
    write_text(HERE / "together.md", markdown_table(lines) + "\n")


def main() -> None:
    argument_parser(__doc__).parse_args()
    measure(HERE / "together.csv")
    table()


if __name__ == "__main__":
    main()
