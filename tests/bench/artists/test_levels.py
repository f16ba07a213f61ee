"""Asked in other words: the prompts, what is measured at each level, and what cannot be asked."""

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from support.pipelines import random_ip_adapter
from support.rows import frame, row, rows_of
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from more_hf.cli.main import main
from more_hf.data import EMOJI_ARTISTS, FOLDER
from more_hf_bench.artists.config import THINGS, Erasure
from more_hf_bench.artists.generate import generate
from more_hf_bench.artists.grid import read_image
from more_hf_bench.artists.judges import EmojiJudges, sentence_of
from more_hf_bench.artists.prompts import PromptRow, read_prompts
from more_hf_bench.artists.ranking import level_lines
from more_hf_bench.artists.run import run_artists
from more_hf_bench.artists.tables import level_tables
from more_hf_bench.columns import read_cells
from more_hf_bench.errors import BenchmarkError


LEVELS = [
    "name", "alias", "variant", "variant-trained", "short", "short-trained", "long", "long-trained", "near",
]  # fmt: skip
WORDS = json.loads((FOLDER / "emoji_descriptions.json").read_text("utf-8"))["artists"]


# the prompts


def test_every_artist_is_asked_for_the_same_things_at_every_level():
    prompts = read_prompts("emoji_levels")
    assert prompts.levels == LEVELS
    assert prompts.names == list(EMOJI_ARTISTS)
    for artist in EMOJI_ARTISTS:
        things = [[r.thing for r in prompts.at([level]).rows if r.artist == artist] for level in LEVELS[:-1]]
        assert len(set(things[0])) == len(things[0]) == 12
        assert all(own == things[0] for own in things)
    assert len({r.prompt for r in prompts.rows}) == len(prompts.rows)
    EmojiJudges().check(prompts.rows)


def said_in(prompt, texts):
    return [text for text in texts if re.search(rf"(?<!\w){re.escape(text)}(?!\w)", prompt, re.I)]


def test_each_level_says_the_artist_in_its_own_way():
    rows = [r for r in read_prompts("emoji_levels").rows if r.artist]
    for r in rows:
        named = [a for a in EMOJI_ARTISTS if re.search(rf"\b{a}\b", r.prompt, re.I)]
        kind, _, trained = r.level.partition("-")
        if kind in ("name", "alias"):
            assert named == [r.artist]
            assert ("'s" in r.prompt) == (kind == "alias")
        else:
            own = WORDS[r.artist][kind]
            assert named == []
            assert len(said_in(r.prompt, own["trained" if trained else "held_out"])) == 1
            assert not said_in(r.prompt, own["held_out" if trained else "trained"])


def test_the_file_is_what_its_script_writes(monkeypatch):
    import runpy

    path = Path(__file__).parents[3] / "benchmarks" / "artists" / "levels" / "prompts.py"
    written = {}
    monkeypatch.setattr(
        "more_hf_bench.columns.write_text", lambda target, text: written.update({target.name: text})
    )
    runpy.run_path(str(path), run_name="__main__")
    committed = path.parents[3] / "prompts" / "emoji_levels.csv"
    assert written == {"emoji_levels.csv": committed.read_text("utf-8")}


FEW = "case_number,prompt,evaluation_seed,artist,thing,level\n" + "".join(
    f"{case},{prompt},{100 * case},{artist},{thing},{level}\n"
    for case, (prompt, artist, thing, level) in enumerate(
        [
            ("a cat by Van Gogh", "Van Gogh", "cat", "name"),
            ("a dog by Van Gogh", "Van Gogh", "dog", "name"),
            ("a cat with swirling strokes", "Van Gogh", "cat", "short"),
            ("a dog with swirling strokes", "Van Gogh", "dog", "short"),
            ("a cat by Picasso", "Picasso", "cat", "name"),
            ("a dog by Picasso", "Picasso", "dog", "name"),
            ("a cat in cubes", "Picasso", "cat", "short"),
            ("a dog in cubes", "Picasso", "dog", "short"),
            ("a swirling snail", "", "snail", "near"),
            ("a starry sky", "", "sky", "near"),
        ]
    )
)


