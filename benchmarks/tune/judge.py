"""Compare a judge that `tune` fits with the shipped judges, over every artist sent to every other.

    python benchmarks/tune/judge.py

An exact edit gives what the target draws, so that a target's pictures that a judge takes for the concept
are what an edit to it leaves. Draws 24 pictures of each artist, of a made-up word and without a name, and
writes judge.csv (a line for each pair: percent taken for the concept, by the judge fitted on these pictures
and by the shipped one, and what the shipped one found in pictures of the edit, from
benchmarks/artists/targets_validation.csv), names.csv and judge.md. Ten minutes on one core.
"""

from itertools import permutations
from pathlib import Path

import pandas as pd
import torch

from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table
from more_hf.data import EMOJI_ARTISTS, load_emoji_sd
from more_hf.diffusion.draw import draw
from more_hf.diffusion.prompts import evenly, packaged_prompts, sentences_around
from more_hf.tuning.judge import Judge, chance_of_moves, features_of
from more_hf_bench.artists.judges import EmojiJudges
from more_hf_bench.artists.prompts import PromptRow
from more_hf_bench.columns import read_rows, write_rows


HERE = Path(__file__).parent
PICTURES, BATCH = 24, 12
MADE_UP = "zxqv"
SAMPLING = {"num_inference_steps": 6, "guidance_scale": 4.0}
COMPARED = (
    ("own", "shipped", "the same pictures"),
    ("own", "edit", "those of the edit"),
    ("shipped", "edit", "those of the edit"),
)


def draw_names() -> dict[str, torch.Tensor]:
    """The same sentences and noise for every artist, for a made-up word, and without a name."""
    pipe = load_emoji_sd()
    sentences = evenly(sentences_around(EMOJI_ARTISTS, packaged_prompts("emoji_prompts.txt")), PICTURES)
    pictures = {}
    for name in (*EMOJI_ARTISTS, MADE_UP, ""):
        batches = []
        for first in range(0, PICTURES, BATCH):
            batch = sentences[first : first + BATCH]
            prompts = [" ".join(sentence.replace("{}", name).split()) for sentence in batch]
            batches.append(draw(pipe, prompts, range(first, first + BATCH), SAMPLING))
        pictures[name] = torch.cat(batches)
    return pictures


def main() -> None:
    pictures = draw_names()
    features = {name: features_of(pictures.pop(name)) for name in ("", MADE_UP)}
    own, shipped = Judge.fit(pictures), EmojiJudges()
    taken_for = {}
    for artist, drawn in pictures.items():
        rows = [PromptRow(number, "", 0, artist) for number in range(PICTURES)]
        taken_for[artist], _ = shipped.judge(drawn, rows)
    edits = read_rows(HERE.parent / "artists" / "targets_validation.csv").set_index(["forget", "remap_to"])
    pairs, names = [], []
    for concept, target in permutations(EMOJI_ARTISTS, 2):
        i, j = (own.names.index(name) for name in (target, concept))
        line = {"concept": concept, "target": target, "own": 100 * int(own.confusion[i, j]) / PICTURES}
        line["shipped"] = 100 * taken_for[target].count(concept) / PICTURES
        pairs.append({**line, "edit": edits.loc[(concept, target), "style_f"]})
    for artist in EMOJI_ARTISTS:
        shares = {"found": own.found(artist).value, "mistaken": own.mistaken(artist).value}
        shares["found by the shipped judge"] = taken_for[artist].count(artist) / PICTURES
        line = {"artist": artist, **{key: f"{100 * share:.1f}" for key, share in shares.items()}}
        line |= {"told by chance": f"{own.chance(artist):.4f}"}
        drawn = chance_of_moves(features[""], features_of(pictures[artist]))
        names.append({**line, "drawn by chance": f"{drawn:.4f}"})
    drawn = chance_of_moves(features[""], features[MADE_UP])
    names.append({"artist": MADE_UP, "drawn by chance": f"{drawn:.4f}"})
    write_rows(HERE / "judge.csv", [{**line, "own": round(line["own"], 2)} for line in pairs])
    write_rows(HERE / "names.csv", names)
    ranks = pd.DataFrame(pairs)[["own", "shipped", "edit"]].rank().corr()
    compared = []
    for judge, other, where in COMPARED:
        line = {"judge": judge, "shipped judge, on": where}
        compared.append({**line, "rank correlation": float(ranks.loc[judge, other])})
    write_text(HERE / "judge.md", f"{markdown_table(compared)}\n\n{markdown_table(names)}\n")


if __name__ == "__main__":
    main()
