"""One picture for each prompt, and what the text encoder reads of it."""

import json

import pytest
import torch

import more_hf
from more_hf.data import EMOJI_ARTISTS
from more_hf.diffusion.encoder import Encoder
from more_hf_bench.artists.generate import cut_off, generate, known
from more_hf_bench.artists.prompts import PromptRow, Prompts, read_prompts, read_targets
from more_hf_bench.artists.run import run_artists
from more_hf_bench.errors import BenchmarkError


PROMPTS = ["a cat", "a dog", "a house in the style of Monet"]


def draw(pipe, prompts=PROMPTS, seeds=(5, 6, 7), **options):
    return generate(pipe, prompts, seeds, **{"steps": 3, "guidance": 5.0, **options})


def test_a_row_depends_on_its_own_seed_only(tiny_sd):
    pipe = tiny_sd()
    together = draw(pipe)
    assert together.dtype == torch.uint8
    assert together.shape == (3, 3, 32, 32)
    for batch_size in (1, 2):
        assert (together.int() - draw(pipe, batch_size=batch_size).int()).abs().max() <= 1
    alone = draw(pipe, PROMPTS[1:2], [6])
    assert (together[1].int() - alone[0].int()).abs().max() <= 1
    other = draw(pipe, PROMPTS[1:2], [7])
    assert (together[1].int() - other[0].int()).abs().max() > 10


@pytest.mark.slow
def test_a_routed_row_depends_on_its_own_seed_only(tiny_sd):
    pipe = tiny_sd()
    more_hf.erase_concept(pipe, "Van Gogh", remap_to=["Claude Monet", "Johannes Vermeer"], router="random")
    prompts = ["a cat in the style of Van Gogh"] * 4
    together = draw(pipe, prompts, range(4))
    alone = draw(pipe, prompts, range(4), batch_size=1)
    assert (together.int() - alone.int()).abs().max() <= 1


def test_generate_leaves_the_random_state_and_the_progress_bar(tiny_sd, capsys):
    pipe = tiny_sd()
    pipe.set_progress_bar_config(desc="mine", leave=False)
    state = torch.get_rng_state()
    draw(pipe, desc="before")
    assert torch.equal(state, torch.get_rng_state())
    assert pipe._progress_bar_config == {"desc": "mine", "leave": False}
    err = capsys.readouterr().err
    assert "before" in err
    assert "mine" not in err


def test_generate_is_silent_where_the_pipeline_is(tiny_sd, capsys):
    draw(tiny_sd())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("prompts", "seeds"), [([], []), (["a cat"], [1, 2])])
def test_generate_wants_a_seed_per_prompt(tiny_sd, prompts, seeds):
    with pytest.raises(ValueError, match="one seed per prompt"):
        draw(tiny_sd(), prompts, seeds)


LONG = "a long sentence about a house and a dog and a cat and a fish and " + "a bus and a key and " * 4 + "by"
FIELD = "case_number,prompt,evaluation_seed,artist\n1,a barn by Kelly Mckernan,42,Kelly Mckernan\n"


@pytest.fixture
def encoder(emoji_sd):
    return Encoder(emoji_sd)


def test_a_model_knows_the_names_that_its_tokenizer_keeps_whole(encoder):
    assert known(encoder, [*EMOJI_ARTISTS, "pizza", "four leaf clover"]) == [
        *EMOJI_ARTISTS, "pizza", "four leaf clover",
    ]  # fmt: skip
    assert known(encoder, read_prompts("artists10").names) == []


def test_names_that_are_cut_off(encoder):
    rows = [
        PromptRow(1, f"{LONG} Blobmoji", 1, "Blobmoji"),
        PromptRow(2, f"Blobmoji, {LONG} someone", 1, "Blobmoji"),
        PromptRow(3, f"{LONG} Microsoft Flat", 1, "Microsoft Flat"),
        PromptRow(4, "a fish by blobmoji", 1, "Blobmoji"),
        PromptRow(5, LONG, 1, ""),
        PromptRow(6, f"{LONG} nobody", 1, "Noto"),
    ]
    assert [row.case_number for row in cut_off(encoder, Prompts("few", "", tuple(rows)))] == [1, 3]
    # by the text itself: the encoder's answer is the same with and without the name
    full, cut = encoder.encode([rows[0].prompt, LONG])
    assert (full[:-1] == cut[:-1]).all()
    # to the last token: a name that just fits is read
    fits = "a " * (encoder.length - 3) + "Blobmoji"
    for prompt, expected in ((fits, []), (f"a {fits}", [9])):
        row = PromptRow(9, prompt, 1, "Blobmoji")
        assert [one.case_number for one in cut_off(encoder, Prompts("one", "", (row,)))] == expected
    assert not cut_off(encoder, read_prompts("emoji10"))


def test_all_is_refused_where_nobody_is_known(emoji_sd, tmp_path):
    with pytest.raises(
        BenchmarkError, match=r"knows no artist of artists10.*'Van Gogh' is 5 tokens.*instead of `all`"
    ):
        run_artists(emoji_sd, "original", "artists10", "all", remap_to=None, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_case_is_folded_between_prompts_targets_and_what_is_asked(tiny_sd, tmp_path):
    (tmp_path / "field.csv").write_text(FIELD, encoding="utf-8")
    output = tmp_path / "out"
    run_artists(
        tiny_sd(), "original", tmp_path / "field.csv", "kelly mckernan", remap_to=read_targets("targets"),
        output=output, steps=1,
    )  # fmt: skip
    config = json.loads((output / "config.json").read_text("utf-8"))
    assert list(config["forget"]) == ["Kelly Mckernan"]
    assert config["forget"]["Kelly Mckernan"]["remap_to"] == ["Alphonse Mucha"]
    (tmp_path / "twice.csv").write_text("forget,remap_to\nA b,c\na B,d\n", encoding="utf-8")
    with pytest.raises(BenchmarkError, match="line 3: 'a B' occurs twice"):
        read_targets(tmp_path / "twice.csv")
