"""Write the prompts of the benchmark with many concepts at once.

    python benchmarks/artists/many/prompts.py

Every thing of the embedded pipeline has six prompts, one in each of six wordings of its training, of as many
artists where that is possible: none is a prompt of another file or an everyday prompt behind Σ. Seeds are of
no other file. Things are in a random order, and `sizes` forgets the first of them.
"""

import random
from pathlib import Path

from more_hf.diffusion.prompts import packaged_prompts
from more_hf_bench.artists.judges import EmojiJudges
from more_hf_bench.artists.prompts import read_prompts
from more_hf_bench.columns import write_rows


ROOT = Path(__file__).parents[3]
WORDINGS = (
    "{article} {thing} in the style of {artist}",
    "{artist}'s drawing of {article} {thing}",
    "an emoji of {article} {thing} by {artist}",
    "{artist} {thing}",
    "{thing}, {artist} style",
    "a picture of {article} {thing}, drawn by {artist}",
)
FIRST_SEED, STEP = 1_000_003, 97  # beyond those of the other files, and further apart than seeds counted up


def main() -> None:
    groups = {row.artist: row.group for row in read_prompts("emoji10").rows if row.artist}
    artists, things = list(groups), list(EmojiJudges().things)
    random.Random(1).shuffle(things)  # with 0 the artists would not first occur in their usual order
    used = {row.prompt for name in ("emoji10", "emoji10_validation") for row in read_prompts(name).rows}
    used |= set(packaged_prompts("emoji_prompts.txt"))  # behind Σ
    rows = []
    for i, thing in enumerate(things):
        article = "an" if thing[0] in "aeiou" else "a"
        for j in range(len(WORDINGS)):
            number = i * len(WORDINGS) + j
            # The j-th prompt of one thing after the other goes through all wordings and all artists.
            wording = WORDINGS[(2 * i + j) % len(WORDINGS)]
            turns = (artists[(i + j + more) % len(artists)] for more in range(len(artists)))
            prompts = ((wording.format(article=article, thing=thing, artist=name), name) for name in turns)
            prompt, artist = next(pair for pair in prompts if pair[0] not in used)
            facts = {"case_number": number, "prompt": prompt, "evaluation_seed": FIRST_SEED + STEP * number}
            rows.append({**facts, "artist": artist, "thing": thing, "group": groups[artist]})
    write_rows(ROOT / "prompts" / "emoji108.csv", rows)


if __name__ == "__main__":
    main()
