"""`compare`: the rows are what the pipelines draw, and what is not here is said."""

import copy

import numpy as np
import pytest
import torch
from support.families import TINY

import more_hf
from more_hf import MoreError
from more_hf.core.request import ConceptRequest
from more_hf.diffusion import compare as module
from more_hf.diffusion.compare import target_prompt


PROMPTS = ["a rocket in the style of Blobmoji", "a rocket"]
QUICK = {"num_inference_steps": 2, "guidance_scale": 4.0}


@pytest.fixture
def drawn(monkeypatch):
    """What the last picture was made of: its rows of arrays, labels and title."""
    seen = {}

    def watch(rows, **options):
        seen.update(options)
        seen["rows"] = {label: [picture and np.asarray(picture) for picture in rows[label]] for label in rows}
        return draw_grid(rows, **options)

    draw_grid = module.draw_grid
    monkeypatch.setattr(module, "draw_grid", watch)
    return seen


@pytest.fixture(scope="module")
def erased(emoji_sd):
    return more_hf.erase_concept(copy.deepcopy(emoji_sd), "Blobmoji", remap_to=["Fluent"])


def by_hand(pipe, prompts, seeds):
    pictures = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        image = pipe(prompt, generator=torch.Generator().manual_seed(seed), **QUICK).images[0]
        pictures.append(np.asarray(image))
    return pictures


def test_every_row_is_what_the_pipelines_draw_by_hand(drawn, erased, emoji_sd):
    picture = more_hf.compare(erased, PROMPTS, seed=3, **QUICK)
    rows = drawn["rows"]
    assert list(rows) == ["before", "after", "target"]
    assert np.array_equal(rows["before"], by_hand(emoji_sd, PROMPTS, [3, 4]))
    assert np.array_equal(rows["after"], by_hand(erased, PROMPTS, [3, 4]))
    (wanted,) = by_hand(emoji_sd, ["a rocket in the style of Fluent"], [3])
    assert np.array_equal(rows["target"][0], wanted)
    assert rows["target"][1] is None
    assert not np.array_equal(rows["before"][0], rows["after"][0])
    assert drawn["column_labels"] == tuple(PROMPTS)
    assert picture.width > 2 * 128  # 64 pixels are enlarged


def test_an_original_that_is_not_here(drawn, emoji_sd, erased, tmp_path, caplog):
    loaded = more_hf.load(more_hf.save(erased, tmp_path / "saved"))
    more_hf.compare(loaded, PROMPTS[0], **QUICK)
    assert list(drawn["rows"]) == ["after"]
    assert "the original is not here" in drawn["title"]
    assert "Pass `original=`" in caplog.text
    assert "emoji-sd" in caplog.text

    more_hf.compare(loaded, PROMPTS[0], original=emoji_sd, **QUICK)
    assert list(drawn["rows"]) == ["before", "after", "target"]
    assert np.array_equal(drawn["rows"]["before"], by_hand(emoji_sd, PROMPTS[:1], [0]))


def test_two_pipelines_without_a_record(drawn, emoji_sd, erased):
    with pytest.raises(MoreError, match="Nothing was erased"):
        more_hf.compare(emoji_sd, PROMPTS, **QUICK)
    more_hf.compare(emoji_sd, PROMPTS[1], original=erased, **QUICK)
    assert list(drawn["rows"]) == ["before", "after"]
    with pytest.raises(MoreError, match="empty"):
        more_hf.compare(erased, [])


@pytest.mark.slow
def test_a_router_draws_the_same_picture_again(drawn, emoji_sd):
    pipe = copy.deepcopy(emoji_sd)
    more_hf.erase_concept(pipe, "Blobmoji", remap_to=["Fluent", "Noto"], router="random")
    rows = []
    for _ in range(2):
        more_hf.compare(pipe, PROMPTS, **QUICK)
        rows.append(drawn["rows"])
    assert list(rows[0]) == ["before", "after"]  # of two targets neither is the right one
    assert np.array_equal(rows[0]["after"], rows[1]["after"])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "pixart"])
def test_every_family(family, erased_families, drawn):
    erasure = more_hf.get_erasure(erased_families[family])
    prompt = f"a house by {erasure.concepts[0]}"
    settings = {"num_inference_steps": 1, "height": 32, "width": 32, **TINY[family].call}
    more_hf.compare(erased_families[family], prompt, **settings)
    assert {"before", "after"} <= set(drawn["rows"])


def test_target_prompt():
    request = ConceptRequest(
        concepts={"Van Gogh": ("Vincent van Gogh",), "Noto": (), "Monet": ()},
        remap_to={"Van Gogh": ("Vermeer",), "Noto": ("Fluent",), "Monet": ("Klimt", "Schiele")},
    )
    assert target_prompt("a bar by Vincent van Gogh", request) == "a bar by Vermeer"
    assert target_prompt("NOTO, van gogh", request) == "Fluent, Vermeer"
    assert target_prompt("a notorious bar", request) is None
    assert target_prompt("Noto and Monet", request) is None
