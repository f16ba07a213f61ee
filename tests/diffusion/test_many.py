"""Many concepts at once: what `auto` takes, and that a soft edit has everything that an exact one has."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import more_hf


NAMES = ["van gogh", "pablo picasso", "cat", "dog", "house", "tree", "car"]
THINGS = ["cat face", "dog face", "rocket", "pizza", "guitar", "sunflower", "key", "bell", "fish", "house"]
THINGS += ["bicycle", "lemon", "ant", "crab"]
OPTIONS = {"remap_to": "claude monet", "retain": ["andy warhol"]}


@pytest.fixture(scope="module")
def soft():
    from support.pipelines import build_tiny_sd

    return more_hf.erase_concept(build_tiny_sd(), NAMES, **OPTIONS)


def test_one_is_exact_and_many_are_soft(tiny_sd, soft):
    one = more_hf.get_erasure(more_hf.erase_concept(tiny_sd(), NAMES[0], **OPTIONS))
    assert one.facts.solver in ("pinv", "covariance")
    assert one.facts.tokens is None
    many = more_hf.get_erasure(soft)
    assert many.facts.solver == "soft"
    assert many.facts.tokens == "last+end"
    assert many.facts.rank == 2 * len(NAMES)
    assert "exact with last+end would move them by" in many.facts.solver_reason
    assert "last+end, of positions" in many.to_markdown()
    assert "measured `way_left`" in many.to_markdown()


def test_the_softer_edit_moves_ordinary_prompts_less(tiny_sd, soft):
    exact = more_hf.erase_concept(tiny_sd(), NAMES, solver="covariance", tokens="last+end", **OPTIONS)
    moved = [more_hf.get_erasure(pipe).guarantees["ordinary_moved"] for pipe in (soft, exact)]
    assert 0 < moved[0] < moved[1]


def test_a_router_stays_exact(tiny_sd):
    pipe = more_hf.erase_concept(
        tiny_sd(), NAMES[:3], remap_to=["claude monet", "andy warhol"], router="random"
    )
    assert more_hf.get_erasure(pipe).guarantees["nothing_left"] < 1e-9
    with pytest.raises(more_hf.PrototypeError, match="No exact edit exists"):
        more_hf.erase_concept(tiny_sd(), [*NAMES, *"abcdefghijklm"], **OPTIONS, router="random")


def test_restored_bit_for_bit(tiny_sd):
    pipe = tiny_sd()
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    more_hf.erase_concept(pipe, NAMES, **OPTIONS)
    assert not all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    more_hf.restore(pipe)
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())


@pytest.mark.slow
def test_a_folder_is_verified_and_the_originals_weights_are_not(tmp_path):
    pipe = more_hf.load_emoji_sd()
    original = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    more_hf.erase_concept(pipe, THINGS, remap_to="eye")
    folder = more_hf.save(pipe, tmp_path / "soft")
    assert more_hf.get_erasure(more_hf.load(folder)).facts.solver == "soft"
    verification = more_hf.verify(folder)
    assert verification
    assert "is left" in verification.to_markdown()
    # and the same folder with the original's weights
    file = next((folder / "unet").glob("*.safetensors"))
    save_file({name: original[name].contiguous() for name in load_file(file)}, file, {"format": "pt"})
    checks = {check.name: check for check in more_hf.verify(folder).checks}
    assert not checks["each sends p_f where p_t goes"].passed
