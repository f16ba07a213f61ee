"""A victim at tiny size, and the embedded pipeline as two."""

import copy

import pytest
from support.victims import StubJudges, prompt_rows

import more_hf
from more_hf_bench.artists.judges import EmojiJudges
from more_hf_bench.artists.prompts import read_prompts
from more_hf_bench.attacks.pictures.studio import Studio
from more_hf_bench.attacks.pictures.victim import Victim


@pytest.fixture
def tiny_victim(tiny_sd):
    """A factory: `tiny_victim(edit=None, **victim)`; `edit` is done to the pipeline that is attacked."""

    def build(edit=None, **options):
        pipe = tiny_sd("2")
        pipe.set_progress_bar_config(disable=True)
        tests, lessons = prompt_rows("a {thing} by {artist}"), prompt_rows("{artist} {thing}", first=100)
        studio = Studio(pipe, tests, lessons, StubJudges(), steps=2, guidance=2.0, batch_size=4)
        attacked = copy.copy(pipe)
        attacked.register_modules(unet=copy.deepcopy(pipe.unet))
        if edit is not None:
            attacked = edit(attacked)
        return Victim(attacked, studio, "van gogh", "pablo picasso", **options)

    return build


@pytest.fixture(scope="module")
def emoji_victims(emoji_sd):
    """The embedded pipeline as it is and without High Contrast, six test prompts each."""
    tests, lessons = read_prompts("emoji10").rows, read_prompts("emoji10_validation").rows
    studio = Studio(emoji_sd, tests, lessons, EmojiJudges(), steps=10, guidance=4.0, limit=6)
    erased = copy.copy(emoji_sd)
    erased.register_modules(unet=copy.deepcopy(emoji_sd.unet))
    erased = more_hf.erase_concept(erased, "High Contrast", remap_to=["Twemoji"])
    return {
        name: Victim(pipe, studio, "High Contrast", "Fluent")
        for name, pipe in (("original", emoji_sd), ("erased", erased))
    }