@pytest.fixture
def few(tmp_path):
    path = tmp_path / "few.csv"
    path.write_text(FEW, encoding="utf-8")
    return path


def test_levels_are_chosen_and_limited(few):
    prompts = read_prompts(few)
    assert prompts.levels == ["name", "short", "near"]
    assert [r.case_number for r in prompts.at(["short"]).rows] == [2, 3, 6, 7]
    assert [r.case_number for r in prompts.limited(1)] == [0, 2, 4, 6, 8]
    with pytest.raises(
        BenchmarkError, match="few has no prompts at the level 'long'. It has name, short, near"
    ):
        prompts.at(["name", "long"])
    with pytest.raises(BenchmarkError, match="emoji10 .* It has none: it has no column `level`"):
        read_prompts("emoji10").at(["name"])


def test_clip_judges_ask_for_the_thing_where_levels_say_the_same_in_other_words():
    long = PromptRow(1, "a cat with swirling strokes", 1, "Van Gogh", "cat", "", "short")
    name = PromptRow(2, "a cat by Van Gogh", 2, "Van Gogh", "cat", "", "name")
    plain = PromptRow(3, "a cat by Van Gogh", 2, "Van Gogh", "cat")
    assert sentence_of(long) == sentence_of(name) == "a picture of cat"
    assert sentence_of(plain) == "a cat by the artist"


# what is measured


def measured(method, level, case, artist, *, style, content=1, lpips=0.0, thing="cat"):
    """A row of an erasure of A, whose original is recognised; `style` is what the judge sees after."""
    return row(
        method=method, level=level, case_number=case, artist=artist, thing=thing, lpips=lpips,
        style_before=artist or "C", style_after=style, content_before=1, content_after=content,
    )  # fmt: skip


def asked(method, named, described, *, other="B", near=1):
    """Two pictures of A at each of two levels, two of B, two that name nobody."""
    rows = []
    for level, seen, case in (("name", named, 0), ("long", described, 10)):
        rows += [
            measured(method, level, case + i, "A", style="A" if i < seen else "C", lpips=0.4) for i in (0, 1)
        ]
        rows += [
            measured(method, level, case + 2 + i, "B", style="B" if i else other, lpips=0.1) for i in (0, 1)
        ]
    return rows + [
        measured(method, "near", 20 + i, "", style="C", content=i or near, lpips=0.2) for i in (0, 1)
    ]


def test_what_is_left_and_what_is_lost_by_level():
    rows = [*asked("original", 2, 2), *asked("by-name", 0, 2), *asked("described", 0, 1, other="A", near=0)]
    lines = {(line["level"], line["method"]): line for line in level_lines(frame(rows))}
    assert list(lines)[:3] == [("name", "original"), ("name", "by-name"), ("name", "described")]
    # nothing done leaves all, and loses nothing
    for level in ("name", "long"):
        assert (lines[level, "original"]["left"], lines[level, "original"]["lost"]) == (100, 0)
        assert (lines[level, "original"]["left_low"], lines[level, "original"]["left_high"]) == (100, 100)
    # who erases by name alone leaves the description, who erases it too leaves half
    assert (lines["name", "by-name"]["left"], lines["long", "by-name"]["left"]) == (0, 100)
    assert (lines["name", "described"]["left"], lines["long", "described"]["left"]) == (0, 50)
    assert lines["long", "described"]["left_low"] < 50 < lines["long", "described"]["left_high"]
    # and what that costs the other artist, and things that name nobody
    assert [lines["long", method]["lost"] for method in ("by-name", "described")] == [0, 50]
    assert [lines["near", method]["lost"] for method in ("by-name", "described")] == [0, 50]
    assert (lines["near", "described"]["left"], lines["near", "described"]["gone_f"]) == (None, None)
    assert (lines["long", "described"]["lpips_f"], lines["long", "described"]["lpips_r"]) == (0.4, 0.1)
    assert (lines["near", "by-name"]["n_f"], lines["near", "by-name"]["n_r"]) == (0, 2)

    left, lost, _ = level_tables(list(lines.values()))
    assert left[0] == {"method": "recognised before", "name": "100", "long": "100"}
    assert left[2] == {"method": "by-name", "name": "0 [0, 0]", "long": "100 [100, 100]"}
    assert [cells["near"] for cells in lost] == ["100", "0 [0, 0]", "0 [0, 0]", "50 [0, 100]"]


