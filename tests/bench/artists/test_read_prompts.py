import pytest

import more_hf
from more_hf_bench.artists.prompts import read_prompts, read_targets
from more_hf_bench.artists.run import run_artists
from more_hf_bench.errors import BenchmarkError


HEADER = "case_number,prompt,evaluation_seed,artist,thing,group\n"


def test_the_packaged_prompts():
    prompts = read_prompts("emoji10")
    assert prompts.names == list(more_hf.data.EMOJI_ARTISTS)
    assert all(len(prompts.group_of(artist)) == 4 for artist in prompts.names)
    assert len({row.evaluation_seed for row in prompts.rows}) == len(prompts.rows)
    assert read_prompts("artists10").names[0] == "Van Gogh"
    assert set(read_targets("targets")) >= set(prompts.names) | set(read_prompts("artists10").names)
    for forget, targets in read_targets("targets").items():
        assert forget not in targets
    assert [row.case_number for row in prompts.limited(1)] == [row.case_number for row in prompts.rows[::20]]


def test_the_fields_own_files(tmp_path):
    path = tmp_path / "big_artist_prompts.csv"
    path.write_text(
        '\ufeff,case_number,prompt,evaluation_seed,artist\n0,7,"a barn, by A",42,A\n1,8,a boat by B,43,B\n',
        encoding="utf-8",
    )
    prompts = read_prompts(path)
    assert [(row.case_number, row.prompt, row.evaluation_seed, row.artist) for row in prompts.rows] == [
        (7, "a barn, by A", 42, "A"),
        (8, "a boat by B", 43, "B"),
    ]
    assert prompts.group_of("A") == ["B"]  # the field compares within one file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case_number,prompt,artist\n1,a cat,A\n", r"line 1: no column 'evaluation_seed'"),
        (HEADER + "1,a cat,2,A,cat,g\n1,a dog,3,A,dog,g\n", r"line 3: case_number 1 is already on line 2"),
        (HEADER + "1,a cat,2.5,A,cat,g\n", r"line 2: evaluation_seed is '2.5'"),
        (HEADER + "1,a cat,-2,A,cat,g\n", r"line 2: evaluation_seed is '-2'"),
        (HEADER + "x,a cat,2,A,cat,g\n", r"line 2: case_number is 'x'"),
        (HEADER + "1,,2,A,cat,g\n", r"line 2: the prompt is empty"),
        (HEADER + "1,a cat,2,A\n", r"line 2: the number of cells"),
        (HEADER, r"has no rows"),
        ("", r"no column"),
    ],
    ids=["column", "twice", "seed", "negative", "case", "prompt", "cells", "rows", "nothing"],
)
def test_what_is_wrong_with_a_prompts_file_is_said_before_anything_is_made(tiny_sd, tmp_path, text, message):
    path = tmp_path / "wrong.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BenchmarkError, match=rf"wrong\.csv.*{message}"):
        run_artists(tiny_sd(), "original", path, "A", remap_to=None, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_prompts_file_names_the_packaged_ones(tmp_path):
    with pytest.raises(BenchmarkError, match="artists10, emoji10"):
        read_prompts(tmp_path / "nowhere.csv")
