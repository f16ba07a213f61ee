"""Many names at once, artists or things: which are forgotten, on which prompts, and the curve over sizes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.rows import frame, row

from more_hf_bench.artists.cells import Pictures
from more_hf_bench.artists.config import THINGS, ArtistsConfig, Erasure
from more_hf_bench.artists.prompts import PromptRow, Prompts, read_prompts, sets_of, spread
from more_hf_bench.artists.ranking import rank, rank_sizes, winner
from more_hf_bench.artists.rows import measured
from more_hf_bench.artists.run import _erasure, run_artists
from more_hf_bench.artists.summary import summarise
from more_hf_bench.columns import read_rows
from more_hf_bench.errors import BenchmarkError


COMMITTED = sorted((Path(__file__).parents[3] / "benchmarks" / "artists").glob("*/config.json"))
COMMITTED = [path for path in COMMITTED if path.parent.name != "paper"]  # without the columns of pictures
THINGS_7 = ("cat", "dog", "house", "tree", "car", "sun", "fish")  # none in the name of another
ARTISTS = ("Van Gogh", "Picasso")
PROMPTS = "case_number,prompt,evaluation_seed,artist,thing\n" + "".join(
    f"{10 * i + j},a {thing} by {artist},{100 * i + j},{artist},{thing}\n"
    for i, thing in enumerate(THINGS_7)
    for j, artist in enumerate(ARTISTS)
)


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "few.csv").write_text(PROMPTS, encoding="utf-8")
    return read_prompts(tmp_path / "few.csv", THINGS)


class Blind:
    """Judges that see the artist in every picture, and the thing in none."""

    name, facts = "blind", {}

    def check(self, rows):
        assert len(rows) == 2 * len(THINGS_7)

    def judge(self, images, rows):
        return [row.artist for row in rows], [0 for row in rows]


def test_names_and_groups_are_of_the_kind(prompts, tmp_path):
    assert prompts.names == list(THINGS_7)
    assert prompts.group_of("cat") == list(THINGS_7[1:])
    assert [row.thing for row in prompts.limited(1)] == list(THINGS_7)
    artists = read_prompts(tmp_path / "few.csv")
    assert artists.names == list(ARTISTS)
    assert artists.group_of("Picasso") == ["Van Gogh"]
    assert len(artists.limited(1)) == 2


def test_sets_are_disjoint_and_few_names_are_spelt_out():
    names = [str(i) for i in range(23)]
    assert sets_of(names, 1) == {name: [name] for name in names[:10]}
    assert list(sets_of(names, 3)) == ["0+1+2", "3+4+5", "6+7+8"]
    assert sets_of(names, 20) == {"20 names, set 1": names[:20]}
    assert sets_of(names[:4], 2) == {"0+1": ["0", "1"], "2+3": ["2", "3"]}
    for size in (0, 23):
        with pytest.raises(BenchmarkError, match=f"{size} cannot be forgotten"):
            sets_of(names, size)


def test_prompts_are_spread_over_the_names(prompts):
    rows = spread(prompts, ["cat", "dog", "house"], 4, "seed")
    assert sorted(row.thing for row in rows[:3]) == ["cat", "dog", "house"]
    assert [row.case_number % 10 for row in rows] == [0, 0, 0, 1]
    assert rows == spread(prompts, ["cat", "dog", "house"], 4, "seed")
    assert len(spread(prompts, ["cat", "dog", "house"], 99, "seed")) == 6
    orders = {tuple(row.thing for row in spread(prompts, THINGS_7, 7, seed)) for seed in "abcd"}
    assert len(orders) > 1


def test_who_keeps_a_fire_engine_keeps_fire():
    rows = tuple(
        PromptRow(i, f"a {name}", i, "", name) for i, name in enumerate(("fire", "fire engine", "cat"))
    )
    prompts = Prompts("few", "", rows, THINGS)
    assert _erasure("fire", ["fire"], "emoji", None, None, prompts).retain == ["cat"]
    assert _erasure("cat", ["cat"], "emoji", None, None, prompts).retain == ["fire", "fire engine"]


def run(pipe, prompts, output, methods, **options):
    sets = {**sets_of(prompts.names, 1), **sets_of(prompts.names, 6)}
    settings = {"remap_to": "emoji", "pictures": (7, 14), "steps": 2, "guidance": 3.0, "scheduler": "ddim"}
    return run_artists(pipe, methods, prompts, sets, output=output, judges=Blind(), **{**settings, **options})


def recorder(scale, seen):
    """A method that changes every value layer, and notes what it was given."""

    def method(pipe, concepts, *, remap_to, retain, strength=1.0):
        seen.append((tuple(concepts), tuple(remap_to), tuple(retain), strength))
        with torch.no_grad():
            for name, parameter in pipe.unet.named_parameters():
                if name.endswith("attn2.to_v.weight"):
                    parameter.mul_(1 + scale * strength)
        return pipe

    return method


@pytest.mark.slow
def test_things_by_size(tiny_sd, prompts, tmp_path):
    output, seen = tmp_path / "out", []
    methods = {"one": recorder(0.1, seen), "two": recorder(0.5, [])}
    tuned = {"one": {"strength": 2.0}}
    by_size = {6: {"one": {"strength": 3.0}}}
    summary = run(tiny_sd(), prompts, output, methods, tuned=tuned, tuned_by_size=by_size)

    # what the methods were given: each of the seven alone, then six of them
    assert [len(names) for names, *_ in seen] == [1] * 7 + [6]
    assert {(targets, strength) for _, targets, _, strength in seen[:7]} == {(("emoji",), 2.0)}
    assert seen[7] == (THINGS_7[:6], ("emoji",), ("fish",), 3.0)

    # a size has 7 prompts of what it forgets and 14 of the rest, or as many as there are
    rows = measured(read_rows(output / "rows.csv"), ArtistsConfig.read(output))
    for size, rest in ((1, 14), (6, 2)):
        own = rows[(rows["method"] == "one") & (rows["names"].map(len) == size)]
        assert [own["is_forgotten"].sum(), (~own["is_forgotten"]).sum()] == [7, rest]
        assert (own["is_named"] != own["is_forgotten"]).all()
    assert set(rows[rows["forget"] == "6 names, set 1"]["retain"]) == {"1 names"}
    by = {(line["method"], line["forget"]): line for line in summary}
    assert by["one", "6 names, set 1"]["n_r"] == 2
    assert by["one", "all"]["n_f"] == 7

    # the judges see no thing: gone, and the artist kept
    ranked = rank_sizes(rows, THINGS)
    assert {line["at_once"] for line in ranked} == {1, 6}
    six = [line for line in ranked if line["at_once"] == 6]
    columns = ("qualifies", "gone_f", "kept_f", "gone_r")
    assert {tuple(line[name] for name in columns) for line in six} == {("yes", 0, 100, 0)}
    table = (output / "table.md").read_text("utf-8")
    assert "| content_f ↓ | style_f ↑" in table
    assert "leave the thing in at most 10 %" in table
    assert (output / "sizes.png").stat().st_size > 10_000
    assert (output / "sizes.csv").read_text("utf-8").startswith("at_once,method,")

    with pytest.raises(BenchmarkError, match="cases is"):
        run(tiny_sd(), prompts, output, methods, tuned=tuned, tuned_by_size=by_size, pictures=(6, 14))
    with pytest.raises(BenchmarkError, match="one takes no `force`"):
        run(tiny_sd(), prompts, tmp_path / "no", methods, tuned_by_size={6: {"one": {"force": 1}}})
    with pytest.raises(BenchmarkError, match="has no prompts of 'Van Gogh'. Its things are cat, dog"):
        run_artists(tiny_sd(), methods, prompts, "Van Gogh", remap_to="emoji", output=tmp_path / "no")


def test_things_are_ranked_by_what_is_gone_and_what_is_kept():
    config = SimpleNamespace(of_kind=THINGS, forget={"cat": Erasure(["emoji"], None, ["dog"])})
    rows = []
    for method, seen, spared in (("good", 0, 1), ("weak", 1, 1), ("spoils", 0, 0)):
        common = {"method": method, "forget": "cat", "artist": "Noto"}
        judged = {"style_before": "Noto", "style_after": "Fluent", "content_before": 1}
        rows.append(row(**common, **judged, thing="cat", content_after=seen, case_number=1, lpips=0.5))
        rows.append(row(**common, **judged, thing="dog", content_after=spared, case_number=2, lpips=0.1))
    ranking = rank(frame(rows, config), THINGS)
    assert [(line["method"], line["qualifies"]) for line in ranking] == [
        ("good", "yes"), ("weak", "no"), ("spoils", "no"),
    ]  # fmt: skip
    assert (ranking[0]["gone_r_before"], ranking[0]["gone_r"]) == (100, 100)
    assert "leave the thing" in winner(ranking, THINGS)
    (line,) = summarise(frame(rows[:2], config))
    assert (line["content_f"], line["content_r"], line["lpips_named"]) == (0, 100, 0.1)


@pytest.mark.parametrize("config", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_folders_keep_their_cells(config):
    folder = config.parent
    held = ArtistsConfig.read(folder)
    rows = read_rows(folder / "rows.csv").itertuples()
    named = {(row.method, row.forget): row.after.split("/")[0] for row in rows}
    cells = [Pictures(folder, held, method, forget).folder.name for method, forget in named]
    assert cells == list(named.values())
