import pytest
import torch

import more_hf
from more_hf_bench.artists.generate import generate


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