def test_only_pictures_that_every_method_has():
    rows = [*asked("original", 2, 2), *asked("by-name", 0, 0)[1:]]
    (first, *_) = level_lines(frame(rows))
    assert (first["level"], first["n_f"], first["n_r"]) == ("name", 1, 2)
    without_levels = [row(method="m"), row(method="m", case_number=1)]
    assert level_lines(frame(without_levels)) == []
    apart = [row(method=f"m{case}", level="name", artist="A", case_number=case) for case in (0, 1)]
    assert level_lines(frame(apart)) == []


def test_what_the_original_does_not_show_is_no_percentage():
    rows = [measured("m", "long", i, "A", style="C") for i in (0, 1)]
    (line,) = level_lines(frame([{**r, "style_before": "C"} for r in rows]))
    assert (line["gone_f_before"], line["left"]) == (0, None)


def test_things_are_measured_by_what_is_seen():
    common = {"method": "m", "forget": "cat", "level": "synonym", "style_before": "A"}
    config = SimpleNamespace(of_kind=THINGS, forget={"cat": Erasure(["B"], None, [])})
    seen = {"style_after": "A", "content_before": 1}
    rows = [
        row(**common, **seen, case_number=0, artist="A", thing="cat", content_after=0),
        row(**common, **seen, case_number=1, artist="A", thing="dog", content_after=1),
    ]
    (line,) = level_lines(frame(rows, config), THINGS)
    assert (line["left"], line["lost"]) == (0, 0)


# the run


class Sees:
    """Judges that see the row's artist and thing wherever the picture is the original's."""

    name, facts = "sees", {}

    def __init__(self):
        self.first = {}

    def check(self, rows):
        pass

    def judge(self, images, rows):
        same = []
        for image, r in zip(images, rows, strict=True):
            same.append(torch.equal(self.first.setdefault(r.case_number, image), image))
        names = [r.artist or "nobody" for r in rows]
        return [n if s else "other" for n, s in zip(names, same, strict=True)], [int(s) for s in same]


def run(pipe, prompts, output, methods, **options):
    given = {"remap_to": "Claude Monet", "steps": 2, "guidance": 3.0, "scheduler": "ddim", "batch_size": 2}
    return run_artists(
        pipe, methods, prompts, "Van Gogh", output=output, judges=Sees(), **{**given, **options}
    )


def keep(pipe, concepts, *, remap_to, retain):
    return pipe


def spoil(pipe, concepts, *, remap_to, retain):
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if name.endswith("attn2.to_v.weight"):
                parameter.mul_(3)
    return pipe


@pytest.mark.slow
def test_a_run_by_level(tiny_sd, few, tmp_path):
    output = tmp_path / "out"
    run(tiny_sd(), few, output, {"keep": keep, "spoil": spoil})
    lines = {(line["level"], line["method"]): line for line in read_cells(output / "levels.csv")}
    assert list(lines) == [(level, name) for level in ("name", "short", "near") for name in ("keep", "spoil")]
    for level in ("name", "short"):
        assert [lines[level, name]["left"] for name in ("keep", "spoil")] == ["100.0", "0.0"]
        assert [lines[level, name]["lost"] for name in ("keep", "spoil")] == ["0.0", "100.0"]
    assert lines["near", "spoil"]["lost"] == "100.0"
    assert lines["near", "spoil"]["left"] == ""
    table = (output / "table.md").read_text("utf-8")
    assert "**Asked in other words: what is left** of the forgotten artists" in table
    assert (output / "levels.png").stat().st_size > 10_000
    # a column for each level that asks for what is forgotten, before above both methods
    with Image.open(output / "words.webp") as words:
        assert words.width > 2 * 128
        assert 3 * 128 < words.height < 4 * 128
    assert Counter(r.level for r in rows_of(output)) == {"name": 8, "short": 8, "near": 4}


