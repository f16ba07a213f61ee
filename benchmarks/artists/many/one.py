"""Try other token positions for one thing at a time, on prompts and things that are not in the table.

    python benchmarks/artists/many/one.py --output DIR    # resumes; DIR holds the pictures

Ten things from the end of the order, each erased alone with the table's target and the same pictures for
all. Writes one.csv and one.md: `more` by its token positions, and the first method of the table.
"""

from functools import partial
from pathlib import Path

import tune

import more_hf
from more_hf_bench.artists.config import THINGS
from more_hf_bench.artists.judges import EmojiJudges
from more_hf_bench.artists.run import EMOJI, run_artists
from more_hf_bench.methods.registry import DIFFUSION
from more_hf_bench.script import argument_parser, write_table


HERE = Path(__file__).parent
NAMES, PICTURES = 10, (60, 20)
TOKENS = ("positions", "last+end", "subject+end")
RIVALS = ("speed",)
COLUMNS = ("content_f", "content_r", "style_f", "lpips_f", "lpips_r", "lpips_d")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for pictures")
    args = parser.parse_args()
    prompts = tune.validation(THINGS)
    target = tune.TARGET[THINGS.name]
    functions = {f"more, {tokens}": partial(more_hf.erase_concept, tokens=tokens) for tokens in TOKENS}
    tuned = tune.single(THINGS)
    functions |= {name: partial(DIFFUSION[name].load(), **tuned[name]) for name in RIVALS}
    summary = run_artists(
        more_hf.load_emoji_sd(),
        functions,
        prompts,
        [name for name in prompts.names if name != target][:NAMES],
        remap_to=target,
        output=args.output,
        judges=EmojiJudges(),
        pictures=PICTURES,
        batch_size=12,
        **EMOJI,
    )
    lines = [
        {"method": line["method"], **{column: line[column] for column in COLUMNS}}
        for line in summary
        if line["forget"] == "all"
    ]
    write_table(HERE / "one", lines)


if __name__ == "__main__":
    main()