@pytest.mark.slow
def test_pictures_are_of_each_level(tiny_sd, few, tmp_path):
    run(tiny_sd(), few, tmp_path / "out", {"keep": keep}, pictures=(1, 1))
    counted = Counter((r.level, r.artist) for r in rows_of(tmp_path / "out"))
    cells = [(level, artist) for level in ("name", "short") for artist in ("Van Gogh", "Picasso")]
    assert counted == dict.fromkeys([*cells, ("near", "")], 1)


def test_levels_that_cannot_be_asked_for(tiny_sd, tmp_path, capsys):
    with pytest.raises(BenchmarkError, match="has no IP-Adapter"):
        run(tiny_sd(), with_pictures(tmp_path), tmp_path / "out", {"keep": keep})
    config = tmp_path / "bench.json"
    command = f"bench artists --forget Blobmoji --config {config} --output {tmp_path / 'out'}"
    for levels, message in (
        ("name,image", "emoji-sd has none"),
        ("longer", "the level 'longer'. It has name"),
    ):
        config.write_text(json.dumps({"levels": levels}))
        assert main(command.split()) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def with_pictures(folder):
    """The few prompts, and two that ask for a cat by a picture."""
    lines = [line + "," for line in FEW.splitlines()[1:]]
    for case, (artist, colour) in enumerate((("Van Gogh", "gold"), ("Picasso", "blue")), start=90):
        Image.new("RGB", (30, 20), colour).save(folder / f"{colour}.png")
        lines.append(f"{case},a cat,{100 * case},{artist},cat,image,{colour}.png")
    path = folder / "few.csv"
    path.write_text("\n".join([FEW.splitlines()[0] + ",image", *lines]) + "\n", encoding="utf-8")
    return path


def adapted(pipe):
    """A pipeline with a random IP-Adapter and a random encoder of pictures."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(**size, image_size=16, patch_size=8, projection_dim=12)
    torch.manual_seed(0)
    pipe.register_modules(
        image_encoder=CLIPVisionModelWithProjection(config).eval(),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16),
    )
    pipe.unet._load_ip_adapter_weights([random_ip_adapter(pipe.unet)])
    return pipe


@pytest.mark.slow
def test_a_picture_is_asked_by_through_the_adapter(tiny_sd, tmp_path):
    path = with_pictures(tmp_path)
    pipe = adapted(tiny_sd())
    run(pipe, path, tmp_path / "out", {"keep": keep})
    rows = {r.case_number: r for r in rows_of(tmp_path / "out")}
    assert Counter(r.level for r in rows.values())["image"] == 2

    def drawn(**given):
        found = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.scheduler = found
        asked = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
        seeds = torch.Generator().manual_seed(9000)
        return 255 * pipe("a cat", generator=seeds, **asked, **given).images[0]

    # the row's picture is the pipeline's own for this image, and another for another image or none
    kept = read_image(tmp_path / "out" / "images" / rows[90].after).permute(1, 2, 0).numpy()
    gold, blue = (Image.open(tmp_path / f"{colour}.png") for colour in ("gold", "blue"))
    assert abs(drawn(ip_adapter_image=gold) - kept).max() < 1.5
    assert abs(drawn(ip_adapter_image=blue) - kept).max() > 1.5
    nothing = torch.zeros(2, 1, 12)
    alone = generate(pipe, ["a cat"], [9000], steps=2, guidance=3.0)[0].permute(1, 2, 0).numpy()
    assert abs(drawn(ip_adapter_image_embeds=[nothing]) - alone).max() < 1.5
    assert abs(alone - kept.astype(int)).max() > 1.5


def test_a_picture_that_is_not_there_is_named(tmp_path):
    path = with_pictures(tmp_path)
    (tmp_path / "blue.png").unlink()
    with pytest.raises(BenchmarkError, match=r"few\.csv, line 13: there is no picture .*blue\.png"):
        read_prompts(path)
    path.write_text(FEW + "90,a cat,9000,Van Gogh,cat,image\n", encoding="utf-8")
    with pytest.raises(BenchmarkError, match="line 12: the level 'image' needs a file in the column `image`"):
        read_prompts(path)
